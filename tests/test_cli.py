"""The command: what it prints, writes and returns, and that no mistake ends in a traceback."""

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
from bs4 import BeautifulSoup

from lib import cli
from lib.__main__ import main, parser
from lib.data.public import roles_of
from lib.paths import SHIPPED
from lib.recordings.explaining import write_known
from lib.settings import RATE_HZ, load_settings, parse_options

ROOT = Path(__file__).parent.parent
HOSTILE = "<i onerror='1'>$x^$ *a* _b_&.wav"
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


# --- the parser -------------------------------------------------------------------------------------------------------


def test_help_needs_no_library():
    code = ("import sys, lib.__main__; lib.__main__.parser().format_help(); "
            "print(sorted({'numpy', 'torch', 'pandas'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["study", "train", "verify", "score", "report", "calibrate", "evaluate", "data"])
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


@pytest.mark.parametrize(("arguments", "words"), [
    ("score a.wav --out b", "--out goes with --manifest"), ("score a.wav --root .", "--root goes with"),
    ("score a.wav --form asvspoof5", "--form goes with"),
    ("score --manifest m.csv --out o --alpha 0.1", "--alpha does not go"),
    ("score a.wav --manifest m.csv --out o", "FILE does not go"),
    ("score --manifest m.csv --out o --jobs 2", "--jobs does not"),
    ("score --manifest m.csv --out o --json j", "--json does not go"), ("score --manifest m.csv", "needs --out"),
    ("score a.wav --json a --json b", "--json is given twice"), ("report a.wav --alpha 0.1 --alpha=0.2", "given twice"),
    ("study --plan --preset smoke --preset study", "--preset is given twice"),
    ("score a.wav --jobs 0", "a whole number from 1 on, not '0'"), ("score a.wav --jobs x", "not 'x'"),
    ("score a.wav --channel -1", "from 0 on, not '-1'"), ("report a.wav --channel=-1", "from 0 on, not '-1'"),
    ("score a.wav --alpha 0,05", "alpha: expected a number between 0 and 1, such as 0.05, not '0,05'"),
    ("report a.wav --alpha nan", "alpha: expected"), ("study --plan --force", "does not go with --plan"),
    ("study --plan --pdf", "does not go with --plan"), ("study --only 30 --from 20", "--from does not go with --only"),
    ("study --plan --set seed=1 seed=2", "'seed' is given twice"),
    ("study --plan --set run.threads=0", "between 1 and"),
    ("study --plan --set run.device=gpu", "cuda:1 or mps, not 'gpu'"),
    ("study --plan --set training.batch=-3", "'training.batch' lies between"),
    ("study --plan --set data.train=ljspeech:/nonexist", "nothing at /nonexist"),
    ("train --set data.test=vctk:/a,b/c", "nothing at /a,b/c"),
    ("study --plan --set data.train=ljspeech", "NAME:FOLDER"),
    ("data --list --corpus vctk", "--corpus does not go with --list"),
    ("data --corpus vctk --root . --part dev-clean", "--part goes with --download"),
    ("data --corpus csv --root . --out table.txt", "a name in .parquet or .csv"),
    ("evaluate s.txt --det d.txt", ".png or .svg"),
])
def test_options_out_of_range_or_idle_are_usage_errors(capsys, arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in failed(capsys, 1 if "NAME:FOLDER" in words else 2, *arguments.split())


def test_a_name_that_begins_like_an_option_gets_a_hint(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-voice.wav").write_text("x")
    assert "./-voice.wav" in failed(capsys, 2, "score", "-voice.wav")


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [
    "score {clip} --json {clip}", "score {clip} --csv {clip}", "score {clip} --html {clip}",
    "report {clip} --html {clip}",
    "evaluate {clip} --json {clip}", "evaluate s.txt {clip} --det {clip}.png --json {clip}",
    "score --folder . --csv {clip}",
    "score --manifest {clip} --out {clip}", "score --manifest . --out {clip}",
    "data --corpus csv --root {clip} --out {clip}",
    "calibrate {clip} --out {clip}", "score {clip} --json link.json", "score {clip} --json ../{here}/clip.wav",
    "score --detector d {clip} --json d"])
def test_an_output_that_is_an_input_is_a_usage_error(capsys, arguments, tmp_path, clip, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.json").symlink_to("clip.wav")
    (tmp_path / "d").mkdir()
    before = Path(clip).read_bytes()
    text = failed(capsys, 2, *arguments.format(clip="clip.wav", here=tmp_path.name).split())
    assert "is read, and would be written" in text or "expected a name in" in text or "is a folder" in text
    assert Path(clip).read_bytes() == before


@pytest.mark.parametrize(("arguments", "words"), [
    ("score a.wav --json o --csv o", "o is named for two outputs"),
    ("score a.wav --json o --html ./o", "named for two"),
    ("score a.wav --json d/detector.json", "belongs to a detector"), ("score a.wav --csv new/", "new/ is a folder"),
    ("score a.wav --json=", "a name is empty"), ("score a.wav --json folder", "folder is a folder, no file"),
    ("score a.wav --json a.txt/o.json", "a.txt/o.json cannot be"),
    ("score a.wav --json pipe", "pipe is there already, and is no regular file"),
    ("score a.wav --json /proc/none/o.json", "/proc/none/o.json cannot be written"),
    ("calibrate a.wav --out {shipped}", "belongs to the detector that ships"),
    ("calibrate a.wav --out {shipped}/mine", "belongs to the detector that ships"),
    ("score a.wav --json {shipped}/o.json", "belongs to the detector that ships"),
    ("calibrate a.wav --out a.txt", "a.txt is there already, and is no folder"),
    ("calibrate a.wav --out new/../folder", "leads through a folder that is not there"),
    ("score a.wav --json new/../d/detector.json", "leads through a folder that is not there"),
    ("calibrate a.wav --out folder", "folder holds other files"), ("calibrate a.wav --detector d --out d", "d is read"),
    ("data --corpus csv --root folder --out folder/m.csv", "folder/m.csv is there already, inside the corpus"),
])
def test_outputs_are_checked_before_any_work(capsys, arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.wav", "a.txt", "folder/m.csv", "d/detector.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    os.mkfifo(tmp_path / "pipe")
    names = sorted(path for path in tmp_path.rglob("*"))
    assert words in failed(capsys, 2, *arguments.format(shipped=SHIPPED).split())
    assert sorted(path for path in tmp_path.rglob("*")) == names and not [*SHIPPED.glob(".*"), *SHIPPED.glob("mine")]


@pytest.mark.parametrize(("command", "words"),
                         [("verify", "nothing was written"), ("study", "run the same command again")])
def test_ctrl_c_ends_with_130_and_says_what_is_kept(capsys, monkeypatch, command, words):
    def stopped(_):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, command, (stopped, *cli.COMMANDS[command][1:]))
    assert main([command]) == 130
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and words in text


def test_ctrl_c_keeps_the_recordings_that_were_judged(capsys, clip, saved_detector, tmp_path, monkeypatch):
    from lib.recordings import corpus

    def stopping(path, **others):
        if path == "stop.wav":
            raise KeyboardInterrupt
        return judged(path=path, **others)

    judged, out = corpus.judged, tmp_path / "o.json"
    monkeypatch.setattr(corpus, "judged", stopping)
    arguments = ["--detector", str(saved_detector), "--json", str(out), "--csv", str(tmp_path / "o.csv")]
    assert main(["score", "stop.wav", clip, *arguments]) == 130
    assert "nothing was written" in capsys.readouterr().err and not out.exists()
    assert main(["score", clip, "stop.wav", *arguments]) == 130
    assert f"after 1 of 2 recordings, which are kept in {out}" in capsys.readouterr().err
    sheet = json.loads(out.read_text())
    assert not sheet["complete"] and [each["path"] for each in sheet["files"]] == [clip]
    assert len(pd.read_csv(tmp_path / "o.csv")) == 1


def heed_interrupts():
    """A shell's background jobs, and what they start, are born deaf to SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_signal_to_the_process_keeps_them_too(clip, saved_detector, tmp_path):
    out = tmp_path / "o.json"
    command = [sys.executable, "-m", "lib", "score", *[clip] * 1, "--folder", str(tmp_path / "many"), "--detector",
               str(saved_detector), "--json", str(out)]
    (tmp_path / "many").mkdir()
    for number in range(400):
        (tmp_path / "many" / f"{number}.wav").write_bytes(Path(clip).read_bytes())
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, preexec_fn=heed_interrupts) as child:
        for _ in range(3):
            child.stdout.readline()
        child.send_signal(signal.SIGINT)
        text = child.communicate(timeout=60)[1]
    assert child.returncode == 130 and "are kept in" in text, text
    assert 3 <= len(json.loads(out.read_text())["files"]) < 401


def test_a_terminal_that_lacks_letters_ends_no_batch(clip, saved_detector, tmp_path):
    (tmp_path / "Größe 😀.wav").write_bytes(Path(clip).read_bytes())
    done = subprocess.run([sys.executable, "-m", "lib", "score", str(tmp_path / "Größe 😀.wav"), clip, "--detector",
                           str(saved_detector)], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stdout.count("consistent with real speech") == 2, done.stderr


def test_a_relative_study_root_is_one_place(tmp_path):
    code = "import os, lib.paths; os.chdir('/'); print(lib.paths.REPORTS)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "STUDY_ROOT": "there", "PYTHONPATH": str(ROOT)})
    assert done.stdout.strip() == str(tmp_path / "there" / "reports")


# --- the study --------------------------------------------------------------------------------------------------------


@pytest.fixture
def called(monkeypatch):
    """The arguments with which the runner was called."""
    arguments = []
    monkeypatch.setattr("lib.report.run.run_study", lambda *given, **named: arguments.append(given))
    monkeypatch.setattr("lib.report.run.require_disk", lambda settings: 1e9)
    return arguments


def test_study_hands_everything_to_the_runner(called):
    assert main(["study", "--preset", "smoke", "--only", "30", "--only", "31,32", "--set", "seed=3", "--set",
                 "run.seeds=1",
                 "--set", "data.generators=world,hibari", "--force"]) == 0
    settings, changes, only, start, force = called[0]
    assert (settings.preset, settings.seed, settings.run.seeds) == ("smoke", 3, 1)
    assert settings.data.generators == ("world", "hibari")
    assert load_settings("smoke", 0,
                         parse_options(",".join(f"{name}={value}" for name, value in changes.items()))) == settings
    assert (only, start, force) == (("30", "31", "32"), "", True)


def test_folders_of_corpora_may_hold_commas(called, tmp_path):
    folder = tmp_path / "a,b+c"
    folder.mkdir()
    assert main(["study", "--preset", "smoke", "--set", f"data.train=ljspeech:{folder}+embedded"]) == 0
    assert called[0][0].data.train == (f"ljspeech:{folder}", "embedded")


def test_study_errors_are_one_line(capsys, monkeypatch, called):
    assert "no notebook has the number 77" in failed(capsys, 1, "study", "--plan", "--only", "77")

    def stopped(*_, **__):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("lib.report.run.run_study", stopped)
    assert "first line second line" in failed(capsys, 1, "study", "--preset", "smoke")


def test_the_plan_is_printed_and_nothing_runs(capsys, called):
    assert main(["study", "--preset", "smoke", "--plan"]) == 0
    text = capsys.readouterr().out
    assert all(path.stem in text for path in (ROOT / "notebooks").glob("*.ipynb")) and "disk" in text and not called


def test_too_little_disk_stops_the_study_before_it_starts(capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10**6}))
    monkeypatch.setattr("lib.report.run.run_study", lambda *_, **__: pytest.fail("it started"))
    assert "1 MB are free" in failed(capsys, 1, "study", "--preset", "smoke")


def test_pages_are_printed_after_the_study(called, monkeypatch, tmp_path):
    printed = []
    monkeypatch.setattr(cli, "REPORTS", tmp_path)
    monkeypatch.setattr("lib.report.html.print_page", lambda page, target: printed.append((page.name, target)))
    (tmp_path / "html").mkdir()
    (tmp_path / "html" / "30_x.html").write_text("")
    assert main(["study", "--preset", "smoke", "--pdf"]) == 0
    assert printed == [("index.html", tmp_path / "pdf" / "index.pdf"), ("30_x.html", tmp_path / "pdf" / "30_x.pdf")]


@pytest.mark.parametrize(("colours", "code"), [(("green", "amber"), 0), (("green", "red"), 1)])
def test_verify_prints_a_line_a_table_and_fails_on_red(capsys, monkeypatch, colours, code):
    monkeypatch.setattr("lib.report.exhibits.verify", lambda preset,
                        reference: [(f"{colour}.csv", colour, "why") for colour in colours])
    assert main(["verify", "--preset", "smoke"]) == code
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(colour in line and "\033" not in line for colour, line in zip(colours, lines))


# --- recordings -------------------------------------------------------------------------------------------------------


def test_score_prints_and_writes(capsys, clip, saved_detector, tmp_path):
    out = {name: str(tmp_path / f"out.{name}") for name in ("json", "csv", "html")}
    assert main(["score", clip, "--detector", str(saved_detector),
                 *(part for name in out for part in (f"--{name}", out[name]))]) == 0
    assert f"{clip}: consistent with real speech" in capsys.readouterr().out
    sheet = json.load(open(out["json"]))
    row = next(csv.DictReader(open(out["csv"])))
    assert sheet["files"][0]["verdict"] == row["verdict"] == "consistent with real speech"
    assert float(row["pyramid_anomaly"]) == sheet["files"][0]["evidence"]["pyramid"]["anomaly"]
    assert sheet["schema"] == 2 and sheet["complete"] and sheet["detector"]["calibration_clips"] == 24
    assert not re.search(REMOTE, open(out["html"]).read())


def test_one_bad_file_stops_no_other_and_shows_in_the_exit_code(capsys, clip, saved_detector, tmp_path, voice):
    (tmp_path / "a.wav").write_text("no audio")
    (tmp_path / "notes.txt").write_text("no audio")
    soundfile.write(tmp_path / HOSTILE, voice(4.0, 60), RATE_HZ)
    page = tmp_path / "o.html"
    assert main(["score", "--folder", str(tmp_path), "--detector", str(saved_detector), "--html", str(page)]) == 1
    cells = [row.find_all("td")[0].get_text() for row in shown_page(page).find_all("tr")[1:]]
    assert sorted(cells) == ["cannot say", *["consistent with real speech"] * 2]
    assert HOSTILE in shown_page(page).get_text()
    text, said = capsys.readouterr()
    assert text.count("consistent with real speech") == 2 and text.count("cannot say: expected a recording") == 1
    assert "notes.txt: no sound" in said


def test_score_errors_are_one_line(capsys, clip, tmp_path, monkeypatch):
    assert "missing" in failed(capsys, 1, "score", clip, "--detector", tmp_path)
    assert "no such folder" in failed(capsys, 1, "score", "--folder", tmp_path / "none")
    monkeypatch.setattr("lib.recordings.judging.SHIPPED", tmp_path)
    assert "make study" in failed(capsys, 1, "score", clip)


def shown_page(path):
    """A page without the code that made it."""
    page = BeautifulSoup(path.read_text(), "html.parser")
    assert not re.search(REMOTE, str(page)) and len(str(page)) < 3_000_000
    assert all(image.get("alt") for image in page.find_all("img"))
    return page


def test_report_writes_a_page(capsys, tmp_path, voice, saved_detector):
    folder = shutil.copytree(saved_detector, tmp_path / "detector")
    write_known(folder, [("bonafide", "", 0.9), ("copysynth", "<b>world</b>", 5.0)])
    soundfile.write(tmp_path / HOSTILE, voice(4.0, 60), RATE_HZ)
    assert main(["report", str(tmp_path / HOSTILE), "--html", str(tmp_path / "o.html"), "--detector", str(folder)]) == 0
    assert "consistent with real speech (p = " in capsys.readouterr().out
    page = shown_page(tmp_path / "o.html")
    text = page.get_text()
    assert HOSTILE in text and not page.find("i") and not page.find("b") and not page.find(onerror=True)
    assert len(page.find_all("audio")) == 1 and len(page.find_all("img")) == 3 == len(page.select("details.data"))
    assert "Consistent with real speech" in text and "judged by 24 real recordings" in text
    assert "of the map is above" in text and "Highest:" in text and "2 groups of clips of known origin" in text


def test_report_of_a_long_recording_has_a_timeline_and_plays_a_piece(tmp_path, voice, saved_detector, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = [voice(3.0, seed) for seed in range(8)] + [np.zeros(7 * RATE_HZ, np.float32)] + [voice(3.0, 3)]
    soundfile.write("long.wav", np.concatenate(parts), RATE_HZ)
    assert main(["report", "long.wav", "--detector", str(saved_detector), "--alpha", "0.1"]) == 0
    page = shown_page(tmp_path / "long.report.html")
    assert len(page.find_all("img")) == 3 and "the most anomalous piece, " in page.get_text()


def test_report_of_a_file_that_gets_no_verdict_says_why(capsys, tmp_path, saved_detector):
    (tmp_path / "no.wav").write_text("no audio")
    assert main(["report", str(tmp_path / "no.wav"), "--html", str(tmp_path / "o.html"), "--detector",
                 str(saved_detector)]) == 1
    assert "cannot say: expected a recording" in capsys.readouterr().out
    page = shown_page(tmp_path / "o.html")
    assert not page.find("audio") and "expected a recording" in page.get_text()


def test_report_errors_are_one_line(capsys, clip, tmp_path):
    assert "no detector.json in it" in failed(capsys, 1, "report", clip, "--html", tmp_path / "o.html", "--detector",
                                              tmp_path)
    assert not (tmp_path / "o.html").exists()


def test_calibrate_then_score(capsys, clip, saved_detector, tmp_path, voice):
    (tmp_path / "speech").mkdir()
    for seed in range(4):
        soundfile.write(tmp_path / "speech" / f"{seed}.wav", voice(9.0, 100 + seed, 100 + seed), RATE_HZ)
    own = str(tmp_path / "own")
    calibrate = ["calibrate", str(tmp_path / "speech"), "--out", own, "--detector", str(saved_detector), "--name",
                 "Ann's phone"]
    assert main(calibrate) == 0
    text, said = capsys.readouterr()
    assert "4 recordings" in text and "min of speech of Ann's phone" in text and "alpha 0.143 or more" in text
    assert "about four minutes" in said
    assert main(["score", clip, "--detector", own, "--alpha", "0.2", "--json", str(tmp_path / "o.json")]) == 0
    stated = json.loads((tmp_path / "o.json").read_text())["detector"]
    assert (stated["name"], stated["recordings"], stated["smallest_alpha"]) == ("Ann's phone", 4, 0.14286)
    assert main(["score", clip, "--detector", own]) == 1  # six clips support no verdict at 0.05
    assert "nofolder: expected a file or folder" in failed(capsys, 1, "calibrate", "nofolder", "--out", tmp_path / "o")
    assert main([*calibrate, str(tmp_path / "speech")]) == 0, "a folder named twice counts once"
    assert "4 recordings" in capsys.readouterr().out


# --- evaluation and data ----------------------------------------------------------------------------------------------


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
    key = "".join(f"{name}\t{label}\n" for name, _, label, _ in rows)
    (tmp_path / "key.tsv").write_text("filename\tcm-label\n" + key)
    assert main(["evaluate", str(tmp_path / "s.txt"), str(tmp_path / "key.tsv"), "--det",
                 str(tmp_path / "det.png")]) == 0
    assert "inverted" in capsys.readouterr().err


def test_evaluate_says_what_it_leaves_out(capsys, scores, tmp_path):
    rows = [line.split() for line in open(scores)]
    subsets = ["eval" if number % 3 else "progress" for number in range(len(rows))]
    (tmp_path / "key.csv").write_text("clip_id,label,subset\n" + "".join(
        f"{row[0]},{row[2]},{subset}\n" for row, subset in zip(rows, subsets)))
    (tmp_path / "s.txt").write_text("".join(f"{row[0]} {row[3]}\n" for row in rows))
    assert main(["evaluate", str(tmp_path / "s.txt"), str(tmp_path / "key.csv")]) == 0
    assert "80 clips of the subset progress are left out" in capsys.readouterr().err


def test_numbers_that_are_none_are_null_in_json(scores, tmp_path):
    rows = [line.split() for line in open(scores)]
    same = "".join(f"{name} {'X' if label == 'spoof' else '-'} {label} {0.0 if label == 'spoof' else 0.0}\n"
                   for name, _, label, _ in rows[:100] + rows[120:220])
    (tmp_path / "s.txt").write_text(same + "z Y spoof 1.0\n")
    main(["evaluate", str(tmp_path / "s.txt"), "--json", str(tmp_path / "e.json")])
    attacks = json.loads((tmp_path / "e.json").read_text())["attacks"]
    assert {row["attack"]: row["eer"] for row in attacks}["X"] is None


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
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True,
                          env=dict(os.environ, PYTHONUNBUFFERED="1"))
    assert "Traceback" not in done.stderr


# --- several machines -------------------------------------------------------------------------------------------------


def test_the_example_for_slurm_is_a_script_whose_commands_are_understood(tmp_path, monkeypatch):
    path = ROOT / "examples" / "slurm.sh"
    assert subprocess.run(["bash", "-n", path], capture_output=True, text=True).stderr == ""
    text = path.read_text().replace("\\\n", " ")
    lines = [line.partition(" -m lib ")[2]
             for line in text.splitlines() if re.match(r'(launch|"\$PYTHON") -m lib ', line)]
    values = {"CORPORA": "/data", "SCORES": "scores.tsv", "DETECTOR": "detector"}
    commands = [shlex.split(re.sub(r"\$(\w+)", lambda name: values[name[1]], line.partition("||")[0]))
                for line in lines]
    assert [words[0] for words in commands] == ["study", "train", "data", "score", "data", "evaluate"]
    (tmp_path / "runs" / "paper").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    chosen = [parser().checked(words) for words in commands]
    settings = load_settings(chosen[1].preset, 0, parse_options(chosen[1].set))
    assert settings.preset == "paper" and settings.training.batch % 8 == 0, "two nodes of four GPUs share a batch"
    roles = {part: roles_of(getattr(settings.data, part)) for part in ("train", "validation", "test", "single")}
    assert [role.corpus for role in roles["test"]] == ["asvspoof2019_la", "in_the_wild"]
    assert roles["train"][0].split == "train"
    assert chosen[3].form == "asvspoof2021" and chosen[3].manifest == chosen[2].out
