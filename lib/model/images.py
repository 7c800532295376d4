"""Owns the time-frequency front end: the image of speech that networks see, with axes in seconds and hertz."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from lib.data.channel import FRAME
from lib.settings import RATE_HZ, Channel, View

FLOOR = 1e-5
"""Floor of magnitudes before the logarithm; 40 dB below the channel's own noise, so it never shapes a score."""
PLANE_COUNTS = {"level": 1, "advance": 2, "delay": 2, "short": 1, "pulse": 4}


def plane_count(groups: tuple[str, ...]) -> int:
    """Number of planes of the named groups. Raises ValueError for an unknown group."""
    unknown = [group for group in groups if group not in PLANE_COUNTS]
    if unknown:
        raise ValueError(f"unknown image planes {unknown}; expected some of {', '.join(PLANE_COUNTS)}")
    return sum(PLANE_COUNTS[group] for group in groups)


def plane_places(view: View, groups: tuple[str, ...]) -> list[int]:
    """Positions of the planes of `groups` in an image of `view`."""
    positions, first = [], 0
    for group in view.planes:
        if group in groups:
            positions += range(first, first + PLANE_COUNTS[group])
        first += PLANE_COUNTS[group]
    return positions


class FrontEnd(nn.Module):
    """A network's front end, without weights: audio (batch, samples) after the shared channel -> image (batch, plane,
    frequency, frame) of those `planes` of the view that the network sees (empty: all).

    With `picture`, the view's image of the same audio, its planes are taken from there: teacher and student share one.
    With `colours`, three planes play red, green and blue: the first one thrice, or level, cosine of advance, of delay.
    """

    def __init__(self, view: View, channel: Channel, planes: tuple[str, ...] = (), colours: bool = False) -> None:
        super().__init__()
        self.view, self.channel = view, channel
        self.own = replace(view, planes=tuple(group for group in view.planes if group in (planes or view.planes)))
        self.colours = ([0, 1, 3] if plane_count(self.own.planes) > 3 else [0, 0, 0]) if colours else []

    @property
    def planes(self) -> int:
        """Number of planes that come out."""
        return len(self.colours) or plane_count(self.own.planes)

    def forward(self, audio: torch.Tensor, picture: torch.Tensor | None = None) -> torch.Tensor:
        if picture is None:
            picture = image(audio, self.own, self.channel)
        elif self.own != self.view:
            picture = picture[:, plane_places(self.view, self.own.planes)]
        return picture[:, self.colours] if self.colours else picture


def hop_samples(view: View) -> int:
    """Samples from frame to frame."""
    return round(view.hop_s * RATE_HZ)


def transform_size(view: View, channel: Channel) -> int:
    """Length of the Fourier transform: the power of two whose bins come nearest to the wanted spacing of rows."""
    return 2 ** round(np.log2(RATE_HZ * view.bins / (channel.high_hz - channel.low_hz)))


def row_hz(view: View, channel: Channel) -> np.ndarray:
    """Centre frequency of every row in Hz, (bins,)."""
    step = RATE_HZ / transform_size(view, channel)
    return (round(channel.low_hz / step) + np.arange(view.bins)) * step


def frame_s(view: View, frames: int) -> np.ndarray:
    """Centre time of every frame in seconds, (frames,): frame n is centred on sample n * hop."""
    return np.arange(frames) * hop_samples(view) / RATE_HZ


@functools.lru_cache(maxsize=16)
def _window(samples: int, device: str = "cpu") -> torch.Tensor:
    return torch.hann_window(samples, periodic=True, device=device)


def _stft(audio: torch.Tensor, size: int, hop: int, window_s: float) -> torch.Tensor:
    length = min(size, round(window_s * RATE_HZ))
    return torch.stft(audio, size, hop, length, _window(length, str(audio.device)), center=True, pad_mode="constant",
                      return_complex=True)


def _magnitude(spectrum: torch.Tensor) -> torch.Tensor:
    # Three times as fast as abs(), which takes care not to overflow; full scale is 10^15 times too small for that.
    parts = torch.view_as_real(spectrum)
    return torch.addcmul(parts[..., 0] * parts[..., 0], parts[..., 1], parts[..., 1]).sqrt()


def _log_level(magnitude: torch.Tensor, window_s: float) -> torch.Tensor:
    # A window of n samples passes white noise with a magnitude of about sqrt(n): dividing by it makes windows alike.
    # The two constants bring speech at the channel's level to about zero mean and unit deviation.
    return (torch.log(magnitude / np.sqrt(window_s * RATE_HZ) + FLOOR) + 5.5) / 1.8


