"""Owns the discrepancy between teacher and student, the matching loss, and discrepancy scaling."""

from __future__ import annotations

import torch
from torch.nn import functional


def discrepancy(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """d(f, t) = 1/2 ||T/|T| - S/|S|||^2 = 1 - cos(T, S), along the channel axis (Wang et al. 2021, eq. 1).

    (batch, channel, frequency, frame) twice -> (batch, frequency, frame) in [0, 2].
    """
    return 1.0 - functional.cosine_similarity(teacher, student, dim=1, eps=1e-6)


def matching_loss(teacher: list[torch.Tensor], student: list[torch.Tensor]) -> torch.Tensor:
    """Sum over levels of the mean discrepancy (Wang et al. 2021, eq. 2 and 3); on bona fide speech only."""
    return sum(discrepancy(t, s).mean() for t, s in zip(teacher, student, strict=True))
