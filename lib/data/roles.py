"""Owns which corpus plays which role: any corpus of lib.data.public can be training, validation, test or the one speaker.

A role is written `NAME:FOLDER` or `NAME@SPLIT:FOLDER`, several are joined by plus signs, and `embedded` needs no folder:

    data.train=librispeech@train:/data/LibriSpeech    data.test=asvspoof2019_la:/data/LA+in_the_wild:/data/itw
    data.single=ljspeech:/data/LJSpeech-1.1+wavefake:/data/WaveFake

Without `@SPLIT` a corpus gives its own split of the role's name, or everything where it has no such split. Where one corpus
is given to several roles without having splits, its voices are divided; of a corpus with few voices, training and validation
share out the clips, but never with test. Without data.validation the training corpora give that too. Only bona fide clips are
fitted on; fakes of the test and single corpora are test clips.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from lib.data.packages import Source, embedded_sources
from lib.data.public import DATASETS, download_dataset, load_dataset
from lib.paths import DATA, digest_of
from lib.settings import Data

PARTS = ("train", "validation", "test")
CYCLE = ("train", "train", "train", "validation", "test")  # how voices are dealt out where a corpus plays several roles
FEW_VOICES = 5
UNNAMED = "unnamed"  # the voice of corpora that name no speakers; its limit is that of UNNAMED_VOICES voices
UNNAMED_VOICES = 20
SAME_VOICES = [("vctk", "asvspoof2019_la"), ("vctk", "asvspoof2021_la"), ("vctk", "asvspoof2021_df")]
"""Corpora whose bona fide speech was taken from another one."""


class RoleError(ValueError):
    """A role cannot be played: what was written, what is there, what to write instead."""


@dataclass(frozen=True)
class Role:
    corpus: str
    folder: str = ""  # none for embedded
    split: str = ""


@dataclass(frozen=True)
class Cast:
    """Who plays what: bona fide recordings with their split, the voice of the single-speaker experiment, and fakes."""

    sources: list[Source]
    voice: str
    fakes: pd.DataFrame  # a manifest (lib.data.public.COLUMNS, paths absolute) with `part`: test or single


def roles_of(texts: tuple[str, ...]) -> list[Role]:
    """`("ljspeech:/data/LJ", "embedded")` as roles; names may leave out underscores. Raises RoleError."""
    found = []
    for text in texts:
        name, _, folder = text.partition(":")
        name, _, split = name.partition("@")
        plain = {re.sub(r"\W|_", "", known).lower(): known for known in (*DATASETS, "embedded")}
        corpus = plain.get(re.sub(r"\W|_", "", name).lower())
        if not corpus or bool(folder) == (corpus == "embedded") or split not in ("", *PARTS):
            raise RoleError(f"expected NAME:FOLDER or NAME@SPLIT:FOLDER, joined by plus signs, with a NAME among "
                            f"{', '.join(plain.values())} (embedded takes no folder) and a SPLIT among {', '.join(PARTS)}; found {text!r}. "
                            "A folder whose name holds a comma or a plus sign needs a link without")
        found.append(Role(corpus, folder, split))
    return found


def manifest(role: Role) -> pd.DataFrame:
    """The clips of a role's corpus: lib.data.public.COLUMNS with absolute paths, and `voice`, a name for the speaker that no
    other corpus uses (voices of the embedded corpora that may be one person share theirs already)."""
    if role.corpus == "embedded":
        rows = [{"clip_id": f"{source.corpus}/{'-'.join(source.path.parts[-3:])}", "path": str(source.path), "corpus": source.corpus,
                 "speaker": source.speaker, "split": source.split, "role": "bonafide", "label": "bonafide", "generator": "",
                 "family": "", "parent": "", "licence": source.licence, "text": source.text} for source in embedded_sources()]
        return pd.DataFrame(rows).assign(voice=lambda table: table.speaker)
    table = load_dataset(role.corpus, role.folder)
    return table.assign(path=[str(Path(table.attrs["root"]) / path) for path in table.path],
                        voice=f"{role.corpus}-" + table.speaker.replace("", UNNAMED))


def _chosen(role: Role, part: str) -> pd.DataFrame:
    table = manifest(role)
    wanted = role.split or part
    if role.split or (table.split == wanted).any():
        rows = table[table.split == wanted]
        if rows.empty:
            raise RoleError(f"{role.corpus} in {role.folder} has no split {wanted!r}, only {sorted(set(table.split)) or 'none'}; "
                            "leave out @SPLIT to take everything")
        return rows
    return table


def _divided(parts: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """The same tables after clips that several parts were given are dealt out by voice, or by clip where voices are few."""
    everything = pd.concat([table.assign(part=part) for part, table in parts.items()], ignore_index=True)
    claims = everything.groupby(["corpus", "clip_id"]).part.agg(lambda names: tuple(sorted(set(names))))
    for (corpus, claimed), keys in claims[claims.map(len) > 1].reset_index().groupby(["corpus", "part"]):
        rows = everything[(everything.corpus == corpus) & everything.clip_id.isin(keys.clip_id)]
        voices = rows.voice.nunique()
        if voices < FEW_VOICES and "test" in claimed:
            raise RoleError(f"{corpus} with {voices} voices was given to {' and '.join(claimed)}: no test voice may be fitted on. Give "
                            f"it to data.single, or to test alone")
        unit = "voice" if voices >= FEW_VOICES else "clip_id"
        cycle = [part for part in CYCLE if part in claimed]
        order = sorted(set(rows[unit]), key=lambda name: digest_of([corpus, name], 16))
        dealt = {name: cycle[index % len(cycle)] for index, name in enumerate(order)}
        everything = everything.drop(rows.index[rows[unit].map(dealt) != rows.part])
    return {part: everything[everything.part == part].drop(columns="part") for part in parts}


def cast_of(data: Data) -> Cast:
    """Everyone's part under the options data.train, data.validation, data.test and data.single.

    Raises RoleError where a role is missing or would leak, lib.data.public.DatasetError for a folder that does not fit.
    """
    if not data.train or not data.test:
        raise RoleError("roles need data.train and data.test at least, such as data.train=ljspeech:/data/LJSpeech-1.1 "
                        f"data.test=asvspoof2019_la:/data/LA; found train {data.train}, test {data.test}")
    given = {"train": data.train, "validation": data.validation or data.train, "test": data.test, "single": data.single}
    roles = {part: roles_of(texts) for part, texts in given.items()}
    fitted, tested = ({role.corpus for part in names for role in roles[part]} for names in (("train", "validation"), ("test",)))
    leak = next((pair for pair in SAME_VOICES if pair[0] in fitted and pair[1] in tested), None)
    if leak:
        raise RoleError(f"the bona fide speech of {leak[1]} was taken from {leak[0]}: training on one and testing on the other leaks "
                        "voices and rooms. Choose another corpus for one of the two")
    tables = {part: pd.concat([_chosen(role, part) for role in each], ignore_index=True) for part, each in roles.items() if each}
    real = {part: table[table.label == "bonafide"] for part, table in tables.items()}
    empty = [part for part, table in real.items() if table.empty]
    if empty:
        raise RoleError(f"no bona fide clips for {' and '.join(empty)}: {', '.join(given[empty[0]])} holds fakes only. Add the corpus "
                        "with its real speech, see `python -m lib data --list`")
    split = _divided({part: real[part] for part in PARTS})
    single = real.get("single", split["test"])
    named = single[single.speaker != ""]
    if named.empty:
        raise RoleError("the single-speaker experiment needs a corpus that names its speakers, and those of "
                        f"{'data.single' if 'single' in real else 'data.test'} do not: name one in data.single, such as ljspeech:/data/LJ")
    voice = named.voice.value_counts().index[0]
    sources = [_source(row, part) for part in PARTS for row in split[part].itertuples()]
    if "single" in real:
        # Its voice plays in the single-speaker experiment, and its test clips in both: it is no voice of any other part.
        sources = [source for source in sources if source.speaker != voice]
        sources += [source for row in single.itertuples() if (source := _source(row, "test")).speaker == voice]
    missing = [part for part in PARTS if not any(source.split == part and (source.speaker != voice or part == "test")
                                                 for source in sources)]
    if missing:
        raise RoleError(f"nothing is left for {' and '.join(missing)} without the voice of the single-speaker experiment, {voice}; "
                        "name another corpus in data.single or in that role")
    fakes = [table[table.label == "spoof"].assign(part=part) for part, table in tables.items() if part in ("test", "single")]
    table = pd.concat(fakes, ignore_index=True).drop_duplicates(["corpus", "clip_id"])
    return Cast(sources, voice, table)


def _source(row: object, part: str) -> Source:
    return Source(Path(row.path), row.corpus, row.voice, part, row.licence, row.text, row.clip_id)


def librispeech_sources(root: Path = DATA / "librispeech", part: str = "dev-clean") -> tuple[list[Source], str]:
    """LibriSpeech as real speech, for machines without Debian's packages: its recordings and the single speaker's name.

    Speakers go to train, validation and test (60, 20, 20 %) by a hash of their number; the speaker with the most speech is
    the single speaker and, as with the embedded corpora, a test voice of the other experiment.
    Raises lib.data.public.DatasetError where it is not there and cannot be downloaded.
    """
    if not root.exists() or not any(root.rglob("*.flac")):
        root.mkdir(parents=True, exist_ok=True)
        download_dataset("librispeech", root, part)
    table = load_dataset("librispeech", root)
    single = table.speaker.value_counts().index[0]
    order = sorted(set(table.speaker) - {single}, key=lambda name: digest_of(["librispeech", name], 16))
    splits = {name: ("train", "train", "train", "validation", "test")[index % 5] for index, name in enumerate(order)} | {single: "test"}
    base = Path(table.attrs.get("root", root))
    return [Source(base / row.path, "librispeech", row.speaker, splits[row.speaker], row.licence, row.text)
            for row in table.itertuples()], single


def real_speech(data: Data) -> tuple[tuple[list[Source], str], pd.DataFrame | None]:
    """The recordings with the voice of the single-speaker experiment, and the fakes that the corpora bring (None without roles).

    Raises RoleError, lib.data.public.DatasetError or lib.data.packages.CorpusError where they cannot be had.
    """
    if data.train or data.validation or data.test or data.single:
        cast = cast_of(data)
        return (cast.sources, cast.voice), cast.fakes
    return (librispeech_sources() if data.corpus == "librispeech" else (embedded_sources(), "festvox-ru")), None


def clip_name(corpus: str, clip_id: str) -> str:
    """A name for the clip table: without spaces and unique, because the corpus's own id is part of it."""
    return f"{corpus}_{re.sub(r'[^A-Za-z0-9]+', '-', clip_id).strip('-')}-{digest_of([corpus, clip_id], 6)}"
