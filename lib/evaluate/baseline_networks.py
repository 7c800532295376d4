"""Owns the baselines that a gradient trains (Deep SVDD, classifiers), the list of all baselines, and their scores."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional

from lib import seeds
from lib.data.channel import FRAME, channel_noise
from lib.data.scorefiles import load_scores, save_scores, score_frame
from lib.evaluate import baselines
from lib.evaluate.baselines import BANDS, CHANNEL, COEFFICIENTS, Baseline, Clip, checked_clips, lfcc, log_mel
from lib.model.images import FrontEnd, image
from lib.model.perturbations import perturbed
from lib.model.pyramid import ResNetPyramid
from lib.model.training import learning_rate
from lib.paths import clocked, digest_of
from lib.settings import RATE_HZ, Channel, View

if TYPE_CHECKING:
    from lib.study import Study

VIEW = View()
PEAK_RATE = 2e-3  # of the one-cycle schedule
HALF = 8  # clips of each class in a batch of a classifier


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
        frames = max(1, len(samples) // FRAME)
        frame = (rng.integers(max(1, frames - count + 1)) + np.arange(count)) % frames
        audio.append(np.resize(samples, frames * FRAME).reshape(frames, FRAME)[frame].ravel())
        activity.append(active[frame])
    return torch.from_numpy(np.array(audio)), torch.from_numpy(np.array(activity, dtype=np.float32))


def active_mean(values: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    """Mean over the frames of values (batch, ..., frame), weighted by activity (batch, finer frame): (batch, ...)."""
    weights = functional.adaptive_avg_pool1d(active[:, None], values.shape[-1])[:, 0] + 1e-6
    weights = (weights / weights.sum(dim=1, keepdim=True)).reshape(len(values), *[1] * (values.ndim - 2), -1)
    return (values * weights).sum(dim=-1)


def train(network: nn.Module, loss: Callable[..., torch.Tensor], draw: Callable[[], tuple], steps: int) -> None:
    """Minimise loss(*draw()) for `steps` batches with AdamW under the study's own schedule, then set eval mode."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=PEAK_RATE, weight_decay=1e-4)
    network.train()
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = learning_rate(step, steps, PEAK_RATE)
        optimiser.zero_grad()
        loss(*draw()).backward()
        optimiser.step()
    network.eval()


