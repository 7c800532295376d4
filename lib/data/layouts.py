"""Owns how each public corpus lies on the disk: one reader a corpus, from the folder that the user named to its clips,
with paths below that folder, and a word on its release. Readers open protocols, never audio; they find the corpus up to
two folders further down and refuse, naming the right folder, where the user points inside it."""

from __future__ import annotations

import csv
import io
import os
import re
from pathlib import Path
from typing import NamedTuple, NoReturn

import pandas as pd

from lib.data.decoders import SUFFIXES
from lib.data.scorefiles import read_key

SPLITS = {"train": "train", "dev": "validation", "eval": "test", "test": "test"}
DEPTHS, TRANSCRIPT = ("", "*/", "*/*/", "*/*/*/"), "id|text|normalised"


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


Corpus = tuple[list[Clip], str]


def refuse(where: Path, expected: object, actual: object, remedy: str = "Unpack the corpus again.") -> NoReturn:
    raise DatasetError(f"{where}: expected {expected}; found {actual}. {remedy}")


def _find(root: Path, *patterns: str) -> list[Path]:
    """What matches any of the patterns in the root, else one folder down, else two; or DatasetError."""
    for deeper in DEPTHS[:3]:
        matches = sorted({path for pattern in patterns for path in root.glob(deeper + pattern)})
        if matches:
            return matches
    above = [folder for folder in root.parents[:3] if any(any(folder.glob(pattern)) for pattern in patterns)]
    refuse(root, f"{' or '.join(patterns)}, here or up to two folders down",
           sorted(entry.name for entry in os.scandir(root))[:6] or "an empty folder",
           f"This is inside the corpus: give {above[0]}." if above else "Give the folder you unpacked to.")


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def audio_in(folder: Path) -> list[str]:
    """Names of the audio files of one folder, sorted; none where there is no such folder."""
    names = [entry.name for entry in os.scandir(folder)] if folder.is_dir() else []
    return sorted(name for name in names if name.lower().endswith(SUFFIXES) and name[0] != ".")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: expected a readable UTF-8 text file; found: {error}.") from error


def _lines(path: Path) -> list[str]:
    # Not splitlines(): transcripts in some languages hold other signs that it takes for the end of a line.
    return [line for line in _text(path).split("\n") if line.strip()]


def _csv(path: Path) -> pd.DataFrame:
    return pd.read_csv(io.StringIO(_text(path)), dtype=str, keep_default_na=False)


def _bar_rows(path: Path, form: str = "") -> list[list[str]]:
    """Rows of one width, divided by `|`: that of `form`, no quoting; else with csv quotes where plain reading fails."""
    lines = _lines(path)
    rows = [line.split("|") for line in lines]
    if not form and len({len(row) for row in rows}) > 1:
        rows = list(csv.reader((f"{line}\n" for line in lines), delimiter="|"))
    wrong = [number for number, row in enumerate(rows, 1) if len(row) != len(form.split("|") if form else rows[0])]
    if wrong or not rows:
        refuse(path, form or "rows of one width divided by `|`", f"{len(rows)} rows, other widths in {wrong[:3]}")
    return rows


def _from_key(key: pd.DataFrame, paths: list[str], splits: list[str]) -> list[Clip]:
    return [Clip(row.clip_id, path, row.label, row.label, row.speaker, split, row.attack, row.family,
                 condition=row.condition) for row, path, split in zip(key.itertuples(index=False), paths, splits)]


def _protocols(root: Path, home: Path, layout: dict[str, tuple[list[str], list[str]]]) -> Corpus:
    """Clips of every split that has a protocol and an audio folder (the first that exists of each list)."""
    clips, absent, widths = [], [], set()
    for split, (protocols, folders) in layout.items():
        protocol = next((path for pattern in protocols for path in sorted(home.glob(pattern))), None)
        folder = next((home / name for name in folders if (home / name).is_dir()), None)
        if protocol is None or folder is None:
            absent.append(f"{split} ({protocols[0] if protocol is None else folders[0]})")
            continue
        key, base = read_key(protocol), _relative(folder, root)
        widths.add(len(_lines(protocol)[0].split()))
        clips += _from_key(key, [f"{base}/{name}.flac" for name in key.clip_id], [SPLITS[split]] * len(key))
    if not clips:
        refuse(home, "protocol and audio folder of a split", f"no pair, missing {absent}", "Unpack them side by side.")
    return clips, f"protocols of {sorted(widths)} columns" + (f"; absent: {', '.join(absent)}" if absent else "")


