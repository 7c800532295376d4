"""Score files: exact round trips, every refusal with its line, evaluation against hand-computed numbers."""
from __future__ import annotations

import gzip
import os

import numpy as np
import pandas as pd
import pytest

from lib.data import scorefiles
from lib.data.scorefiles import ScoreFileError, read_key, read_scores, write_scores
from lib.evaluate import metrics
from lib.evaluate.results import evaluate


def saved(folder, text, name="scores.txt"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def written_key(path, table):
    table[["clip_id", "label"]].to_csv(path, sep="\t", index=False, header=["filename", "cm-label"])
    return path


def trials(n=6):
    return pd.DataFrame({"clip_id": [f"clip_{i}" for i in range(n)],
                         "score": [0.1 * i - 1 / 3 for i in range(n)],
                         "label": ["spoof", "bonafide"] * (n // 2), "generator": ["world", ""] * (n // 2)})


# --- reading and writing ------------------------------------------------------------

@pytest.mark.parametrize("form", scorefiles.FORMS)
def test_round_trip_keeps_every_digit(tmp_path, form):
    table = trials()
    table.loc[0, "score"] = 1e-300
    path = write_scores(tmp_path / "new folder" / "scores.txt", table, form)
    read = read_scores(path)
    assert read["clip_id"].tolist() == table["clip_id"].tolist()
    assert read["score"].tolist() == table["score"].tolist()
    if form == "asvspoof2019":
        assert read["label"].tolist() == table["label"].tolist()
        assert read["attack"].tolist() == table["generator"].tolist()
    assert [file.name for file in path.parent.iterdir()] == ["scores.txt"]  # no draft left behind


def test_the_exact_lines(tmp_path):
    table = trials(2).assign(score=[-1.5, 2.0])
    text = {form: write_scores(tmp_path / form, table, form).read_bytes() for form in scorefiles.FORMS}
    assert text == {"asvspoof2019": b"clip_0 world spoof -1.5\nclip_1 - bonafide 2.0\n",
                    "asvspoof2021": b"clip_0 -1.5\nclip_1 2.0\n",
                    "asvspoof5": b"filename\tcm-score\nclip_0\t-1.5\nclip_1\t2.0\n"}


def test_published_examples(tmp_path):
    line = read_scores(saved(tmp_path, "LA_E_2834763 A11 spoof -8.750496864318848\n")).iloc[0]
    assert (line.clip_id, line.attack, line.label) == ("LA_E_2834763", "A11", "spoof")
    assert line.score == -8.750496864318848


def test_crlf_bom_blank_lines_and_gzip(tmp_path):
    text = "\ufefffilename\tcm-score\r\na\t1\r\n\r\nb\t-2e0\r\n"
    path = tmp_path / "scores.tsv.gz"
    with gzip.open(path, "wt", encoding="utf-8", newline="") as file:
        file.write(text)
    assert read_scores(path)["score"].tolist() == [1.0, -2.0]


def test_a_header_with_spaces_and_a_damaged_archive(tmp_path):
    assert read_scores(saved(tmp_path, "filename cm-score\na 1\nb  2\n"))["score"].tolist() == [1.0, 2.0]
    assert read_key(saved(tmp_path, "filename cm-label\na spoof\n"))["label"].tolist() == ["spoof"]
    assert read_scores(saved(tmp_path, "filename\tcm-score \na\t1\n"))["score"].tolist() == [1.0]
    assert read_key(saved(tmp_path, "filename \tcm-label\r\na\tspoof\n"))["label"].tolist() == ["spoof"]
    packed = bytearray(gzip.compress(b"filename\tcm-score\n" + b"".join(b"a%d\t%d\n" % (n, n * n) for n in range(999))))
    packed[40:60] = b"\xff" * 20
    (tmp_path / "scores.tsv.gz").write_bytes(packed)
    with pytest.raises(ScoreFileError, match="scores.tsv.gz: expected a readable"):
        read_scores(tmp_path / "scores.tsv.gz")


def test_ids_with_spaces(tmp_path):
    name = "fake/en/OpenAI TTS-1 HD/a (1).wav"
    table = trials(2).assign(clip_id=[name, "b"])
    assert read_scores(write_scores(tmp_path / "s.tsv", table))["clip_id"][0] == name
    assert read_key(written_key(tmp_path / "k.tsv", table))["clip_id"][0] == name
    for form in ("asvspoof2019", "asvspoof2021"):
        with pytest.raises(ScoreFileError, match="asvspoof5 takes inner spaces"):
            write_scores(tmp_path / "s.txt", table, form)
    with pytest.raises(ScoreFileError, match="Ids with spaces need"):
        read_scores(saved(tmp_path, f"{name} 1.0\n"))
    with pytest.raises(ScoreFileError, match="tabs"):
        write_scores(tmp_path / "s.tsv", table.assign(clip_id=["a\tb", "b"]))
    assert not (tmp_path / "s.txt").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_scores(tmp_path / "scores.tsv", trials())
    before = path.read_bytes()
    with pytest.raises(ScoreFileError, match="finite"):
        write_scores(path, trials().assign(score=np.nan))

    def full_disk(*_):
        raise OSError("no space left")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_scores(path, trials(2))
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("change", "message"), [
    ({"clip_id": ["a", "a"]}, "every clip once"), ({"label": ["real", "spoof"]}, "bonafide or spoof"),
    ({"clip_id": ["", "b"]}, "ids without"), ({"score": [np.inf, 0]}, "finite"),
    ({"clip_id": ["a\nc", "b"]}, "ids")])
def test_write_refuses(tmp_path, change, message):
    with pytest.raises(ScoreFileError, match=message):
        write_scores(tmp_path / "s.txt", trials(2).assign(**change), "asvspoof2019")
    with pytest.raises(ScoreFileError, match="expected rows with"):
        write_scores(tmp_path / "s.txt", trials(2)[["clip_id"]])
    with pytest.raises(ScoreFileError, match="expected a form among"):
        write_scores(tmp_path / "s.txt", trials(2), "csv")


@pytest.mark.parametrize(("text", "message"), [
    ("", "empty"), ("\n\n", "empty"), ("a 1\nb one\n", "line 2: expected a finite score, found 'one'"),
    ("a 1\nb nan\n", "line 2.*nan"), ("a 1\nb -inf\n", "line 2"), ("a 1\nb\n", "line 2: expected 2 columns"),
    ("a 1\na 2\n", "every clip once"), ("a A01 spoof 1\nb A01 fake 2\n", "line 2.*'fake'"),
    ("spk file 1 - -\n", "five-column SASV"), ("filename\tcm-score\n", "found none"),
    ("filename\tcm-score\na\t1\t2\n", "line 2: expected 2 columns"), ("a 1\nb c 2\n", "line 2: expected 2 "
                                                                                      "columns")])
def test_read_refuses(tmp_path, text, message):
    with pytest.raises(ScoreFileError, match=message):
        read_scores(saved(tmp_path, text))


def test_read_refuses_other_files(tmp_path):
    with pytest.raises(ScoreFileError, match="expected a readable"):
        read_scores(tmp_path / "none.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ScoreFileError, match="UTF-8"):
        read_scores(tmp_path / "binary")
    many = "".join(f"clip{i} x\n" for i in range(9))
    with pytest.raises(ScoreFileError, match="and 4 more"):
        read_scores(saved(tmp_path, many))


# --- keys ---------------------------------------------------------------------------

@pytest.mark.parametrize(("line", "expected"), [
    ("LA_0079 LA_T_1138215 - - bonafide", ("LA_0079", "LA_T_1138215", "", "bonafide", "", "", "")),
    ("LA_0079 LA_T_1271820 - A01 spoof", ("LA_0079", "LA_T_1271820", "A01", "spoof", "", "", "")),
    ("LA_0009 LA_E_9332881 alaw ita_tx A07 spoof notrim eval",
     ("LA_0009", "LA_E_9332881", "A07", "spoof", "eval", "alaw", "")),
    ("LA_0023 DF_E_2000011 nocodec asvspoof A14 spoof notrim progress traditional_vocoder - - - -",
     ("LA_0023", "DF_E_2000011", "A14", "spoof", "progress", "", "traditional_vocoder")),
    ("T_4850 T_0000000000 F - - - AC3 A05 spoof -", ("T_4850", "T_0000000000", "A05", "spoof", "", "", "")),
    ("E_1 E_2 M C03 1 7 - bonafide bonafide -", ("E_1", "E_2", "", "bonafide", "", "C03", "")),
    ("T_4850 T_0000000000 F - A05 spoof", ("T_4850", "T_0000000000", "A05", "spoof", "", "", ""))])
def test_protocol_lines(tmp_path, line, expected):
    assert tuple(read_key(saved(tmp_path, line + "\n")).iloc[0]) == expected


def test_csv_key_and_refusals(tmp_path):
    key = read_key(saved(tmp_path, "clip_id,label,generator,speaker\na,spoof,world,p1\nb,bonafide,,p1\n"))
    assert key["attack"].tolist() == ["world", ""] and key["speaker"].tolist() == ["p1", "p1"]
    for text, message in [("a b c\n", "found 3"), ("s u - - bonafide\ns v - A01 bona-fide\n", "line 2"),
                          ("filename\tcm-label\n", "found none"), ("clip_id,label\na,real\n", "bonafide or "
                                                                                              "spoof"),
                          ("filename\tcm-label\na\tspoof\na\tspoof\n", "every clip once")]:
        with pytest.raises(ScoreFileError, match=message):
            read_key(saved(tmp_path, text))


# --- evaluation ---------------------------------------------------------------------

def evaluated(folder, bonafide, spoof):
    table = pd.DataFrame({"clip_id": [f"c{i}" for i in range(len(bonafide) + len(spoof))],
                          "score": [*bonafide, *spoof],
                          "label": ["bonafide"] * len(bonafide) + ["spoof"] * len(spoof)})
    return evaluate(write_scores(folder / "s.tsv", table), written_key(folder / "k.tsv", table))


def test_evaluate_by_hand(tmp_path):
    text = "r1 - bonafide 3\nr2 - bonafide 1\nf1 A07 spoof 2\nf2 A08 spoof 0\n"
    result = evaluate(saved(tmp_path, text))
    assert (result["bonafide"], result["spoof"], result["eer"], result["auc"]) == (2, 2, 0.5, 0.75)
    attacks = [(row["attack"], row["spoof"], row["auc"]) for row in result["attacks"]]
    assert attacks == [("A07", 1, 0.5), ("A08", 1, 1)]
    assert result["cllr"] == metrics.cllr([3, 1], [2, 0])
    assert (result["act_dcf"], result["min_dcf"]) == (1.0, 0.5)
    assert [warning[:10] for warning in result["warnings"]] == ["few trials"] * 2


def test_evaluate_joins_by_id_not_by_order(tmp_path):
    scores = saved(tmp_path, "filename\tcm-score\nf\t0\nr\t1\n")
    key = saved(tmp_path, "filename\tcm-label\nr\tbonafide\nf\tspoof\n", "key.tsv")
    assert evaluate(scores, key)["auc"] == 1.0


def test_only_the_eval_subset_counts(tmp_path):
    key = saved(tmp_path, "s r1 none - bonafide bonafide notrim eval\ns f1 alaw - A07 spoof notrim eval\n"
                          "s f2 alaw - A07 spoof notrim progress\n", "key.txt")
    for text in ("r1 1\nf1 0\n", "r1 1\nf1 0\nf2 5\n"):
        assert evaluate(saved(tmp_path, text), key)["spoof"] == 1


def test_warnings(tmp_path):
    generator = np.random.default_rng(0)
    good = evaluated(tmp_path, generator.normal(1, 1, 200), generator.normal(0, 1, 200))
    assert good["warnings"] == []
    inverted = evaluated(tmp_path, generator.normal(0, 1, 200), generator.normal(1, 1, 200))
    assert "scores look inverted: higher must mean bona fide" in inverted["warnings"][0]
    decisions = evaluated(tmp_path, [1.0] * 150 + [0.0] * 50, [0.0] * 150 + [1.0] * 50)
    assert "2 distinct scores" in decisions["warnings"][-1]
    assert evaluated(tmp_path, [1.0], [0.0])["eer"] == 0.0


def test_evaluate_refuses(tmp_path):
    with pytest.raises(ScoreFileError, match="both classes, found 2 bonafide and 0 spoof"):
        evaluated(tmp_path, [1, 2], [])
    with pytest.raises(ScoreFileError, match="constant"):
        evaluated(tmp_path, [1, 1], [1])
    key = saved(tmp_path, "filename\tcm-label\nr\tbonafide\nf\tspoof\n", "key.tsv")
    for text, message in [("r 1\n", r"1 missing \['f'\] and 0 unknown"), ("r 1\nf 0\nx 2\n", r"1 unknown "
                                                                                             r"\['x'\]"),
                          ("r - bonafide 1\nf - bonafide 2\n", "labels of")]:
        with pytest.raises(ScoreFileError, match=message):
            evaluate(saved(tmp_path, text), key)
    with pytest.raises(ScoreFileError, match="name the key too"):
        evaluate(saved(tmp_path, "r 1\nf 0\n"))


def test_one_constant_attack_does_not_hide_the_rest(tmp_path):
    result = evaluate(saved(tmp_path, "r - bonafide 1\nf A07 spoof 1\ng A08 spoof 0\n"))
    assert np.isnan(result["attacks"][0]["eer"]) and result["attacks"][0]["auc"] == 0.5
    assert result["attacks"][1]["eer"] == 0


@pytest.mark.skipif(not os.environ.get("GOLDEN_SCORES"), reason="GOLDEN_SCORES names no score file")
def test_published_scores():
    result = evaluate(os.environ["GOLDEN_SCORES"])
    assert 100 * result["eer"] == pytest.approx(1.060135, abs=5e-7)
    assert [row["spoof"] for row in result["attacks"]] == [4914] * 13 and result["warnings"] == []
