"""Owns the shared channel: one transmission path for all audio, real and fake alike, so that no detector can win by
telling recording chains apart (band edge, level, noise floor, leading silence)."""

from __future__ import annotations

import functools
import hashlib

import numpy as np
import scipy.signal

from lib.settings import RATE_HZ, Channel

FRAME = 320  # samples of an activity frame: 20 ms


@functools.lru_cache(maxsize=8)
def band_filter(low_hz: float, high_hz: float, taps: int = 513) -> np.ndarray:
    """Linear-phase band-pass filter, (taps,): edges about 100 Hz wide at 16 kHz, stop band below -70 dB."""
    return scipy.signal.firwin(taps, [low_hz, high_hz], pass_zero=False, fs=RATE_HZ, window=("kaiser", 7.0))


def frame_levels(audio: np.ndarray) -> np.ndarray:
    """Level of every 20 ms frame in dB full scale, (frames,); the rest of a last frame counts as zeros."""
    padded = np.pad(audio, (0, -len(audio) % FRAME)).reshape(-1, FRAME)
    return 10 * np.log10((padded.astype(np.float64) ** 2).mean(axis=1) + 1e-12)


def active_frames(audio: np.ndarray, pause_db: float) -> np.ndarray:
    """Which 20 ms frames hold speech, (frames,) bool: within `pause_db` of the loudest frames (99 % quantile)."""
    levels = frame_levels(audio)
    return levels > np.quantile(levels, 0.99) - pause_db


def apply_channel(audio: np.ndarray, settings: Channel) -> tuple[np.ndarray, np.ndarray]:
    """Send `audio` (samples,) at 16 kHz through the shared channel.

    Band limit, trimming of leading and trailing pauses, level of the active speech, white noise; the noise is drawn
    from a hash of the samples, so the same recording always gets the same noise and no label can steer it.

    Returns the audio (samples,) float32 and the activity of its 20 ms frames (frames,) bool; pauses inside are kept,
    filled with the noise floor, and left out of every score by that mask.
    Raises ValueError where no frame is active.
    """
    audio = np.asarray(audio, dtype=np.float32)
    if not settings.enabled:
        return audio, active_frames(audio, settings.pause_db)
    start, stop = speech_bounds(audio, settings)
    filtered = scipy.signal.oaconvolve(audio, band_filter(settings.low_hz, settings.high_hz), mode="same")[start:stop]
    active = active_frames(filtered, settings.pause_db)
    mask = np.repeat(active, FRAME)[: len(filtered)]
    power = float(np.mean(filtered[mask].astype(np.float64) ** 2)) if mask.any() else 0.0
    if power < 1e-12:
        raise ValueError("no speech: the recording is silent between the channel's band edges")
    gain = 10 ** (settings.level_db / 20) / np.sqrt(power)
    seed = int.from_bytes(hashlib.sha256(audio.tobytes()).digest()[:8], "little")
    noise = np.random.default_rng(seed).standard_normal(len(filtered))
    noise *= 10 ** ((settings.level_db - settings.snr_db) / 20)
    return (filtered * gain + noise).astype(np.float32), active


def speech_bounds(audio: np.ndarray, settings: Channel) -> tuple[int, int]:
    """First and past-the-last sample that the channel keeps: the frames between the first and last active one."""
    filtered = scipy.signal.oaconvolve(audio, band_filter(settings.low_hz, settings.high_hz), mode="same")
    index = np.flatnonzero(active_frames(filtered, settings.pause_db))
    if not settings.enabled or not len(index):
        return 0, len(audio)
    return int(index[0]) * FRAME, min(len(audio), (int(index[-1]) + 1) * FRAME)
