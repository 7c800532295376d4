"""Owns the clip table: which clips there are, who speaks, which split they are in, what was made from what, and the
guard that keeps fakes and test clips out of everything that is fitted."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile

from lib import seeds
from lib.data.audio import AudioError, decode_g722, read_audio, write_audio
from lib.data.channel import FRAME, active_frames
from lib.data.generators import GENERATORS, Generator, available, below_full_scale
from lib.data.packages import Source
from lib.data.public import FEW_VOICES, PARTS, UNNAMED, cast_of
from lib.engine import in_processes
from lib.paths import CLIPS, DATA, TEXTS, atomic, clocked, digest_of, file_digest
from lib.settings import RATE_HZ, Data

Row = dict[str, object]
Progress = Callable[[str, int, int], None]  # stage, done, total
COLUMNS = ["clip_id", "path", "source", "corpus", "speaker", "single", "multi", "role", "label", "generator", "family",
           "parent", "seconds", "rate_hz", "licence", "sha256", "text"]
EXPERIMENTS = ("single", "multi")
UNNAMED_VOICES = 20  # as many clips as this many voices may come from a corpus that names no speakers
PARENTS = ("ljspeech", "m_ailabs", "vidtimit", "csv")  # corpora whose clips others name as the parents of their fakes


class LeakError(AssertionError):
    """A fake or a test clip was about to be used for fitting, selection, scaling or a threshold."""


def require_bonafide(clips: pd.DataFrame, experiment: str, purpose: str, splits: Iterable[str]) -> pd.DataFrame:
    """Return `clips` unchanged if every one is bona fide, no test clip and in one of `splits`; else raise LeakError.

    Everything that fits anything (student, selection, scaling, typicality, threshold) passes through here.
    """
    wrong = clips[(clips.role != "bonafide") | (clips.label != "bonafide") | ~clips[experiment].isin(set(splits))]
    if len(wrong) or not len(clips) or clips.clip_id.duplicated().any():
        fault = wrong.clip_id.head(3).tolist() if len(wrong) else "duplicate clips" if len(clips) else "no clips"
        raise LeakError(f"{purpose} may use bona fide clips of {'/'.join(splits)} only, each once; found {fault}")
    if "test" in set(splits):
        raise LeakError(f"{purpose} may not use the test split")
    return clips


def validation_parts(table: pd.DataFrame, experiment: str) -> pd.Series:
    """The part that each bona fide validation clip plays, by clip id: a quarter each would be too little for scaling.

    development: parents of the development fakes, kept out of every fit so that choices are made on unseen clips;
    selection (12 %): the validation loss that picks a checkpoint; scaling (50 %): discrepancy scaling and typicality;
    threshold: calibration scores of p-values and thresholds. Assigned by a hash of the id, so parts never move.
    """
    clips = table[(table.role == "bonafide") & (table[experiment] == "validation")]
    parents = set(table[table[experiment] == "development"].parent)
    if not parents:
        parents = set(clips.clip_id.head(max(1, len(clips) // 10)))
    rest = sorted(set(clips.clip_id) - parents, key=lambda name: digest_of(name, 16))
    first, second = max(1, round(0.12 * len(rest))), max(2, round(0.62 * len(rest)))
    parts = dict.fromkeys(parents, "development") | dict.fromkeys(rest[:first], "selection")
    parts |= dict.fromkeys(rest[first:second], "scaling") | dict.fromkeys(rest[second:], "threshold")
    return pd.Series({name: parts[name] for name in clips.clip_id}, name="part")


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")


def _named(corpus: str, clip_id: str) -> str:
    """A name for the clip table: without spaces, and unique, because the corpus's own id is part of it."""
    return f"{corpus}_{_slug(clip_id)}-{digest_of([corpus, clip_id], 6)}"


def _clip_name(source: Source) -> str:
    if source.clip_id:
        return _named(source.corpus, source.clip_id)
    parts = source.path.parts[-3:] if source.corpus != "festvox-ru" else source.path.parts[-1:]
    return f"{source.corpus}_{_slug('-'.join((*parts[:-1], source.path.stem)))}"


