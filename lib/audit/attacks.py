"""Owns two attacks on the detector by someone who holds it and its gradients: one learned filter a generator, and a free change of
the image as an upper bound.

The score is differentiable from the audio behind the shared channel on: image, networks, residuals, profile, typicality
(`anomaly_tensor`). The channel is not, so a filter is learned behind it and judged before it, through the whole chain, on clips
that it was not learned on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.signal
import torch
from torch import nn
from torch.nn import functional

from lib.data.channel import FRAME, apply_channel
from lib.detector import Detector
from lib.evaluate.metrics import area_under_curve
from lib.model.discrepancy import residual
from lib.model.images import image
from lib.model.pyramid import folded
from lib.model.scaling import POOLINGS
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
    left_out: torch.Tensor

    @classmethod
    def of(cls, detector: Detector) -> Target:
        typicality = detector.typicality
        tensors = (torch.from_numpy(np.asarray(value, dtype=np.float32)) for value in
                   (typicality.mean, typicality.deviation, typicality.precision, typicality.left_out))
        # Channels-last backward passes through narrow networks crash in some builds of oneDNN.
        networks = tuple(folded(one).to(memory_format=torch.contiguous_format) for one in (detector.teacher, detector.student))
        return cls(detector, networks, *tensors)


def anomaly_tensor(target: Target, picture: torch.Tensor, active: np.ndarray) -> torch.Tensor:
    """The detector's anomaly, a scalar with a gradient, of an image (1, channel, frequency, frame) of a clip with `active`
    (20 ms frames,) as the channel gives it. Equal to `Detector.score_prepared` up to rounding; up = fake."""
    detector, scoring = target.detector, target.detector.settings.scoring
    pyramids = (network(picture) for network in target.networks)
    levels, masks = zip(*detector.residuals(*pyramids, active, picture.shape[-1]))
    if scoring.pooling in POOLINGS:
        maps = [detector.scaling.apply(index, parts, scoring.scaling) for index, parts in enumerate(levels)]
        whole = detector.combined(maps, tuple(levels[0].shape[-2:]), scoring.combine)
        return detector.pooled(whole, masks[0])[scoring.pooling]
    z = (detector.profile(detector.profiled(list(levels), scoring.scaling), masks) - target.mean) / target.deviation
    z = z - target.left_out.T @ (target.left_out @ z)
    return {"profile": lambda: (z @ target.precision @ z / len(z)).clamp_min(0), "two_sided": lambda: (z**2).mean(),
            "one_sided": lambda: (z.clamp_min(0) ** 2).mean()}[scoring.pooling]().clamp_min(1e-12).sqrt()


def pictured(target: Target, audio: torch.Tensor) -> torch.Tensor:
    """The image (1, channel, frequency, frame) of audio (samples,) behind the channel, with a gradient."""
    settings = target.detector.settings
    return image(audio[None], settings.view, settings.channel)


# --- one filter a generator -------------------------------------------------------------------------------------------------


def learned_filter(target: Target, clips: list[Clip], steps: int = 20, rate: float = 0.004, taps: int = TAPS,
                   window_s: float = 2.5) -> np.ndarray:
    """One finite impulse response (taps,) that lowers the mean anomaly of fakes `clips` behind the channel.

    As in Malafide (Panariello et al. 2023): linear, the same for every clip, learned with Adam from the identity. The output
    is brought back to the clip's level, as the channel does. Of every clip, the first `window_s` seconds; the filter of the step
    with the lowest mean anomaly is returned.
    """
    length = round(window_s * RATE_HZ)
    taken = [(torch.from_numpy(audio[:length]), active[: -(-min(length, len(audio)) // FRAME)]) for audio, active in clips]
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


def filter_attack(study: Study, detector: Detector, table: pd.DataFrame, limit: int = 40,
                  steps: int = 20, learn: int = 8) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Learn a filter for each copy-synthesis generator of `table` and judge it on other clips.

    The fakes of every other real parent (at most `learn` of them) teach the filter, those of the rest judge it: no sentence is on
    both sides. Returns one
    row a judged clip and filter (`generator` of the filter, `speech`: fake or real, `parent, before, after`: anomalies through
    the whole chain), and the filters. Real speech goes through the filters too: what moves it as far is an equaliser effect.
    """
    from lib.data.audio import read_audio
    from lib.paths import DATA

    reals = table[table.role == "bonafide"].head(limit)
    parents = reals.clip_id.tolist()
    learning, judging = set(parents[::2][:learn]), parents[1::2]
    target, channel = Target.of(detector), study.settings.channel
    copies = {name: part.set_index("parent").path for name, part in table[table.role == "copysynth"].groupby("generator", sort=False)}

    def learned(name: str) -> np.ndarray:
        paths = [path for parent, path in copies[name].items() if parent in learning]
        return learned_filter(target, [apply_channel(read_audio(DATA / path, strict=False)[0], channel) for path in paths], steps)

    shapes = dict(zip(copies, study.side_by_side(learned, copies)))

    def judged(job: tuple[str, str, str, str]) -> tuple[float, float]:
        audio = read_audio(DATA / job[3], strict=False)[0]
        return tuple(detector.score_prepared(*apply_channel(one, channel)) for one in (audio, filtered(audio, shapes[job[0]])))

    jobs = [(name, "fake", parent, copies[name][parent]) for name in copies for parent in judging if parent in copies[name]]
    jobs += [(name, "real", clip.clip_id, clip.path) for name in copies for clip in reals.itertuples() if clip.clip_id in set(judging)]
    rows = [job[:3] + found for job, found in zip(jobs, study.side_by_side(judged, jobs))]
    return pd.DataFrame(rows, columns=["generator", "speech", "parent", "before", "after"]), shapes


