"""Owns the public corpora by name, one manifest form for all of them, and which corpus plays which part of the study.

A part is written NAME:FOLDER or NAME@SPLIT:FOLDER, several are joined by plus signs, `embedded` needs no folder:

    data.train=librispeech@train:/d/LibriSpeech  data.test=asvspoof2019_la:/d/LA+in_the_wild:/d/itw

Without @SPLIT a corpus gives its own split of the part's name, or all where it has none. The voices of a corpus that
several parts claim are divided; of few voices, training and validation share out the clips, never with test. Without
data.validation the training corpora give that too. Fakes of the test and single corpora are test clips.
"""

from __future__ import annotations

import fnmatch
import os
import re
import warnings
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from lib.data import layouts
from lib.data.audio import AudioError, header
from lib.data.layouts import Clip, DatasetError, audio_in, refuse
from lib.data.packages import Source, download, embedded_manifest, embedded_sources
from lib.data.scorefiles import ScoreFileError
from lib.paths import DATA, digest_of
from lib.settings import Data

COLUMNS = ["clip_id", "path", "corpus", "speaker", "split", "role", "label", "generator", "family", "parent", "seconds",
           "rate_hz", "licence", "text", "condition"]
"""Of a manifest. clip_id: unique, as the corpus spells it; path: below the folder that was named; split: of PARTS, or
none; role: of ROLES, spoof where the kind is mixed or unknown; parent: clip_id of the recording that a fake was made
from; seconds, rate_hz: NaN and 0 before the check; condition: codec, channel or variant."""
ROLES, PARTS = {"bonafide", "tts", "copysynth", "spoof"}, ("train", "validation", "test")
CYCLE = ("train", "train", "train", "validation", "test")  # how voices are dealt out where a corpus plays several parts
FEW_VOICES, MOST_READERS = 5, 40  # of a part of the study, of data.more
UNNAMED = "unnamed"  # the voice of corpora that name no speakers
Role = namedtuple("Role", "corpus folder split")  # texts; embedded has no folder
# Corpora, and others whose bona fide speech was taken from them.
SAME_VOICES = [("vctk", "asvspoof2019_la"), ("vctk", "asvspoof2021_la"), ("vctk", "asvspoof2021_df")]


class DatasetLayout(NamedTuple):
    """What is known of a corpus before its folder is opened."""

    name: str
    title: str
    licence: str
    source: str  # where the user gets it
    loader: Callable[[Path], layouts.Corpus]
    caution: str = ""  # what goes wrong when it is used carelessly
    clips: dict[str, int] = {}  # published number of clips a split
    skipped: str = ""  # files left out on purpose, as a file name pattern
    downloader: str = ""  # class in torchaudio.datasets
    folder: str = ""  # that it unpacks to


