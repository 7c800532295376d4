"""Public corpora by name: where the user gets each one, and one manifest form for all of them.

    load_dataset("asvspoof2019_la", folder)               a table of clips, from protocols and folder listings
    load_dataset("in_the_wild", folder, check=True)       the same, after opening the header of every file
    download_dataset("librispeech", folder, "dev-clean")  for the three corpora that may be fetched freely
"""
from __future__ import annotations

import fnmatch
import math
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from lib.data import layouts
from lib.data.layouts import Clip, DatasetError, audio_in, refuse

COLUMNS = {  # of a manifest, with what each one says
    "clip_id": "unique in its corpus, as the corpus itself spells it",
    "path": "relative to the folder that was named, with forward slashes",
    "corpus": "name in DATASETS", "speaker": "as the corpus spells it, '' where it does not say",
    "split": "train, validation, test, or '' where the corpus has none",
    "role": "bonafide, tts, copysynth, or spoof where the kind is mixed or unknown",
    "label": "bonafide or spoof", "generator": "attack or model, '' for bona fide",
    "family": "kind of generator, '' where the corpus does not say",
    "parent": "clip_id of the real recording it was made from, or whose words it speaks; else ''",
    "seconds": "NaN before check=True", "rate_hz": "0 before check=True", "licence": "of the corpus",
    "text": "transcript or ''", "condition": "codec, channel or variant, '' for none"}
ROLES, SPLITS = {"bonafide", "tts", "copysynth", "spoof"}, {"train", "validation", "test", ""}


class DatasetWarning(UserWarning):
    """Something about a corpus that its user should know but that does not stop the loading."""


@dataclass(frozen=True)
class DatasetLayout:
    """What is known of a corpus before its folder is opened."""

    name: str
    title: str
    licence: str
    source: str  # where the user gets it
    loader: Callable[[Path], layouts.Found] = field(repr=False)
    clips: dict[str, int] = field(default_factory=dict)  # published number of clips a split
    caution: str = ""  # what goes wrong when it is used carelessly
    skipped: str = ""  # files left out on purpose, as a file name pattern
    downloader: str = ""  # class in torchaudio.datasets


