"""Owns the clip table: which clips there are, who speaks, which split they are in, what was made from what, and the
guard that keeps fakes and test clips out of everything that is fitted."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from lib import seeds
from lib.data.audio import AudioError, decode_g722, read_audio, write_audio
from lib.data.channel import FRAME, active_frames
from lib.data.generators import GENERATORS, Generator, available
from lib.data.packages import Source
from lib.data.roles import FEW_VOICES, UNNAMED, UNNAMED_VOICES, clip_name, real_speech
from lib.engine import end_with_parent
from lib.paths import CLIPS, DATA, TEXTS, atomic, digest_of, file_digest
from lib.settings import RATE_HZ, Data

COLUMNS = ["clip_id", "path", "source", "corpus", "speaker", "single", "multi", "role", "label", "generator", "family",
           "parent", "seconds", "rate_hz", "licence", "sha256", "text"]
EXPERIMENTS = ("single", "multi")


class LeakError(AssertionError):
    """A fake or a test clip was about to be used for fitting, selection, scaling or a threshold."""


class DataError(RuntimeError):
    """The clip table cannot be made; the message says what is missing."""


def require_bonafide(clips: pd.DataFrame, experiment: str, purpose: str, splits: Iterable[str]) -> pd.DataFrame:
    """Return `clips` unchanged if every one is bona fide, no test clip and in one of `splits`; else raise LeakError.

    Everything that fits anything (student, selection, scaling, typicality, threshold) passes through here.
    """
    wrong = clips[(clips.role != "bonafide") | (clips.label != "bonafide") | ~clips[experiment].isin(set(splits))]
    if len(wrong) or not len(clips) or clips.clip_id.duplicated().any():
        found = wrong.clip_id.head(3).tolist() if len(wrong) else ("no clips" if not len(clips) else "duplicate clips")
        raise LeakError(f"{purpose} may use bona fide clips of {'/'.join(splits)} only, each once; found {found}")
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


def _clip_name(source: Source) -> str:
    if source.clip_id:
        return clip_name(source.corpus, source.clip_id)
    parts = source.path.parts[-3:] if source.corpus != "festvox-ru" else source.path.parts[-1:]
    return f"{source.corpus}_{_slug('-'.join((*parts[:-1], source.path.stem)))}"


def crop_start(audio: np.ndarray, pause_db: float = 35.0) -> int:
    """Sample at which a clip is cropped from its recording: the first active frame."""
    return int(np.argmax(active_frames(audio, pause_db))) * FRAME


def _cropped(audio: np.ndarray, max_s: float) -> np.ndarray:
    """From the first active frame, `max_s` seconds: the same amount of speech whatever silence comes first."""
    start = crop_start(audio)
    return audio[start : start + int(max_s * RATE_HZ)]


def _decoded(source: Source, min_s: float, max_s: float, kind: str = "bonafide") -> dict[str, object] | None:
    """Write one source as a 16 kHz mono FLAC clip (cached, in the folder `kind`) and describe it; None where it is too short
    or silent."""
    folder = CLIPS / kind
    name = _clip_name(source)
    # The path inside the package and the crop name the cache entry; the package's own version may change.
    key = digest_of([name, source.path.stat().st_size, max_s], 8)
    path = folder / f"{name}-{key}.flac"
    if not path.exists():
        try:
            if source.path.suffix == ".g722":
                audio, _ = decode_g722(source.path)
            else:
                audio, _ = read_audio(source.path, RATE_HZ, strict=False)
        except AudioError:
            return None  # too short, silent or damaged in the package itself: another clip takes its place
        audio = _cropped(np.asarray(audio, dtype=np.float32), max_s)
        if len(audio) < min_s * RATE_HZ:
            return None
        peak = float(np.abs(audio).max(initial=0.0))
        write_audio(path, audio / peak * 0.99 if peak > 0.99 else audio, RATE_HZ)
    return {"clip_id": name, "path": path, "source": source.path.name, "corpus": source.corpus, "speaker": source.speaker,
            "role": "bonafide", "label": "bonafide", "generator": "", "family": "", "parent": "",
            "licence": source.licence, "text": source.text}


def _made(job: tuple[str, str, str, float, str]) -> tuple[str, str]:
    """Worker: make one synthetic clip unless it is cached; returns (path, error)."""
    name, given, target, max_s, seed_name = job
    path = Path(target)
    if path.exists():
        return target, ""
    import torch

    torch.set_num_threads(1)
    generator = GENERATORS[name]
    try:
        seed = seeds.integer(0, seed_name)
        if generator.kind == "tts":
            audio = _cropped(generator.run(given, seed), max_s)
            peak = float(np.abs(audio).max(initial=0.0))
            audio = audio / peak * 0.99 if peak > 0.99 else audio
        else:
            audio = generator.run(read_audio(given, RATE_HZ, strict=False)[0], seed)
        write_audio(path, audio, RATE_HZ)
    except Exception as error:  # noqa: BLE001  the reason goes into the report of skipped clips
        return target, f"{type(error).__name__}: {error}"
    return target, ""


def _take(rows: list[Source], count: int, seed: int, name: str) -> list[Source]:
    """`count` of `rows` in a seeded order (more are kept as spares for clips that turn out too short)."""
    order = seeds.stream(seed, "protocol", name).permutation(len(rows))
    return [rows[index] for index in order][: count * 3 if count < 100 else len(rows)]


def single_budget(data: Data, available: int) -> dict[str, int]:
    """Clips of the single speaker in each split: as the options want, or in these proportions where there are fewer."""
    wanted = {"train": data.single_train, "validation": data.single_validation, "test": data.single_test}
    share = min(1.0, available / sum(wanted.values()))
    return {split: max(1, int(count * share)) for split, count in wanted.items()}


def _bonafide_rows(data: Data, found: tuple[list[Source], str], seed: int,
                   progress: Callable[[str, int, int], None]) -> list[dict[str, object]]:
    sources, voice = found
    rows: list[dict[str, object]] = []
    single = [source for source in sources if source.speaker == voice]
    order = seeds.stream(seed, "protocol", "single").permutation(len(single))
    wanted = single_budget(data, len(single))
    plan = iter([single[index] for index in order])
    for split, count in wanted.items():
        kept = 0
        for source in plan:
            row = _decoded(source, data.min_s, data.max_s)
            if row:
                # The single-speaker test clips are that voice's share of the multi-speaker test as well.
                in_multi = "test" if split == "test" and kept < data.multi_test_per_speaker else ""
                rows.append(row | {"single": split, "multi": in_multi})
                kept += 1
                progress("real speech, one speaker", len(rows), sum(wanted.values()))
            if kept == count:
                break
    limits = {"train": data.multi_train_per_speaker, "validation": data.multi_validation_per_speaker,
              "test": data.multi_test_per_speaker}
    voices: dict[tuple[str, str], list[Source]] = {}
    for source in sources:
        if source.speaker != voice:
            voices.setdefault((source.speaker, source.split), []).append(source)
    for number, ((speaker, split), group) in enumerate(sorted(voices.items())):
        limit, kept = limits[split] * (UNNAMED_VOICES if speaker.endswith(f"-{UNNAMED}") else 1), 0
        for source in _take(group, limit, seed, speaker):
            row = _decoded(source, data.min_s, data.max_s)
            if row:
                rows.append(row | {"single": "", "multi": source.split})
                kept += 1
            if kept == limit:
                break
        progress("real speech, many speakers", number + 1, len(voices))
    return rows


def _corpus_fakes(fakes: pd.DataFrame, table: pd.DataFrame, voice: str, data: Data, seed: int,
                  progress: Callable[[str, int, int], None]) -> list[dict[str, object]]:
    """Rows of the test clips that corpora bring as fakes, at most `data.fakes_per_generator` of each generator.

    Copies of test clips come first. Copies of clips that something is fitted on are left out.
    """
    rows, known = [], table.set_index("clip_id")
    groups = fakes.groupby(["corpus", "generator"], sort=True)
    for number, ((corpus, generator), group) in enumerate(groups):
        name, kept = f"{corpus}-{_slug(generator)}", 0
        order = seeds.stream(seed, "protocol", "fakes", corpus, generator).permutation(len(group))
        group = group.iloc[order].assign(real=[_parent(known, each) for each in group.iloc[order].parent])
        group = group.assign(first=[bool(real) for real in group.real]).sort_values("first", ascending=False, kind="stable")
        for fake in group.itertuples():
            if kept == data.fakes_per_generator:
                break
            split = {"multi": "test" if fake.part == "test" else "", "single": "test" if fake.voice == voice else ""}
            if fake.real:
                split = {key: known.loc[fake.real, key] for key in EXPERIMENTS}
            if not any(split.values()) or set(split.values()) - {"test", ""}:
                continue
            source = Source(Path(fake.path), corpus, fake.voice, "test", fake.licence, fake.text, fake.clip_id)
            if row := _decoded(source, data.min_s, data.max_s, name):
                rows.append(row | split | {"role": fake.role, "label": "spoof", "generator": name, "family": fake.family or "unknown",
                                           "parent": fake.real})
                kept += 1
        progress("fakes of corpora", number + 1, len(groups))
    return rows


def _parent(known: pd.DataFrame, parent: str) -> str:
    """The clip of the table that a corpus's fake was made from, or an empty text."""
    names = (clip_name(corpus, parent) for corpus in PARENTS) if parent else ()
    return next((name for name in names if name in known.index), "")


