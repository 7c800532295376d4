"""Owns texture: how rough the spectrum of a recording is, and how much its roughness varies. Generators make both less.

Two statistics, up = fake, read before the shared channel, whose noise would hide them. Smoothness: sound that ends in
noise (breath, friction, room) has Rayleigh magnitudes, so the logarithm of its power lies a known amount below the
logarithm of its local mean. Sameness: in real speech roughness differs from cell to cell of time and frequency (bursts,
breath, pulses). How much it ought to depends on what is said and on noise and codecs; a student that sees the coarse
picture alone learns to expect it from real speech; less variation than it expects is the anomaly.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import scipy.fft
import torch
from numpy.lib.stride_tricks import sliding_window_view
from scipy.ndimage import uniform_filter1d
from torch import nn
from torch.nn import functional

from lib.settings import RATE_HZ

# --- smoothness -------------------------------------------------------------------------------------------------------

FRAME, HOP = 512, 128  # 32 ms, a quarter
BANDS_HZ = ((4000, 6000), (6000, 7500))  # below 4 kHz voices differ more than makers do
AROUND_BINS = 7  # 219 Hz
ABOVE_FLOOR_DB = 20.0  # a band is read this far above its own 10 % quantile: background noise has no say
BELOW_PEAK_DB = 40.0
FEWEST_FRAMES, SHORTEST_S = 6, 0.4


def smoothness(audio: np.ndarray, rate_hz: int) -> float:
    """Mean over BANDS_HZ of the local flatness of the spectrum of `audio` (samples,), in nepers; up = smoother = fake.

    flatness = mean over cells of ln P - ln (mean of P over 219 Hz), P = |X|^2, in frames whose level in the band is
    20 dB above its 10 % quantile and within 40 dB of its highest; local, so that no equaliser or band edge moves it.
    NaN where too little stands above the recording's own noise. Raises ValueError for audio that is not one finite
    channel.
    """
    if audio.ndim != 1 or not np.isfinite(audio).all():
        raise ValueError(f"expected finite audio (samples,), found shape {audio.shape}")
    if len(audio) < SHORTEST_S * rate_hz:
        return math.nan
    frames = sliding_window_view(at_rate(audio.astype(np.float32), rate_hz), FRAME)[::HOP]
    spectrum = scipy.fft.rfft(frames * np.hanning(FRAME).astype(np.float32), axis=1)
    # 1e-10 keeps digital silence finite; it lies below the rounding of 16 bits.
    power = spectrum.real**2 + spectrum.imag**2 + 1e-10
    below_mean = np.log(power) - np.log(uniform_filter1d(power, AROUND_BINS, axis=1))
    values = []
    for low_hz, high_hz in BANDS_HZ:
        cells = slice(int(low_hz * FRAME / RATE_HZ), int(high_hz * FRAME / RATE_HZ))
        level_db = 10 * np.log10(power[:, cells].mean(axis=1))
        above = level_db > max(np.quantile(level_db, 0.1) + ABOVE_FLOOR_DB, level_db.max() - BELOW_PEAK_DB)
        if above.sum() >= FEWEST_FRAMES:
            values.append(below_mean[above, cells].mean())
    return float(np.mean(values)) if values else math.nan


def at_rate(audio: np.ndarray, rate_hz: int) -> np.ndarray:
    """Audio at the study's rate by a windowed sinc (Kaiser), (samples,) -> (samples x 16000 / rate_hz,)."""
    if rate_hz == RATE_HZ:
        return audio
    from torchaudio.functional import resample  # scipy.signal has the same filter, and takes a second to import

    return resample(torch.from_numpy(audio), rate_hz, RATE_HZ, lowpass_filter_width=10, rolloff=1.0,
                    resampling_method="sinc_interp_kaiser", beta=5.0).numpy()


# --- roughness in cells -----------------------------------------------------------------------------------------------

WINDOWS = (256, 512, 1024)
CELL_S, CELL_HZ, BANDS = 0.064, 375.0, 20  # cells up to 7.5 kHz
SMOOTH_HZ = 200.0
ROUGHNESS = tuple(f"{name} {1000 * size // RATE_HZ} ms" for size in WINDOWS
                  for name in ("below", "above", "step", "bend", "phase"))
FLOOR_DB = -60.0  # white noise is added this far below: digital silence and coarse quantisation are no sign of anything


@functools.lru_cache(maxsize=4)
def _window(size: int) -> torch.Tensor:
    return torch.hann_window(size)


