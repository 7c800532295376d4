"""How each public corpus lies on the disk: one reader a corpus, from its folder to a list of `Clip`.

A reader takes the folder the user named and returns (clips, release): paths relative to that folder, and a
few words on which release was found. It opens protocols, lists folders, never audio. It finds the corpus
up to two folders further down and refuses, naming the right folder, where the user points inside it.
"""
from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, NoReturn

import pandas as pd

from lib.data.scorefiles import ScoreFileError, read_key

AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".m4a")
SPLITS = {"train": "train", "dev": "validation", "eval": "test", "test": "test"}
Found = tuple[list, str]


class DatasetError(ValueError):
    """A folder that does not hold the corpus it should: what was expected, what was found, what to do."""


class Clip(NamedTuple):
    """One row of a manifest, before what is the same for the whole corpus; see `lib.data.public.COLUMNS`."""
    clip_id: str
    path: str
    label: str = "bonafide"
    role: str = "bonafide"
    speaker: str = ""
    split: str = ""
    generator: str = ""
    family: str = ""
    parent: str = ""
    text: str = ""
    condition: str = ""


def refuse(where: Path, expected: object, found: object, remedy: str) -> NoReturn:
    raise DatasetError(f"{where}: expected {expected}; found {found}. {remedy}")


def _find(root: Path, *patterns: str) -> list[Path]:
    """What matches any of the patterns in the root, else one folder down, else two; or DatasetError."""
    for deeper in ("", "*/", "*/*/"):
        found = sorted({path for pattern in patterns for path in root.glob(deeper + pattern)})
        if found:
            return found
    above = [folder for folder in root.parents[:3] if any(any(folder.glob(pattern)) for pattern in patterns)]
    refuse(root, f"{' or '.join(patterns)}, here or up to two folders down",
           sorted(entry.name for entry in os.scandir(root))[:6] or "an empty folder",
           f"This is inside the corpus: give {above[0]}." if above else "Give the folder you unpacked to.")


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def audio_in(folder: Path) -> list[str]:
    """Names of the audio files of one folder, sorted; none where there is no such folder."""
    names = [entry.name for entry in os.scandir(folder)] if folder.is_dir() else []
    return sorted(name for name in names if name.lower().endswith(AUDIO_SUFFIXES) and name[0] != ".")


def _key(path: Path) -> tuple[pd.DataFrame, int]:
    """A protocol, and its number of columns."""
    try:
        return read_key(path), len(_lines(path)[0].split())
    except ScoreFileError as error:
        raise DatasetError(str(error)) from error