PARENTS = ("ljspeech", "m_ailabs", "vidtimit", "csv")
"""Corpora whose clips others name as the parents of their fakes."""


def _spread(clips: pd.DataFrame, count: int) -> pd.DataFrame:
    """The first `count` clips when every speaker gives one in turn, so that no choice hangs on one voice; in the table's order."""
    turn = clips.groupby("speaker", sort=False).cumcount()
    return clips.loc[turn.sort_values(kind="stable").index[:count]].sort_index()


def _jobs(table: pd.DataFrame, generators: list[Generator], data: Data) -> list[tuple[tuple, dict[str, object]]]:
    """What has to be made: for each job its worker arguments and its row of the clip table."""
    tests = table[(table.single == "test") | (table.multi == "test")]
    development = pd.concat([_spread(table[table[name] == "validation"], data.development) for name in EXPERIMENTS])
    jobs = []
    for generator in generators:
        base = {"label": "bonafide" if generator.kind == "control" else "spoof", "role": generator.kind,
                "generator": generator.name, "family": generator.family, "rate_hz": RATE_HZ}
        if generator.kind == "tts":
            split = "development" if generator.development else "test"
            texts = (TEXTS / f"{generator.texts}.txt").read_text(encoding="utf-8").splitlines()[: data.texts]
            for number, text in enumerate(texts):
                name = f"{generator.name}_{number:03d}"
                key = digest_of([generator.name, generator.version, text, data.max_s], 8)
                path = CLIPS / generator.name / f"{name}-{key}.flac"
                row = base | {"clip_id": name, "path": path, "source": generator.package, "corpus": generator.name,
                              "speaker": generator.name, "single": split, "multi": split, "parent": "",
                              "licence": "see generator", "text": text}
                jobs.append(((generator.name, text, str(path), data.max_s, name), row))
            continue
        for parent in (development if generator.development else tests).itertuples():
            name = f"{parent.clip_id}__{generator.name}"
            key = digest_of([generator.name, generator.version, parent.sha256], 8)
            path = CLIPS / generator.name / f"{name}-{key}.flac"
            split = {key: ("development" if generator.development else "test") if getattr(parent, key) else ""
                     for key in EXPERIMENTS}
            row = base | split | {"clip_id": name, "path": path, "source": parent.source, "corpus": parent.corpus,
                                  "speaker": parent.speaker, "parent": parent.clip_id, "licence": parent.licence,
                                  "text": parent.text}
            jobs.append(((generator.name, str(DATA / parent.path), str(path), data.max_s, name), row))
    return jobs


