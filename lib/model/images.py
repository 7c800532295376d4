"""Owns the time-frequency front end: the image of speech that the networks see, with axes in seconds and hertz."""

from __future__ import annotations

import functools

import numpy as np
import torch

from lib.data.channel import FRAME
from lib.settings import RATE_HZ, Channel, View

FLOOR = 1e-5
"""Floor of magnitudes before the logarithm; 40 dB below the channel's own noise, so it never shapes a score."""
GROUP_SIZES = {"level": 1, "advance": 2, "delay": 2, "short": 1, "pulse": 4, "mel": 1, "wave": 1}


def channel_count(groups: tuple[str, ...]) -> int:
    """Number of image channels of the named groups. Raises ValueError for an unknown group, or for "mel" beside another: its rows
    are other frequencies."""
    unknown = [group for group in groups if group not in GROUP_SIZES]
    if unknown:
        raise ValueError(f"unknown image channels {unknown}; expected some of {', '.join(GROUP_SIZES)}")
    if "mel" in groups and len(groups) > 1:
        raise ValueError(f"mel bands cannot share an image with {', '.join(group for group in groups if group != 'mel')}: give them alone")
    return sum(GROUP_SIZES[group] for group in groups)


def channel_slice(view: View, groups: tuple[str, ...]) -> list[int]:
    """Positions of the channels of `groups` in an image of `view`."""
    positions, first = [], 0
    for group in view.channels:
        if group in groups:
            positions += range(first, first + GROUP_SIZES[group])
        first += GROUP_SIZES[group]
    return positions


def hop_samples(view: View) -> int:
    return round(view.hop_s * RATE_HZ)


def transform_size(view: View, channel: Channel) -> int:
    """Length of the Fourier transform: the power of two whose bins come nearest to the wanted spacing of rows; for mel bands, twice
    the window's next power of two."""
    if "mel" in view.channels:
        return 2 ** int(np.ceil(np.log2(view.window_s * RATE_HZ)) + 1)
    return 2 ** round(np.log2(RATE_HZ * view.bins / (channel.high_hz - channel.low_hz)))


def row_hz(view: View, channel: Channel) -> np.ndarray:
    """Centre frequency of every row in Hz, (bins,)."""
    if "mel" in view.channels:
        return _mel_hz(view, channel)[1:-1]
    step = RATE_HZ / transform_size(view, channel)
    return (round(channel.low_hz / step) + np.arange(view.bins)) * step


def frame_s(view: View, frames: int) -> np.ndarray:
    """Centre time of every frame in seconds, (frames,): frame n is centred on sample n * hop."""
    return np.arange(frames) * hop_samples(view) / RATE_HZ


def _mel_hz(view: View, channel: Channel) -> np.ndarray:
    """Edges and centres of `bins` overlapping mel bands in Hz, (bins + 2,): HTK's scale, 2595 log10(1 + f / 700)."""
    from librosa import mel_frequencies

    return mel_frequencies(view.bins + 2, fmin=channel.low_hz, fmax=channel.high_hz, htk=True)


