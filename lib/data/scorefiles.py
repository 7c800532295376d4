"""Score files and keys of the ASVspoof challenges: read strictly, written atomically, evaluated whole.

Score up = bona fide in every file. Three forms of score file, by their `form` name:
    asvspoof2019   `clip attack label score`   spaces, no header
    asvspoof2021   `clip score`                spaces, no header
    asvspoof5      `filename<TAB>cm-score`     tabs, with that header; the only form whose ids may hold spaces
Keys are recognised by their columns, see `read_key`. Files ending in .gz are read as well.
"""
from __future__ import annotations

import gzip
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from lib.paths import write_text

FORMS = {"asvspoof2019": 4, "asvspoof2021": 2, "asvspoof5": 2}  # name -> columns
SCORE_HEADER, KEY_HEADER = ["filename", "cm-score"], ["filename", "cm-label"]
LABELS = ("bonafide", "spoof")
FEW_TRIALS = 100  # below this many clips of a class the EER moves in steps of over 1 %
KEY_COLUMNS = ["speaker", "clip_id", "attack", "label", "subset", "condition", "family"]
PROTOCOLS = {  # columns of a protocol, split at spaces -> positions of KEY_COLUMNS
    5: (0, 1, 3, 4, None, None, None),  # ASVspoof 2019 LA
    6: (0, 1, 4, 5, None, None, None),  # ASVspoof 5, the older challenge release
    8: (0, 1, 4, 5, 7, 2, None),  # ASVspoof 2021 LA, and the stage-1 key of 2021 DF
    10: (0, 1, 7, 8, None, 3, None),  # ASVspoof 5
    13: (0, 1, 4, 5, 7, 2, 8),  # ASVspoof 2021 DF
}


class ScoreFileError(ValueError):
    """A score or key file that does not say what it has to say: which file, which line, what to do."""


def _refuse(path: Path, problems: list[str]) -> None:
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ScoreFileError(f"{path}: {'; '.join(problems[:5])}{more}.")


def _refuse_some(path: Path, expected: str, ids: Iterable[str], remedy: str) -> None:
    ids = list(ids)
    if ids:
        raise ScoreFileError(f"{path}: expected {expected}, found {len(ids)} not so: {ids[:3]}. {remedy}")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, text without its end), blank lines left out. Raises ScoreFileError."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ScoreFileError(f"{path}: expected a readable UTF-8 text file, found: {error}.") from error


def _first_line(path: Path) -> str:
    for _, line in _lines(path):
        return line
    raise ScoreFileError(f"{path}: expected scores or labels, found an empty file. Make it again.")


def _refuse_duplicates(path: Path, ids: pd.Series) -> None:
    _refuse_some(path, "every clip once", ids[ids.duplicated()].unique(), "Remove lines or rename clips.")


def _form_of(path: Path) -> str:
    first = _first_line(path)
    fields = first.split()
    if first.split("\t") == SCORE_HEADER:
        return "asvspoof5"
    if len(fields) == 2:
        return "asvspoof2021"
    if len(fields) == 4 and fields[2] in LABELS:
        return "asvspoof2019"
    raise ScoreFileError(
        f"{path}: expected `clip score`, `clip attack label score` or the header `filename<TAB>cm-score`, "
        f"found {len(fields)} columns: {first[:80]!r}. Ids with spaces need that header and tabs; of a "
        "five-column SASV file keep filename and cm-score.")


def read_scores(path: str | os.PathLike, form: str | None = None) -> pd.DataFrame:
    """Columns clip_id, score (finite, up = bona fide) and, in the form asvspoof2019, attack and label.

    `form` is one of `FORMS`, None recognises it by the first line. Raises ScoreFileError on lines that do not
    parse (with their numbers), NaN or Inf, duplicate ids, an empty file.
    """
    path = Path(path)
    form = form or _form_of(path)
    if form not in FORMS:
        raise ScoreFileError(f"expected a form among {', '.join(FORMS)}, found {form!r}.")
    tabbed, width, lines = form == "asvspoof5", FORMS[form], list(_lines(path))
    if tabbed and _first_line(path).split("\t") != SCORE_HEADER:
        raise ScoreFileError(f"{path}: expected the header `filename<TAB>cm-score`: {lines[0][1]!r:.60}.")
    rows, problems = [], []
    for number, line in lines[int(tabbed):]:
        fields = line.split("\t" if tabbed else None)
        try:
            score = float(fields[-1])
        except ValueError:
            score = math.nan
        if len(fields) != width or not fields[0].strip():
            problems.append(f"line {number}: expected {width} columns, found {len(fields)} in {line[:60]!r}")
        elif not math.isfinite(score):
            problems.append(f"line {number}: expected a finite score, found {fields[-1]!r}")
        elif width == 4 and fields[2] not in LABELS:
            problems.append(f"line {number}: expected the label bonafide or spoof, found {fields[2]!r}")
        else:
            rows.append((fields[0], score, *fields[1:-1]))
    _refuse(path, problems or ([] if rows else ["expected scores below the header, found none"]))
    table = pd.DataFrame(rows, columns=["clip_id", "score", "attack", "label"][:width])
    if width == 4:
        table["attack"] = table["attack"].where(table["label"] == "spoof", "")
    _refuse_duplicates(path, table["clip_id"])
    return table


