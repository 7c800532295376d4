from copy import copy as copy_of
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

from lib.audit.operating_points import (
    AWAY,
    CONSTRUCTIONS,
    WITHOUT,
    by_voice,
    detection,
    of_persons,
    p_values,
    person_points,
    points,
    rate_interval,
    settings_of,
    smallest,
)
from lib.data.scorefiles import FRAME, OURS
from lib.model.evidence import WEIGHTS, Evidence
from lib.model.texture import TextureStudent


def voices(random, count, clips, spread=1.0):
    """Anomalies of `count` speakers who differ: (clip,) anomalies and names."""
    middle = spread * random.standard_normal(count)
    anomalies = middle[:, None] + random.standard_normal((count, clips))
    return anomalies.ravel(), np.repeat([f"v{i}" for i in range(count)], clips)


def test_hand_computed():
    calibration, names = np.array([1.0, 2.0, 3.0, 10.0]), ["a", "a", "a", "b"]
    assert p_values(calibration, names, [2.0, 11.0], "clips").tolist() == [4 / 5, 1 / 5]
    # Of a, two of three clips are at least 2, of b all: (1 + 2/3 + 1) / 3.
    assert p_values(calibration, names, [2.0, 11.0]) == pytest.approx([8 / 9, 1 / 3])
    assert p_values(calibration, names, [2.0, 11.0], "speakers, doubled") == pytest.approx([1.0, 2 / 3])
    assert [smallest(calibration, names, one) for one in CONSTRUCTIONS] == pytest.approx([1 / 5, 1 / 3, 2 / 3])


def test_one_clip_a_speaker_is_the_ordinary_conformal_p_value():
    random = np.random.default_rng(0)
    calibration, anomalies = random.standard_normal(30), random.standard_normal(7)
    names = [str(index) for index in range(30)]
    assert p_values(calibration, names, anomalies) == pytest.approx(p_values(calibration, names, anomalies, "clips"))


def test_clips_as_the_unit_flag_new_voices_too_often_and_speakers_do_not():
    """Voices differ more than clips of one: a talkative calibration voice makes pooled clips too sure of themselves."""
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
    assert np.mean(rates["speakers"]) < 0.25 and np.mean(rates["speakers, doubled"]) < 0.2


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


def test_cross_conformal_by_hand():
    """Each calibration clip is compared with the test clip under the model that has not heard its speaker."""
    calibration, names = np.array([1.0, 2.0, 3.0, 10.0]), ["a", "a", "a", "b"]
    folds = np.array([[2.5, 0.0], [11.0, 9.0]])  # under the model without a, and without b
    # Of a, one of three is at least 2.5, of b none at least 11: (1 + 1 + 0) / 5; the second clip: all of both.
    assert p_values(calibration, names, folds, "clips").tolist() == [2 / 5, 1.0]
    assert p_values(calibration, names, folds) == pytest.approx([(1 + 1 / 3) / 3, 1.0])
    same = np.array([[2.5, 0.0]] * 2)
    ordinary = p_values(calibration, names, same[0], "clips")
    assert p_values(calibration, names, same, "clips").tolist() == ordinary.tolist()


def test_cross_conformal_flags_as_often_as_it_says_where_a_full_model_does_not():
    """Calibration clips that their own model has heard score too low; left out, they score as new clips do."""
    random, rates = np.random.default_rng(4), []
    for _ in range(400):
        speech = random.standard_normal((10, 4)) + 2 * random.standard_normal((10, 1))
        new = random.standard_normal(4) + 2 * random.standard_normal()
        means = [(speech.sum() - own.sum()) / 36 for own in speech]  # the model: the mean of the other voices
        left_out = np.concatenate([np.abs(own - mean) for own, mean in zip(speech, means)])
        folds = np.abs(new[None] - np.array(means)[:, None])
        rates.append(np.mean(p_values(left_out, np.repeat(np.arange(10).astype(str), 4), folds, "speakers") <= 0.2))
    assert 0.12 < np.mean(rates) < 0.24


def frame_of(rows):
    columns = ["experiment", "split", "system", "role", "generator", "speaker", "clip_id", "anomaly"]
    table = pd.DataFrame(rows, columns=columns)
    return table.assign(kind="ours", seed=0, family="", source="new source", parent="")[FRAME]


@pytest.fixture(scope="module")
def frame():
    real = np.linspace(0, 1, 50)
    tests = [("bonafide", "", "x", 0.1), ("bonafide", "", "x", 0.2), ("bonafide", "", "y", 0.3),
             ("bonafide", "", "y", 5.0), ("copysynth", "world", "x", 5.0), ("copysynth", "vocoder", "y", 0.1),
             ("tts", "voice", "voice", 9.0), ("control", "control_noise", "x", 9.0)]
    rows = [("multi", "threshold", system, "bonafide", "", voice, f"{voice}{n}", value) for voice in "ab"
            for system in (OURS, WITHOUT + voice) for n, value in enumerate(real)]
    rows += [("single", "threshold", OURS, "bonafide", "", "a", f"s{n}", value) for n, value in enumerate(real)]
    for experiment, system in (("multi", OURS), ("multi", WITHOUT + "a"), ("multi", WITHOUT + "b"), ("multi", AWAY)):
        rows += [(experiment, "test", system, role, generator, voice, f"t{n}", value)
                 for n, (role, generator, voice, value) in enumerate(tests)]
    return frame_of(rows)


