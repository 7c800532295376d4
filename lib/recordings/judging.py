"""Owns the work on a user's own recordings: read piece by piece, scored, many at once; and calibration on real speech."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.data.audio import AudioError, iter_audio, read_audio
from lib.data.channel import FRAME, Passage, frame_levels, pass_channel
from lib.detector import SHIPPED, Detector
from lib.model.checkpoints import DetectorError
from lib.paths import file_digest, shown, write_json
from lib.recordings.figures import NAME as KNOWN
from lib.recordings.verdicts import LEAST_SPEECH_S, UNKNOWN, Limits, Part, Recording, verdict_on
from lib.settings import RATE_HZ

SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".mp3")


def load_detector(folder: Path | str | None = None) -> tuple[Detector, Limits, dict[str, object]]:
    """A detector (default: the shipped one), its limits, and what names it: folder, SHA-256, number of calibration clips.

    Raises DetectorError, saying how to get a detector where none is there.
    """
    if folder is None and not (SHIPPED / "detector.json").exists():
        raise DetectorError(f"no detector ships with this copy (looked in {SHIPPED}): train one with `make study`, which keeps "
                            "it below runs/study/detectors, and name its folder with --detector")
    folder = Path(folder or SHIPPED)
    detector = Detector.load(folder)
    if not len(detector.calibration):
        raise DetectorError(f"{folder} has no calibration scores of real speech; calibrate it first")
    try:
        stated = json.loads((folder / "limits.json").read_text(encoding="utf-8"))
        limits = Limits(**{field.name: float(stated[field.name]) for field in dataclasses.fields(Limits)})
    except FileNotFoundError:
        limits = Limits()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DetectorError(f"{folder / 'limits.json'} is damaged ({type(error).__name__}: {error}); calibrate again") from None
    return detector, limits, {"folder": shown(folder), "sha256": file_digest(folder / "detector.safetensors"),
                              "calibration_clips": len(detector.calibration)}


def audio_files(folder: Path | str) -> list[Path]:
    """Every recording below `folder`, by its suffix, sorted; hidden ones are left out. Raises ValueError for none."""
    folder = Path(folder)
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))
    if not found:
        raise ValueError(f"{shown(folder)}: expected a folder with recordings ({', '.join(SUFFIXES)}), found "
                         f"{'none' if folder.is_dir() else 'no such folder'}")
    return found


def pieces(path: Path | str, piece_s: float, channel: int | None = None) -> Iterator[tuple[float, np.ndarray]]:
    """(start_s, samples) of pieces of `piece_s`; a last one below half of it joins the one before. Returns the AudioReport."""
    waiting, stream = None, iter_audio(path, RATE_HZ, piece_s, channel=channel)
    while True:
        try:
            start, audio = next(stream)
        except StopIteration as end:
            if waiting:
                yield waiting
            return end.value
        if waiting and len(audio) < 0.5 * piece_s * RATE_HZ:
            waiting = waiting[0], np.concatenate([waiting[1], audio])
            continue
        if waiting:
            yield waiting
        waiting = start, audio


@dataclass(frozen=True)
class Piece:
    """A piece of a recording with what the detector made of it."""

    start_s: float
    audio: np.ndarray  # (samples,) as read
    passage: Passage
    levels: list  # of Detector.clip_residuals


Visitor = Callable[[Part, Piece], None]
"""Called with each scored part and its piece, which is not kept."""


def judged(detector: Detector, path: Path | str, limits: Limits | None = None, alpha: float = 0.05,
           visit: Visitor = lambda *_: None, channel: int | None = None) -> Recording:
    """Read, score and judge one recording, or one of its channels, by the rules of lib.recordings.verdicts.

    Never raises for what is in the file.
    """
    parts, report, stream = [], None, pieces(path, detector.settings.data.max_s, channel)
    try:
        while report is None:
            try:
                start, audio = next(stream)
            except StopIteration as end:
                report = end.value
            else:
                scored = _scored(detector, start, audio)
                if scored:
                    parts.append(scored[0])
                    visit(*scored)
    except AudioError as error:
        return Recording(shown(path), UNKNOWN, shown(str(error).removeprefix(f"{str(path)!r}: ")))
    return verdict_on(shown(path), report, tuple(parts), detector.calibration, limits or Limits(), alpha)


def _scored(detector: Detector, start: float, audio: np.ndarray) -> tuple[Part, Piece] | None:
    """One piece scored; None where it holds too little speech."""
    try:
        passage = pass_channel(audio, detector.settings.channel)
    except ValueError:  # silent between the band edges
        return None
    band, active = passage.band, passage.active
    if active.sum() * FRAME < LEAST_SPEECH_S * RATE_HZ:
        return None
    piece = Piece(start, audio, passage, detector.clip_residuals(passage.audio, active)[1])
    anomaly = detector.score_residuals(piece.levels)
    # Peaks and pauses of the recording itself, before the channel levels them.
    mean_square = float(np.mean(band[np.repeat(active, FRAME)[: len(band)]] ** 2)) + 1e-12
    levels = frame_levels(band)
    loud, quiet = np.quantile(levels, 0.95), np.quantile(levels, 0.1)
    crest_db = float(20 * np.log10(np.abs(band).max() + 1e-12) - 10 * np.log10(mean_square))
    return Part(start, len(audio) / RATE_HZ, float(active.sum()) * FRAME / RATE_HZ, float(loud), anomaly,
                detector.p_value(anomaly), crest_db, float(loud - quiet)), piece


def judged_all(paths: Iterable[Path | str], folder: Path | str | None = None, alpha: float = 0.05,
               jobs: int = 1, channel: int | None = None, precision: str = "fp32") -> Iterator[Recording]:
    """Judge many recordings in their order, in `jobs` processes where that is more than one."""
    paths = list(paths)
    if jobs <= 1 or len(paths) < 2:
        detector, limits, _ = load_detector(folder)
        detector.in_precision(precision)
        yield from (judged(detector, path, limits, alpha, channel=channel) for path in paths)
        return
    import concurrent.futures
    import multiprocessing

    context, others = multiprocessing.get_context("spawn"), set(multiprocessing.active_children())
    with concurrent.futures.ProcessPoolExecutor(jobs, context, _start, (folder, alpha, channel, precision)) as pool:
        try:
            yield from pool.map(_work, paths)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
            raise


_worker: dict[str, object] = {}  # arguments of `judged` that a worker process loads once


def _start(folder: Path | str | None, alpha: float, channel: int | None, precision: str) -> None:
    import signal

    import torch

    from lib.engine import end_with_parent

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    end_with_parent()
    torch.set_num_threads(1)
    detector, limits, _ = load_detector(folder)
    _worker.update(detector=detector.in_precision(precision), limits=limits, alpha=alpha, channel=channel)


def _work(path: Path | str) -> Recording:
    return judged(path=path, **_worker)


def calibrate(paths: Iterable[Path | str], out: Path | str, folder: Path | str | None = None) -> tuple[Detector, list[str]]:
    """Recalibrate a detector on the user's real speech (about four minutes or more) and save it, with its limits, in `out`.

    Returns the detector and the files that were left out, with the reason. Raises DetectorError for too little speech.
    """
    detector, limits, _ = load_detector(folder)
    kept, skipped, found = [], [], []
    for path in paths:
        try:
            report = read_audio(path, RATE_HZ)[1]
        except AudioError as error:
            skipped.append(shown(str(error)))
            continue
        kept.append(path)
        found += [(report.effective_bandwidth_hz, part.crest_db, part.range_db) for part in judged(detector, path).parts]
    detector.fit(kept)
    lowest = np.quantile(np.array(found), 0.02, axis=0).tolist()
    limits = Limits(*(min(value, limit) for value, limit in zip(lowest, dataclasses.astuple(limits))))
    detector.save(out)
    (Path(out) / KNOWN).unlink(missing_ok=True)  # calibration moved every anomaly
    write_json(Path(out) / "limits.json", dataclasses.asdict(limits))
    return detector, skipped