@functools.lru_cache(maxsize=4)
def _mel_bank(view: View, channel: Channel) -> torch.Tensor:
    """Triangular filters of unit sum over the bins of the transform, (bins, bin)."""
    from torchaudio.functional import melscale_fbanks

    bank = melscale_fbanks(transform_size(view, channel) // 2 + 1, channel.low_hz, channel.high_hz, view.bins, RATE_HZ).T
    return bank / bank.sum(1, keepdim=True).clamp_min(1e-6)


@functools.lru_cache(maxsize=16)
def _window(samples: int, device: str = "cpu") -> torch.Tensor:
    return torch.hann_window(samples, periodic=True, device=device)


def _stft(audio: torch.Tensor, size: int, hop: int, window_s: float) -> torch.Tensor:
    length = min(size, round(window_s * RATE_HZ))
    return torch.stft(audio, size, hop, length, _window(length, str(audio.device)), center=True, pad_mode="constant",
                      return_complex=True)


def _magnitude(spectrum: torch.Tensor) -> torch.Tensor:
    # Three times as fast as abs(), which takes care not to overflow; audio of full scale is 10^15 times too small for that.
    parts = torch.view_as_real(spectrum)
    return torch.addcmul(parts[..., 0] * parts[..., 0], parts[..., 1], parts[..., 1]).sqrt()


def _log_level(magnitude: torch.Tensor, window_s: float) -> torch.Tensor:
    # A window of n samples passes white noise with a magnitude of about sqrt(n): dividing by it makes windows alike. The
    # two constants bring speech at the channel's level to about zero mean and unit deviation.
    return (torch.log(magnitude / np.sqrt(window_s * RATE_HZ) + FLOOR) + 5.5) / 1.8


def level_power(level: torch.Tensor) -> torch.Tensor:
    """The inverse of the plane "level": its power, as the squared magnitude over the window's number of samples."""
    return ((level * 1.8 - 5.5).exp() - FLOOR).clamp_min(0) ** 2


def _unit(step: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of the phase of `step`, whose magnitude is `size`."""
    parts, scale = torch.view_as_real(step), (size + 1e-9).reciprocal()
    return parts[..., 0] * scale, parts[..., 1] * scale


def _pulses(audio: torch.Tensor, view: View, hop: int, size: int, rows: range, frames: int) -> torch.Tensor:
    """Log-magnitudes through a window of `pulse_s`, four of them a hop apart by a quarter: (batch, 4, frequency, frame).

    Few bins are enough for so short a window; each is repeated to the spacing of the image's rows.
    """
    parts, small = GROUP_SIZES["pulse"], 128
    fine = _log_level(_magnitude(_stft(audio, small, hop // parts, view.pulse_s)), view.pulse_s)
    fine = torch.nn.functional.pad(fine, (parts // 2, frames * parts))[..., : frames * parts].unflatten(-1, (frames, parts))
    coarse = torch.tensor(rows, device=audio.device) // (size // small)
    return fine.permute(0, 3, 1, 2).contiguous().index_select(2, coarse)


def _folded(audio: torch.Tensor, hop: int, rows: int, frames: int) -> torch.Tensor:
    """The samples themselves, (batch, frequency, frame): in frame n those from n * hop on, the first in the lowest row; what is left
    of the rows is zero. Raises ValueError where a hop has more samples than the image has rows."""
    if hop > rows:
        raise ValueError(f'the image channel "wave" needs a row for each of the {hop} samples of a hop, found {rows}: raise view.bins')
    whole = torch.nn.functional.pad(audio, (0, frames * hop - audio.shape[-1])).unflatten(-1, (frames, hop))
    return torch.nn.functional.pad(whole.transpose(1, 2), (0, 0, 0, rows - hop))


def image(audio: torch.Tensor, view: View, channel: Channel) -> torch.Tensor:
    """Images of a batch of recordings: (batch, samples) at 16 kHz -> (batch, channel, frequency, frame) float32.

    level and short: natural logarithm of the magnitude through a long and a short window. advance: cosine and sine of
    the phase step from frame to frame, less the step of the bin's own centre frequency. delay: the same from bin to bin,
    which is the group delay about the window's centre. Vocoders that lose phase change the last two while magnitudes
    stay right. pulse: magnitudes through a window shorter than a pitch period, four of them a hop. wave: the samples. mel, only alone: the
    logarithm of the root of the mean power in `bins` mel bands. Raises ValueError where the recording is shorter than one window
    or a group of channels is unknown.
    """
    size, hop = transform_size(view, channel), hop_samples(view)
    if audio.shape[-1] < size:
        raise ValueError(f"too short: expected at least {size} samples ({size / RATE_HZ:.3f} s), found {audio.shape[-1]}")
    if "mel" in view.channels:
        channel_count(view.channels)
        power = _stft(audio, size, hop, view.window_s).abs().square()
        return _log_level((_mel_bank(view, channel).to(audio.device) @ power).sqrt(), view.window_s)[:, None]
    first = round(channel.low_hz * size / RATE_HZ)
    rows = range(first, min(first + view.bins, size // 2 + 1))
    # One row more than the image has, for the step from its last row to the next.
    spectrum = _stft(audio, size, hop, view.window_s)[..., first : rows.stop + 1, :]
    frames, magnitude = spectrum.shape[-1], _magnitude(spectrum)
    planes = audio.new_empty((len(audio), channel_count(view.channels), len(rows), frames), dtype=torch.float32)
    last = -1
    for group in view.channels:
        last += 1
        if group == "level":
            planes[:, last] = _log_level(magnitude[..., : len(rows), :], view.window_s)
        elif group == "short":
            planes[:, last] = _log_level(_magnitude(_stft(audio, size, hop, view.short_s)[..., first : rows.stop, :]), view.short_s)
        elif group == "pulse":
            planes[:, last : last + 4] = _pulses(audio, view, hop, size, rows, frames)
            last += 3
        elif group == "wave":
            planes[:, last] = _folded(audio, hop, len(rows), frames)
        elif group == "advance":
            inner = slice(0, len(rows))
            step = spectrum[..., inner, 1:] * spectrum[..., inner, :-1].conj()
            turn = torch.exp(torch.tensor(rows, device=audio.device)[:, None] * (-2j * np.pi * hop / size))
            cosine, sine = _unit(step * turn, magnitude[..., inner, 1:] * magnitude[..., inner, :-1])
            for plane, part in zip((last, last + 1), (cosine, sine)):
                planes[:, plane, :, 1:] = part
                planes[:, plane, :, 0] = part[..., 0]
            last += 1
        elif group == "delay":
            # A frame's own centre lies half a transform after its first sample: a phase step of pi.
            step = -(spectrum[..., 1:, :] * spectrum[..., :-1, :].conj())
            cosine, sine = _unit(step, magnitude[..., 1:, :] * magnitude[..., :-1, :])
            for plane, part in zip((last, last + 1), (cosine, sine)):
                planes[:, plane, : part.shape[-2]] = part
                planes[:, plane, part.shape[-2] :] = part[..., -1:, :]  # where the image reaches half the rate
            last += 1
    return planes


def activity(active: np.ndarray, view: View, frames: int) -> np.ndarray:
    """Activity of the image's frames, (frames,) bool, from that of the channel's 20 ms frames."""
    centres = (frame_s(view, frames) * RATE_HZ / FRAME).astype(int)
    return active[np.clip(centres, 0, len(active) - 1)]
