"""Owns the decoding of recordings: each kind of file by the decoder for it, whole, or refused where damage is found.

libsndfile reads WAV, FLAC and Ogg, FFmpeg (through PyAV) all else. Neither may paper over damage: FFmpeg has to stop at
an error, an error that it only writes to its log counts too, and the checksums and numbers of Ogg's pages and declared
lengths are checked. What has no checksum, as the payload of MP3, AAC and WebM, can hide a single flipped bit.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import mmap
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

SUFFIXES = tuple(".wav .flac .ogg .oga .opus .spx .mp3 .mp2 .m4a .mp4 .m4b .m4r .mov .3gp .3g2 .aac .webm .weba .mka "
                 ".mkv .wma .asf .amr .aif .aiff .aifc .au .snd .caf .w64 .wv .tta .ape .ac3 .flv".split())
CONTAINERS = "wav,w64,aiff,au,caf,flac,ogg,mp3,aac,mov,matroska,asf,amr,wv,tta,ape,ac3,flv"  # FFmpeg's names
STRICT = {"err_detect": "explode+crccheck+bitstream+buffer"}
SNDFILE_TAGS = (1, 2, 3, 6, 7, 0x11, 0x31, 0xFFFE)  # of WAV: PCM, float, A-law, mu-law, ADPCM, GSM
LOSSLESS = ("pcm", "flac", "alac", "wavpack", "tta", "ape")
CUT, AGAIN = "It was cut short, or its header is wrong: fetch the file again.", "Fetch the file again."
STREAMED = "unknown length: it is not declared, so a cut cannot be seen"
_BLOCK = 1 << 16  # frames per read
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


class AudioError(ValueError):
    """A recording that must not be scored: the file, what was expected, what was found, what to do."""


def refused(path: object, expected: object, actual: object, mend: str) -> AudioError:
    return AudioError(f"{str(path)!r}: expected {expected}, found {actual}. {mend}")


def require(path: object, *rules: tuple[object, object, object, str]) -> None:
    """Raise for the first of the `(holds, expected, found, mend)` that does not hold."""
    for holds, expected, actual, mend in rules:
        if not holds:
            raise refused(path, expected, actual, mend)


@dataclass
class Source:
    """An open recording: what its header says, and its samples."""

    decoder: str
    lossy: str  # name of a lossy codec, or empty
    rate_hz: int
    channels: int
    frames: float  # declared, or NaN
    blocks: Iterator[np.ndarray]  # (frames, channels) float32
    notes: list[str]  # for the report; grows while blocks are read


def checked_file(path: str | os.PathLike) -> Path:
    """The `Path` of a regular, readable, non-empty file, or an `AudioError`."""
    path, expected = Path(path), "an audio file"
    try:
        is_file = path.is_file()
        require(path, (not path.is_dir(), expected, "a directory", "Name one file inside it."),
                (path.exists(), expected, "nothing there", "Check the path."),
                (is_file, expected, "a pipe or device", "Save it to a file first."),
                (is_file and path.stat().st_size, expected, "an empty file", AGAIN))
        path.open("rb").close()
    except OSError as error:
        raise refused(path, "a readable file", error.strerror, "Check it; try: chmod u+r") from error
    return path


def source_of(path: Path) -> Source:
    """The file with the decoder for its kind, which its first bytes tell. Raises AudioError."""
    with path.open("rb") as file:
        magic = file.read(12)
        if magic[:4] in (b"RIFF", b"RIFX") and magic[8:] == b"WAVE":
            return _wave(path, file, "<" if magic[:4] == b"RIFF" else ">")
        if magic[:4] == b"OggS":
            return _ogg(path, file)
    return through_soundfile(path, path) if magic[:4] == b"fLaC" else through_ffmpeg(path)


def through_soundfile(path: Path, file: Path | io.BytesIO, notes: tuple[str, ...] = ()) -> Source:
    """A file, or its part `file`, read by libsndfile. Raises AudioError."""
    try:
        # libsndfile takes bytes where a name is not valid text.
        sound = soundfile.SoundFile(os.fsencode(path) if file is path and not str(path).isprintable() else file)
    except (RuntimeError, TypeError, ValueError, OSError) as error:
        raise refused(path, "a recording that libsndfile can read",
                      getattr(error, "error_string", str(error)).strip(" ."),
                      "Check that it is audio, or convert: ffmpeg -i INPUT output.flac") from error
    if sound.frames >= 1 << 62:  # not declared, and libsndfile cannot find the end
        return through_ffmpeg(path, notes)

    def blocks() -> Iterator[np.ndarray]:
        done = 0
        with sound:
            while done < sound.frames:
                try:
                    block = sound.read(_BLOCK, dtype="float32", always_2d=True)
                except (RuntimeError, OSError) as error:
                    raise refused(path, "intact samples", f"a decoding error ({error})",
                                  f"The file is damaged. {AGAIN}") from error
                require(path, (len(block), f"{sound.frames} samples as declared", done, CUT))
                done += len(block)
                yield block

    lossy = sound.subtype if sound.subtype in ("VORBIS", "OPUS") else ""
    return Source("soundfile", lossy, sound.samplerate, sound.channels, sound.frames, blocks(), [*notes])


def through_ffmpeg(path: Path, notes: tuple[str, ...] = (), form: str | None = None, **options: str) -> Source:
    """A file read by FFmpeg, its first sound track. Raises AudioError."""
    import av

    av.logging.set_level(av.logging.WARNING)
    av.logging.set_skip_repeated(False)  # a line that another file caused already counts as well
    names: set[str] = set()  # of the parts whose errors count: a picture beside the sound may be broken

    @contextmanager
    def strictly() -> Iterator[list]:
        with av.logging.Capture() as log:
            try:
                yield log
            except (av.error.FFmpegError, ValueError, OSError) as error:
                kind = "another kind of file" if any("whitelist" in text for *_, text in log) else ""
                expected = "intact audio" if names else "a recording that FFmpeg or libsndfile can read"
                raise refused(path, expected, kind or getattr(error, "strerror", None) or str(error),
                              f"Damaged, or no audio? {AGAIN} Or: ffmpeg -i INPUT output.flac") from error
        faults = [text.strip() for level, name, text in log if level <= av.logging.ERROR and name in names]
        require(path, (not faults, "intact audio", f"damage ({'; '.join(faults[:2])})", AGAIN))

    with strictly() as log:
        file = path.open("rb")
        container = av.open(file, format=form, metadata_errors="replace",
                            options={**STRICT, "format_whitelist": form or CONTAINERS, **options})
        tracks = container.streams.audio
        if tracks:
            tracks[0].codec_context.options, tracks[0].codec_context.thread_count = STRICT, 1
            names |= {container.format.name, tracks[0].codec_context.name}
    require(path, (tracks, "sound", f"none ({container.format.name})", "Is it the right file?"))
    codec, form = tracks[0].codec_context.name, container.format.name
    # Without a declared length FFmpeg guesses one of the size, which is right for PCM alone.
    guessed = any("Estimating duration" in text for *_, text in log) and not codec.startswith("pcm")
    declares = not options and not guessed and (form != "mp3" or _declares_frames(path))
    seconds = float(tracks[0].duration * tracks[0].time_base) if declares and tracks[0].duration else np.nan
    notes = [*notes, *[f"{len(tracks) - 1} more sound tracks are left out"] * (len(tracks) > 1)]
    parts = _pieces(path, container, seconds, notes, strictly, declares)
    first, rate = next(parts, (None, 1))
    require(path, (first is not None, "sound", "no samples", CUT))

    def blocks() -> Iterator[np.ndarray]:
        waiting, count = [first], len(first)
        with closing(file), closing(parts):
            for piece, _ in parts:
                waiting.append(piece)
                count += len(piece)
                if count >= _BLOCK:
                    yield np.concatenate(waiting)
                    waiting, count = [], 0
        if waiting:
            yield np.concatenate(waiting)

    lossy = "" if codec.startswith(LOSSLESS) else codec.removesuffix("float").upper()
    return Source("ffmpeg via PyAV", lossy, rate, first.shape[1], seconds * rate, blocks(), notes)


def _pieces(path: Path, container: object, declared: float, notes: list[str], strictly: object,
            declares: bool) -> Iterator[tuple[np.ndarray, int]]:
    """Decoded pieces of the first sound track, (frames, channels), and their rate; at the end lengths are checked: its
    `declared` seconds, or where a track does not say, the container's, which the longest track has to reach."""
    import av

    track, resampler = container.streams.audio[0], av.AudioResampler(format="fltp")
    whole = container.duration / 1e6 if declares and np.isnan(declared) and container.duration else np.nan
    packets = container.demux(*([] if whole == whole else [track]))
    seconds, rate, begin, end, reach = 0.0, 1, None, 0.0, 0.0
    while True:
        with strictly():
            packet = next(packets, None)
        if packet is None:
            break
        if packet.pts is not None:
            reach = max(reach, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream.index != track.index:
            continue
        whole_packet = not packet.is_corrupt or STREAMED in notes
        require(path, (whole_packet, "intact audio", f"part of a packet at {seconds:.2f} s", CUT))
        if container.format.name == "mp3" and bytes(packet)[:3] in (b"ID3", b"TAG", bytes(3)):
            notes.append(f"{packet.size} bytes at {seconds:.2f} s that are no audio are left out")
            continue
        with strictly():
            decoded = [(frame, resampler.resample(frame)) for frame in packet.decode()]
        for frame, pieces in decoded:
            rate = frame.sample_rate
            seconds += frame.samples / rate
            if frame.pts is not None:
                begin, end = frame.time if begin is None else begin, frame.time + frame.samples / rate
            for piece in pieces:
                yield piece.to_ndarray().T, rate
    padding = max(0.15, 4096 / rate)  # which encoders declare differently
    reach -= (container.start_time or 0) / 1e6
    gap, pauses = end - (begin or 0.0) - seconds, container.format.name.startswith(("matroska", "mov"))
    require(path, (not declared - seconds > padding, f"{declared:.2f} s of sound as declared", f"{seconds:.2f} s", CUT),
            (not whole - reach > padding, f"{whole:.2f} s as declared", f"{reach:.2f} s", CUT),
            (pauses or gap < 0.1, "every packet", f"{gap:.2f} s missing between them", AGAIN))
    notes += [text for holds, text in (
        (np.isnan(declared) and np.isnan(whole) and STREAMED not in notes, STREAMED),
        (seconds - declared > 0.25, f"longer than declared: {seconds:.2f} s, not {declared:.2f} s"),
        (gap > 0.1, f"gaps: {gap:.2f} s are missing between its packets")) if holds]


def _declares_frames(path: Path) -> bool:
    """Whether the first frame of an MP3 says how many there are."""
    with path.open("rb") as file:
        head = file.read(10)
        tag = 10 + sum((byte & 127) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0)))
        file.seek(tag if head[:3] == b"ID3" else 0)
        first = file.read(400)
    return any(name in first for name in (b"Xing", b"Info", b"VBRI"))


