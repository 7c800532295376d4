"""The command: what it prints, writes and returns, and that no mistake ends in a traceback."""

import csv
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

from lib import commands
from lib.cli import main, parser
from lib.commands import _settings as commands_settings
from lib.data.channel import ClipReader
from lib.data.public import roles_of
from lib.report.plan import KEPT_BYTES, Plan, PlanError, duration, planned, size, stated_seconds
from lib.report.run import notebooks
from lib.settings import RATE_HZ, load_settings

ROOT = Path(__file__).parent.parent
REMOTE = r"src=[\"']?\s*(https?:|//)"


@pytest.fixture
def clip(tmp_path, voice):
    soundfile.write(tmp_path / "clip.wav", voice(4.0, 60), RATE_HZ)
    return str(tmp_path / "clip.wav")


def failed(capsys, code, *arguments):
    """The one line on standard error of a command that returns `code`."""
    assert main([str(argument) for argument in arguments]) == code
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1, text
    return text


# --- the parser -------------------------------------------------------------------------------------------------------------


def test_help_needs_no_library():
    code = "import sys, lib.cli; lib.cli.parser().format_help(); print(sorted({'numpy', 'torch', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["study", "verify", "pdf", "score", "report", "calibrate", "evaluate", "data", "bench"])
def test_every_command_has_help(capsys, name):
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0 and f"lib {name}" in capsys.readouterr().out


def test_usage_errors_are_one_line_and_name_the_nearest(capsys):
    assert "'--preset'" in failed(capsys, 2, "study", "--prest", "smoke")
    assert "invalid choice: 'stdy'" in failed(capsys, 2, "stdy")
    assert "COMMAND" in failed(capsys, 2)
    assert "'smoke'" in failed(capsys, 2, "study", "--preset", "smok")
    assert "'training.student_steps'" in failed(capsys, 2, "study", "--set", "student_stps=4")
    assert "type int" in failed(capsys, 2, "study", "--set", "seed=x")
    assert "NAME=VALUE" in failed(capsys, 2, "study", "--set", "seed")
    assert "--preset" in failed(capsys, 2, "study", "--set", "preset=smoke")
    assert "between 0 and 1" in failed(capsys, 2, "score", "a.wav", "--alpha", "5")
    assert "FILE" in failed(capsys, 2, "score")
    assert "--list" in failed(capsys, 2, "data")


def test_ctrl_c_ends_with_130_and_one_line(capsys, monkeypatch):
    def verify(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "verify", verify)
    assert main(["verify"]) == 130
    assert capsys.readouterr().err.count("\n") == 1


# --- the study --------------------------------------------------------------------------------------------------------------


def test_study_hands_everything_to_the_runner(monkeypatch):
    called = []
    monkeypatch.setattr("lib.report.run.run_study", lambda *arguments, **named: called.append(arguments))
    monkeypatch.setattr(Plan, "require_disk", lambda plan: None)
    assert main(["study", "--preset", "smoke", "--only", "30", "--only", "31,32", "--set", "seed=3", "--set", "run.seeds=1",
                 "--set", "data.generators=world,hibari", "--force"]) == 0
    settings, changes, only, start, force = called[0]
    assert (settings.preset, settings.seed, settings.run.seeds, settings.data.generators) == ("smoke", 3, 1, ("world", "hibari"))
    assert changes == {"seed": "3", "run.seeds": "1", "data.generators": "world+hibari"}
    assert (only, start, force) == (("30", "31", "32"), "", True)


def test_study_errors_are_one_line(capsys, monkeypatch):
    assert "no notebook has the number 77" in failed(capsys, 1, "study", "--only", "77")

    def stopped(*_, **__):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("lib.report.run.run_study", stopped)
    assert "first line second line" in failed(capsys, 1, "study", "--preset", "smoke")


def test_the_plan_names_stages_clips_and_disk(capsys):
    assert main(["study", "--preset", "smoke", "--plan"]) == 0
    text = capsys.readouterr().out
    assert all(path.stem in text for path in notebooks())
    assert all(word in text for word in ("clips:", "time:", "memory:", "disk:"))


def test_the_plan_grows_with_the_settings_and_the_disk_is_checked(monkeypatch):
    small, large = planned(load_settings("smoke")), planned(load_settings("study"))
    assert large.real_clips > small.real_clips and large.speech_s > small.speech_s and large.seconds > small.seconds
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10**6}))
    with pytest.raises(PlanError, match="STUDY_ROOT"):
        planned(load_settings("study")).require_disk()