def crop_start(audio: np.ndarray) -> int:
    """Sample at which a clip is cropped from its recording: the first active frame, whatever silence comes first."""
    return int(np.argmax(active_frames(audio, 35.0))) * FRAME


def _cropped(audio: np.ndarray, max_s: float) -> np.ndarray:
    return audio[crop_start(audio) :][: int(max_s * RATE_HZ)]


def _decoded(source: Source, min_s: float, max_s: float, kind: str = "bonafide") -> Row | None:
    """Write one source as a 16 kHz mono FLAC clip (cached, in the folder `kind`) and describe it; None where it is too
    short, silent or damaged: another clip takes its place."""
    name = _clip_name(source)
    # The path inside the package and the crop name the cache entry; the package's own version may change.
    key = digest_of([name, source.path.stat().st_size, max_s], 8)
    path = CLIPS / kind / f"{name}-{key}.flac"
    if not path.exists():
        try:
            raw = source.path.suffix == ".g722"
            audio = decode_g722(source.path) if raw else read_audio(source.path, RATE_HZ, strict=False)[0]
        except AudioError:
            return None
        audio = _cropped(audio, max_s)
        if len(audio) < min_s * RATE_HZ:
            return None
        write_audio(path, below_full_scale(audio), RATE_HZ)
    return {"clip_id": name, "path": path, "source": source.path.name, "corpus": source.corpus,
            "speaker": source.speaker, "role": "bonafide", "label": "bonafide", "generator": "", "family": "",
            "parent": "", "licence": source.licence, "text": source.text}


def _made(job: tuple[str, Row, float]) -> tuple[str, str]:
    """Worker: make one synthetic clip of a text or of the recording `origin`; (generator, why it failed)."""
    origin, row, max_s = job
    generator, seed = GENERATORS[row["generator"]], seeds.integer(0, row["clip_id"])
    try:
        if generator.kind == "tts":
            audio = below_full_scale(_cropped(generator.run(origin, seed), max_s))
        else:
            audio = generator.run(read_audio(origin, RATE_HZ, strict=False)[0], seed)
        write_audio(row["path"], audio, RATE_HZ)
    except Exception as error:  # noqa: BLE001  the reason goes into the report of skipped clips
        return generator.name, f"{type(error).__name__}: {error}"
    return generator.name, ""


def single_budget(data: Data, available: int) -> dict[str, int]:
    """Clips of the single speaker in each split: as the options say, or in their proportions where there are fewer."""
    asked = {split: getattr(data, f"single_{split}") for split in PARTS}
    share = min(1.0, available / sum(asked.values()))
    return {split: max(1, int(count * share)) for split, count in asked.items()}


def _bonafide_rows(data: Data, sources: list[Source], voice: str, seed: int, progress: Progress) -> list[Row]:
    rows: list[Row] = []
    single = [source for source in sources if source.speaker == voice]
    order = seeds.stream(seed, "protocol", "single").permutation(len(single))
    budget = single_budget(data, len(single))
    described = filter(None, (_decoded(single[index], data.min_s, data.max_s) for index in order))
    for split, count in budget.items():
        for number, row in enumerate(itertools.islice(described, count)):
            # The single-speaker test clips are that voice's share of the multi-speaker test as well.
            in_multi = "test" if split == "test" and number < data.multi_test_per_speaker else ""
            rows.append(row | {"single": split, "multi": in_multi})
            progress("real speech, one speaker", len(rows), sum(budget.values()))
    voices: dict[tuple[str, str], list[Source]] = {}
    for source in sources:
        if source.speaker != voice:
            voices.setdefault((source.speaker, source.split), []).append(source)
    for number, ((speaker, split), group) in enumerate(sorted(voices.items())):
        limit = getattr(data, f"multi_{split}_per_speaker") * (UNNAMED_VOICES if speaker.endswith(f"-{UNNAMED}") else 1)
        # Some are spares, for clips that turn out too short.
        order = seeds.stream(seed, "protocol", speaker).permutation(len(group))[: 3 * limit if limit < 100 else None]
        described = filter(None, (_decoded(group[index], data.min_s, data.max_s) for index in order))
        rows += [row | {"single": "", "multi": split} for row in itertools.islice(described, limit)]
        progress("real speech, many speakers", number + 1, len(voices))
    return rows


