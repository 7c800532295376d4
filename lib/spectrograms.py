"""Owns the time-frequency front end: views of speech as images with axes in seconds and hertz."""

from __future__ import annotations

import functools

import numpy as np
import torch

from lib.channel import FRAME
from lib.settings import RATE_HZ, Channel, View

FLOOR = 1e-5
"""Floor of magnitudes before the logarithm; 40 dB below the channel's own noise, so it never shapes a score."""


def view_shape(view: View, samples: int) -> tuple[int, int]:
    """(frequency rows, frames) of the image of `samples` samples: frames are centred, hop by hop, from sample 0."""
    return view.bins, 1 + samples // round(view.hop_s * RATE_HZ)


def row_hz(view: View, channel: Channel) -> np.ndarray:
    """Centre frequency of every row in Hz, (bins,). Rows of a mel view are spaced on the mel scale."""
    if view.kind == "mel":
        import librosa

        return librosa.mel_frequencies(view.bins + 2, fmin=channel.low_hz, fmax=channel.high_hz)[1:-1]
    return _first_bin(view, channel)[0] + np.arange(view.bins) * _first_bin(view, channel)[1]


def frame_s(view: View, frames: int) -> np.ndarray:
    """Centre time of every frame in seconds, (frames,)."""
    return np.arange(frames) * round(view.hop_s * RATE_HZ) / RATE_HZ


def _first_bin(view: View, channel: Channel) -> tuple[float, float]:
    """Frequency of the first row and the spacing of rows in Hz, for a linear frequency axis."""
    spacing = (channel.high_hz - channel.low_hz) / view.bins
    step = RATE_HZ / _fft_size(spacing)
    return round(channel.low_hz / step) * step, step


def _fft_size(spacing_hz: float) -> int:
    """Transform length whose bins are nearest to the wanted spacing among powers of two."""
    return 2 ** round(np.log2(RATE_HZ / spacing_hz))


@functools.lru_cache(maxsize=16)
def _window(samples: int) -> torch.Tensor:
    return torch.hann_window(samples, periodic=True)


@functools.lru_cache(maxsize=8)
def _mel_bank(view: View, low_hz: float, high_hz: float, size: int) -> torch.Tensor:
    import librosa

    return torch.from_numpy(librosa.filters.mel(sr=RATE_HZ, n_fft=size, n_mels=view.bins, fmin=low_hz, fmax=high_hz))


def stft(audio: torch.Tensor, view: View, size: int) -> torch.Tensor:
    """Complex short-time Fourier transform (..., size // 2 + 1, frames), frames centred on multiples of the hop."""
    length = round(view.window_s * RATE_HZ)
    return torch.stft(audio, size, round(view.hop_s * RATE_HZ), length, _window(length), center=True,
                      pad_mode="constant", return_complex=True)


def image(audio: np.ndarray | torch.Tensor, view: View, channel: Channel) -> torch.Tensor:
    """The view of `audio` (samples,) at 16 kHz: (frequency, frame) float32.

    magnitude and mel: natural logarithm of the magnitude, shifted and scaled to about zero mean and unit deviation
    for speech at the channel's level. phase: cosine of the deviation of the phase advance from the bin's own centre
    frequency, in [-1, 1], which a vocoder that loses phase changes while magnitudes stay right.
    """
    audio = torch.as_tensor(np.asarray(audio, dtype=np.float32))
    spacing = (channel.high_hz - channel.low_hz) / view.bins
    size = max(_fft_size(spacing), 2 ** int(np.ceil(np.log2(view.window_s * RATE_HZ))))
    if view.kind == "mel":
        magnitude = stft(audio, view, size).abs()
        return _normalised(_mel_bank(view, channel.low_hz, channel.high_hz, size) @ magnitude, view)
    spectrum = stft(audio, view, size)
    low_hz, step = _first_bin(view, channel)
    stride = round(step * size / RATE_HZ)
    first = round(low_hz * size / RATE_HZ)
    if view.kind == "magnitude":
        return _normalised(spectrum.abs()[first : first + stride * view.bins : stride], view)
    if view.kind == "phase":
        advance = spectrum[:, 1:] * spectrum[:, :-1].conj()
        advance = torch.cat([advance[:, :1], advance], dim=1)
        hop = round(view.hop_s * RATE_HZ)
        expected = 2 * np.pi * torch.arange(spectrum.shape[0])[:, None] * hop / size
        return torch.cos(advance.angle() - expected)[first : first + stride * view.bins : stride].contiguous()
    raise ValueError(f"view kind {view.kind!r}: expected magnitude, mel or phase")


def _normalised(magnitude: torch.Tensor, view: View) -> torch.Tensor:
    # A window of n samples passes white noise with a magnitude of about sqrt(n): dividing by it makes views alike.
    scale = np.sqrt(round(view.window_s * RATE_HZ))
    return (torch.log(magnitude / scale + FLOOR) + 5.5) / 1.8


def activity(active: np.ndarray, view: View, frames: int) -> np.ndarray:
    """Activity of the view's frames, (frames,) bool, from that of the channel's 20 ms frames."""
    centres = (frame_s(view, frames) * RATE_HZ / FRAME).astype(int)
    return active[np.clip(centres, 0, len(active) - 1)]
