"""Owns the perturbations that a teacher learns to see: local damage to the fine structure of bona fide speech.

No synthesiser is run and no fake is seen: a random box of a bona fide clip's short-time Fourier transform loses its
phase, or its fine structure over frequency or time is smoothed, or its group delay is. The idea is that of synthetic
anomalies in image inspection (CutPaste, Li et al. 2021; DRAEM, Zavrtanik et al. 2021). Scrambling phase is a relative of
what Griffin-Lim does, smoothing of what a vocoder does; the notebook on teachers says so and ablates each kind."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from lib.settings import RATE_HZ

KINDS = ("scramble phase", "smooth over frequency", "smooth over time", "smooth group delay")
CHANCES = (0.35, 0.3, 0.2, 0.25)
SIZES = (256, 512, 1024, 2048)


def _box(random: np.random.Generator, rows: int, frames: int) -> torch.Tensor:
    """A random box of ones in zeros, (rows, frames): at least a tenth of either axis, often the whole of it."""
    mask = torch.zeros(rows, frames)
    spans = []
    for size, whole in ((rows, 0.5), (frames, 0.35)):
        if random.random() < whole:
            spans.append((0, size))
            continue
        length = int(random.integers(max(1, size // 10), size + 1))
        start = int(random.integers(0, size - length + 1))
        spans.append((start, start + length))
    mask[spans[0][0] : spans[0][1], spans[1][0] : spans[1][1]] = 1.0
    return mask


def _smoothed(values: torch.Tensor, width: int) -> torch.Tensor:
    """Moving average of odd `width` along the last axis, (rows, length), edges reflected."""
    width = min(width | 1, 2 * (values.shape[-1] // 2) - 1)
    padded = functional.pad(values[:, None], (width // 2, width // 2), mode="reflect")
    return functional.avg_pool1d(padded, width, 1)[:, 0]


def perturbed(audio: torch.Tensor, random: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Damage boxes of a batch of bona fide recordings.

    audio (batch, samples) -> the same shape; the truth (batch, kind, bin, frame) in {0, 1}; the transform size that the
    bins and frames refer to (hop a quarter of it). About a third of the batch stays as it is.
    """
    size = int(random.choice(SIZES))
    hop, window = size // 4, torch.hann_window(size)
    spectrum = torch.stft(audio, size, hop, size, window, return_complex=True)
    rows, frames = spectrum.shape[1:]
    truth = torch.zeros(len(audio), len(KINDS), rows, frames)
    result = spectrum.clone()
    for item in range(len(audio)):
        chosen = random.random(len(KINDS)) < CHANCES
        if random.random() < 0.2 or not chosen.any():
            continue
        box = _box(random, rows, frames)
        level, phase = torch.log(spectrum[item].abs() + 1e-6), torch.angle(spectrum[item])
        if chosen[1]:
            width = int(random.uniform(60, 400) * size / RATE_HZ)
            level = torch.where(box > 0, _smoothed(level.T, max(3, width)).T, level)
        if chosen[2]:
            width = int(random.uniform(0.024, 0.1) * RATE_HZ / hop)
            level = torch.where(box > 0, _smoothed(level, max(3, width)), level)
        if chosen[3]:
            step = spectrum[item, 1:] * spectrum[item, :-1].conj()
            width = max(3, int(random.uniform(100, 800) * size / RATE_HZ))
            smooth = torch.atan2(_smoothed(step.imag.T, width).T, _smoothed(step.real.T, width).T)
            phase = torch.where(box > 0, torch.cat([phase[:1], phase[:1] + torch.cumsum(smooth, 0)]), phase)
        if chosen[0]:
            strength = random.uniform(0.5, np.pi)
            noise = torch.from_numpy(random.uniform(-strength, strength, (rows, frames)).astype(np.float32))
            phase = phase + box * noise
        result[item] = torch.polar(level.exp(), phase)
        truth[item, torch.from_numpy(chosen)] = box
    return torch.istft(result, size, hop, size, window, length=audio.shape[-1]), truth, size


def truth_image(truth: torch.Tensor, size: int, low_hz: float, high_hz: float, shape: tuple[int, int]) -> torch.Tensor:
    """`truth` on the grid of one pyramid level, (batch, kind, frequency, frame) in [0, 1]: the share of damaged bins."""
    first, last = round(low_hz * size / RATE_HZ), round(high_hz * size / RATE_HZ)
    return functional.interpolate(truth[:, :, first:last], size=shape, mode="area")