def _corpus_fakes(fakes: pd.DataFrame, table: pd.DataFrame, voice: str, data: Data, seed: int,
                  progress: Progress) -> list[Row]:
    """Rows of the test clips that corpora bring as fakes, at most `data.fakes_per_generator` of each generator.

    Copies of test clips come first. Copies of clips that something is fitted on are left out.
    """
    rows, known = [], table.set_index("clip_id")
    groups = fakes.groupby(["corpus", "generator"], sort=True)
    for number, ((corpus, generator), group) in enumerate(groups):
        name, kept = f"{corpus}-{_slug(generator)}", 0
        order = seeds.stream(seed, "protocol", "fakes", corpus, generator).permutation(len(group))
        drawn = [(fake, _parent(known, fake.parent)) for fake in group.iloc[order].itertuples()]
        for fake, parent in sorted(drawn, key=lambda pair: not pair[1]):
            if kept == data.fakes_per_generator:
                break
            split = {"multi": "test" if fake.part == "test" else "", "single": "test" if fake.voice == voice else ""}
            if parent:
                split = {key: known.loc[parent, key] for key in EXPERIMENTS}
            if not any(split.values()) or set(split.values()) - {"test", ""}:
                continue
            source = Source(Path(fake.path), corpus, fake.voice, "test", fake.licence, fake.text, fake.clip_id)
            if row := _decoded(source, data.min_s, data.max_s, name):
                kept += 1
                rows.append(row | split | {"role": fake.role, "label": "spoof", "generator": name, "parent": parent,
                                           "family": fake.family or "unknown"})
        progress("fakes of corpora", number + 1, len(groups))
    return rows


def _parent(known: pd.DataFrame, parent: str) -> str:
    """The clip of the table that a corpus's fake was made from, or an empty text."""
    names = (_named(corpus, parent) for corpus in PARENTS) if parent else ()
    return next((name for name in names if name in known.index), "")


def _spread(clips: pd.DataFrame, count: int) -> pd.DataFrame:
    """The first `count` clips when speakers give one in turn, in the table's order: no choice hangs on one voice."""
    turn = clips.groupby("speaker", sort=False).cumcount()
    return clips.loc[turn.sort_values(kind="stable").index[:count]].sort_index()


def _jobs(table: pd.DataFrame, generators: list[Generator], data: Data) -> list[tuple[str, Row]]:
    """What is to be made: the text or the recording that each synthetic clip comes from, and its row of the table."""
    tests = table[(table.single == "test") | (table.multi == "test")]
    development = pd.concat([_spread(table[table[name] == "validation"], data.development) for name in EXPERIMENTS])
    jobs = []
    for generator in generators:
        split = "development" if generator.development else "test"
        if generator.kind == "tts":
            texts = (TEXTS / f"{generator.texts}.txt").read_text(encoding="utf-8").splitlines()[: data.texts]
            own = [(text, [text, data.max_s], {
                "clip_id": f"{generator.name}_{number:03d}", "source": generator.package, "corpus": generator.name,
                "speaker": generator.name, "single": split, "multi": split, "parent": "", "licence": "see generator",
                "text": text}) for number, text in enumerate(texts)]
        else:
            own = [(str(DATA / parent.path), [parent.sha256], {
                "clip_id": f"{parent.clip_id}__{generator.name}", "source": parent.source, "corpus": parent.corpus,
                "speaker": parent.speaker, "parent": parent.clip_id, "licence": parent.licence, "text": parent.text,
                **{name: split if getattr(parent, name) else "" for name in EXPERIMENTS}})
                for parent in (development if generator.development else tests).itertuples()]
        for origin, recipe, facts in own:
            key = digest_of([generator.name, generator.version, *recipe], 8)
            jobs.append((origin, facts | {
                "label": "bonafide" if generator.kind == "control" else "spoof", "role": generator.kind,
                "generator": generator.name, "family": generator.family,
                "path": CLIPS / generator.name / f"{facts['clip_id']}-{key}.flac"}))
    return jobs