_SUBSETS = "Only the subset `eval` has the split test; progress and hidden trials have none."
_KEYS_2021 = "and its key from https://www.asvspoof.org/index2021.html"
_ALL = [
    DatasetLayout(
        "asvspoof2019_la", "ASVspoof 2019 logical access", "ODC-By 1.0",
        "https://datashare.ed.ac.uk/handle/10283/3336 (LA.zip)", layouts.asvspoof2019_la,
        {"train": 25_380, "validation": 24_844, "test": 71_237},
        "Its bona fide speech comes from VCTK: training on VCTK leaks speakers and rooms."),
    DatasetLayout(
        "asvspoof2021_la", "ASVspoof 2021 logical access, evaluation", "ODC-By 1.0",
        f"https://zenodo.org/records/4837263, {_KEYS_2021}", layouts.asvspoof2021_la, {}, _SUBSETS),
    DatasetLayout(
        "asvspoof2021_df", "ASVspoof 2021 deepfake, evaluation", "ODC-By 1.0",
        f"https://zenodo.org/records/4835108, {_KEYS_2021}", layouts.asvspoof2021_df, {}, _SUBSETS),
    DatasetLayout(
        "asvspoof5", "ASVspoof 5, track 1", "ODC-By 1.0; bona fide speech CC BY 4.0 (MLS)",
        "https://zenodo.org/records/14498691", layouts.asvspoof5,
        {"train": 182_357, "validation": 140_950, "test": 680_774}),
    DatasetLayout(
        "in_the_wild", "In-the-Wild", "see its page; the recordings belong to others",
        "https://deepfake-total.com/in_the_wild", layouts.in_the_wild, {"": 31_779},
        "Real and fake differ in source, channel and loudness: audit trivial scores first."),
    DatasetLayout(
        "mlaad", "MLAAD, the multi-language audio anti-spoofing set", "CC BY-NC 4.0",
        "https://deepfake-total.com/mlaad", layouts.mlaad, {},
        "Spoof only; its bona fide is m_ailabs. It grows: quote the version in attrs['release']."),
    DatasetLayout(
        "m_ailabs", "M-AILABS speech, the bona fide side of MLAAD", "BSD-like, see its licence file",
        "https://github.com/imdatceleste/m-ailabs-dataset", layouts.m_ailabs),
    DatasetLayout(
        "wavefake", "WaveFake", "CC BY-SA 4.0", "https://zenodo.org/records/5642694", layouts.wavefake, {},
        "Spoof only; its bona fide are ljspeech (parents by id) and JSUT."),
    DatasetLayout(
        "fake_or_real", "Fake-or-Real (FoR), one of its four variants", "not stated: ask its authors",
        "https://bil.eecs.yorku.ca/datasets/", layouts.fake_or_real, {},
        "Classes differ in rate, codec and duration, most of all in for-original."),
    DatasetLayout(
        "timit_tts", "TIMIT-TTS", "CC BY 4.0", "https://zenodo.org/records/6560159", layouts.timit_tts, {},
        "Spoof only; its bona fide, vidtimit, has 32 kHz: bandwidth leaks the label."),
    DatasetLayout(
        "vidtimit", "VidTIMIT audio, the bona fide side of TIMIT-TTS", "research only, see its page",
        "https://conradsanderson.id.au/vidtimit/", layouts.vidtimit),
    DatasetLayout(
        "ljspeech", "LJSpeech 1.1", "public domain", "https://keithito.com/LJ-Speech-Dataset/",
        layouts.ljspeech, {"": 13_100}, "One speaker.", downloader="LJSPEECH"),
    DatasetLayout(
        "librispeech", "LibriSpeech", "CC BY 4.0", "https://www.openslr.org/12", layouts.librispeech, {},
        "Made from MP3: its codec history differs from studio corpora.", downloader="LIBRISPEECH"),
    DatasetLayout(
        "vctk", "VCTK 0.92 or 0.80", "CC BY 4.0 (0.92), ODC-By (0.80)",
        "https://datashare.ed.ac.uk/handle/10283/3443", layouts.vctk, {},
        "The bona fide source of ASVspoof 2019 and 2021: never train on it to test there.",
        skipped="*_mic2.flac", downloader="VCTK_092"),
    DatasetLayout(
        "csv", "your own CSV", "as you state it", "yourself: a CSV with the columns path, label and, if "
        f"known, {', '.join(name for name in Clip._fields if name not in ('path', 'label'))}",
        layouts.csv_manifest),
]
DATASETS: dict[str, DatasetLayout] = {layout.name: layout for layout in _ALL}


def _layout(name: str) -> DatasetLayout:
    if name not in DATASETS:
        raise DatasetError(f"expected a data set among {', '.join(DATASETS)}; found {name!r}.")
    return DATASETS[name]


def load_dataset(name: str, root: str | os.PathLike, check: bool = False) -> pd.DataFrame:
    """The manifest of a corpus: the columns of `COLUMNS`, one row a clip, in the order of the corpus.

    `root` is the folder the corpus was unpacked into (for csv also the file). `check` opens the header of
    every file: fills seconds and rate_hz, raises one DatasetError with all missing, unreadable, empty files,
    warns of audio no row names and of other counts than published. `attrs`: root, release, caution.
    Raises DatasetError on a wrong folder, a release that is not understood, duplicate ids.
    """
    layout, root = _layout(name), Path(root).expanduser().resolve()
    by_hand = f"Get it from {layout.source} (licence: {layout.licence}) and name its folder."
    if not root.exists() or (root.is_file() and name != "csv"):
        refuse(root, f"a folder with {layout.title}", "a file" if root.exists() else "nothing", by_hand)
    clips, release = layout.loader(root)
    root = root.parent if root.is_file() else root
    if not clips:
        refuse(root, f"clips of {layout.title}", f"folders without clips ({release})", by_hand)
    table = pd.DataFrame(clips, columns=Clip._fields)
    table = table.assign(corpus=name, seconds=math.nan, rate_hz=0, licence=layout.licence)[list(COLUMNS)]
    _validate(table, root)
    if check:
        _check_files(table, root, layout)
    table.attrs = {"root": str(root), "release": release, "caution": layout.caution}
    return table


