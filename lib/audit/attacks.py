"""Owns the attack of someone who holds the detector and its gradients: one learned filter a generator (notebook 43).

The score is differentiable from the audio behind the shared channel on: image, networks, residuals, profile,
typicality (`anomaly_tensor`). The channel is not, so a filter is learned behind it and judged before it, through the
whole chain, on clips that it was not learned on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.signal
import torch
from torch import nn
from torch.nn import functional

from lib.data.audio import read_audio
from lib.data.channel import FRAME, apply_channel
from lib.detector import Detector
from lib.evaluate.metrics import area_under_curve, conformal
from lib.evaluate.systems import judged
from lib.model.discrepancy import band_means, combined, level_residuals, pooled, upsampled
from lib.model.images import image
from lib.model.pyramid import folded
from lib.model.scaling import POOLINGS
from lib.paths import DATA, clocked
from lib.settings import RATE_HZ

if TYPE_CHECKING:
    from lib.study import Study

TAPS = 129
Clip = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Target:
    """A detector with what its gradient needs, built once: batch norms folded, typicality as tensors."""

    detector: Detector
    networks: tuple[nn.Module, nn.Module]
    mean: torch.Tensor
    deviation: torch.Tensor
    precision: torch.Tensor

    @classmethod
    def of(cls, detector: Detector) -> Target:
        model = detector.typicality
        tensors = (torch.from_numpy(np.asarray(value, dtype=np.float32))
                   for value in (model.mean, model.deviation, model.precision))
        # Channels-last backward passes through narrow networks crash in some builds of oneDNN.
        networks = tuple(folded(network).to(memory_format=torch.contiguous_format)
                         for network in (detector.teacher, detector.student))
        return cls(detector, networks, *tensors)


def anomaly_tensor(target: Target, picture: torch.Tensor, active: np.ndarray) -> torch.Tensor:
    """The detector's anomaly, a scalar with a gradient, of an image (1, plane, frequency, frame) of a clip with
    `active` (20 ms frames,) as the channel gives it. Equal to `Detector.score_prepared` up to rounding; up = fake."""
    detector, scoring = target.detector, target.detector.settings.scoring
    pyramids = (network(None, picture) for network in target.networks)
    levels, masks = zip(*level_residuals(*pyramids, active, detector.settings.view, picture.shape[-1]))
    if scoring.pooling in POOLINGS:
        maps = [detector.scaling.apply(index, parts, scoring.scaling) for index, parts in enumerate(levels)]
        grown = [upsampled(level, levels[0].shape[-2:]) for level in maps]
        return pooled(combined(grown, scoring.combine, scoring.scaling), masks[0])[scoring.pooling]
    profiled = detector.scaling.profiled(list(levels), scoring.scaling)
    profile = band_means([values[..., mask] for values, mask in zip(profiled, masks)], scoring.bands)
    z = (profile - target.mean) / target.deviation
    squared = {"profile": lambda: z @ target.precision @ z / len(z), "two_sided": lambda: (z**2).mean(),
               "one_sided": lambda: (z.clamp_min(0) ** 2).mean()}[scoring.pooling]()
    return squared.clamp_min(1e-12).sqrt()


def pictured(target: Target, audio: torch.Tensor) -> torch.Tensor:
    """The image (1, plane, frequency, frame) of audio (samples,) behind the channel, with a gradient."""
    settings = target.detector.settings
    return image(audio[None], settings.view, settings.channel)


def learned_filter(target: Target, clips: list[Clip], steps: int = 20, rate: float = 0.004, taps: int = TAPS,
                   window_s: float = 2.5) -> np.ndarray:
    """One finite impulse response (taps,) that lowers the mean anomaly of fakes `clips` behind the channel.

    As in Malafide (Panariello et al. 2023): linear, the same for every clip, learned with Adam from the identity. The
    output is brought back to the clip's level, as the channel does. Of every clip, the first `window_s` seconds; the
    filter of the step with the lowest mean anomaly is returned.
    """
    length = round(window_s * RATE_HZ)
    taken = [(torch.from_numpy(audio[:length]), active[: -(-min(length, len(audio)) // FRAME)])
             for audio, active in clips]
    taken = [(audio, active) for audio, active in taken if active.any() and len(audio) > RATE_HZ // 2]
    shape = torch.zeros(taps)
    shape[taps // 2] = 1.0
    shape.requires_grad_(True)
    optimiser = torch.optim.Adam([shape], rate)
    best, lowest = shape.detach().clone(), float("inf")
    for _ in range(steps + 1):
        optimiser.zero_grad()
        total = 0.0
        for audio, active in taken:
            loud = functional.conv1d(audio[None, None], shape[None, None], padding=taps // 2)[0, 0]
            loud = loud * (audio.square().mean() / loud.square().mean().clamp_min(1e-12)).sqrt()
            anomaly = anomaly_tensor(target, pictured(target, loud), active) / len(taken)
            anomaly.backward()
            total += float(anomaly)
        if total < lowest:
            best, lowest = shape.detach().clone(), total
        optimiser.step()
    # torch's convolution is a correlation: the impulse response is its mirror image.
    return best.flip(0).numpy()


def filtered(audio: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """`audio` (samples,) through the filter, same length, no delay, at the same root mean square."""
    loud = scipy.signal.oaconvolve(audio, shape, mode="same")
    return (loud * np.sqrt(np.mean(audio**2) / (np.mean(loud**2) + 1e-20))).astype(np.float32)


@clocked("scoring")
def filter_attack(study: Study, detector: Detector, table: pd.DataFrame, limit: int = 40, steps: int = 20,
                  learn: int = 8) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Learn a filter for each copy-synthesis generator of `table` and judge it on other clips.

    The fakes of every other real parent (at most `learn` of them) teach the filter, those of the rest judge it: no
    sentence is on both sides. Returns one row a judged clip and filter (`generator` of the filter, `speech`: fake or
    real, `parent, before, after`: anomalies through the whole chain), and the filters. Real speech goes through the
    filters too: what moves it as far is an equaliser effect.
    """
    reals = table[table.role == "bonafide"].head(limit)
    parents = reals.clip_id.tolist()
    learning, judging = set(parents[::2][:learn]), parents[1::2]
    target, channel = Target.of(detector), study.settings.channel
    copies = {name: part.set_index("parent").path
              for name, part in table[table.role == "copysynth"].groupby("generator", sort=False)}

    def learned(name: str) -> np.ndarray:
        paths = [path for parent, path in copies[name].items() if parent in learning]
        clips = [apply_channel(read_audio(DATA / path, strict=False)[0], channel) for path in paths]
        return learned_filter(target, clips, steps)

    shapes = dict(zip(copies, study.side_by_side(learned, copies)))

    def judged(job: tuple[str, str, str, str]) -> tuple[float, float]:
        audio = read_audio(DATA / job[3], strict=False)[0]
        both = audio, filtered(audio, shapes[job[0]])
        return tuple(detector.score_prepared(*apply_channel(each, channel)) for each in both)

    path_of, jobs = reals.set_index("clip_id").path, []
    for name in copies:
        jobs += [(name, "fake", parent, copies[name][parent]) for parent in judging if parent in copies[name]]
    for name in copies:
        jobs += [(name, "real", parent, path_of[parent]) for parent in judging]
    rows = [job[:3] + anomalies for job, anomalies in zip(jobs, study.side_by_side(judged, jobs))]
    return pd.DataFrame(rows, columns=["generator", "speech", "parent", "before", "after"]), shapes