def _checked(path: Path, table: pd.DataFrame, needed: list[str], spaces: bool) -> pd.DataFrame:
    """The needed columns, ids as text fit for the file, labels of the two spellings, finite scores."""
    if not set(needed) <= set(table) or not len(table):
        raise ScoreFileError(f"{path}: expected rows with {needed}, found {len(table)} with {list(table)}.")
    table = table[needed].assign(clip_id=table["clip_id"].astype(str))
    ids = table["clip_id"]
    _refuse_duplicates(path, ids)
    unfit = [name for name in ids if name != name.strip() or "\t" in name or len(name.splitlines()) != 1
             or (not spaces and len(name.split()) > 1)]
    wanted = "ids without tabs or outer spaces" if spaces else "ids without spaces"
    _refuse_some(path, wanted, unfit, "The form asvspoof5 takes inner spaces.")
    if "label" in needed:
        _refuse_some(path, "labels bonafide or spoof", {*table["label"]} - {*LABELS}, "Spell them so.")
    if "score" in needed:
        table["score"] = table["score"].astype(float)
        _refuse_some(path, "finite scores", ids[~np.isfinite(table["score"])], "Look at these clips first.")
    return table


def write_scores(path: str | os.PathLike, table: pd.DataFrame, form: str = "asvspoof5") -> Path:
    """Write clip_id and score (form asvspoof2019: also label and attack or generator); return the path.

    Atomic, and with all digits: reading gives the same floats. Raises ScoreFileError.
    """
    path, attack = Path(path), "attack" if "attack" in table else "generator"
    if form not in FORMS:
        raise ScoreFileError(f"expected a form among {', '.join(FORMS)}, found {form!r}.")
    if form == "asvspoof2019":
        table = _checked(path, table, ["clip_id", attack, "label", "score"], spaces=False)
        lines = [f"{name} {'_'.join(str(kind).split()) * (label == 'spoof') or '-'} {label} {score!r}"
                 for name, kind, label, score in table.itertuples(index=False, name=None)]
    else:
        tab = "\t" if form == "asvspoof5" else " "
        table = _checked(path, table, ["clip_id", "score"], spaces=form == "asvspoof5")
        lines = [tab.join(SCORE_HEADER)] if form == "asvspoof5" else []
        lines += [f"{name}{tab}{score!r}" for name, score in table.itertuples(index=False, name=None)]
    write_text(path, "".join(f"{line}\n" for line in lines))
    return path


def write_key(path: str | os.PathLike, table: pd.DataFrame) -> Path:
    """Write clip_id and label as an ASVspoof 5 key, atomically; return the path. Raises ScoreFileError."""
    path = Path(path)
    table = _checked(path, table, ["clip_id", "label"], spaces=True)
    pairs = table.itertuples(index=False, name=None)
    rows = ["\t".join(KEY_HEADER), *(f"{name}\t{label}" for name, label in pairs)]
    write_text(path, "".join(f"{row}\n" for row in rows))
    return path


def read_key(path: str | os.PathLike) -> pd.DataFrame:
    """Columns speaker, clip_id, attack, label, subset, condition, family ('' where a file does not say).

    Takes an ASVspoof 5 key (`filename<TAB>cm-label`), the protocols of ASVspoof 2019 LA (5 columns), 2021 LA
    (8), 2021 DF (13, or 8 in its first stage) and 5 (10, or 6 in its first release), and a CSV with clip_id
    and label (and speaker, attack or generator). Raises ScoreFileError.
    """
    path = Path(path)
    first = _first_line(path)
    tabbed, width = first.split("\t") == KEY_HEADER, len(first.split())
    if {"clip_id", "label"} <= set(first.split(",")):
        try:
            table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
        except ValueError as error:
            raise ScoreFileError(f"{path}: expected a CSV of one width, found: {error}.") from error
        table = table.rename(columns={} if "attack" in table else {"generator": "attack"})
        table = table.reindex(columns=KEY_COLUMNS, fill_value="")
        _refuse_some(path, "labels bonafide or spoof", {*table["label"]} - {*LABELS}, "Spell them so.")
    elif tabbed or width in PROTOCOLS:
        width, at = (2, (None, 0, None, 1, None, None, None)) if tabbed else (width, PROTOCOLS[width])
        rows, problems = [], []
        for number, line in list(_lines(path))[int(tabbed):]:
            fields = line.split("\t" if tabbed else None)
            if len(fields) != width or fields[at[3]] not in LABELS:
                problems.append(f"line {number}: expected {width} columns with bonafide or spoof in column "
                                f"{at[3] + 1}, found {line[:80]!r}")
            else:
                rows.append(["" if i is None or fields[i] == "-" else fields[i] for i in at])
        _refuse(path, problems)
        table = pd.DataFrame(rows, columns=KEY_COLUMNS)
    else:
        raise ScoreFileError(f"{path}: expected the header `filename<TAB>cm-label`, a CSV with clip_id and "
                             f"label or a protocol of {[*PROTOCOLS]} columns, found {width}: {first[:80]!r}.")
    _refuse(path, [] if len(table) else ["expected at least one labelled clip, found none"])
    _refuse_duplicates(path, table["clip_id"])
    for column in ("attack", "family"):
        table[column] = table[column].where(table["label"] == "spoof", "")
    table["condition"] = table["condition"].replace({"none": "", "nocodec": ""})
    return table