def asvspoof2019_la(root: Path) -> Corpus:
    home = _find(root, "ASVspoof2019_LA_cm_protocols")[0].parent
    return _protocols(root, home, {
        split: ([f"ASVspoof2019_LA_cm_protocols/ASVspoof2019.LA.cm.{split}.tr?.txt"], [f"ASVspoof2019_LA_{split}/flac"])
        for split in ("train", "dev", "eval")})


def asvspoof5(root: Path) -> Corpus:
    home = _find(root, "flac_T", "flac_D", "flac_E_eval", "flac_E")[0].parent
    layout = {"train": (["train"], ["flac_T"]), "dev": (["dev.track_1", "dev"], ["flac_D"]),
              "eval": (["eval.track_1", "eval"], ["flac_E_eval", "flac_E"])}
    clips, release = _protocols(root, home, {
        split: ([f"{where}ASVspoof5.{stem}{ending}" for stem in stems for ending in (".tsv", ".metadata.txt")
                 for where in DEPTHS[:2]], folders) for split, (stems, folders) in layout.items()})
    return clips, release + (": the older challenge release" if "[6]" in release else "")


def asvspoof2021(root: Path, track: str) -> Corpus:
    """Audio in one or more parts; the key, a separate archive, up to three folders down beside it."""
    widths, stem = {"LA": (8,), "DF": (13, 8)}[track], f"ASVspoof2021_{track}_eval"
    parts = _find(root, f"{stem}*/flac", f"{stem}*/{stem}/flac")
    keys = [path for deeper in DEPTHS for path in root.glob(f"{deeper}CM/trial_metadata.txt")]
    keys = [path for path in keys if len(keys) == 1 or f"/{track}/" in path.as_posix()]
    if not keys:
        refuse(root, f"keys/{track}/CM/trial_metadata.txt", "none", "The key is a separate archive: unpack it as well.")
    key, width = read_key(keys[0]), len(_lines(keys[0])[0].split())
    if width not in widths or not key.clip_id.str.startswith(f"{track}_E_").all():
        refuse(keys[0], f"the {track} key of {' or '.join(map(str, widths))} columns with ids {track}_E_...",
               f"{width} columns and ids like {key.clip_id[0]}", f"Take that of the {track} track.")
    where = {Path(name).stem: _relative(part / name, root) for part in parts for name in audio_in(part)}
    if missing := [name for name in key.clip_id if name not in where]:
        refuse(root, f"audio of {len(key)} clips", f"{len(missing)} without audio: {missing[:3]}", "Unpack every part.")
    splits = ["test" if subset == "eval" else "" for subset in key.subset]
    stage = " (stage 1)" if (track, width) == ("DF", 8) else ""
    return _from_key(key, [where[name] for name in key.clip_id], splits), f"key of {width} columns{stage}"


def in_the_wild(root: Path) -> Corpus:
    tables = {meta: _csv(meta) for meta in _find(root, "meta.csv")}
    meta = next((meta for meta, table in tables.items() if {"file", "speaker", "label"} <= set(table)), None)
    if meta is None:
        refuse(root, "meta.csv with the columns file, speaker, label", [*map(list, tables.values())][:2],
               "This meta.csv belongs to another corpus, or was saved by a spreadsheet.")
    table, moved = tables[meta].replace({"label": {"bona-fide": "bonafide"}}), meta.parent / "wavs"
    if other := sorted({*table.label} - {"bonafide", "spoof"}):
        refuse(meta, "the labels bona-fide and spoof", other, "Download meta.csv again.")
    folder = _relative(moved if moved.is_dir() else meta.parent, root)
    clips = [Clip(Path(row.file).stem, f"{folder}/{row.file}".removeprefix("./"), row.label, row.label, row.speaker,
                  generator="unknown" if row.label == "spoof" else "") for row in table.itertuples(index=False)]
    return clips, f"wav files in {folder}"


