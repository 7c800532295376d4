import pytest

from lib import seeds
from lib.audit.robustness import NUMBERS, Familiar, condition_numbers
from lib.data.degradations import clipped, gain, low_passed, noise, offset, untouched
from tests.conftest import RATE, toy_speech


@pytest.fixture(scope="module")
def familiar():
    speech = [toy_speech(2.0, seed, 100 + 3 * seed) for seed in range(24)]
    return Familiar.fit(speech[:12], speech[12:])


def test_numbers_do_not_hear_level_and_offset():
    audio = toy_speech(2.0, 1)
    for degrade in (lambda a: gain(a, None, db=-20), lambda a: offset(0.5 * a, None, level=0.1)):
        assert condition_numbers(degrade(audio)) == pytest.approx(condition_numbers(audio), abs=0.05)


def test_numbers_say_what_was_done():
    audio, random = toy_speech(2.0, 1), seeds.stream(0, "x")
    base = dict(zip(NUMBERS, condition_numbers(audio)))
    found = lambda touched: dict(zip(NUMBERS, condition_numbers(touched)))  # noqa: E731
    assert found(noise(audio, random, snr_db=10))["noise_floor_db"] > base["noise_floor_db"] + 5
    assert found(low_passed(audio, random, edge_hz=3000))["bandwidth_hz"] < 4200 < base["bandwidth_hz"]
    assert found(clipped(audio, random, share=0.05))["clipped_share"] > 0.005 > base["clipped_share"]
    assert found(audio[:RATE])["speech_s"] < 1.01 < base["speech_s"]


@pytest.mark.parametrize(("degrade", "outside"), [
    (lambda a, r: untouched(a, r), False), (lambda a, r: gain(a, r, db=-20), False),
    (lambda a, r: noise(a, r, snr_db=0), True), (lambda a, r: low_passed(a, r, edge_hz=2000), True),
    (lambda a, r: clipped(a, r, share=0.2), True)])
def test_what_is_outside(familiar, degrade, outside):
    audio = toy_speech(2.0, 77, 130)
    assert familiar.outside(degrade(audio, seeds.stream(0, "y"))) == outside


def test_the_limit_is_conformal():
    speech = [toy_speech(1.2, seed) for seed in range(3)]
    few = Familiar.fit(speech, speech)
    assert few.limit == pytest.approx(max(max(map(abs, few.deviations(one).values())) for one in speech))
    with pytest.raises(ValueError, match="at least 3"):
        Familiar.fit(speech[:2], speech)
