"""Owns work on many recordings: several processes, a manifest in blocks, calibration.

While the score file OUT of a manifest is in the making, OUT.parts holds plan.json (what is scored with what) and a JSON
file for every finished block. A rerun with any number of processes does the blocks that are missing.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import tempfile
from collections import namedtuple
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from lib.data.audio import listed, read_audio, recordings_below
from lib.data.channel import FRAME
from lib.engine import Engine, in_processes
from lib.model.checkpoints import DetectorError
from lib.paths import atomic, clear_stale, digest_of, require_outputs, shown, write_json
from lib.recordings.judging import REASONS, Limits, Recording, judged, load_detector
from lib.settings import RATE_HZ

if TYPE_CHECKING:
    import pandas as pd

BLOCK = 32  # clips in a block: what a kill can cost, and the share of work that processes take in turns
NOISE_DB = 4.0  # in noise alone, loud and quiet frames are closer than this


def judged_all(paths: Iterable[Path | str], folder: Path | str | None = None, alpha: float = 0.05, jobs: int = 1,
               channel: int | None = None, precision: str = "fp32") -> Iterator[Recording]:
    """Judge many recordings in their order, in `jobs` processes where that is more than one."""
    paths, how = list(paths), (folder, precision, alpha, channel)
    if jobs > 1 and len(paths) > 1:
        yield from in_processes(_judged_here, paths, min(jobs, len(paths)), _load, how)
    else:
        _load(*how)
        yield from map(_judged_here, paths)


_here: dict[str, object] = {}  # the detector of this process


def _load(folder: Path | str | None, precision: str, alpha: float, channel: int | None) -> None:
    detector, limits, _ = load_detector(folder, precision)
    _here.update(detector=detector, limits=limits, alpha=alpha, channel=channel)


def _judged_here(path: Path | str) -> Recording:
    return judged(path=path, **_here)


def read_manifest(path: Path | str, root: Path | str | None = None) -> pd.DataFrame:
    """clip_id (default: the path) and path of a table, such as `python -m lib data --out` writes, or of a folder.
    Paths are below `root`; by default below the folder that the table remembers (Parquet), or the table's own (CSV).
    Raises ScoreFileError for a table without these columns, with repeated ids or naming files that are not there.
    """
    import pandas as pd

    from lib.data.scorefiles import ScoreFileError

    path = Path(path)
    if path.is_dir():
        rows = [(each.relative_to(path).as_posix(), str(each)) for each in recordings_below(path)[0]]
        return pd.DataFrame(rows, columns=["clip_id", "path"])
    try:
        parquet = path.suffix == ".parquet"
        table = pd.read_parquet(path) if parquet else pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise ScoreFileError(f"{path}: expected a folder, or a manifest in .parquet or .csv: {error}") from None
    if "path" not in table or table.empty:
        raise ScoreFileError(f"{path}: expected rows with a path, found {len(table)} with {list(table)[:6]}")
    table = table if "clip_id" in table else table.assign(clip_id=table.path)
    twice = table.clip_id[table.clip_id.duplicated()].tolist()
    if twice:
        raise ScoreFileError(f"{path}: expected every clip once, found {len(twice)} repeated ids: {twice[:3]}")
    base = Path(root or table.attrs.get("root") or path.parent)
    table = pd.DataFrame({"clip_id": table.clip_id.astype(str), "path": [str(base / each) for each in table.path]})
    absent = [each for each in table.path if not Path(each).is_file()]
    if absent:
        raise ScoreFileError(f"{path}: {len(absent)} of {len(table)} files are not there, such as {absent[0]}; name "
                             "their folder with --root")
    return table


def score_manifest(table: pd.DataFrame, out: Path | str, engine: Engine, detector_folder: Path | str | None = None,
                   form: str = "asvspoof5") -> pd.DataFrame | None:
    """Score every clip of `table` (clip_id, path) and write `out`, score up = bona fide; the table of results.

    Clips that cannot be scored are left out of `out` and listed, with the reason, in OUT.unscored.csv. In every process
    but the main one the result is None. Raises ScoreFileError where parts of another manifest or detector lie there.
    """
    from lib.data.scorefiles import ScoreFileError

    out = Path(out)
    parts = out.with_name(out.name + ".parts")
    detector, limits, names = load_detector(detector_folder)
    if engine.main:
        clear_stale(out.parent)
        plan, key = parts / "plan.json", digest_of([names["sha256"], table.to_numpy().tolist(), BLOCK])
        if parts.exists() and (not plan.exists() or json.loads(plan.read_text(encoding="utf-8"))["key"] != key):
            raise ScoreFileError(f"{parts} holds the unfinished scores of another manifest or detector: finish that "
                                 "run, or remove the folder, or write to another --out")
        write_json(plan, {"key": key})
    engine.wait()
    blocks = {parts / f"{start:09d}.json": table[start : start + BLOCK] for start in range(0, len(table), BLOCK)}
    mine = [part for part in list(blocks)[engine.rank :: engine.world] if not part.exists()]
    for part in tqdm(mine, unit="block", disable=not engine.main or not sys.stderr.isatty()):
        rows = []
        for clip in blocks[part].itertuples():
            recording = judged(detector, clip.path, limits)
            rows.append([clip.clip_id, recording.anomaly, recording.why if recording.anomaly is None else ""])
        write_json(part, rows)
    engine.wait()
    return _finished(parts, table.clip_id.tolist(), out, form) if engine.main else None


def merged(parts: Path, ids: list[str]) -> pd.DataFrame:
    """Columns clip_id, anomaly (NaN where there is none) and why, of all parts in the order of `ids`.

    Raises ScoreFileError for clips that are missing, there twice, or in no manifest.
    """
    import pandas as pd

    from lib.data.scorefiles import ScoreFileError

    rows = [row for path in sorted(parts.glob("0*.json")) for row in json.loads(path.read_text(encoding="utf-8"))]
    table = pd.DataFrame(rows, columns=["clip_id", "anomaly", "why"]).astype({"anomaly": float})
    twice = table.clip_id[table.clip_id.duplicated()].tolist()
    missing, unknown = sorted(set(ids) - set(table.clip_id)), sorted(set(table.clip_id) - set(ids))
    if twice or missing or unknown:
        raise ScoreFileError(f"{parts}: expected {len(ids)} clips once, found {len(missing)} missing {missing[:3]}, "
                             f"{len(twice)} twice {twice[:3]}, {len(unknown)} unknown {unknown[:3]}; remove that part")
    return table.set_index("clip_id").loc[ids].reset_index()


def _finished(parts: Path, ids: list[str], out: Path, form: str) -> pd.DataFrame:
    from lib.data.scorefiles import ScoreFileError, write_scores

    results = merged(parts, ids)
    scored, unscored = results[results.anomaly.notna()], results[results.anomaly.isna()]
    if scored.empty:
        first = f"{unscored.clip_id.iloc[0]}: {unscored.why.iloc[0]}"
        raise ScoreFileError(f"none of {len(results)} clips could be scored; the first: {first}")
    write_scores(out, scored.assign(score=-scored.anomaly), form)
    rest = out.with_name(out.name + ".unscored.csv")
    rest.unlink(missing_ok=True)
    if len(unscored):
        with atomic(rest) as temporary:
            unscored[["clip_id", "why"]].to_csv(temporary, index=False)
    shutil.rmtree(parts)
    return results


# --- calibration ------------------------------------------------------------------------------------------------------


Calibrated = namedtuple("Calibrated", "detector names left_out notes")  # pairs of file and reason, of file and note


def calibrate(paths: Iterable[Path | str], out: Path | str, folder: Path | str | None = None,
              name: str = "") -> Calibrated:
    """Recalibrate a detector on real speech of one source or person and save it in `out`, whole or not at all.

    Left out is what cannot be read, holds too little speech or another one's sound, or is outside what the detector
    knows (`Limits`) where most is not. Raises DetectorError for too little speech, UsageError for an unfit `out`."""
    detector, known, _ = load_detector(folder)
    (paths, left_out), out, kept, prints = listed(paths), Path(out), {}, {}
    require_outputs([str(out)], paths, folders=True)
    for path in paths:
        recording, twin = judged(detector, path, known), None
        if recording.parts:
            prints[path] = _fingerprint(read_audio(path, RATE_HZ)[0])
            twin = next((other for other in kept if _alike(prints[path], prints[other])), None)
        if twin or not recording.parts or recording.why.startswith("clipped"):
            left_out.append((str(path), f"the same sound as {shown(twin)}" if twin else recording.why))
        else:
            kept[path] = recording
    numbers = {path: [getattr(recording, each) for each in REASONS] for path, recording in kept.items()}
    usual = np.median(list(numbers.values()) or [[0, 0, 0]], axis=0)
    least = [limit if value >= limit else 0 for limit, value in zip(dataclasses.astuple(known), usual)]
    least = Limits(*least[:2], max(NOISE_DB, least[2]))
    for path, values in numbers.items():
        if reason := least.reason(Limits(*values)):
            left_out.append((str(path), reason))
            del kept[path]
    notes = _unlike(kept)
    try:
        detector.fit(kept)
    except DetectorError as error:
        reasons = "; ".join(f"{shown(path)}: {reason}" for path, reason in left_out[:5])
        raise DetectorError(f"{error}; {len(left_out)} files were left out: {reasons or 'none'}") from None
    covered = [[recording.bandwidth_hz, part.crest_db, part.range_db]
               for recording in kept.values() for part in recording.parts]
    limits = Limits(*np.minimum(np.quantile(covered, 0.02, axis=0), dataclasses.astuple(known)).tolist())
    sheet = {"name": name, "recordings": len(kept), "speech_s": round(sum(each.speech_s for each in kept.values()), 1)}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=out.parent) as place:
        new = detector.save(Path(place, "new"))
        write_json(new / "limits.json", sheet | dataclasses.asdict(limits))
        if out.exists():
            os.replace(out, Path(place, "old"))
        os.replace(new, out)
    return Calibrated(detector, load_detector(out)[2], left_out, notes)


def _unlike(recordings: dict[Path | str, Recording]) -> list[tuple[str, str]]:
    """Notes on recordings that are far more anomalous than all others, or than the real speech of the detector."""
    anomalies, notes = np.array([recording.anomaly for recording in recordings.values()]), []
    for index, (path, recording) in enumerate(recordings.items()):
        rest, anomaly = np.delete(anomalies, index), anomalies[index]
        if recording.p_value <= 0.01:
            notes.append((str(path), f"{recording.words}, p {recording.p_value:.3f}; is it real speech?"))
        elif len(rest) > 3 and anomaly > max(rest.max(), (m := np.median(rest)) + 7.4 * np.median(np.abs(rest - m))):
            notes.append((str(path), f"unlike the others, anomaly {anomaly:.2f}, theirs {rest.min():.2f} to "
                          f"{rest.max():.2f}; is it real speech of the same source?"))
    return notes


def _fingerprint(audio: np.ndarray) -> np.ndarray:
    """The harmonics of 20 s of audio (samples,) over time, (band of 37.5 Hz up to 2 kHz, frame of 20 ms): levels less
    their mean over nine bands, each band that holds any sound standardised, the others zero."""
    from scipy.ndimage import uniform_filter1d

    frames = np.lib.stride_tricks.sliding_window_view(audio[: 20 * RATE_HZ], 4 * FRAME)[::FRAME]
    power = np.abs(np.fft.rfft(frames * np.hanning(4 * FRAME))[:, 8:158]) ** 2
    level = 10 * np.log10(power.reshape(len(frames), -1, 3).mean(2).T + 1e-12)
    peaks = level.max(1, keepdims=True)
    shape = np.maximum(level, peaks - 40)
    shape -= uniform_filter1d(shape, 9, axis=0, mode="nearest")
    shape = (shape - shape.mean(1, keepdims=True)) / (shape.std(1, keepdims=True) + 1e-9)
    return np.where(peaks > peaks.max() - 60, shape, 0)


def _alike(one: np.ndarray, two: np.ndarray) -> bool:
    """Whether two fingerprints are of one sound: their correlation at the best shift is 0.82 or more for copies (gain,
    MP3 at 32 kb/s, Opus at 16 kb/s, another start) and at most 0.3 for other speech."""
    size = 2 ** int(np.ceil(np.log2(one.shape[1] + two.shape[1])))
    product = (np.fft.rfft(one, size) * np.conj(np.fft.rfft(two, size))).sum(0)
    return np.fft.irfft(product, size).max() > 0.7 * min((one**2).sum(), (two**2).sum())