def mlaad(root: Path) -> Corpus:
    folders = [path for fake in _find(root, "fake/") for path in sorted(fake.glob("*/*/"))]
    without = [_relative(folder, root) for folder in folders if not (folder / "meta.csv").is_file()]
    if without or not folders:
        refuse(root, "fake/LANGUAGE/MODEL/meta.csv", f"{len(folders)} models, {len(without)} without: {without[:3]}")
    clips = []
    for folder in folders:
        header, *rows = _bar_rows(folder / "meta.csv")
        if "path" not in header:
            refuse(folder / "meta.csv", "a column path, divided by `|`", header)
        for row in (dict(zip(header, values)) for values in rows):
            name, parent = Path(row["path"]).name, re.sub(r"^\./|\.\w+$", "", row.get("original_file", ""))
            clips.append(Clip(f"MLAAD/fake/{folder.parent.name}/{folder.name}/{Path(name).stem}",
                              _relative(folder / name, root), "spoof", "tts", "", "",
                              row.get("model_name") or folder.name, row.get("architecture", ""), parent,
                              row.get("transcript", "")))
    version = re.search(r"v\d+", "/".join(folders[0].parts[-5:-3]), flags=re.IGNORECASE)
    models, languages = {folder.name for folder in folders}, {folder.parent.name for folder in folders}
    return clips, f"{version[0] if version else 'version not stated'}: {len(models)} models, {len(languages)} languages"


def wavefake(root: Path) -> Corpus:
    speakers = {"ljspeech": "LJ", "jsut": "JSUT", "common_voices": ""}
    folders, clips = _find(root, *(f"{corpus}_*/" for corpus in speakers)), []
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


def fake_or_real(root: Path) -> Corpus:
    _find(root, "training/real")
    homes = [path.parents[1] for deeper in DEPTHS[:3] for path in sorted(root.glob(f"{deeper}training/real"))]
    if len(homes) > 1:
        refuse(root, "one variant", [_relative(home, root) for home in homes], "They hold the same speech: name one.")
    variant, clips = (re.findall(r"original|norm|2sec|rerec", homes[0].name) or ["unnamed"])[0], []
    for folder, split in {"training": "train", "validation": "validation", "testing": "test"}.items():
        for kind, facts in (("real", ("bonafide", "bonafide", "")), ("fake", ("spoof", "tts", "unknown"))):
            clips += [Clip(f"{folder}/{kind}/{name}", _relative(homes[0] / folder / kind / name, root), *facts[:2],
                           split=split, generator=facts[2]) for name in audio_in(homes[0] / folder / kind)]
    leak = "; rate, codec and duration differ by class: label leaks" if variant == "original" else ""
    return clips, f"for-{variant}{leak}"


def timit_tts(root: Path) -> Corpus:
    clips = []
    for kind in _find(root, "*/single_speaker", "*/multi_speaker"):
        multi = kind.name == "multi_speaker"
        for folder in sorted(kind.glob("*/*/" if multi else "*/")):
            inner = _relative(folder, kind.parent.parent)
            clips += [Clip(f"{inner}/{Path(name).stem}", _relative(folder / name, root), "spoof", "tts",
                           folder.name if multi else "", generator=folder.relative_to(kind).parts[0],
                           condition=kind.parent.name) for name in audio_in(folder)]
    return clips, "conditions " + ", ".join(sorted({clip.condition for clip in clips}))


