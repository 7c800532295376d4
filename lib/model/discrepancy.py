"""Owns the discrepancy between teacher and student, the matching loss, and the way from scaled levels to one map and
from a map to one number."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from lib.data.channel import FRAME
from lib.model.images import activity, stride_of
from lib.settings import View

if TYPE_CHECKING:
    from lib.model.scaling import Scaling
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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


NEVER_NEGATIVE = ("none", "signed")
"""Kinds whose maps have no negative values."""


UNSCALED = ("signed", "read")
"""Kinds whose profile is made before the scaling: of the residual itself, or of its readings."""


MOST_DRAWN = 100
"""Bona fide clips whose maps give the colour scale."""


@dataclass(frozen=True)
class Explanation:
    """Where a recording is anomalous."""

    anomaly: float  # up = fake
    steadiness: float  # of the readings over time (lib.model.scaling.Scaling.steadiness)
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
