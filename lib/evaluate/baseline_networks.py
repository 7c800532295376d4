"""Owns the one-class baselines made of networks: an autoencoder, Deep SVDD, distances of teacher features, and
the teacher's own readings.

They run on the CPU; interface and data as in lib.evaluate.baselines. Also what a training by gradient needs: crops and the loop.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from sklearn.covariance import LedoitWolf
from torch import nn
from torch.nn import functional

from lib import seeds
from lib.data.channel import FRAME
from lib.engine import side_by_side
from lib.evaluate.baselines import BANDS, CHANNEL, HOP, Baseline, Clip, activity_at, log_mel
from lib.model.discrepancy import band_means
from lib.model.scaling import PROFILE_SCORES, Typicality
from lib.settings import RATE_HZ, Channel, Scoring

Features = Callable[[np.ndarray], list[torch.Tensor]]

SCORING = Scoring()


@contextlib.contextmanager
def seeded(seed: int, name: str) -> Iterator[np.random.Generator]:
    """A stream of its own for numpy (yielded) and for torch, whose global state is put back at the end."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.integer(seed, name))
        yield seeds.stream(seed, name)


def crops(clips: list[Clip], seconds: float, batch: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Random pieces of random clips: audio (batch, samples), activity of its 20 ms frames (batch, frames) as 0 or 1.

    Pieces start with a frame of the channel; a clip that is shorter is repeated.
    """
    audio, activity, count = [], [], round(seconds * RATE_HZ / FRAME)
    for index in rng.integers(len(clips), size=batch):
        samples, active = clips[index]
        found = max(1, len(samples) // FRAME)
        frame = (rng.integers(max(1, found - count + 1)) + np.arange(count)) % found
        audio.append(np.resize(samples, found * FRAME).reshape(found, FRAME)[frame].ravel())
        activity.append(active[frame])
    return torch.from_numpy(np.array(audio)), torch.from_numpy(np.array(activity, dtype=np.float32))


def active_mean(values: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    """Mean over the frames of values (batch, ..., frame), weighted by activity (batch, finer frame): (batch, ...)."""
    weights = functional.adaptive_avg_pool1d(active[:, None], values.shape[-1])[:, 0] + 1e-6
    weights = (weights / weights.sum(dim=1, keepdim=True)).reshape(len(values), *[1] * (values.ndim - 2), -1)
    return (values * weights).sum(dim=-1)


def train(network: nn.Module, loss: Callable[..., torch.Tensor], draw: Callable[[], tuple], steps: int) -> None:
    """Minimise loss(*draw()) for `steps` batches with AdamW under a one-cycle rate, then set eval mode."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    network.train()
    for _ in range(steps):
        optimiser.zero_grad()
        loss(*draw()).backward()
        optimiser.step()
        schedule.step()
    network.eval()


def tensors(audio: np.ndarray, active: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """One clip as a batch, as `crops` gives them."""
    return torch.from_numpy(audio)[None], torch.from_numpy(active).float()[None]


def _stage(channels_in: int, channels: int, biased: bool, up: bool = False) -> list[nn.Module]:
    kind = nn.ConvTranspose2d if up else nn.Conv2d
    return [kind(channels_in, channels, 4, 2, 1, bias=biased), nn.BatchNorm2d(channels, affine=biased), nn.LeakyReLU(0.1)]


class Autoencoder(Baseline):
    """Convolutional autoencoder of standardised log-mel bands, 1 number kept of 8; anomaly = mean squared error."""

    steps, batch, crop_s = 300, 16, 1.0

    def _fit(self, clips: list[Clip], seed: int) -> None:
        frames = torch.cat([log_mel(audio, self.channel) for audio, _ in clips], dim=1)
        self.mean, self.deviation = frames.mean(dim=1, keepdim=True), frames.std(dim=1, keepdim=True, correction=0) + 1e-3
        with seeded(seed, type(self).__name__) as rng:
            draw = functools.partial(crops, clips, self.crop_s, self.batch, rng)
            self.network = self._network()
            self._before_training(draw)
            train(self.network, lambda *batch: self._errors(*batch).mean(), draw, self.steps)

    def _network(self) -> nn.Module:
        down, up = [*_stage(1, 16, True), *_stage(16, 32, True)], [*_stage(8, 32, True, True), *_stage(32, 16, True, True)]
        return nn.Sequential(*down, nn.Conv2d(32, 8, 4, 2, 1), *up, nn.ConvTranspose2d(16, 1, 4, 2, 1))

    def _before_training(self, draw: Callable[[], tuple]) -> None:
        """Nothing here; Deep SVDD sets its centre."""

    def _images(self, audio: torch.Tensor) -> torch.Tensor:
        """(batch, samples) -> (batch, 1, band, frame), the last frame repeated up to a multiple of 8 frames."""
        images = ((log_mel(audio, self.channel) - self.mean) / self.deviation)[:, None]
        return functional.pad(images, (0, -images.shape[-1] % 8, 0, 0), mode="replicate")

    def _errors(self, audio: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        """Anomalies (batch,) of audio (batch, samples) with activity (batch, 20 ms frames)."""
        images = self._images(audio)
        errors = (self.network(images) - images)[:, 0].square().mean(dim=1)
        return active_mean(errors[:, : 1 + audio.shape[1] // HOP], active)

    def _anomaly(self, audio: np.ndarray, active: np.ndarray) -> torch.Tensor:
        return self._errors(*tensors(audio, active))


class DeepSvdd(Autoencoder):
    """Mean squared distance of an encoder's outputs, 32 numbers each 0.13 s, from the mean of its initial outputs.

    Ruff et al. 2018: without bias terms and with unbounded activations no constant output reaches the centre easily.
    """

    def _network(self) -> nn.Module:
        stages = [*_stage(1, 16, False), *_stage(16, 32, False), *_stage(32, 32, False)]
        return nn.Sequential(*stages, nn.Conv2d(32, 32, (BANDS // 8, 3), padding=(0, 1), bias=False))

    def _outputs(self, audio: torch.Tensor) -> torch.Tensor:
        return self.network(self._images(audio))[:, :, 0]  # (batch, 32, frame / 8)

    @torch.no_grad()
    def _before_training(self, draw: Callable[[], tuple]) -> None:
        outputs = [active_mean(self._outputs(audio), active) for audio, active in (draw() for _ in range(20))]
        centre = torch.cat(outputs).mean(dim=0)
        self.centre = torch.where(centre < 0, centre.clamp(max=-0.1), centre.clamp(min=0.1))[:, None]  # 0 is easy to reach

    def _errors(self, audio: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        return active_mean((self._outputs(audio) - self.centre).square().mean(dim=1), active)


class TeacherBaseline(Baseline):
    """A baseline of what a frozen teacher sees; `features(audio)` is its pyramid [(1, channel, frequency, frame), ...]."""

    def __init__(self, features: Features, channel: Channel = CHANNEL) -> None:
        super().__init__(channel)
        self.features = torch.no_grad()(features)

    def _pyramid(self, audio: np.ndarray, active: np.ndarray) -> list[torch.Tensor]:
        """Active frames of every level, [(channel, frequency, active frame), ...]; each level has at least one."""
        return [level[0][..., activity_at(active, level.shape[-1])].float() for level in self.features(audio)]


class TeacherMahalanobis(TeacherBaseline):
    """A Gaussian of teacher features for every level and frequency row, shared by all frames (PaDiM-like).

    A random subset of at most 64 channels, Ledoit-Wolf covariance; anomaly = mean over levels and positions of the
    Mahalanobis distance divided by the square root of the number of channels (Defard et al. 2021 take the maximum).
    """

    dimensions, frames = 64, 6000  # channels at most, active frames that the Gaussian of a row is fitted on

    def _fit(self, clips: list[Clip], seed: int) -> None:
        rng, share, samples = seeds.stream(seed, "teacher_mahalanobis"), -(-self.frames // len(clips)), []
        for pyramid in side_by_side(lambda clip: self._pyramid(*clip), clips):
            if not samples:
                self.channels = [np.sort(rng.permutation(len(level))[: self.dimensions]) for level in pyramid]
            samples.append([level[channels][..., rng.permutation(level.shape[2])[:share]]
                            for level, channels in zip(pyramid, self.channels)])
        self.gaussians = [self._gaussians(torch.cat(level, dim=2)) for level in zip(*samples)]

    @staticmethod
    def _gaussians(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(channel, frequency, frame) -> means (frequency, channel, 1), whitening (frequency, channel, channel)."""
        whitening = []
        for row in values.permute(1, 2, 0).double().numpy():
            covariance = LedoitWolf().fit(row).covariance_
            ridge = 1e-3 * np.trace(covariance) / len(covariance) + 1e-9  # channels that are never active stay harmless
            whitening.append(np.linalg.inv(np.linalg.cholesky(covariance + ridge * np.eye(len(covariance)))))
        return values.mean(dim=2).T[..., None], torch.from_numpy(np.array(whitening)).float()

    def _anomaly(self, audio: np.ndarray, active: np.ndarray) -> torch.Tensor:
        distances = []
        for level, channels, (mean, whitening) in zip(self._pyramid(audio, active), self.channels, self.gaussians):
            distances.append((whitening @ (level[channels].transpose(0, 1) - mean)).square().mean(dim=1).sqrt().mean())
        return torch.stack(distances).mean()


class TeacherKnn(TeacherBaseline):
    """Distance to a memory of bona fide patches (PatchCore-like, Roth et al. 2022).

    A patch is a position of the second level: 3 x 3 means of levels 2 and above, each channel over its deviation. The
    memory is a greedy k-centre subset of 20,000 random patches. Anomaly = mean over positions of the mean distance to
    the 3 nearest patches: a vocoder is everywhere. `pooling` "quantile" takes the 99 % quantile of positions instead.
    """

    memory, pool, neighbours = 4000, 20_000, 3

    def __init__(self, features: Features, channel: Channel = CHANNEL, pooling: str = "mean") -> None:
        super().__init__(features, channel)
        if pooling not in ("mean", "quantile"):
            raise ValueError(f"expected pooling mean or quantile, found {pooling!r}.")
        self.pooling = pooling

    def _patches(self, audio: np.ndarray, active: np.ndarray) -> torch.Tensor:
        """(positions, channels of the levels used), of active frames."""
        pyramid = self.features(audio)
        levels = [functional.avg_pool2d(level.float(), 3, 1, 1, count_include_pad=False) for level in pyramid[1:] or pyramid]
        size = levels[0].shape[2:]
        stacked = torch.cat([functional.interpolate(level, size, mode="bilinear") for level in levels], dim=1)[0]
        return stacked[..., activity_at(active, size[1])].flatten(1).T

    def _fit(self, clips: list[Clip], seed: int) -> None:
        rng, share = seeds.stream(seed, "teacher_knn"), -(-self.pool // len(clips))
        pool = torch.cat([found[rng.permutation(len(found))[:share]]
                          for found in side_by_side(lambda clip: self._patches(*clip), clips)])
        self.deviation = pool.std(dim=0, correction=0).clamp(min=1e-6)
        projection = torch.from_numpy(rng.standard_normal((pool.shape[1], 32)) / 32**0.5).float()
        pool /= self.deviation
        self.bank = pool[k_centres(pool @ projection, self.memory, int(rng.integers(len(pool))))]

    def _anomaly(self, audio: np.ndarray, active: np.ndarray) -> torch.Tensor:
        patches = self._patches(audio, active) / self.deviation
        nearest = torch.cdist(patches, self.bank).topk(self.neighbours, largest=False).values.mean(dim=1)
        return nearest.mean() if self.pooling == "mean" else nearest.quantile(0.99)


class TeacherReadings(TeacherBaseline):
    """A read score without a student: mean over active frames of what a perturbation teacher reads in each level, kind and
    frequency band, pooled as `scoring` pools the profile of the residual's readings (one-sided where it pools a map). What a
    detector with that scoring has above it is the student's. `features(audio)` gives readings (1, kind, frequency, frame)."""

    def __init__(self, features: Features, scoring: Scoring = SCORING, channel: Channel = CHANNEL) -> None:
        super().__init__(features, channel)
        self.bands, self.pooling = scoring.bands, scoring.pooling if scoring.pooling in PROFILE_SCORES else "one_sided"

    def _profile(self, audio: np.ndarray, active: np.ndarray) -> np.ndarray:
        return band_means(self._pyramid(audio, active), self.bands).numpy()

    def _fit(self, clips: list[Clip], seed: int) -> None:
        self.model = Typicality.fit(np.stack(list(side_by_side(lambda clip: self._profile(*clip), clips))))

    def _anomaly(self, audio: np.ndarray, active: np.ndarray) -> float:
        return float(self.model.score(self.pooling, self._profile(audio, active)[None])[0])


def k_centres(points: torch.Tensor, count: int, first: int) -> torch.Tensor:
    """Indices (at most count,) of points (n, dimension), each the farthest from all before it; Gonzalez 1985."""
    chosen, distance = [first], (points - points[first]).square().sum(dim=1)
    while len(chosen) < min(count, len(points)):
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (points - points[chosen[-1]]).square().sum(dim=1))
    return torch.tensor(chosen)
