"""`lib.data.audio` and its decoders: every bad recording by name, and what reading and writing keep."""

import io
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib.data.audio import AudioError, decode_g722, header, iter_audio, read_audio, write_audio
from lib.data.decoders import SUFFIXES
from tests.conftest import encoded, toy_speech

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
    with pytest.raises(AudioError) as streamed:
        list(iter_audio(path, **options))
    assert str(caught.value) == str(streamed.value)
    message = str(caught.value)
    for word in (str(path), "expected", "found", *words):
        assert word in message, message
    assert len(message) < 600
    assert str(pickle.loads(pickle.dumps(caught.value))) == message  # it crosses process pools
    return message


def warned(path, word, decoder="soundfile", **options):
    _, report = read_audio(path, **options)
    assert any(word in warning for warning in report.warnings), report
    assert report.decoder == decoder
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


def test_truncated_wav(save):
    whole = wav_bytes(pcm(speech()))
    refused(save(whole[:len(whole) // 2]), "32000 bytes of samples as declared", "found 15978", "cut short")


def test_one_byte_missing(save):
    refused(save(wav_bytes(pcm(speech()))[:-1]), "found 31999")


def test_size_field_lie(save):
    refused(save(wav_bytes(pcm(speech()), data_size=0xC0000000)), "3221225472 bytes")


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
    warned(flac, "unknown length", decoder="ffmpeg via PyAV")
    assert len(read_audio(flac)[0]) == RATE
    flac.write_bytes(content[:20_000])
    refused(flac)
    content[len(content) // 2] ^= 0x10
    flac.write_bytes(content)
    refused(flac, "intact audio", "Damaged")


@pytest.mark.parametrize("suffix", ["ogg", "mp3"])
def test_lossy_cut(tmp_path, suffix):
    path = tmp_path / f"clip.{suffix}"
    soundfile.write(path, speech(10), RATE)
    whole = path.read_bytes()
    assert len(read_audio(path)[0]) == pytest.approx(10 * RATE, abs=RATE // 10)
    path.write_bytes(whole[:len(whole) // 2])
    refused(path)


@pytest.mark.parametrize("rate", [0, 7_999, 192_001, 2**31 - 1])
def test_rates_outside(save, rate):
    refused(save(wav_bytes(pcm(speech()), rate=rate)))


@pytest.mark.parametrize("channels", [0, 9, 65_535])
def test_channel_counts_outside(save, channels):
    refused(save(wav_bytes(pcm(speech(9)), channels=channels)))


def test_too_short(save):
    path = save(wav_bytes(pcm(speech(0.5))))
    refused(path, "at least 0.6 s", "found 0.500 s", min_seconds=0.6)
    assert len(read_audio(path, min_seconds=0.5)[0]) == RATE // 2


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


@pytest.mark.parametrize(("size", "riff_size"), [
    (0, 8), (0, None), (0x7FFFF000, 0x7FFFF024), (0x7FFFFFFF, 0x80000023), (0x80000000, 0x80000024), (0xFFFFFF00, None),
    (0xFFFFFFFF, 0xFFFFFFFF), (2 * RATE + 44, None), (2 * RATE + 36, None)])
def test_wav_of_a_stream_is_read_to_its_end(save, size, riff_size):
    whole, audio = wav_bytes(pcm(speech()), data_size=size, riff_size=riff_size), pcm(speech()) / np.float32(32768)
    warned(save(whole), "unknown length", "ffmpeg via PyAV")
    assert np.array_equal(read_audio(save(whole))[0], audio) and np.isnan(header(save(whole))[0])
    refused(save(wav_bytes(pcm(speech()))[:len(whole) // 2]), "cut short")


def test_wav_that_holds_more_than_it_declares(save):
    path = save(wav_bytes(pcm(speech()), data_size=RATE))
    warned(path, f"{RATE} bytes after the declared samples are left out")
    assert len(read_audio(path)[0]) == RATE // 2
    path = save(wav_bytes(pcm(speech())) + b"LIST" + struct.pack("<I", 6) + b"notes\0")
    assert read_audio(path)[1].warnings == ()


def test_two_voices_left_and_right(save):
    left, right = speech(2), speech(2, seed=1)
    stereo = save(wav_bytes(np.stack([pcm(left), pcm(right)], axis=1), channels=2))
    warned(stereo, "channels differ")
    assert read_audio(stereo, channel=1)[1].warnings == ()
    near = save(wav_bytes(np.stack([pcm(left), pcm(0.7 * left + 0.3 * right)], axis=1), channels=2))
    assert read_audio(near)[1].warnings == ()
    empty = save(wav_bytes(np.stack([pcm(left), pcm(0 * left)], axis=1), channels=2))
    assert read_audio(empty)[1].warnings == ()


@pytest.mark.parametrize("gain", [0.9, 0.3, 0.02])
def test_clipping_before_a_gain_change(save, gain):
    clipped = np.clip(speech() * 15, -1, 1)
    report = warned(save(wav_bytes(pcm(gain * clipped))), "clipping before a gain change")
    whole = read_audio(save(wav_bytes(pcm(clipped))))[1]
    assert report.clipped_ratio == pytest.approx(whole.clipped_ratio, rel=0.05)
    assert read_audio(save(wav_bytes(pcm(gain * speech()))))[1].clipped_ratio == 0


@pytest.mark.parametrize("quieter_db", [0, 30, 50, 60, 66])
def test_quiet_but_whole_speech_is_no_silence(save, quieter_db):
    audio = np.concatenate([speech(2), np.zeros(RATE // 2, np.float32)]) * 10 ** (-quieter_db / 20)
    report = read_audio(save(wav_bytes(audio, bits=32, tag=3)))[1]
    assert report.silence_ratio == pytest.approx(0.2, abs=0.03) and report.warnings == ()


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
@pytest.mark.parametrize("form", ["wav", "opus", "m4a"])
def test_blocks_equal_the_whole(tmp_path, rate, form):
    path = tmp_path / f"clip.{form}"
    if form == "wav":
        write_audio(path, speech(10.3, rate=rate), rate)
    else:
        encoded(path, {"opus": "libopus", "m4a": "aac"}[form], speech(10.3, rate=48_000), 48_000)
    whole, report = read_audio(path)
    covered = 0
    for start, samples in iter_audio(path, RATE, block_seconds=1.5):
        assert round(start * RATE) == covered and len(samples) <= 1.5 * RATE
        np.testing.assert_allclose(samples, whole[covered:covered + len(samples)], atol=1e-6)
        covered += len(samples)
    assert covered == len(whole)

    def returned():
        return (yield from iter_audio(path, RATE))
    generator = returned()
    with pytest.raises(StopIteration) as end:
        while True:
            next(generator)
    assert end.value.value == report


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


def test_g722(tmp_path):
    time = np.arange(RATE) / RATE
    audio = (0.3 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)
    encoded(tmp_path / "clip.g722", "g722", audio, RATE, form="g722")
    decoded = decode_g722(tmp_path / "clip.g722")
    assert decoded.shape == (RATE,) and decoded.dtype == np.float32
    assert max(np.correlate(decoded, audio[100:8_100])) > 0.9 * np.sum(audio[100:8_100] ** 2)
    (tmp_path / "none.g722").touch()
    with pytest.raises(AudioError, match="empty"):
        decode_g722(tmp_path / "none.g722")
    refused(tmp_path / "clip.g722")  # as a recording, its form cannot be told


# ---- what a phone makes ----

PHONE = {  # suffix: codec, rate
    "m4a": ("aac", 44_100), "mp4": ("aac", 48_000), "mov": ("alac", 48_000), "3gp": ("libopencore_amrnb", 8_000),
    "amr": ("libopencore_amrnb", 8_000), "webm": ("libopus", 48_000), "mka": ("libopus", 48_000),
    "mp3": ("libmp3lame", 44_100), "wma": ("wmav2", 44_100), "aac": ("aac", 16_000), "aiff": ("pcm_s16be", 44_100),
    "caf": ("pcm_s24le", 48_000), "au": ("pcm_s16be", 16_000), "w64": ("pcm_f32le", 22_050), "tta": ("tta", 16_000),
    "flv": ("libmp3lame", 22_050)}


@pytest.fixture(scope="module")
def phone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phone")
    for suffix, (codec, rate) in PHONE.items():
        encoded(folder / f"clip.{suffix}", codec, soxr.resample(toy_speech(5.0), RATE, rate), rate)
    return folder


def alike(audio, original):
    """The largest correlation of the two, wherever one begins in the other."""
    size = 1 << (len(audio) + len(original)).bit_length()
    product = np.fft.irfft(np.fft.rfft(audio, size) * np.conj(np.fft.rfft(original, size)))
    return product.max() / (np.linalg.norm(audio) * np.linalg.norm(original))


@pytest.mark.parametrize("suffix", PHONE)
def test_what_ffmpeg_reads_is_the_whole_and_alike(phone, suffix):
    codec, rate = PHONE[suffix]
    audio, report = read_audio(phone / f"clip.{suffix}")
    assert len(audio) == pytest.approx(5 * RATE, abs=0.15 * RATE) and report.decoder == "ffmpeg via PyAV"
    assert report.rate_hz == rate and report.channels == 1
    assert alike(audio, toy_speech(5.0)) > (0.95 if rate > 8_000 else 0.6)
    lossless = codec.startswith(("pcm", "alac", "tta"))
    assert any("lossy format" in warning for warning in report.warnings) != lossless


@pytest.mark.parametrize("suffix", PHONE)
def test_what_ffmpeg_reads_is_refused_where_damage_shows(phone, tmp_path, suffix):
    whole, path, numbers = (phone / f"clip.{suffix}").read_bytes(), tmp_path / f"clip.{suffix}", random.Random(0)
    middle, share = len(whole) // 2, len(whole) // 20
    spoilt = {"cut": whole[:middle], "removed": whole[:middle] + whole[middle + share:]}
    if not PHONE[suffix][0].startswith("pcm"):  # which has nothing that a change could contradict
        spoilt["overwritten"] = whole[:middle] + numbers.randbytes(share) + whole[middle + share:]
    if suffix in ("amr", "aac"):  # without a header, a cut between two frames cannot be seen, only be warned of
        del spoilt["cut"]
    for name, content in spoilt.items():
        path.write_bytes(content)
        try:
            _, report = read_audio(path)
        except AudioError as error:
            assert "expected" in str(error)
        else:
            assert (name, suffix) == ("removed", "amr"), name  # whole frames were, and it declares no length
            assert any("unknown length" in warning for warning in report.warnings)


def test_a_picture_beside_the_sound(tmp_path, phone):
    content = io.BytesIO()
    with av.open(content, "w", format="mp4") as movie:
        sound, picture = movie.add_stream("aac", rate=44_100, layout="mono"), movie.add_stream("mpeg4", rate=10)
        picture.width = picture.height = 64
        for number in range(70):  # longer than the sound
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 3 * number, np.uint8), format="rgb24")
            movie.mux(picture.encode(frame))
        movie.mux(picture.encode(None))
        with av.open(str(phone / "clip.m4a")) as given:
            for frame in given.decode(audio=0):
                movie.mux(sound.encode(frame))
            movie.mux(sound.encode(None))
    (tmp_path / "clip.mp4").write_bytes(content.getvalue())
    assert len(read_audio(tmp_path / "clip.mp4")[0]) == pytest.approx(5 * RATE, abs=0.15 * RATE)


def test_more_sound_tracks_are_said_to_be_left_out(tmp_path):
    with av.open(str(tmp_path / "two.m4a"), "w", format="ipod") as target:
        tracks = [target.add_stream("alac", rate=RATE, layout="mono") for _ in range(2)]
        for seed, track in enumerate(tracks):
            frame = av.AudioFrame.from_ndarray(pcm(speech(2, seed=seed))[None], format="s16p", layout="mono")
            frame.sample_rate, frame.pts = RATE, 0
            target.mux([*track.encode(frame), *track.encode(None)])
    report = warned(tmp_path / "two.m4a", "1 more sound tracks are left out", "ffmpeg via PyAV")
    assert report.seconds == 2


def mp3_without_header(seconds, seed=0):
    """An MP3 of a constant rate whose first frame, with the number of frames, was taken off."""
    content = io.BytesIO()
    soundfile.write(content, speech(seconds, rate=44_100, seed=seed), 44_100, format="MP3", subtype="MPEG_LAYER_III")
    content = content.getvalue()
    at = content.index(b"\xff\xfb", content.index(b"Info") if b"Info" in content[:400] else content.index(b"Xing"))
    return content[at:]


@pytest.mark.parametrize("parts", [1, 2])
def test_mp3_that_does_not_say_how_long_it_is(save, parts):
    content = b"".join(mp3_without_header(6, seed) for seed in range(parts))
    audio = read_audio(save(content, "clip.mp3"))[0]
    assert len(audio) == pytest.approx(parts * 6 * RATE, abs=parts * 0.15 * RATE)
    warned(save(content, "clip.mp3"), "unknown length", "ffmpeg via PyAV")
    tagged = b"ID3\3\0\0\0\0\0\x0a" + bytes(10) + content + b"TAG" + bytes(125)
    assert np.array_equal(read_audio(save(tagged, "clip.mp3"))[0], audio)


def test_nothing_but_ours_is_printed(tmp_path, save):
    paths = [save(mp3_without_header(2), "a.mp3"), save(mp3_without_header(2)[100:-300] + bytes(50), "b.mp3"),
             save(b"ID3\3" + bytes(500), "c.mp3"), save(b"\xff\xfb" + bytes(999), "d.mp3")]
    script = ("import sys\nfrom lib.data.audio import AudioError, read_audio\nfor path in sys.argv[1:]:\n"
              "    try:\n        read_audio(path)\n    except AudioError:\n        pass\n")
    done = subprocess.run([sys.executable, "-c", script, *map(str, paths)], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""


def test_a_header_says_why_nothing_can_be_read(tmp_path, save, phone, flac):
    assert header(flac) == (1.0, RATE)
    cut = save((phone / "clip.m4a").read_bytes()[:999], "cut.m4a")
    for path, word in [(save(b"# notes\n" * 40, "notes.txt"), "can read"), (save(b"", "a.wav"), "an empty file"),
                       (save(b"\xff\xd8\xff\xe0" + bytes(500), "a.jpg"), "can read"), (tmp_path, "a directory"),
                       (save(wav_bytes(b""), "b.wav"), "no samples"), (cut, "can read")]:
        with pytest.raises(AudioError, match=word):
            header(path)
    assert {f".{suffix}" for suffix in PHONE} | {".wav", ".flac", ".ogg", ".opus", ".oga", ".aif"} <= set(SUFFIXES)


def test_a_kind_of_file_that_could_lead_elsewhere_is_not_opened(save, flac):
    refused(save(b"ffconcat version 1.0\nfile clip.flac\n", "list.ffconcat"), "another kind of file")
    refused(save(b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nclip.flac\n", "list.m3u8"), "another kind of file")


# ---- Ogg ----

def ogg_pages(content):
    """The pages of an Ogg file, as bytes that can be changed."""
    pages = []
    while content:
        length = 27 + content[26] + sum(content[27:27 + content[26]])
        pages.append(bytearray(content[:length]))
        content = content[length:]
    return pages


def with_checksum(page):
    """A page with the checksum that belongs to it, bit by bit as RFC 3533 defines it."""
    page[22:26] = bytes(4)
    register = 0
    for byte in page:
        register ^= byte << 24
        for _ in range(8):
            register = (register << 1 ^ (0x04C11DB7 if register >> 31 else 0)) & 0xFFFFFFFF
    page[22:26] = struct.pack("<I", register)
    return bytes(page)


@pytest.fixture(params=["VORBIS", "OPUS"])
def ogg(request, tmp_path):
    path = tmp_path / "clip.ogg"
    soundfile.write(path, speech(6), RATE, format="OGG", subtype=request.param)
    return path


def test_ogg_checksums_are_those_of_the_standard(ogg):
    pages = ogg_pages(ogg.read_bytes())
    assert len(pages) > 3 and [with_checksum(bytearray(page)) for page in pages] == pages


def test_ogg_damage_is_found(ogg):
    whole, numbers = ogg.read_bytes(), random.Random(1)
    for at in numbers.sample(range(len(whole)), 20):  # one bit, anywhere
        ogg.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << numbers.randrange(8)]) + whole[at + 1:])
        refused(ogg)
    pages = ogg_pages(whole)
    ogg.write_bytes(b"".join(pages[:3] + pages[4:]))
    refused(ogg, "every page", "a jump by 1")
    ogg.write_bytes(whole[:-1])
    refused(ogg, "a whole last Ogg page", "cut short")


def test_ogg_without_end_mark(ogg):
    pages = ogg_pages(ogg.read_bytes())
    pages[-1][5] &= 0xFB
    ogg.write_bytes(b"".join([*pages[:-1], with_checksum(pages[-1])]))
    warned(ogg, "no end mark", "soundfile" if b"vorbis" in pages[0] else "ffmpeg via PyAV")
    assert len(read_audio(ogg)[0]) == pytest.approx(6 * RATE, abs=RATE // 100)


def test_chained_ogg_is_read_whole(ogg, tmp_path):
    first = ogg.read_bytes()
    form = soundfile.info(ogg).subtype
    soundfile.write(other := tmp_path / "other.ogg", speech(3, seed=5), RATE, format="OGG", subtype=form)
    parts = [read_audio(path)[0] for path in (ogg, other)]
    ogg.write_bytes(first + other.read_bytes())
    warned(ogg, "chained: 2 streams")
    assert np.array_equal(read_audio(ogg)[0], np.concatenate(parts)) and header(ogg)[0] == 9
    soundfile.write(other, speech(3, rate=8_000), 8_000, format="OGG", subtype=form)
    ogg.write_bytes(first + other.read_bytes())
    refused(ogg, "chained streams of one form")
    ogg.write_bytes(first + b"left over")
    warned(ogg, "9 bytes after the last page are left out")


def test_flac_in_ogg(tmp_path):
    encoded(tmp_path / "clip.oga", "flac", speech(3), RATE, form="ogg")
    audio, report = read_audio(tmp_path / "clip.oga")
    np.testing.assert_allclose(audio, speech(3), atol=1e-4)
    assert report.decoder == "ffmpeg via PyAV" and report.warnings == ()


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
       magic=st.sampled_from([b"", b"RIFF\0\0\0\0WAVE", b"fLaC", b"OggS", b"FORM\0\0\0\0AIFF", b"RF64", b"\xff\xfb",
                              b"\0\0\0\x18ftypM4A ", b"\x1aE\xdf\xa3", b"#!AMR\n", b"0&\xb2u\x8ef\xcf\x11"]),
       name=st.sampled_from(["a.wav", "a.flac", "a.raw", "a.mp3", "a.m4a", "a"]))
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