def test_the_plan_of_the_paper_preset_is_estimated_and_its_memory_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("lib.report.plan.RUNS", tmp_path)  # an earlier run's measured times are others than the stated ones
    study, paper, more = planned(load_settings("study")), planned(load_settings("paper")), planned(load_settings(
        "paper", 0, {"data.multi_train_per_speaker": "40000"}))
    assert all(stage.seconds and stage.source in ("measured", "stated", "estimated") for stage in paper.stages)
    ratio = 28000 * 32 / (4200 * 8) * (64 / 24) ** 2  # steps, batch and width of the two presets
    times = [next(stage.seconds for stage in planned(load_settings(name)).stages if stage.name.startswith("20"))
             for name in ("study", "paper")]
    assert times[1] / times[0] == pytest.approx(ratio, rel=0.01) and paper.seconds > 86400 > study.seconds
    assert more.speech_s > 50 * paper.speech_s and more.memory_bytes == paper.memory_bytes
    assert inspect.signature(ClipReader).parameters["limit_bytes"].default == KEPT_BYTES


def test_too_little_disk_stops_the_study_before_it_starts(capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10**6}))
    monkeypatch.setattr("lib.report.run.run_study", lambda *_, **__: pytest.fail("it started"))
    assert "1 MB free" in failed(capsys, 1, "study", "--preset", "smoke")
    assert main(["study", "--preset", "smoke", "--plan"]) == 1


def test_every_notebook_states_its_time():
    for path in notebooks():
        assert stated_seconds(path, "smoke") and stated_seconds(path, "study"), path.name


def test_times_and_sizes_in_words():
    assert [duration(value) for value in (None, 45, 600, 7200, 4e5)] == ["unknown", "45 s", "10 min", "2.0 h", "5 days"]
    assert [size(value) for value in (5e6, 2.5e9)] == ["5 MB", "2.5 GB"]


@pytest.mark.parametrize(("colours", "code"), [(("green", "amber"), 0), (("green", "red"), 1)])
def test_verify_prints_a_line_a_table_and_fails_on_red(capsys, monkeypatch, colours, code):
    monkeypatch.setattr("lib.report.run.verify", lambda preset, reference: [(f"{colour}.csv", colour, "why") for colour in colours])
    assert main(["verify", "--preset", "smoke"]) == code
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(colour in line and "\033" not in line for colour, line in zip(colours, lines))


# --- recordings -------------------------------------------------------------------------------------------------------------


def test_score_prints_and_writes(capsys, clip, saved_detector, tmp_path):
    out = {name: str(tmp_path / f"out.{name}") for name in ("json", "csv", "html")}
    assert main(["score", clip, "--detector", str(saved_detector), *(part for name in out for part in (f"--{name}", out[name]))]) == 0
    assert f"{clip}: consistent with real speech" in capsys.readouterr().out
    sheet = json.load(open(out["json"]))
    row = next(csv.DictReader(open(out["csv"])))
    assert sheet["files"][0]["verdict"] == row["verdict"] == "consistent with real speech"
    assert float(row["anomaly"]) == sheet["files"][0]["anomaly"] and sheet["detector"]["calibration_clips"] == 24
    assert not re.search(REMOTE, open(out["html"]).read())


def test_one_bad_file_stops_no_other_and_shows_in_the_exit_code(capsys, clip, saved_detector, tmp_path, voice):
    (tmp_path / "a.wav").write_text("no audio")
    soundfile.write(tmp_path / "<script>.wav", voice(4.0, 60), RATE_HZ)
    assert main(["score", "--folder", str(tmp_path), "--detector", str(saved_detector)]) == 1
    text = capsys.readouterr().out
    assert text.count("consistent with real speech") == 2 and text.count("cannot say: expected a recording") == 1


def test_score_errors_are_one_line(capsys, clip, tmp_path, monkeypatch):
    assert "missing" in failed(capsys, 1, "score", clip, "--detector", tmp_path)
    assert "no such folder" in failed(capsys, 1, "score", "--folder", tmp_path / "none")
    monkeypatch.setattr("lib.recordings.judging.SHIPPED", tmp_path)
    assert "make study" in failed(capsys, 1, "score", clip)


