"""Owns what the study is compared with: trivial numbers, and detectors fitted on bona fide speech alone.

Data everywhere: a list of clips (audio (samples,) at 16 kHz, active (20 ms frames,) bool) as `apply_channel` returns.
`fit(clips, seed)` takes bona fide clips only; `anomaly(clips)` is (clips,), up = fake; pauses are left out of both.
Fitted clips score too well (a memory of patches knows them): thresholds need bona fide clips that no fit has seen.
Nothing here was chosen by looking at spoof scores: sizes are those of the cited papers, or what two CPU cores afford.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from sklearn.covariance import LedoitWolf
from sklearn.mixture import GaussianMixture
from sklearn.preprocessing import StandardScaler
from sklearn.svm import OneClassSVM
from torch import nn
from torchaudio import transforms
from torchaudio.functional import compute_deltas

from lib import seeds
from lib.data.channel import FRAME, traits
from lib.engine import side_by_side
from lib.settings import RATE_HZ, Channel

Clip = tuple[np.ndarray, np.ndarray]
CHANNEL = Channel()
BANDS, HOP = 64, 256  # bands of log_mel, samples between its frames
COEFFICIENTS = 60  # of lfcc: 20, their deltas and double deltas

NUMBERS = {"noise_floor_db": 0.1, "rolloff_hz": 10.0, "crest_db": 0.1, "leading_silence_s": 0.02, "duration_s": 0.02,
           "level_db": 0.1, "paused_share": 0.01, "tilt_db_per_octave": 0.05}
"""The trivial numbers, each with its resolution: the least deviation by which `TrivialNumbers` divides."""


def checked_clips(clips: Sequence[Clip], name: str = "clips") -> list[Clip]:
    """`clips` as float32 audio and bool activity; ValueError for none, non-finite samples or a mask that does not fit."""
    if not len(clips):
        raise ValueError(f"expected at least one clip in {name}, found none. Check the filter of the clip table.")
    result = []
    for index, (audio, active) in enumerate(clips):
        audio, active = np.asarray(audio, dtype=np.float32), np.asarray(active, dtype=bool)
        if audio.ndim != 1 or not np.isfinite(audio).all():
            raise ValueError(f"expected finite mono audio (samples,), found shape {audio.shape} with "
                             f"{np.sum(~np.isfinite(audio))} NaN or Inf in {name}[{index}]. Read it with lib.data.audio.")
        if active.shape != (-(-len(audio) // FRAME),) or not active.any():
            raise ValueError(f"expected a flag for each {FRAME} samples and some active, found {active.sum()} of shape "
                             f"{active.shape} for {len(audio)} samples in {name}[{index}]. Use lib.data.channel.apply_channel.")
        result.append((audio, active))
    return result


class Baseline:
    """A detector with `fit` and `anomaly`; equal seeds and threads give equal bits. Clips are scored side by side, a thread each."""

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
    """The eight numbers of `NUMBERS` (`lib.data.channel.traits`) of audio (samples,) before or after the channel.

    `active` belongs to frames of 320 samples (`lib.data.channel.active_frames`). Raises ValueError as `checked_clips`.
    """
    found = traits(*checked_clips([(audio, active)], "the audio")[0], rate_hz)
    return {name: found[name] for name in NUMBERS}


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
    """Natural logarithm of mel magnitudes, (..., samples) -> (..., 64, frames): windows of 32 ms, a frame each 16 ms."""
    return torch.log(_transform("mel", channel)(torch.as_tensor(audio)) + 1e-4)


def lfcc(audio: torch.Tensor | np.ndarray, channel: Channel = CHANNEL) -> torch.Tensor:
    """20 linear-frequency cepstra, deltas, double deltas, (..., samples) -> (..., 60, frames): 20 ms, a frame each 10."""
    static = _transform("lfcc", channel)(torch.as_tensor(audio))
    delta = compute_deltas(static, win_length=3)
    return torch.cat([static, delta, compute_deltas(delta, win_length=3)], dim=-2)


def activity_at(active: np.ndarray, frames: int) -> np.ndarray:
    """Activity of `frames` even steps from a clip's start to its end, (frames,) bool; all of them where none is active."""
    found = active[np.linspace(0, len(active) - 1, frames).astype(int)]
    return found if found.any() else ~found


class LfccGmm(Baseline):
    """Gaussian mixture of LFCC frames, anomaly = -mean log-likelihood; ASVspoof 2019's B02 without its spoof half."""

    def _frames(self, audio: np.ndarray, active: np.ndarray) -> np.ndarray:
        frames = lfcc(audio, self.channel).numpy().T
        return frames[activity_at(active, len(frames))]

    def _fit(self, clips: list[Clip], seed: int) -> None:
        frames = np.concatenate([self._frames(*clip) for clip in clips])
        frames = frames[seeds.stream(seed, "lfcc_gmm").permutation(len(frames))[:60_000]]
        self.scaler = StandardScaler().fit(frames)
        self.mixture = GaussianMixture(max(1, min(64, len(frames) // 40)), covariance_type="diag", reg_covar=1e-3, tol=1e-2,
                                       max_iter=60, random_state=seeds.integer(seed, "lfcc_gmm"))
        self.mixture.fit(self.scaler.transform(frames))

    def _anomaly(self, audio: np.ndarray, active: np.ndarray) -> float:
        return -self.mixture.score(self.scaler.transform(self._frames(audio, active)))


def spectrogram_statistics(audio: np.ndarray, active: np.ndarray, channel: Channel = CHANNEL) -> np.ndarray:
    """Mean and standard deviation over active frames of each of 64 log-mel bands, (128,)."""
    mel = log_mel(audio, channel).numpy()
    mel = mel[:, activity_at(active, mel.shape[1])]
    return np.concatenate([mel.mean(axis=1), mel.std(axis=1)]).astype(np.float64)


class SpectrogramSvm(Baseline):
    """One-class SVM (radial basis, nu 0.1) of the standardised spectrogram statistics."""

    estimator, options = OneClassSVM, {"kernel": "rbf", "nu": 0.1}  # made anew by each fit

    def _fit(self, clips: list[Clip], seed: int) -> None:
        table = np.array([spectrogram_statistics(*clip, self.channel) for clip in clips])
        self.scaler = StandardScaler().fit(table)
        self.model = self.estimator(**self.options).fit(self.scaler.transform(table))

    def _anomaly(self, audio: np.ndarray, active: np.ndarray) -> float:
        return self._distance(self.scaler.transform(spectrogram_statistics(audio, active, self.channel)[None]))

    def _distance(self, statistics: np.ndarray) -> float:
        return -self.model.decision_function(statistics)[0]


class SpectrogramMahalanobis(SpectrogramSvm):
    """Mahalanobis distance (Ledoit-Wolf covariance) of the same statistics: a discrepancy profile without a network."""

    estimator, options = LedoitWolf, {}

    def _distance(self, statistics: np.ndarray) -> float:
        return np.sqrt(self.model.mahalanobis(statistics)[0])


