"""Owns the way from scaled levels to one map over time and frequency, and from a map to one number."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from lib.model.discrepancy import band_means
from lib.model.images import stride_of
from lib.model.scaling import NEVER_NEGATIVE, UNSCALED, Level, Scaling

MOST_DRAWN = 100
"""Bona fide clips whose maps give the colour scale."""


@dataclass(frozen=True)
class Explanation:
    """Where a recording is anomalous."""

    anomaly: float  # up = fake
    map: np.ndarray  # (frequency, frame): the levels' maps combined, on the image's grid
    levels: list[np.ndarray]  # the scaled map of each pyramid level on that grid, in deviations of bona fide speech
    image: np.ndarray  # (plane, frequency, frame)
    active: np.ndarray  # (frame,) bool
    start_s: float  # where the map begins in the recording: leading pauses are trimmed
    hop_s: float
    row_hz: np.ndarray

    @property
    def cells(self) -> np.ndarray:
        """The map's values where there is speech, (places,)."""
        return self.map[:, self.active].ravel()


def drawn_clips(count: int) -> range:
    """Which of `count` bona fide clips give the colour scale: evenly spread, at most MOST_DRAWN."""
    return range(0, count, -(-count // MOST_DRAWN))


def colour_limits(cells: Sequence[np.ndarray]) -> tuple[float, float]:
    """Median and 99.9 % quantile of the cells of several maps: the limits of one colour scale for all."""
    low, high = np.quantile(np.concatenate(cells), (0.5, 0.999))
    return float(low), float(high)


def upsampled(level: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """A level's map (frequency_l, frame_l) on the image's grid `shape`, bilinear.

    Element i of a level is centred on image element i * stride (all kernels are odd and padded alike), so elements are
    put exactly there; stretching a level to the image's size would shift it by up to a stride at the far end.
    """
    size = tuple((count - 1) * stride_of(whole, count) + 1 for whole, count in zip(shape, level.shape))
    grown = functional.interpolate(level[None, None], size=size, mode="bilinear", align_corners=True)
    lack = [max(0, whole - have) for whole, have in zip(shape, size)]
    return functional.pad(grown, (0, lack[1], 0, lack[0]), mode="replicate")[0, 0, : shape[0], : shape[1]]


def combined(levels: Sequence[torch.Tensor], combine: str, kind: str) -> torch.Tensor:
    """One map (frequency, frame) of the levels' maps of scaling `kind` on one grid, (frequency, frame) each.

    sum: their mean, so that a scaled map stays in deviations. product (Wang et al. 2021, eq. 5): of discrepancies as
    they are; maps of a kind that can be negative go through the softplus, log(1 + e^x), first.
    """
    if combine == "sum":
        return torch.stack(list(levels)).mean(0)
    return torch.stack([level if kind in NEVER_NEGATIVE else functional.softplus(level) for level in levels]).prod(0)


def pooled(whole: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Utterance scores (scalars) of a map (frequency, frame) over its active frames, `mask` (frame,) bool: mean,
    maximum, mean of the top 5 %, and the 95 % quantile over time of the mean over frequency. Differentiable."""
    active = whole[:, mask] if mask.any() else whole
    values = active.flatten()
    return {"mean": values.mean(), "max": values.max(), "top": values.topk(max(1, len(values) // 20)).values.mean(),
            "quantile": torch.quantile(active.mean(0), 0.95)}


def clip_statistics(levels: list[Level], scaling: Scaling, kinds: Iterable[str], combines: Iterable[str],
                    bands: int) -> dict[str, np.ndarray | float]:
    """What scores are made of, from one clip's residuals: `profile/KIND` (profile,), the means of each level over
    active frames in each of `bands` frequency bands, and `KIND/COMBINE/POOLING` numbers."""
    residuals, masks = zip(*levels)
    statistics: dict[str, np.ndarray | float] = {}
    for kind in kinds:
        drawn = combines or kind not in UNSCALED
        maps = [scaling.apply(index, values, kind) for index, values in enumerate(residuals)] if drawn else []
        profiled = scaling.profiled(residuals, kind, maps)
        statistics[f"profile/{kind}"] = band_means([v[..., mask] for v, mask in zip(profiled, masks)], bands).numpy()
        # Utterance scores are pooled on the grid of the finest level: the image's has 16 times as many places, all of
        # them interpolated.
        grown = [upsampled(level, residuals[0].shape[-2:]) for level in maps] if combines else []
        for combine in combines:
            scores = pooled(combined(grown, combine, kind), masks[0])
            statistics |= {f"{kind}/{combine}/{name}": float(value) for name, value in scores.items()}
    return statistics