def tensors(audio: np.ndarray, active: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """One clip as a batch, as `crops` gives them."""
    return torch.from_numpy(audio)[None], torch.from_numpy(active).float()[None]


class DeepSvdd(Baseline):
    """Mean squared distance of an encoder's outputs, 32 numbers each 0.13 s, from the mean of its initial outputs.

    Ruff et al. 2018, on standardised log-mel bands: without bias terms and with unbounded activations no constant
    output reaches the centre easily."""

    steps, batch, crop_s = 300, 16, 1.0

    def _fit(self, clips: list[Clip], seed: int) -> None:
        frames = torch.cat([log_mel(audio, self.channel) for audio, _ in clips], dim=1)
        self.mean = frames.mean(dim=1, keepdim=True)
        self.deviation = frames.std(dim=1, keepdim=True, correction=0) + 1e-3
        with seeded(seed, type(self).__name__) as rng:
            draw = functools.partial(crops, clips, self.crop_s, self.batch, rng)
            stages = []
            for channels_in, channels in ((1, 16), (16, 32), (32, 32)):
                convolution = nn.Conv2d(channels_in, channels, 4, 2, 1, bias=False)
                stages += [convolution, nn.BatchNorm2d(channels, affine=False), nn.LeakyReLU(0.1)]
            self.network = nn.Sequential(*stages, nn.Conv2d(32, 32, (BANDS // 8, 3), padding=(0, 1), bias=False))
            with torch.no_grad():
                outputs = [active_mean(self._outputs(audio), active) for audio, active in (draw() for _ in range(20))]
            centre = torch.cat(outputs).mean(dim=0)
            # 0 is easy to reach.
            self.centre = torch.where(centre < 0, centre.clamp(max=-0.1), centre.clamp(min=0.1))[:, None]
            train(self.network, lambda *batch: self._errors(*batch).mean(), draw, self.steps)

    def _outputs(self, audio: torch.Tensor) -> torch.Tensor:
        """(batch, samples) -> (batch, 32, frame / 8); the last frame is repeated up to a multiple of 8 frames."""
        images = ((log_mel(audio, self.channel) - self.mean) / self.deviation)[:, None]
        return self.network(functional.pad(images, (0, -images.shape[-1] % 8, 0, 0), mode="replicate"))[:, :, 0]

    def _errors(self, audio: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        """Anomalies (batch,) of audio (batch, samples) with activity (batch, 20 ms frames)."""
        return active_mean((self._outputs(audio) - self.centre).square().mean(dim=1), active)

    def _anomaly(self, audio: np.ndarray, active: np.ndarray) -> torch.Tensor:
        return self._errors(*tensors(audio, active))


class Classifier(nn.Module):
    """Mean over frequency and active frames of a body's features, then one logit, up = fake."""

    def __init__(self, body: nn.Module, channels: int) -> None:
        super().__init__()
        self.body, self.linear = body, nn.Linear(channels, 1)

    def forward(self, images: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        """(batch, 1, frequency, frame) and their activity (batch, frame) -> logits (batch,)."""
        features = self.body(None, images) if isinstance(self.body, ResNetPyramid) else self.body(images)
        features = features[-1] if isinstance(features, list) else features
        return self.linear(active_mean(features.mean(dim=2), active))[:, 0]


class Supervised(Baseline):
    """Binary cross-entropy on random crops in balanced batches; anomaly = logit of the whole clip.

    It has seen spoof clips: compare it with one-class detectors on generators alone that were kept from `fit`."""

    steps, crop_s = 250, 1.25

    def fit(self, bonafide: Sequence[Clip], spoof: Sequence[Clip], seed: int = 0) -> Supervised:
        """Fit on training clips of both classes; every generator among them counts as seen from then on."""
        sides = checked_clips(bonafide, "bonafide"), checked_clips(spoof, "spoof")
        labels = torch.arange(2.0).repeat_interleave(HALF)

        def draw(rng: np.random.Generator) -> tuple[torch.Tensor, ...]:
            pairs = [crops(side, self.crop_s, HALF, rng) for side in sides]
            return *(torch.cat(both) for both in zip(*pairs)), labels

        return self._trained(draw, seed)

    def _trained(self, draw: Callable[[np.random.Generator], tuple[torch.Tensor, ...]], seed: int) -> Supervised:
        def loss(audio: torch.Tensor, active: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return functional.binary_cross_entropy_with_logits(self._logits(audio, active), labels)

        with seeded(seed, type(self).__name__) as rng:
            self.network = self._network()
            train(self.network, loss, lambda: draw(rng), self.steps)
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
        body = ResNetPyramid(FrontEnd(self.view, self.channel), 16, 3)
        return Classifier(body, body.channels[-1])

    def _images(self, audio: torch.Tensor) -> torch.Tensor:
        return image(audio, self.view, self.channel)


class PerturbedResNet(SupervisedResNet):
    """The same network taught to tell real from perturbed real speech: pseudo-fakes, made as the study's teacher's.

    Half of each batch is perturbed (a quarter of it stays as it is, and is labelled so). All crops get fresh channel
    noise behind the perturbation, as the channel adds it behind a vocoder."""

    def fit(self, clips: Sequence[Clip], seed: int = 0) -> PerturbedResNet:
        """Fit on bona fide clips alone."""
        clips = checked_clips(clips)

        def draw(rng: np.random.Generator) -> tuple[torch.Tensor, ...]:
            audio, active = crops(clips, self.crop_s, 2 * HALF, rng)
            damaged, damage = perturbed(audio[HALF:], rng)
            noise = torch.from_numpy(channel_noise(tuple(audio.shape), self.channel, rng))
            labels = torch.cat([torch.zeros(HALF), damage.kinds.amax(dim=1)])
            return torch.cat([audio[:HALF], damaged]) + noise, active, labels

        return self._trained(draw, seed)


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


class Entry(NamedTuple):
    """A baseline of the list: `factory()` makes a new one, or `factory(view of the teacher)` where it needs one."""

    kind: str  # trivial; one-class (bona fide clips alone); ablation (of the study's own); pseudo-fake; supervised
    factory: type[Baseline]
    needs: str = ""  # what of the teacher it is given: features, readings or logits


BASELINES = {
    "Trivial numbers, z-score": Entry("trivial", baselines.TrivialNumbers),
    "LFCC, Gaussian mixture": Entry("one-class", baselines.LfccGmm),
    "Deep SVDD": Entry("one-class", DeepSvdd),
    "Teacher Gaussian (PaDiM)": Entry("one-class", baselines.TeacherMahalanobis, "features"),
    "Teacher neighbours (PatchCore)": Entry("one-class", baselines.TeacherKnn, "features"),
    "Teacher's readings, no student": Entry("ablation", baselines.TeacherReadings, "readings"),
    "Teacher's damage probability": Entry("ablation", baselines.TeacherProbability, "logits"),
    "ResNet on perturbed speech": Entry("pseudo-fake", PerturbedResNet),
    "Supervised ResNet": Entry("supervised", SupervisedResNet),
    "Supervised LCNN on LFCC": Entry("supervised", SupervisedLcnn),
}
"""Every baseline by the name that it has in tables, simplest first."""
MOST_S, STUDY_S = 6 * 3600, 3600
"""Seconds of training speech that baselines hear, all in memory (1.4 GB), and at `study`; of more, a random choice."""


def like_study(baseline: Baseline, study: Study) -> Baseline:
    """`baseline` with the study's channel, image and scoring, trained for as many steps as its students."""
    settings = study.settings
    options = {"steps": settings.training.student_steps, "channel": settings.channel, "view": settings.view,
               "scoring": settings.scoring}
    for name, value in options.items():
        if hasattr(baseline, name):
            setattr(baseline, name, value)
    return baseline


@clocked("training")
def baseline_scores(study: Study, experiment: str) -> pd.DataFrame:
    """Test clips scored by every baseline, as a score frame (lib.evaluate.results); cached.

    They are fitted on the bona fide training clips that the student hears, networks for as many steps as it; those on
    teacher features with this study's teacher; ablations on the clips behind the detector's own typicality. Supervised
    ones also see the development fakes, whose generators are in no test.
    """
    clips, train = study.test(experiment, only="test"), study.part(experiment, "train")
    train = train.iloc[seeds.stream(0, "baselines").permutation(len(train))]
    train = train[train.seconds.cumsum() <= (STUDY_S if study.settings.preset == "study" else MOST_S)].sort_index()
    fakes = study.clips[(study.clips[experiment] == "development") & (study.clips.label == "spoof")]
    parts = {"train": train, "scaling": study.part(experiment, "scaling"), "test": clips, "fakes": fakes}
    settings = study.settings
    key = digest_of([study.checkpoint(experiment, student=False).name, settings.seed, repr(settings.channel),
                     repr(settings.view), repr(settings.scoring), settings.training.student_steps, list(BASELINES),
                     *(part.sha256.tolist() for part in parts.values())])
    path = study.folder / "baselines" / f"{key}.csv.gz"
    if path.exists():
        return load_scores(path)
    # Baselines pass over their clips many times, so that they are held in memory.
    held = {name: list(study.prepared(part)) for name, part in parts.items()}
    views, frames = baselines.teacher_views(study, experiment), []
    for title, entry in BASELINES.items():
        if entry.needs and entry.needs not in views:
            print(f"no row, {title}: this teacher has no readers", flush=True)
            continue
        began, bonafide = time.time(), held["scaling" if entry.kind == "ablation" else "train"]
        baseline = like_study(entry.factory(*([views[entry.needs]] if entry.needs else [])), study)
        baseline.fit(bonafide, *([held["fakes"]] if entry.kind == "supervised" else []), seed=study.settings.seed)
        scored = clips.assign(anomaly=baseline.anomaly(held["test"]))
        print(f"baseline {title}: {time.time() - began:.0f} s", flush=True)
        frames.append(score_frame(scored, experiment, title, entry.kind, study.settings.seed, study.clips))
    return save_scores(pd.concat(frames, ignore_index=True), path)
