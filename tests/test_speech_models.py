"""The self-supervised teachers, with small random models in the place of torchaudio's: their weights need a network."""

from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchaudio.models import wav2vec2_model

from lib.data.channel import apply_channel
from lib.detector import Detector
from lib.model import networks as speech_models
from lib.model.images import channel_slice, image
from lib.model.networks import SpeechModelPyramid, new_student, teacher_lack, token_teacher
from lib.model.pyramid import Standardised, freeze
from lib.settings import SPEECH_MODELS, Channel, View, load_settings
from tests.conftest import RATE, toy_speech

VIEW = View(channels=("level", "wave"))


@pytest.fixture(autouse=True)
def small_models(monkeypatch):
    def small(name):
        torch.manual_seed(0)
        layers = [(16, 10, 5)] + [(16, 3, 2)] * 4 + [(16, 2, 2)] * 2
        return wav2vec2_model(
            extractor_mode="group_norm", extractor_conv_layer_config=layers, extractor_conv_bias=False, encoder_embed_dim=16,
            encoder_projection_dropout=0.0, encoder_pos_conv_kernel=8, encoder_pos_conv_groups=2, encoder_num_layers=10,
            encoder_num_heads=2, encoder_attention_dropout=0.0, encoder_ff_interm_features=32, encoder_ff_interm_dropout=0.0,
            encoder_dropout=0.0, encoder_layer_norm_first=False, encoder_layer_drop=0.0, aux_num_out=None)

    monkeypatch.setattr(speech_models, "untrained_model", small)


def pyramid():
    return freeze(SpeechModelPyramid("wav2vec2", VIEW, pretrained=False))


def test_the_wave_is_the_recording():
    audio = torch.from_numpy(toy_speech(1.3, 0))[None, : RATE + 77]
    picture = image(audio, VIEW, Channel())
    wave = picture[:, channel_slice(VIEW, ("wave",))[0], :128].transpose(1, 2).flatten(1)
    assert torch.equal(wave[:, : audio.shape[1]], audio) and not wave[:, audio.shape[1] :].any()
    assert torch.equal(picture[:, :1], image(audio, View(channels=("level",)), Channel()))


def test_levels_have_one_row_and_the_frames_of_a_resnet():
    levels = pyramid()(torch.randn(2, 2, 192, 333))
    assert [tuple(level.shape) for level in levels] == [(2, 16, 1, 84), (2, 16, 1, 42), (2, 16, 1, 21)]


def test_a_click_is_felt_where_it_is():
    quiet = 0.01 * torch.randn(1, 2 * RATE, generator=torch.Generator().manual_seed(0))
    for second in (0.5, 1.5):
        loud = quiet.clone()
        loud[0, round(second * RATE) : round(second * RATE) + 64] += 0.5
        first, other = (pyramid()(image(audio, VIEW, Channel()))[0][0, :, 0] for audio in (quiet, loud))
        place = int((first - other).norm(dim=0).argmax()) * 4 * VIEW.hop_s
        assert abs(place - second) < 0.05


def test_what_is_lacking_is_said(monkeypatch):
    with pytest.raises(ValueError, match=r'needs the image channel "wave": view.channels=level\+wave'):
        SpeechModelPyramid("hubert", View(channels=("level",)), pretrained=False)
    with pytest.raises(ValueError, match="needs a row for each of the 128 samples of a hop, found 96"):
        image(torch.zeros(1, RATE), View(channels=("wave",), bins=96), Channel())

    def unreachable(url, **options):
        assert url.startswith("https://download.pytorch.org/")
        raise URLError("no network here")

    monkeypatch.setattr("torchaudio.pipelines._wav2vec2.utils.load_state_dict_from_url", unreachable)
    for name in SPEECH_MODELS:
        lack = teacher_lack(name)
        assert name in lack and "no network here" in lack and "run the same command again" in lack


def test_detector_round_trip(tmp_path):
    settings = load_settings("smoke", 0, {"network.teacher": "wavlm", "view.channels": "level+wave"})
    teacher = Standardised(freeze(token_teacher(settings, pretrained=False)))
    detector = Detector(settings, teacher, freeze(new_student(teacher, settings)))
    clips = [apply_channel(toy_speech(1.5, seed), settings.channel) for seed in range(6)]
    detector.fit_scaling(clips, [f"{index}" for index in range(6)])
    detector.fit_threshold(clips, [f"{index}" for index in range(6)])
    detector.save(tmp_path / "saved")
    again = Detector.load(tmp_path / "saved")
    assert np.isclose(again.score_prepared(*clips[0]), detector.score_prepared(*clips[0]), rtol=1e-5)
    assert again.explain_prepared(*clips[0]).map.shape[0] == settings.view.bins
