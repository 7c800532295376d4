"""Owns the perturbations that a teacher learns to see: local damage to the fine structure of bona fide speech.

No synthesiser is run and no fake is seen: in a random box of a clip's short-time Fourier transform, phase or level is
disturbed, smoothed or replaced. The idea is that of synthetic anomalies in image inspection (CutPaste, Li et al. 2021;
DRAEM, Zavrtanik et al. 2021). Whoever chose the kinds knew how vocoders fail; the notebook on teachers says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.nn import functional

from lib.settings import RATE_HZ

SIZES = (256, 512, 1024, 2048)
CLEAN = 0.25  # share of every batch that stays as it is
PERIOD_SAMPLES = (40, 260)  # shortest and longest pitch period that is looked for: 400 to 62 Hz


@dataclass(frozen=True)
class Grid:
    """A short-time Fourier transform of one clip: how many bins and frames a bandwidth or a time is."""

    size: int
    rows: int
    frames: int

    @property
    def hop(self) -> int:
        return self.size // 4

    def bins(self, hertz: float) -> int:
        return int(hertz * self.size / RATE_HZ)

    def steps(self, seconds: float) -> int:
        return int(seconds * RATE_HZ / self.hop)


def _uniform(random: np.random.Generator, shape: tuple[int, ...], limit: float) -> torch.Tensor:
    return torch.from_numpy(random.uniform(-limit, limit, shape).astype(np.float32))


def _smoothed(values: torch.Tensor, width: int) -> torch.Tensor:
    """Moving average of odd `width` along the last axis, (rows, length), edges reflected."""
    width = min(width | 1, 2 * (values.shape[-1] // 2) - 1)
    padded = functional.pad(values[:, None], (width // 2, width // 2), mode="reflect")[:, 0]
    # Differences of running sums: the cost does not grow with the width. Double precision, since the sums do.
    total = functional.pad(padded.cumsum(-1, dtype=torch.float64), (1, 0))
    return ((total[:, width:] - total[:, :-width]) / width).to(values.dtype)


def _over_frequency(values: torch.Tensor, width: int) -> torch.Tensor:
    return _smoothed(values.T.contiguous(), max(3, width)).T


def _field(random: np.random.Generator, grid: Grid, time_s: float, band_hz: float) -> torch.Tensor:
    """A random field of unit deviation, (rows, frames), alike within about `time_s` and `band_hz`; 0 leaves an axis
    white, an infinite time makes it the same in every frame."""
    field = torch.from_numpy(random.standard_normal((grid.rows, grid.frames)).astype(np.float32))
    if time_s == np.inf or grid.steps(time_s) >= grid.frames:
        field = field[:, :1].expand(grid.rows, grid.frames).contiguous()
    elif grid.steps(time_s) > 1:
        field = _smoothed(_smoothed(field, max(3, grid.steps(time_s))), max(3, grid.steps(time_s)))
    if grid.bins(band_hz) > 1:
        field = _over_frequency(field, grid.bins(band_hz))
    return field / (field.std() + 1e-6)


Damaged = tuple[torch.Tensor, torch.Tensor]
"""Level (natural logarithm of the magnitude) and phase, both (rows, frames): what each kind takes and returns."""


def scramble_phase(level: torch.Tensor, phase: torch.Tensor, random: np.random.Generator, grid: Grid) -> Damaged:
    """Noise in the phase, alike within a random time and bandwidth."""
    time_s, band_hz = random.choice([0, 0.016, 0.03, 0.06, 0.15, 0.4]), random.choice([0, 30, 60, 120, 250, 600])
    return level, phase + _field(random, grid, time_s, band_hz) * random.uniform(0.4, 2.5)


def smooth_over_frequency(level: torch.Tensor, phase: torch.Tensor, random: np.random.Generator, grid: Grid) -> Damaged:
    """The level averaged over neighbouring bins."""
    return _over_frequency(level, grid.bins(random.uniform(60, 400))), phase


def smooth_over_time(level: torch.Tensor, phase: torch.Tensor, random: np.random.Generator, grid: Grid) -> Damaged:
    """The level averaged over neighbouring frames."""
    return _smoothed(level, max(3, grid.steps(random.uniform(0.024, 0.1)))), phase


def smooth_group_delay(level: torch.Tensor, phase: torch.Tensor, random: np.random.Generator, grid: Grid) -> Damaged:
    """The phase step from bin to bin averaged over neighbouring bins."""
    width = grid.bins(random.uniform(100, 800))
    step = torch.polar((level[1:] + level[:-1]).clamp_max(12).exp(), phase[1:] - phase[:-1])
    smooth = torch.atan2(_over_frequency(step.imag, width), _over_frequency(step.real, width))
    return level, torch.cat([phase[:1], phase[:1] + torch.cumsum(smooth, 0)])


def jitter_level(level: torch.Tensor, phase: torch.Tensor, random: np.random.Generator, grid: Grid) -> Damaged:
    """Noise in the level, alike within a random time and bandwidth."""
    time_s, band_hz = random.choice([0, 0.016, 0.03, 0.06, 0.15, 0.4]), random.choice([0, 30, 60, 120, 250, 600])
    return level + _field(random, grid, time_s, band_hz) * random.uniform(0.1, 0.5), phase


def noise_for_harmonics(level: torch.Tensor, phase: torch.Tensor, random: np.random.Generator, grid: Grid) -> Damaged:
    """Noise of the same envelope."""
    smooth = _over_frequency(level, grid.bins(random.uniform(80, 300)))
    drawn = torch.from_numpy(np.log(random.rayleigh(0.8, level.shape) + 1e-3).astype(np.float32))
    return smooth + drawn, _uniform(random, level.shape, np.pi)


def change_contrast(level: torch.Tensor, phase: torch.Tensor, random: np.random.Generator, grid: Grid) -> Damaged:
    """Harmonics and the valleys between them, made deeper or flatter."""
    smooth = _over_frequency(level, grid.bins(random.uniform(80, 400)))
    factor = random.uniform(1.15, 2.0) if random.random() < 0.5 else random.uniform(0.3, 0.85)
    return smooth + factor * (level - smooth), phase


def drift_phase(level: torch.Tensor, phase: torch.Tensor, random: np.random.Generator, grid: Grid) -> Damaged:
    """Phase moves by a field that is smooth on the scale of a window: levels stay, partials lose each other."""
    field = _field(random, grid, random.choice([0.04, 0.08, 0.16, 0.32, np.inf]), random.uniform(40, 250))
    return level, phase + field * random.uniform(0.7, 3.0)


def averaged_periods(audio: torch.Tensor, strength: float) -> torch.Tensor:
    """Voiced speech (samples,) with every pitch period mixed with its neighbours: too regular. Frames of 40 ms; the
    period is the highest peak of the autocorrelation, and frames where it is below 0.5 stay."""
    shortest, longest = PERIOD_SAMPLES
    length, hop, edge = 640, 160, 640 + longest
    window = torch.hann_window(length)
    padded = functional.pad(audio, (edge, edge))
    places = (torch.arange(0, len(audio) + length, hop) + longest)[:, None] + torch.arange(length)
    frames = padded[places]
    powers = (torch.fft.rfft(values, 2048).abs() ** 2 for values in (frames * window, window))
    likeness, taper = (torch.fft.irfft(power, 2048)[..., : longest + 1] for power in powers)
    likeness = likeness / (likeness[:, :1] + 1e-9) / (taper / taper[0]).clamp_min(0.1)
    peak, lag = likeness[:, shortest:longest].max(1)
    share = ((peak > 0.5).float() * strength)[:, None]
    shift = (lag + shortest)[:, None]
    mixed = 0.5 * frames + 0.25 * padded[places - shift] + 0.25 * padded[places + shift]
    total, weight = torch.zeros_like(padded), torch.zeros_like(padded)
    mixed = (frames * (1 - share) + mixed * share) * window
    total.index_put_((places.reshape(-1),), mixed.reshape(-1), accumulate=True)
    weight.index_put_((places.reshape(-1),), window.repeat(len(places)), accumulate=True)
    return (total / weight.clamp_min(1e-3))[edge : edge + len(audio)]


CHANCES = {
    "average of periods": 0.2, "contrast of harmonics": 0.2, "smoothing over frequency": 0.25,
    "smoothing over time": 0.15, "jitter of level": 0.2, "smoothing of group delay": 0.2, "drift of phase": 0.3,
    "scrambling of phase": 0.25, "noise for harmonics": 0.12,
}
"""The kinds in the order in which they are applied, and how often each is drawn for a clip."""
KINDS = tuple(CHANCES)
CHANGES = dict(zip(KINDS[1:], (change_contrast, smooth_over_frequency, smooth_over_time, jitter_level,
                               smooth_group_delay, drift_phase, scramble_phase, noise_for_harmonics)))


def _box(random: np.random.Generator, grid: Grid) -> torch.Tensor:
    """A random box of ones in zeros, (rows, frames): at least a tenth of either axis, often the whole of it."""
    mask = torch.zeros(grid.rows, grid.frames)
    if random.random() < 0.3:
        return mask + 1.0
    spans = []
    for size, whole in ((grid.rows, 0.5), (grid.frames, 0.4)):
        if random.random() < whole:
            spans.append((0, size))
            continue
        length = int(random.integers(max(1, size // 10), size + 1))
        start = int(random.integers(0, size - length + 1))
        spans.append((start, start + length))
    mask[spans[0][0] : spans[0][1], spans[1][0] : spans[1][1]] = 1.0
    return mask


@dataclass(frozen=True)
class Damage:
    """What was done to a batch of recordings: one box each, and in it one or more kinds."""

    boxes: torch.Tensor  # (batch, bin, frame) in {0, 1}
    kinds: torch.Tensor  # (batch, kind) in {0, 1}, over all of KINDS
    size: int  # of the transform that the bins and frames refer to; the hop is a quarter of it

    @property
    def truth(self) -> torch.Tensor:
        """Where each kind was applied, (batch, kind, bin, frame) in {0, 1}."""
        return self.kinds[:, :, None, None] * self.boxes[:, None]

    def on_grid(self, low_hz: float, high_hz: float, shape: tuple[int, int]) -> torch.Tensor:
        """The truth on the grid of one pyramid level, (batch, kind, frequency, frame): the share of damaged bins."""
        first, last = round(low_hz * self.size / RATE_HZ), round(high_hz * self.size / RATE_HZ)
        shares = functional.interpolate(self.boxes[:, None, first:last], size=shape, mode="area")
        return self.kinds[:, :, None, None] * shares


def perturbed(audio: torch.Tensor, random: np.random.Generator,
              kinds: tuple[str, ...] = KINDS) -> tuple[torch.Tensor, Damage]:
    """Damage boxes of a batch of bona fide recordings in one or more of `kinds`: audio (batch, samples) -> the same
    shape, each recording at its old level, and what was done. A quarter of the batch stays as it is."""
    size = int(random.choice(SIZES))
    window = torch.hann_window(size)
    transform = partial(torch.stft, n_fft=size, hop_length=size // 4, window=window, return_complex=True)
    spectrum = transform(audio)
    grid = Grid(size, *spectrum.shape[1:])
    boxes, named = torch.zeros(len(audio), grid.rows, grid.frames), torch.zeros(len(audio), len(KINDS))
    result = spectrum.clone()
    for item in range(len(audio)):
        chosen = [name for name in kinds if random.random() < CHANCES[name]]
        if random.random() < CLEAN:
            continue
        chosen = chosen or [kinds[int(random.integers(len(kinds)))]]
        box, part = _box(random, grid), spectrum[item]
        if KINDS[0] in chosen:
            part = transform(averaged_periods(audio[item], random.uniform(0.5, 1.0)))
        level, phase = torch.log(part.abs() + 1e-6), torch.angle(part)
        for name in chosen:
            if name in CHANGES:
                level, phase = CHANGES[name](level, phase, random, grid)
        boxes[item], named[item, [KINDS.index(name) for name in chosen]] = box, 1.0
        result[item] = torch.where(box > 0, torch.polar(level.clamp_max(6).exp(), phase), spectrum[item])
    made = torch.istft(result, size, grid.hop, size, window, length=audio.shape[-1])
    gain = (audio.pow(2).mean(-1, keepdim=True) / (made.pow(2).mean(-1, keepdim=True) + 1e-9)).sqrt().clamp(0.3, 3.0)
    return torch.where(named.amax(1, keepdim=True) > 0, made * gain, audio), Damage(boxes, named, size)