def _smoothed(values: torch.Tensor, width: int) -> torch.Tensor:
    """Moving average of odd `width` over frequency, (bin, frame) -> the same, edges reflected."""
    padded = functional.pad(values.T[:, None], (width // 2, width // 2), mode="reflect")
    return functional.avg_pool1d(padded, width, 1)[:, 0].T


def _cells(values: torch.Tensor, size: int, cells: int) -> torch.Tensor:
    """Means over cells, (bin, frame) -> (BANDS, cells)."""
    hertz = RATE_HZ / size
    rows, frames = round(CELL_HZ / hertz), round(CELL_S * RATE_HZ / (size // 4))
    part = values[1 : round(BANDS * CELL_HZ / hertz) + 1, : cells * frames]
    return functional.avg_pool2d(part[None], (rows, frames))[0]


def roughness(audio: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Roughness (plane, band, cell) and coarse level (band, cell) in nepers of power, of `audio` (samples,) at 16 kHz.

    For each of WINDOWS (hop a quarter), D = ln|X|^2 less its moving average over SMOOTH_HZ, and in each cell the
    logarithm of the mean of: below, min(D, 0)^2; above, max(D, 0)^2; step, (D(t) - D(t - 1))^2; bend,
    (D(t + 1) - 2 D(t) + D(t - 1))^2. phase: the mean cosine of the mixed second difference of the phase. Raises
    ValueError for less than four cells of audio, or silence.
    """
    cells = int(len(audio) / RATE_HZ / CELL_S)
    level = np.sqrt(np.mean(audio.astype(np.float64) ** 2)) if len(audio) else 0.0
    if cells < 4 or level < 1e-7:
        raise ValueError(f"texture needs {4 * CELL_S:.2f} s that are not silent, found {len(audio) / RATE_HZ:.2f} s")
    random = np.random.default_rng(len(audio))
    noisy = audio / level + random.standard_normal(len(audio)) * 10 ** (FLOOR_DB / 20)
    signal, planes, coarse = torch.from_numpy(noisy.astype(np.float32)), [], None
    for size in WINDOWS:
        spectrum = torch.stft(signal, size, size // 4, size, _window(size), return_complex=True)
        power = torch.view_as_real(spectrum).square().sum(-1)
        logarithm = torch.log(power / size + 1e-9)
        rough = logarithm - _smoothed(logarithm, max(5, round(SMOOTH_HZ * size / RATE_HZ) | 1))
        below, above = rough.clamp(max=0).square(), rough.clamp(min=0).square()
        step = functional.pad(rough.diff(dim=1), (1, 0)).square()
        bend = functional.pad(rough.diff(n=2, dim=1), (1, 1)).square()
        across = functional.pad(spectrum[1:] * spectrum[:-1].conj(), (0, 0, 1, 0))
        mixed = across[:, 1:] * across[:, :-1].conj()
        cosine = functional.pad(-mixed.real / (mixed.abs() + 1e-12), (1, 0))
        planes += [torch.log(_cells(part, size, cells) + 1e-3) for part in (below, above, step, bend)]
        planes.append(_cells(cosine, size, cells))
        if size == FRAME:
            coarse = torch.log(_cells(power / size, size, cells) + 1e-6)
    return torch.stack(planes), coarse


# --- sameness: the texture student ------------------------------------------------------------------------------------

CELLS, STEP = 40, 20  # cells of a window and between windows: 2.56 s and 1.28 s
GROUPS = ((1, 5), (5, 10), (10, 15), (15, 20))  # bands whose variation is pooled
SCORED = slice(1, None)  # the lowest group (0.4 to 1.9 kHz), where harmonics rule, is learnt and not scored
FLOOR_NEPERS = 1.4  # a cell counts where its power is this far above its band's quietest tenth: noise does not vary
TARGETS = 2 * len(ROUGHNESS) * len(GROUPS)


def variation(rough: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """Logarithm of how much each plane of roughness varies in each group of bands, (axis * plane * group,).

    rough (plane, band, cell), standardised; level (band, cell). Over the cells that count: in time, the mean of
    (y - its mean over the band's cells)^2; in frequency, the mean of (y(band + 1) - y(band))^2; ln(that + 0.01).
    """
    counted = (level > level.quantile(0.1, dim=-1, keepdim=True) + FLOOR_NEPERS).float()
    mean = (rough * counted).sum(-1, keepdim=True) / (counted.sum(-1, keepdim=True) + 1e-3)
    both = functional.pad(counted[1:] * counted[:-1], (0, 0, 0, 1))
    parts = (((rough - mean).square(), counted), (functional.pad(rough.diff(dim=1), (0, 0, 0, 1)).square(), both))
    values = []
    for square, weight in parts:
        for first, last in GROUPS:
            total = (square * weight)[:, first:last].sum((1, 2))
            values.append((total / (weight[first:last].sum() + 1e-3) + 1e-2).log())
    return torch.stack(values).unflatten(0, (2, len(GROUPS))).transpose(1, 2).flatten()


def window_starts(cells: int) -> list[int]:
    """First cells of the windows of a recording; the last window ends with it."""
    return sorted({*range(0, cells - CELLS + 1, STEP), cells - CELLS})


class TextureStudent(nn.Module):
    """Coarse level (window, band, cell) -> mean and log deviation of `variation`, each (window, axis * plane * group).

    Buffers: mean and deviation of the planes of roughness on bona fide speech, and of their variation.
    """

    def __init__(self, width: int = 16, hidden: int = 48) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 5, padding=2)
        self.place = nn.Parameter(torch.zeros(1, width, BANDS, 1))
        self.second = nn.Conv2d(width, width // 2, 3, padding=1)
        self.hidden = nn.Linear(BANDS * (width + 3), hidden)
        self.last = nn.Linear(hidden, 2 * TARGETS)
        self.last.weight.data *= 0.1
        for name, shape in (("plane", (len(ROUGHNESS), 1, 1)), ("middle", (TARGETS,))):
            self.register_buffer(name, torch.zeros(shape))
            self.register_buffer(f"{name}_width", torch.ones(shape))

    def forward(self, level: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        level = level / 4
        floor, top = level.quantile(0.1, dim=-1, keepdim=True), level.amax((1, 2), keepdim=True)
        mean = level.mean(-1, keepdim=True)
        x = torch.stack([level - top, level - mean, level - floor], 1)
        x = functional.silu(self.second(functional.silu(self.first(x) + self.place)))
        x = torch.cat([x.mean(-1).flatten(1), x.std(-1).flatten(1), (floor - top)[..., 0], (mean - top)[..., 0],
                       level.std(-1)], 1)
        x = functional.dropout(x, 0.1, self.training)
        x = functional.dropout(functional.silu(self.hidden(x)), 0.1, self.training)
        expected, spread = self.last(x).chunk(2, 1)
        return expected, spread.clamp(-3, 3)

    def windows(self, rough: torch.Tensor, level: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of `roughness`, the levels (window, band, CELLS) of its windows and their variation (window, target). A
        shorter recording is repeated up to one window."""
        rough = ((rough - self.plane) / self.plane_width).clamp(-5, 5)
        if level.shape[-1] < CELLS:
            times = -(-CELLS // level.shape[-1])
            rough, level = rough.repeat(1, 1, times), level.repeat(1, times)
        spans = [slice(start, start + CELLS) for start in window_starts(level.shape[-1])]
        varied = torch.stack([variation(rough[..., span], level[:, span]) for span in spans])
        return torch.stack([level[:, span] for span in spans]), (varied - self.middle) / self.middle_width

    @torch.inference_mode()
    def surprise(self, rough: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """Variation that is missing, in deviations of bona fide speech, clipped to +-5: (window, axis, plane, group of
        bands that are scored); up = fake."""
        levels, varied = self.windows(rough, level)
        expected, spread = self(levels)
        missing = ((expected - varied) * torch.exp(-spread)).clamp(-5, 5)
        return missing.unflatten(1, (2, len(ROUGHNESS), len(GROUPS)))[..., SCORED]


def sameness(student: TextureStudent, audio: np.ndarray) -> float:
    """Mean surprise of `audio` (samples,) at 16 kHz before the shared channel; up = fake. NaN where it is too short."""
    try:
        return float(student.surprise(*roughness(audio)).mean())
    except ValueError:
        return math.nan


def train_texture_student(clips: Sequence[tuple[torch.Tensor, torch.Tensor]], seed: int, steps: int = 1500,
                          say: Callable[[str], None] = lambda _: None) -> TextureStudent:
    """Fit a student on the `roughness` of bona fide clips, as they are and through random recording chains
    (lib.data.degradations.recorded): a minute on one core.

    Loss: mean over windows and targets of ((y - mu) / s)^2 / 2 + ln s; AdamW, one cycle, 48 windows a step.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        student, random = TextureStudent(), torch.Generator().manual_seed(seed)
        cells = torch.cat([rough.flatten(1) for rough, _ in clips], 1)
        student.plane.copy_(cells.mean(1)[:, None, None])
        student.plane_width.copy_(cells.std(1)[:, None, None])
        pairs = [student.windows(*clip) for clip in clips]
        levels, varied = torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])
        student.middle.copy_(varied.mean(0))
        student.middle_width.copy_(varied.std(0))
        targets = (varied - student.middle) / student.middle_width
        optimiser = torch.optim.AdamW(student.parameters(), 2e-3, weight_decay=0.03)
        for step in range(steps):
            rate = 2e-3 * min(1.0, (step + 1) / 50) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
            for group in optimiser.param_groups:
                group["lr"] = rate
            chosen = torch.randint(len(levels), (48,), generator=random)
            expected, spread = student(levels[chosen])
            loss = (0.5 * ((targets[chosen] - expected) * torch.exp(-spread)).square() + spread).mean()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            if (step + 1) % 500 == 0:
                say(f"texture student, step {step + 1}/{steps}  loss {loss.item():.3f}")
    return student.eval().requires_grad_(False)
