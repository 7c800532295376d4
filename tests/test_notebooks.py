"""Every notebook: its form, and its execution at the smoke preset through the command that a person uses."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from lib.report.run import checked_parameters
from tests.pages import chromium, look, needs_browser, remote_urls

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_form(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert re.match(rf"# {path.name[:2]} ", notebook.cells[0].source) and "*Reads:*" in notebook.cells[0].source
    assert not any(cell.outputs or cell.execution_count for cell in code), "committed without outputs"
    for cell in code:
        tree = ast.parse(cell.source)
        assert not any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in ast.walk(tree)), "no definitions"
        assert len(cell.source.splitlines()) <= 25
    assert sum("finding" in cell.metadata.get("tags", []) for cell in code) == 1
    assert checked_parameters(path, {"preset": "smoke", "seed": 1, "options": ""})
    assert {"smoke", "study"} <= set(notebook.metadata.get("seconds", {})), "the plan wants its time at these presets"
    parameters = next(cell for cell in code if "parameters" in cell.metadata.get("tags", []))
    assert all("#" in line and ":" in line for line in parameters.source.splitlines()), "typed and commented"


def run(root, command):
    environment = os.environ | {"STUDY_ROOT": str(root)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The study at the smoke preset, run as a person runs it; generated files go to a folder of their own, while audio
    that was made before is used again."""
    root = tmp_path_factory.mktemp("study")
    (ROOT / "data").mkdir(exist_ok=True)
    (root / "data").symlink_to(ROOT / "data", target_is_directory=True)
    command = [sys.executable, "-m", "lib", "study", "--preset", "smoke"]
    done = run(root, command)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return root, command


@pytest.mark.study
def test_every_notebook_ran_and_has_its_page(smoke):
    root, _ = smoke
    index = (root / "reports" / "index.html").read_text()
    for path in NOTEBOOKS:
        page = root / "reports" / "html" / f"{path.stem}.html"
        assert page.exists() and f"html/{page.name}" in index
        text = page.read_text()
        assert not remote_urls(text) and "Finding." in text and "mean nothing" in text
        assert not re.search(r"<img(?![^>]*\balt=\"[^\"]+\")", text), "every picture has a description"
    assert not remote_urls(index) and "mean nothing" in index and "start and imports" in index
    pages = sum(path.stat().st_size for path in (root / "reports" / "html").glob("*.html"))
    assert pages < 25_000_000, f"{pages / 1e6:.1f} MB of pages"


@pytest.mark.study
@needs_browser
def test_every_page_loads_in_a_browser_without_a_network(smoke):
    reports, looks = smoke[0] / "reports", {}
    with chromium() as browser:
        for page in (reports / "index.html", *sorted((reports / "html").glob("*.html"))):
            looks[page.stem] = seen = look(browser, page)
            assert seen.errors == [] and seen.requests == [], page.name
            assert seen.broken == [] and seen.unnamed == 0, f"{page.name}: {seen}"
            assert seen.silent == 0 and seen.wide == 0, f"{page.name}: {seen}"
    assert len(looks) == len(NOTEBOOKS) + 1 and sum(seen.images for seen in looks.values()) > 25
    assert all(looks[name].players for name in ("40_anomaly_maps", "90_score_your_recording"))


@pytest.mark.study
def test_tables_carry_where_they_come_from(smoke):
    root, _ = smoke
    tables = sorted((root / "reports" / "tables").glob("*.json"))
    assert len(tables) > 20
    for path in tables:
        trail = json.loads(path.read_text())["provenance"]
        assert {"preset", "seed", "settings", "data", "code", "device", "versions"} <= set(trail)
        assert trail["preset"] == "smoke"


@pytest.mark.study
def test_figures_have_data_and_words(smoke):
    root, _ = smoke
    figures = sorted((root / "reports" / "figures").glob("*.png"))
    assert len(figures) > 12
    for path in figures:
        assert path.with_suffix(".svg").exists() and len(path.with_suffix(".txt").read_text()) > 20


@pytest.mark.study
def test_a_second_run_does_nothing(smoke):
    root, command = smoke
    done = run(root, command)
    assert done.returncode == 0 and done.stdout.count("unchanged, skipped") == len(NOTEBOOKS)


@pytest.mark.study
def test_a_failing_notebook_stops_the_run_and_says_where(smoke):
    root, command = smoke
    done = run(root, [*command, "--only", "10", "--set", "data.generators=worlds"])
    assert done.returncode != 0 and "worlds" in done.stderr + done.stdout
