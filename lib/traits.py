"""Owns the numbers that say how a recording was made and nothing of how its speech was: of them, the trivial baseline
(lib.baselines) and the answer "outside what I know" (lib.abstention) each take their own."""

from __future__ import annotations

import numpy as np

from lib.channel import FRAME, frame_levels
from lib.settings import RATE_HZ


def traits(audio: np.ndarray, active: np.ndarray, rate_hz: int = RATE_HZ) -> dict[str, float]:
    """Eleven numbers of audio (samples,), before or after the shared channel, with at least one `active` frame of 320 samples
    (`lib.channel.active_frames`); levels are in dB full scale, spectra means over active frames.

    noise_floor_db: 5 % quantile of frame levels minus the active level; rolloff_hz: below it lies 95 % of the power; bandwidth_hz:
    highest frequency within 50 dB of the strongest; tilt_db_per_octave: regression from 300 Hz to 5 kHz with every octave counting
    alike; crest_db: peak over the active level; clipped_share: samples within 1 % of the highest peak beside another such;
    level_db: of the whole clip; leading_silence_s; duration_s; speech_s: active time; paused_share.
    """
    audio = np.asarray(audio, dtype=np.float64)
    frames = np.pad(audio, (0, -len(audio) % FRAME)).reshape(-1, FRAME)[active]
    level = 10 * np.log10(np.mean(frames**2) + 1e-12)
    power = (np.abs(np.fft.rfft(frames * np.hanning(FRAME), 1024)) ** 2).mean(axis=0) + 1e-20
    hertz = np.fft.rfftfreq(1024, 1 / rate_hz)
    band = (hertz >= 300) & (hertz <= 5000)
    magnitude = np.abs(audio)
    top = magnitude >= 0.99 * magnitude.max()
    found = {
        "noise_floor_db": np.quantile(frame_levels(audio), 0.05) - level,
        "rolloff_hz": np.interp(0.95, np.cumsum(power) / power.sum(), hertz),
        "bandwidth_hz": hertz[power > power.max() * 1e-5][-1],
        "tilt_db_per_octave": np.polyfit(np.log2(hertz[band]), 10 * np.log10(power[band]), 1, w=hertz[band] ** -0.5)[0],
        "crest_db": 20 * np.log10(magnitude.max() + 1e-9) - level,
        "clipped_share": np.mean(top[1:] & top[:-1]),
        "level_db": 10 * np.log10(np.mean(audio**2) + 1e-12),
        "leading_silence_s": np.argmax(active) * FRAME / rate_hz,
        "duration_s": len(audio) / rate_hz,
        "speech_s": np.sum(active) * FRAME / rate_hz,
        "paused_share": 1 - np.mean(active),
    }
    return {name: float(value) for name, value in found.items()}
