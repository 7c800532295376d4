"""Owns the shared channel: one transmission path for all audio, real and fake alike, so that no detector can win by
telling recording chains apart. Also the reading of clips through it, and the numbers that describe a recording."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soundfile
import torch
from torch.nn import functional

from lib.data.audio import read_audio
from lib.paths import DATA
from lib.settings import RATE_HZ, Channel

if TYPE_CHECKING:
    import pandas as pd

FRAME = 320  # samples of an activity frame: 20 ms


@functools.lru_cache(maxsize=8)
def band_filter(low_hz: float, high_hz: float, taps: int = 513) -> np.ndarray:
    """Linear-phase band-pass filter, (taps,): edges about 100 Hz wide at 16 kHz, stop band below -70 dB. A windowed
    sinc with a Kaiser window, of gain 1 in the middle of the band. By hand, like what follows: importing scipy.signal
    took a third of a score's start."""
    place, (low, high) = np.arange(taps) - (taps - 1) / 2, (2 * hertz / RATE_HZ for hertz in (low_hz, high_hz))
    ideal = (high * np.sinc(high * place) - low * np.sinc(low * place)) * np.kaiser(taps, 7.0)
    return ideal / np.sum(ideal * np.cos(np.pi * place * (low + high) / 2))


def convolved(audio: np.ndarray, taps: np.ndarray, start: int = 0) -> np.ndarray:
    """As many samples as `audio` (samples,) of its convolution with `taps` (taps,), from sample `start` of that on; by
    overlapping blocks (overlap-save), in the precision of `audio`."""
    size = 2 ** max(12, int(np.ceil(np.log2(4 * len(taps)))))
    step, lead = size - len(taps) + 1, len(taps) - 1 - start
    count = -(-len(audio) // step)
    padded = np.zeros(size + (count - 1) * step, audio.dtype)
    padded[lead : lead + len(audio)] = audio[: len(padded) - lead]
    response = torch.fft.rfft(torch.from_numpy(taps.astype(audio.dtype)), size)
    done = [torch.fft.irfft(torch.fft.rfft(blocks) * response, size)[:, len(taps) - 1 :]
            for blocks in torch.from_numpy(padded).unfold(0, size, step).split(256)]
    return torch.cat(done).reshape(-1)[: len(audio)].numpy()


@functools.lru_cache(maxsize=8)
def dispersion_filter(spread_s: float) -> np.ndarray:
    """All-pass filter, (taps,): the group delay rises linearly from 0 at 0 Hz to `spread_s` at half the rate. It leaves
    magnitudes as they are and takes the waveform's peaks apart."""
    size = 2 ** int(np.ceil(np.log2(RATE_HZ * spread_s * 16 + 64)))
    hertz = np.fft.rfftfreq(size, 1 / RATE_HZ)
    delay = hertz / hertz[-1] * spread_s
    phase = -2 * np.pi * np.concatenate([[0], np.cumsum((delay[1:] + delay[:-1]) / 2)]) * hertz[1]
    return np.fft.irfft(np.exp(1j * phase), size)


def dispersed(audio: np.ndarray, spread_s: float) -> np.ndarray:
    """`audio` (samples,) through the all-pass filter, same length, delayed by up to `spread_s`."""
    return convolved(audio, dispersion_filter(spread_s)) if spread_s else audio


def running_maximum(values: np.ndarray, half: int) -> np.ndarray:
    """The largest of `values` (samples,) within `half` samples to either side; the same shape."""
    return functional.max_pool1d(torch.from_numpy(values)[None], 2 * half + 1, 1, half)[0].numpy()


def limited(audio: np.ndarray, active: np.ndarray, crest_db: float) -> np.ndarray:
    """`audio` (samples,) through a look-ahead limiter `crest_db` above the level of its active frames.

    A studio's limiter would give its recordings away by their peaks alone; after this, all are limited, and harder than
    a studio does. Three passes, since limiting lowers the level that it refers to.
    """
    window = np.hanning(67)[1:-1]
    half = len(window) // 2
    for _ in range(3):
        mask = np.repeat(active, FRAME)[: len(audio)]
        level = np.sqrt(np.mean(audio[mask] ** 2)) if mask.any() else 0.0
        peaks = running_maximum(np.abs(audio), half)
        gain = np.minimum(1.0, level * 10 ** (crest_db / 20) / np.maximum(peaks, 1e-9))
        audio = audio * convolved(np.pad(gain, half, mode="edge"), window / window.sum(), half)[half:-half]
    return audio


def frame_levels(audio: np.ndarray) -> np.ndarray:
    """Level of every 20 ms frame in dB full scale, (frames,); the rest of a last frame counts as zeros."""
    padded = np.pad(audio, (0, -len(audio) % FRAME)).reshape(-1, FRAME)
    return 10 * np.log10((padded.astype(np.float64) ** 2).mean(axis=1) + 1e-12)


def active_frames(audio: np.ndarray, pause_db: float) -> np.ndarray:
    """Which 20 ms frames hold speech, (frames,) bool: within `pause_db` of the loudest frames (99 % quantile)."""
    levels = frame_levels(audio)
    return levels > np.quantile(levels, 0.99) - pause_db


@dataclass(frozen=True)
class Passage:
    """One recording on its way through the shared channel."""

    audio: np.ndarray  # (samples,) float32: what the networks see
    active: np.ndarray  # (frame,) bool: which 20 ms frames of it hold speech
    band: np.ndarray  # (samples,) the same stretch of the recording between the band edges, at its own level
    start: int  # first sample of the recording that is kept


def pass_channel(audio: np.ndarray, settings: Channel, noise: bool = True) -> Passage:
    """Send `audio` (samples,) at 16 kHz through the shared channel.

    Band limit, trimming of leading and trailing pauses, an all-pass, a limiter and another all-pass (so that peaks that
    a studio limited are no sign of anything), level of the active speech, white noise. Neither a gain nor a DC offset
    changes what comes out, up to rounding. Training leaves the noise out (`noise=False`) and draws fresh noise
    (`channel_noise`) for every crop. Pauses inside are kept, filled with the noise floor, and left out of every score
    by the activity. Raises ValueError where no frame is active.
    """
    audio = np.asarray(audio, dtype=np.float32)
    if not settings.enabled:
        return Passage(audio, active_frames(audio, settings.pause_db), audio, 0)
    whole, peak = _band_limited(audio, settings)
    start, stop = _trimmed(whole, settings)
    filtered = band = whole[start:stop]
    active = active_frames(filtered, settings.pause_db)
    if settings.crest_db:
        filtered = limited(dispersed(filtered, settings.dispersion_s[0]), active, settings.crest_db)
    filtered = dispersed(filtered, settings.dispersion_s[1])
    mask = np.repeat(active, FRAME)[: len(filtered)]
    power = float(np.mean(filtered[mask].astype(np.float64) ** 2)) if mask.any() else 0.0
    if power * peak**2 < 1e-12:
        raise ValueError("no speech: the recording is silent between the channel's band edges")
    levelled = filtered * (10 ** (settings.level_db / 20) / np.sqrt(power))
    if noise:
        levelled = levelled + channel_noise(levelled.shape, settings, np.random.default_rng(_noise_seed(band)))
    return Passage(levelled.astype(np.float32), active, band * peak, start)


def apply_channel(audio: np.ndarray, settings: Channel, noise: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """What `pass_channel` makes of `audio`: samples (samples,) float32 and activity of 20 ms frames (frames,) bool."""
    passage = pass_channel(audio, settings, noise)
    return passage.audio, passage.active


def speech_bounds(audio: np.ndarray, settings: Channel) -> tuple[int, int]:
    """First and past-the-last sample that the channel keeps: the frames between the first and last active one."""
    return _trimmed(_band_limited(audio, settings)[0], settings) if settings.enabled else (0, len(audio))


def _band_limited(audio: np.ndarray, settings: Channel) -> tuple[np.ndarray, float]:
    """`audio` (samples,) between the band edges, at a peak of 1 before the filter, and its own peak.

    The offset goes first: at its ends, where the filter sees zeros beyond, it would leave two clicks.
    """
    centred = np.asarray(audio, dtype=np.float64) - np.mean(audio, dtype=np.float64)
    peak = float(np.abs(centred).max())
    levelled = (centred / max(peak, 1e-12)).astype(np.float32)
    taps = band_filter(settings.low_hz, settings.high_hz)
    return convolved(levelled, taps, len(taps) // 2), peak


def _trimmed(filtered: np.ndarray, settings: Channel) -> tuple[int, int]:
    index = np.flatnonzero(active_frames(filtered, settings.pause_db))
    if not len(index):
        return 0, len(filtered)
    return int(index[0]) * FRAME, min(len(filtered), (int(index[-1]) + 1) * FRAME)


def _noise_seed(band: np.ndarray) -> list[int]:
    """Seed of a recording's noise: how many frames it has and which is the loudest.

    The same recording always gets the same noise, no label can steer it, and a gain, an offset or another bit depth,
    which change every sample, do not change it.
    """
    levels = frame_levels(band)
    return [len(levels), int(levels.argmax())]


def channel_noise(shape: tuple[int, ...], settings: Channel, random: np.random.Generator) -> np.ndarray:
    """The channel's white noise, float32; silence where the channel is off."""
    if not settings.enabled:
        return np.zeros(shape, dtype=np.float32)
    scale = np.float32(10 ** ((settings.level_db - settings.snr_db) / 20))
    return random.standard_normal(shape).astype(np.float32) * scale


class PreparedClips(Sequence):
    """Clips after the channel, (audio, active) each, read when asked for: memory does not grow with their number."""

    def __init__(self, paths: list[Path], channel: Channel) -> None:
        self.paths, self.channel = paths, channel

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int | slice) -> tuple[np.ndarray, np.ndarray] | PreparedClips:
        if isinstance(index, slice):
            return PreparedClips(self.paths[index], self.channel)
        return apply_channel(read_audio(self.paths[index], strict=False)[0], self.channel)


def voice_weights(voices: pd.Series) -> np.ndarray | None:
    """Chance of each clip to be drawn, (clips,): each voice in proportion to the root of its number of clips, so that a
    few large voices do not drown the small ones. None, all alike, where there is one voice."""
    if voices.nunique() < 2:
        return None
    weights = voices.map(voices.value_counts()).to_numpy(float) ** -0.5
    return weights / weights.sum()


class ClipReader:
    """Random crops of clips after the channel; clips are kept in memory only up to `limit_bytes`, else read again.
    `alter(audio (samples,), name)` is what happens to a clip before it, such as a recording chain."""

    def __init__(self, clips: pd.DataFrame, channel: Channel, root: Path = DATA, limit_bytes: int = 1_000_000_000,
                 alter: Callable[[np.ndarray, str], np.ndarray] | None = None) -> None:
        self.paths, self.alter = [Path(root) / path for path in clips.path], alter
        self.weights = voice_weights(clips.speaker)
        self.channel, self.limit = channel, limit_bytes
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self.paths)

    def clean(self, index: int) -> np.ndarray:
        """One clip through the channel without its noise, (samples,) float32. Raises ValueError for another rate."""
        if index in self._kept:
            self._kept.move_to_end(index)
            return self._kept[index]
        audio, rate_hz = soundfile.read(self.paths[index], dtype="float32")
        if rate_hz != RATE_HZ:
            raise ValueError(f"{self.paths[index]}: expected {RATE_HZ} Hz, found {rate_hz}; prepare the clips again")
        audio = self.alter(audio, self.paths[index].stem) if self.alter else audio
        audio = self._kept[index] = apply_channel(audio, self.channel, noise=False)[0]
        self._bytes += audio.nbytes
        worker = torch.utils.data.get_worker_info()
        limit = self.limit / (worker.num_workers if worker else 1)
        while self._bytes > limit and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return audio

    def crops(self, batch: int, samples: int, random: np.random.Generator, rows: slice = slice(None)) -> np.ndarray:
        """Random crops, (batch, samples) float32, without noise; a shorter clip is repeated up to the length.

        Clips are drawn by `voice_weights`. Only `rows` are read, the others stay zero: what is drawn from `random` does
        not depend on what is read, so that several processes can share one batch.
        """
        result = np.zeros((batch, samples), dtype=np.float32)
        indices, places = random.choice(len(self), batch, p=self.weights), random.random(batch)
        for row in range(batch)[rows]:
            audio = self.clean(int(indices[row]))
            start = int(places[row] * max(1, len(audio) - samples + 1))
            crop = audio[start : start + samples]
            result[row] = crop if len(crop) == samples else np.resize(crop, samples)
        return result


# --- numbers of a recording -------------------------------------------------------------------------------------------


def traits(audio: np.ndarray, active: np.ndarray, rate_hz: int = RATE_HZ) -> dict[str, float]:
    """Eleven numbers of audio (samples,), before or after the channel, of which `active_frames` has at least one frame;
    levels are in dB full scale, spectra means over active frames.

    noise_floor_db: 5 % quantile of frame levels minus the active level; rolloff_hz: below it lies 95 % of the power;
    bandwidth_hz: highest frequency within 50 dB of the strongest; tilt_db_per_octave: regression from 300 Hz to 5 kHz,
    every octave alike; crest_db: peak over the active level; clipped_share: samples within 1 % of the highest peak
    beside another such; level_db: of the whole clip; speech_s: active time; paused_share: the rest.
    """
    audio = np.asarray(audio, dtype=np.float64)
    frames = np.pad(audio, (0, -len(audio) % FRAME)).reshape(-1, FRAME)[active]
    level = 10 * np.log10(np.mean(frames**2) + 1e-12)
    power = (np.abs(np.fft.rfft(frames * np.hanning(FRAME), 1024)) ** 2).mean(axis=0) + 1e-20
    hertz = np.fft.rfftfreq(1024, 1 / rate_hz)
    band = (hertz >= 300) & (hertz <= 5000)
    octaves, band_db = np.log2(hertz[band]), 10 * np.log10(power[band])
    magnitude = np.abs(audio)
    top = magnitude >= 0.99 * magnitude.max()
    numbers = {
        "noise_floor_db": np.quantile(frame_levels(audio), 0.05) - level,
        "rolloff_hz": np.interp(0.95, np.cumsum(power) / power.sum(), hertz),
        "bandwidth_hz": hertz[power > power.max() * 1e-5][-1],
        "tilt_db_per_octave": np.polyfit(octaves, band_db, 1, w=hertz[band] ** -0.5)[0],
        "crest_db": 20 * np.log10(magnitude.max() + 1e-9) - level,
        "clipped_share": np.mean(top[1:] & top[:-1]),
        "level_db": 10 * np.log10(np.mean(audio**2) + 1e-12),
        "leading_silence_s": np.argmax(active) * FRAME / rate_hz,
        "duration_s": len(audio) / rate_hz,
        "speech_s": np.sum(active) * FRAME / rate_hz,
        "paused_share": 1 - np.mean(active),
    }
    return {name: float(value) for name, value in numbers.items()}