def _described(row: dict[str, object], memory: dict[str, dict[str, object]]) -> dict[str, object]:
    """Add seconds, rate and SHA-256 of the file that the row names; `memory` keeps what was read before."""
    import soundfile

    path = Path(row["path"])
    stamp = f"{path.name}:{path.stat().st_size}:{path.stat().st_mtime_ns}"
    if stamp not in memory:
        info = soundfile.info(path)
        memory[stamp] = {"seconds": info.frames / info.samplerate, "rate_hz": info.samplerate, "sha256": file_digest(path)}
    return row | memory[stamp] | {"path": str(path.relative_to(DATA))}


def prepare(data: Data, seed: int = 0, workers: int = 2,
            progress: Callable[[str, int, int], None] = lambda *_: None) -> tuple[pd.DataFrame, list[str]]:
    """Make (or find in the cache) every clip of the study and return the clip table and what was skipped.

    The table has one row a clip: `clip_id, path` (below data/), `source, corpus, speaker`, the split in each experiment
    (`single`, `multi`: train, validation, test, development or empty), `role` (bonafide, copysynth, tts, control),
    `label` (bonafide or spoof; controls are real speech and so bonafide), `generator, family, parent, seconds, rate_hz,
    licence, sha256, text`. A killed preparation resumes: each clip is written atomically under a name made of its content.
    """
    CLIPS.mkdir(parents=True, exist_ok=True)
    memory: dict[str, dict[str, object]] = {}
    found, fakes = real_speech(data)
    rows = _bonafide_rows(data, found, seed, progress)
    table = pd.DataFrame([_described(row, memory) for row in rows])
    brought = [] if fakes is None else _corpus_fakes(fakes, table, found[1], data, seed, progress)
    generators, skipped = available(data.generators)
    jobs = _jobs(table, generators, data)
    failed: dict[str, list[str]] = {}
    context = multiprocessing.get_context("spawn")
    todo = [job for job, _ in jobs if not Path(job[2]).exists()]
    if todo:
        # Long jobs first, so that no worker is left alone with them at the end.
        todo.sort(key=lambda job: (not job[0].startswith("hifigan"), job[0]))
        with concurrent.futures.ProcessPoolExecutor(workers, context, end_with_parent) as pool:
            waiting = [pool.submit(_made, job) for job in todo]
            try:
                for number, done in enumerate(concurrent.futures.as_completed(waiting)):
                    target, error = done.result()
                    if error:
                        failed.setdefault(Path(target).parent.name, []).append(error)
                    progress("synthetic speech", number + 1, len(todo))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    skipped += [f"{name}: {len(errors)} clips failed ({errors[0]})" for name, errors in failed.items()]
    made = [_described(row, memory) for row in brought]
    made += [_described(row, memory) for job, row in jobs if Path(job[2]).exists()]
    table = pd.concat([table, pd.DataFrame(made)], ignore_index=True)[COLUMNS]
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