def _wave(path: Path, file: io.BufferedReader, order: str) -> Source:
    """A RIFF file, or RIFX; raise where samples are missing, say what is left over."""
    size, tag = path.stat().st_size, 1
    while len(chunk := file.read(8)) == 8:
        name, length = struct.unpack(order + "4sI", chunk)
        begin, held = file.tell(), size - file.tell()
        if name == b"fmt ":
            tag = int.from_bytes(file.read(2), "little" if order == "<" else "big")
        file.seek(begin + length + length % 2)
        if name == b"data":
            # Sizes that programs write when they do not know it yet, or that count the header as well.
            unknown = not length or min(abs(length - 2**31), abs(length - 2**32)) <= 4096 or length in (size, size - 8)
            if held and unknown and not 0 < length <= held:
                return through_ffmpeg(path, (STREAMED,), ignore_length="1")
            require(path, (length <= held, f"{length} bytes of samples as declared", held, CUT))
            rest, chunk = size - file.tell(), file.read(8)
            chunks = rest < 8 or chunk[:4].isascii() and struct.unpack(order + "I", chunk[4:])[0] <= rest - 8
            notes = () if chunks else (f"{rest} bytes after the declared samples are left out",)
            return through_soundfile(path, path, notes) if tag in SNDFILE_TAGS else through_ffmpeg(path, notes)
    return through_soundfile(path, path)


