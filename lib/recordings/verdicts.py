"""Owns verdicts on recordings: which get one, what it is, and the form in which it is told.

A recording is scored in pieces as long as the clips that the detector was calibrated on (5 s), because scores of longer and
shorter ones do not compare. Its anomaly is the median over the pieces, leaving out pauses (pieces 35 dB below the loudest).
The verdict compares that with the calibration scores of real speech: anomalous where the conformal p-value is at most alpha,
else consistent with real speech. No verdict is given ("cannot say") where

- the reader refuses the file (lib.data.audio: missing, damaged, non-finite, silent, antiphase, shorter than 0.3 s);
- no piece holds 1 s of active frames, or the whole 1 s that is not silent; more than 1 % of the samples are clipped;
- it is outside what calibration covers (`Limits`): nothing above 5.5 kHz, while the detector listens up to 6 kHz; peaks
  less than 7 dB above the mean level, as after heavy limiting; loud and quiet frames less than 12 dB apart, as in noise,
  music or babble. 99 % of the study's real clips pass each of these; a detector calibrated elsewhere carries its own limits;
- the calibration has too few clips for any p-value to reach alpha.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from lib.data.audio import AudioReport
from lib.evaluate.metrics import conformal

SCHEMA = 1
REAL, FAKE, UNKNOWN = "consistent with real speech", "anomalous", "cannot say"
LEAST_SPEECH_S, PAUSE_DB, MOST_CLIPPED = 1.0, 35.0, 0.01


@dataclass(frozen=True)
class Limits:
    """The least that a recording must have to get a verdict: numbers of its channel that calibration speech has."""

    bandwidth_hz: float = 5500.0  # highest frequency that is not far below the rest
    crest_db: float = 7.0  # peak above the mean level of the active speech, between the channel's band edges
    range_db: float = 12.0  # loud (95 %) above quiet (10 %) 20 ms frames

    def reason(self, found: Limits) -> str:
        """Why a recording with the numbers `found` gets no verdict; empty where it gets one."""
        if found.bandwidth_hz < self.bandwidth_hz:
            return (f"narrow band: nothing above {found.bandwidth_hz / 1000:.1f} kHz, calibration speech reaches "
                    f"{self.bandwidth_hz / 1000:.1f} kHz or more")
        if found.crest_db < self.crest_db:
            return (f"limited: peaks {found.crest_db:.1f} dB above the mean level, in calibration speech at least "
                    f"{self.crest_db:.1f} dB")
        if found.range_db < self.range_db:
            return (f"noise, music or babble: loud and quiet frames {found.range_db:.1f} dB apart, in calibration speech at "
                    f"least {self.range_db:.1f} dB")
        return ""


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


@dataclass(frozen=True)
class Recording:
    """What is known of one recording after it was judged; numbers are None where it could not be scored."""

    path: str
    verdict: str  # REAL, FAKE or UNKNOWN
    why: str = ""  # of UNKNOWN
    anomaly: float | None = None  # up = fake
    p_value: float | None = None  # share of calibration speech at least as anomalous
    seconds: float | None = None
    speech_s: float | None = None
    bandwidth_hz: float | None = None
    crest_db: float | None = None
    range_db: float | None = None
    warnings: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()

    @property
    def words(self) -> str:
        return f"{UNKNOWN}: {self.why}" if self.verdict == UNKNOWN else self.verdict


def verdict_on(path: str, report: AudioReport, parts: tuple[Part, ...], calibration: np.ndarray, limits: Limits,
               alpha: float) -> Recording:
    """The verdict on a recording whose pieces were scored, against the sorted anomalies of real calibration speech."""
    loudest = max((part.level_db for part in parts), default=0.0)
    parts = tuple(part for part in parts if part.level_db > loudest - PAUSE_DB)
    facts = {"seconds": report.seconds, "speech_s": sum(part.speech_s for part in parts) if parts else None, "parts": parts,
             "bandwidth_hz": report.effective_bandwidth_hz, "warnings": report.warnings}
    sound_s = (1 - report.silence_ratio) * report.seconds
    if not parts or sound_s < LEAST_SPEECH_S:
        why = f"too little speech: {LEAST_SPEECH_S:.0f} s at a stretch is needed, {sound_s:.1f} s in all is not silent"
        return Recording(path, UNKNOWN, why, **facts)
    middle = {name: float(np.median([getattr(part, name) for part in parts])) for name in ("anomaly", "crest_db", "range_db")}
    p_value, count = conformal(calibration, middle["anomaly"]), len(calibration)
    flagged = [part for part in parts if part.p_value <= alpha]
    if len(parts) > 1 and flagged:
        worst = max(flagged, key=lambda part: part.anomaly)
        facts["warnings"] += (f"parts: {len(flagged)} of {len(parts)} pieces are anomalous by themselves, about "
                              f"{alpha * len(parts):.1f} expected by chance; the most anomalous starts at {worst.start_s:.0f} s",)
    why = limits.reason(Limits(report.effective_bandwidth_hz, middle["crest_db"], middle["range_db"]))
    if report.clipped_ratio > MOST_CLIPPED:
        why = f"clipped: {report.clipped_ratio:.1%} of the samples are flat at full scale"
    if not why and 1 / (count + 1) > alpha:
        why = (f"the detector was calibrated on {count} clips, which cannot support alpha {alpha:g}; calibrate on "
               f"{math.ceil(1 / alpha - 1)} or more, or raise alpha")
    verdict = UNKNOWN if why else FAKE if p_value <= alpha else REAL
    return Recording(path, verdict, why, p_value=p_value, **middle, **facts)


def as_json(recordings: list[Recording], detector: dict[str, object], alpha: float) -> dict[str, object]:
    """The JSON form of `score --json`; `schema` changes when a field changes its name or meaning.

    `{"schema": 1, "alpha", "detector": {"folder", "sha256", "calibration_clips", "precision"}, "files": [...]}`; a file has every field of
    `Recording` (null where it could not be scored), and `parts`, a list with every field of `Part`.
    """
    return {"schema": SCHEMA, "alpha": alpha, "detector": detector, "files": [dataclasses.asdict(each) for each in recordings]}
