"""Owns the pyramid: residual networks that turn speech into features at several strides, and their standardisation."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lib import seeds
from lib.model.images import FrontEnd


class Block(nn.Module):
    """Basic residual block (He et al. 2016): two 3 x 3 convolutions and a shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample, self.stride = None, stride
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(nn.Conv2d(channels_in, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The shortcut's stride is a slice: the same numbers, and oneDNN can crash in the gradient of a strided 1 x 1
        # convolution in channels-last order.
        shortcut = x if self.downsample is None else self.downsample(x[:, :, :: self.stride, :: self.stride])
        x = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        return functional.relu(self.bn2(self.conv2(x)) + shortcut, inplace=True)


class ResNetPyramid(nn.Module):
    """The first residual stages of ResNet-18 at a chosen width, behind a front end.

    Audio (batch, samples) -> list over levels l = 1..L of (batch, width * 2**(l-1), frequency / 2**(l+1),
    frame / 2**(l+1)), sizes rounded up. Width 64 and three levels are the published choice (Wang et al. 2021).
    Where `heads` is given, each level ends in a 1 x 1 convolution to that many channels, so that a narrow student can
    be compared with a wide teacher. `stem` is the odd side of the first convolution. Module names are torchvision's,
    so that its weights load into a stem of 7.
    """

    def __init__(self, front: FrontEnd, width: int = 64, levels: int = 3, heads: tuple[int, ...] = (),
                 stem: int = 7) -> None:
        super().__init__()
        if stem % 2 == 0:
            raise ValueError(f"the side of the first convolution is odd, not {stem}: an even one would shift features")
        self.front, self.width, self.levels = front, width, levels
        self.conv1 = nn.Conv2d(front.planes, width, stem, 2, stem // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        for level in range(levels):
            wide = width * 2**level
            blocks = Block(channels, wide, 1 + (level > 0)), Block(wide, wide, 1)
            setattr(self, f"layer{level + 1}", nn.Sequential(*blocks))
            channels = wide
        self.heads = nn.ModuleList(nn.Conv2d(width * 2**level, head, 1) for level, head in enumerate(heads))

    def forward(self, audio: torch.Tensor, picture: torch.Tensor | None = None) -> list[torch.Tensor]:
        x = self.front(audio, picture).to(self.conv1.weight.dtype)
        x = functional.max_pool2d(functional.relu(self.bn1(self.conv1(x)), inplace=True), 3, 2, 1)
        pyramid = []
        for level in range(self.levels):
            x = getattr(self, f"layer{level + 1}")(x)
            pyramid.append(self.heads[level](x) if len(self.heads) else x)
        return pyramid

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each level as the network gives them out."""
        return tuple(head.out_channels for head in self.heads) or tuple(self.width * 2**i for i in range(self.levels))


class Standardised(nn.Module):
    """A teacher whose every feature channel has mean 0 and deviation 1 on bona fide training speech.

    Features behind a rectifier share one large common direction, and the cosine between teacher and student sees little
    else. Standardising them, as EfficientAD does (Batzner et al. 2024), lets every channel count. `readers` are the
    linear readers that a perturbation teacher was trained with, (kind, channel) at each level.
    """

    def __init__(self, pyramid: nn.Module, readers: list[torch.Tensor] = ()) -> None:
        super().__init__()
        self.pyramid = pyramid
        for index, count in enumerate(pyramid.channels):
            self.register_buffer(f"mean{index}", torch.zeros(1, count, 1, 1))
            self.register_buffer(f"deviation{index}", torch.ones(1, count, 1, 1))
        for index, reader in enumerate(readers):
            self.register_buffer(f"reader{index}", reader.detach().clone())

    @property
    def readers(self) -> list[torch.Tensor]:
        """The readers as they apply to the standardised features, (kind, channel) at each level; or none."""
        return [getattr(self, f"reader{index}") * getattr(self, f"deviation{index}")[:, :, 0, 0]
                for index in range(len(self.pyramid.channels)) if hasattr(self, f"reader{index}")]

    @torch.no_grad()
    def measure(self, batches: Iterable[torch.Tensor]) -> Standardised:
        """Take means and deviations from batches (batch, samples) of bona fide training speech."""
        pyramids = [self.pyramid(batch) for batch in batches]
        for index in range(len(self.pyramid.channels)):
            features = torch.cat([levels[index] for levels in pyramids])
            getattr(self, f"mean{index}").copy_(features.mean((0, 2, 3), keepdim=True))
            spread = features.std((0, 2, 3), keepdim=True)
            # A channel that is dead on real speech says nothing: it must not be blown up.
            getattr(self, f"deviation{index}").copy_(spread.clamp_min(0.05 * float(spread.mean()) + 1e-6))
        return freeze(self)

    def forward(self, audio: torch.Tensor, picture: torch.Tensor | None = None) -> list[torch.Tensor]:
        return [(features - getattr(self, f"mean{index}")) / getattr(self, f"deviation{index}")
                for index, features in enumerate(self.pyramid(audio, picture))]

    @property
    def channels(self) -> tuple[int, ...]:
        return self.pyramid.channels


def initialise(network: nn.Module, seed: int, *names: object) -> nn.Module:
    """Give every convolution He-normal weights and no bias from a seeded stream of its own."""
    generator = torch.Generator().manual_seed(seeds.integer(seed, *names))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            module.weight.data = torch.randn(module.weight.shape, generator=generator) * (2 / fan_out) ** 0.5
            if module.bias is not None:
                module.bias.data.zero_()
    return network


@torch.no_grad()
def settle(network: nn.Module, batches: Iterable[torch.Tensor]) -> nn.Module:
    """Set the batch-norm statistics to those of batches (batch, samples) of bona fide speech, then freeze the network.

    A teacher with random weights needs this: without it, its deeper levels die out or blow up.
    """
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # cumulative average: independent of the order of the batches
    network.train()
    for batch in batches:
        network(batch)
    return freeze(network)


def freeze(network: nn.Module) -> nn.Module:
    """The network in eval mode, its parameters without gradients; in place."""
    network.eval()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return network


PRECISIONS = ("fp32", "bf16")


def folded(network: nn.Module, precision: str = "fp32") -> nn.Module:
    """A copy for inference: batch norms folded into their convolutions, weights in channels-last order.

    The same function up to rounding (about 1e-6), about 1.5 times as fast on a CPU. In bf16, ResNet pyramids compute in
    bfloat16: rounding of about 1e-2, twice as fast again where the processor has instructions for it, else slower.
    """
    network = copy.deepcopy(network).eval()
    for module in list(network.modules()):
        if isinstance(module, ResNetPyramid):
            module.conv1, module.bn1 = fuse_conv_bn_eval(module.conv1, module.bn1), nn.Identity()
        if isinstance(module, Block):
            module.conv1, module.bn1 = fuse_conv_bn_eval(module.conv1, module.bn1), nn.Identity()
            module.conv2, module.bn2 = fuse_conv_bn_eval(module.conv2, module.bn2), nn.Identity()
            if module.downsample is not None:
                module.downsample = fuse_conv_bn_eval(*module.downsample)
    if precision == "bf16":
        for module in network.modules():
            if isinstance(module, ResNetPyramid):
                module.to(torch.bfloat16)
    return freeze(network).to(memory_format=torch.channels_last)
