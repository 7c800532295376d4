"""Owns edits with known truth and what is measured of a map against them: where was synthetic speech put in?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.signal
import torch
from scipy import ndimage

from lib import seeds
from lib.data.audio import read_audio
from lib.data.channel import FRAME, apply_channel, speech_bounds
from lib.engine import side_by_side
from lib.evaluate import metrics
from lib.evaluate.baseline_networks import SupervisedResNet, tensors
from lib.evaluate.baselines import checked_clips
from lib.model.images import frame_s, hop_samples, row_hz
from lib.paths import DATA, clocked
from lib.settings import RATE_HZ, Settings, View

if TYPE_CHECKING:
    from lib.detector import Detector
    from lib.study import Study

KINDS = ("splice", "band", "box")
GRID = (4, 4)
"""Rows and frames of the image that one cell of the truth and of an evaluated map covers (about 125 Hz and 32 ms)."""
FRAME_MS = (20, 40, 80, 160, 320, 640)


@dataclass(frozen=True)
class Edit:
    """A real clip in which a part was replaced by its own vocoded copy, after the shared channel."""

    clip_id: str
    generator: str
    kind: str
    audio: np.ndarray  # (samples,)
    active: np.ndarray  # (20 ms frame,) bool
    truth: np.ndarray  # (frequency, frame) bool, on the image's grid


def edited(real: np.ndarray, fake: np.ndarray, kind: str, settings: Settings, random: np.random.Generator,
           clip_id: str = "", generator: str = "") -> Edit:
    """Replace a part of `real` by the aligned `fake` (both (samples,) at 16 kHz).

    splice: all frequencies for 0.4 to 1.2 s; band: a band of 1 to 2.5 kHz for the whole clip; box: both limits. Splices
    fade over 10 ms; bands are exchanged in a Fourier transform. The copy takes the level of what it replaces.
    """
    length = min(len(real), len(fake))
    real, fake = real[:length].astype(np.float64), fake[:length].astype(np.float64)
    first, last = 0, length
    if kind != "band":
        span = int(random.uniform(0.4, min(1.2, 0.5 * length / RATE_HZ)) * RATE_HZ)
        # The part is put where there is speech: of eight places, the loudest.
        places = random.integers(0, length - span + 1, 8)
        first = int(max(places, key=lambda place: np.mean(real[place : place + span] ** 2)))
        last = first + span
    low_hz, high_hz = settings.channel.low_hz, settings.channel.high_hz
    if kind != "splice":
        width = random.uniform(1000, 2500)
        low_hz = random.uniform(low_hz, 3500)
        high_hz = min(high_hz, low_hz + width)
    level = np.sqrt(np.mean(real[first:last] ** 2) / max(np.mean(fake[first:last] ** 2), 1e-12))
    weight = np.zeros(length)
    weight[first:last] = 1.0
    if kind != "band":
        ramp = np.hanning(2 * 160)[:160]
        weight[first : first + 160], weight[last - 160 : last] = ramp, ramp[::-1]
    if kind == "splice":
        mixed = real * (1 - weight) + fake * level * weight
    else:
        hertz, _, one = scipy.signal.stft(real, RATE_HZ, nperseg=1024)
        _, _, two = scipy.signal.stft(fake * level, RATE_HZ, nperseg=1024)
        one = np.where(((hertz >= low_hz) & (hertz <= high_hz))[:, None], two, one)
        swapped = scipy.signal.istft(one, RATE_HZ, nperseg=1024)[1]
        swapped = np.pad(swapped, (0, max(0, length - len(swapped))))[:length]
        mixed = real * (1 - weight) + swapped * weight
    mixed = mixed.astype(np.float32)
    start = speech_bounds(mixed, settings.channel)[0]
    audio, active = apply_channel(mixed, settings.channel)
    times = frame_s(settings.view, 1 + len(audio) // hop_samples(settings.view)) + start / RATE_HZ
    rows = row_hz(settings.view, settings.channel)
    if kind == "splice":
        high_hz = np.inf
    inside = (times >= first / RATE_HZ) & (times <= last / RATE_HZ)
    return Edit(clip_id, generator, kind, audio, active, ((rows >= low_hz) & (rows <= high_hz))[:, None] & inside)


def coarse(values: np.ndarray) -> np.ndarray:
    """Means over GRID, (frequency, frame) -> (frequency / 4, frame / 4); incomplete last cells are left out."""
    rows, frames = (size // step for size, step in zip(values.shape, GRID))
    cut = values[: rows * GRID[0], : frames * GRID[1]].astype(np.float64)
    return cut.reshape(rows, GRID[0], frames, GRID[1]).mean((1, 3))


def masked(values: np.ndarray, active: np.ndarray) -> np.ndarray:
    """A map (frequency, frame) whose pauses (`active` (frame,) is false) lie just below its lowest value elsewhere: the
    same for every map, since an edit lies where speech is and a map that knows pauses has an advantage."""
    if active.all() or not active.any():
        return values
    kept = values[:, active]
    return np.where(active, values, kept.min() - 1e-3 * (np.ptp(kept) or 1.0))


def overlaps(maps: list[np.ndarray], truths: list[np.ndarray], limit: float = 0.3, steps: int = 200) -> np.ndarray:
    """Overlap of each map with its true regions up to a false-positive rate of `limit`, (map,) in [0, 1].

    Thresholds are the quantiles of all cells outside the truth; at each, the overlap is the share of a connected true
    region that is found, averaged over a map's regions; the area under overlap against false-positive rate from 0 to
    `limit` is divided by `limit`. Nothing is rescaled by its own minimum or maximum. Chance is limit / 2.
    """
    outside = np.sort(np.concatenate([values[~truth] for values, truth in zip(maps, truths)]))
    rates = np.linspace(0, limit, steps)
    thresholds = outside[np.clip(((1 - rates) * len(outside)).astype(int), 0, len(outside) - 1)]
    areas = []
    for values, truth in zip(maps, truths):
        labels, count = ndimage.label(truth)
        regions = [np.sort(values[labels == region]) for region in range(1, count + 1)]
        shares = [1 - np.searchsorted(inside, thresholds, side="right") / len(inside) for inside in regions]
        areas.append(np.trapezoid(np.mean(shares, axis=0), rates) / limit)
    return np.array(areas)


def by_sentence(edits: list[Edit], maps: list[np.ndarray]) -> pd.DataFrame:
    """What each real clip gives to pixel AUROC and PRO (Bergmann et al. 2020), a row an edited clip: `clip_id, pixel
    AUROC, PRO@30%, pointing`. The column's mean is the measure of all edits, its spread that over sentences.

    pixel AUROC over all cells of all edits, for one clip its jackknife pseudo-value (`metrics.auc_influence`); PRO,
    `overlaps`; pointing, whether the highest cell is inside.
    """
    truths, cells = [coarse(edit.truth) > 0.5 for edit in edits], [coarse(values) for values in maps]
    sides = [np.concatenate([values[truth == inside] for values, truth in zip(cells, truths)]) for inside in (0, 1)]
    auc, *influence = metrics.auc_influence(*(-side for side in sides))
    owner = [np.repeat(np.arange(len(edits)), [(truth == inside).sum() for truth in truths]) for inside in (0, 1)]
    added = sum(np.bincount(clip, part, minlength=len(edits)) for clip, part in zip(owner, influence))
    return pd.DataFrame({"clip_id": [edit.clip_id for edit in edits], "pixel AUROC": auc + len(edits) * added,
                         "PRO@30%": overlaps(cells, truths),
                         "pointing": [float(truth.flat[values.argmax()]) for values, truth in zip(cells, truths)]})


def measured(edits: list[Edit], maps: list[np.ndarray], threshold: float) -> dict[str, float]:
    """How well maps (frequency, frame) find the edits: the means of `by_sentence`, and IoU and F1 over all cells at
    `threshold` (fixed on bona fide speech)."""
    pairs = [(coarse(values) > threshold, coarse(edit.truth) > 0.5) for edit, values in zip(edits, maps)]
    union, both = (sum(float(join(a, b).sum()) for a, b in pairs) for join in (np.logical_or, np.logical_and))
    return by_sentence(edits, maps).mean(numeric_only=True).to_dict() | {
        "IoU": both / max(union, 1), "F1": 2 * both / max(union + both, 1), "edits": len(edits)}


def over_sentences(sentences: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """Means over generators and sentences of each group `names`, with 95 % t intervals over sentences."""
    rows = []
    for keys, part in sentences.groupby(names, sort=False):
        row = dict(zip(names, keys)) | {"sentences": part.clip_id.nunique()}
        for measure in ("pixel AUROC", "PRO@30%", "pointing"):
            of_clips = part.groupby("clip_id")[measure].mean()
            mean, low, high = metrics.paired(of_clips)[:3] if len(of_clips) > 1 else (of_clips.mean(), np.nan, np.nan)
            row |= {measure: mean, f"{measure} low": max(0.0, low), f"{measure} high": min(1.0, high)}
        rows.append(row)
    return pd.DataFrame(rows)


def frame_measures(edits: list[Edit], maps: list[np.ndarray], bonafide: list[np.ndarray], hop_s: float) -> pd.DataFrame:
    """Frame-level EER, and F1 at the 95 % quantile of bona fide frames, at 20 to 640 ms: `frame_ms, eer, f1`.

    A frame's anomaly is the mean of the map over frequency and the frame; it is fake where half or more is edited.
    """
    def pooled(line: np.ndarray, step: int) -> np.ndarray:
        return line[: len(line) // step * step].reshape(-1, step).mean(1)

    rows = []
    for size_ms in FRAME_MS:
        step = max(1, round(size_ms / 1000 / hop_s))
        limit = np.quantile(np.concatenate([pooled(values.mean(0), step) for values in bonafide]), 0.95)
        anomaly = np.concatenate([pooled(values.mean(0), step) for values in maps])
        fake = np.concatenate([pooled(edit.truth.any(0).astype(float), step) for edit in edits]) >= 0.5
        flagged = anomaly > limit
        hits = float((flagged & fake).sum())
        rows.append({"frame_ms": size_ms, "eer": metrics.equal_error_rate(-anomaly[~fake], -anomaly[fake])[0],
                     "f1": 2 * hits / max(1.0, float(flagged.sum() + fake.sum()))})
    return pd.DataFrame(rows)


def random_map(shape: tuple[int, int], seed: int, name: str) -> np.ndarray:
    """Smooth noise, as a map that knows nothing."""
    return ndimage.gaussian_filter(seeds.stream(seed, "random map", name).standard_normal(shape), (8, 8))


def saliency(classifier: SupervisedResNet, audio: np.ndarray, active: np.ndarray | None = None) -> np.ndarray:
    """|d logit / d image| of a fitted classifier on its view's axes, (frequency, frame) float32, the largest of the
    image's planes (Simonyan et al. 2014). Without `active` every frame counts. ValueError before `fit` or as
    `checked_clips`."""
    if not classifier.fitted:
        raise ValueError("expected a fitted SupervisedResNet, found a new one. Call fit(bonafide, spoof) first.")
    active = np.ones(-(-len(audio) // FRAME), dtype=bool) if active is None else active
    samples, flags = tensors(*checked_clips([(audio, active)], "the audio")[0])
    images = classifier._images(samples).requires_grad_()
    gradient, = torch.autograd.grad(classifier.network(images, flags).sum(), images)
    return gradient[0].abs().amax(dim=0).numpy()


def drawn_maps(detector: Detector, classifier: SupervisedResNet, audio: np.ndarray, active: np.ndarray,
               published: Detector | None = None) -> dict[str, np.ndarray]:
    """The maps (frequency, frame) of a clip that notebook 41 compares: the detector's own, other kinds of scaling, the
    product over levels of the unscaled discrepancy (Wang et al. 2021, eq. 5); of a detector as `published`, that
    product without scaling and with its own; and rivals; all with the same mask (`masked`)."""
    picture, levels = detector.clip_residuals(audio, active)
    own = detector.map_kind
    kinds = dict.fromkeys((own, "signed", "element", "frequency", "none"))
    drawn = {kind: detector.explanation(picture, levels, active, kind=kind) for kind in kinds}
    plain = drawn["none"]
    maps = {f"{kind} (ours)" if kind == own else f"{kind} scaling": each.map for kind, each in drawn.items()}
    maps["product, no scaling"] = np.prod(plain.levels, axis=0)
    if published:
        seen = published.clip_residuals(audio, active)
        maps |= {f"as published, {'no' if kind == 'none' else kind} scaling":
                 published.explanation(*seen, active, kind=kind).map for kind in ("none", published.map_kind)}
    maps |= {"log-energy": plain.image[0], "saliency": saliency(classifier, audio, active),
             "activity": random_map(plain.map.shape, 0, str(len(audio)))}  # masked noise: where speech is, no more
    return {name: masked(values, plain.active) for name, values in maps.items()}


def make_edits(study: Study, experiment: str, generators: tuple[str, ...], kinds: tuple[str, ...] = KINDS,
               limit: int = 20) -> list[Edit]:
    """Edits of the first `limit` bona fide test clips of at least 1.5 s with every one of `generators`."""
    table, edits = study.test(experiment, only="test"), []
    for parent in table[(table.role == "bonafide") & (table.seconds >= 1.5)].head(limit).itertuples():
        real = read_audio(DATA / parent.path, strict=False)[0]
        copies = table[(table.parent == parent.clip_id) & table.generator.isin(generators)]
        for copy in copies.itertuples():
            fake = read_audio(DATA / copy.path, strict=False)[0]
            for kind in kinds:
                random = seeds.stream(0, "edit", parent.clip_id, kind)  # the same place for every generator
                edits.append(edited(real, fake, kind, study.settings, random, parent.clip_id, copy.generator))
    return edits


@clocked("scoring")
def evaluate_maps(edits: list[Edit], bonafide: list[tuple[np.ndarray, np.ndarray]], view: View,
                  draw: Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]) -> tuple[pd.DataFrame, ...]:
    """Measure every map of `draw(audio, active)`, by name, on every generator and kind of edit.

    Thresholds are the 95 % quantile of a map's cells on `bonafide` clips (threshold part of the validation split).
    Returns the table `map, generator, kind, measures...`, the same by sentence, and the frame-level table of splices.
    """
    def of_clips(clips: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, list[np.ndarray]]:
        drawn = list(side_by_side(lambda clip: draw(*clip), clips))
        return {name: [maps[name] for maps in drawn] for name in drawn[0]}

    real, tables = of_clips(bonafide), ([], [], [])
    limits = {name: np.quantile(np.concatenate([coarse(values).ravel() for values in maps]), 0.95)
              for name, maps in real.items()}
    keys = sorted({(edit.generator, edit.kind) for edit in edits}, key=lambda key: (KINDS.index(key[1]), key[0]))
    for generator, kind in keys:
        chosen = [edit for edit in edits if (edit.generator, edit.kind) == (generator, kind)]
        for name, maps in of_clips([(edit.audio, edit.active) for edit in chosen]).items():
            row = {"map": name, "generator": generator, "kind": kind}
            tables[0].append(row | measured(chosen, maps, limits[name]))
            tables[1].append(by_sentence(chosen, maps).assign(**row))
            if kind == "splice":
                frames = frame_measures(chosen, maps, real[name], view.hop_s)
                tables[2].append(frames.assign(map=name, generator=generator))
    return pd.DataFrame(tables[0]), *(pd.concat(parts, ignore_index=True) for parts in tables[1:])
