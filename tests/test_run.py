import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from lib.paths import PROJECT, clocked
from lib.report import exhibits
from lib.report import run as runner
from lib.report.exhibits import StudyError, verify
from lib.report.run import notebooks
from lib.settings import SettingsError, load_settings, parse_options


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(exhibits, "REFERENCE", tmp_path / "reference")
    for module in (exhibits, runner):
        monkeypatch.setattr(module, "REPORTS", tmp_path / "reports")
    (tmp_path / "reference" / "study").mkdir(parents=True)
    (tmp_path / "reports" / "tables").mkdir(parents=True)
    return tmp_path / "reference" / "study", tmp_path / "reports" / "tables"


@pytest.mark.parametrize(("change", "colour"), [
    (lambda t: t, "green"),
    (lambda t: t.assign(auc=t.auc + 0.01), "green"),
    (lambda t: t.assign(auc=t.auc + 0.04), "amber"),
    (lambda t: t.assign(auc=t.auc + 0.2), "red"),
    (lambda t: t.assign(clips=t.clips + 1), "red"),
    (lambda t: t.assign(auc=[0.9, float("nan")]), "red"),
    (lambda t: t.head(1), "red"),
    (lambda t: t.rename(columns={"auc": "AUC"}), "red"),
])
def test_verify_colours(folders, change, colour):
    reference, ours = folders
    table = pd.DataFrame({"generator": ["world", "hibari"], "clips": [40, 20], "auc": [0.9, 0.8]})
    table.to_csv(reference / "30_x.csv", index=False)
    change(table).to_csv(ours / "30_x.csv", index=False)
    assert [row[:2] for row in verify("study")] == [("30_x.csv", colour)]


def test_two_equal_runs_are_green_and_a_deliberate_change_is_not(folders, monkeypatch, capsys):
    """Through the files that notebooks write and the command that a person runs."""
    from lib.__main__ import main
    from lib.report.exhibits import Exhibits

    monkeypatch.setattr("IPython.display.display", lambda *_, **__: None)
    reference, ours = folders
    first = pd.DataFrame({"generator": ["world", "hibari"], "clips": [40, 20], "auc": [1 / 3, 0.812345678]})
    Exhibits(ours.parent, "30", {"seed": 0}).table(first, "results")
    shutil.copy(ours / "30_results.csv", reference)
    for moved, code, colour in ((0.0, 0, "green"), (0.05, 0, "amber"), (0.2, 1, "red"), (0.0, 0, "green")):
        Exhibits(ours.parent, "30", {"seed": 0}).table(first.assign(auc=first.auc - moved), "results")
        assert main(["verify", "--preset", "study"]) == code
        assert capsys.readouterr().out.startswith(f"{colour:5s}  30_results.csv")
    Exhibits(ours.parent, "34", {"seed": 0}).table(first, "points")
    assert [row[:2] for row in verify("study")] == [("30_results.csv", "green"), ("34_points.csv", "amber")]


def test_verify_against_a_copy_of_another_run(folders, tmp_path, capsys):
    from lib.__main__ import main

    _, ours = folders
    other = tmp_path / "first run"
    first = pd.DataFrame({"generator": ["world", "hibari"], "auc": [0.9, 0.8]})
    for moved, code, colour in ((0.0, 0, "green"), (0.05, 0, "amber"), (0.2, 1, "red")):
        first.to_csv(ours / "30_x.csv", index=False)
        shutil.copytree(ours, other, dirs_exist_ok=True)
        first.assign(auc=first.auc - moved).to_csv(ours / "30_x.csv", index=False)
        assert main(["verify", "--preset", "smoke", "--reference", str(other)]) == code
        assert capsys.readouterr().out.startswith(f"{colour:5s}  30_x.csv")
    with pytest.raises(StudyError, match="always equal themselves"):
        verify("smoke", ours)
    with pytest.raises(StudyError, match="copy of another run"):
        verify("smoke", tmp_path / "nowhere")


def test_verify_without_run_or_reference(folders):
    reference, ours = folders
    with pytest.raises(StudyError, match="no reference tables"):
        verify("paper")
    pd.DataFrame({"a": [1]}).to_csv(reference / "30_x.csv", index=False)
    assert verify("study")[0][1:] == ("red", "missing in this run")
    ours.rmdir()
    with pytest.raises(StudyError, match="run `make study` first"):
        verify("study")


FINDING = {"tags": ["finding"]}