def _described(row: Row) -> Row:
    """The row with seconds, rate and SHA-256 of the file that it names."""
    path, info = row["path"], soundfile.info(row["path"])
    return row | {"seconds": info.duration, "rate_hz": info.samplerate, "sha256": file_digest(path),
                  "path": str(path.relative_to(DATA))}


@clocked("data")
def prepare(data: Data, seed: int = 0, workers: int = 2,
            progress: Progress = lambda *_: None) -> tuple[pd.DataFrame, list[str]]:
    """Make (or find in the cache) every clip of the study and return the clip table and what was skipped.

    The table has one row a clip: `clip_id, path` (below data/), `source, corpus, speaker`, the split in each experiment
    (`single`, `multi`: train, validation, test, development or empty), `role` (bonafide, copysynth, tts, control),
    `label` (bonafide or spoof; controls are real speech and so bonafide), `generator, family, parent, seconds, rate_hz,
    licence, sha256, text`. A killed preparation resumes: each clip is written atomically under a name of its content.
    """
    CLIPS.mkdir(parents=True, exist_ok=True)
    sources, voice, fakes = cast_of(data)
    table = pd.DataFrame([_described(row) for row in _bonafide_rows(data, sources, voice, seed, progress)])
    made = [] if fakes is None else _corpus_fakes(fakes, table, voice, data, seed, progress)
    generators, skipped = available(data.generators)
    jobs = _jobs(table, generators, data)
    # Long jobs first, so that no worker is left alone with them at the end.
    todo = sorted(((origin, row, data.max_s) for origin, row in jobs if not row["path"].exists()),
                  key=lambda job: (not job[1]["generator"].startswith("hifigan"), job[1]["clip_id"]))
    failed: dict[str, list[str]] = {}
    for number, (name, fault) in enumerate(in_processes(_made, todo, workers) if todo else ()):
        progress("synthetic speech", number + 1, len(todo))
        if fault:
            failed.setdefault(name, []).append(fault)
    skipped += [f"{name}: {len(faults)} clips failed ({faults[0]})" for name, faults in failed.items()]
    made += [row for _, row in jobs if row["path"].exists()]
    table = pd.concat([table, pd.DataFrame([_described(row) for row in made])], ignore_index=True)[COLUMNS]
    check_table(table)
    return table, skipped


def check_table(table: pd.DataFrame) -> None:
    """The leak guard on the table itself: unique ids, speaker-disjoint multi-speaker splits, no fake outside test and
    development, no audio (SHA-256) in two splits. Raises LeakError."""
    if table.clip_id.duplicated().any():
        raise LeakError(f"clip ids are not unique: {table.clip_id[table.clip_id.duplicated()].head(3).tolist()}")
    fakes = table[table.role != "bonafide"]
    for name in EXPERIMENTS:
        bad = fakes[fakes[name].isin(["train", "validation"])]
        if len(bad):
            raise LeakError(f"{name}: synthetic clips in a fitting split: {bad.clip_id.head(3).tolist()}")
        real = table[(table.role == "bonafide") & (table[name] != "")]
        doubled = real.groupby("sha256")[name].nunique()
        if (doubled > 1).any():
            raise LeakError(f"{name}: the same audio is in two splits (SHA-256 {doubled.index[doubled > 1][0][:12]})")
    real = table[(table.role == "bonafide") & (table.multi != "")]
    # With a handful of training voices, validation can only be other clips of theirs; test voices are always others.
    few = real[real.multi == "train"].speaker.nunique() < FEW_VOICES
    part = real.multi.replace("validation", "train") if few else real.multi
    splits = part.groupby(real.speaker).nunique()
    if (splits > 1).any():
        raise LeakError(f"multi: a speaker is in two splits: {splits.index[splits > 1].tolist()}")


def save_table(table: pd.DataFrame, path: Path) -> None:
    """Write the clip table as Parquet, and beside it as CSV for readers."""
    with atomic(path) as temporary:
        table.to_parquet(temporary, index=False)
    with atomic(path.with_suffix(".csv")) as temporary:
        table.to_csv(temporary, index=False)