def attack_table(detector: Detector, real: np.ndarray, attacked: pd.DataFrame, alpha: float = 0.05) -> pd.DataFrame:
    """What an attack does, a row a generator of `attacked` (`generator, before, after`), against anomalies of untouched
    real speech `real` (clip,): AUC before and after, and the share of fakes that pass at `alpha`."""
    rows = []
    for name, part in attacked.groupby("generator", sort=False):
        row = {"generator": name, "clips": len(part)}
        for when in ("before", "after"):
            passing = np.mean(conformal(detector.calibration, part[when]) > alpha)
            row |= {f"AUC {when}": area_under_curve(-real, -part[when]), f"passing {when}": float(passing)}
        rows.append(row | {"median change": float((part.after - part.before).median())})
    return pd.DataFrame(rows)


def notched(audio: np.ndarray, spacing_hz: float, width_hz: float) -> np.ndarray:
    """`audio` (samples,) at 16 kHz without what lies within `width_hz` / 2 of a multiple of `spacing_hz`."""
    spectrum, hertz = np.fft.rfft(audio), np.fft.rfftfreq(len(audio), 1 / RATE_HZ)
    spectrum[np.abs(hertz - spacing_hz * np.round(hertz / spacing_hz)) <= width_hz / 2] = 0
    return np.fft.irfft(spectrum, len(audio)).astype(np.float32)


@clocked("scoring")
def notch_attack(study: Study, joint: Detector, table: pd.DataFrame, widths_hz: tuple[float, ...] = (1.0, 3.0, 8.0),
                 alpha: float = 0.05) -> pd.DataFrame:
    """Copies of `table` (`generator`, `path`) with notches at every multiple of the spacing that the detector names: a
    row a generator and width (0: untouched) with the shares called by lines and by all evidence at p <= alpha, and the
    median level of what was removed, in dB below the copy. No gradient is needed, nor a network."""

    def attacked(path: str) -> list[tuple]:
        audio, rows = read_audio(DATA / path, strict=False)[0], []
        first = judged(joint, audio)
        for width_hz in (0.0, *widths_hz):
            made = notched(audio, first["spacing_hz"], width_hz) if width_hz and first["spacing_hz"] > 0 else audio
            said = judged(joint, made) if width_hz else first
            loss = np.mean((audio - made) ** 2) / np.mean(audio**2)
            rows.append((width_hz, said["p_lines"] <= alpha, said["p_all"] <= alpha, 10 * np.log10(loss + 1e-12)))
        return rows

    rows = [(name, *row) for name, part in table.groupby("generator", sort=False)
            for of_clip in study.side_by_side(attacked, part.path) for row in of_clip]
    names = ["generator", "width (Hz)", "lines call", "all evidence calls", "removed (dB)"]
    means = {"lines call": "mean", "all evidence calls": "mean", "removed (dB)": "median"}
    return pd.DataFrame(rows, columns=names).groupby(names[:2], sort=False).agg(means).reset_index()
