"""Owns the discrepancy between teacher and student, and the matching loss."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional

from lib.data.channel import FRAME
from lib.model.images import activity, stride_of
from lib.settings import View

Level = tuple[torch.Tensor, torch.Tensor]
"""Of one pyramid level and one clip: the residual (channel, frequency, frame) and the activity (frame,) bool."""


def residual(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """r_c(f, t) = T_c/|T| - S_c/|S|, all of one shape (batch, channel, frequency, frame).

    Half its square is the channel's share of the discrepancy: d = sum_c r_c^2 / 2. Its sign says which way the student
    is wrong; the discrepancy forgets it.
    """
    return functional.normalize(teacher, dim=1, eps=1e-6) - functional.normalize(student, dim=1, eps=1e-6)


def discrepancy(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """d(f, t) = 1/2 ||T/|T| - S/|S|||^2 = 1 - cos(T, S), along the channel axis (Wang et al. 2021, eq. 1).

    (batch, channel, frequency, frame) twice -> (batch, frequency, frame) in [0, 2].
    """
    return 1.0 - functional.cosine_similarity(teacher, student, dim=1, eps=1e-6)


def matching_loss(teacher: list[torch.Tensor], student: list[torch.Tensor]) -> torch.Tensor:
    """Sum over levels of the mean discrepancy (Wang et al. 2021, eq. 2 and 3); on bona fide speech only."""
    return sum(discrepancy(t, s).mean() for t, s in zip(teacher, student, strict=True))


def band_means(levels: list[torch.Tensor], bands: int) -> torch.Tensor:
    """Means over all frames in each of `bands` frequency bands: levels (..., frequency, frame) -> (profile,), levels
    one after the other. A level with fewer rows than bands gives its rows. Differentiable.
    """
    means = (level.mean(-1) for level in levels)
    return torch.cat([functional.adaptive_avg_pool1d(mean.reshape(-1, 1, mean.shape[-1]),
                                                     min(bands, mean.shape[-1])).flatten() for mean in means])


def level_residuals(teacher: list[torch.Tensor], student: list[torch.Tensor], active: np.ndarray, view: View,
                    frames: int) -> list[Level]:
    """The residual and the activity at each level of both pyramids (1, channel, frequency, frame) of an image of
    `frames`, given the channel's activity (20 ms frame,); where nothing is active, all is. Differentiable."""
    whole, levels = activity(active, view, frames), []
    for pair in zip(teacher, student):
        values = residual(*pair)[0]
        mask = whole[np.minimum(np.arange(values.shape[-1]) * stride_of(frames, values.shape[-1]), frames - 1)]
        levels.append((values, torch.from_numpy(mask if mask.any() else np.ones_like(mask))))
    return levels


def in_blocks(work: Callable[[np.ndarray, np.ndarray], tuple[torch.Tensor, list[Level]]], audio: np.ndarray,
              active: np.ndarray, hop: int, block: int, overlap: int) -> tuple[torch.Tensor, list[Level]]:
    """`work(audio, active)`, an image and its levels, of a long recording (samples,) in blocks that overlap on either
    side by more than networks see: what the whole would give, in flat memory. Sizes in samples; `hop` of the image."""
    # Blocks start on a common multiple of the hop, the deepest stride and the activity frames, so pieces abut exactly.
    unit = int(np.lcm(hop * 16, FRAME))
    step, margin, blocks = block // unit * unit, max(1, overlap // unit) * unit, []
    for start in range(0, len(audio), step):
        first, last = max(0, start - margin), min(len(audio), start + step + margin)
        picture, levels = work(audio[first:last], active[first // FRAME : -(-last // FRAME)])
        pieces = []
        for values in (picture, *(values for level in levels for values in level)):
            frame = hop * stride_of(picture.shape[-1], values.shape[-1])  # in samples
            begin = (start - first) // frame
            pieces.append(values[..., begin : None if last == len(audio) else begin + step // frame])
        blocks.append(pieces)
        if last == len(audio):
            break
    picture, *flat = (torch.cat(pieces, -1) for pieces in zip(*blocks))
    return picture, list(zip(flat[::2], flat[1::2]))
