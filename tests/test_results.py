"""Tables of score frames against hand-computed values, and their rebuilding from score files."""

import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from lib.data import scorefiles
from lib.data.scorefiles import FRAME, OURS, clusters, load_scores, parts_of, save_scores, score_frame, sources
from lib.evaluate import results
from lib.evaluate.baseline_networks import like_study
from lib.evaluate.metrics import MetricError
from lib.paths import PROJECT
from lib.settings import load_settings

COLUMNS = ["clip_id", "speaker", "parent", "corpus", "single", "multi", "role", "family", "generator", "text",
           "anomaly"]


def clip_table():
    """Two test voices with two real sentences and their copies each; one text-to-speech voice; one control."""
    parents, rows = ("x0", "x1", "y0", "y1"), []
    for parent, corpus, anomaly in zip(parents, ("a-ru", "a-ru", "b", "b"), (0.0, 1.0, 2.0, 3.0)):
        rows.append((parent, parent[0], "", corpus, "", "test", "bonafide", "", "", "", anomaly))
    for role, family, generator, anomalies in (("copysynth", "vocoder-signal", "world", (0.5, 4.0, 1.5, 5.0)),
                                               ("copysynth", "vocoder-neural", "hifi", (4.0, 5.0, 6.0, 7.0)),
                                               ("control", "control", "control_resample", (0.0, 1.0, 2.0, 3.0))):
        rows += [(f"{parent}_{generator}", parent[0], parent, "a-ru", "", "test", role, family, generator, "", anomaly)
                 for parent, anomaly in zip(parents, anomalies)]
    rows += [(f"kal_{n}", "kal", "", "kal", "", "test", "tts", "tts-diphone", "kal", f"sentence {n}", anomaly)
             for n, anomaly in enumerate((-1.0, 9.0))]
    return pd.DataFrame(rows, columns=COLUMNS)


def frame_of(shift=0.0, seed=0, system=OURS, kind="ours"):
    table = clip_table()
    table = table.assign(anomaly=table.anomaly + shift * (table.role == "copysynth"))
    return score_frame(table, "multi", system, kind, seed)


def copies_of(*frames):
    together = pd.concat(frames)
    return results.Sides.of(together[together.role.isin(["bonafide", "copysynth"])])


def test_auc_by_generator_by_hand():
    table = results.per_generator(frame_of(), "multi").set_index("generator")
    # world: copies 0.5, 4, 1.5, 5 above real 0, 1, 2, 3: 1 + 4 + 2 + 4 of 16 pairs.
    assert table.auc.to_dict() == {"world": 11 / 16, "hifi": 1.0, "kal": 4 / 8, "control_resample": 0.5}
    assert table.clips.to_dict() == {"world": 4, "hifi": 4, "kal": 2, "control_resample": 4}
    assert table.kind.tolist() == ["copysynth", "copysynth", "tts", "control"]
    assert table.eer["hifi"] == 0 and table.eer_low.isna().all()
    assert 0.15 < table.auc_low["hifi"] < 1 == table.auc_high["hifi"], "a perfect AUC of few clips is not certain"
    assert table.auc_low["world"] < 11 / 16 < table.auc_high["world"]
    assert results.per_generator(clip_table(), "multi", intervals=False).auc.tolist() == table.auc.tolist()
    assert results.summary_row(table.reset_index()) == {
        "copysynth": 27 / 32, "tts": 0.5, "all": pytest.approx(35 / 48), "lowest": 0.5, "control": 0.5}


def test_the_rate_of_errors_has_an_interval_of_clusters_that_is_never_empty():
    table = results.per_generator(frame_of(), "multi", 200).set_index("generator")
    assert table.eer_low["hifi"] == 0 and table.eer_high["hifi"] > 0.3
    assert (table.eer_low <= table.eer).all() and (table.eer <= table.eer_high).all()


def test_clusters_are_voices_or_sentences():
    frame = frame_of()
    names = dict(zip(frame.clip_id, clusters(frame)))
    assert (names["x0"], names["x0_world"], names["y1_hifi"]) == ("x", "x", "y")
    assert names["kal_0"] != names["kal_1"] and names["kal_0"].startswith("sentence ")
    single = frame.assign(experiment="single")
    names = dict(zip(single.clip_id, clusters(single)))
    assert (names["x0"], names["x0_world"], names["y1_hifi"]) == ("x0", "x0", "y1")


