"""`lib.data.audio`: every bad recording by name, and what reading and writing keep."""

import os
import pickle
import shutil
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib.data.audio import AudioError, _container_warnings, decode_g722, iter_audio, read_audio, write_audio

RATE = 16_000


def speech(seconds=1.0, rate=RATE, seed=0, level=0.3):
    """Noise in syllables: broad band, with pauses, peak `level`."""
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).standard_normal(len(time))
    audio = noise * (0.55 + 0.45 * np.sin(2 * np.pi * 3 * time))
    return (level * audio / np.abs(audio).max()).astype(np.float32)


def wav_bytes(samples, rate=RATE, channels=1, data_size=None, bits=16, tag=1, riff_size=None):
    """A RIFF file written byte by byte, so that each field can lie."""
    data = samples.tobytes() if isinstance(samples, np.ndarray) else samples
    frame = max(1, channels * bits // 8)
    layout = struct.pack("<HHIIHH", tag, channels, rate, rate * frame % 2**32, frame % 65536, bits)
    head = b"WAVEfmt " + struct.pack("<I", 16) + layout + b"data"
    head += struct.pack("<I", len(data) if data_size is None else data_size)
    return b"RIFF" + struct.pack("<I", len(head) + len(data) if riff_size is None else riff_size) + head + data


def pcm(audio):
    return (audio * 32767).astype("<i2")


@pytest.fixture
def save(tmp_path):
    def save(content, name="clip.wav"):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name
    return save


@pytest.fixture
def flac(tmp_path):
    path = tmp_path / "clip.flac"
    write_audio(path, speech(), RATE)
    return path


def refused(path, *words, **options):
    """The message of the refusal; it names the file and contains `words`; both readers agree."""
    with pytest.raises(AudioError) as caught:
        read_audio(path, **options)
    options.pop("max_seconds", None)
    with pytest.raises(AudioError) as streamed:
        list(iter_audio(path, **options))
    assert str(caught.value) == str(streamed.value)
    message = str(caught.value)
    for word in (str(path), "expected", "found", *words):
        assert word in message, message
    assert len(message) < 600
    assert str(pickle.loads(pickle.dumps(caught.value))) == message  # it crosses process pools
    return message


def warned(path, word, **options):
    _, report = read_audio(path, **options)
    assert any(word in warning for warning in report.warnings), report
    return report


# ---- what is refused ----

def test_missing(tmp_path):
    refused(tmp_path / "no such.wav", "nothing there", "Check the path")


def test_directory(tmp_path):
    refused(tmp_path, "a directory", "Name one file inside it")


def test_empty_file(save):
    refused(save(b""), "an empty file")


def test_unreadable(save, monkeypatch):
    path = save(wav_bytes(pcm(speech())))

    def denied(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))
    monkeypatch.setattr(Path, "open", denied)
    refused(path, "Permission denied", "chmod")


def test_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    refused(tmp_path / "pipe.wav", "a pipe or device")


def test_name_with_zero_byte():
    with pytest.raises(AudioError, match="expected"):
        read_audio("a\0b.wav")


def test_text_named_wav(save):
    refused(save(b"this is not a recording\n" * 40), "libsndfile", "ffmpeg -i")


def test_raw_named_raw(save):
    refused(save(b"\1\2" * 4000, "clip.raw"), "libsndfile")


def test_header_of_20_bytes(save):
    refused(save(wav_bytes(pcm(speech()))[:20]), "libsndfile")


def test_header_only_with_declared_samples(save):
    refused(save(wav_bytes(pcm(speech()))[:44]), "32000 bytes of samples as declared", "found 0")


def test_zero_samples(save):
    refused(save(wav_bytes(b"")), "no samples")


def test_samples_but_none_declared(save):
    refused(save(wav_bytes(pcm(speech()), data_size=0)), "no samples declared", "-ignore_length 1")


