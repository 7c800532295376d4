"""Random damage: the audio reader and the detector loader refuse with their own error, or give something sound.

FUZZ_EXAMPLES sets the number of examples of each test (`make fuzz` takes many more than the default).
"""

import io
import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib.__main__ import parser
from lib.cli import COMMANDS
from lib.data.audio import AudioError, iter_audio, read_audio
from lib.detector import Detector
from lib.model.checkpoints import DetectorError
from lib.paths import UsageError, file_digest
from lib.recordings.judging import UNKNOWN, judged
from lib.settings import SettingsError, load_settings
from tests.conftest import encoded

fuzzed = settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", "40")), deadline=None,
                  derandomize="FUZZ_EXAMPLES" not in os.environ,
                  suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
damage = st.lists(st.one_of(
    st.tuples(st.just("set"), st.floats(0, 1), st.integers(0, 255)),
    st.tuples(st.just("header"), st.integers(0, 80), st.integers(0, 255)),
    st.tuples(st.just("cut"), st.floats(0, 1), st.just(0)),
    st.tuples(st.just("insert"), st.floats(0, 1), st.integers(1, 64)),
    st.tuples(st.just("flip"), st.floats(0, 1), st.integers(0, 7)),
), min_size=1, max_size=4)


def damaged(content, changes):
    """`content` after byte changes: anywhere, near the beginning, one bit, cut short, or with bytes put in."""
    content = bytearray(content)
    for kind, place, value in changes:
        at = place if kind == "header" else int(place * len(content))
        if kind == "cut":
            del content[at:]
        elif kind == "insert":
            content[at:at] = bytes(range(value))
        elif at < len(content):
            content[at] = content[at] ^ 1 << value if kind == "flip" else value
    return bytes(content)


SNDFILE = [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS")]
FFMPEG = {"m4a": ("aac", 44_100), "mp3": ("libmp3lame", 16_000), "webm": ("libopus", 48_000),
          "mka": ("libopus", 48_000), "mov": ("alac", 16_000), "wma": ("wmav2", 16_000), "aiff": ("pcm_s16be", 16_000),
          "amr": ("libopencore_amrnb", 8_000)}


@pytest.fixture(scope="module")
def sounds(voice, tmp_path_factory):
    made, folder = {}, tmp_path_factory.mktemp("sounds")
    for form, subtype in SNDFILE:
        soundfile.write(buffer := io.BytesIO(), voice(0.6, 1), 16_000, format=form, subtype=subtype)
        made[f"{form} {subtype}"] = buffer.getvalue()
    for suffix, (codec, rate_hz) in FFMPEG.items():
        audio = soxr.resample(voice(0.8, 1), 16_000, rate_hz)
        made[suffix] = encoded(folder / f"clip.{suffix}", codec, audio, rate_hz).read_bytes()
    made["chained"] = 2 * made["OGG OPUS"]
    return made


def read_or_refused(path):
    try:
        audio, report = read_audio(path)
    except AudioError as error:
        assert len(str(error)) > 20
        return
    assert audio.ndim == 1 and audio.dtype == np.float32 and np.isfinite(audio).all() and len(audio) >= 0.29 * 16_000
    assert np.isfinite([report.seconds, report.peak, report.effective_bandwidth_hz, report.silence_ratio]).all()
    assert np.array_equal(np.concatenate([block for _, block in iter_audio(path, block_seconds=0.25)]), audio)


@fuzzed
@given(st.sampled_from([*map(" ".join, SNDFILE), *FFMPEG, "chained"]), damage)
def test_damaged_recordings(sounds, tmp_path, name, changes):
    (tmp_path / "clip.wav").write_bytes(damaged(sounds[name], changes))
    read_or_refused(tmp_path / "clip.wav")


@fuzzed
@given(st.binary(max_size=300), st.sampled_from([
    b"", b"RIFF\x00\x01\x00\x00WAVEfmt ", b"fLaC\x00", b"OggS\x00\x02", b"ID3\x03", b"\xff\xfb\x90",
    b"\x00\x00\x00\x18ftypM4A ", b"\x1aE\xdf\xa3", b"#!AMR\n", b"FORM\x00\x00\x01\x00AIFF", b"0&\xb2u\x8ef\xcf\x11",
    b"caff\x00\x01", b".snd", b"TTA1"]))
def test_random_bytes(tmp_path, content, magic):
    (tmp_path / "clip.wav").write_bytes(magic + content)
    read_or_refused(tmp_path / "clip.wav")


@fuzzed
@given(st.floats(allow_nan=True, width=32), st.integers(0, 9_599), st.sampled_from([8_000, 11_025, 16_000, 48_000]),
       st.integers(1, 3))
def test_odd_samples_rates_and_channels(voice, tmp_path, value, at, rate_hz, channels):
    audio = np.stack([voice(0.6, 1)] * channels, 1)
    audio[at] = value
    soundfile.write(tmp_path / "clip.wav", audio, rate_hz, "FLOAT")
    read_or_refused(tmp_path / "clip.wav") if rate_hz < 16_000 or np.isfinite(value) else None
    with pytest.raises(AudioError) if not np.abs(value) <= 1_000 else warnings.catch_warnings():
        read_audio(tmp_path / "clip.wav", min_seconds=0.1)


@fuzzed
@given(damage)
def test_judging_never_raises_for_what_is_in_the_file(tiny_detector, sounds, tmp_path, changes):
    (tmp_path / "clip.wav").write_bytes(damaged(sounds["WAV FLOAT"], changes))
    one = judged(tiny_detector, tmp_path / "clip.wav")
    assert one.verdict == UNKNOWN and one.why  # 0.6 s are too short for a verdict, damaged or not


def load_or_refused(folder):
    try:
        detector = Detector.load(folder)
    except DetectorError as error:
        assert str(folder) in str(error)
        return
    assert all(np.isfinite(value.numpy()).all() for value in detector.student.state_dict().values())


@fuzzed
@given(damage, st.booleans())
def test_damaged_weights(saved_detector, tmp_path, changes, hash_agrees):
    folder = shutil.copytree(saved_detector, tmp_path / "detector", dirs_exist_ok=True)
    path = folder / "detector.safetensors"
    path.write_bytes(damaged(path.read_bytes(), changes))
    if hash_agrees:
        sheet = json.loads((folder / "detector.json").read_text())
        (folder / "detector.json").write_text(json.dumps(sheet | {"sha256": file_digest(path)}))
    load_or_refused(folder)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 10**12) | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=5)