def vidtimit(root: Path) -> Corpus:
    folders = _find(root, "*/audio")
    clips = [Clip(f"{folder.parent.name}/{Path(name).stem}", _relative(folder / name, root), speaker=folder.parent.name)
             for folder in folders for name in audio_in(folder)]
    return clips, f"{len(folders)} speakers"


def m_ailabs(root: Path) -> Corpus:
    clips = []
    for home in _find(root, "*/by_book", "by_book"):
        for book in sorted(home.rglob("metadata.csv")):
            inner = book.parent.relative_to(home)  # gender/speaker/book; mix/book, or less: no speaker
            speaker = inner.parts[1] if len(inner.parts) > 1 and inner.parts[0] != "mix" else ""
            base = (Path(home.parent.name) / "by_book" / inner / "wavs").as_posix()
            clips += [Clip(f"{base}/{name}", f"{_relative(book.parent, root)}/wavs/{name}.wav", speaker=speaker,
                           text=read or written) for name, written, read in _bar_rows(book, TRANSCRIPT)]
    return clips, "languages " + ", ".join(sorted({clip.clip_id.split("/")[0] for clip in clips}))


def ljspeech(root: Path) -> Corpus:
    wavs = _find(root, "wavs/")[0]
    return [Clip(name, f"{_relative(wavs, root)}/{name}.wav", speaker="LJ", text=read or written)
            for name, written, read in _bar_rows(wavs.parent / "metadata.csv", TRANSCRIPT)], "1.1"


def librispeech(root: Path) -> Corpus:
    clips, subsets = [], _find(root, "train-*/", "dev-*/", "test-*/")
    for chapter in (folder for subset in subsets for folder in sorted(subset.glob("*/*/"))):
        speaker, split = chapter.parent.name, SPLITS[chapter.parents[1].name.split("-")[0]]
        texts = dict.fromkeys(Path(name).stem for name in audio_in(chapter))  # some copies come without transcripts
        for transcript in chapter.glob("*.trans.txt"):
            texts |= {name: text for name, _, text in (line.partition(" ") for line in _lines(transcript))}
        clips += [Clip(name, f"{_relative(chapter, root)}/{name}.flac", speaker=speaker, text=text or "", split=split)
                  for name, text in sorted(texts.items())]
    return clips, ", ".join(subset.name for subset in subsets)


def vctk(root: Path) -> Corpus:
    home, clips = _find(root, "wav48_silence_trimmed", "wav48")[0], []
    for folder in sorted(home.glob("*/")):
        # Sorted the other way round, mic1 comes after mic2 and is kept.
        chosen = {re.sub(r"_mic[12]$", "", Path(name).stem): name for name in reversed(audio_in(folder))}
        for clip, name in sorted(chosen.items()):
            text = home.parent / "txt" / folder.name / f"{clip}.txt"  # p315 has none
            clips.append(Clip(clip, _relative(folder / name, root), speaker=folder.name,
                              text=" ".join(_lines(text)) if text.is_file() else "",
                              condition="mic2" if "_mic2." in name else ""))
    return clips, "0.80" if home.name == "wav48" else "0.92, first microphone"


def csv_manifest(root: Path) -> Corpus:
    metas = [root] if root.is_file() else sorted(root.glob("*.csv"))
    if len(metas) != 1:
        refuse(root, "one CSV file", [meta.name for meta in metas], "Name the file itself.")
    table = _csv(metas[0])
    labels, release = {*table.get("label", ["none"])}, f"columns {', '.join(table)}"
    if "path" not in table or not labels <= {"bonafide", "spoof"}:
        refuse(metas[0], "the columns path and label, the labels bonafide or spoof",
               f"{release} and labels {sorted(labels)[:4]}", "Rename them.")
    table["path"] = table.path.str.replace("\\", "/").str.removeprefix("./")
    defaults = {"clip_id": table.path.str.replace(r"\.\w+$", "", regex=True), "role": table.label}
    table = table.assign(**{**defaults, **table}).reindex(columns=list(Clip._fields), fill_value="")
    return [Clip(*row) for row in table.itertuples(index=False, name=None)], release
