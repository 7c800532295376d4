"""Owns the supervised baselines: they see spoof clips in training, so they bound what labels would buy.

Not comparable with one-class detectors unless the generators they are tested on were kept from `fit`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from lib.data.channel import FRAME
from lib.evaluate.baseline_networks import active_mean, crops, seeded, tensors, train
from lib.evaluate.baselines import CHANNEL, COEFFICIENTS, Baseline, Clip, checked_clips, lfcc
from lib.model.images import channel_count, image
from lib.model.pyramid import ResNetPyramid
from lib.settings import Channel, View

VIEW = View()
HALF = 8  # clips of each class in a batch


class Classifier(nn.Module):
    """Mean over frequency and active frames of a body's features, then one logit, up = fake."""

    def __init__(self, body: nn.Module, channels: int) -> None:
        super().__init__()
        self.body, self.linear = body, nn.Linear(channels, 1)

    def forward(self, images: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        """(batch, 1, frequency, frame) and their activity (batch, frame) -> logits (batch,)."""
        features = self.body(images)
        features = features[-1] if isinstance(features, list) else features
        return self.linear(active_mean(features.mean(dim=2), active))[:, 0]


class Supervised(Baseline):
    """Binary cross-entropy on random crops of 1.25 s in balanced batches; anomaly = logit of the whole clip."""

    steps, crop_s = 250, 1.25

    def fit(self, bonafide: Sequence[Clip], spoof: Sequence[Clip], seed: int = 0) -> Supervised:
        """Fit on training clips of both classes; every generator among them counts as seen from then on."""
        sides = checked_clips(bonafide, "bonafide"), checked_clips(spoof, "spoof")
        labels = torch.arange(2.0).repeat_interleave(HALF)
        with seeded(seed, type(self).__name__) as rng:
            self.network = self._network()
            train(self.network,
                  lambda audio, active: functional.binary_cross_entropy_with_logits(self._logits(audio, active), labels),
                  lambda: map(torch.cat, zip(*(crops(side, self.crop_s, HALF, rng) for side in sides))), self.steps)
        self.fitted = True
        return self

    def _logits(self, audio: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        return self.network(self._images(audio), active)

    def _anomaly(self, audio: np.ndarray, active: np.ndarray) -> torch.Tensor:
        return self._logits(*tensors(audio, active))


class SupervisedResNet(Supervised):
    """The study's own image and kind of network (ResNet pyramid, width 16, three levels), given labels."""

    def __init__(self, channel: Channel = CHANNEL, view: View = VIEW) -> None:
        super().__init__(channel)
        self.view = view

    def _network(self) -> nn.Module:
        body = ResNetPyramid(channel_count(self.view.channels), 16, 3)
        return Classifier(body, body.channels[-1])

    def _images(self, audio: torch.Tensor) -> torch.Tensor:
        return image(audio, self.view, self.channel)

    def saliency(self, audio: np.ndarray, active: np.ndarray | None = None) -> np.ndarray:
        """|d logit / d image| on the view's axes, (frequency, frame) float32, the largest of the image's channels.

        Simonyan et al. 2014: a map to hold ours against. Without `active` every frame counts. ValueError before `fit`
        or as `checked_clips`.
        """
        if not self.fitted:
            raise ValueError("expected a fitted SupervisedResNet, found a new one. Call fit(bonafide, spoof) first.")
        active = np.ones(-(-len(audio) // FRAME), dtype=bool) if active is None else active
        samples, flags = tensors(*checked_clips([(audio, active)], "the audio")[0])
        images = self._images(samples).requires_grad_()
        gradient, = torch.autograd.grad(self.network(images, flags).sum(), images)
        return gradient[0].abs().amax(dim=0).numpy()


class MaxFeatureMap(nn.Module):
    """The larger of the two halves of the channels at each position."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return torch.maximum(*values.chunk(2, dim=1))


class SupervisedLcnn(Supervised):
    """Light CNN with max-feature-map units on LFCC, a short form of Lavrentyeva et al. 2019."""

    def _network(self) -> nn.Module:
        layers = []
        for channels_in, channels, size in ((1, 16, 5), (16, 24, 3), (24, 32, 3)):
            layers += [nn.Conv2d(channels_in, 2 * channels, size, padding=size // 2), MaxFeatureMap(), nn.MaxPool2d(2),
                       nn.Conv2d(channels, 2 * channels, 1), MaxFeatureMap(), nn.BatchNorm2d(channels)]
        rows = nn.BatchNorm1d(COEFFICIENTS, affine=False)  # standardises each coefficient
        return Classifier(nn.Sequential(nn.Flatten(1, 2), rows, nn.Unflatten(1, (1, COEFFICIENTS)), *layers), 32)

    def _images(self, audio: torch.Tensor) -> torch.Tensor:
        return lfcc(audio, self.channel)[:, None]
