import numpy as np
import pandas as pd
import pytest

from lib import seeds
from lib.audit.robustness import CONDITIONS
from lib.audit.shortcuts import INTERVENTIONS, equivalence, intervention_table, swap_table, transplanted
from lib.data.degradations import (
    babble,
    ffmpeg_codec,
    joined,
    levelled,
    noise,
    pauses_cut,
    pauses_muted,
    silence,
    untouched,
)
from tests.conftest import RATE, toy_speech

RANDOM = seeds.stream(0, "degradations")


def level_db(audio):
    return 10 * np.log10(np.mean(np.asarray(audio, dtype=np.float64) ** 2) + 1e-20)


@pytest.fixture(scope="module")
def audio():
    return toy_speech(1.5, 4)


def every():
    groups = [*CONDITIONS.items(), *INTERVENTIONS.items()]
    groups = [names for group, names in groups if group != "codec"]
    return [pytest.param(degrade, id=name) for names in groups for name, degrade in names.items()]


@pytest.mark.parametrize("degrade", every())
def test_every_condition_gives_finite_mono_float32_again_and_again(audio, degrade):
    further = {"other": audio} if getattr(degrade, "func", None) is joined else {}
    made, again = (degrade(audio, seeds.stream(0, "x"), **further) for _ in range(2))
    assert made.dtype == np.float32 and made.ndim == 1 and np.isfinite(made).all() and len(made) >= 0.3 * RATE
    assert np.array_equal(made, again)


def test_noise_and_babble_have_the_ratio_they_are_named_for(audio):
    voices = [toy_speech(1.0, seed, 90 + 20 * seed) for seed in range(8)]
    for snr in (30, 10, 0):
        for touched in (noise(audio, RANDOM, snr_db=snr), noise(audio, RANDOM, snr_db=snr, colour="pink"),
                        babble(audio, RANDOM, snr_db=snr, voices=voices)):
            assert level_db(audio) - level_db(touched - audio) == pytest.approx(snr, abs=0.1)


def test_silence_goes_where_it_should(audio):
    second = RATE
    before, inside = silence(audio, RANDOM, seconds=1.0), silence(audio, RANDOM, seconds=1.0, inside=True)
    assert len(before) == len(inside) == len(audio) + second and not before[:second].any() and inside[:1000].any()
    assert np.array_equal(before[second:], audio) and len(pauses_cut(before, RANDOM)) <= len(audio)
    with_pause = np.concatenate([audio, 1e-4 * np.ones(second, np.float32), audio])
    assert np.abs(pauses_muted(with_pause, RANDOM)[len(audio) + 2000 : len(audio) + second - 2000]).max() == 0


def test_levels_lengths_and_joins(audio):
    assert level_db(levelled(0.01 * audio, RANDOM)) == pytest.approx(-26, abs=0.01)
    other = toy_speech(1.0, 9)
    long = joined(audio, RANDOM, seconds=10.0, other=other)
    assert len(long) == 10 * RATE and np.array_equal(long[len(audio) : len(audio) + len(other)], other)


def test_a_transplanted_chain_is_the_others(audio):
    other = np.convolve(toy_speech(1.5, 8, 180), [1.0, -0.9])[: len(audio)].astype(np.float32) * 0.1
    moved = transplanted(audio, other)
    assert level_db(moved) == pytest.approx(level_db(other), abs=0.5)
    tilt = lambda one: level_db(np.diff(one)) - level_db(one)  # noqa: E731
    assert abs(tilt(moved) - tilt(other)) < abs(tilt(audio) - tilt(other)) / 3


@pytest.mark.parametrize("name", [name for name in CONDITIONS["codec"] if "32" in name or "64" in name or "48" in name])
def test_codecs_keep_length_and_place(audio, name):
    try:
        coded = CONDITIONS["codec"][name](audio, RANDOM)
    except RuntimeError as error:
        pytest.skip(str(error))
    assert len(coded) == len(audio) and coded.dtype == np.float32
    assert np.corrcoef(coded, audio)[0, 1] > 0.5, "aligned with what went in"


