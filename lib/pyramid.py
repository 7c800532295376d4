"""Owns the networks: teachers and students that turn a view of speech into a pyramid of features."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from lib import seeds


class Block(nn.Module):
    """Basic residual block (He et al. 2016): two 3 x 3 convolutions and a shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        return functional.relu(self.bn2(self.conv2(x)) + shortcut, inplace=True)


class ResNetPyramid(nn.Module):
    """The first residual stages of ResNet-18 at a chosen width, for one input channel.

    (batch, 1, frequency, frame) -> list over levels l = 1..L of (batch, width * 2**(l-1), frequency / 2**(l+1),
    frame / 2**(l+1)), sizes rounded up. Width 64 and three levels are the published choice (Wang et al. 2021).
    Where `heads` is given, each level ends in a 1 x 1 convolution to that many channels, so that a narrow student can
    be compared with a wide teacher. Module names are torchvision's, so that its weights load.
    """

    def __init__(self, width: int = 64, levels: int = 3, heads: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.width, self.levels = width, levels
        self.conv1 = nn.Conv2d(1, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        for level in range(levels):
            wanted = width * 2**level
            setattr(self, f"layer{level + 1}", nn.Sequential(Block(channels, wanted, 1 + (level > 0)), Block(wanted, wanted, 1)))
            channels = wanted
        self.heads = nn.ModuleList(nn.Conv2d(width * 2**level, head, 1) for level, head in enumerate(heads))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = functional.max_pool2d(functional.relu(self.bn1(self.conv1(x)), inplace=True), 3, 2, 1)
        pyramid = []
        for level in range(self.levels):
            x = getattr(self, f"layer{level + 1}")(x)
            pyramid.append(self.heads[level](x) if len(self.heads) else x)
        return pyramid

    @property
    def channels(self) -> tuple[int, ...]:
        return tuple(self.width * 2**level for level in range(self.levels))


def random_teacher(width: int, levels: int, seed: int) -> ResNetPyramid:
    """A teacher with seeded He-normal weights; its batch norms still have to meet bona fide speech (`settle`)."""
    generator = torch.Generator().manual_seed(seeds.integer(seed, "teacher", width, levels))
    network = ResNetPyramid(width, levels)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            module.weight.data = torch.randn(module.weight.shape, generator=generator) * (2 / fan_out) ** 0.5
    return network


@torch.no_grad()
def settle(network: nn.Module, batches: list[torch.Tensor]) -> nn.Module:
    """Set the batch-norm statistics to those of bona fide training images, then freeze the network in eval mode."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # cumulative average: independent of the order of the batches
    network.train()
    for batch in batches:
        network(batch)
    return freeze(network)


def freeze(network: nn.Module) -> nn.Module:
    network.eval()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return network


def make_student(teacher_channels: tuple[int, ...], width: int, levels: int, seed: int) -> ResNetPyramid:
    """A student with random weights; of the teacher's own widths (the paper), or narrower with 1 x 1 heads."""
    torch.manual_seed(seeds.integer(seed, "student"))
    same = tuple(width * 2**level for level in range(levels)) == tuple(teacher_channels)
    return ResNetPyramid(width, levels, () if same else tuple(teacher_channels))
