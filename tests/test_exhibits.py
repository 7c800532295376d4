"""Figures and tables as files and on the page."""

import json

import pandas as pd
import pytest
from matplotlib.figure import Figure

from lib.report.exhibits import Exhibits


@pytest.fixture
def shown(monkeypatch):
    """What was displayed: (object, metadata)."""
    found = []
    monkeypatch.setattr("IPython.display.display", lambda thing, metadata=None: found.append((thing, metadata)))
    return found


@pytest.mark.parametrize("rows, folded, rest", [(3, 3, ""), (200, 60, "140 more rows: figures/30_curve.csv")])
def test_a_figure_is_shown_with_words_and_its_numbers_under_a_fold(tmp_path, shown, rows, folded, rest):
    figure = Figure()
    figure.subplots().plot([1, 2])
    data = pd.DataFrame({"step": range(rows), "loss <b>": 0.5})
    Exhibits(tmp_path, "30_x", {"seed": 0}).figure(figure, "curve", "Loss falls", data)
    (image, metadata), (fold, _) = shown
    assert image._repr_png_().startswith(b"\x89PNG") and metadata == {"image/png": {"alt": "Loss falls"}}
    text = fold._repr_html_()
    assert text.startswith("<details") and text.count("<tr>") == folded and rest in text and "loss &lt;b&gt;" in text
    stem = tmp_path / "figures" / "30_curve"
    assert len(pd.read_csv(stem.with_suffix(".csv"))) == rows and stem.with_suffix(".txt").read_text() == "Loss falls\n"
    assert stem.with_suffix(".svg").exists() and stem.with_suffix(".png").read_bytes() == image._repr_png_()


def test_a_table_carries_where_it_comes_from(tmp_path, shown):
    Exhibits(tmp_path, "30", {"seed": 4}).table(pd.DataFrame({"auc": [0.51234]}), "results", "AUC & more", digits=2)
    sheet = json.loads((tmp_path / "tables" / "30_results.json").read_text())
    assert sheet["provenance"] == {"seed": 4} and sheet["rows"] == [{"auc": 0.51234}]
    assert "0.51<" in shown[0][0]._repr_html_() and "AUC &amp; more" in shown[0][0]._repr_html_()


def test_figures_carry_where_they_come_from(tmp_path, shown):
    from matplotlib.figure import Figure
    from PIL import Image

    trail = {"seed": 4, "settings": "a1b2", "data": "c3d4", "code": "e5f6+", "device": "cpu", "versions": {"torch": "2"}}
    Exhibits(tmp_path, "30", trail).figure(Figure(), "x", "Nothing at all")
    stem = tmp_path / "figures" / "30_x"
    assert json.loads(Image.open(stem.with_suffix(".png")).text["Description"]) == trail
    assert "c3d4" in stem.with_suffix(".svg").read_text()