def test_a_codec_that_nobody_has_is_named(audio):
    with pytest.raises(RuntimeError, match="nobody's codec|ffmpeg"):
        ffmpeg_codec(audio, RANDOM, codec="nobody's codec", container="wav")


def test_equivalence_by_hand():
    """Differences of mean 0.1, deviation 0.2, n 16: standard error 0.05; t quantile 1.7531 at 15 degrees."""
    values = 0.1 + 0.2 * np.sqrt(15 / 16) * np.tile([1, -1], 8)
    interval, p_value = equivalence(values, 0.2)
    assert interval == pytest.approx((0.1, 0.1 - 1.7531 * 0.05, 0.1 + 1.7531 * 0.05), abs=1e-3)
    assert p_value == pytest.approx(0.0320, abs=1e-3)  # t = 2 with 15 degrees, one side
    assert equivalence(values, 0.18)[1] > 0.05, "the 90 % interval reaches beyond"
    assert equivalence(np.zeros(5), 0.1)[1] == 0
    with pytest.raises(ValueError, match="margin"):
        equivalence([1, 2], 0)


def test_the_intervention_table_tells_a_confound_from_a_harmless_change():
    random = np.random.default_rng(0)
    rows = []
    for condition, moved in (("untouched", 0.0), ("gain -20 dB", 0.0), ("G.722", 5.0)):
        for role, generator, middle in (("bonafide", "", 0.0), ("copysynth", "world", 3.0)):
            values = middle + moved * (role == "bonafide") + np.random.default_rng(1).standard_normal(60)
            values += 0.5 * random.standard_normal(60) * (condition != "untouched")
            rows += [(condition, role, generator, f"{generator}{n}", value) for n, value in enumerate(values)]
    columns = ["condition", "role", "generator", "clip_id", "anomaly"]
    table = intervention_table(pd.DataFrame(rows, columns=columns), INTERVENTIONS)
    table = table.set_index("intervention")
    assert table.loc["untouched", "shift"] == 0 and table.loc["untouched", "real told apart"] == 0.5
    assert abs(table.loc["gain -20 dB", "shift"]) < 0.5 and table.loc["gain -20 dB", "AUC, real only"] > 0.95
    codec = table.loc["G.722"]
    assert codec["shift"] > 4 and codec["AUC, real only"] < 0.2 and codec["real told apart"] > 0.95
    assert codec["confound"] == "codec"
    assert table.loc["gain -20 dB", "p (within margin)"] < 0.05 < table.loc["G.722", "p (within margin)"]
    assert table.loc["gain -20 dB", "shift low"] > -0.3 and table.loc["gain -20 dB", "shift high"] < 0.3


def test_the_swap_table_is_in_deviations_of_real_speech():
    random = np.random.default_rng(0)
    rows = []
    for parent in range(40):
        own = random.standard_normal()
        for generator in ("a", "b"):
            rows += [(generator, str(parent), "real", "own", own),
                     (generator, str(parent), "real", "of its copy", own + 0.1),
                     (generator, str(parent), "copy", "own", own + 4),
                     (generator, str(parent), "copy", "of its real parent", own + 4)]
    table = swap_table(pd.DataFrame(rows, columns=["generator", "parent", "speech", "channel", "anomaly"]), 200)
    assert len(table) == 8 and (table.low <= table["median"]).all() and (table["median"] <= table.high).all()
    cells = table.set_index(["generator", "speech", "channel"])
    assert cells.loc[("a", "real", "own"), "median"] == pytest.approx(0, abs=1e-9)
    assert cells.loc[("a", "copy", "own"), "AUC against real"] > 0.95
    assert cells.loc[("b", "real", "of its copy"), "AUC against real"] < 0.6


def test_untouched_is_untouched(audio):
    assert untouched(audio, RANDOM) is audio