_KEY = "and its key from https://www.asvspoof.org/index2021.html"
_SUBSETS = "Only the subset `eval` has the split test; progress and hidden trials have none."
_OWN = ", ".join(name for name in Clip._fields if name not in ("path", "label"))
_ALL = [
    DatasetLayout("asvspoof2019_la", "ASVspoof 2019 logical access", "ODC-By 1.0",
                  "https://datashare.ed.ac.uk/handle/10283/3336 (LA.zip)", layouts.asvspoof2019_la,
                  "Its bona fide speech comes from VCTK: training on VCTK leaks speakers and rooms.",
                  {"train": 25_380, "validation": 24_844, "test": 71_237}),
    DatasetLayout("asvspoof2021_la", "ASVspoof 2021 logical access, evaluation", "ODC-By 1.0",
                  f"https://zenodo.org/records/4837263, {_KEY}", partial(layouts.asvspoof2021, track="LA"), _SUBSETS),
    DatasetLayout("asvspoof2021_df", "ASVspoof 2021 deepfake, evaluation", "ODC-By 1.0",
                  f"https://zenodo.org/records/4835108, {_KEY}", partial(layouts.asvspoof2021, track="DF"), _SUBSETS),
    DatasetLayout("asvspoof5", "ASVspoof 5, track 1", "ODC-By 1.0; bona fide speech CC BY 4.0 (MLS)",
                  "https://zenodo.org/records/14498691", layouts.asvspoof5,
                  clips={"train": 182_357, "validation": 140_950, "test": 680_774}),
    DatasetLayout("in_the_wild", "In-the-Wild", "see its page; the recordings belong to others",
                  "https://deepfake-total.com/in_the_wild", layouts.in_the_wild,
                  "Real and fake differ in source, channel and loudness: audit trivial scores first.", {"": 31_779}),
    DatasetLayout("mlaad", "MLAAD, the multi-language audio anti-spoofing set", "CC BY-NC 4.0",
                  "https://deepfake-total.com/mlaad", layouts.mlaad,
                  "Spoof only; its bona fide is m_ailabs. It grows: quote the version in attrs['release']."),
    DatasetLayout("m_ailabs", "M-AILABS speech, the bona fide side of MLAAD", "BSD-like, see its licence file",
                  "https://github.com/imdatceleste/m-ailabs-dataset", layouts.m_ailabs),
    DatasetLayout("wavefake", "WaveFake", "CC BY-SA 4.0", "https://zenodo.org/records/5642694", layouts.wavefake,
                  "Spoof only; its bona fide are ljspeech (parents by id) and JSUT."),
    DatasetLayout("fake_or_real", "Fake-or-Real (FoR), one of its four variants", "not stated: ask its authors",
                  "https://bil.eecs.yorku.ca/datasets/", layouts.fake_or_real,
                  "Classes differ in rate, codec and duration, most of all in for-original."),
    DatasetLayout("timit_tts", "TIMIT-TTS", "CC BY 4.0", "https://zenodo.org/records/6560159", layouts.timit_tts,
                  "Spoof only; its bona fide, vidtimit, has 32 kHz: bandwidth leaks the label."),
    DatasetLayout("vidtimit", "VidTIMIT audio, the bona fide side of TIMIT-TTS", "research only, see its page",
                  "https://conradsanderson.id.au/vidtimit/", layouts.vidtimit),
    DatasetLayout("ljspeech", "LJSpeech 1.1", "public domain", "https://keithito.com/LJ-Speech-Dataset/",
                  layouts.ljspeech, "One speaker.", {"": 13_100}, downloader="LJSPEECH", folder="LJSpeech-1.1"),
    DatasetLayout("librispeech", "LibriSpeech", "CC BY 4.0", "https://www.openslr.org/12", layouts.librispeech,
                  "Made from MP3: its codec history differs from studio corpora.", downloader="LIBRISPEECH",
                  folder="LibriSpeech"),
    DatasetLayout("vctk", "VCTK 0.92 or 0.80", "CC BY 4.0 (0.92), ODC-By (0.80)",
                  "https://datashare.ed.ac.uk/handle/10283/3443", layouts.vctk,
                  "The bona fide source of ASVspoof 2019 and 2021: never train on it to test there.",
                  skipped="*_mic2.flac", downloader="VCTK_092", folder="VCTK-Corpus-0.92"),
    DatasetLayout("csv", "your own CSV", "as you state it",
                  f"yourself: a CSV with the columns path, label and, if known, {_OWN}", layouts.csv_manifest),
]
DATASETS: dict[str, DatasetLayout] = {layout.name: layout for layout in _ALL}


def _layout(name: str) -> tuple[DatasetLayout, str]:
    if name not in DATASETS:
        raise DatasetError(f"expected a data set among {', '.join(DATASETS)}; found {name!r}.")
    layout = DATASETS[name]
    return layout, f"Get it from {layout.source} (licence: {layout.licence}), unpack it and name its folder."


