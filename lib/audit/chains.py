"""Owns a score that does not listen where recording chains speak: directions in which codecs, noise, equalisers and rates move the
discrepancy profile of bona fide speech are found and left out of a score of that profile.

Nuisance attribute projection, as in speaker verification (Solomonoff, Campbell and Boardman 2005), with recording chains as the
nuisance. Bona fide validation clips alone decide everything, also how many directions are left out; no fake is seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lib import seeds
from lib.data.channel import apply_channel
from lib.data.degradations import MissingEncoder, ffmpeg_codec, noise, resampled, tilted
from lib.evaluate import metrics

if TYPE_CHECKING:
    from lib.detector import Detector
    from lib.study import Study

Chain = Callable[[np.ndarray, np.random.Generator], np.ndarray]  # audio (samples,) and a random stream -> audio

CHAINS: dict[str, Chain] = {
    "white noise": lambda audio, random: noise(audio, random, random.uniform(22, 42)),
    "pink noise": lambda audio, random: noise(audio, random, random.uniform(22, 42), "pink"),
    "Vorbis": lambda audio, random: ffmpeg_codec(audio, random, "libvorbis", "ogg", kbps=int(random.integers(40, 90))),
    "Opus": lambda audio, random: ffmpeg_codec(audio, random, "libopus", "ogg", kbps=int(random.integers(14, 40))),
    "MP3": lambda audio, random: ffmpeg_codec(audio, random, "libmp3lame", "mp3", kbps=int(random.choice([32, 48, 64, 96]))),
    "equaliser tilt": lambda audio, random: tilted(audio, random, random.uniform(-1.5, 1.5)),
    "rate and back": lambda audio, random: resampled(audio, random, int(random.choice([11025, 22050, 44100]))),
}
"""Each with random strength. AAC, G.722, mu-law, babble, rooms, clipping and levels are left for the test of notebook 42."""
COUNTS = (0, 1, 2, 4, 8, 16, 32)
"""Numbers of directions that are compared."""
UNHEARD = 0.55
"""A chain counts as unheard where real speech through it is told from the same kind of speech without it at this AUC or below."""


def chain_profiles(study: Study, detector: Detector, clips: pd.DataFrame) -> pd.DataFrame:
    """Profiles of bona fide `clips` through every second chain each: `clip_id, chain, profile` (dimension,).

    A chain whose encoder is missing is left out and said."""
    from lib.data.audio import read_audio
    from lib.paths import DATA

    kind, lacking = f"profile/{detector.settings.scoring.scaling}", set()

    def of(index: int) -> list[tuple[str, str, np.ndarray]]:
        audio, rows = read_audio(DATA / clips.path.iloc[index], strict=False)[0], []
        for chain in list(CHAINS)[index % 2 :: 2]:
            try:
                touched = CHAINS[chain](audio, seeds.stream(0, "chain", chain, clips.clip_id.iloc[index]))
                statistics = detector.statistics(*apply_channel(touched, study.settings.channel), *detector.wanted())
                rows.append((clips.clip_id.iloc[index], chain, statistics[kind]))
            except MissingEncoder as error:
                lacking.add(f"left out: {chain}: {error}")
        return rows

    found = [row for rows in study.side_by_side(of, range(len(clips))) for row in rows]
    for line in sorted(lacking):
        print(line)
    return pd.DataFrame(found, columns=["clip_id", "chain", "profile"])


def directions(shifts: np.ndarray, most: int = max(COUNTS)) -> np.ndarray:
    """Up to `most` orthonormal directions (direction, dimension) that hold most of the square of `shifts` (clip, dimension),
    largest first. Raises ValueError for non-finite shifts or none."""
    if not len(shifts) or not np.isfinite(shifts).all():
        raise ValueError(f"expected finite shifts (clip, dimension), found shape {np.shape(shifts)}")
    return np.linalg.svd(np.asarray(shifts, dtype=np.float64), full_matrices=False)[2][:most]


class Chains:
    """What chains do to the profiles of one detector, from bona fide validation speech: directions from the clips behind the
    scaling, the number of them from the clips behind the threshold."""

    def __init__(self, study: Study, detector: Detector, experiment: str) -> None:
        self.detector = detector
        kind = f"profile/{detector.settings.scoring.scaling}"
        parts = {name: study.part(experiment, name) for name in ("scaling", "threshold")}
        self.clean = {name: study.statistics(detector, part, *detector.wanted())[kind] for name, part in parts.items()}
        self.touched = {name: chain_profiles(study, detector, part) for name, part in parts.items()}
        at = {clip: index for index, clip in enumerate(parts["scaling"].clip_id)}
        origin = self.clean["scaling"][[at[clip] for clip in self.touched["scaling"].clip_id]]
        shifts = (np.stack(self.touched["scaling"].profile) - origin) / detector.typicality.deviation
        self.directions = directions(shifts)

    def table(self) -> pd.DataFrame:
        """One row a number of directions left out: how well real speech through each chain is told from clean real speech (AUC,
        threshold part; 0.5 is unheard), and the mean over chains."""
        rows, pooling = [], self.detector.settings.scoring.pooling
        for count in [count for count in COUNTS if count <= len(self.directions)]:
            model = self.detector.typicality.without(self.directions[:count])
            clean = model.score(pooling, self.clean["threshold"])
            told = {chain: metrics.area_under_curve(-clean, -model.score(pooling, np.stack(part.profile)))
                    for chain, part in self.touched["threshold"].groupby("chain", sort=False)}
            rows.append({"directions left out": count, **told, "mean over chains": float(np.mean(list(told.values())))})
        return pd.DataFrame(rows)

    def fewest(self, table: pd.DataFrame) -> int:
        """The fewest directions after which chains are unheard on average; the most that were tried where none does it."""
        enough = table[table["mean over chains"] <= UNHEARD]["directions left out"]
        return int(enough.iloc[0] if len(enough) else table["directions left out"].iloc[-1])

    def projected(self, count: int) -> Detector:
        """The detector with `count` directions left out and its threshold fitted anew on the same clips."""
        from lib.detector import Detector

        one = self.detector
        other = Detector(one.settings, one.teacher, one.student)
        other.scaling, other.typicality = one.scaling, one.typicality.without(self.directions[:count])
        other.calibration = np.sort(other.typicality.score(one.settings.scoring.pooling, self.clean["threshold"]))
        other.fitted_on = dict(one.fitted_on)
        return other