def test_an_output_that_cannot_be_written_is_an_error(capsys, clip, saved_detector, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in failed(capsys, 1, "score", clip, "--detector", saved_detector, "--json", tmp_path / "file" / "out.json")


def test_report_writes_a_page(capsys, clip, saved_detector, tmp_path):
    page = tmp_path / "page.html"
    assert main(["report", clip, "--html", str(page), "--detector", str(saved_detector)]) == 0
    assert not re.search(REMOTE, page.read_text()) and str(page) in capsys.readouterr().out
    assert main(["report", str(tmp_path / "no.wav"), "--html", str(page), "--detector", str(saved_detector)]) == 1


def test_calibrate_then_score(capsys, clip, saved_detector, tmp_path, voice):
    (tmp_path / "speech").mkdir()
    for seed in range(4):
        soundfile.write(tmp_path / "speech" / f"{seed}.wav", voice(9.0, 100 + seed), RATE_HZ)
    own = str(tmp_path / "own")
    assert main(["calibrate", str(tmp_path / "speech"), "--out", own, "--detector", str(saved_detector)]) == 0
    assert "four minutes" in capsys.readouterr().err
    assert main(["score", clip, "--detector", own, "--alpha", "0.2"]) == 0
    assert main(["score", clip, "--detector", own]) == 1  # six clips support no verdict at 0.05


# --- evaluation and data ----------------------------------------------------------------------------------------------------


@pytest.fixture
def scores(tmp_path):
    random = np.random.default_rng(0)
    lines = [f"b{i} - bonafide {random.normal(1):.4f}\n" for i in range(120)]
    lines += [f"s{i} A{i % 2} spoof {random.normal(-1):.4f}\n" for i in range(120)]
    (tmp_path / "scores.txt").write_text("".join(lines))
    return str(tmp_path / "scores.txt")


def test_evaluate_prints_and_draws(capsys, scores, tmp_path):
    assert main(["evaluate", scores, "--json", str(tmp_path / "e.json"), "--det", str(tmp_path / "det.png")]) == 0
    text, found = capsys.readouterr().out, json.load(open(tmp_path / "e.json"))
    assert f"EER {found['eer']:.4%}" in text and "A0" in text and found["schema"] == 1 and 0 < found["eer"] < 0.3
    assert (tmp_path / "det.png").read_bytes().startswith(b"\x89PNG")
    assert main(["evaluate", scores, "--det", str(tmp_path / "det.svg")]) == 0


def test_evaluate_with_a_key_warns_of_inverted_scores(capsys, scores, tmp_path):
    rows = [line.split() for line in open(scores)]
    (tmp_path / "s.txt").write_text("".join(f"{name} {-float(score)}\n" for name, _, _, score in rows))
    (tmp_path / "key.tsv").write_text("filename\tcm-label\n" + "".join(f"{name}\t{label}\n" for name, _, label, _ in rows))
    assert main(["evaluate", str(tmp_path / "s.txt"), str(tmp_path / "key.tsv"), "--det", str(tmp_path / "det.png")]) == 0
    assert "inverted" in capsys.readouterr().err


def test_evaluate_refuses_in_one_line(capsys, tmp_path):
    (tmp_path / "s.txt").write_text("a 1\nb nan\n")
    assert "finite" in failed(capsys, 1, "evaluate", tmp_path / "s.txt")
    assert "readable" in failed(capsys, 1, "evaluate", tmp_path / "none.txt")


def test_data_lists_loads_and_writes(capsys, clip, tmp_path):
    assert main(["data", "--list"]) == 0 and "asvspoof2019_la" in capsys.readouterr().out
    (tmp_path / "table.csv").write_text("path,label\nclip.wav,bonafide\n")
    out = tmp_path / "out.parquet"
    assert main(["data", "--corpus", "csv", "--root", str(tmp_path / "table.csv"), "--check", "--out", str(out)]) == 0
    assert pd.read_parquet(out).seconds.tolist() == [4.0]
    assert "asvspoof5" in failed(capsys, 1, "data", "--corpus", "asvspoof", "--root", tmp_path)


def test_a_closed_pipe_is_no_traceback(scores):
    command = f"{sys.executable} -m lib evaluate {scores} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=dict(os.environ, PYTHONUNBUFFERED="1"))
    assert "Traceback" not in done.stderr


def test_pdf_without_a_browser_says_how_to_get_one(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "apt-get install --no-install-recommends chromium" in failed(capsys, 1, "pdf", tmp_path / "page.html")


def test_two_pages_of_one_name_are_not_printed_over_each_other(capsys, tmp_path):
    assert "one name" in failed(capsys, 2, "pdf", "a/page.html", "b/page.html", "--out", tmp_path)


# --- several machines -------------------------------------------------------------------------------------------------------


def test_the_example_for_slurm_is_a_script_whose_commands_are_understood():
    path = ROOT / "examples" / "slurm.sh"
    assert subprocess.run(["bash", "-n", path], capture_output=True, text=True).stderr == ""
    text = path.read_text().replace("\\\n", " ")
    found = [line.partition(" -m lib ")[2] for line in text.splitlines() if re.match(r'(launch|"\$PYTHON") -m lib ', line)]
    values = {"CORPORA": "/data", "SCORES": "scores.tsv", "DETECTOR": "detector"}
    commands = [shlex.split(re.sub(r"\$(\w+)", lambda name: values[name[1]], line.partition("||")[0])) for line in found]
    assert [words[0] for words in commands] == ["study", "train", "data", "score", "data", "evaluate"]
    given = [parser().checked(words) for words in commands]
    settings, _ = commands_settings(given[1])
    assert settings.preset == "paper" and settings.training.batch % 8 == 0, "two nodes of four GPUs share a batch"
    roles = {part: roles_of(getattr(settings.data, part)) for part in ("train", "validation", "test", "single")}
    assert [role.corpus for role in roles["test"]] == ["asvspoof2019_la", "in_the_wild"] and roles["train"][0].split == "train"
    assert given[3].form == "asvspoof2021" and given[3].manifest == given[2].out