def load_dataset(name: str, root: str | os.PathLike, check: bool = False) -> pd.DataFrame:
    """The manifest of a corpus: `COLUMNS`, in the order of the corpus; `attrs`: root, release, caution.

    `root` is the folder the corpus was unpacked into (for csv also the file). `check` opens the header of every file:
    fills seconds and rate_hz, raises one DatasetError with all that are missing or unreadable, warns of further audio
    and of other counts than published. Raises DatasetError for a wrong folder, release or id."""
    (layout, by_hand), root = _layout(name), Path(root).expanduser().resolve()
    if not root.exists() or (root.is_file() and name != "csv"):
        refuse(root, f"a folder with {layout.title}", "a file" if root.exists() else "nothing", by_hand)
    try:
        clips, release = layout.loader(root)
    except (ScoreFileError, pd.errors.ParserError) as error:
        raise DatasetError(f"{root}: {error}") from error
    root = root.parent if root.is_file() else root
    if not clips:
        refuse(root, f"clips of {layout.title}", f"folders without clips ({release})", by_hand)
    table = pd.DataFrame(clips, columns=Clip._fields)
    table = table.assign(corpus=name, seconds=np.nan, rate_hz=0, licence=layout.licence)[COLUMNS]
    _validate(table, root)
    if check:
        _check_files(table, root, layout)
    table.attrs = {"root": str(root), "release": release, "caution": layout.caution}
    return table


def _validate(table: pd.DataFrame, root: Path) -> None:
    ids = table.clip_id
    if twice := ids[ids.duplicated() | (ids == "")].unique().tolist():
        refuse(root, "unique ids", f"{len(twice)} repeated or empty: {twice[:3]}",
               "Remove the second copy of the corpus, or repair its protocol.")
    if outside := table.path[table.path.str.contains(r"(?:^|/)\.\.(?:/|$)|^/|^[A-Za-z]:|\\")].tolist():
        refuse(root, "paths below it with forward slashes", outside[:3], "Move the audio below that folder.")
    for column, allowed in (("role", ROLES), ("split", {*PARTS, ""})):
        if other := sorted({*table[column]} - allowed):
            refuse(root, f"{column} among {sorted(allowed)}", other[:5], "Rename them.")
    mixed = (table.label == "bonafide") != (table.role == "bonafide")
    if mixed.any():
        refuse(root, "the role bonafide with that label and no other", ids[mixed].tolist()[:3], "Make the two agree.")


def _check_files(table: pd.DataFrame, root: Path, layout: DatasetLayout) -> None:
    """Fill seconds and rate_hz from the headers; all problems in one error, all surprises in one warning."""

    def opened(path: str) -> tuple[float, int, str]:
        try:
            return *header(root / path), ""
        except AudioError as error:
            reason = "unreadable: " + str(error).partition("found ")[2] if (root / path).exists() else "missing"
            return np.nan, 0, f"{path}: {reason}"

    with ThreadPoolExecutor(8) as pool:
        table["seconds"], table["rate_hz"], problems = zip(*pool.map(opened, table.path), strict=True)
    if problems := [problem for problem in problems if problem]:
        listed = "\n  ".join(["", *problems[:20], *(["..."] if len(problems) > 20 else [])])
        refuse(root, f"{len(table)} readable audio files", f"{len(problems)} problems:{listed}\n",
               f"Unpack {layout.title} again; it comes from {layout.source}.")
    named, counts = {*table.path}, table.split.value_counts()
    present = (f"{folder}/{name}".lstrip("/") for folder in sorted({path.rpartition("/")[0] for path in named})
               for name in audio_in(root / folder))
    extra = [path for path in present if path not in named and not fnmatch.fnmatch(path, layout.skipped)]
    notes = [f"{len(extra)} audio files that no row names, such as {extra[:3]}"] * bool(extra)
    notes += [f"{counts[split]} clips of split {split!r} where {published} are published"
              for split, published in layout.clips.items() if counts.get(split, published) != published]
    if notes:
        warnings.warn(f"{layout.title} in {root}: {'; '.join(notes)}.", stacklevel=3)


