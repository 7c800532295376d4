"""Owns robustness (notebook 42): conditions, scores under them, and abstention outside what calibration knows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lib import seeds
from lib.data.audio import read_audio
from lib.data.channel import active_frames, apply_channel, traits
from lib.data.degradations import (
    Degradation,
    MissingEncoder,
    babble,
    clipped,
    coded,
    cut,
    gain,
    joined,
    noise,
    pauses_cut,
    resampled,
    room,
    silence,
)
from lib.detector import Detector
from lib.evaluate.systems import judged
from lib.paths import DATA, clocked

if TYPE_CHECKING:
    from lib.study import Study

CONDITIONS: dict[str, dict[str, Degradation]] = {
    "codec": {
        **{f"MP3 {kbps} kb/s": coded("libmp3lame", "mp3", kbps=kbps) for kbps in (96, 64, 32, 16)},
        **{f"AAC {kbps} kb/s": coded("aac", "adts", kbps=kbps) for kbps in (64, 32, 16)},
        **{f"Opus {kbps} kb/s": coded("libopus", "ogg", kbps=kbps) for kbps in (32, 16, 8)},
        **{f"Vorbis {kbps} kb/s": coded("libvorbis", "ogg", kbps=kbps) for kbps in (80, 48, 32)},
        **{f"G.722 {kbps} kb/s": coded("g722", "g722", kbps=kbps) for kbps in (64, 48)},
        "mu-law 128 kb/s": coded("pcm_mulaw", "mulaw", rate_hz=16000),
        "mu-law 64 kb/s": coded("pcm_mulaw", "mulaw", rate_hz=8000),
    },
    "noise": {
        **{f"white {snr} dB": partial(noise, snr_db=snr) for snr in (30, 20, 10, 0)},
        **{f"pink {snr} dB": partial(noise, snr_db=snr, colour="pink") for snr in (30, 20, 10, 0)},
    },
    "room": {f"RT60 {rt60} s": partial(room, rt60_s=rt60) for rt60 in (0.2, 0.5, 1.0)},
    "rate": {f"{rate / 1000:g} kHz and back": partial(resampled, rate_hz=rate)
             for rate in (8000, 11025, 22050, 32000, 44100, 48000)},
    "length": {**{f"{seconds:g} s": partial(cut, seconds=seconds) for seconds in (0.5, 1.0, 2.0, 4.0)},
               "10 s": partial(joined, seconds=10.0)},
    "silence": {"1 s of silence before": partial(silence, seconds=1.0),
                "1 s of silence inside": partial(silence, seconds=1.0, inside=True),
                "pauses cut": pauses_cut},
    "level": {"gain -20 dB": partial(gain, db=-20),
              **{f"clipped {share:.0%}": partial(clipped, share=share) for share in (0.01, 0.05, 0.2)}},
}
"""Conditions of notebook 42 by group; `robustness` adds the babble, which needs voices."""


def robustness(study: Study, talkers: int = 24) -> dict[str, dict[str, Degradation]]:
    """`CONDITIONS`, and babble of the multi-speaker experiment's bona fide training voices, which are in no test."""
    clips = study.part("multi", "train")
    clips = clips.iloc[seeds.stream(0, "babble").permutation(len(clips))[:talkers]]
    voices = [read_audio(DATA / path, strict=False)[0] for path in clips.path]
    talk = {f"babble {snr} dB": partial(babble, snr_db=snr, voices=voices) for snr in (30, 20, 10, 0)}
    return {group: names | (talk if group == "noise" else {}) for group, names in CONDITIONS.items()}