def _lines(path: Path) -> list[str]:
    try:
        # Not splitlines(): transcripts in some languages hold other signs that it takes for the end of a line.
        return [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: expected a readable UTF-8 text file; found: {error}.") from error


def _csv(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: expected a comma-separated UTF-8 table; found: {error}.") from error


def _bar_rows(path: Path, quoted: bool = False) -> list[list[str]]:
    """Rows of one width of a table divided by `|`; `quoted`: take csv quotes where plain reading fails."""
    lines = _lines(path)
    rows = [line.split("|") for line in lines]
    if quoted and len({len(row) for row in rows}) > 1:
        rows = list(csv.reader((f"{line}\n" for line in lines), delimiter="|"))
    wrong = [number for number, row in enumerate(rows, 1) if len(row) != len(rows[0])]
    if wrong or not rows:
        refuse(path, "rows of one width divided by `|`", f"{len(rows)} rows, other widths in {wrong[:3]}",
               "Unpack the corpus again.")
    return rows


def _transcripts(path: Path) -> list[tuple[str, str]]:
    """(id, normalised text) of `id|text|normalised`, no header, no quoting: LJSpeech and M-AILABS."""
    rows = _bar_rows(path)
    if len(rows[0]) != 3:
        refuse(path, "id|text|normalised", f"{len(rows[0])} columns: {rows[0]}", "Unpack the corpus again.")
    return [(row[0], row[2] or row[1]) for row in rows]


# --- ASVspoof -----------------------------------------------------------------------

def _from_key(key: pd.DataFrame, paths: Iterable[str], splits: Iterable[str]) -> list[Clip]:
    rows = zip(key.itertuples(index=False), paths, splits, strict=True)
    return [Clip(row.clip_id, path, row.label, row.label, row.speaker, split, row.attack, row.family,
                 condition=row.condition) for row, path, split in rows]


def _protocols(root: Path, home: Path, layout: dict[str, tuple[list[str], list[str]]]) -> Found:
    """Clips of every split that has a protocol and an audio folder (the first that exists of each list)."""
    clips, absent, widths = [], [], set()
    for split, (protocols, folders) in layout.items():
        protocol = next((path for pattern in protocols for path in sorted(home.glob(pattern))), None)
        folder = next((home / name for name in folders if (home / name).is_dir()), None)
        if protocol is None or folder is None:
            absent.append(f"{split} ({protocols[0] if protocol is None else folders[0]})")
            continue
        (key, width), base = _key(protocol), _relative(folder, root)
        widths.add(width)
        paths = (f"{base}/{name}.flac" for name in key["clip_id"])
        clips += _from_key(key, paths, [SPLITS[split]] * len(key))
    if not clips:
        refuse(home, "the protocol and the audio folder of at least one split", f"no pair, missing {absent}",
               "Unpack the protocols beside the audio folders.")
    found = f"protocols of {sorted(widths)} columns"
    return clips, f"{found}; absent: {', '.join(absent)}" if absent else found


def asvspoof2019_la(root: Path) -> Found:
    home = _find(root, "ASVspoof2019_LA_cm_protocols")[0].parent
    stem = "ASVspoof2019_LA_cm_protocols/ASVspoof2019.LA.cm."
    endings = {"train": "train.trn.txt", "dev": "dev.trl.txt", "eval": "eval.trl.txt"}
    return _protocols(root, home, {split: ([stem + ending], [f"ASVspoof2019_LA_{split}/flac"])
                                   for split, ending in endings.items()})


def asvspoof5(root: Path) -> Found:
    home = _find(root, "flac_T", "flac_D", "flac_E_eval", "flac_E")[0].parent

    def protocols(*stems: str) -> list[str]:
        return [f"{where}ASVspoof5.{stem}{ending}" for stem in stems for ending in (".tsv", ".metadata.txt")
                for where in ("", "*/")]
    clips, release = _protocols(root, home, {
        "train": (protocols("train"), ["flac_T"]), "dev": (protocols("dev.track_1", "dev"), ["flac_D"]),
        "eval": (protocols("eval.track_1", "eval"), ["flac_E_eval", "flac_E"])})
    return clips, release + (": the older challenge release" if "[6]" in release else "")


def _asvspoof2021(root: Path, track: str, widths: tuple[int, ...]) -> Found:
    """Audio in one or more parts; the key, a separate archive, up to three folders down beside it."""
    stem = f"ASVspoof2021_{track}_eval"
    parts = _find(root, f"{stem}*/flac", f"{stem}*/{stem}/flac")
    depths = ("", "*/", "*/*/", "*/*/*/")
    keys = [path for deeper in depths for path in root.glob(f"{deeper}CM/trial_metadata.txt")]
    keys = [path for path in keys if len(keys) == 1 or f"/{track}/" in path.as_posix()]
    if not keys:
        refuse(root, f"keys/{track}/CM/trial_metadata.txt", "no such file",
               "The key is a separate archive: unpack it beside the audio.")
    key, width = _key(keys[0])
    if width not in widths or not key["clip_id"].str.startswith(f"{track}_E_").all():
        refuse(keys[0], f"the {track} key of {' or '.join(map(str, widths))} columns with ids {track}_E_...",
               f"{width} columns and ids like {key['clip_id'][0]}", f"Take the key of the {track} track.")
    where = {}
    for part in parts:
        where |= {Path(name).stem: f"{_relative(part, root)}/{name}" for name in audio_in(part)}
    missing = key.loc[~key["clip_id"].isin(where), "clip_id"].tolist()
    if missing:
        refuse(root, f"audio of the {len(key)} clips of the key", f"{len(missing)} without audio in "
               f"{[_relative(part, root) for part in parts]}, such as {missing[:3]}", "Unpack every part.")
    splits = ["test" if subset == "eval" else "" for subset in key["subset"]]
    stage = " (stage 1)" if (track, width) == ("DF", 8) else ""
    return _from_key(key, (where[name] for name in key["clip_id"]), splits), f"key of {width} columns{stage}"


def asvspoof2021_la(root: Path) -> Found:
    return _asvspoof2021(root, "LA", (8,))


def asvspoof2021_df(root: Path) -> Found:
    return _asvspoof2021(root, "DF", (13, 8))


# --- Other sets with spoofed speech -------------------------------------------------

def in_the_wild(root: Path) -> Found:
    tables = {meta: _csv(meta) for meta in _find(root, "meta.csv")}
    fit = [meta for meta, table in tables.items() if {"file", "speaker", "label"} <= set(table)]
    if not fit:
        refuse(root, "meta.csv with the columns file, speaker, label", [*map(list, tables.values())][:2],
               "This meta.csv belongs to another corpus, or was saved by a spreadsheet.")
    table, moved = tables[fit[0]], fit[0].parent / "wavs"
    table["label"] = table["label"].replace({"bona-fide": "bonafide"})
    other = sorted({*table["label"]} - {"bonafide", "spoof"})
    if other:
        refuse(fit[0], "the labels bona-fide and spoof", other, "Download meta.csv again.")
    folder = _relative(moved if moved.is_dir() else fit[0].parent, root)
    base = "" if folder == "." else f"{folder}/"
    return [Clip(Path(row.file).stem, f"{base}{row.file}", row.label, row.label, row.speaker,
                 generator="unknown" if row.label == "spoof" else "")
            for row in table.itertuples(index=False)], f"wav files in {folder}"


def mlaad(root: Path) -> Found:
    folders = [path for fake in _find(root, "fake/") for path in sorted(fake.glob("*/*/"))]
    without = [_relative(folder, root) for folder in folders if not (folder / "meta.csv").is_file()]
    if without or not folders:
        refuse(root, "fake/<language>/<model>/meta.csv", f"{len(folders)} model folders, {len(without)} "
               f"without: {without[:3]}", "Unpack the corpus again.")
    clips = []
    for folder in folders:
        header, *rows = _bar_rows(folder / "meta.csv", quoted=True)
        if "path" not in header:
            refuse(folder / "meta.csv", "a column path, divided by `|`", header, "Unpack the corpus again.")
        for row in (dict(zip(header, values, strict=True)) for values in rows):
            name = Path(row["path"]).name
            clips.append(Clip(
                f"MLAAD/fake/{folder.parent.name}/{folder.name}/{Path(name).stem}",
                _relative(folder / name, root), "spoof", "tts",
                generator=row.get("model_name") or folder.name, family=row.get("architecture", ""),
                parent=re.sub(r"^\./|\.\w+$", "", row.get("original_file", "")),
                text=row.get("transcript", "")))
    version = re.search(r"v\d+", "/".join(folders[0].parts[-5:-3]), flags=re.IGNORECASE)
    models = {folder.name for folder in folders}
    languages = {folder.parent.name for folder in folders}
    found = f"{len(models)} models, {len(languages)} languages"
    return clips, f"{version[0] if version else 'version not stated'}: {found}"


def wavefake(root: Path) -> Found:
    speakers = {"ljspeech": "LJ", "jsut": "JSUT", "common_voices": ""}
    folders = _find(root, *(f"{corpus}_*/" for corpus in speakers))
    clips = []
    for folder in folders:
        corpus = next(name for name in speakers if folder.name.startswith(name))
        vocoded = corpus != "common_voices"  # those speak prompts, so no recording stands behind them
        for name in audio_in(folder):
            stem = Path(name).stem
            clips.append(Clip(f"{folder.name}/{stem}", _relative(folder / name, root), "spoof",
                              "copysynth" if vocoded else "tts", speakers[corpus],
                              generator=folder.name.removeprefix(f"{corpus}_"), family="neural vocoder",
                              parent=stem.removesuffix("_gen") if vocoded else ""))  # waveglow has no _gen
    return clips, f"{len(folders)} generator folders"


def fake_or_real(root: Path) -> Found:
    _find(root, "training/real")
    depths = ("", "*/", "*/*/")  # copies on Kaggle nest twice
    homes = sorted({path.parents[1] for deeper in depths for path in root.glob(f"{deeper}training/real")})
    if len(homes) > 1:
        refuse(root, "one variant", [_relative(home, root) for home in homes],
               "They hold the same speech: give the folder of one.")
    variant = (re.findall(r"original|norm|2sec|rerec", homes[0].name) or ["unnamed"])[0]
    clips = []
    for folder, split in {"training": "train", "validation": "validation", "testing": "test"}.items():
        for kind in ("real", "fake"):
            fake = {"label": "spoof", "role": "tts", "generator": "unknown"} if kind == "fake" else {}
            clips += [Clip(f"{folder}/{kind}/{name}", _relative(homes[0] / folder / kind / name, root),
                           split=split, **fake) for name in audio_in(homes[0] / folder / kind)]
    leak = "; rate, codec and duration differ by class: label leaks" if variant == "original" else ""
    return clips, f"for-{variant}{leak}"


def timit_tts(root: Path) -> Found:
    clips = []
    for kind in _find(root, "*/single_speaker", "*/multi_speaker"):
        multi = kind.name == "multi_speaker"
        for path in sorted(kind.glob("*/*/*" if multi else "*/*")):
            if path.suffix.lower() in AUDIO_SUFFIXES:
                inner = _relative(path.with_suffix(""), kind.parent.parent)
                clips.append(Clip(inner, _relative(path, root), "spoof", "tts",
                                  speaker=path.parent.name if multi else "",
                                  generator=path.relative_to(kind).parts[0], condition=kind.parent.name))
    return clips, "conditions " + ", ".join(sorted({clip.condition for clip in clips}))


# --- Bona fide speech ---------------------------------------------------------------

def vidtimit(root: Path) -> Found:
    folders = _find(root, "*/audio")
    clips = [Clip(f"{folder.parent.name}/{Path(name).stem}", _relative(folder / name, root),
                  speaker=folder.parent.name) for folder in folders for name in audio_in(folder)]
    return clips, f"{len(folders)} speakers"


def m_ailabs(root: Path) -> Found:
    clips = []
    for home in _find(root, "*/by_book", "by_book"):
        for book in sorted(home.rglob("metadata.csv")):
            inner = book.parent.relative_to(home).parts  # gender, speaker, book; or mix, book: no speaker
            base = f"{home.parent.name}/by_book/{'/'.join(inner)}/wavs"
            clips += [Clip(f"{base}/{name}", f"{_relative(book.parent, root)}/wavs/{name}.wav",
                           speaker="" if inner[0] == "mix" else inner[1], text=text)
                      for name, text in _transcripts(book)]
    return clips, "languages " + ", ".join(sorted({clip.clip_id.split("/")[0] for clip in clips}))


def ljspeech(root: Path) -> Found:
    meta = _find(root, "metadata.csv")[0]
    base = _relative(meta.parent / "wavs", root)
    if not (meta.parent / "wavs").is_dir():
        refuse(meta.parent, "wavs/ beside metadata.csv", "none", "Unpack LJSpeech-1.1 again.")
    rows = _transcripts(meta)
    return [Clip(name, f"{base}/{name}.wav", speaker="LJ", text=text) for name, text in rows], "1.1"


def librispeech(root: Path) -> Found:
    clips, subsets = [], []
    for subset in _find(root, "train-*/", "dev-*/", "test-*/"):
        subsets.append(subset.name)
        for transcript in sorted(subset.glob("*/*/*.trans.txt")):
            base, speaker = _relative(transcript.parent, root), transcript.parents[1].name
            for name, _, text in (line.partition(" ") for line in _lines(transcript)):
                clips.append(Clip(name, f"{base}/{name}.flac", speaker=speaker, text=text,
                                  split=SPLITS[subset.name.split("-")[0]]))
    return clips, ", ".join(subsets)


def vctk(root: Path) -> Found:
    home = _find(root, "wav48_silence_trimmed", "wav48")[0]
    clips = []
    for folder in sorted(path for path in home.iterdir() if path.is_dir()):
        chosen: dict[str, str] = {}
        for name in audio_in(folder):  # sorted: mic1 comes before mic2 and is kept
            chosen.setdefault(re.sub(r"_mic[12]$", "", Path(name).stem), name)
        for clip, name in chosen.items():
            text = home.parent / "txt" / folder.name / f"{clip}.txt"  # p315 has none
            clips.append(Clip(clip, _relative(folder / name, root), speaker=folder.name,
                              text=" ".join(_lines(text)) if text.is_file() else "",
                              condition="mic2" if "_mic2." in name else ""))
    return clips, "0.80" if home.name == "wav48" else "0.92, first microphone"


def csv_manifest(root: Path) -> Found:
    metas = [root] if root.is_file() else sorted(root.glob("*.csv"))
    if len(metas) != 1:
        refuse(root, "one CSV file", [meta.name for meta in metas], "Name the file itself.")
    table = _csv(metas[0])
    labels = {*table["label"]} if {"path", "label"} <= set(table) else {"none"}
    if not labels <= {"bonafide", "spoof"}:
        refuse(metas[0], "the columns path and label, the labels bonafide or spoof",
               f"columns {list(table)} and labels {sorted(labels)[:4]}", "Rename them.")
    given = ", ".join(table)
    table["path"] = table["path"].str.replace("\\", "/").str.removeprefix("./")
    defaults = {"clip_id": table["path"].str.replace(r"\.\w+$", "", regex=True), "role": table["label"]}
    for column in set(Clip._fields) - set(table):
        table[column] = defaults.get(column, "")
    rows = table[list(Clip._fields)].itertuples(index=False, name=None)
    return [Clip(*row) for row in rows], f"columns {given}"