def download_dataset(name: str, root: str | os.PathLike, part: str = "train-clean-100") -> Path:
    """Fetch LJSpeech (2.6 GB), VCTK 0.92 (11 GB) or a part of LibriSpeech (dev-clean 0.3 GB, train-clean-100 6 GB);
    return its folder. Raises DatasetError that says where to get it by hand, under which licence."""
    (layout, by_hand), root = _layout(name), Path(root).expanduser().resolve()
    try:
        download(layout.downloader, root, **({"url": part} if name == "librispeech" else {}))
    except (OSError, RuntimeError, ValueError, ImportError, AttributeError) as error:  # URLError: an OSError
        raise DatasetError(f"{layout.title} was not fetched: {type(error).__name__}: {error}. {by_hand}") from error
    return root / layout.folder


def roles_of(texts: tuple[str, ...]) -> list[Role]:
    """`("ljspeech:/data/LJ", "embedded")` as roles; names may leave out underscores. Raises DatasetError."""
    plain = {known.replace("_", ""): known for known in (*DATASETS, "embedded")}
    roles = []
    for text in texts:
        name, _, folder = text.partition(":")
        name, _, split = name.partition("@")
        corpus = plain.get(re.sub(r"\W|_", "", name).lower())
        if not corpus or bool(folder) == (corpus == "embedded") or split not in ("", *PARTS):
            raise DatasetError("expected NAME:FOLDER or NAME@SPLIT:FOLDER, joined by plus signs, with a NAME among "
                               f"{', '.join(plain.values())} (embedded takes no folder), a SPLIT among "
                               f"{', '.join(PARTS)}; found {text!r}. A folder with a plus in its name needs a link")
        roles.append(Role(corpus, folder, split))
    return roles


def _manifest(role: Role, part: str) -> pd.DataFrame:
    """What a role's corpus gives to a part: a manifest with absolute paths, and `voice`, unlike that of any other."""
    if role.corpus == "embedded":
        table = embedded_manifest()
    else:
        table = load_dataset(role.corpus, role.folder)
        table = table.assign(path=[Path(table.attrs["root"]) / path for path in table.path],
                             voice=f"{role.corpus}-" + table.speaker.replace("", UNNAMED))
    rows = table[table.split == (role.split or part)]
    if role.split and rows.empty:
        raise DatasetError(f"{role.corpus} in {role.folder} has no split {role.split!r}, only "
                           f"{sorted(set(table.split))}; leave out @SPLIT to take everything")
    return table if rows.empty else rows