def _validate(table: pd.DataFrame, root: Path) -> None:
    ids, paths = table["clip_id"], table["path"]
    twice = ids[ids.duplicated() | (ids == "")].unique().tolist()
    if twice:
        refuse(root, "unique ids", f"{len(twice)} repeated or empty: {twice[:3]}",
               "Remove the second copy of the corpus, or repair its protocol.")
    outside = paths[paths.str.contains(r"(?:^|/)\.\.(?:/|$)|^/|^[A-Za-z]:|\\")].tolist()
    if outside:
        refuse(root, "paths below it with forward slashes", outside[:3], "Move the audio below that folder.")
    for column, allowed in (("role", ROLES), ("split", SPLITS)):
        other = sorted({*table[column]} - allowed)
        if other:
            refuse(root, f"{column} among {sorted(allowed)}", other[:5], "Rename them.")
    mixed = (table["label"] == "bonafide") != (table["role"] == "bonafide")
    if mixed.any():
        refuse(root, "the role bonafide with the label bonafide and no other", ids[mixed].tolist()[:3],
               "Make the two columns agree.")


def _check_files(table: pd.DataFrame, root: Path, layout: DatasetLayout) -> None:
    """Fill seconds and rate_hz from the headers; all problems in one error, all surprises in one warning."""
    import soundfile

    def header(path: str) -> tuple[float, int, str]:
        try:
            info = soundfile.info(str(root / path))
        except (soundfile.LibsndfileError, OSError) as error:
            return math.nan, 0, f"{path}: {f'unreadable: {error}' if (root / path).exists() else 'missing'}"
        return info.duration, info.samplerate, "" if info.frames > 0 else f"{path}: no samples"

    with ThreadPoolExecutor(8) as pool:
        seconds, rates, problems = zip(*pool.map(header, table["path"]), strict=True)
    problems = [problem for problem in problems if problem]
    if problems:
        listed = "\n  ".join(["", *problems[:20], *(["..."] if len(problems) > 20 else [])])
        refuse(root, f"{len(table)} readable audio files", f"{len(problems)} problems:{listed}\n",
               f"Unpack {layout.title} again; it comes from {layout.source}.")
    table["seconds"], table["rate_hz"] = np.asarray(seconds), np.asarray(rates)
    named, notes = {*table["path"]}, []
    folders = sorted({path.rpartition("/")[0] for path in named})
    present = (f"{folder}/{name}".lstrip("/") for folder in folders for name in audio_in(root / folder))
    extra = [path for path in present if path not in named and not fnmatch.fnmatch(path, layout.skipped)]
    if extra:
        notes.append(f"{len(extra)} audio files that no row names, such as {extra[:3]}")
    counts = table["split"].value_counts()
    notes += [f"{counts[split]} clips of split {split!r} where {published} are published"
              for split, published in layout.clips.items() if counts.get(split, published) != published]
    if notes:
        warnings.warn(f"{layout.title} in {root}: {'; '.join(notes)}.", DatasetWarning, stacklevel=3)


def download_dataset(name: str, root: str | os.PathLike, part: str = "train-clean-100") -> Path:
    """Fetch LJSpeech (2.6 GB), VCTK 0.92 (11 GB) or a part of LibriSpeech; return its folder.

    Through torchaudio. `part` is for LibriSpeech alone (dev-clean 0.3 GB, train-clean-100 6 GB). Any other
    corpus, and any failure, raises a DatasetError that says where to get it by hand, under which licence.
    """
    layout, root = _layout(name), Path(root).expanduser().resolve()
    by_hand = f"Get it by hand from {layout.source} (licence: {layout.licence}), unpack it, name its folder."
    if not layout.downloader:
        raise DatasetError(f"{layout.title} is not fetched from here: accept its terms yourself. {by_hand}")
    options = {"url": part} if name == "librispeech" else {}
    try:
        import torchaudio
        root.mkdir(parents=True, exist_ok=True)
        getattr(torchaudio.datasets, layout.downloader)(str(root), download=True, **options)
    except (OSError, RuntimeError, ValueError, ImportError, AttributeError) as error:  # URLError: an OSError
        raise DatasetError(f"{root}: expected to fetch {layout.title} with torchaudio.datasets."
                           f"{layout.downloader} {options or ''}; found {type(error).__name__}: {error}. "
                           f"{by_hand}") from error
    return root / {"ljspeech": "LJSpeech-1.1", "librispeech": "LibriSpeech", "vctk": "VCTK-Corpus-0.92"}[name]