def test_points_detection_and_voices(frame):
    assert [name for name, _ in settings_of(frame)] == ["new voices", "another corpus", "new voices, cross-conformal"]
    table = points(frame).set_index(["setting", "construction", "nominal"])
    for setting in ("new voices", "new voices, cross-conformal"):
        row = table.loc[(setting, "clips", 0.05)]
        assert row["false alarms"] == 0.25 and row["worst voice"] == 0.5 and row.resolved
        assert row["copies found"] == 0.5 and row["speech synthesis found"] == 1.0 and row.low < 0.25 < row.high
        few = table.loc[(setting, "speakers", 0.10)]
        assert not few.resolved and few["false alarms"] == 0
    assert set(table.loc["another corpus"].index.get_level_values(0)) == {"clips"}
    shares = detection(frame)
    shares = shares[shares.setting == "new voices"].set_index("generator")
    assert shares.clips.tolist() == [1, 1, 1]
    assert shares.loc["world", "5%"] == 1.0 and shares.loc["vocoder", "5%"] == 0.0
    voices = by_voice(frame).set_index("speaker")
    assert voices["flagged at 5%, clips"].to_dict() == {"x": 0.0, "y": 0.5} and voices.clips.tolist() == [2, 2]


def test_a_rate_of_clips_of_few_voices_has_a_wide_interval():
    random = np.random.default_rng(0)
    anomalies, voices = random.standard_normal(80), np.repeat(np.arange(8).astype(str), 10)
    flagged = np.isin(voices, ["0", "1"])  # all of two voices, none of the others
    by_voices, by_clips = rate_interval(flagged, anomalies, voices), rate_interval(flagged, anomalies, range(80))
    assert by_voices.value == 0.25 and by_voices.high - by_voices.low > 2 * (by_clips.high - by_clips.low)
    none = rate_interval(np.zeros(80, bool), anomalies, range(80))
    assert none == (0, 0, pytest.approx(1 - 0.025 ** (1 / 80))), "none of 80: the exact bound"


def test_points_of_persons_by_hand():
    """a: real 1 and 2, copies 3 and 1.5 (three of four pairs in order); b: real 0, copy 1 (all)."""
    rows = [("a", "", 1.0, 0.5), ("a", "", 2.0, 0.05), ("a", "world", 3.0, 0.01), ("a", "world", 1.5, 0.2),
            ("b", "", 0.0, 0.9), ("b", "griffin_lim", 1.0, 0.04)]
    table = pd.DataFrame(rows, columns=["speaker", "generator", "anomaly", "p_value"])
    table = pd.concat([table.assign(minutes=0, pyramid=-table.anomaly), table[:4].assign(minutes=1, pyramid=0.0)])
    none, one = person_points(table).to_dict("records")
    assert (none["persons"], none["AUC"], none["lowest AUC"]) == (2, (0.75 + 1) / 2, 0.75)
    assert none["AUC of the pyramid"] == (0.25 + 0) / 2 and one["AUC of the pyramid"] == 0.5
    assert none["found"] == pytest.approx(2 / 3) and none["false alarms"] == pytest.approx(1 / 3)
    # One of three: the exact bounds solve 1 - (1 - p)^3 = 0.025 and (1 - p)^3 + 3 p (1 - p)^2 = 0.025.
    assert none["false alarms, low"] == pytest.approx(1 - 0.975 ** (1 / 3))
    high = none["false alarms, high"]
    assert (1 - high) ** 3 + 3 * high * (1 - high) ** 2 == pytest.approx(0.025)
    assert (one["persons"], one["found"], one["false alarms"]) == (1, 0.5, 0.5)


def test_persons_are_judged_by_their_own_speech(tiny_detector, voice, tmp_path, monkeypatch):
    fitted = []
    for name in "ab":
        for number in range(12 if name == "a" else 3):
            soundfile.write(tmp_path / f"{name}{number}.wav", voice(4.0, 60 + number), 16000)
    paths = sorted(tmp_path.glob("*.wav"))
    rows = [(path.stem, str(path), path.name[0]) for path in paths]
    clips = pd.DataFrame(rows, columns=["clip_id", "path", "speaker"])
    clips = clips.assign(seconds=4.0, role="bonafide", generator="", parent="")
    copy = clips[:1].assign(role="copysynth", generator="vocoder", parent="a5", clip_id="copy")

    class Counted(type(tiny_detector)):
        def fit(self, paths):
            fitted.append([Path(path).stem for path in paths])
            return super().fit(paths)

    detector = copy_of(tiny_detector)
    detector.__class__ = Counted
    spread = np.linspace(-1, 1, 40)[:, None] * np.ones(len(WEIGHTS))
    detector.evidence = Evidence(TextureStudent().eval(), spread, np.full(40, 4.0), ["toy"] * 40)
    table = of_persons(detector, pd.concat([clips, copy]), (0.6,), 2)
    own = table[table.speaker == "a"]
    assert set(own.generator) == {"", "vocoder"}, "copies that are there are taken"
    assert own.groupby("minutes").size().to_dict() == {0: 3, 0.6: 3} and len(fitted) == 1
    assert "a5" not in fitted[0] and 8 <= len(fitted[0]) <= 10, "0.6 minutes of clips of 4 s, none of them judged"
    assert set(table[table.speaker == "b"].minutes) == {0}, "4 s are less than half of the amount"
    assert set(table[table.speaker == "b"].generator) == {"", "world", "griffin_lim"}
    assert table.p_value.between(0, 1, inclusive="right").all()
