"""Owns score files and keys of the ASVspoof challenges and the study's score frames: read strictly, written atomically.

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
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from lib.paths import atomic, digest_of, write_text

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
    if ids := list(ids):
        raise ScoreFileError(f"{path}: expected {expected}, found {len(ids)} not so: {ids[:3]}. {remedy}")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, text without its end), blank lines left out. Raises ScoreFileError."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ScoreFileError(f"{path}: expected a readable UTF-8 text file, found: {error}.") from error


def _first_line(path: Path) -> str:
    for _, line in _lines(path):
        return line
    raise ScoreFileError(f"{path}: expected scores or labels, found an empty file. Make it again.")


def _is_header(line: str, names: list[str]) -> bool:
    return line.split() == names


def _refuse_duplicates(path: Path, ids: pd.Series) -> None:
    _refuse_some(path, "every clip once", ids[ids.duplicated()].unique(), "Remove lines or rename clips.")


def _form_of(path: Path) -> str:
    first = _first_line(path)
    fields = first.split()
    if _is_header(first, SCORE_HEADER):
        return "asvspoof5"
    if len(fields) == 2:
        return "asvspoof2021"
    if len(fields) == 4 and fields[2] in LABELS:
        return "asvspoof2019"
    raise ScoreFileError(f"{path}: expected `clip score`, `clip attack label score` or the header "
                         f"`filename<TAB>cm-score`, found {len(fields)} columns: {first[:80]!r}. Ids with spaces need "
                         "that header and tabs; of a five-column SASV file keep filename and cm-score.")


def read_scores(path: str | os.PathLike) -> pd.DataFrame:
    """Columns clip_id, score (finite, up = bona fide) and, in the form asvspoof2019, attack and label.

    Raises ScoreFileError on lines that do not parse (with their numbers), NaN or Inf, duplicate ids, an empty file.
    """
    path = Path(path)
    form = _form_of(path)
    headed, width, rows, problems = form == "asvspoof5", FORMS[form], [], []
    tabbed = headed and "\t" in _first_line(path)  # where tabs became spaces, ids have none
    for number, line in list(_lines(path))[int(headed):]:
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
    _refuse_some(path, "ids without tabs or outer spaces" if spaces else "ids without spaces", unfit,
                 "The form asvspoof5 takes inner spaces.")
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


def read_key(path: str | os.PathLike) -> pd.DataFrame:
    """Columns speaker, clip_id, attack, label, subset, condition, family ('' where a file does not say).

    Takes an ASVspoof 5 key (`filename<TAB>cm-label`), the protocols of ASVspoof 2019 LA (5 columns), 2021 LA
    (8), 2021 DF (13, or 8 in its first stage) and 5 (10, or 6 in its first release), and a CSV with clip_id
    and label (and speaker, attack or generator). Raises ScoreFileError.
    """
    path = Path(path)
    first = _first_line(path)
    headed, width = _is_header(first, KEY_HEADER), len(first.split())
    if {"clip_id", "label"} <= set(first.split(",")):
        try:
            table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
        except ValueError as error:
            raise ScoreFileError(f"{path}: expected a CSV of one width, found: {error}.") from error
        table = table.rename(columns={} if "attack" in table else {"generator": "attack"})
        table = table.reindex(columns=KEY_COLUMNS, fill_value="")
        _refuse_some(path, "labels bonafide or spoof", {*table["label"]} - {*LABELS}, "Spell them so.")
    elif headed or width in PROTOCOLS:
        width, at = (2, (None, 0, None, 1, None, None, None)) if headed else (width, PROTOCOLS[width])
        rows, problems = [], []
        for number, line in list(_lines(path))[int(headed):]:
            fields = line.split("\t" if headed and "\t" in first else None)
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


def read_labelled(score_path: str | os.PathLike, key_path: str | os.PathLike | None = None) -> pd.DataFrame:
    """clip_id, score, label, attack of exactly the clips of the key, or of its `eval` subset (attrs `left_out` says
    what is not); without a key, the labels of an asvspoof2019 file are used. Raises ScoreFileError."""
    score_path = Path(score_path)
    scores = read_scores(score_path)
    if key_path is None:
        _refuse(score_path, [] if "label" in scores else ["expected labels, found none: name the key too"])
        return scores
    key = read_key(key_path)
    chosen = key[key["subset"] == "eval"] if (key["subset"] == "eval").any() else key
    missing = chosen.loc[~chosen["clip_id"].isin(scores["clip_id"]), "clip_id"].tolist()
    extra = scores.loc[~scores["clip_id"].isin(key["clip_id"]), "clip_id"].tolist()
    if missing or extra:
        raise ScoreFileError(
            f"{score_path}: expected the {len(chosen)} clips of {key_path}, found {len(missing)} missing "
            f"{missing[:3]} and {len(extra)} unknown {extra[:3]}. Score every clip of the key and no other; "
            "compare spelling, file extension and folders of the ids.")
    table = chosen.merge(scores, on="clip_id", suffixes=("", "_scored"), validate="one_to_one")
    if "label_scored" in table:
        differ = table.loc[table["label"] != table["label_scored"], "clip_id"]
        _refuse_some(score_path, f"the labels of {key_path}", differ, "One of the two is out of date.")
        table["attack"] = table["attack"].where(table["attack"] != "", table["attack_scored"])
    counts = key.loc[~key["clip_id"].isin(table["clip_id"]), "subset"].value_counts()
    table.attrs["left_out"] = [
        f"{count} clips of the subset {name or '(unnamed)'} are left out: the key has the subset eval"
        for name, count in counts.items()
    ]
    return table


OURS = "This study's detector"
FRAME = ["experiment", "split", "system", "kind", "seed", "role", "family", "generator", "source", "speaker", "parent",
         "clip_id", "anomaly"]
"""Columns of a score frame: one row a clip, system, experiment and seed. `split` is test, development or threshold
(bona fide calibration clips); `parent` the clip that a copy was made from, of text to speech its sentence; `source` how
far a voice is from the training speech (`sources`); anomaly goes up for fakes."""

FAMILIES = {"signal vocoder": "vocoder-signal", "neural vocoder": ("vocoder-neural", "neural vocoder"),
            "joined recordings": ("tts-unit-selection", "tts-diphone"), "text to speech": "tts"}
ROLES = {"copysynth": "other copies", "tts": "text to speech", "spoof": "other fakes"}
"""Fakes by role, and their family where FAMILIES says nothing."""


def sources(clips: pd.DataFrame, experiment: str) -> pd.Series:
    """By clip id, how far each voice is from the training speech: a known voice, a new voice of a known collection
    (asterisk-ru where asterisk-en is trained on), or a new source."""
    train = clips[(clips.role == "bonafide") & (clips[experiment] == "train")]
    collection = clips.corpus.str.split("-").str[0]
    cases = [clips.speaker.isin(train.speaker), collection.isin(collection[train.index])]
    return pd.Series(np.select(cases, ["known voice", "known collection"], "new source"), index=clips.clip_id)


def score_frame(scores: pd.DataFrame, experiment: str, system: str = OURS, kind: str = "ours", seed: int = 0,
                clips: pd.DataFrame | None = None) -> pd.DataFrame:
    """Rows of a clip table with `anomaly` as a score frame; `clips`, the study's whole table, fills `source`."""
    sentence = scores.get("text", scores.clip_id).map(lambda text: f"sentence {digest_of(text, 8)}")
    source = scores.clip_id.map(sources(clips, experiment)) if clips is not None else ""
    split = scores[experiment].replace("validation", "development")
    return scores.assign(experiment=experiment, split=split, system=system, kind=kind, seed=seed, source=source,
                         parent=scores.parent.where(scores.role != "tts", sentence))[FRAME].reset_index(drop=True)