# --- the image itself -------------------------------------------------------------------------------------------------------


def moved_image(target: Target, picture: torch.Tensor, active: np.ndarray, epsilon: float, steps: int = 8) -> torch.Tensor:
    """The image with every value moved by at most `epsilon` so that the anomaly falls: projected gradient descent on the sign
    (Madry et al. 2018). The image's log-magnitudes are in units of 1.8 nepers (15.6 dB). Steps halve: the two-sided score has its
    lowest point close by, and steps as wide as the reach jump over it. The best of all steps is returned."""
    change = torch.zeros_like(picture, requires_grad=True)
    best, lowest = picture, float("inf")
    for step in range(steps + 1):
        anomaly = anomaly_tensor(target, picture + change, active)
        if float(anomaly) < lowest:
            best, lowest = (picture + change).detach(), float(anomaly)
        if step < steps:
            slope, = torch.autograd.grad(anomaly, change)
            with torch.no_grad():
                change -= epsilon * 0.5 ** (step + 1) * slope.sign()
                change.clamp_(-epsilon, epsilon)
    return best


def gradient_attack(study: Study, detector: Detector, table: pd.DataFrame, epsilons: Iterable[float], limit: int = 6,
                    steps: int = 8) -> pd.DataFrame:
    """Move the images of up to `limit` fakes a generator: `generator, parent, epsilon, before, after`.

    An upper bound: neither need an image so moved be the image of any sound, nor does an attacker reach behind the channel.
    """
    from lib.data.audio import read_audio
    from lib.paths import DATA

    target = Target.of(detector)
    clips = table[table.role == "copysynth"].groupby("generator", sort=False).head(limit)

    def attacked(path: str) -> tuple[float, ...]:
        audio, active = apply_channel(read_audio(DATA / path, strict=False)[0], study.settings.channel)
        picture = pictured(target, torch.from_numpy(audio))
        moved = [picture, *(moved_image(target, picture, active, epsilon, steps) for epsilon in epsilons)]
        before, *after = (float(anomaly_tensor(target, one, active)) for one in moved)
        # An image within a small reach is within a wider one too.
        return before, *np.minimum.accumulate(after)

    epsilons, rows = sorted(epsilons), []
    for clip, (before, *after) in zip(clips.itertuples(), study.side_by_side(attacked, clips.path)):
        rows += [(clip.generator, clip.parent, epsilon, before, value) for epsilon, value in zip(epsilons, after)]
    return pd.DataFrame(rows, columns=["generator", "parent", "epsilon", "before", "after"])


def image_map(target: Target, picture: torch.Tensor) -> np.ndarray:
    """The anomaly map (frequency, frame) of an image, as `Detector.explain_prepared` draws it outside pauses."""
    detector = target.detector
    with torch.no_grad():
        parts = [residual(*pair)[0] for pair in zip(*(network(picture) for network in target.networks))]
        levels = [detector.scaling.apply(index, part, detector.map_kind) for index, part in enumerate(parts)]
        return detector.combined(levels, tuple(picture.shape[-2:]), "sum").numpy()


def attack_table(detector: Detector, real: np.ndarray, attacked: pd.DataFrame, alpha: float = 0.05) -> pd.DataFrame:
    """What an attack does, a row a group of `attacked` (`generator, before, after`), against anomalies of untouched real speech
    `real` (clip,): AUC before and after, and the share of fakes that pass at `alpha` ("fooled")."""
    passed = lambda values: float(np.mean([detector.p_value(value) > alpha for value in values]))  # noqa: E731
    rows = []
    for keys, part in attacked.groupby([name for name in ("generator", "epsilon") if name in attacked], sort=False):
        before, after = part.before.to_numpy(), part.after.to_numpy()
        rows.append(dict(zip([name for name in ("generator", "epsilon") if name in attacked], keys)) | {
            "clips": len(part), "AUC before": area_under_curve(-real, -before), "AUC after": area_under_curve(-real, -after),
            "passing before": passed(before), "passing after": passed(after), "median change": float(np.median(after - before))})
    return pd.DataFrame(rows)
