"""The joint decision: ranks by hand, NaN, weights and limits, sources, and its way to disk and back."""

from itertools import islice

import numpy as np
import pytest

from lib.data.audio import read_audio
from lib.data.packages import embedded_sources
from lib.detector import Detector
from lib.engine import side_by_side
from lib.model.evidence import WEIGHTS, Evidence
from lib.model.texture import TextureStudent
from lib.settings import RATE_HZ
from tests.test_lines import RATE, comb, speechlike

STUDENT = TextureStudent().eval()


@pytest.fixture(scope="module")
def evidence():
    random = np.random.default_rng(0)
    return Evidence(STUDENT, random.standard_normal((99, 2)), random.uniform(1, 8, 99), ["a"] * 50 + ["b"] * 49,
                    {"lines": 1.0, "texture": 0.5})


def test_p_values_are_ranks_among_real_speech(evidence):
    assert evidence.p_value([50.0, 50.0], 3.0) == 1 / 100 and evidence.p_value([-50.0, -50.0], 3.0) == 1.0
    highest = evidence.values[:, 1].max()
    assert evidence.p_values([np.nan, highest], 3.0) == {"lines": 1.0, "texture": 2 / 100}


def test_the_sum_is_weighted_and_limited_and_what_was_not_measured_is_typical(evidence):
    assert evidence.joint([np.nan, np.nan], 3.0) == 0.0
    assert evidence.joint([1e9, 1e9], 3.0) == 12 + 0.5 * 12
    assert evidence.joint([-1e9, -1e9], 3.0) == 0 - 0.5, "few lines are no sign of real speech"
    middle = np.median(evidence.values[:, 0])
    spread = 1.4826 * np.median(np.abs(evidence.values[:, 0] - middle))
    assert evidence.joint([middle + 3 * spread, np.nan], 3.0) == pytest.approx(3.0)


def test_recordings_are_compared_with_those_of_like_length():
    seconds, values = np.repeat([1.0, 8.0], 400), np.repeat([[0.0], [10.0]], 400, axis=0)
    values = values + np.linspace(-1, 1, 400).repeat(2).reshape(2, 400).T.reshape(-1, 1)
    evidence = Evidence(STUDENT, values, seconds, ["x"] * 800, {"texture": 1.0})
    assert evidence.p_value([5.0], 1.0) == 1 / 401 and evidence.p_value([5.0], 8.0) == 1.0


def test_false_alarms_are_of_each_source_by_all_others(evidence):
    rates = evidence.false_alarms(0.05)
    assert set(rates) == {"a", "b"} and all(0 <= rate <= 0.2 for rate in rates.values())


def test_a_wrong_shape_is_an_error():
    with pytest.raises(ValueError, match="expected 2 recordings"):
        Evidence(STUDENT, np.zeros((2, 3)), [1.0, 2.0], ["a", "b"])


def test_a_detector_keeps_its_evidence_and_names_lines(tiny_detector, tmp_path):
    detector = Detector.load(tiny_detector.save(tmp_path / "plain"))
    assert detector.evidence is None
    real = [(speechlike(2.0, seed=seed), RATE) for seed in range(30)]
    detector.fit_evidence(real, ["toy"] * 30, STUDENT, [f"toy-{index}" for index in range(30)])
    loaded = Detector.load(detector.save(tmp_path / "joint"))
    assert loaded.fitted_on["evidence"][0] == "toy-0" and loaded.evidence.names == tuple(WEIGHTS)
    fake = speechlike(2.0, seed=99) + comb(80.0, 2.0, level=0.01)
    measured = loaded.measure(fake, RATE)
    assert measured.lines.spacing_hz == 80.0
    assert loaded.evidence.p_value(measured.values, measured.seconds) == 1 / 31
    assert loaded.score(fake, RATE) == detector.score(fake, RATE) > max(loaded.score(*pair) for pair in real[:5])


@pytest.mark.study
def test_one_two_and_five_seconds_of_the_same_real_speech_are_flagged_alike():
    """Forty recordings of a voice that calibrated nothing; a share of 5 % is passed by 7 of 40 once in 300 times."""
    sources = [source for source in embedded_sources() if source.corpus == "festvox-ru"]
    whole = (read_audio(source.path, RATE_HZ)[0] for source in sources[::7])
    long = list(islice((audio for audio in whole if len(audio) >= 5.5 * RATE_HZ), 40))
    detector, flagged = Detector.load(), {}
    for seconds in (1, 2, 5):
        cuts = [audio[RATE_HZ // 2 :][: seconds * RATE_HZ] for audio in long]
        measured = side_by_side(lambda cut: detector.measure(cut, RATE_HZ), cuts)
        p_values = [detector.evidence.p_value(each.values, each.seconds) for each in measured]
        flagged[seconds] = sum(p <= 0.05 for p in p_values)
    assert len(long) == 40 and max(flagged.values()) <= 7, flagged
    assert max(flagged.values()) - min(flagged.values()) <= 5, flagged
