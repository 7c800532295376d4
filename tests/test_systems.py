"""Kinds of evidence at work: recordings from outside corpus by corpus, by hand; a score file with a manifest."""

import numpy as np
import pandas as pd
import pytest

from lib.data.scorefiles import ScoreFileError, write_scores
from lib.evaluate.systems import by_corpus, called, outside_summary, outside_text, read_outside, scored_outside

ROWS = [("a1", "bonafide", "a", 0.0), ("a2", "bonafide", "a", 1.0), ("a3", "spoof", "a", 2.0),
        ("a4", "spoof", "a", 3.0), ("b1", "bonafide", "b", 0.0), ("b2", "bonafide", "b", 1.0),
        ("b3", "spoof", "b", 0.5), ("b4", "spoof", "b", -1.0)]


@pytest.fixture
def table():
    frame = pd.DataFrame(ROWS, columns=["path", "label", "corpus", "all"])
    return frame.assign(p_all=[0.9, 0.04, 0.01, 0.01, 0.9, 0.5, 0.04, 1.0])


@pytest.fixture
def files(tmp_path, table):
    table[["path", "label", "corpus"]].to_csv(tmp_path / "m.csv", index=False)
    rows = pd.DataFrame({"clip_id": table.path, "score": -table["all"]})
    return write_scores(tmp_path / "scores.tsv", rows), tmp_path / "m.csv"


def test_a_corpus_by_hand(table):
    rows = by_corpus(table).set_index("corpus")
    assert rows.auc.to_dict() == {"a": 1.0, "b": 0.25}  # of four pairs each, four and one are in order
    assert rows.found.to_dict() == {"a": 1.0, "b": 0.5} and rows["false alarms"].to_dict() == {"a": 0.5, "b": 0.0}
    assert rows.low["a"] == pytest.approx(0.0126, abs=1e-4) and rows.high["b"] == pytest.approx(0.8419, abs=1e-4)


def test_macro_is_the_mean_of_corpora_and_pooled_mixes_them(table):
    row = outside_summary(table).iloc[0]
    assert row["macro AUC"] == 0.625 and row.low == 0.25 and row.high == 1.0
    assert row["pooled AUC"] == (4 + 4 + 2) / 16  # 2 and 3 above all four, 0.5 above two, -1 above none
    assert row.found == 0.75 and row["false alarms"] == 0.25


def test_shares_called_have_exact_intervals():
    roles = ["bonafide"] * 20 + ["copysynth", "tts", "control", "control"]
    kinds = {f"p_{name}": [0.5] * 20 + [0.01, 0.5, 0.01, 0.5]
             for name in ("pyramid", "steady", "lines", "texture", "sameness", "all")}
    row = called(pd.DataFrame({"role": roles} | kinds)).set_index("evidence").loc["All evidence"]
    assert row["false alarms"] == 0 and row.high == pytest.approx(1 - 0.025 ** (1 / 20))
    assert (row["copies found"], row["speech synthesis found"], row["controls"]) == (1, 0, 0.5)


def test_a_score_file_and_a_manifest_give_the_same_table(files, table):
    found = scored_outside(*files)
    assert found["all"].tolist() == table["all"].tolist()
    assert found.p_all[2] == 1 / 3  # above both real recordings of the other corpus
    assert "0.625" in outside_text(*files)


@pytest.mark.parametrize(("change", "words"), [({"label": "fake"}, "labels bonafide and spoof"),
                                               ({"corpus": None}, "corpus")])
def test_a_manifest_that_does_not_fit_is_refused(tmp_path, table, change, words):
    wrong = table.drop(columns="corpus") if "corpus" in change else table.assign(**change)
    wrong.to_csv(tmp_path / "m.csv", index=False)
    with pytest.raises(ValueError, match=words):
        read_outside(tmp_path / "m.csv")


def test_a_recording_without_a_score_is_named(files):
    scores, manifest = files
    scores.write_text("\n".join(scores.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises((ValueError, ScoreFileError), match="none of 1, such as b4"):
        scored_outside(scores, manifest)


def test_values_of_all_rows_are_finite(files):
    assert np.isfinite(scored_outside(*files)[["all", "p_all"]]).all().all()
