"""Owns what can happen to a recording on its way: codecs, noise, rooms, rates, levels, cuts, one named condition each."""

from __future__ import annotations

import functools
import io
import subprocess
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.signal

from lib import seeds
from lib.channel import apply_channel
from lib.settings import RATE_HZ

if TYPE_CHECKING:
    from lib.detector import Detector
    from lib.study import Study

Degradation = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def ffmpeg_codec(audio: np.ndarray, _: np.random.Generator, codec: str, container: str, rate_hz: int = RATE_HZ,
                 kbps: int = 0) -> np.ndarray:
    """A round trip through one of ffmpeg's encoders, (samples,) -> the same length; the delay of the codec is undone.

    Raises RuntimeError where ffmpeg or the encoder is missing.
    """
    import soundfile

    wav = io.BytesIO()
    soundfile.write(wav, audio, RATE_HZ, format="WAV", subtype="PCM_16")
    quality = ["-b:a", f"{kbps}k"] if kbps else []
    quiet = ["ffmpeg", "-hide_banner", "-loglevel", "error"]
    encode = [*quiet, "-f", "wav", "-i", "-", "-ar", str(rate_hz), "-ac", "1", "-c:a", codec, *quality, "-f", container, "-"]
    # Raw telephone codecs carry no header: the decoder has to be told.
    raw = {"g722": ["-f", "g722"], "mulaw": ["-f", "mulaw", "-ar", str(rate_hz), "-ac", "1"]}.get(container, [])
    decode = [*quiet, *raw, "-i", "-", "-f", "f32le", "-ar", str(RATE_HZ), "-ac", "1", "-"]
    try:
        coded = subprocess.run(encode, input=wav.getvalue(), capture_output=True, check=True).stdout
        decoded = subprocess.run(decode, input=coded, capture_output=True, check=True).stdout
    except FileNotFoundError:
        raise RuntimeError("codec conditions need ffmpeg (apt-get install ffmpeg)") from None
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"ffmpeg cannot make {codec}: {error.stderr.decode(errors='replace').strip()[-200:]}") from None
    result = np.frombuffer(decoded, dtype=np.float32)
    lags = scipy.signal.correlate(result[: 4 * RATE_HZ], audio[: 4 * RATE_HZ], mode="full", method="fft")
    delay = max(0, int(np.argmax(np.abs(lags))) - min(len(audio), 4 * RATE_HZ) + 1)
    result = result[min(delay, 4000) :][: len(audio)]
    return np.pad(result, (0, len(audio) - len(result))).astype(np.float32)


def noise(audio: np.ndarray, random: np.random.Generator, snr_db: float, colour: str = "white") -> np.ndarray:
    """Additive white or pink noise at a signal-to-noise ratio over the whole clip."""
    drawn = random.standard_normal(len(audio))
    if colour == "pink":
        spectrum = np.fft.rfft(drawn)
        drawn = np.fft.irfft(spectrum / np.sqrt(np.maximum(np.arange(len(spectrum)), 1)), len(audio))
    drawn *= np.sqrt(np.mean(audio**2) / np.mean(drawn**2)) * 10 ** (-snr_db / 20)
    return (audio + drawn).astype(np.float32)


def room(audio: np.ndarray, random: np.random.Generator, rt60_s: float) -> np.ndarray:
    """Convolution with a synthetic room: exponentially decaying noise behind a direct path."""
    length = int(rt60_s * RATE_HZ)
    tail = random.standard_normal(length) * 10 ** (-3 * np.arange(length) / length)
    tail *= 0.5 / np.sqrt((tail**2).sum())
    tail[0] = 1.0
    return scipy.signal.oaconvolve(audio, tail)[: len(audio)].astype(np.float32)


def resampled(audio: np.ndarray, _: np.random.Generator, rate_hz: int) -> np.ndarray:
    import soxr

    there = soxr.resample(audio.astype(np.float32), RATE_HZ, rate_hz, quality="HQ")
    back = soxr.resample(there, rate_hz, RATE_HZ, quality="HQ")[: len(audio)]
    return np.pad(back, (0, len(audio) - len(back)))


def tilted(audio: np.ndarray, _: np.random.Generator, db_per_octave: float) -> np.ndarray:
    spectrum = np.fft.rfft(audio)
    octaves = np.log2(np.maximum(np.fft.rfftfreq(len(audio), 1 / RATE_HZ), 60) / 1000)
    return np.fft.irfft(spectrum * 10 ** (db_per_octave * octaves / 20), len(audio)).astype(np.float32)


def low_passed(audio: np.ndarray, _: np.random.Generator, edge_hz: float) -> np.ndarray:
    return scipy.signal.sosfiltfilt(scipy.signal.butter(8, edge_hz, fs=RATE_HZ, output="sos"), audio).astype(np.float32)


def cut(audio: np.ndarray, random: np.random.Generator, seconds: float) -> np.ndarray:
    """A random stretch of the clip, or the whole of it where it is shorter."""
    length = round(seconds * RATE_HZ)
    start = int(random.integers(0, max(1, len(audio) - length + 1)))
    return audio[start : start + length]


def silence(audio: np.ndarray, _: np.random.Generator, seconds: float) -> np.ndarray:
    return np.concatenate([np.zeros(round(seconds * RATE_HZ), np.float32), audio])


def clipped(audio: np.ndarray, _: np.random.Generator, share: float) -> np.ndarray:
    """Clipped so that `share` of the samples is at full scale."""
    limit = np.quantile(np.abs(audio), 1 - share)
    return np.clip(audio, -limit, limit)