def test_families_of_the_headline():
    parts = {name: part.generator[part.role != "bonafide"].unique().tolist() for name, part in parts_of(frame_of())}
    assert parts == {"signal vocoder": ["world"], "neural vocoder": ["hifi"], "joined recordings": ["kal"],
                     "all copies": ["world", "hifi"], "all fakes": ["world", "hifi", "kal"],
                     "control_resample": ["control_resample"]}


def test_a_summary_is_the_mean_over_generators_and_seeds():
    frame = pd.concat([frame_of(), frame_of(-2.5, seed=1)])
    table = results.summary(frame).set_index("fakes")
    # The second seed's copies lie 2.5 lower: world -2, 1.5, -1, 2.5 beats 0 + 2 + 0 + 3 real clips,
    # hifi 1.5, 2.5, 3.5, 4.5 beats 2 + 3 + 4 + 4.
    world, hifi = (11 / 16 + 5 / 16) / 2, (1 + 13 / 16) / 2
    assert table.auc["signal vocoder"] == pytest.approx(world) and table.auc["neural vocoder"] == pytest.approx(hifi)
    assert table.auc["all copies"] == pytest.approx((world + hifi) / 2)
    assert table.lowest["all copies"] == pytest.approx(world)
    assert (table.seeds == 2).all() and table.auc["all fakes"] == pytest.approx((world + hifi + 0.5) / 3)
    # Within voices, x: world 3 and 2 of 4 pairs, hifi all; y: world 2 and 1 of 4, hifi all.
    assert table["within voices"]["all copies"] == pytest.approx(np.mean([[3 / 4, 1, 2 / 4, 1], [2 / 4, 1, 1 / 4, 1]]))
    alone = results.summary(frame_of()).set_index("fakes")
    assert table.auc_high["all copies"] - table.auc_low["all copies"] > 0 and alone.seeds["all copies"] == 1
    assert len(results.TABLES["33_seeds"][1](frame, 0)) == 2 * len(table)
    together = results.TABLES["33_ensemble"][1](frame, 0).set_index("fakes")
    assert together.auc["neural vocoder"] == pytest.approx(15 / 16)  # hifi 2.75, 3.75, 4.75, 5.75


def test_seeds_widen_an_interval():
    narrow, least = results.mean_auc(copies_of(frame_of(), frame_of(seed=1)))
    wide, _ = results.mean_auc(copies_of(frame_of(), frame_of(-4, seed=1)))
    assert wide.high - wide.low > narrow.high - narrow.low and least == 11 / 16


def test_voices_with_their_sources():
    trained = clip_table().head(1).assign(clip_id="t", speaker="z", corpus="a-en", multi="train")
    clips = pd.concat([clip_table(), trained])
    known = sources(clips, "multi")
    assert (known["x0"], known["y0"], known["t"]) == ("known collection", "new source", "known voice")
    table = results.per_voice(score_frame(clip_table(), "multi", clips=clips)).set_index("voice")
    assert table.source.to_dict() == {"x": "known collection", "y": "new source"}
    # x: world 0.5, 4 against 0, 1: 3 of 4; hifi all. y: 1.5, 5 against 2, 3: 2 of 4; hifi all.
    assert table["mean AUC"].tolist() == [0.875, 0.75] and table["lowest AUC"].tolist() == [0.75, 0.5]


def test_paired_differences_over_voices():
    frame = pd.concat([frame_of(), frame_of(-2.5, system="other", kind="one-class")])
    table = results.paired_table(frame).set_index(["fakes", "baseline"])
    row = table.loc[("all copies", "other")]
    assert row.difference == pytest.approx((11 - 5 + 16 - 13) / 32) and row["voices agreeing"] == "2 of 2"
    assert row["p (sign flips)"] == 0.5 and row.kind == "one-class" and row.low < row.difference < row.high
    same = table.loc[("all speech synthesis", "other")]
    assert same.difference == 0 and same["p (sign flips)"] == 1 and same.low < 0 < same.high
    assert table["p (Holm)"].tolist() == [1.0, 1.0]
    with pytest.raises(MetricError, match="scored other clips"):
        results.paired_table(pd.concat([frame_of(), frame_of(system="other")[lambda part: part.clip_id != "x0"]]))