@clocked("scoring")
def degraded_scores(study: Study, detector: Detector, clips: pd.DataFrame, conditions: dict[str, Degradation],
                    limit: int = 40, familiar: Familiar | None = None) -> pd.DataFrame:
    """Anomaly of up to `limit` clips of each generator under each condition: `clip_id, generator, role, parent,
    speaker, condition, anomaly`; with `familiar`, also `outside`, whether the clip is outside what calibration covers;
    of a detector with all evidence, also what lib.evaluate.systems.judged says.

    A clip that a condition leaves without speech has no anomaly (NaN). A condition that cannot be made (a missing
    encoder) is left out and said.
    """
    clips = clips.groupby("generator", sort=False).head(limit).reset_index(drop=True)
    audios = [read_audio(DATA / path, strict=False)[0] for path in clips.path]
    # The next clip of the same source, for conditions that need a second one.
    followers = np.zeros(len(clips), dtype=int)
    for index in clips.groupby("generator", sort=False).indices.values():
        followers[index] = np.roll(index, -1)
    tables = []
    for name, degrade in conditions.items():
        joins = getattr(degrade, "func", None) is joined

        def scored(index: int, degrade: Degradation = degrade, name: str = name, joins: bool = joins) -> dict:
            second = {"other": audios[followers[index]]} if joins else {}
            touched = degrade(audios[index], seeds.stream(0, name, clips.clip_id[index]), **second)
            row = {"outside": familiar.outside(touched)} if familiar else {}
            try:
                if detector.evidence:
                    of_all = judged(detector, touched)
                    return row | of_all | {"anomaly": of_all["pyramid"]}
                anomaly = detector.score_prepared(*apply_channel(touched, study.settings.channel))
            except ValueError:
                anomaly = float("nan")
            return row | {"anomaly": anomaly}

        try:
            rows = pd.DataFrame(list(study.side_by_side(scored, range(len(clips)))))
        except MissingEncoder as error:
            print(f"left out: {name}: {error}")
            continue
        table = clips[["clip_id", "generator", "role", "parent", "speaker"]]
        tables.append(pd.concat([table.assign(condition=name), rows], axis=1))
    return pd.concat(tables, ignore_index=True)


NUMBERS = {"noise_floor_db": 2.0, "bandwidth_hz": 300.0, "tilt_db_per_octave": 0.5, "crest_db": 0.7,
           "clipped_share": 0.001, "speech_s": 0.3}
"""Numbers of a recording, each with its least spread: one studio's speech hardly varies, and a hair's breadth is no new
condition."""


def condition_numbers(audio: np.ndarray) -> np.ndarray:
    """The six numbers of `NUMBERS` (`lib.data.channel.traits`) of audio (samples,) before the shared channel, (6,).

    An offset is taken out first. The noise floor counts as at most 60 dB below the active level: the shared channel's
    own floor is higher.
    """
    audio = np.asarray(audio, dtype=np.float64)
    audio = audio - audio.mean()
    numbers = traits(audio, active_frames(audio, 35.0))
    numbers["noise_floor_db"] = max(-60.0, numbers["noise_floor_db"])
    return np.array([numbers[name] for name in NUMBERS])


@dataclass(frozen=True)
class Familiar:
    """What bona fide calibration speech is like: outside of it, no verdict."""

    middle: np.ndarray  # (6,) median of each number
    spread: np.ndarray  # (6,) scaled median absolute deviation
    limit: float  # largest standardised deviation that is still familiar

    @classmethod
    def fit(cls, fitting: Iterable[np.ndarray], calibration: Iterable[np.ndarray], rate: float = 0.02) -> Familiar:
        """From bona fide recordings before the shared channel: middle and spread from `fitting`, the limit from
        `calibration`, of which at most the share `rate` is outside. Raises ValueError for fewer than 3 of either."""
        fitted, further = (np.array([condition_numbers(audio) for audio in part]) for part in (fitting, calibration))
        if min(len(fitted), len(further)) < 3:
            raise ValueError(f"expected at least 3 bona fide recordings twice, found {len(fitted)} and {len(further)}")
        middle = np.median(fitted, axis=0)
        spread = np.maximum(1.4826 * np.median(np.abs(fitted - middle), axis=0), list(NUMBERS.values()))
        extremes = np.sort(np.abs((further - middle) / spread).max(1))
        # Conformal: p <= rate where fewer than rate (n + 1) - 1 calibration clips are as extreme; few: beyond them all.
        rank = min(len(extremes), int(np.ceil((1 - rate) * (len(extremes) + 1))))
        return cls(middle, spread, float(extremes[rank - 1]))

    @classmethod
    def of(cls, study: Study, experiment: str) -> Familiar:
        """From an experiment's bona fide validation speech: numbers from its scaling, limit from its threshold part."""
        return cls.fit(*([read_audio(DATA / path, strict=False)[0] for path in study.part(experiment, name).path]
                         for name in ("scaling", "threshold")))

    def deviations(self, audio: np.ndarray) -> dict[str, float]:
        """Standardised deviation of each number of a recording."""
        return dict(zip(NUMBERS, ((condition_numbers(audio) - self.middle) / self.spread).tolist()))

    def outside(self, audio: np.ndarray) -> bool:
        """Whether a recording (samples,) is outside what calibration covers."""
        return max(abs(value) for value in self.deviations(audio).values()) > self.limit