def _ogg(path: Path, file: io.BufferedReader) -> Source:
    """An Ogg file, whose pages bear checksums and numbers; chained streams one after the other. Raise for damage."""
    links, numbers, opening, unended, notes, at = [], {}, False, set(), [], 0
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        while at < len(data):
            head = data[at : at + 27]
            if not b"OggS".startswith(head[:4]) and data.find(b"OggS", at) < 0:
                notes.append(f"{len(data) - at} bytes after the last page are left out")
                break
            require(path, (b"OggS".startswith(head[:4]), "an Ogg page", f"other bytes at {at}", AGAIN))
            table = data[at + 27 : at + 27 + head[26]] if len(head) == 27 else b""
            page = data[at : at + 27 + len(table) + sum(table)]
            whole = len(head) == 27 and len(table) == head[26] and len(page) == 27 + len(table) + sum(table)
            require(path, (whole, "a whole last Ogg page", "part of one", CUT))
            first, last, serial, number = page[5] & 2, page[5] & 4, page[14:18], int.from_bytes(page[18:22], "little")
            # Ogg's checksum is zlib's with all bits in reverse order, and without the inversions.
            bits, checksum = (page[:22] + bytes(4) + page[26:]).translate(_REVERSED), page[22:26].translate(_REVERSED)
            intact = zlib.crc32(bits, 0xFFFFFFFF) ^ 0xFFFFFFFF == int.from_bytes(checksum, "big")
            missing = 0 if first else number - numbers.get(serial, -1) - 1
            require(path, (intact, "intact pages", f"a damaged one at byte {at}", AGAIN),
                    (not missing, "every page", f"a jump by {missing} at byte {at}", AGAIN))
            if first and not opening:
                links.append((at, page[27 + len(table) :][:8]))
            opening, numbers[serial] = bool(first), number
            unended = unended - {serial} if last else unended | {serial}
            at += len(page)
        ends = [*(start for start, _ in links[1:]), at]
        parts = [io.BytesIO(data[start:end]) for (start, _), end in zip(links, ends)] if links[1:] else [path]
    if unended:
        notes.append("no end mark: some encoders omit it, so a cut may not be seen")
    # libsndfile knows two codecs in Ogg, one stream at a time, and stumbles over Opus without an end mark.
    known = all(begin.startswith((b"\1vorbis", b"OpusHead")) for _, begin in links) and len(numbers) == len(links)
    if not known or unended and len(links) == 1 and links[0][1] == b"OpusHead":
        return through_ffmpeg(path, tuple(notes))
    sources = [through_soundfile(path, part, tuple(notes)) for part in parts]
    if len(sources) == 1:
        return sources[0]
    forms = {(source.rate_hz, source.channels) for source in sources}
    require(path, (len(forms) == 1, "chained streams of one form", f"(Hz, channels) {forms}", "Take them apart."))
    sources[0].notes.append(f"chained: {len(sources)} streams were read one after the other")
    return dataclasses.replace(sources[0], frames=sum(source.frames for source in sources),
                               blocks=itertools.chain.from_iterable(source.blocks for source in sources))