def _unit(step: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of the phase of `step`, whose magnitude is `size`."""
    parts, scale = torch.view_as_real(step), (size + 1e-9).reciprocal()
    return parts[..., 0] * scale, parts[..., 1] * scale


def _pulses(audio: torch.Tensor, view: View, hop: int, size: int, rows: range, frames: int) -> torch.Tensor:
    """Log-magnitudes through a window of `pulse_s`, four a quarter of a hop apart: (batch, 4, frequency, frame).

    Few bins are enough for so short a window; each is repeated to the spacing of the image's rows.
    """
    parts, small = PLANE_COUNTS["pulse"], 128
    fine = _log_level(_magnitude(_stft(audio, small, hop // parts, view.pulse_s)), view.pulse_s)
    fine = nn.functional.pad(fine, (parts // 2, frames * parts))[..., : frames * parts].unflatten(-1, (frames, parts))
    coarse = torch.tensor(rows, device=audio.device) // (size // small)
    return fine.permute(0, 3, 1, 2).contiguous().index_select(2, coarse)


def image(audio: torch.Tensor, view: View, channel: Channel) -> torch.Tensor:
    """Images of a batch of recordings: (batch, samples) at 16 kHz -> (batch, plane, frequency, frame) float32.

    level and short: natural logarithm of the magnitude through a long and a short window. advance: cosine and sine of
    the phase step from frame to frame, less the step of the bin's centre frequency. delay: the same from bin to bin,
    which is the group delay about the window's centre. Vocoders that lose phase change the last two while magnitudes
    stay right. pulse: magnitudes through a window shorter than a pitch period, four of them a hop. Raises ValueError
    where the recording is shorter than one window or a group of planes is unknown.
    """
    size, hop = transform_size(view, channel), hop_samples(view)
    if audio.shape[-1] < size:
        expected = f"expected at least {size} samples ({size / RATE_HZ:.3f} s)"
        raise ValueError(f"too short: {expected}, found {audio.shape[-1]}")
    first = round(channel.low_hz * size / RATE_HZ)
    rows = range(first, min(first + view.bins, size // 2 + 1))
    # One row more than the image has, for the step from its last row to the next.
    spectrum = _stft(audio, size, hop, view.window_s)[..., first : rows.stop + 1, :]
    frames, magnitude = spectrum.shape[-1], _magnitude(spectrum)
    planes = audio.new_empty((len(audio), plane_count(view.planes), len(rows), frames), dtype=torch.float32)
    place = 0
    for group in view.planes:
        if group == "level":
            planes[:, place] = _log_level(magnitude[..., : len(rows), :], view.window_s)
        elif group == "short":
            short = _stft(audio, size, hop, view.short_s)[..., first : rows.stop, :]
            planes[:, place] = _log_level(_magnitude(short), view.short_s)
        elif group == "pulse":
            planes[:, place : place + 4] = _pulses(audio, view, hop, size, rows, frames)
        elif group == "advance":
            inner = slice(0, len(rows))
            step = spectrum[..., inner, 1:] * spectrum[..., inner, :-1].conj()
            turn = torch.exp(torch.tensor(rows, device=audio.device)[:, None] * (-2j * np.pi * hop / size))
            parts = _unit(step * turn, magnitude[..., inner, 1:] * magnitude[..., inner, :-1])
            for plane, part in enumerate(parts, place):
                planes[:, plane, :, 1:] = part
                planes[:, plane, :, 0] = part[..., 0]
        elif group == "delay":
            # A frame's own centre lies half a transform after its first sample: a phase step of pi.
            step = -(spectrum[..., 1:, :] * spectrum[..., :-1, :].conj())
            for plane, part in enumerate(_unit(step, magnitude[..., 1:, :] * magnitude[..., :-1, :]), place):
                planes[:, plane, : part.shape[-2]] = part
                planes[:, plane, part.shape[-2] :] = part[..., -1:, :]  # where the image reaches half the rate
        place += PLANE_COUNTS[group]
    return planes


def stride_of(size: int, level_size: int) -> int:
    """Image rows for each row of a pyramid level, or frames for each frame: 4, 8, 16. Levels are rounded up, so that a
    whole quotient is not enough: of 33 frames a stride of 16 leaves 3."""
    powers = (2**power for power in range(size.bit_length() + 1))
    return next((stride for stride in powers if -(-size // stride) == level_size), round(size / level_size))


def activity(active: np.ndarray, view: View, frames: int) -> np.ndarray:
    """Activity of the image's frames, (frames,) bool, from that of the channel's 20 ms frames."""
    centres = (frame_s(view, frames) * RATE_HZ / FRAME).astype(int)
    return active[np.clip(centres, 0, len(active) - 1)]