def save_scores(frame: pd.DataFrame, path: Path | str) -> pd.DataFrame:
    """Write a score frame (NAME.csv.gz, 7 digits; equal frames give equal bytes) and return it as it reads again:
    tables are made of that, so that they can be rebuilt from the file."""
    order = [name != "experiment" for name in FRAME[:-1]]  # single before multi
    text = frame[FRAME].sort_values(FRAME[:-1], ascending=order).to_csv(index=False, float_format="%.7g")
    with atomic(path) as temporary:
        temporary.write_bytes(gzip.compress(text.encode(), mtime=0))
    return load_scores(path)


def load_scores(path: Path | str) -> pd.DataFrame:
    """A score frame that `save_scores` wrote."""
    return pd.read_csv(path, keep_default_na=False, dtype=dict.fromkeys(set(FRAME) - {"seed", "anomaly"}, str))


def clusters(frame: pd.DataFrame) -> np.ndarray:
    """What each clip shares with others: with several voices the speaker, else the real sentence that pairs share; of
    text to speech always the sentence, since its voices are one a generator."""
    parents = np.where(frame.parent == "", frame.clip_id, frame.parent)
    return np.where((frame.experiment == "multi") & (frame.role != "tts"), frame.speaker, parents)


def parts_of(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The bona fide clips with each family of fakes, all copies, all fakes and each control: what the headline counts.

    frame: of one system and experiment. Families go by how a clip's `family` begins; the first that fits counts.
    """
    fake, family = frame.role.isin(ROLES), frame.role.map(ROLES).fillna(frame.generator)
    for name, begins in reversed(FAMILIES.items()):
        family = family.mask(fake & frame.family.str.startswith(begins), name)
    parts = {name: family == name for name in [*FAMILIES, "other copies", "other fakes"]}
    parts |= {"all copies": frame.role == "copysynth", "all fakes": fake}
    parts |= {name: family == name for name in frame.generator[frame.role == "control"].unique()}
    for name, part in parts.items():
        if part.any():
            yield name, frame[part | (frame.role == "bonafide")]
