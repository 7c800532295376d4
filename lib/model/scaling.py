"""Owns the statistics of real speech: discrepancy scaling, and the typicality of a profile."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from lib.model.discrepancy import Level
from lib.model.images import hop_samples
from lib.settings import Settings

SCALINGS = ("none", "level", "frequency", "channel", "element", "signed", "read")
"""Kinds of discrepancy scaling; the last needs a teacher with readers."""
POOLINGS = ("mean", "max", "top", "quantile")
"""Scores that pool a map (lib.model.discrepancy.pooled)."""
PROFILE_SCORES = ("one_sided", "two_sided", "profile")
"""Scores of a profile's typicality."""
SCORES = (*POOLINGS, *PROFILE_SCORES)
LOCAL_S, LOCAL_HZ = 0.2, 750.0
"""Extent of the neighbourhood over which the signed residual is averaged before it is standardised."""
READ_EXTENTS = ((0.4, 1500.0), (0.4, 6000.0))
"""Extents (seconds, Hz) of the neighbourhoods of readings; chosen on development fakes in validation clips."""
Extent = tuple[int, int]  # rows and frames of a neighbourhood


def local_mean(values: torch.Tensor, rows: int, frames: int) -> torch.Tensor:
    """Mean over a neighbourhood of odd size `rows` x `frames`, (channel, frequency, frame) -> the same; at the edges,
    over what there is of it."""
    row, frame, half = torch.arange(values.shape[-2]), torch.arange(values.shape[-1]), frames // 2
    near = ((row[:, None] - row).abs() <= rows // 2).to(values.dtype)
    # Few rows: a product of matrices. Many frames: differences of running sums, in double precision since sums grow.
    total = ((near / near.sum(1, keepdim=True)) @ values).cumsum(-1, dtype=torch.float64)
    total = torch.cat([functional.pad(total, (half + 1, 0)), total[..., -1:].expand(*total.shape[:-1], half)], -1)
    count = (frame + half + 1).clamp_max(len(frame)) - (frame - half).clamp_min(0)
    return ((total[..., 2 * half + 1 :] - total[..., : len(frame)]) / count).to(values.dtype)


def readings(residual: torch.Tensor, reader: torch.Tensor) -> torch.Tensor:
    """What a reader (kind, channel) makes of a residual (channel, frequency, frame): (kind, frequency, frame)."""
    return torch.einsum("kc,cfn->kfn", reader, residual)


def neighbourhoods(network: nn.Module, settings: Settings, seconds: float, hertz: float) -> list[Extent]:
    """Rows and frames of a neighbourhood of `seconds` and `hertz` at each level of a network's features."""
    view, channel = settings.view, settings.channel
    frames, rows = round(seconds / view.hop_s), round(hertz / (channel.high_hz - channel.low_hz) * view.bins)
    with torch.no_grad():
        levels = network(torch.zeros(1, 63 * hop_samples(view)))  # 64 frames
    strides = [(view.bins / level.shape[2], 64 / level.shape[3]) for level in levels]
    return [(max(1, round(rows / tall)), max(1, round(frames / wide))) for tall, wide in strides]


class Scaling:
    """Discrepancy scaling: the discrepancy standardised by its mean and deviation on held-out bona fide speech.

    Kinds, for residuals r and discrepancies d = sum_c r_c^2 / 2: none; level (one mean and deviation for each pyramid
    level); frequency (each level and row); channel (each level and channel, before the sum over channels); element
    (each level, channel and row). On speech, windows have no fixed alignment in time, so no kind resolves time. Scaled
    maps have mean 0 on bona fide speech; those of channel and element are divided by the root of the number of
    channels, which would make their deviation 1 if channels were independent.

    signed is ours: r itself is averaged over a neighbourhood `extents`, standardised per level, channel and row, and
    the map is the root mean square over channels: 1 on bona fide speech, larger wherever the student is wrong in an
    unusual direction, be it that speech is too odd or too normal.

    read is ours too: a perturbation teacher's linear `readers` name each kind of damage from its features; of r they
    keep directions in which speech can be damaged. Each reading is averaged over two neighbourhoods `wide` and
    standardised per level, kind and row; the map is the mean: 0 on bona fide speech.
    """

    def __init__(self, extents: list[Extent], readers: list[torch.Tensor] = (), wide: list[list[Extent]] = (),
                 levels: list[dict[str, torch.Tensor]] = ()) -> None:
        self.extents, self.readers, self.wide = extents, list(readers), list(wide)
        self.levels = list(levels)  # statistics of each level, see `fit`

    @classmethod
    def of(cls, teacher: nn.Module, settings: Settings) -> Scaling:
        """Not fitted yet: with a teacher's readers, and the neighbourhoods of the settings' image at its levels."""
        readers, extents = getattr(teacher, "readers", []), partial(neighbourhoods, teacher, settings)
        wide = list(zip(*(extents(*size) for size in READ_EXTENTS))) if len(readers) else []
        return cls(extents(LOCAL_S, LOCAL_HZ), readers, wide)

    def _read(self, index: int, residual: torch.Tensor) -> torch.Tensor:
        """Local means of the readings of a residual: (neighbourhood, kind, frequency, frame)."""
        read = readings(residual, self.readers[index])
        return torch.stack([local_mean(read, *extent) for extent in self.wide[index]])

    def moments(self, clip: list[Level]) -> list[list[torch.Tensor | float]]:
        """What `fit` needs of one clip: for each level the number of active frames, and over them sums and sums of
        squares of the elements, of the discrepancy, and of the local means of residual and readings."""
        sums = []
        for index, (residual, active) in enumerate(clip):
            near = local_mean(residual, *self.extents[index])[..., active].double()
            read = self._read(index, residual)[..., active].double() if self.readers else near[:0]
            elements = 0.5 * residual[..., active].double() ** 2
            values = elements, elements.sum(0), near, read
            both = (total for value in values for total in (value.sum(-1), (value**2).sum(-1)))
            sums.append([elements.shape[-1], *both])
        return sums

    def fit(self, clips: Iterable[list[list[torch.Tensor | float]]]) -> Scaling:
        """Fit on the `moments` of bona fide clips; itself. Raises ValueError where nothing is active."""
        sums: list[list[torch.Tensor | float]] = []
        for clip in clips:
            sums = [[old + new for old, new in zip(*pair)] for pair in zip(sums, clip)] or clip
        if not sums or not all(level[0] for level in sums):
            raise ValueError("discrepancy scaling needs bona fide clips with active speech; none were given")

        def spread(total: torch.Tensor, square: torch.Tensor, count: float) -> torch.Tensor:
            # Channels of random networks can be dead: their deviation is kept away from zero.
            value = (square / count - (total / count) ** 2).clamp_min(0).sqrt()
            return value.clamp_min(1e-3 * float(value.mean()) + 1e-9).float()

        self.levels = []
        for count, *totals in sums:
            level = {}
            # (channel, frequency), (frequency,), (channel, frequency), (neighbourhood, kind, frequency)
            for name, total, square in zip(("", "row_", "signed_", "read_"), totals[::2], totals[1::2]):
                if name != "read_" or self.readers:
                    level |= {f"{name}mean": (total / count).float(), f"{name}deviation": spread(total, square, count)}
            middle = float((totals[2] / count).mean())
            deviation = ((totals[3] / count).mean() - middle**2).clamp_min(1e-12).sqrt()
            level["level"] = torch.tensor([middle, float(deviation)], dtype=torch.float64)  # of the discrepancy
            self.levels.append(level)
        return self

    def apply(self, index: int, residual: torch.Tensor, kind: str) -> torch.Tensor:
        """The scaled map of level `index`: residual (channel, frequency, frame) -> (frequency, frame)."""
        level = self.levels[index]
        if kind == "signed":
            offset = local_mean(residual, *self.extents[index]) - level["signed_mean"][..., None]
            return ((offset / level["signed_deviation"][..., None]) ** 2).mean(0).sqrt()
        if kind == "read":
            if not self.readers:
                raise ValueError("a map of kind 'read' needs a perturbation teacher's readers; this teacher has none")
            read = self._read(index, residual)
            return ((read - level["read_mean"][..., None]) / level["read_deviation"][..., None]).mean((0, 1))
        elements = 0.5 * residual**2
        if kind == "none":
            return elements.sum(0)
        if kind == "level":
            middle, spread = level["level"].tolist()
            return (elements.sum(0) - middle) / spread
        if kind == "frequency":
            return (elements.sum(0) - level["row_mean"][:, None]) / level["row_deviation"][:, None]
        middle, spread, root = level["mean"], level["deviation"], residual.shape[0] ** 0.5
        if kind == "channel":
            # The deviation of a channel over all rows: that within rows and that of the rows' means.
            whole = ((spread**2).mean(1) + middle.var(1, unbiased=False)).sqrt()
            return ((elements - middle.mean(1)[:, None, None]) / whole[:, None, None]).sum(0) / root
        if kind == "element":
            return ((elements - middle[..., None]) / spread[..., None]).sum(0) / root
        raise ValueError(f"scaling {kind!r} is not one of {', '.join(SCALINGS)}")

    def steadiness(self, clip: list[Level]) -> float:
        """How little the readings of a clip vary over its active frames: minus the mean over levels, kinds and rows of
        ln s, s their deviation over time; up = fake, since voices vary more than networks do. NaN without readers."""
        spreads = [readings(residual[..., active], reader).std(-1, correction=0).clamp_min(1e-9).log().mean()
                   for (residual, active), reader in zip(clip, self.readers)]
        return -float(torch.stack(spreads).mean()) if spreads else float("nan")

    def profiled(self, residuals: list[torch.Tensor], kind: str, maps: list[torch.Tensor] = ()) -> list[torch.Tensor]:
        """What the profile of a kind is the mean of, for each level: the residual itself (signed), its readings (read),
        or the scaled `maps`, made here where they are not given. Differentiable."""
        if kind == "signed":
            return residuals
        if kind == "read":
            return [readings(*pair) for pair in zip(residuals, self.readers)]
        return list(maps) or [self.apply(index, residual, kind) for index, residual in enumerate(residuals)]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that was fitted, to be saved; `from_tensors` is the inverse."""
        saved = {f"{name}.{index}": value for index, level in enumerate(self.levels) for name, value in level.items()}
        for name, values in (("extent", self.extents), ("reading", self.readers), ("wide", self.wide)):
            saved |= {f"{name}.{index}": torch.as_tensor(value) for index, value in enumerate(values)}
        return saved

    @classmethod
    def from_tensors(cls, saved: dict[str, torch.Tensor]) -> Scaling:
        """The scaling whose `tensors` these are."""
        levels: list[dict[str, torch.Tensor]] = [{} for name in saved if name.startswith("mean.")]
        for name, value in saved.items():
            levels[int(name.rpartition(".")[2])][name.rpartition(".")[0]] = value
        geometry = [[level.pop(name) for level in levels if name in level] for name in ("extent", "reading", "wide")]
        return cls([tuple(size.tolist()) for size in geometry[0]], geometry[1],
                   [[tuple(size) for size in sizes.tolist()] for sizes in geometry[2]], levels)


class Typicality:
    """How far a discrepancy profile is from those of bona fide speech, z = (profile - mean) / deviation.

    profile is the Mahalanobis distance sqrt(z' P z / n) with the inverse P of the Ledoit-Wolf shrunk covariance of bona
    fide profiles, two_sided the root mean square of z: both see what is too odd and what is too normal, and are about 1
    on bona fide speech. one_sided, the root mean square of max(z, 0), leaves out what is below the mean: for readings,
    less damage than in real speech.
    """

    def __init__(self, mean: np.ndarray, deviation: np.ndarray, precision: np.ndarray) -> None:
        # A channel that is dead on bona fide speech has no spread; waking up once, it must not drown all others.
        self.deviation = np.maximum(deviation, 0.05 * np.median(deviation))
        self.mean, self.precision = mean, precision

    @classmethod
    def fit(cls, profiles: np.ndarray) -> Typicality:
        """Fit on bona fide profiles (clip, dimension). Raises ValueError for fewer than 3 clips or for NaN."""
        from sklearn.covariance import LedoitWolf

        profiles = np.asarray(profiles, dtype=np.float64)
        if len(profiles) < 3 or not np.isfinite(profiles).all():
            raise ValueError(f"typicality needs at least 3 finite bona fide profiles, found {len(profiles)}")
        model = cls(profiles.mean(0), profiles.std(0) + 1e-9, np.empty(0))
        model.precision = LedoitWolf().fit((profiles - model.mean) / model.deviation).precision_
        return model

    def standardised(self, profiles: np.ndarray) -> np.ndarray:
        """Profiles (clip, dimension) in deviations of bona fide speech."""
        return (np.asarray(profiles, dtype=np.float64) - self.mean) / self.deviation

    def score(self, pooling: str, profiles: np.ndarray) -> np.ndarray:
        """The score of PROFILE_SCORES that `pooling` names, (clip,)."""
        z = self.standardised(profiles)
        if pooling == "profile":
            return np.sqrt(np.maximum(np.einsum("ij,jk,ik->i", z, self.precision, z), 0) / z.shape[1])
        return np.sqrt(((np.maximum(z, 0) if pooling == "one_sided" else z) ** 2).mean(1))