def test_truncated_wav(save):
    whole = wav_bytes(pcm(speech()))
    refused(save(whole[:len(whole) // 2]), "32000 bytes of samples as declared", "found 15978", "cut short")


def test_one_byte_missing(save):
    refused(save(wav_bytes(pcm(speech()))[:-1]), "found 31999")


def test_size_field_lie(save):
    refused(save(wav_bytes(pcm(speech()), data_size=0xFFFFFF00)), "4294967040 bytes")


def test_truncated_after_other_chunks(save):
    whole = wav_bytes(pcm(speech()))
    extra = b"LIST" + struct.pack("<I", 5) + b"notes\0"
    refused(save(whole[:36] + extra + whole[36:-500]), "found 31500")
    audio, _ = read_audio(save(whole[:36] + extra + whole[36:]))
    assert len(audio) == RATE


def test_truncated_big_endian_wav(tmp_path):
    path = tmp_path / "clip.wav"
    soundfile.write(path, speech(), RATE, subtype="PCM_16", endian="BIG")
    assert path.read_bytes()[:4] == b"RIFX" and len(read_audio(path)[0]) == RATE
    path.write_bytes(path.read_bytes()[:20_000])
    refused(path, "as declared", "cut short")


@pytest.mark.parametrize(("value", "at"), [(np.nan, 0), (np.inf, 8_000), (-np.inf, 15_999)])
def test_nan_and_inf(save, value, at):
    audio = speech()
    audio[at] = value
    refused(save(wav_bytes(audio, bits=32, tag=3)), "non-finite", f"at {at / RATE:.3f} s")


def test_double_beyond_single_precision(save):
    audio = speech().astype("<f8")
    audio[5] = 1e300
    refused(save(wav_bytes(audio, bits=64, tag=3)), "non-finite")


def test_integers_stored_as_floats(save):
    refused(save(wav_bytes(speech() * 32768, bits=32, tag=3)), "dividing")


def test_flac_one_byte_flipped(flac):
    content = bytearray(flac.read_bytes())
    content[len(content) // 2] ^= 0x10
    flac.write_bytes(content)
    refused(flac, "damaged")


def test_flac_cut(flac):
    flac.write_bytes(flac.read_bytes()[:20_000])
    refused(flac)


def test_flac_of_unknown_length(flac):
    content = bytearray(flac.read_bytes())
    content[21] &= 0xF0  # the 36 bits of total samples in STREAMINFO
    content[22:26] = bytes(4)
    flac.write_bytes(content)
    refused(flac, "unknown length", "Write it to a file again")


@pytest.mark.parametrize("suffix", ["ogg", "mp3"])
def test_lossy_cut(tmp_path, suffix):
    path = tmp_path / f"clip.{suffix}"
    soundfile.write(path, speech(10), RATE)
    whole = path.read_bytes()
    assert len(read_audio(path)[0]) == pytest.approx(10 * RATE, abs=RATE // 10)
    path.write_bytes(whole[:len(whole) // 2])
    refused(path)


def test_ogg_without_end_mark(tmp_path):
    path = tmp_path / "clip.ogg"
    soundfile.write(path, speech(), RATE)
    content = bytearray(path.read_bytes())
    content[content.rfind(b"OggS") + 5] &= 0xFB
    path.write_bytes(content)
    assert "no end mark" in _container_warnings(path)[0]  # the decoder may mind the page's checksum, we do not
    path.write_bytes(content[:-1])
    refused(path, "a whole last Ogg page", "cut short")


@pytest.mark.parametrize("rate", [0, 7_999, 192_001, 2**31 - 1])
def test_rates_outside(save, rate):
    refused(save(wav_bytes(pcm(speech()), rate=rate)))


@pytest.mark.parametrize("channels", [0, 9, 65_535])
def test_channel_counts_outside(save, channels):
    refused(save(wav_bytes(pcm(speech(9)), channels=channels)))


@pytest.mark.parametrize("name", ["au", "aiff", "rf64"])
def test_unusual_container(tmp_path, name):
    soundfile.write(tmp_path / f"clip.{name}", speech(), RATE, format=name.upper())
    refused(tmp_path / f"clip.{name}", "expected one of WAV", f"found {name.upper()}", "Convert it to FLAC")


def test_too_short_and_too_long(save):
    path = save(wav_bytes(pcm(speech(0.5))))
    refused(path, "at least 0.6 s", "found 0.500 s", min_seconds=0.6)
    with pytest.raises(AudioError, match="at most 0.4 s.*iter_audio"):
        read_audio(path, max_seconds=0.4)
    assert len(read_audio(path, min_seconds=0.5, max_seconds=0.5)[0]) == RATE // 2


@pytest.mark.parametrize("offset", [0.0, 0.4])
@pytest.mark.parametrize("noise", [0, 2e-5])
def test_silent(save, offset, noise):
    audio = (noise * speech(level=1) + offset).astype(np.float32)
    refused(save(wav_bytes(audio, bits=32, tag=3)), "no speech", "-80 dBFS")


def test_antiphase_stereo(save):
    left = speech()
    path = save(wav_bytes(np.stack([pcm(left), -pcm(left)], axis=1), channels=2))
    refused(path, "cancel", "channel=0")
    audio, report = read_audio(path, channel=1)
    np.testing.assert_allclose(audio, -left, atol=1e-4)
    assert report.channels == 2 and not report.warnings
    refused(path, "no speech", strict=False)  # what is left is silence
    refused(path, "channel 2", channel=2)


def test_nearly_antiphase_stereo(save):
    left, other = speech(), 0.01 * speech(seed=1)
    path = save(wav_bytes(np.stack([pcm(left), pcm(other - left)], axis=1), channels=2))
    refused(path, "cancel")
    warned(path, "antiphase", strict=False)


# ---- what is flagged ----

def test_clean_clip_has_no_warning(flac):
    audio, report = read_audio(flac)
    assert report.warnings == () and audio.dtype == np.float32 and audio.shape == (RATE,)
    assert (report.seconds, report.rate_hz, report.channels) == (1.0, RATE, 1)
    assert report.peak == pytest.approx(0.3, abs=1e-4)
    assert report.effective_bandwidth_hz > 7_900 and report.silence_ratio < 0.2


def test_flac_named_wav(flac, tmp_path):
    audio, report = read_audio(shutil.copy(flac, tmp_path / "clip2.wav"))
    assert len(audio) == RATE and report.warnings == ()


def test_peak_15(save):
    report = warned(save(wav_bytes(speech() * 50, bits=32, tag=3)), "over full scale: peak 15")
    assert report.peak == pytest.approx(15, rel=1e-3)


def test_clipping(save):
    warned(save(wav_bytes(pcm(np.clip(speech() * 9, -1, 1)))), "clipping")


def test_dc_offset(save):
    warned(save(wav_bytes(pcm(speech() + 0.05))), "DC offset: +0.050")


@pytest.mark.parametrize("as_rate", [8_000, 16_000])
def test_8_khz_history(save, as_rate):
    import soxr
    narrow = speech(2, rate=8_000)
    audio = narrow if as_rate == 8_000 else soxr.resample(narrow, 8_000, as_rate)
    report = warned(save(wav_bytes(pcm(audio), rate=as_rate)), "narrow band")
    assert 3_800 <= report.effective_bandwidth_hz <= 4_200
    assert report.rate_hz == as_rate


def test_mostly_silence(save):
    audio = np.concatenate([speech(0.5), np.zeros(RATE, np.float32)])
    report = warned(save(wav_bytes(pcm(audio))), "mostly silence: 67%")
    assert report.silence_ratio == pytest.approx(2 / 3, abs=0.03)


def test_very_long(save, monkeypatch):
    monkeypatch.setattr("lib.data.audio.LONG_SECONDS", 2.0)
    warned(save(wav_bytes(pcm(speech(3)))), "very long")


@pytest.mark.parametrize(("size", "riff_size"), [(0, 8), (0x7FFFF000, 0x7FFFF024), (0xFFFFFFFF, 0xFFFFFFFF)])
def test_streamed_wav(save, size, riff_size):
    path = save(wav_bytes(pcm(speech()), data_size=size, riff_size=riff_size))
    warned(path, "unknown length")
    assert len(read_audio(path)[0]) == RATE


# ---- what reading and writing keep ----

def test_stereo_is_averaged(save):
    left, right = speech(), speech(seed=1)
    audio, report = read_audio(save(wav_bytes(np.stack([pcm(left), pcm(right)], axis=1), channels=2)))
    np.testing.assert_allclose(audio, (left + right) / 2, atol=1e-4)
    assert report.channels == 2


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_16_bit_round_trip_is_exact(tmp_path, suffix):
    integers = np.random.default_rng(0).integers(-32768, 32768, RATE)
    audio = (integers / 32768).astype(np.float32)
    write_audio(tmp_path / f"new folder/clip{suffix}", audio, RATE)
    again, _ = read_audio(tmp_path / f"new folder/clip{suffix}")
    assert np.array_equal(again, audio)
    assert [entry.suffix for entry in (tmp_path / "new folder").iterdir()] == [suffix]


@pytest.mark.parametrize(("audio", "word"), [
    (np.array([0, np.nan]), "nan"), (np.array([0, np.inf]), "inf"), (np.array([0, 1.01]), "1.01"),
    (np.zeros(0), "shape"), (np.zeros((2, 2)), "shape"), (np.zeros(4, np.int16), "int16")])
def test_write_refuses(tmp_path, audio, word):
    kept = speech()
    write_audio(tmp_path / "clip.wav", kept, RATE)
    with pytest.raises(AudioError, match=word):
        write_audio(tmp_path / "clip.wav", audio, RATE)
    assert len(read_audio(tmp_path / "clip.wav")[0]) == len(kept)
    with pytest.raises(AudioError, match=".wav or .flac"):
        write_audio(tmp_path / "clip.mp3", kept, RATE)
    with pytest.raises(AudioError, match="rate"):
        write_audio(tmp_path / "clip.wav", kept, 4_000)


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    write_audio(tmp_path / "clip.flac", speech(), RATE)
    before = (tmp_path / "clip.flac").read_bytes()
    monkeypatch.setattr("lib.data.audio.os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space"):
        write_audio(tmp_path / "clip.flac", speech(2), RATE)
    assert (tmp_path / "clip.flac").read_bytes() == before
    assert list(tmp_path.iterdir()) == [tmp_path / "clip.flac"]


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
@pytest.mark.parametrize("overlap", [0.0, 0.25])
def test_blocks_equal_the_whole(save, rate, overlap):
    path = save(wav_bytes(pcm(speech(10.3, rate=rate)), rate=rate))
    whole, report = read_audio(path)
    covered = 0
    for start, samples in iter_audio(path, RATE, block_seconds=1.5, overlap_seconds=overlap):
        first = round(start * RATE)
        assert first == max(0, covered - round(overlap * RATE)) and len(samples) <= 1.5 * RATE
        np.testing.assert_allclose(samples, whole[first:first + len(samples)], atol=1e-6)
        covered = first + len(samples)
    assert covered == len(whole)

    def returned():
        return (yield from iter_audio(path, RATE))
    generator = returned()
    with pytest.raises(StopIteration) as end:
        while True:
            next(generator)
    assert end.value.value == report


def test_block_sizes_are_checked(flac):
    with pytest.raises(ValueError, match="overlap_seconds < block_seconds"):
        next(iter_audio(flac, block_seconds=1, overlap_seconds=1))


def test_hour_in_bounded_memory(tmp_path):
    import tracemalloc
    path = tmp_path / "hour.wav"
    with soundfile.SoundFile(path, "w", RATE, 1, "PCM_16") as file:
        for minute in range(10):
            file.write(speech(60, seed=minute))
    tracemalloc.start()
    assert sum(len(samples) for _, samples in iter_audio(path, RATE, 10.0)) == 600 * RATE
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12e6  # the whole is 38 MB


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")
def test_g722(tmp_path):
    import subprocess
    time = np.arange(RATE) / RATE
    audio = (0.3 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)
    write_audio(tmp_path / "clip.wav", audio, RATE)
    subprocess.run(["ffmpeg", "-v", "error", "-i", tmp_path / "clip.wav", tmp_path / "clip.g722"], check=True)
    decoded, rate = decode_g722(tmp_path / "clip.g722")
    assert rate == RATE and decoded.shape == (RATE,) and decoded.dtype == np.float32
    assert max(np.correlate(decoded, audio[100:8_100])) > 0.9 * np.sum(audio[100:8_100] ** 2)
    (tmp_path / "none.g722").touch()
    with pytest.raises(AudioError, match="empty"):
        decode_g722(tmp_path / "none.g722")


def test_g722_without_ffmpeg(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AudioError, match="apt install ffmpeg"):
        decode_g722(tmp_path / "clip.g722")


# ---- properties ----

loose = settings(max_examples=60, deadline=None,
                 suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@loose
@given(frames=st.integers(4_800, 60_000), rate=st.sampled_from([8_000, 11_025, 16_000, 22_050, 44_100, 48_000]),
       target=st.sampled_from([8_000, 16_000, 24_000]))
def test_resampling_keeps_duration(tmp_path, frames, rate, target):
    path = tmp_path / "clip.wav"
    write_audio(path, speech(frames / rate, rate)[:frames], rate)
    audio, report = read_audio(path, target, min_seconds=0)
    assert abs(len(audio) / target - report.seconds) <= 1 / target
    assert np.isfinite(audio).all()


@loose
@given(scale=st.floats(0.001, 0.999), seed=st.integers(0, 99), suffix=st.sampled_from([".wav", ".flac", ".FLAC"]))
def test_round_trip(tmp_path, scale, seed, suffix):
    audio = speech(0.4, seed=seed, level=scale)
    write_audio(tmp_path / f"clip{suffix}", audio, RATE)
    again, _ = read_audio(tmp_path / f"clip{suffix}")
    np.testing.assert_allclose(again, audio, atol=1 / 65536 + 1e-7)


@loose
@given(content=st.binary(max_size=400),
       magic=st.sampled_from([b"", b"RIFF\0\0\0\0WAVE", b"fLaC", b"OggS", b"FORM\0\0\0\0AIFF", b"RF64", b"\xff\xfb"]),
       name=st.sampled_from(["a.wav", "a.flac", "a.raw", "a.mp3", "a"]))
def test_arbitrary_bytes_are_refused(tmp_path, content, magic, name):
    (tmp_path / name).write_bytes(magic + content)
    with pytest.raises(AudioError):
        read_audio(tmp_path / name)


@loose
@given(data=st.data(), suffix=st.sampled_from(["wav", "flac", "ogg", "mp3"]))
def test_damaged_bytes_are_read_or_refused(tmp_path, data, suffix):
    path = tmp_path / f"clip.{suffix}"
    soundfile.write(path, speech(0.4), RATE)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content) - 1, 200)))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[:data.draw(st.integers(1, len(content)))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            audio, _ = read_audio(path)
        except AudioError:
            return
    assert audio.dtype == np.float32 and len(audio) and np.isfinite(audio).all()