def _divided(parts: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """The same tables after clips that several parts claim are dealt out by voice, or by clip where voices are few."""
    everything = pd.concat([table.assign(part=part) for part, table in parts.items()], ignore_index=True)
    claims = everything.groupby(["corpus", "clip_id"]).part.agg(lambda names: tuple(sorted(set(names))))
    for (corpus, claimed), keys in claims[claims.map(len) > 1].reset_index().groupby(["corpus", "part"]):
        rows = everything[(everything.corpus == corpus) & everything.clip_id.isin(keys.clip_id)]
        voices = rows.voice.nunique()
        if voices < FEW_VOICES and "test" in claimed:
            raise DatasetError(f"{corpus} with {voices} voices was given to {' and '.join(claimed)}: no test voice may "
                               "be fitted on. Give it to data.single, or to test alone")
        unit = "voice" if voices >= FEW_VOICES else "clip_id"
        cycle = [part for part in CYCLE if part in claimed]
        order = sorted(set(rows[unit]), key=lambda name: digest_of([corpus, name], 16))
        dealt = {name: cycle[index % len(cycle)] for index, name in enumerate(order)}
        everything = everything.drop(rows.index[rows[unit].map(dealt) != rows.part])
    return {part: everything[everything.part == part].drop(columns="part") for part in parts}


def _sources(table: pd.DataFrame, part: str) -> list[Source]:
    return [Source(Path(row.path), row.corpus, row.voice, part, row.licence, row.text, row.clip_id)
            for row in table.itertuples()]


def _further(data: Data) -> list[Source]:
    """Bona fide recordings of at most MOST_READERS readers of the corpora `data.more`, chosen by a hash."""
    tables = [_manifest(role, "test").query("label == 'bonafide'") for role in roles_of(data.more)]
    voices = sorted({name for table in tables for name in table.voice}, key=lambda name: digest_of(name, 16))
    return sum((_sources(table[table.voice.isin(voices[:MOST_READERS])], "test") for table in tables), [])


def cast_of(data: Data) -> tuple[list[Source], str, pd.DataFrame | None]:
    """Bona fide recordings with their split, the voice of the single-speaker experiment, and the corpora's fakes: a
    manifest as of `_manifest`, with `part`: test or single (None with the embedded corpora). Raises DatasetError where
    a part is missing, does not fit or would leak, CorpusError without the embedded corpora."""
    named = {part: getattr(data, part) for part in (*PARTS, "single")}
    if not any(named.values()):
        if data.corpus == "embedded":
            return embedded_sources(data.hold_out) + _further(data), "festvox-ru", None
        home = DATA / "librispeech"  # one corpus in every part
        if not any(home.rglob("*.flac")):
            download_dataset("librispeech", home, "dev-clean")
        named = dict.fromkeys(named, (f"librispeech:{home}",))
    if not named["train"] or not named["test"]:
        raise DatasetError("expected data.train and data.test at least, such as data.train=ljspeech:/d/LJSpeech-1.1 "
                           f"data.test=asvspoof2019_la:/d/LA; found train {data.train}, test {data.test}")
    named["validation"] = named["validation"] or named["train"]
    roles = {part: roles_of(texts) for part, texts in named.items()}
    corpora = {part: {role.corpus for role in each} for part, each in roles.items()}
    for source, copy in SAME_VOICES:
        if source in corpora["train"] | corpora["validation"] and copy in corpora["test"]:
            raise DatasetError(f"the bona fide speech of {copy} was taken from {source}: training on one and testing "
                               "on the other leaks voices and rooms. Choose another corpus for one of the two")
    tables = {part: pd.concat([_manifest(role, part) for role in each]) for part, each in roles.items() if each}
    real = {part: table[table.label == "bonafide"] for part, table in tables.items()}
    if empty := [part for part, table in real.items() if table.empty]:
        raise DatasetError(f"no bona fide clips for {' and '.join(empty)}: {', '.join(named[empty[0]])} holds fakes "
                           "only. Add the corpus with its real speech, see `python -m lib data --list`")
    split = _divided({part: real[part] for part in PARTS})
    single = real.get("single", split["test"])
    voices = single.voice[single.speaker != ""].value_counts()
    if voices.empty:
        raise DatasetError(f"the corpora of data.{'single' if 'single' in real else 'test'} name no speakers, as the "
                           "single-speaker experiment needs: name one in data.single, such as ljspeech:/data/LJ")
    voice = voices.index[0]
    others = {part: table[table.voice != voice] for part, table in split.items()}
    if "single" in real:  # its voice is no voice of any other part, and its test clips count in both experiments
        split = others | {"test": pd.concat([others["test"], single[single.voice == voice]])}
    if missing := [part for part in PARTS if (split if part == "test" else others)[part].empty]:
        raise DatasetError(f"nothing is left for {' and '.join(missing)} without the voice of the single-speaker "
                           f"experiment, {voice}; name another corpus in data.single or in that part")
    sources = sum((_sources(split[part], part) for part in PARTS), _further(data))
    fakes = pd.concat([tables[part].assign(part=part) for part in ("test", "single") if part in tables])
    return sources, voice, fakes[fakes.label == "spoof"].drop_duplicates(["corpus", "clip_id"]).reset_index(drop=True)
