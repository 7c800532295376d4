"""Owns the baselines that no gradient trains: trivial numbers, LFCC mixtures, what a frozen teacher sees.

Clips are (audio (samples,) at 16 kHz, active (20 ms frames,) bool) as `apply_channel` returns; pauses are left out.
Fitted clips score too well. Sizes are those of the cited papers, or what two cores afford.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from sklearn.covariance import LedoitWolf
from sklearn.mixture import GaussianMixture
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn import functional
from torchaudio import transforms
from torchaudio.functional import compute_deltas

from lib import seeds
from lib.data.channel import FRAME, traits
from lib.engine import side_by_side
from lib.model.checkpoints import sound
from lib.model.discrepancy import band_means
from lib.model.pyramid import folded
from lib.model.scaling import PROFILE_SCORES, Typicality
from lib.settings import RATE_HZ, Channel, Scoring

if TYPE_CHECKING:
    from lib.study import Study

Clip, Features = tuple[np.ndarray, np.ndarray], Callable[[np.ndarray], list[torch.Tensor]]
CHANNEL, SCORING = Channel(), Scoring()
BANDS, HOP = 64, 256  # bands of log_mel, samples between its frames
COEFFICIENTS = 60  # of lfcc: 20, their deltas and double deltas
MOST_KEPT = 2_000_000_000  # bytes of features of a teacher: each clip goes through it once for all baselines

NUMBERS = {"noise_floor_db": 0.1, "rolloff_hz": 10.0, "crest_db": 0.1, "leading_silence_s": 0.02, "duration_s": 0.02,
           "level_db": 0.1, "paused_share": 0.01, "tilt_db_per_octave": 0.05}
"""The trivial numbers, each with its resolution: the least deviation by which `TrivialNumbers` divides."""


def checked_clips(clips: Sequence[Clip], name: str = "clips") -> list[Clip]:
    """`clips` as float32 audio and bool activity; ValueError for none, bad samples or a mask that does not fit."""
    if not len(clips):
        raise ValueError(f"expected at least one clip in {name}, found none. Check the filter of the clip table.")
    result = []
    for index, (audio, active) in enumerate(clips):
        audio, active = np.asarray(audio, dtype=np.float32), np.asarray(active, dtype=bool)
        if audio.ndim != 1 or not np.isfinite(audio).all():
            raise ValueError(f"expected finite mono audio (samples,), found shape {audio.shape} with "
                             f"{np.sum(~np.isfinite(audio))} NaN or Inf in {name}[{index}]; use lib.data.audio.")
        if active.shape != (-(-len(audio) // FRAME),) or not active.any():
            raise ValueError(f"expected a flag for each {FRAME} samples and some active, found {active.sum()} of shape "
                             f"{active.shape} for {len(audio)} samples in {name}[{index}]; use apply_channel.")
        result.append((audio, active))
    return result


class Baseline:
    """A detector with `fit` and `anomaly`; equal seeds and threads give equal bits."""

    fitted = False

    def __init__(self, channel: Channel = CHANNEL) -> None:
        self.channel = channel

    def fit(self, clips: Sequence[Clip], seed: int = 0) -> Baseline:
        """Fit on bona fide clips."""
        self._fit(checked_clips(clips), seed)
        self.fitted = True
        return self

    def anomaly(self, clips: Sequence[Clip]) -> np.ndarray:
        """(clips,) float64, up = fake. ValueError before `fit` and for clips that `checked_clips` refuses."""
        if not self.fitted:
            raise ValueError(f"expected a fitted {type(self).__name__}, found a new one. Call fit(clips) first.")

        @torch.no_grad()  # holds for the thread that calls
        def scored(clip: Clip) -> float:
            return float(self._anomaly(*clip))

        return np.array(list(side_by_side(scored, checked_clips(clips))))


def trivial_numbers(audio: np.ndarray, active: np.ndarray, rate_hz: int = RATE_HZ) -> dict[str, float]:
    """The eight numbers of `NUMBERS` (`lib.data.channel.traits`) of audio (samples,) with the activity of its frames of
    320 samples, before or after the channel. Raises ValueError as `checked_clips`."""
    numbers = traits(*checked_clips([(audio, active)], "the audio")[0], rate_hz)
    return {name: numbers[name] for name in NUMBERS}


class TrivialNumbers(Baseline):
    """Root mean square z-score of the trivial numbers: how unlike the recordings, not the voice, a clip is."""

    def _fit(self, clips: list[Clip], seed: int) -> None:
        table = np.array([list(trivial_numbers(*clip).values()) for clip in clips])
        self.mean, self.deviation = table.mean(axis=0), np.maximum(table.std(axis=0), list(NUMBERS.values()))

    def _anomaly(self, audio: np.ndarray, active: np.ndarray) -> float:
        values = np.array(list(trivial_numbers(audio, active).values()))
        return np.sqrt(np.mean(((values - self.mean) / self.deviation) ** 2))


@functools.lru_cache(maxsize=8)
def _transform(name: str, channel: Channel) -> nn.Module:
    band = {"f_min": channel.low_hz, "f_max": channel.high_hz}
    if name == "mel":
        return transforms.MelSpectrogram(RATE_HZ, 1024, 512, HOP, n_mels=BANDS, power=1.0, mel_scale="slaney",
                                         pad_mode="constant", **band)
    return transforms.LFCC(RATE_HZ, n_filter=20, n_lfcc=20, log_lf=True, **band, speckwargs={
        "n_fft": 512, "win_length": 320, "hop_length": 160, "pad_mode": "constant"})


def log_mel(audio: torch.Tensor | np.ndarray, channel: Channel = CHANNEL) -> torch.Tensor:
    """Natural logarithm of mel magnitudes, (..., samples) -> (..., 64, frames): windows of 32 ms, a hop of 16 ms."""
    return torch.log(_transform("mel", channel)(torch.as_tensor(audio)) + 1e-4)


def lfcc(audio: torch.Tensor | np.ndarray, channel: Channel = CHANNEL) -> torch.Tensor:
    """20 linear-frequency cepstra, deltas, double deltas, (..., samples) -> (..., 60, frames): 20 ms, hop 10 ms."""
    static = _transform("lfcc", channel)(torch.as_tensor(audio))
    delta = compute_deltas(static, win_length=3)
    return torch.cat([static, delta, compute_deltas(delta, win_length=3)], dim=-2)


def activity_at(active: np.ndarray, frames: int) -> np.ndarray:
    """Activity of `frames` even steps from a clip's start to its end, (frames,) bool; all where none is active."""
    picked = active[np.linspace(0, len(active) - 1, frames).astype(int)]
    return picked if picked.any() else ~picked


