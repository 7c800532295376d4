"""Scores of a whole manifest: the same from one process, from two, and after kills; merged parts are checked."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from lib.__main__ import main
from lib.data.scorefiles import ScoreFileError, read_scores
from lib.engine import Engine
from lib.paths import NODE, write_json
from lib.recordings import corpus as shards
from lib.recordings.corpus import merged, read_manifest, score_manifest
from tests.conftest import toy_speech
from tests.test_engine import launched

ROOT = Path(__file__).parent.parent
ALONE = Engine(torch.device("cpu"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Seventy clips in a folder (three blocks), two of them not fit to be scored."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(70):
        soundfile.write(folder / f"clip {number:02d}.wav",
                        toy_speech(2.2, number) if number != 40 else np.zeros(20_000), 16_000)
    (folder / "clip 41.wav").write_text("no audio")
    return folder


@pytest.fixture(scope="module")
def whole(corpus, saved_detector, tmp_path_factory):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / "scores.tsv"
    found = score_manifest(read_manifest(corpus), out, ALONE, saved_detector)
    assert found.anomaly.isna().sum() == 2 and not out.with_name("scores.tsv.parts").exists()
    return out


def same(one, two):
    rest = [path.with_name(path.name + ".unscored.csv") for path in (one, two)]
    return one.read_bytes() == two.read_bytes() and rest[0].read_bytes() == rest[1].read_bytes()


def test_one_process_scores_all_and_says_which_it_could_not(whole):
    table = read_scores(whole)
    assert len(table) == 68 and table.clip_id.iloc[0] == "clip 00.wav"
    left = pd.read_csv(whole.with_name("scores.tsv.unscored.csv"))
    assert left.clip_id.tolist() == ["clip 40.wav", "clip 41.wav"] and left.why.str.len().min() > 10


def test_two_processes_give_the_same_file(corpus, saved_detector, whole, tmp_path):
    manifest, out = tmp_path / "manifest.csv", tmp_path / "scores.tsv"
    table = read_manifest(corpus)
    table.assign(path=[Path(path).name for path in table.path]).iloc[:40].to_csv(manifest, index=False)
    said = launched(2, "-m", "lib", "score", "--manifest", manifest, "--root", corpus, "--out", out, "--detector",
                    saved_detector)
    assert "40 clips scored" in said
    one, two = read_scores(whole), read_scores(out)
    assert two.clip_id.tolist() == one.clip_id.tolist()[:40] and two.score.tolist() == one.score.tolist()[:40]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.csv", "scores.tsv"]


def test_killed_scoring_goes_on_and_equals_the_uninterrupted_run(corpus, saved_detector, whole, tmp_path):
    out, delays = tmp_path / "scores.tsv", np.random.default_rng().uniform(0.0, 1.0, 2)
    command = [sys.executable, "-m", "lib", "score", "--manifest", str(corpus), "--out", str(out), "--detector",
               str(saved_detector)]
    parts = out.with_name("scores.tsv.parts")
    for wanted, delay in enumerate(delays, 1):  # each after one more block, and a random moment later
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL,
                                 env={**os.environ, "OMP_NUM_THREADS": "1"})
        while child.poll() is None and len([*parts.glob("0*.json")]) < wanted:
            time.sleep(0.02)
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.wait()
    (tmp_path / f".tmp-{NODE}-999999999-x.json").write_text("half a")  # as a kill may leave it
    assert main(command[3:]) == 1  # two clips could not be scored
    assert same(whole, out), f"killed after {delays}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.tsv", "scores.tsv.unscored.csv"]


def test_finished_blocks_are_not_scored_again(corpus, saved_detector, whole, tmp_path, monkeypatch):
    out, judged, seen = tmp_path / "scores.tsv", shards.judged, []

    def stopping(detector, path, limits):
        seen.append(path)
        if len(seen) == 40:
            raise KeyboardInterrupt
        return judged(detector, path, limits)

    monkeypatch.setattr(shards, "judged", stopping)
    with pytest.raises(KeyboardInterrupt):
        score_manifest(read_manifest(corpus), out, ALONE, saved_detector)
    score_manifest(read_manifest(corpus), out, ALONE, saved_detector)
    assert len(seen) == 40 + 70 - shards.BLOCK and same(whole, out)


def test_parts_of_another_manifest_are_refused(corpus, saved_detector, tmp_path, monkeypatch):
    out = tmp_path / "scores.tsv"
    write_json(tmp_path / "scores.tsv.parts" / "plan.json", {"key": "another"})
    with pytest.raises(ScoreFileError, match="another manifest or detector"):
        score_manifest(read_manifest(corpus), out, ALONE, saved_detector)


@pytest.mark.parametrize(("parts", "message"), [
    ([["a", "b"]], r"1 missing \['c'\]"), ([["a", "b"], ["b", "c"]], r"1 twice \['b'\]"),
    ([["a", "b", "c", "d"]], r"1 unknown \['d'\]")])
def test_merging_checks_every_id(tmp_path, parts, message):
    for number, ids in enumerate(parts):
        (tmp_path / f"{number:09d}.json").write_text(json.dumps([[name, 1.5, ""] for name in ids]))
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(ScoreFileError, match=message):
        merged(tmp_path, ["a", "b", "c"])


def test_manifests_that_do_not_fit_are_refused(corpus, tmp_path):
    table = read_manifest(corpus).head(3)
    for wrong, message in ((table.assign(clip_id="x"), "2 repeated ids"),
                           (table.assign(path="none.wav"), "3 of 3 files are not there"),
                           (table[["clip_id"]], "rows with a path"), (table.iloc[:0], "found 0")):
        wrong.to_csv(tmp_path / "m.csv", index=False)
        with pytest.raises(ScoreFileError, match=message):
            read_manifest(tmp_path / "m.csv")
    (tmp_path / "m.parquet").write_text("text")
    with pytest.raises(ScoreFileError, match="expected a folder, or a manifest"):
        read_manifest(tmp_path / "m.parquet")


def test_a_parquet_manifest_remembers_its_folder(corpus, tmp_path, capsys):
    (corpus / "table.csv").write_text("path,label\nclip 00.wav,bonafide\n")
    assert main(["data", "--corpus", "csv", "--root", str(corpus / "table.csv"), "--out",
                 str(tmp_path / "m.parquet")]) == 0
    assert read_manifest(tmp_path / "m.parquet").path.tolist() == [str(corpus.resolve() / "clip 00.wav")]


def test_the_command_wants_out_and_nothing_else(capsys, corpus):
    assert main(["score", "--manifest", str(corpus)]) == 2 and "--out" in capsys.readouterr().err
    assert main(["score", "x.wav", "--manifest", str(corpus), "--out", "o"]) == 2
