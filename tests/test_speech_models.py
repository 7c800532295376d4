"""The self-supervised teachers, with small random models in the place of torchaudio's: their weights need a network."""

import numpy as np
import pytest
import torch
from torchaudio.models import wav2vec2_model

from lib.data.channel import apply_channel
from lib.detector import Detector
from lib.model import networks
from lib.model.networks import SpeechModelPyramid, new_student, new_teacher, why_unavailable
from lib.model.pyramid import Standardised, freeze
from lib.settings import SPEECH_MODELS, View, load_settings
from tests.conftest import RATE, toy_speech


@pytest.fixture(autouse=True)
def small_models(monkeypatch):
    def small(name, seed):
        torch.manual_seed(seed)
        layers = [(16, 10, 5)] + [(16, 3, 2)] * 4 + [(16, 2, 2)] * 2
        return wav2vec2_model(
            extractor_mode="group_norm", extractor_conv_layer_config=layers, extractor_conv_bias=False,
            encoder_embed_dim=16, encoder_projection_dropout=0.0, encoder_pos_conv_kernel=8, encoder_pos_conv_groups=2,
            encoder_num_layers=10, encoder_num_heads=2, encoder_attention_dropout=0.0, encoder_ff_interm_features=32,
            encoder_ff_interm_dropout=0.0, encoder_dropout=0.0, encoder_layer_norm_first=False, encoder_layer_drop=0.0,
            aux_num_out=None)

    monkeypatch.setattr(networks, "untrained_model", small)


def pyramid():
    return freeze(SpeechModelPyramid("wav2vec2", View(), pretrained=False))


def test_levels_have_one_row_and_every_fourth_frame():
    for samples, count in ((333 * 128, 84), (333 * 128 - 1, 84), (335 * 128, 84), (336 * 128, 85)):
        assert [tuple(level.shape) for level in pyramid()(torch.randn(2, samples))] == [(2, 16, 1, count)] * 3


def test_a_click_is_felt_where_it_is():
    quiet = 0.01 * torch.randn(1, 2 * RATE, generator=torch.Generator().manual_seed(0))
    for second in (0.5, 1.5):
        loud = quiet.clone()
        loud[0, round(second * RATE) : round(second * RATE) + 64] += 0.5
        first, other = (pyramid()(audio)[0][0, :, 0] for audio in (quiet, loud))
        place = int((first - other).norm(dim=0).argmax()) * 4 * View().hop_s
        assert abs(place - second) < 0.05


def test_torchaudios_models_are_taken_untrained_and_seeded(monkeypatch):
    monkeypatch.undo()
    made = [networks.untrained_model("wavlm", seed).state_dict() for seed in (0, 0, 1)]
    name = "encoder.transformer.layers.0.feed_forward.intermediate_dense.weight"
    assert torch.equal(made[0][name], made[1][name]) and not torch.equal(made[0][name], made[2][name])


def test_what_is_lacking_is_said(monkeypatch):
    def unreachable(url, **options):
        assert url.startswith("https://download.pytorch.org/")
        raise OSError("no network here")

    monkeypatch.setattr("torchaudio.pipelines._wav2vec2.utils.load_state_dict_from_url", unreachable)
    for name in SPEECH_MODELS:
        lack = why_unavailable(name)
        assert name in lack and "no network here" in lack and "run the same command again" in lack


def test_detector_round_trip(tmp_path):
    settings = load_settings("smoke", 0, {"network.teacher": "wavlm"})
    teacher = Standardised(freeze(new_teacher(settings, pretrained=False)))
    detector = Detector(settings, teacher, freeze(new_student(teacher, settings.with_options({"seed": 1}))))
    clips = [apply_channel(toy_speech(1.5, seed), settings.channel) for seed in range(6)]
    detector.fit_scaling(clips, [f"{index}" for index in range(6)])
    detector.fit_threshold(clips, [f"{index}" for index in range(6)])
    detector.save(tmp_path / "saved")
    again = Detector.load(tmp_path / "saved")
    assert np.isclose(again.score_prepared(*clips[0]), detector.score_prepared(*clips[0]), rtol=1e-5)
    assert again.explain_prepared(*clips[0]).map.shape[0] == settings.view.bins