class LfccGmm(Baseline):
    """Gaussian mixture of LFCC frames, anomaly = -mean log-likelihood; ASVspoof 2019's B02 without its spoof half."""

    def _frames(self, audio: np.ndarray, active: np.ndarray) -> np.ndarray:
        frames = lfcc(audio, self.channel).numpy().T
        return frames[activity_at(active, len(frames))]

    def _fit(self, clips: list[Clip], seed: int) -> None:
        frames = np.concatenate([self._frames(*clip) for clip in clips])
        frames = frames[seeds.stream(seed, "lfcc_gmm").permutation(len(frames))[:60_000]]
        self.scaler = StandardScaler().fit(frames)
        self.mixture = GaussianMixture(max(1, min(64, len(frames) // 40)), covariance_type="diag", reg_covar=1e-3,
                                       tol=1e-2, max_iter=60, random_state=seeds.integer(seed, "lfcc_gmm"))
        self.mixture.fit(self.scaler.transform(frames))

    def _anomaly(self, audio: np.ndarray, active: np.ndarray) -> float:
        return -self.mixture.score(self.scaler.transform(self._frames(audio, active)))


class TeacherBaseline(Baseline):
    """A baseline of what a frozen teacher sees; `features(audio)` is [(1, channel, frequency, frame) of each level]."""

    def __init__(self, features: Features, channel: Channel = CHANNEL) -> None:
        super().__init__(channel)
        self.features = torch.no_grad()(features)

    def _pyramid(self, audio: np.ndarray, active: np.ndarray) -> list[torch.Tensor]:
        """Active frames of every level, [(channel, frequency, active frame), ...]; each level has at least one."""
        return [level[0][..., activity_at(active, level.shape[-1])].float() for level in self.features(audio)]


class TeacherMahalanobis(TeacherBaseline):
    """A Gaussian of teacher features for every level and frequency row, shared by all frames (PaDiM-like).

    A random subset of at most 64 channels, Ledoit-Wolf covariance; anomaly = mean over levels and positions of the
    Mahalanobis distance divided by the square root of the number of channels (Defard et al. 2021 take the maximum)."""

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
    the 3 nearest patches: a vocoder is everywhere."""

    memory, pool, neighbours = 4000, 20_000, 3

    def _patches(self, audio: np.ndarray, active: np.ndarray) -> torch.Tensor:
        """(positions, channels of the levels used), of active frames."""
        pyramid = self.features(audio)
        levels = [functional.avg_pool2d(level.float(), 3, 1, 1, count_include_pad=False)
                  for level in pyramid[1:] or pyramid]
        size = levels[0].shape[2:]
        stacked = torch.cat([functional.interpolate(level, size, mode="bilinear") for level in levels], dim=1)[0]
        return stacked[..., activity_at(active, size[1])].flatten(1).T

    def _fit(self, clips: list[Clip], seed: int) -> None:
        rng, share, drawn = seeds.stream(seed, "teacher_knn"), -(-self.pool // len(clips)), []
        for patches in side_by_side(lambda clip: self._patches(*clip), clips):
            drawn.append(patches[rng.permutation(len(patches))[:share]])
        pool = torch.cat(drawn)
        self.deviation = pool.std(dim=0, correction=0).clamp(min=1e-6)
        projection = torch.from_numpy(rng.standard_normal((pool.shape[1], 32)) / 32**0.5).float()
        pool /= self.deviation
        self.bank = pool[k_centres(pool @ projection, self.memory, int(rng.integers(len(pool))))]

    def _anomaly(self, audio: np.ndarray, active: np.ndarray) -> torch.Tensor:
        patches = self._patches(audio, active) / self.deviation
        return torch.cdist(patches, self.bank).topk(self.neighbours, largest=False).values.mean()


def k_centres(points: torch.Tensor, count: int, first: int) -> torch.Tensor:
    """Indices (at most count,) of points (n, dimension), each the farthest from all before it; Gonzalez 1985."""
    chosen, distance = [first], (points - points[first]).square().sum(dim=1)
    while len(chosen) < min(count, len(points)):
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (points - points[chosen[-1]]).square().sum(dim=1))
    return torch.tensor(chosen)


class TeacherReadings(TeacherBaseline):
    """The study's readings without a student: mean over active frames of what a perturbation teacher reads in each
    level, kind and frequency band, pooled as `scoring` pools profiles (one-sided where it pools a map).

    What a detector with that scoring has above it is the student's. `features(audio)`: (1, kind, frequency, frame)."""

    def __init__(self, features: Features, scoring: Scoring = SCORING, channel: Channel = CHANNEL) -> None:
        super().__init__(features, channel)
        self.scoring = scoring

    def _profile(self, audio: np.ndarray, active: np.ndarray) -> np.ndarray:
        return band_means(self._pyramid(audio, active), self.scoring.bands).numpy()

    def _fit(self, clips: list[Clip], seed: int) -> None:
        self.model = Typicality.fit(np.stack(list(side_by_side(lambda clip: self._profile(*clip), clips))))

    def _anomaly(self, audio: np.ndarray, active: np.ndarray) -> float:
        pooling = self.scoring.pooling if self.scoring.pooling in PROFILE_SCORES else "one_sided"
        return float(self.model.score(pooling, self._profile(audio, active)[None])[0])


class TeacherProbability(TeacherBaseline):
    """The teacher's own probability of damage, neither student nor typicality: the mean over levels, kinds, rows and
    active frames of the sigmoid of its logits. `features(audio)` gives these, [(1, kind, frequency, frame)]."""

    def _fit(self, clips: list[Clip], seed: int) -> None:
        """Nothing to fit."""

    def _anomaly(self, audio: np.ndarray, active: np.ndarray) -> float:
        return float(torch.stack([logits.sigmoid().mean() for logits in self._pyramid(audio, active)]).mean())


def teacher_views(study: Study, experiment: str) -> dict[str, Features]:
    """What baselines are given of an experiment's teacher: its features and, where it was trained to name damage, the
    readings of its linear readers and the logits that it was trained with. Clips are known by their place in memory."""
    teacher = study.teacher(experiment)[0]
    fast, readers = folded(teacher), getattr(teacher, "readers", [])
    kept: dict[tuple[int, int], list[torch.Tensor]] = {}

    def features(audio: np.ndarray) -> list[torch.Tensor]:
        made = kept.get(place := (audio.ctypes.data, len(audio))) or fast(torch.from_numpy(audio)[None])
        if len(kept) * sum(level.nbytes for level in made) < MOST_KEPT:
            kept[place] = made
        return made

    def readings(audio: np.ndarray) -> list[torch.Tensor]:
        return [torch.einsum("kc,bcfn->bkfn", *pair) for pair in zip(readers, features(audio))]

    if not len(readers):
        return {"features": features}
    folder = study.checkpoint(experiment, student=False)
    state = sound(folder, json.loads((folder / "checkpoint.json").read_text())["files"]["best"])
    # A logit is the reading of features before they were standardised: what their means add is the same everywhere.
    offsets = [state[f"readers.{level}.weight"][:, :, 0, 0] @ getattr(teacher, f"mean{level}")[0, :, :, 0]
               + state[f"readers.{level}.bias"][:, None] for level in range(len(readers))]
    return {"features": features, "readings": readings, "logits": lambda audio: [
        read + offset[:, :, None] for read, offset in zip(readings(audio), offsets)]}