def test_one_voice_is_compared_by_t_over_sentences():
    frame = pd.concat([frame_of(), frame_of(-2.5, system="other", kind="one-class")])
    row = results.paired_table(frame.assign(experiment="single", speaker="x")).iloc[0]
    assert math.isnan(row["p (sign flips)"]) and row["voices agreeing"] == "" and 0 < row["p (t)"] < 1


def test_score_files_are_whole_and_equal_bytes(tmp_path):
    frame = pd.concat([frame_of(1 / 3), frame_of(seed=1)])
    again = save_scores(frame, tmp_path / "a.csv.gz")
    save_scores(frame.sample(frac=1, random_state=0), tmp_path / "b.csv.gz")
    assert (tmp_path / "a.csv.gz").read_bytes() == (tmp_path / "b.csv.gz").read_bytes()
    assert list(again) == FRAME and len(again) == len(frame) and again.seed.dtype == int
    assert again.equals(load_scores(tmp_path / "a.csv.gz")) and again.source.eq("").all()
    assert again.anomaly.max() == pytest.approx(9) and set(again.parent) >= {"", "x0"}


def test_recheck_rebuilds_every_table_and_finds_what_was_changed(tmp_path):
    frame = pd.concat([frame_of(1 / 3, 0), frame_of(1 / 3, 1), frame_of(-2.5, 0, "other", "one-class")])
    frame = save_scores(frame, tmp_path / "30_scores.csv.gz")
    pooled = pd.concat([frame_of(0, 0, "read, mean"), frame_of(-1, 0, "none, max")])
    early = pooled.assign(split="development", clip_id="early " + pooled.clip_id)
    pooled = save_scores(pd.concat([pooled, early]), tmp_path / "32_scores.csv.gz")
    for name, (source, build) in results.TABLES.items():
        table = build(frame if source == "30_scores" else pooled, 50)
        table.to_csv(tmp_path / f"{name}.csv", index=False, float_format="%.6f")
    assert results.recheck(tmp_path, tmp_path, resamples=50) == [(name, 0.0) for name in results.TABLES]
    table = pd.read_csv(tmp_path / "30_per_voice.csv")
    table.assign(**{"mean AUC": table["mean AUC"] + 0.01}).to_csv(tmp_path / "30_per_voice.csv", index=False)
    pd.read_csv(tmp_path / "33_paired.csv").assign(kind="supervised").to_csv(tmp_path / "33_paired.csv", index=False)
    (tmp_path / "33_seeds.csv").unlink()
    worst = dict(results.recheck(tmp_path, tmp_path, resamples=50))
    assert worst["30_per_voice"] == pytest.approx(0.01) and worst["33_paired"] == worst["33_seeds"] == math.inf
    assert worst["30_per_generator"] == 0


def test_nothing_of_this_needs_torch():
    import subprocess
    import sys

    code = "import sys, lib.evaluate.results, lib.audit.operating_points; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_baselines_take_the_steps_the_channel_and_the_image_of_the_study():
    study = SimpleNamespace(settings=load_settings("smoke", 0, "channel.snr_db=20"))
    baseline = like_study(SimpleNamespace(steps=250, channel=None), study)
    assert baseline.steps == study.settings.training.student_steps and baseline.channel.snr_db == 20
    assert not hasattr(like_study(SimpleNamespace(), study), "steps")


def test_a_frame_of_the_development_clips():
    table = clip_table()
    table["multi"] = np.where(table.role == "bonafide", "validation", "development")
    frame = score_frame(table, "multi")
    assert set(frame.split) == {"development"}
    assert results.per_generator(frame, "multi", split="development").set_index("generator").auc["hifi"] == 1
    assert results.per_generator(table, "multi", split="development", intervals=False).equals(
        results.per_generator(frame, "multi", split="development", intervals=False))
    assert scorefiles.ROLES.keys() == {"copysynth", "tts", "spoof"}


def test_tables_are_rebuilt_without_torch_and_without_audio():
    program = ("import sys, lib.evaluate.results, lib.audit.operating_points; "
               "sys.exit(bool({'torch', 'soundfile'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", program], cwd=PROJECT).returncode == 0
