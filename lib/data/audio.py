"""Reading and writing of recordings: refuse what is broken, flag what is odd, never guess.

Owns every byte of audio that enters the study. One decoder (libsndfile, through `soundfile`) and no
fall-back: a fall-back decoder returns *something* for a damaged file, and a detector then scores it.
A problem that makes a score meaningless is an `AudioError`; one that may bias it is a warning in the
`AudioReport` that accompanies the samples.
"""

import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from lib.paths import atomic

RATE_LIMITS_HZ = (8_000, 192_000)
MAX_CHANNELS = 8
MAX_PEAK = 1_000.0  # beyond this the samples are integers stored as floats, or garbage
SILENCE_PEAK = 1e-4  # -80 dBFS, after the DC offset is taken off
LONG_SECONDS = 3_600.0
SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".m4a")
FORMATS = ("WAV", "WAVEX", "FLAC", "OGG", "MP3")
STREAM_SIZES = (0, 0x7FFFF000, 0xFFFFFFFF)  # what programs write when they do not know the size yet
CUT = "It was cut short, or its header is wrong: fetch the file again."
_BLOCK = 1 << 16  # frames per read
_FFT = 1024


class AudioError(ValueError):
    """A recording that must not be scored: the file, what was expected, what was found, what to do."""


def _error(path, expected, found, mend):
    return AudioError(f"{str(path)!r}: expected {expected}, found {found}. {mend}")


def _require(path, *rules):
    """Raise for the first of the `(holds, expected, found, mend)` that does not hold."""
    for holds, expected, found, mend in rules:
        if not holds:
            raise _error(path, expected, found, mend)


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
    clipped_ratio: float = 0.0  # share of samples inside flat runs at full scale


def read_audio(path, rate_hz=16_000, min_seconds=0.3, max_seconds=None, strict=True, channel=None):
    """Mono samples of one recording, `(samples,)` float32 at `rate_hz`, and its `AudioReport`.

    The channels are averaged, or one is taken (`channel=0`, `1`, ...). Samples are not scaled or
    clipped. `strict=False` turns the refusal of antiphase stereo into a warning. Raises `AudioError`
    for anything else that is missing, damaged, non-finite, silent, too short or longer than
    `max_seconds`.
    """
    meter, blocks = _open(path, rate_hz, min_seconds, max_seconds, strict, channel)
    return np.concatenate(list(blocks)), meter.report


def header(path):
    meter, blocks = _open(path, 16_000, 0, None, False, None)
    info = soundfile.info(path)
    return info.duration, info.samplerate


def iter_audio(path, rate_hz=16_000, block_seconds=30.0, overlap_seconds=0.0, min_seconds=0.3,
               strict=True, channel=None) -> Iterator[tuple[float, np.ndarray]]:
    """Yield `(start_s, samples)` blocks of a recording of any length, in memory that does not grow.

    Each block shares `overlap_seconds` with the one before; the last may be shorter. The samples equal
    those of `read_audio`. What can only be known at the end (a file cut short, silence) is raised at
    the end, so use no block before the loop is over. The generator returns the `AudioReport`.
    """
    length, shared = round(block_seconds * rate_hz), round(overlap_seconds * rate_hz)
    if not 0 <= shared < length:
        raise ValueError(f"expected 0 <= overlap_seconds < block_seconds, found {overlap_seconds}, {block_seconds}")
    meter, blocks = _open(path, rate_hz, min_seconds, None, strict, channel)
    pending, start = np.zeros(0, np.float32), 0
    for samples in blocks:
        pending = np.concatenate([pending, samples])
        while len(pending) >= length:
            yield start / rate_hz, pending[:length].copy()
            pending, start = pending[length - shared:], start + length - shared
    if len(pending) > (shared if start else 0):
        yield start / rate_hz, pending
    return meter.report