@fuzzed
@given(st.data(), values)
def test_damaged_sheets(saved_detector, tmp_path, data, value):
    folder = shutil.copytree(saved_detector, tmp_path / "detector", dirs_exist_ok=True)
    sheet = json.loads((folder / "detector.json").read_text())
    place = sheet
    while isinstance(place, dict):
        parent, key = place, data.draw(st.sampled_from(sorted(place)))
        place = parent[key] if data.draw(st.booleans()) else None
    parent[key] = value
    (folder / "detector.json").write_text(json.dumps(sheet))
    load_or_refused(folder)


@fuzzed
@given(st.text(max_size=40))
def test_any_text_as_options(text):
    try:
        load_settings("smoke", 0, text)
    except SettingsError as error:
        assert str(error)


WORDS = [
    "score",
    "report",
    "calibrate",
    "evaluate",
    "data",
    "study",
    "train",
    "verify",
    "--json",
    "--csv",
    "--html",
    "--out",
    "--folder",
    "--alpha",
    "--jobs",
    "--channel",
    "--manifest",
    "--root",
    "--form",
    "--detector",
    "--set",
    "--preset",
    "--only",
    "--from",
    "--plan",
    "--force",
    "--list",
    "--part",
    "--name",
    "a.wav",
    "o.json",
    ".",
    "..",
    "",
    "0",
    "-1",
    "0.1",
    "seed=1",
    "seed=1,seed=2",
    "-voice.wav",
    "--help",
    "ü",
    "a\nb",
    "\udcff",
    "/proc/x",
    "data.train=vctk:/none",
]


@fuzzed
@given(st.lists(st.sampled_from(WORDS) | st.text(max_size=9), max_size=9))
def test_any_words_as_a_command(words):
    """Arguments are understood or refused in one line; nothing is written to find out."""
    before = set(Path().iterdir())
    try:
        chosen = parser().checked(words)
        assert chosen.command in COMMANDS
    except UsageError as error:
        assert str(error)
    except SystemExit as end:
        assert end.code == 0 and "--help" in words or "-h" in words
    assert set(Path().iterdir()) == before
