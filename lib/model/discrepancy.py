"""Owns the discrepancy between teacher and student, the matching loss, and discrepancy scaling."""

from __future__ import annotations

import torch
from torch.nn import functional


def band_means(levels: list[torch.Tensor], bands: int) -> torch.Tensor:
    """Means over all frames in each of `bands` frequency bands: levels (..., frequency, frame) -> (levels * ... * bands,). A level
    with fewer rows than bands (Whisper has one) gives its rows. Differentiable."""
    means = [level.mean(-1) for level in levels]
    return torch.cat([functional.adaptive_avg_pool1d(mean.reshape(-1, 1, mean.shape[-1]), min(bands, mean.shape[-1])).flatten()
                      for mean in means])


def residual(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """r_c(f, t) = T_c/|T| - S_c/|S|, all of one shape (batch, channel, frequency, frame).

    Half its square is the channel's share of the discrepancy: d = sum_c r_c^2 / 2. Its sign says which way the student is
    wrong; the discrepancy forgets it.
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