def write_audio(path, audio, rate_hz) -> None:
    """Write mono float samples `(samples,)` in [-1, 1] as 16-bit WAV or FLAC, whole or not at all."""
    path, audio, (low, high) = Path(path), np.asarray(audio), RATE_LIMITS_HZ
    peak = float(np.max(np.abs(audio), initial=0))
    _require(
        path,
        (path.suffix.lower() in (".wav", ".flac"), "a name in .wav or .flac", repr(path.suffix), "Choose one."),
        (audio.ndim == 1 and audio.dtype.kind == "f" and len(audio), "float samples of shape (samples,)",
         f"{audio.dtype} of shape {audio.shape}", "Write one channel; divide 16-bit integers by 32768."),
        (low <= rate_hz <= high, f"a rate of {low} to {high} Hz", f"{rate_hz}", "Resample before writing."),
        (peak <= 1, "finite samples in [-1, 1]", f"a peak of {peak:g}", "Scale the signal before writing."))
    integers = np.clip(np.rint(audio * 32768.0), -32768, 32767).astype(np.int16)
    with atomic(path) as partial:
        soundfile.write(partial, integers, int(rate_hz), subtype="PCM_16", format=path.suffix[1:].upper())


def decode_g722(path):
    """Samples `(samples,)` float32 at 16000 Hz of a raw G.722 file, through `ffmpeg`."""
    _require(path, (shutil.which("ffmpeg"), "the program ffmpeg", "none on the PATH", "Run: apt install ffmpeg"))
    command = ["ffmpeg", "-nostdin", "-v", "error", "-f", "g722", "-i", f"file:{_checked_file(path)}",
               "-f", "s16le", "-ac", "1", "-ar", "16000", "-"]
    done = subprocess.run(command, capture_output=True, check=False)
    audio = np.frombuffer(done.stdout[:len(done.stdout) // 2 * 2], "<i2").astype(np.float32) / 32768
    reason = done.stderr.decode(errors="replace").strip()[:200] or "no samples"
    _require(path, (not done.returncode and len(audio), "raw G.722", reason, "Fetch the file again."))
    return audio


def _open(path, rate_hz, min_seconds, max_seconds, strict, channel):
    """The meter of one file and the generator of its mono blocks; `meter.report` is set at its end."""
    warnings, (low, high) = _container_warnings(path), RATE_LIMITS_HZ
    try:
        # libsndfile takes bytes where a name is not valid text.
        file = soundfile.SoundFile(os.fspath(path) if str(path).isprintable() else os.fsencode(path))
    except (RuntimeError, TypeError, ValueError, OSError) as error:
        raise _error(path, "a recording that libsndfile can read", getattr(error, "error_string", str(error)).strip(" ."),
                     "Check that it is audio, or convert: ffmpeg -i INPUT output.flac") from error
    rate, channels, seconds = file.samplerate, file.channels, file.frames / max(1, file.samplerate)
    _require(
        path,
        (file.format in FORMATS, "one of " + ", ".join(FORMATS), file.format, "Convert it to FLAC."),
        (low <= rate <= high, f"a rate of {low} to {high} Hz", f"{rate} Hz", "Mend the header, or resample."),
        (channels <= MAX_CHANNELS, f"at most {MAX_CHANNELS} channels", channels, "Extract the speaker's first."),
        (channel is None or 0 <= channel < channels, f"channel {channel}", f"{channels} of them", "Count from 0."),
        (file.frames, "speech", "no samples declared",
         "A recorder that was stopped? Try: ffmpeg -ignore_length 1 -i INPUT output.flac"),
        (file.frames < 1 << 62, "a declared number of samples", "a stream of unknown length",
         "Write it to a file again: ffmpeg -i INPUT output.flac"),
        (seconds >= min_seconds, f"at least {min_seconds:g} s", f"{seconds:.3f} s", "Give a longer recording."),
        (max_seconds is None or seconds <= max_seconds, f"at most {max_seconds} s", f"{seconds:.1f} s",
         "Cut it, or read it in blocks with iter_audio."))
    meter = _Meter(path, rate, channels, channel, warnings)
    return meter, _mono_blocks(file, meter, rate_hz, strict)


def _mono_blocks(file, meter, rate_hz, strict):
    """Yield the mono blocks at `rate_hz`; judge the whole when it is known."""
    same = file.samplerate == rate_hz
    stream = None if same else soxr.ResampleStream(file.samplerate, rate_hz, 1, "float32", "HQ")
    with file:
        while meter.frames < file.frames:
            try:
                block = file.read(_BLOCK, dtype="float32", always_2d=True)
            except (RuntimeError, OSError) as error:
                raise _error(meter.path, "intact samples", f"a decoding error ({error})",
                             "The file is damaged: fetch it again.") from error
            _require(meter.path, (len(block), f"{file.frames} samples as declared", meter.frames, CUT))
            mono = meter.add(block)
            yield mono if same else stream.resample_chunk(mono, last=meter.frames == file.frames)
    meter.finish(file.format, rate_hz, strict)


class _Meter:
    """Running statistics of the blocks of one recording, whatever its length."""

    def __init__(self, path, rate_hz, channels, channel, warnings):
        self.path, self.rate_hz, self.channels, self.channel = os.fspath(path), rate_hz, channels, channel
        self.warnings, self.frames, self.flat, self.peak = list(warnings), 0, 0, 0.0
        self.low, self.high, self.total, self.mono_energy, self.energy = np.inf, -np.inf, 0.0, 0.0, 0.0
        self.power, self.levels, self.report = 0.0, [], None

    def add(self, block):
        """Take in `(frames, channels)`, give back its mono `(frames,)`."""
        block = block if self.channel is None else block[:, [self.channel]]
        magnitude = np.abs(block)
        peak = float(magnitude.max())
        if not peak <= MAX_PEAK:  # also true for NaN
            at = (self.frames + int(np.argmax(~(magnitude <= MAX_PEAK).all(axis=1)))) / self.rate_hz
            found = f"{peak:g}" if np.isfinite(peak) else "non-finite samples (NaN or Inf)"
            raise _error(self.path, "finite samples in [-1, 1]", f"{found} at {at:.3f} s",
                         "Export it again; integers stored as floats need dividing by their full scale.")
        mono = block[:, 0].copy() if block.shape[1] == 1 else block.mean(axis=1, dtype=np.float32)
        still = (magnitude[1:] >= 0.99) & (block[1:] == block[:-1])  # three equal samples at the top: clipped
        self.flat += int(np.count_nonzero(still[1:] & still[:-1]))
        self.peak, self.frames = max(self.peak, peak), self.frames + len(block)
        self.low, self.high = min(self.low, float(mono.min())), max(self.high, float(mono.max()))
        self.total += float(mono.sum(dtype=np.float64))
        self.mono_energy += float(np.square(mono, dtype=np.float64).sum())
        self.energy += float(np.square(block, dtype=np.float64).sum()) / block.shape[1]
        padded = np.pad(mono, (0, max(0, _FFT - len(mono)))) if self.frames == len(block) else mono
        pieces = padded[:len(padded) // _FFT * _FFT].reshape(-1, _FFT)
        pieces = (pieces - pieces.mean(axis=1, keepdims=True)) * np.hanning(_FFT).astype(np.float32)
        self.power += np.square(np.abs(np.fft.rfft(pieces))).sum(axis=0)
        step = self.rate_hz // 50
        self.levels.append(mono[:len(mono) // step * step].reshape(-1, step).std(axis=1))
        return mono

    def finish(self, format_name, target_hz, strict):
        """Judge the whole and set `report`. Raises for antiphase (if `strict`) and for silence."""
        seconds, offset = self.frames / self.rate_hz, self.total / self.frames
        cancel, mix = self.mono_energy < 0.01 * self.energy, self.mono_energy / max(self.energy, 1e-30)
        levels = np.concatenate(self.levels) if self.frames >= self.rate_hz // 50 else np.ones(1)
        silence = float(np.mean(levels < max(SILENCE_PEAK, 0.01 * np.percentile(levels, 95))))
        bins = np.flatnonzero(self.power >= np.max(self.power) * 10**-6.5)
        bandwidth = float(bins[-1] * self.rate_hz / _FFT)
        found = f"channels that cancel: their mix keeps {mix:.1e} of their energy"
        _require(
            self.path,
            (not (cancel and strict), "channels in phase", found, "Pick one: channel=0 of read_audio, --channel 0 of the command"),
            ((self.high - self.low) / 2 >= SILENCE_PEAK, "speech", "no speech: nothing above -80 dBFS",
             "Check the recording; silence is neither bona fide nor fake."))
        self.warnings += [text for holds, text in (
            (cancel, f"antiphase: {found}"),
            (self.peak > 1, f"over full scale: peak {self.peak:.3g}"),
            (self.flat, f"clipping: {self.flat} samples inside flat runs at full scale"),
            (abs(offset) > 0.01, f"DC offset: {offset:+.3f} of full scale"),
            (bandwidth < 0.4 * target_hz,
             f"narrow band: nothing above {bandwidth:.0f} Hz, {target_hz // 2} Hz possible at {target_hz} Hz"),
            (silence > 0.5, f"mostly silence: {silence:.0%} of the frames"),
            (seconds > LONG_SECONDS, f"very long: {seconds / 3600:.1f} h; iter_audio reads it in blocks"),
            (format_name in ("MP3", "OGG"), f"lossy format: {format_name} leaves traces a detector may hear"),
        ) if holds]
        self.report = AudioReport(self.path, seconds, self.rate_hz, self.channels, self.peak,
                                  tuple(self.warnings), bandwidth, silence, self.flat / (self.frames * self.channels))


def _checked_file(path):
    """The `Path` of a regular, readable, non-empty file, or an `AudioError`."""
    path, wanted = Path(path), "an audio file"
    try:
        _require(
            path,
            (not path.is_dir(), wanted, "a directory", "Name one file inside it."),
            (path.exists(), wanted, "nothing there", "Check the path."),
            (path.is_file(), wanted, "a pipe or device", "Save it to a file first."),
            (path.is_file() and path.stat().st_size, wanted, "an empty file", "Fetch it again."))
        path.open("rb").close()
    except OSError as error:
        raise _error(path, "a readable file", error.strerror, "Check it; try: chmod u+r") from error
    return path


def _container_warnings(path):
    """Compare what a RIFF or Ogg container declares with what the file holds; raise if it was cut."""
    path = _checked_file(path)
    size = path.stat().st_size
    with path.open("rb") as handle:
        magic = handle.read(12)[:4]
        if magic == b"OggS":
            handle.seek(max(0, size - 65_307))  # the longest Ogg page
            page = b"OggS" + handle.read().rpartition(b"OggS")[2]
            whole = len(page) > 27 and len(page) >= 27 + page[26] + sum(page[27:27 + page[26]])
            _require(path, (whole, "a whole last Ogg page", "part of one", CUT))
            return [] if page[5] & 4 else ["no end mark: some encoders omit it, so a cut may not be seen"]
        while magic in (b"RIFF", b"RIFX") and len(chunk := handle.read(8)) == 8:
            declared = struct.unpack("<I" if magic == b"RIFF" else ">I", chunk[4:])[0]
            if chunk[:4] == b"data":
                held = size - handle.tell()
                if declared in STREAM_SIZES and held:
                    return ["unknown length: the header was written by a stream, so a cut cannot be seen"]
                _require(path, (declared <= held, f"{declared} bytes of samples as declared", held, CUT))
                break
            handle.seek(declared + declared % 2, os.SEEK_CUR)
    return []