def gain(audio: np.ndarray, _: np.random.Generator, db: float) -> np.ndarray:
    return (audio * 10 ** (db / 20)).astype(np.float32)


def offset(audio: np.ndarray, _: np.random.Generator, level: float) -> np.ndarray:
    return (audio * (1 - level) + level).astype(np.float32)


def untouched(audio: np.ndarray, _: np.random.Generator) -> np.ndarray:
    return audio


_p = functools.partial
_g722 = _p(ffmpeg_codec, codec="g722", container="g722")
CONDITIONS: dict[str, dict[str, Degradation]] = {
    "codec": {
        "MP3 64 kb/s": _p(ffmpeg_codec, codec="libmp3lame", container="mp3", kbps=64),
        "MP3 24 kb/s": _p(ffmpeg_codec, codec="libmp3lame", container="mp3", kbps=24),
        "AAC 48 kb/s": _p(ffmpeg_codec, codec="aac", container="adts", kbps=48),
        "Opus 24 kb/s": _p(ffmpeg_codec, codec="libopus", container="ogg", kbps=24),
        "Opus 12 kb/s": _p(ffmpeg_codec, codec="libopus", container="ogg", kbps=12),
        "Vorbis 48 kb/s": _p(ffmpeg_codec, codec="libvorbis", container="ogg", kbps=48),
        "G.722": _g722,
        "mu-law 8 kHz": _p(ffmpeg_codec, codec="pcm_mulaw", container="mulaw", rate_hz=8000),
    },
    "noise": {
        **{f"white {snr} dB": _p(noise, snr_db=snr) for snr in (30, 20, 10)},
        **{f"pink {snr} dB": _p(noise, snr_db=snr, colour="pink") for snr in (30, 20, 10)},
    },
    "room": {f"RT60 {rt60} s": _p(room, rt60_s=rt60) for rt60 in (0.2, 0.5)},
    "rate": {f"{rate // 1000} kHz and back": _p(resampled, rate_hz=rate) for rate in (8000, 11025, 22050, 44100)},
    "length": {f"{seconds} s": _p(cut, seconds=seconds) for seconds in (0.5, 1.0, 2.0)},
    "level": {"gain -20 dB": _p(gain, db=-20), "clipped 1 %": _p(clipped, share=0.01), "clipped 5 %": _p(clipped, share=0.05)},
    "silence": {"1 s of silence before": _p(silence, seconds=1.0)},
}

INTERVENTIONS: dict[str, Degradation] = {
    "untouched": untouched,
    "leading silence 0.7 s": _p(silence, seconds=0.7),
    "gain -20 dB": _p(gain, db=-20),
    "DC offset 0.05": _p(offset, level=0.05),
    "noise floor 40 dB": _p(noise, snr_db=40),
    "noise floor 30 dB": _p(noise, snr_db=30),
    "tilt +1 dB/octave": _p(tilted, db_per_octave=1.0),
    "tilt -1 dB/octave": _p(tilted, db_per_octave=-1.0),
    "low-pass 7 kHz": _p(low_passed, edge_hz=7000),
    "low-pass 5 kHz": _p(low_passed, edge_hz=5000),
    "22.05 kHz and back": _p(resampled, rate_hz=22050),
    "11 kHz and back": _p(resampled, rate_hz=11025),
    "G.722": _g722,
    "Vorbis 48 kb/s": _p(ffmpeg_codec, codec="libvorbis", container="ogg", kbps=48),
    "first 2 s": _p(cut, seconds=2.0),
}


def degraded_scores(study: Study, detector: Detector, clips: pd.DataFrame, conditions: dict[str, Degradation],
                    limit: int = 40) -> pd.DataFrame:
    """Anomaly of up to `limit` clips of each generator under each condition: `clip_id, generator, role, condition,
    anomaly`. A condition that cannot be made (a missing encoder) is left out and said."""
    from lib.audio import read_audio
    from lib.paths import DATA

    clips = clips.groupby("generator", sort=False).head(limit)
    rows = []
    for name, degrade in conditions.items():
        try:
            for clip in clips.itertuples():
                audio = read_audio(DATA / clip.path, strict=False)[0]
                touched = degrade(audio, seeds.stream(0, name, clip.clip_id))
                anomaly = detector.score_prepared(*apply_channel(touched, study.settings.channel))
                rows.append((clip.clip_id, clip.generator, clip.role, clip.parent, clip.speaker, name, anomaly))
        except RuntimeError as error:
            print(f"left out: {name}: {error}")
    return pd.DataFrame(rows, columns=["clip_id", "generator", "role", "parent", "speaker", "condition", "anomaly"])


def degrade_table(study: Study, detector: Detector, experiment: str, conditions: dict[str, Degradation],
                  generators: tuple[str, ...]) -> pd.DataFrame:
    """Shift of the median anomaly of real test clips and of `generators`' copies under each condition, in standard
    deviations of the untouched real clips: `condition, source, shift`."""
    clips = study.test(experiment)
    clips = clips[(clips[experiment] == "test") & ((clips.role == "bonafide") | clips.generator.isin(generators))]
    scores = degraded_scores(study, detector, clips, conditions, limit=max(4, study.settings.data.single_test // 2))
    base = scores[(scores.condition == next(iter(conditions))) & (scores.role == "bonafide")].anomaly
    table = scores.groupby(["condition", "generator"], sort=False).anomaly.median().reset_index()
    table["shift"] = (table.anomaly - base.median()) / base.std()
    return table.assign(source=table.generator.replace("", "bona fide"))[["condition", "source", "shift"]]
