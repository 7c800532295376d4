"""Owns the reading of recordings as mono samples with a report of what is odd about them, the writing of clips, and
the recordings of a folder.

A problem that makes a score meaningless is an `AudioError`, one that may bias it a warning in the `AudioReport`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from lib.data.decoders import SUFFIXES, Source, checked_file, refused, require, source_of, through_ffmpeg
from lib.data.decoders import AudioError as AudioError  # readers know it by this room
from lib.paths import atomic, shown

RATE_LIMITS_HZ = (8_000, 192_000)
MAX_CHANNELS = 8
MAX_PEAK = 1_000.0  # beyond this the samples are integers stored as floats, or garbage
SILENCE_PEAK = 1e-4  # -80 dBFS, after the DC offset is taken off
LONG_SECONDS = 3_600.0
_FFT = 1024
STARTS = (b"RIFF", b"RIFX", b"RF64", b"fLaC", b"OggS", b"ID3", b"FORM", b"caff", b"#!AMR", b"\x1aE\xdf\xa3", b"0&\xb2u",
          b".snd", b"\xff\xfb", b"\xff\xf3", b"\xff\xf2", b"\xff\xf1", b"\xff\xf9")
"""How files of sound and film begin, whatever their names: WAV, FLAC, Ogg, MP3, AIFF, CAF, AMR, WebM, WMA, AU, AAC."""
LeftOut = tuple[str, str]  # a file or folder and why it was left out


@dataclass(frozen=True)
class AudioReport:
    """What was learnt while reading. `rate_hz`, `channels`, `peak` and `seconds` are those of the file."""

    path: str
    seconds: float
    rate_hz: int
    channels: int
    peak: float  # largest |sample| of any channel, 1 = full scale
    warnings: tuple[str, ...]
    effective_bandwidth_hz: float  # highest frequency within 65 dB of the strongest, on average
    silence_ratio: float  # share of 20 ms frames 40 dB or more below the loud ones (95th percentile)
    clipped_ratio: float = 0.0  # share of samples inside flat runs, at full scale or at the recording's own extremes
    decoder: str = "soundfile"  # or "ffmpeg via PyAV"


def read_audio(path: str | os.PathLike, rate_hz: int = 16_000, min_seconds: float = 0.3, strict: bool = True,
               channel: int | None = None) -> tuple[np.ndarray, AudioReport]:
    """Mono samples of one recording, (samples,) float32 at `rate_hz`, and its `AudioReport`.

    The channels are averaged, or one is taken (`channel=0`, `1`, ...). Samples are not scaled or clipped.
    `strict=False` turns the refusal of antiphase stereo into a warning. Raises `AudioError` for anything else that is
    missing, damaged, non-finite, silent or too short.
    """
    meter, blocks = _open(path, rate_hz, min_seconds, strict, channel)
    return np.concatenate(list(blocks)), meter.report


def iter_audio(path: str | os.PathLike, rate_hz: int = 16_000, block_seconds: float = 30.0, min_seconds: float = 0.3,
               strict: bool = True, channel: int | None = None) -> Iterator[tuple[float, np.ndarray]]:
    """Yield `(start_s, samples)` blocks of a recording of any length, in memory that does not grow; return the report.

    The samples equal those of `read_audio`; the last block may be shorter. What can only be known at the end (a file
    cut short, silence) is raised at the end, so use no block before the loop is over.
    """
    length = round(block_seconds * rate_hz)
    meter, blocks = _open(path, rate_hz, min_seconds, strict, channel)
    pending, start = np.zeros(0, np.float32), 0
    for samples in blocks:
        pending = np.concatenate([pending, samples])
        while len(pending) >= length:
            yield start / rate_hz, pending[:length].copy()
            pending, start = pending[length:], start + length
    if len(pending):
        yield start / rate_hz, pending
    return meter.report


def audio_pieces(path: str | os.PathLike, seconds: float) -> Iterator[tuple[str, np.ndarray]]:
    """Name and samples at 16 kHz of each stretch of `seconds` of a recording; of the last where it has 1 s."""
    for start_s, audio in iter_audio(path, block_seconds=seconds):
        if len(audio) >= 16_000:
            yield f"{Path(path).name}@{start_s:g}s", audio


def header(path: str | os.PathLike) -> tuple[float, int]:
    """Seconds (NaN where not declared) and rate in Hz of a recording that holds samples. Raises `AudioError`."""
    source = source_of(checked_file(path))
    require(path, (source.frames and source.rate_hz, "speech", "no samples declared", "A recorder that was stopped?"))
    return source.frames / source.rate_hz, source.rate_hz


def write_audio(path: str | os.PathLike, audio: np.ndarray, rate_hz: int) -> None:
    """Write mono float samples (samples,) in [-1, 1] as 16-bit WAV or FLAC, whole or not at all."""
    path, audio, (low, high) = Path(path), np.asarray(audio), RATE_LIMITS_HZ
    peak = float(np.max(np.abs(audio), initial=0))
    require(
        path,
        (path.suffix.lower() in (".wav", ".flac"), "a name in .wav or .flac", repr(path.suffix), "Choose one."),
        (audio.ndim == 1 and audio.dtype.kind == "f" and len(audio), "float samples of shape (samples,)",
         f"{audio.dtype} of shape {audio.shape}", "Write one channel; divide 16-bit integers by 32768."),
        (low <= rate_hz <= high, f"a rate of {low} to {high} Hz", f"{rate_hz}", "Resample before writing."),
        (peak <= 1, "finite samples in [-1, 1]", f"a peak of {peak:g}", "Scale the signal before writing."))
    integers = np.clip(np.rint(audio * 32768.0), -32768, 32767).astype(np.int16)
    with atomic(path) as partial:
        soundfile.write(partial, integers, int(rate_hz), subtype="PCM_16", format=path.suffix[1:].upper())


def decode_g722(path: str | os.PathLike) -> np.ndarray:
    """Samples (samples,) float32 at 16000 Hz of a raw G.722 file, a form without a header. Raises `AudioError`."""
    return np.concatenate(list(through_ffmpeg(checked_file(path), form="g722").blocks))[:, 0]


def _open(path: str | os.PathLike, rate_hz: int, min_seconds: float, strict: bool,
          channel: int | None) -> tuple[Meter, Iterator[np.ndarray]]:
    """The meter of one file and the generator of its mono blocks; `meter.report` is set at its end."""
    source, (low, high) = source_of(checked_file(path)), RATE_LIMITS_HZ
    rate, channels, seconds = source.rate_hz, source.channels, source.frames / max(1, source.rate_hz)
    require(
        path,
        (low <= rate <= high, f"a rate of {low} to {high} Hz", f"{rate} Hz", "Mend the header, or resample."),
        (channels <= MAX_CHANNELS, f"at most {MAX_CHANNELS} channels", channels, "Extract the speaker's first."),
        (channel is None or 0 <= channel < channels, f"channel {channel}", f"{channels} of them", "Count from 0."),
        (source.frames, "speech", "no samples declared", "A recorder that was stopped? Record again."),
        (not seconds < min_seconds, f"at least {min_seconds:g} s", f"{seconds:.3f} s", "Give a longer recording."))
    meter = Meter(path, source, channel)
    return meter, _mono_blocks(source, meter, rate_hz, min_seconds, strict)


def _mono_blocks(source: Source, meter: Meter, rate_hz: int, min_seconds: float, strict: bool) -> Iterator[np.ndarray]:
    """Yield the mono blocks at `rate_hz`; judge the whole when it is known."""
    stream = None if source.rate_hz == rate_hz else soxr.ResampleStream(source.rate_hz, rate_hz, 1, "float32", "HQ")
    for block in source.blocks:
        mono = meter.add(block)
        yield stream.resample_chunk(mono) if stream else mono
    if stream:
        yield stream.resample_chunk(np.zeros(0, np.float32), last=True)
    meter.finish(rate_hz, min_seconds, strict)


class Meter:
    """Running statistics of the blocks of one recording, whatever its length."""

    def __init__(self, path: str | os.PathLike, source: Source, channel: int | None) -> None:
        self.path, self.source, self.channel, self.frames, self.peak = os.fspath(path), source, channel, 0, 0.0
        self.low, self.high, self.total, self.mono_energy = np.inf, -np.inf, 0.0, 0.0
        self.flat, self.tops = 0, {1: (0.0, 0), -1: (0.0, 0)}  # side: extreme, and the flat samples there
        self.energies, self.power, self.levels, self.report = 0.0, 0.0, [], None

    def add(self, block: np.ndarray) -> np.ndarray:
        """Take in (frames, channels), give back its mono (frames,). Raises AudioError for samples that are none."""
        block, rate = block if self.channel is None else block[:, [self.channel]], self.source.rate_hz
        magnitude = np.abs(block)
        peak = float(magnitude.max())
        if not peak <= MAX_PEAK:  # also true for NaN
            at = (self.frames + int(np.argmax(~(magnitude <= MAX_PEAK).all(axis=1)))) / rate
            actual = f"{peak:g}" if np.isfinite(peak) else "non-finite samples (NaN or Inf)"
            raise refused(self.path, "finite samples in [-1, 1]", f"{actual} at {at:.3f} s",
                          "Export it again; integers stored as floats need dividing by their full scale.")
        mono = block[:, 0].copy() if block.shape[1] == 1 else block.mean(axis=1, dtype=np.float32)
        flat = block[2:][(block[2:] == block[1:-1]) & (block[1:-1] == block[:-2])]  # the third of three equal samples
        self.flat += int(np.count_nonzero(np.abs(flat) >= 0.99))
        for side, (extreme, count) in self.tops.items():
            top = max(extreme, float((side * block).max()))
            self.tops[side] = top, (count if top == extreme else 0) + int(np.count_nonzero(side * flat == top))
        self.peak, self.frames = max(self.peak, peak), self.frames + len(block)
        self.low, self.high = min(self.low, float(mono.min())), max(self.high, float(mono.max()))
        self.total += float(mono.sum(dtype=np.float64))
        self.mono_energy += float(np.square(mono, dtype=np.float64).sum())
        self.energies = self.energies + np.square(block, dtype=np.float64).sum(axis=0)
        padded = np.pad(mono, (0, max(0, _FFT - len(mono)))) if self.frames == len(block) else mono
        pieces = padded[:len(padded) // _FFT * _FFT].reshape(-1, _FFT)
        pieces = (pieces - pieces.mean(axis=1, keepdims=True)) * np.hanning(_FFT).astype(np.float32)
        self.power += np.square(np.abs(np.fft.rfft(pieces))).sum(axis=0)
        step = rate // 50
        self.levels.append(mono[:len(mono) // step * step].reshape(-1, step).std(axis=1))
        return mono

    def finish(self, target_hz: int, min_seconds: float, strict: bool) -> None:
        """Judge the whole and set `report`. Raises for what is too short, antiphase (if `strict`) or silent."""
        rate, channels, energy = self.source.rate_hz, np.size(self.energies), float(np.mean(self.energies))
        seconds, offset = self.frames / rate, self.total / max(1, self.frames)
        cancel, mix = self.mono_energy < 0.01 * energy, self.mono_energy / max(energy, 1e-30)
        actual = f"channels that cancel: their mix keeps {mix:.1e} of their energy"
        require(
            self.path,
            (seconds >= min_seconds, f"at least {min_seconds:g} s", f"{seconds:.3f} s", "Give a longer recording."),
            (not (cancel and strict), "channels in phase", actual,
             "Pick one: channel=0 of read_audio, --channel 0 of the command"),
            ((self.high - self.low) / 2 >= SILENCE_PEAK, "speech", "no speech: nothing above -80 dBFS",
             "Check the recording; silence is neither bona fide nor fake."))
        levels = np.concatenate(self.levels) if self.frames >= rate // 50 else np.ones(1)
        # Of quiet speech, too, only what is far below the rest is silence.
        floor = max(0.01 * np.percentile(levels, 95), min(SILENCE_PEAK, 0.001 * levels.max()))
        silence = float(np.mean(levels <= floor))
        bandwidth = float(np.flatnonzero(self.power >= np.max(self.power) * 10**-6.5)[-1] * rate / _FFT)
        quieter, loudest = np.sort(self.energies)[[-2, -1]] if channels > 1 else (0.0, 1.0)
        likeness = (channels * mix - 1) / max(1, channels - 1)  # mean correlation of channels that are equally loud
        # Real speech has none of these; of quiet 16-bit speech, the steps make some.
        tops = sum(count for extreme, count in self.tops.values() if 0.002 <= extreme < 0.99 and count >= 3)
        warnings = tuple(text for holds, text in (
            (cancel, f"antiphase: {actual}"),
            (not cancel and likeness < 0.5 and quieter > 0.01 * loudest,
             f"channels differ (correlation {likeness:.2f}): two voices, or microphones apart? --channel 0 takes one"),
            (self.peak > 1, f"over full scale: peak {self.peak:.3g}"),
            (self.flat, f"clipping: {self.flat} samples inside flat runs at full scale"),
            (tops, f"clipping before a gain change: {tops} samples inside flat runs at the peaks"),
            (abs(offset) > 0.01, f"DC offset: {offset:+.3f} of full scale"),
            (bandwidth < 0.4 * target_hz,
             f"narrow band: nothing above {bandwidth:.0f} Hz, {target_hz // 2} Hz possible at {target_hz} Hz"),
            (silence > 0.5, f"mostly silence: {silence:.0%} of the frames"),
            (seconds > LONG_SECONDS, f"very long: {seconds / 3600:.1f} h; iter_audio reads it in blocks"),
            (self.source.lossy, f"lossy format: {self.source.lossy} leaves traces a detector may pick up"),
        ) if holds)
        self.report = AudioReport(
            self.path, seconds, rate, self.source.channels, self.peak, (*self.source.notes, *warnings), bandwidth,
            silence, (self.flat + tops) / (self.frames * channels), self.source.decoder)


# --- files of a folder ------------------------------------------------------------------------------------------------


def recordings_below(folder: Path | str) -> tuple[list[Path], list[LeftOut]]:
    """Every recording below `folder`, sorted, and what was left out. Raises ValueError where there is none."""
    folder, paths, left_out = Path(folder), [], []
    if not folder.is_dir():
        state = "a file" if folder.exists() else "no such folder"
        raise ValueError(f"{shown(folder)}: expected a folder with recordings, found {state}")

    def closed(error: OSError) -> None:
        left_out.append((error.filename, f"cannot be opened: {error.strerror}"))

    for place, inner, names in os.walk(folder, onerror=closed):
        reasons = {name: _reason(Path(place, name)) for name in sorted([*inner, *names])}
        left_out += [(os.path.join(place, name), reason) for name, reason in reasons.items() if reason]
        paths += [Path(place, name) for name in names if not reasons[name]]
        inner[:] = [name for name in inner if not reasons[name]]
    if not paths:
        listed = "; ".join(f"{shown(os.path.relpath(path, folder))}: {reason}" for path, reason in left_out[:3])
        raise ValueError(f"{shown(folder)}: expected a folder with recordings, found {listed or 'nothing in it'}")
    return sorted(paths), left_out


def _reason(path: Path) -> str:
    """Why an entry of a folder is left out; empty for a recording and for a folder to look into."""
    if path.name.startswith("."):
        return "hidden"
    if path.is_dir():
        return "a link to a folder" if path.is_symlink() else ""
    if not path.is_file():
        return "a link to nothing" if path.is_symlink() else "no regular file"
    try:
        with path.open("rb") as file:
            start = file.read(12)
    except OSError:
        return ""  # the reader says what is wrong
    sound = start.startswith(STARTS) and start[8:] != b"WEBP" or start[4:8] == b"ftyp"
    return "" if sound or path.suffix.lower() in SUFFIXES else "no sound"


def listed(files: Iterable[Path | str], folders: Iterable[Path | str] = (),
           there: bool = False) -> tuple[list[Path | str], list[LeftOut]]:
    """The recordings of `files` and below `folders`, each once, and what was left out. Raises ValueError for a folder
    that is none and, with `there`, for a file that is not there."""
    paths, left_out, places = list(files), [], {}
    if there and (absent := [path for path in paths if not os.path.exists(path)]):
        raise ValueError(f"{shown(absent[0])}: expected a file or folder of recordings, found nothing there")
    once = {os.path.realpath(folder): folder for folder in folders}
    left_out += [(str(folder), "named twice") for folder in folders if folder is not once[os.path.realpath(folder)]]
    for folder in once.values():
        below, others = recordings_below(folder)
        paths, left_out = paths + below, left_out + others
    for path in paths:
        try:
            place = os.stat(path).st_dev, os.stat(path).st_ino
        except OSError:
            place = os.path.abspath(path)
        if place in places:
            left_out.append((str(path), f"the same file as {shown(places[place])}"))
        places.setdefault(place, path)
    return list(places.values()), left_out