def written(cells, path):
    kernel = {"name": "python3", "language": "python", "display_name": "Python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def test_numbers_choose_notebooks():
    assert [path.name[:2] for path in notebooks(("30", "31"))] == ["30", "31"]
    assert notebooks(start="40")[0].name.startswith("40")
    with pytest.raises(StudyError, match="no notebook has the number 77"):
        notebooks(("77",))


def test_options_are_pairs():
    assert parse_options(["seed=1", "run.seeds = 2"]) == {"seed": "1", "run.seeds": "2"}
    with pytest.raises(SettingsError, match="NAME=VALUE"):
        parse_options(["seed"])


def test_where_the_time_goes(folders, monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "RUNS", tmp_path / "runs")
    for name, seconds, peak in ((notebooks()[0].stem, 5.0, None), (notebooks()[3].stem, 15.0, 900)):
        stamp = {"seconds": seconds, "kinds": {"start": 1.0, "training": seconds - 1}, "peak_mb": peak}
        runner.write_json(tmp_path / "runs/smoke/stamps" / f"{name}.json", stamp)
    table = runner.stage_times(load_settings("smoke"))
    assert table.stage.tolist() == [notebooks()[0].stem, notebooks()[3].stem, "all"]
    assert table.seconds.tolist() == [5, 15, 20] and table.training.tolist() == [4, 14, 18]
    assert table["start and imports"].tolist() == [1, 1, 2] and table["peak memory (MB)"].tolist()[1:] == [900, 900]


def test_clocks_count_every_second_once(tmp_path, monkeypatch):
    times = tmp_path / "times.jsonl"
    monkeypatch.setenv("STUDY_TIMES", str(times))
    with clocked("training"):
        time.sleep(0.2)
        with pytest.raises(ZeroDivisionError), clocked("data"):
            time.sleep(0.1)
            1 / 0  # noqa: B018
    monkeypatch.setenv("STUDY_TIMES", "")
    clocked("scoring")(lambda: None)()
    lines = [json.loads(line) for line in times.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["data", "training"]
    assert [line["seconds"] for line in lines] == pytest.approx([0.1, 0.2], abs=0.05)


def test_pages_are_written_again_only_where_something_changed(folders, monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "RUNS", tmp_path / "runs")
    executed = runner.REPORTS / "executed" / notebooks()[0].name
    executed.parent.mkdir()
    shutil.copy(notebooks()[0], executed)
    settings = load_settings("smoke")

    def written_again() -> bool:
        pages = [runner.REPORTS / "index.html", runner.REPORTS / "html" / f"{executed.stem}.html"]
        before = [page.stat().st_mtime_ns if page.exists() else 0 for page in pages]
        assert runner.write_reports(settings) == pages[0]
        return [page.stat().st_mtime_ns for page in pages] != before

    assert written_again() and not written_again()
    for touch in (lambda: (runner.REPORTS / "index.html").write_text("half"),
                  lambda: (runner.REPORTS / "html" / f"{executed.stem}.html").unlink(),
                  lambda: executed.write_text(executed.read_text().replace("Start here", "Begin here")),
                  lambda: runner.write_json(tmp_path / f"runs/smoke/stamps/{executed.stem}.json", {"seconds": 3.0})):
        touch()
        assert written_again() and not written_again()


@pytest.mark.parametrize(("parameters", "message"), [
    ({"alhpa": 0.1}, "no parameter 'alhpa'; the nearest known one is 'alpha'"),
    ({"alpha": "0.1"}, "'alpha' of 90_.*takes a value of type float, not '0.1'"),
    ({"seed": True}, "type int, not True"),
])
def test_a_notebook_refuses_parameters_that_it_does_not_know(parameters, message, tmp_path):
    path = notebooks(("90",))[0]
    assert runner.checked_parameters(path, {"alpha": 1, "recording": "x.wav"})
    with pytest.raises(SettingsError, match=message):
        runner.run_notebook(path, parameters, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_one_notebook_becomes_one_page(tmp_path):
    cells = [new_markdown_cell("# Sum"), new_code_cell("count: int = 1", metadata={"tags": ["parameters"]}),
             new_code_cell("import lib\nprint(40 + count)"), new_code_cell("1 / count")]
    cells.append(new_code_cell("from lib.report.exhibits import finding\nfinding(f'Two: {count}')", metadata=FINDING))
    written(cells, tmp_path / "sum.ipynb")
    page = tmp_path / "out" / "sum.html"
    assert runner.run_notebook(tmp_path / "sum.ipynb", {"count": 2}, page, {"seed": 0}) == "Two: 2"
    text = page.read_text(encoding="utf-8")
    assert "42" in text and "All notebooks" not in text and "seed" in text
    with pytest.raises(StudyError, match="ZeroDivisionError"):
        runner.run_notebook(tmp_path / "sum.ipynb", {"count": 0}, tmp_path / "zero.html")
    assert not (tmp_path / "zero.html").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux alone")
def test_forked_kernels_share_imports_and_nothing_else(tmp_path):
    code = ("import os, sys, torch\nfrom lib.paths import clocked\nseen = hasattr(torch, 'left_behind')\n"
            "torch.left_behind = os.environ['LEFT'] = '1'\nprint(seen, os.getpid())\nwith clocked('training'): pass")
    cells = [new_code_cell("seed: int = 0", metadata={"tags": ["parameters"]}), new_code_cell(code),
             new_code_cell("import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()")]
    path, texts = written(cells, tmp_path / "w.ipynb"), []
    for number in range(2):
        times = tmp_path / f"times{number}.jsonl"
        began = time.time()
        runner.execute(path, tmp_path / "out" / "w.ipynb", {"seed": 1}, times)
        notebook = nbformat.read(tmp_path / "out" / "w.ipynb", as_version=4)
        texts.append(notebook.cells[-2].outputs[0].text.split())
        assert any("image/png" in output.get("data", {}) for output in notebook.cells[-1].outputs)
        row = runner._seconds(tmp_path / "out" / "w.ipynb", times, began, time.time())
        assert row["kinds"]["start"] > 0 and sum(row["kinds"].values()) == pytest.approx(row["seconds"], abs=0.5)
        assert 100 < row["peak_mb"] < 3000
    assert [seen for seen, _ in texts] == ["False", "False"] and texts[0][1] != texts[1][1] and "LEFT" not in os.environ


@pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux alone")
def test_a_forked_kernel_that_dies_stops_the_run(tmp_path):
    cells = [new_code_cell("seed: int = 0", metadata={"tags": ["parameters"]}),
             new_code_cell(f"import os\nos.kill(os.getpid(), {int(signal.SIGKILL)})")]
    with pytest.raises(StudyError, match="process ended.*\n.*w.partial.ipynb"):
        runner.execute(written(cells, tmp_path / "w.ipynb"), tmp_path / "out" / "w.ipynb", {}, tmp_path / "times.jsonl")


@pytest.mark.parametrize("fault", ["no process", "no answer"])
def test_without_forks_the_kernel_starts_as_usual(tmp_path, monkeypatch, fault):
    start = runner.WarmKernel.start

    def refused(_):
        raise OSError("no more processes")

    def astray(kernel):
        kernel._args = (kernel._args[0], "/nowhere", kernel._args[2])
        start(kernel)

    if fault == "no process":
        monkeypatch.setattr(runner.WarmKernel, "start", refused)
    else:  # it ends at once, for want of its folder
        monkeypatch.setattr(runner.WarmKernel, "start", astray)
    cells = [new_code_cell("seed: int = 0", metadata={"tags": ["parameters"]}), new_code_cell("print(6 * 7)")]
    runner.execute(written(cells, tmp_path / "w.ipynb"), tmp_path / "out" / "w.ipynb", {}, tmp_path / "times.jsonl")
    assert nbformat.read(tmp_path / "out" / "w.ipynb", as_version=4).cells[-1].outputs[0].text == "42\n"


def test_the_plan_says_times_and_the_disk_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "RUNS", tmp_path / "runs")
    settings = load_settings("smoke")
    name = notebooks()[0].stem
    runner.write_json(tmp_path / "runs/smoke/stamps" / f"{name}.json", {"seconds": 120.0})
    lines = runner.planned(settings)
    assert all(path.stem in line for path, line in zip(notebooks(), lines)) and "2 min  measured" in lines[0]
    assert "time" in lines[-2] and "disk" in lines[-1]
    names = [line.split()[0] for line in runner.planned(settings, ("30",))]
    assert names == [notebooks(("30",))[0].stem, "time", "disk"]
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10**6}))
    with pytest.raises(StudyError, match="1 MB are free.*STUDY_ROOT"):
        runner.require_disk(settings)


def test_times_in_words():
    assert [exhibits.duration(value) for value in (45, 600, 7200)] == ["45 s", "10 min", "2.0 h"]


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_the_whole_report_is_packed_for_a_release(tmp_path):
    command = ["make", "-f", str(PROJECT / "Makefile"), "archive"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode and "make study" in done.stdout + done.stderr
    names = ["html/40.html", "figures/40_maps.svg", "tables/40_maps.csv", "reference/study/40_maps.csv", "index.html"]
    for name in [*names, "executed/40.ipynb"]:
        (tmp_path / "reports" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "reports" / name).write_text(name)
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    with tarfile.open(tmp_path / "report.tar.gz") as archive:
        assert {member.name for member in archive if member.isfile()} == set(names)
