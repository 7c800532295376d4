"""Figures and tables as files and on the page."""

import base64
import json

import pandas as pd
import pytest
from matplotlib.figure import Figure

from lib.report import exhibits
from lib.report.exhibits import Exhibits


@pytest.fixture
def shown(monkeypatch):
    """What was displayed."""
    things = []
    monkeypatch.setattr("IPython.display.display", lambda thing, raw=False: things.append(thing))
    return things


@pytest.mark.parametrize("rows, folded, rest", [(3, 3, ""), (200, 60, "140 more rows: figures/30_curve.csv")])
def test_a_figure_is_shown_with_words_and_its_numbers_under_a_fold(tmp_path, shown, rows, folded, rest):
    figure = Figure()
    figure.subplots().plot([1, 2])
    data = pd.DataFrame({"step": range(rows), "loss <b>": 0.5})
    Exhibits(tmp_path, "30_x", {"seed": 0}).figure(figure, "curve", "Loss falls", data)
    image, fold = shown
    picture, metadata = image._repr_png_()
    assert base64.b64decode(picture).startswith(b"\x89PNG") and metadata["alt"] == "Loss falls"
    text = fold["text/html"]
    assert text.startswith("<details") and text.count("<tr>") == folded and rest in text and "loss &lt;b&gt;" in text
    stem = tmp_path / "figures" / "30_curve"
    assert len(pd.read_csv(stem.with_suffix(".csv"))) == rows and stem.with_suffix(".txt").read_text() == "Loss falls\n"
    assert stem.with_suffix(".svg").exists() and stem.with_suffix(".png").read_bytes() == base64.b64decode(picture)


def test_a_table_carries_where_it_comes_from(tmp_path, shown):
    Exhibits(tmp_path, "30", {"seed": 4}).table(pd.DataFrame({"auc": [0.51234]}), "results", "AUC & more", digits=2)
    sheet = json.loads((tmp_path / "tables" / "30_results.json").read_text())
    assert sheet["provenance"] == {"seed": 4} and sheet["rows"] == [{"auc": 0.51234}]
    assert "0.51<" in shown[0]["text/html"] and "AUC &amp; more" in shown[0]["text/html"]
    assert "0.51" in shown[0]["text/plain"]


@pytest.mark.parametrize("preset", ["study", "smoke", "full"])
def test_rows_of_the_reference_run_are_said_to_be_so(tmp_path, shown, monkeypatch, preset):
    monkeypatch.setattr(exhibits, "REFERENCE", tmp_path / "reference")
    (tmp_path / "reference" / "full").mkdir(parents=True)
    rows = [{"seed": seed, "kind": kind, "auc": 0.1 * seed} for seed in (0, 1) for kind in ("a", "b")]
    pd.DataFrame(rows).assign(more=1).to_csv(tmp_path / "reference" / "full" / "33_seeds.csv", index=False)
    now = pd.DataFrame([{"seed": 0, "kind": "a", "auc": 0.5}, {"seed": 0, "kind": "c", "auc": 0.6}])
    Exhibits(tmp_path, "33", {"preset": preset}).table(now, "seeds", reference=["seed", "kind"])
    table = pd.read_csv(tmp_path / "tables" / "33_seeds.csv")
    if preset == "study":
        assert table.values.tolist() == [
            [0, "a", 0.5, "this run"], [0, "c", 0.6, "this run"],
            [0, "b", 0.0, "reference"], [1, "a", 0.1, "reference"], [1, "b", 0.1, "reference"]]
    else:
        assert table.equals(now)
    assert ("href='../reference/full/33_seeds.csv'" in shown[0]["text/html"]) == (preset == "study")


def test_figures_carry_where_they_come_from(tmp_path, shown):
    from matplotlib.figure import Figure
    from PIL import Image

    trail = {"seed": 4, "settings": "a1b2", "data": "c3d4", "code": "e5f6+", "device": "cpu"}
    Exhibits(tmp_path, "30", trail).figure(Figure(), "x", "Nothing at all")
    stem = tmp_path / "figures" / "30_x"
    assert json.loads(Image.open(stem.with_suffix(".png")).text["Description"]) == trail
    assert "c3d4" in stem.with_suffix(".svg").read_text()


@pytest.mark.parametrize("rows, folded", [(12, False), (13, True)])
def test_a_long_table_is_folded(tmp_path, shown, rows, folded):
    Exhibits(tmp_path, "30_x", {"seed": 0}).table(pd.DataFrame({"auc": [0.5] * rows}), "auc", "AUC")
    assert ("<details" in shown[0]["text/html"]) == folded and shown[0]["text/html"].count("<tr") == rows + 1
