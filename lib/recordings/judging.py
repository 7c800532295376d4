"""Owns verdicts on recordings: how a file is read and scored piece by piece, which gets a verdict, and its JSON form.

A recording is scored in pieces as long as the clips that the detector was calibrated on (5 s), because scores of longer
and shorter ones do not compare. Its anomaly is the median over the pieces without pauses (35 dB below the loudest). The
verdict compares it with the anomalies of real calibration speech: anomalous where the conformal p-value is at most
alpha, else consistent with real speech. No verdict is given ("cannot say") where

- the reader refuses the file (lib.data.audio: missing, damaged, non-finite, silent, antiphase, shorter than 0.3 s);
- no piece holds 1 s of active frames, or the whole 1 s that is not silent; more than 1 % of the samples are clipped;
- it is outside what calibration covers (`Limits`): nothing above 5.5 kHz, while the detector listens up to 6 kHz; peaks
  less than 7 dB above the mean level, as after heavy limiting; loud and quiet frames less than 12 dB apart, as in
  noise, music or babble. 99 % of the study's real clips pass each; a detector calibrated elsewhere carries its own;
- the calibration has too few clips for any p-value to reach alpha.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soxr

from lib.data.audio import AudioError, AudioReport, header, iter_audio
from lib.data.channel import FRAME, Passage, frame_levels, pass_channel
from lib.detector import Detector
from lib.evaluate.metrics import conformal
from lib.model.checkpoints import DetectorError
from lib.model.discrepancy import Explanation
from lib.model.evidence import LIKE_LENGTH, Measured
from lib.model.lines import Lines
from lib.paths import SHIPPED, file_digest, shown
from lib.recordings.explaining import PAUSE_DB, Region, regions, spoken
from lib.settings import RATE_HZ, checked_alpha

REAL, FAKE, UNKNOWN = "consistent with real speech", "anomalous", "cannot say"
LEAST_SPEECH_S, MOST_CLIPPED = 1.0, 0.01
MOST_HZ = 48_000
"""Highest rate at which a recording is looked at; lines are looked for up to 11.7 kHz."""
PIECE_S = 8.0
"""Pieces for a detector with lines and texture: as long as the longest of its calibration recordings."""


@dataclass(frozen=True)
class Limits:
    """The least that a recording must have to get a verdict: numbers of its channel that calibration speech has."""

    bandwidth_hz: float = 5500.0  # highest frequency that is not far below the rest
    crest_db: float = 7.0  # peak above the mean level of the active speech, between the channel's band edges
    range_db: float = 12.0  # loud (95 %) above quiet (10 %) 20 ms frames

    def reason(self, numbers: Limits) -> str:
        """Why a recording with these `numbers` gets no verdict; empty where it gets one."""
        for name, (unit, text) in REASONS.items():
            value, least = getattr(numbers, name), getattr(self, name)
            if value < least:
                return text.format(value / unit, least / unit)
        return ""


REASONS = {
    "bandwidth_hz": (1000, "narrow band: nothing above {:.1f} kHz, calibration speech reaches {:.1f} kHz or more"),
    "crest_db": (1, "limited: peaks {:.1f} dB above the mean level, in calibration speech at least {:.1f} dB"),
    "range_db": (1, "noise, music or babble: loud and quiet frames {:.1f} dB apart, calibration speech {:.1f} or more"),
}


def compared_with(detector: Detector) -> int:
    """The number of real recordings with which each one is compared."""
    return min(LIKE_LENGTH, len(detector.evidence.seconds)) if detector.evidence else len(detector.calibration)


def load_detector(folder: Path | str | None = None, precision: str = "fp32") -> tuple[Detector, Limits, dict]:
    """A detector (by default the shipped one), its limits, and what names it in tables and JSON. Raises DetectorError,
    saying how to get a detector where none is there."""
    if not folder and not (SHIPPED / "detector.json").exists():
        raise DetectorError(f"no detector ships with this copy (looked in {SHIPPED}): train one with `make study`, "
                            "which keeps it below runs/study/detectors, and name its folder with --detector")
    folder = Path(folder or SHIPPED)
    detector = Detector.load(folder).in_precision(precision)
    clips, limits, source = compared_with(detector), Limits(), {}
    if not clips:
        raise DetectorError(f"{folder} has no calibration scores of real speech; calibrate it first")
    try:
        sheet = json.loads((folder / "limits.json").read_text(encoding="utf-8"))
        limits = Limits(**{name: float(sheet[name]) for name in REASONS})
        source = {name: sheet[name] for name in ("name", "recordings", "speech_s") if name in sheet}
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        name = type(error).__name__
        raise DetectorError(f"{folder / 'limits.json'} is damaged ({name}: {error}); calibrate again") from None
    return detector, limits, {
        "folder": shown(folder), "sha256": file_digest(folder / "detector.safetensors"), **source,
        "calibration_clips": clips, "smallest_alpha": round(1 / (clips + 1), 5), "precision": precision}


@dataclass(frozen=True)
class Part:
    """One scored piece of a recording."""

    start_s: float
    seconds: float
    speech_s: float
    level_db: float  # of its loud frames, dB full scale
    anomaly: float  # up = fake
    p_value: float
    crest_db: float
    range_db: float
    steadiness: float | None = None  # of the pyramid's readings over time; up = fake


@dataclass(frozen=True)
class Evidence:
    """What one kind of evidence says of a whole recording."""

    anomaly: float | None  # up = fake; None where there was nothing to measure
    p_value: float  # share of calibration speech at least as anomalous


@dataclass(frozen=True)
class Recording:
    """What is known of one recording after it was judged; numbers are None where it could not be scored."""

    path: str
    verdict: str  # REAL, FAKE or UNKNOWN
    why: str = ""  # of UNKNOWN
    says: str = ""  # of FAKE: which evidence spoke
    anomaly: float | None = None  # of all evidence together; up = fake
    p_value: float | None = None  # of all evidence together
    evidence: dict[str, Evidence] = field(default_factory=dict)  # by its kind, of EVIDENCE
    lines: Lines | None = None  # the strongest constant lines
    seconds: float | None = None
    speech_s: float | None = None
    bandwidth_hz: float | None = None
    crest_db: float | None = None
    range_db: float | None = None
    decoder: str | None = None
    warnings: tuple[str, ...] = ()
    regions: tuple[Region, ...] = ()  # of the pieces that are anomalous by themselves
    parts: tuple[Part, ...] = ()

    @property
    def words(self) -> str:
        reason = self.why or self.says
        return f"{self.verdict}: {reason}" if reason else self.verdict

    @property
    def line(self) -> str:
        numbers = f"  p {self.p_value:.3f}  anomaly {self.anomaly:.2f}  {self.seconds:.1f} s" if self.evidence else ""
        return f"{self.path}: {self.words}{numbers}"


@dataclass(frozen=True)
class Piece:
    """A piece of a recording on its way through the detector."""

    start_s: float
    audio: np.ndarray  # (samples,) as read, at 16 kHz
    passage: Passage
    explanation: Explanation | None = None  # where it was asked for
    measured: Measured | None = None  # of a detector with all evidence, at the recording's own rate


def pieces(path: Path | str, piece_s: float, channel: int | None = None,
           rate_hz: int = RATE_HZ) -> Iterator[tuple[float, np.ndarray]]:
    """(start_s, samples at `rate_hz`) of each `piece_s`; a last one below half of it joins the one before. Returns
    AudioReport."""
    waiting, stream = None, iter_audio(path, rate_hz, piece_s, channel=channel)
    while True:
        try:
            start_s, audio = next(stream)
        except StopIteration as end:
            if waiting:
                yield waiting
            return end.value
        if waiting and len(audio) < 0.5 * piece_s * rate_hz:
            waiting = waiting[0], np.concatenate([waiting[1], audio])
            continue
        if waiting:
            yield waiting
        waiting = start_s, audio


def judged(detector: Detector, path: Path | str, limits: Limits | None = None, alpha: float = 0.05,
           visit: Callable[[Part, Piece], None] | None = None, channel: int | None = None) -> Recording:
    """Read, score and judge one recording, or one of its channels. Never raises for what is in the file.

    `visit` is called with each scored piece and its map; they are not kept. Raises SettingsError for a wrong alpha.
    """
    alpha, path, settings = checked_alpha(alpha), Path(str(path)), detector.settings
    parts, places, most_s, measured = [], {}, 0.0, {}
    try:
        rate_hz = min(max(header(path)[1], RATE_HZ), MOST_HZ) if detector.evidence else RATE_HZ
        stream = pieces(path, PIECE_S if detector.evidence else settings.data.max_s, channel, rate_hz)
        while True:
            start_s, own = next(stream)
            audio = own if rate_hz == RATE_HZ else soxr.resample(own, rate_hz, RATE_HZ, quality="HQ")
            try:
                passage = pass_channel(audio, settings.channel)
            except ValueError:
                continue  # silent between the edges of the band
            speech_s = float(passage.active.sum()) * FRAME / RATE_HZ
            most_s = max(most_s, speech_s)
            if speech_s < LEAST_SPEECH_S:
                continue
            part, piece = _scored(detector, start_s, audio, passage, visit is not None)
            parts.append(part)
            if detector.evidence:
                measured[part] = detector.measure(own, rate_hz, (part.anomaly, part.steadiness))
                piece = dataclasses.replace(piece, measured=measured[part])
            if part.p_value <= alpha and detector.scale:
                places[part] = regions(piece.explanation or _explanation(detector, piece), detector.map_limits[1])
            if visit:
                visit(part, piece)
    except StopIteration as end:
        report = end.value
    except AudioError as error:
        return Recording(shown(path), UNKNOWN, shown(str(error).removeprefix(f"{str(path)!r}: ")))
    return verdict_on(shown(path), report, parts, places, most_s, detector, limits or Limits(), alpha, measured)


def _explanation(detector: Detector, piece: Piece) -> Explanation:
    start_s = piece.start_s + piece.passage.start / RATE_HZ
    return detector.explain_prepared(piece.passage.audio, piece.passage.active, start_s)


def _scored(detector: Detector, start_s: float, audio: np.ndarray, passage: Passage, drawn: bool) -> tuple[Part, Piece]:
    """One piece scored, with its map where it is to be `drawn`."""
    piece, band, active = Piece(start_s, audio, passage), passage.band, passage.active
    if drawn:
        piece = dataclasses.replace(piece, explanation=(why := _explanation(detector, piece)))
    seen = (why.anomaly, why.steadiness) if drawn else detector.seen(detector.clip_residuals(passage.audio, active)[1])
    # Peaks and pauses of the recording itself, before the channel levels them.
    mean_square = float(np.mean(band[np.repeat(active, FRAME)[: len(band)]] ** 2)) + 1e-12
    loud, quiet = np.quantile(frame_levels(band), [0.95, 0.1])
    crest_db = float(20 * np.log10(np.abs(band).max() + 1e-12) - 10 * np.log10(mean_square))
    return Part(start_s, len(audio) / RATE_HZ, float(active.sum()) * FRAME / RATE_HZ, float(loud), seen[0],
                conformal(detector.calibration, seen[0]), crest_db, float(loud - quiet),
                None if np.isnan(seen[1]) else seen[1]), piece


def weighed(detector: Detector, parts: tuple[Part, ...], measured: dict[Part, Measured]) -> dict[str, object]:
    """Fields of `Recording` that its parts give together: each kind of evidence, anomaly, p-value and lines.

    Statistics are means over the pieces, compared with real recordings as long as one piece, which vary more: true to
    alpha or on the safe side. Without lines and texture, the median anomaly of the pieces against the calibration.
    """
    if not detector.evidence:
        anomaly = float(np.median([part.anomaly for part in parts]))
        p_value = conformal(detector.calibration, anomaly)
        return {"anomaly": anomaly, "p_value": p_value, "evidence": {"pyramid": Evidence(anomaly, p_value)}}
    pieces, joint = [measured[part] for part in parts], detector.evidence
    measures = np.ma.masked_invalid([piece.values for piece in pieces])  # NaN: could not be measured
    values = measures.mean(axis=0).filled(np.nan)
    seconds = float(np.mean([piece.seconds for piece in pieces]))
    alone = joint.p_values(values, seconds)
    return {"anomaly": joint.joint(values, seconds), "p_value": joint.p_value(values, seconds),
            "evidence": {name: Evidence(None if np.isnan(value) else float(value), alone[name])
                         for name, value in zip(joint.names, values)},
            "lines": max((piece.lines for piece in pieces), key=lambda lines: lines.strength)}


def verdict_on(path: str, report: AudioReport, parts: list[Part], places: dict[Part, tuple[Region, ...]], most_s: float,
               detector: Detector, limits: Limits, alpha: float, measured: dict[Part, Measured]) -> Recording:
    """The verdict on a recording whose pieces were scored and `measured`, against real calibration speech.

    `places` are the regions of the maps of its parts, `most_s` is the speech in the piece that holds most of it.
    """
    loudest = max((part.level_db for part in parts), default=0.0)
    parts = tuple(part for part in parts if part.level_db > loudest - PAUSE_DB)
    facts = {"seconds": report.seconds, "speech_s": sum(part.speech_s for part in parts) if parts else None,
             "bandwidth_hz": report.effective_bandwidth_hz, "decoder": getattr(report, "decoder", "libsndfile"),
             "warnings": report.warnings, "parts": parts,
             "regions": tuple(region for part in parts for region in places.get(part, ()))}
    sound_s = (1 - report.silence_ratio) * report.seconds
    if not parts or sound_s < LEAST_SPEECH_S:
        least, most = f"{LEAST_SPEECH_S:.2f} s", f"{math.floor(100 * min(most_s, sound_s)) / 100:.2f} s"
        return Recording(path, UNKNOWN, f"too little speech: {least} at a stretch is needed, found {most}", **facts)
    middle = {name: float(np.median([getattr(part, name) for part in parts])) for name in ("crest_db", "range_db")}
    facts |= weighed(detector, parts, measured)
    clips = compared_with(detector)
    flagged = [part for part in parts if part.p_value <= alpha]
    if len(parts) > 1 and flagged:
        worst, chance = max(flagged, key=lambda part: part.anomaly), alpha * len(parts)
        facts["warnings"] += (f"parts: {len(flagged)} of {len(parts)} pieces are anomalous by themselves, about "
                              f"{chance:.1f} expected by chance; the most anomalous starts at {worst.start_s:.0f} s",)
    why = limits.reason(Limits(report.effective_bandwidth_hz, **middle))
    if report.clipped_ratio > MOST_CLIPPED:
        why = f"clipped: {report.clipped_ratio:.1%} of the samples are flat at full scale"
    if not why and 1 / (clips + 1) > alpha:
        why = (f"the detector was calibrated on {clips} clips, which cannot support alpha {alpha:g}; calibrate on "
               f"{math.ceil(1 / alpha - 1)} or more, or raise alpha")
    verdict = UNKNOWN if why else FAKE if facts["p_value"] <= alpha else REAL
    recording = Recording(path, verdict, why, **middle, **facts)
    return dataclasses.replace(recording, says=spoken(recording, alpha)) if verdict == FAKE else recording
