"""Owns whether a recording is like those that the detector was calibrated on: the answer "outside what I know".

Six numbers of a recording say how it was recorded and nothing of how its speech was made: noise floor, bandwidth, spectral tilt,
peaks, clipped share, seconds of active speech. They are standardised by median and spread of bona fide speech; the largest
deviation is compared with those of further bona fide clips (conformal outlier test, Bates et al. 2023). No fake is seen anywhere,
and a fake in a known condition is not outside.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from lib.channel import active_frames
from lib.traits import traits

# The least spread of each number: bona fide speech from one studio hardly varies, and a hair's breadth is no new condition.
NUMBERS = {"noise_floor_db": 2.0, "bandwidth_hz": 300.0, "tilt_db_per_octave": 0.5, "crest_db": 0.7, "clipped_share": 0.001,
           "speech_s": 0.3}


def condition_numbers(audio: np.ndarray) -> np.ndarray:
    """The six numbers of `NUMBERS` (`lib.traits.traits`) of audio (samples,) at 16 kHz, before the shared channel, (6,).

    An offset is taken out first. The noise floor counts as at most 60 dB below the active level: the shared channel's own floor
    is higher.
    """
    audio = np.asarray(audio, dtype=np.float64)
    audio = audio - audio.mean()
    found = traits(audio, active_frames(audio, 35.0))
    found["noise_floor_db"] = max(-60.0, found["noise_floor_db"])
    return np.array([found[name] for name in NUMBERS])


@dataclass(frozen=True)
class Known:
    """What bona fide calibration speech is like."""

    middle: np.ndarray  # (6,) median of each number
    spread: np.ndarray  # (6,) scaled median absolute deviation
    limit: float  # largest standardised deviation that is still known

    @classmethod
    def fit(cls, fitting: Iterable[np.ndarray], calibration: Iterable[np.ndarray], rate: float = 0.02) -> Known:
        """From bona fide recordings before the shared channel: middle and spread from `fitting`, the limit from `calibration`, of
        which at most the share `rate` is outside. Raises ValueError for fewer than 3 recordings of either."""
        fitted, further = (np.array([condition_numbers(audio) for audio in part]) for part in (fitting, calibration))
        if min(len(fitted), len(further)) < 3:
            raise ValueError(f"expected at least 3 bona fide recordings twice, found {len(fitted)} and {len(further)}")
        middle = np.median(fitted, axis=0)
        spread = np.maximum(1.4826 * np.median(np.abs(fitted - middle), axis=0), list(NUMBERS.values()))
        found = np.sort(np.abs((further - middle) / spread).max(1))
        # Conformal: p <= rate where fewer than rate * (n + 1) - 1 calibration clips are as extreme; few clips: beyond them all.
        rank = min(len(found), int(np.ceil((1 - rate) * (len(found) + 1))))
        return cls(middle, spread, float(found[rank - 1]))

    def deviations(self, audio: np.ndarray) -> dict[str, float]:
        """Standardised deviation of each number of a recording."""
        return dict(zip(NUMBERS, ((condition_numbers(audio) - self.middle) / self.spread).tolist()))

    def outside(self, audio: np.ndarray) -> bool:
        """Whether a recording (samples,) is outside what calibration covers."""
        return max(abs(value) for value in self.deviations(audio).values()) > self.limit


def known_from(study, experiment: str) -> Known:
    """What the bona fide validation speech of an experiment is like: numbers from its scaling part, limit from its threshold part."""
    from lib.audio import read_audio
    from lib.paths import DATA

    parts = ([read_audio(DATA / path, strict=False)[0] for path in study.part(experiment, name).path] for name in ("scaling", "threshold"))
    return Known.fit(*parts)
