import numpy as np
import pandas as pd
import pytest

from lib.audit.operating_points import CONSTRUCTIONS, detection, p_values, points, smallest


def voices(random, count, clips, spread=1.0):
    """Anomalies of `count` speakers who differ: (clip,) anomalies and names."""
    middle = spread * random.standard_normal(count)
    return (middle[:, None] + random.standard_normal((count, clips))).ravel(), np.repeat([f"v{i}" for i in range(count)], clips)


def test_hand_computed():
    calibration, names = np.array([1.0, 2.0, 3.0, 10.0]), ["a", "a", "a", "b"]
    assert p_values(calibration, names, [2.0, 11.0], "clips").tolist() == [4 / 5, 1 / 5]
    # Of a, two of three clips are at least 2, of b all: (1 + 2/3 + 1) / 3.
    assert p_values(calibration, names, [2.0, 11.0]) == pytest.approx([8 / 9, 1 / 3])
    assert p_values(calibration, names, [2.0, 11.0], "speakers, guaranteed") == pytest.approx([1.0, 2 / 3])
    assert [smallest(calibration, names, one) for one in CONSTRUCTIONS] == pytest.approx([1 / 5, 1 / 3, 2 / 3])


def test_one_clip_a_speaker_is_the_ordinary_conformal_p_value():
    random = np.random.default_rng(0)
    calibration, anomalies = random.standard_normal(30), random.standard_normal(7)
    names = [str(index) for index in range(30)]
    assert p_values(calibration, names, anomalies) == pytest.approx(p_values(calibration, names, anomalies, "clips"))


def test_clips_as_the_unit_flag_new_voices_too_often_and_speakers_do_not():
    """Voices differ more than clips of one voice: one talkative calibration voice makes pooled clips too sure of themselves."""
    random, rates = np.random.default_rng(1), {name: [] for name in CONSTRUCTIONS}
    for _ in range(300):
        middle = 3 * random.standard_normal(20)
        counts = np.r_[400, np.full(19, 3)]
        names = np.repeat(np.arange(20).astype(str), counts)
        calibration = np.repeat(middle, counts) + random.standard_normal(counts.sum())
        new = 3 * random.standard_normal() + random.standard_normal(20)
        for name in CONSTRUCTIONS:
            rates[name].append(np.mean(p_values(calibration, names, new, name) <= 0.2))
    assert np.mean(rates["clips"]) > 0.3
    assert np.mean(rates["speakers"]) < 0.25 and np.mean(rates["speakers, guaranteed"]) < 0.2


def test_monotone_and_order_free():
    random = np.random.default_rng(2)
    calibration, names = voices(random, 6, 5)
    anomalies = np.sort(random.standard_normal(20) * 2)
    order = random.permutation(len(names))
    for name in CONSTRUCTIONS:
        p = p_values(calibration, names, anomalies, name)
        assert (np.diff(p) <= 1e-12).all() and (p > 0).all() and (p <= 1).all()
        assert np.allclose(p, p_values(calibration[order], names[order], anomalies, name))


def test_what_is_refused():
    with pytest.raises(ValueError, match="a speaker for each of 2"):
        p_values(np.zeros(2), ["a"], [1.0])
    with pytest.raises(ValueError, match="is not one of"):
        p_values(np.zeros(2), ["a", "b"], [1.0], "voices")


def test_points_and_detection():
    calibration = pd.DataFrame({"speaker": ["a"] * 50 + ["b"] * 50, "anomaly": np.linspace(0, 1, 100)})
    scores = pd.DataFrame({"role": ["bonafide"] * 4 + ["copysynth"] * 2 + ["tts"], "generator": [""] * 4 + ["world", "vocoder", "voice"],
                           "speaker": ["x", "x", "y", "y", "x", "y", "voice"], "anomaly": [0.1, 0.2, 0.3, 5.0, 5.0, 0.1, 9.0]},
                          index=[3, 1, 4, 15, 9, 2, 6])
    table = points(calibration, scores).set_index(["construction", "nominal"])
    row = table.loc[("clips", 0.05)]
    assert row["false alarms"] == 0.25 and row["worst voice"] == 0.5 and row.resolved
    assert row["copies found"] == 0.5 and row["speech synthesis found"] == 1.0 and row.low < 0.25 < row.high
    assert not table.loc[("speakers", 0.10)].resolved and table.loc[("speakers", 0.10)]["false alarms"] == 0
    found = detection(calibration, scores).set_index("generator")
    assert found.clips.tolist() == [1, 1, 1] and found.loc["world", "5%"] == 1.0 and found.loc["vocoder", "5%"] == 0.0
