"""Owns what can happen to a recording on its way: codecs, noise, rooms, rates, levels, cuts. Each function takes audio
(samples,) float32 at 16 kHz and a random stream, and gives audio back."""

from __future__ import annotations

import functools
import io
import subprocess
from collections.abc import Callable, Sequence

import numpy as np
import scipy.signal
import soundfile
import soxr

from lib import seeds
from lib.data.channel import FRAME, active_frames, frame_levels
from lib.settings import RATE_HZ

Degradation = Callable[..., np.ndarray]


class MissingEncoder(RuntimeError):
    """This machine cannot make a codec condition; the message says what is missing."""


def ffmpeg_codec(audio: np.ndarray, _: np.random.Generator, codec: str, container: str, rate_hz: int = RATE_HZ,
                 kbps: int = 0) -> np.ndarray:
    """A round trip through one of ffmpeg's encoders, (samples,) -> the same length; the delay of the codec is undone.

    Raises MissingEncoder where ffmpeg or the encoder is missing.
    """
    wav = io.BytesIO()
    soundfile.write(wav, audio, RATE_HZ, format="WAV", subtype="PCM_16")
    quality = ["-b:a", f"{kbps}k"] if kbps and container != "g722" else []
    quiet, form = ["ffmpeg", "-hide_banner", "-loglevel", "error"], ["-ar", str(rate_hz), "-ac", "1"]
    encode = [*quiet, "-f", "wav", "-i", "-", *form, "-c:a", codec, *quality, "-f", container, "-"]
    # Raw telephone codecs carry no header: the decoder has to be told. G.722 below 64 kb/s drops bits of every word.
    raw = {"g722": ["-bits_per_codeword", str((kbps or 64) // 8), "-f", "g722"],
           "mulaw": ["-f", "mulaw", *form]}.get(container, [])
    decode = [*quiet, *raw, "-i", "-", "-f", "f32le", "-ar", str(RATE_HZ), "-ac", "1", "-"]
    try:
        coded = subprocess.run(encode, input=wav.getvalue(), capture_output=True, check=True).stdout
        decoded = subprocess.run(decode, input=coded, capture_output=True, check=True).stdout
    except FileNotFoundError:
        raise MissingEncoder("codec conditions need ffmpeg (apt-get install ffmpeg)") from None
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode(errors="replace").strip()[-200:]
        raise MissingEncoder(f"ffmpeg cannot make {codec}: {reason}") from None
    result = np.frombuffer(decoded, dtype=np.float32)
    lags = scipy.signal.correlate(result[: 4 * RATE_HZ], audio[: 4 * RATE_HZ], mode="full", method="fft")
    delay = max(0, int(np.argmax(np.abs(lags))) - min(len(audio), 4 * RATE_HZ) + 1)
    return _fitted(result[min(delay, 4000) :], len(audio))


def coded(codec: str, container: str, **rate: int) -> Degradation:
    """`ffmpeg_codec` with its codec chosen."""
    return functools.partial(ffmpeg_codec, codec=codec, container=container, **rate)


def ogg_coded(audio: np.ndarray, _: object, subtype: str) -> np.ndarray:
    """A round trip through libsndfile's own encoder, VORBIS or OPUS: nothing but a Python package is needed."""
    stream = io.BytesIO()
    soundfile.write(stream, audio, RATE_HZ, format="OGG", subtype=subtype)
    stream.seek(0)
    decoded, rate_hz = soundfile.read(stream, dtype="float32")
    return _fitted(soxr.resample(decoded, rate_hz, RATE_HZ, quality="HQ"), len(audio))


def _fitted(audio: np.ndarray, length: int) -> np.ndarray:
    return np.pad(audio[:length], (0, max(0, length - len(audio)))).astype(np.float32)


def noise(audio: np.ndarray, random: np.random.Generator, snr_db: float, colour: str = "white") -> np.ndarray:
    """Additive white or pink noise at a signal-to-noise ratio over the whole clip."""
    drawn = random.standard_normal(len(audio))
    if colour == "pink":
        spectrum = np.fft.rfft(drawn)
        drawn = np.fft.irfft(spectrum / np.sqrt(np.maximum(np.arange(len(spectrum)), 1)), len(audio))
    return _mixed(audio, drawn, snr_db)


def babble(audio: np.ndarray, random: np.random.Generator, snr_db: float, voices: Sequence[np.ndarray],
           talkers: int = 6) -> np.ndarray:
    """`talkers` of the recordings `voices` at equal levels, each from a random place, behind the clip."""
    drawn = np.zeros(len(audio))
    for index in random.permutation(len(voices))[:talkers]:
        voice = np.tile(voices[index], -(-len(audio) // len(voices[index])))
        drawn += np.roll(voice, int(random.integers(len(voice))))[: len(audio)] / (np.sqrt(np.mean(voice**2)) + 1e-9)
    return _mixed(audio, drawn, snr_db)


def _mixed(audio: np.ndarray, drawn: np.ndarray, snr_db: float) -> np.ndarray:
    scale = np.sqrt(np.mean(audio**2) / (np.mean(drawn**2) + 1e-20)) * 10 ** (-snr_db / 20)
    return (audio + scale * drawn).astype(np.float32)


def room(audio: np.ndarray, random: np.random.Generator, rt60_s: float) -> np.ndarray:
    """Convolution with a synthetic room: exponentially decaying noise behind a direct path."""
    length = int(rt60_s * RATE_HZ)
    tail = random.standard_normal(length) * 10 ** (-3 * np.arange(length) / length)
    tail *= 0.5 / np.sqrt((tail**2).sum())
    tail[0] = 1.0
    return scipy.signal.oaconvolve(audio, tail)[: len(audio)].astype(np.float32)


def resampled(audio: np.ndarray, _: object, rate_hz: int) -> np.ndarray:
    """To `rate_hz` and back."""
    there = soxr.resample(audio.astype(np.float32), RATE_HZ, rate_hz, quality="HQ")
    return _fitted(soxr.resample(there, rate_hz, RATE_HZ, quality="HQ"), len(audio))


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


def joined(audio: np.ndarray, _: np.random.Generator, seconds: float, other: np.ndarray) -> np.ndarray:
    """The clip and another one of its source behind it, again and again up to `seconds`: the study's clips are cropped
    to 5 s."""
    both = np.concatenate([audio, other])
    return np.tile(both, -(-round(seconds * RATE_HZ) // len(both)))[: round(seconds * RATE_HZ)]


def first(audio: np.ndarray, _: np.random.Generator, seconds: float) -> np.ndarray:
    return audio[: round(seconds * RATE_HZ)]


def silence(audio: np.ndarray, _: np.random.Generator, seconds: float, inside: bool = False) -> np.ndarray:
    """Digital silence before the clip, or in the middle of it, at its quietest frame there."""
    at = 0
    if inside:
        third = len(audio) // 3 // FRAME
        at = (third + int(np.argmin(frame_levels(audio)[third : max(third + 1, 2 * third)]))) * FRAME
    return np.concatenate([audio[:at], np.zeros(round(seconds * RATE_HZ), np.float32), audio[at:]])


def pauses_cut(audio: np.ndarray, _: np.random.Generator, pause_db: float = 35.0) -> np.ndarray:
    """The clip without its pauses, at the ends and inside."""
    return audio[np.repeat(active_frames(audio, pause_db), FRAME)[: len(audio)]]


def pauses_muted(audio: np.ndarray, _: np.random.Generator, pause_db: float = 35.0) -> np.ndarray:
    """The clip with digital silence for its pauses: no noise floor is left between words."""
    mask = np.convolve(np.repeat(active_frames(audio, pause_db), FRAME)[: len(audio)], np.ones(81) / 81, mode="same")
    return (audio * mask).astype(np.float32)


def levelled(audio: np.ndarray, _: np.random.Generator, db: float = -26.0) -> np.ndarray:
    """The clip at one root mean square for all, in dB full scale."""
    return (audio * (10 ** (db / 20) / (np.sqrt(np.mean(audio.astype(np.float64) ** 2)) + 1e-9))).astype(np.float32)


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


# --- random recording chains: what is normal --------------------------------------------------------------------------


def _equalised(audio: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Through a smooth random equaliser: about 4 dB from octave to octave, and a tilt of up to 3 dB an octave."""
    octaves = np.log2(np.maximum(np.fft.rfftfreq(len(audio), 1 / RATE_HZ), 60) / 60)
    knots = random.normal(0, 4, 8) + random.uniform(-3, 3) * (np.arange(8) - 4)
    return np.fft.irfft(np.fft.rfft(audio) * 10 ** (np.interp(octaves, np.arange(8), knots) / 20), len(audio))


def _band_limited(audio: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Through a low-pass edge between 3.4 and 7.9 kHz or a high-pass edge between 50 and 300 Hz, of random order."""
    low = random.random() < 0.6
    edge_hz = random.uniform(3400, 7900) if low else random.uniform(50, 300)
    order = int(random.integers(2, 9))
    return scipy.signal.sosfilt(
        scipy.signal.butter(order, edge_hz, "low" if low else "high", fs=RATE_HZ, output="sos"), audio)


def _reverberant(audio: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """In a random room: RT60 0.1 to 0.8 s, the tail 3 to 20 dB below the direct path."""
    length = int(random.uniform(0.1, 0.8) * RATE_HZ)
    tail = random.standard_normal(length) * 10 ** (-3 * np.arange(length) / length)
    tail *= 10 ** (-random.uniform(3, 20) / 20) / np.sqrt((tail**2).sum())
    tail[0] = 1.0
    return scipy.signal.oaconvolve(audio, tail)[: len(audio)]


def _noisy(audio: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """With noise 12 to 45 dB below it whose power falls as f^-a, a in [-0.5, 2]."""
    spectrum = np.fft.rfft(random.standard_normal(len(audio)))
    spectrum *= np.maximum(np.fft.rfftfreq(len(audio), 1 / RATE_HZ), 50.0) ** (-random.uniform(-0.5, 2.0) / 2)
    return _mixed(audio, np.fft.irfft(spectrum, len(audio)), random.uniform(12, 45))


def _resampled(audio: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return resampled(audio, random, int(random.choice([11025, 12000, 22050, 24000, 32000, 44100, 48000])))


def _coded(audio: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Through libsndfile's MP3, Vorbis or Opus at a random rate, or 8 bit mu-law; the codec's delay is left in."""
    scaled, choice = audio * (0.5 / (np.abs(audio).max() + 1e-9)), int(random.integers(7))
    if choice == 6:
        levels = np.round(np.sign(scaled) * np.log1p(255 * np.abs(scaled)) / np.log(256) * 127) / 127
        return np.sign(levels) * np.expm1(np.abs(levels) * np.log(256)) / 255
    container, codec, least, most = (("MP3", "MPEG_LAYER_III", 0.0, 0.9), ("OGG", "VORBIS", 0.0, 0.95),
                                     ("OGG", "OPUS", 0.3, 0.97))[choice % 3]
    stream = io.BytesIO()
    soundfile.write(stream, scaled, RATE_HZ, format=container, subtype=codec,
                    compression_level=float(random.uniform(least, most)))
    stream.seek(0)
    return _fitted(soundfile.read(stream)[0], len(audio))


CHANCES: dict[Degradation, float] = {
    _reverberant: 0.25, _equalised: 0.7, _band_limited: 0.25, _noisy: 0.5, _resampled: 0.25, _coded: 0.4}
"""Stages in the order of a recording, and how often each is drawn."""


def recorded(audio: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Through a random recording chain of CHANCES, at the old level; one recording in ten stays as it is."""
    if random.random() < 0.1:
        return audio
    made = audio.astype(np.float64)
    for stage, chance in CHANCES.items():
        if random.random() < chance:
            made = stage(made, random)
    gained = np.sqrt(np.mean(audio.astype(np.float64) ** 2) / (np.mean(made.astype(np.float64) ** 2) + 1e-20))
    return (made * gained).astype(np.float32)


def half_recorded(audio: np.ndarray, name: str) -> np.ndarray:
    """Every second recording through a random chain, drawn by its `name`: what training takes as normal speech."""
    random = seeds.stream(0, "recorded", name)
    return recorded(audio, random) if random.random() < 0.5 else audio
