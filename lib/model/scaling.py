"""Owns discrepancy scaling and typicality: statistics of real speech, and the discrepancy in units of them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch.nn import functional

POOLINGS = ("mean", "max", "top", "quantile")


PROFILE_SCORES = ("one_sided", "two_sided", "profile")


SCORES = (*POOLINGS, *PROFILE_SCORES)


class Typicality:
    """How far a discrepancy profile is from those of bona fide speech.

    `distance` is the Mahalanobis distance with the Ledoit-Wolf shrunk covariance of bona fide profiles; `two_sided` the
    root mean square of the standardised profile, which needs no covariance; both see what is too odd and what is too normal.
    `one_sided` leaves out what is below the mean: for readings, less damage than in real speech. Directions that are left out
    (lib/audit/chains.py) count in none.
    """

    def __init__(self, mean: np.ndarray, deviation: np.ndarray, precision: np.ndarray, left_out: np.ndarray | None = None) -> None:
        # A channel that is dead on bona fide speech has no spread of its own; waking up once, it must not drown all others.
        self.deviation = np.maximum(deviation, 0.05 * np.median(deviation))
        self.mean, self.precision = mean, precision
        self.left_out = np.zeros((0, len(mean))) if left_out is None else left_out  # orthonormal (direction, dimension)

    @classmethod
    def fit(cls, profiles: np.ndarray) -> Typicality:
        """Fit on bona fide profiles (clip, dimension). Raises ValueError for fewer than 3 clips or non-finite values."""
        from sklearn.covariance import LedoitWolf

        profiles = np.asarray(profiles, dtype=np.float64)
        if len(profiles) < 3 or not np.isfinite(profiles).all():
            raise ValueError(f"typicality needs at least 3 finite bona fide profiles, found {len(profiles)}")
        model = cls(profiles.mean(0), profiles.std(0) + 1e-9, np.empty(0))
        model.precision = LedoitWolf().fit((profiles - model.mean) / model.deviation).precision_
        return model

    def distance(self, profiles: np.ndarray) -> np.ndarray:
        """Root of the squared Mahalanobis distance per dimension, (clip,); about 1 on bona fide speech."""
        z = self.standardised(profiles)
        return np.sqrt(np.maximum(np.einsum("ij,jk,ik->i", z, self.precision, z), 0) / z.shape[1])

    def two_sided(self, profiles: np.ndarray) -> np.ndarray:
        """Root mean square standardised profile, (clip,); about 1 on bona fide speech."""
        return np.sqrt((self.standardised(profiles) ** 2).mean(1))

    def one_sided(self, profiles: np.ndarray) -> np.ndarray:
        """Root mean square of the positive part of the standardised profile, (clip,)."""
        return np.sqrt((np.maximum(self.standardised(profiles), 0) ** 2).mean(1))

    def score(self, pooling: str, profiles: np.ndarray) -> np.ndarray:
        """The score of PROFILE_SCORES that `pooling` names, (clip,)."""
        return {"one_sided": self.one_sided, "two_sided": self.two_sided, "profile": self.distance}[pooling](profiles)

    def standardised(self, profiles: np.ndarray) -> np.ndarray:
        """Profiles (clip, dimension) in deviations of bona fide speech, without what is left out."""
        z = (np.asarray(profiles, dtype=np.float64) - self.mean) / self.deviation
        return z - (z @ self.left_out.T) @ self.left_out

    def without(self, left_out: np.ndarray) -> Typicality:
        """The same with orthonormal directions (direction, dimension) of the standardised profile left out."""
        return Typicality(self.mean, self.deviation, self.precision, left_out)


SCALINGS = ("none", "level", "frequency", "channel", "element", "signed", "read")
"""Kinds of discrepancy scaling; the last needs a teacher with readers."""


LOCAL_S, LOCAL_HZ = 0.2, 750.0
"""Extent of the neighbourhood over which the signed residual is averaged before it is standardised."""


READ_EXTENTS = ((0.4, 1500.0), (0.4, 6000.0))
"""Extents (seconds, Hz) of the neighbourhoods of the read residual; chosen on development fakes spliced into validation clips."""


def local_mean(parts: torch.Tensor, rows: int, frames: int) -> torch.Tensor:
    """Mean over a neighbourhood of odd size `rows` x `frames`, (channel, frequency, frame) -> the same; at the edges, over
    what there is of it."""
    row, frame, half = torch.arange(parts.shape[-2]), torch.arange(parts.shape[-1]), frames // 2
    near = ((row[:, None] - row).abs() <= rows // 2).to(parts.dtype)
    # Few rows: a product of matrices. Many frames: differences of running sums, in double precision since the sums grow.
    total = ((near / near.sum(1, keepdim=True)) @ parts).cumsum(-1, dtype=torch.float64)
    total = torch.cat([functional.pad(total, (half + 1, 0)), total[..., -1:].expand(*total.shape[:-1], half)], -1)
    count = (frame + half + 1).clamp_max(len(frame)) - (frame - half).clamp_min(0)
    return ((total[..., 2 * half + 1 :] - total[..., : len(frame)]) / count).to(parts.dtype)


def readings(parts: torch.Tensor, reader: torch.Tensor) -> torch.Tensor:
    """What a reader (kind, channel) makes of a residual (channel, frequency, frame): (kind, frequency, frame)."""
    return torch.einsum("kc,cfn->kfn", reader, parts)


def _readings(parts: torch.Tensor, reader: torch.Tensor, extents: list[tuple[int, int]]) -> torch.Tensor:
    """Locally averaged readings of a residual (channel, frequency, frame): (neighbourhood, kind, frequency, frame)."""
    read = readings(parts, reader)
    return torch.stack([local_mean(read, *extent) for extent in extents])


def moments(clip: list[tuple[torch.Tensor, torch.Tensor]], extent: list[tuple[int, int]], reading: list[torch.Tensor] = (),
            wide: list[list[tuple[int, int]]] = ()) -> list[list[torch.Tensor | float]]:
    """What `Scaling` is fitted from, of one clip (see Scaling.fit): for each level the number of active frames, and over them sums
    and sums of squares of the elements, of the discrepancy, and of the local means of residual and readings."""
    found = []
    for index, (parts, active) in enumerate(clip):
        near = local_mean(parts, *extent[index])[..., active].double()
        heard = _readings(parts, reading[index], wide[index])[..., active].double() if len(reading) else near[:0]
        parts = 0.5 * parts[..., active].double() ** 2
        whole = parts.sum(0)
        found.append([parts.shape[-1], parts.sum(-1), (parts**2).sum(-1), whole.sum(-1), (whole**2).sum(-1),
                      near.sum(-1), (near**2).sum(-1), heard.sum(-1), (heard**2).sum(-1)])
    return found


class Scaling:
    """Discrepancy scaling: the discrepancy standardised by its mean and deviation on held-out bona fide speech.

    Kinds: none; level (one mean and deviation for each pyramid level); frequency (for each level and frequency row);
    channel (for each level and channel, before the sum over channels); element (for each level, channel and row).
    On speech, windows have no fixed alignment in time, so no kind resolves time. Scaled maps have mean 0 on bona fide
    speech for these kinds; those of channel and element are divided by the root of the number of channels, which would
    make their deviation 1 if channels were independent.

    signed is ours: the residual of each channel, sign and all, is averaged over a neighbourhood in time and frequency,
    standardised per level, channel and row, and the map is the root mean square over channels: 1 on bona fide speech, and
    larger wherever the student is wrong in an unusual direction, be it that speech is too odd or too normal.

    read is ours too: a perturbation teacher's linear readers name each kind of damage from its features; applied to
    the residual they keep of it only directions in which speech can be damaged. Each reading is averaged over two
    neighbourhoods and standardised per level, kind and row; the map is the mean: 0 on bona fide speech.
    """

    def __init__(self, mean: list[torch.Tensor], deviation: list[torch.Tensor], level: list[tuple[float, float]],
                 row: list[tuple[torch.Tensor, torch.Tensor]], signed: list[tuple[torch.Tensor, torch.Tensor]],
                 extent: list[tuple[int, int]], reading: list[torch.Tensor] = (),
                 wide: list[list[tuple[int, int]]] = (), read: list[tuple[torch.Tensor, torch.Tensor]] = ()) -> None:
        self.mean, self.deviation = mean, deviation  # of elements r^2 / 2: (channel, frequency) at each level
        self.level = level  # of the discrepancy: mean and deviation at each level
        self.row = row  # of the discrepancy: (frequency,) twice at each level
        self.signed = signed  # of the locally averaged residual: (channel, frequency) twice at each level
        self.extent = extent  # rows and frames of the neighbourhood at each level
        self.reading = list(reading)  # readers: (kind, channel) at each level, or none
        self.wide = list(wide)  # rows and frames of each of the readings' neighbourhoods at each level
        self.read = list(read)  # of the locally averaged readings: (neighbourhood, kind, frequency) twice at each level

    @classmethod
    def fit(cls, clips: Iterable[list[tuple[torch.Tensor, torch.Tensor]]], extent: list[tuple[int, int]],
            reading: list[torch.Tensor] = (), wide: list[list[tuple[int, int]]] = ()) -> Scaling:
        """Fit on bona fide clips, each a list over levels of (residual (channel, frequency, frame), active (frame,) bool);
        `extent` gives the neighbourhood (rows, frames) of each level, `reading` the teacher's readers (kind, channel) of each
        level and `wide` their neighbourhoods. Raises ValueError where nothing is active."""
        return cls.from_moments((moments(clip, extent, reading, wide) for clip in clips), extent, reading, wide)

    @classmethod
    def from_moments(cls, clips: Iterable[list[list[torch.Tensor | float]]], extent: list[tuple[int, int]],
                     reading: list[torch.Tensor] = (), wide: list[list[tuple[int, int]]] = ()) -> Scaling:
        """The same from the `moments` of every clip."""
        sums: list[list[torch.Tensor | float]] = []
        for clip in clips:
            for index, news in enumerate(clip):
                if index == len(sums):
                    sums.append(news)
                else:
                    sums[index] = [old + new for old, new in zip(sums[index], news)]
        if not sums or not all(level[0] for level in sums):
            raise ValueError("discrepancy scaling needs bona fide clips with active speech; none were given")

        def spread(total: torch.Tensor, square: torch.Tensor, count: float) -> torch.Tensor:
            # Channels of random networks can be dead: their deviation is kept away from zero.
            value = (square / count - (total / count) ** 2).clamp_min(0).sqrt()
            return value.clamp_min(1e-3 * float(value.mean()) + 1e-9).float()

        mean, deviation, levels, rows, signed, read = [], [], [], [], [], []
        for count, total, square, whole, whole_square, near, near_square, heard, heard_square in sums:
            mean.append((total / count).float())
            deviation.append(spread(total, square, count))
            rows.append(((whole / count).float(), spread(whole, whole_square, count)))
            middle = float((whole / count).mean())
            levels.append((middle, float(((whole_square / count).mean() - middle**2).clamp_min(1e-12).sqrt())))
            signed.append(((near / count).float(), spread(near, near_square, count)))
            if len(reading):
                read.append(((heard / count).float(), spread(heard, heard_square, count)))
        return cls(mean, deviation, levels, rows, signed, [tuple(pair) for pair in extent], reading, wide, read)

    def apply(self, index: int, parts: torch.Tensor, kind: str) -> torch.Tensor:
        """The scaled map of level `index`: residual (channel, frequency, frame) -> (frequency, frame)."""
        if kind == "signed":
            middle, spread = self.signed[index]
            return (((local_mean(parts, *self.extent[index]) - middle[..., None]) / spread[..., None]) ** 2).mean(0).sqrt()
        if kind == "read":
            if not self.reading:
                raise ValueError("a map of kind 'read' needs the readers of a perturbation teacher; this teacher has none")
            middle, spread = self.read[index]
            heard = _readings(parts, self.reading[index], self.wide[index])
            return ((heard - middle[..., None]) / spread[..., None]).mean((0, 1))
        parts = 0.5 * parts**2
        if kind == "none":
            return parts.sum(0)
        if kind == "level":
            middle, spread = self.level[index]
            return (parts.sum(0) - middle) / spread
        if kind == "frequency":
            middle, spread = self.row[index]
            return (parts.sum(0) - middle[:, None]) / spread[:, None]
        middle, spread = self.mean[index], self.deviation[index]
        root = parts.shape[0] ** 0.5
        if kind == "channel":
            # The deviation of a channel over all rows: that within rows and that of the rows' means.
            wide = ((spread**2).mean(1) + middle.var(1, unbiased=False)).sqrt()
            return ((parts - middle.mean(1)[:, None, None]) / wide[:, None, None]).sum(0) / root
        if kind == "element":
            return ((parts - middle[..., None]) / spread[..., None]).sum(0) / root
        raise ValueError(f"scaling {kind!r} is not one of {', '.join(SCALINGS)}")

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that was fitted, to be saved; `from_tensors` is the inverse."""
        saved = {}
        for index in range(len(self.mean)):
            saved |= {f"mean.{index}": self.mean[index], f"deviation.{index}": self.deviation[index],
                      f"level.{index}": torch.tensor(self.level[index], dtype=torch.float64),
                      f"row_mean.{index}": self.row[index][0], f"row_deviation.{index}": self.row[index][1],
                      f"signed_mean.{index}": self.signed[index][0], f"signed_deviation.{index}": self.signed[index][1],
                      f"extent.{index}": torch.tensor(self.extent[index])}
            if self.reading:
                saved |= {f"reading.{index}": self.reading[index], f"wide.{index}": torch.tensor(self.wide[index]),
                          f"read_mean.{index}": self.read[index][0], f"read_deviation.{index}": self.read[index][1]}
        return saved

    @classmethod
    def from_tensors(cls, saved: dict[str, torch.Tensor]) -> Scaling:
        indices = range(sum(name.startswith("mean.") for name in saved))
        pairs = lambda name: [(saved[f"{name}_mean.{i}"], saved[f"{name}_deviation.{i}"]) for i in indices]  # noqa: E731
        return cls([saved[f"mean.{i}"] for i in indices], [saved[f"deviation.{i}"] for i in indices],
                   [tuple(saved[f"level.{i}"].tolist()) for i in indices], pairs("row"), pairs("signed"),
                   [tuple(saved[f"extent.{i}"].tolist()) for i in indices],
                   *(([saved[f"reading.{i}"] for i in indices], [saved[f"wide.{i}"].tolist() for i in indices], pairs("read"))
                     if "reading.0" in saved else ()))
