"""Owns the way from scaled levels to one map over time and frequency, and from a map to one number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

MOST_DRAWN = 100
"""Bona fide clips whose maps give the colour scale."""


@dataclass(frozen=True)
class Explanation:
    """Where a recording is anomalous."""

    anomaly: float  # up = fake
    map: np.ndarray  # (frequency, frame): scaled discrepancy, in deviations of bona fide speech, on the image's grid
    levels: list[np.ndarray]  # the same for each pyramid level
    image: np.ndarray  # (channel, frequency, frame)
    active: np.ndarray  # (frame,) bool
    start_s: float  # where the map begins in the recording: leading pauses are trimmed
    hop_s: float
    row_hz: np.ndarray

    @property
    def cells(self) -> np.ndarray:
        """The map's values where there is speech, (places,)."""
        return self.map[:, self.active].ravel()


def _drawn(count: int) -> range:
    """Which of `count` bona fide clips give the colour scale: evenly spread, at most MOST_DRAWN."""
    return range(0, count, -(-count // MOST_DRAWN))


def _colour_limits(cells: Sequence[np.ndarray]) -> tuple[float, float]:
    low, high = np.quantile(np.concatenate(cells), (0.5, 0.999))
    return float(low), float(high)


def stride_of(size: int, level_size: int) -> int:
    """Image rows for each row of a pyramid level, or frames for each frame: 4, 8, 16. Levels are rounded up, so that a whole
    quotient is not enough: of 33 frames a stride of 16 leaves 3."""
    powers = (2**power for power in range(size.bit_length() + 1))
    return next((stride for stride in powers if -(-size // stride) == level_size), round(size / level_size))


def upsampled(level: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """A level's map (frequency_l, frame_l) on the image's grid `shape`, bilinear.

    Element i of a level is centred on image element i * stride (all kernels are odd and padded alike), so elements are
    put exactly there; stretching a level to the image's size would shift it by up to a stride at the far end.
    """
    size = tuple((count - 1) * stride_of(wanted, count) + 1 for wanted, count in zip(shape, level.shape))
    grown = functional.interpolate(level[None, None], size=size, mode="bilinear", align_corners=True)
    lack = [max(0, wanted - have) for wanted, have in zip(shape, size)]
    return functional.pad(grown, (0, lack[1], 0, lack[0]), mode="replicate")[0, 0, : shape[0], : shape[1]]
