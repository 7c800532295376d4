"""Owns edits with known truth and what is measured of a map against them: where was synthetic speech put in?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.signal
from scipy import ndimage

from lib import seeds
from lib.data.channel import apply_channel, speech_bounds
from lib.engine import side_by_side
from lib.evaluate import metrics
from lib.model.images import frame_s, hop_samples, row_hz
from lib.settings import RATE_HZ, Settings

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
    span_s: tuple[float, float]  # in the prepared clip


def edited(real: np.ndarray, fake: np.ndarray, kind: str, settings: Settings, random: np.random.Generator,
           clip_id: str = "", generator: str = "") -> Edit:
    """Replace a part of `real` by the aligned `fake` (both (samples,) at 16 kHz).

    splice: all frequencies for 0.4 to 1.2 s; band: a band of 1 to 2.5 kHz for the whole clip; box: both limits. Splices
    fade over 10 ms; bands are exchanged in a short-time Fourier transform. The copy takes the level of what it replaces.
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
    truth = ((rows >= low_hz) & (rows <= high_hz))[:, None] & ((times >= first / RATE_HZ) & (times <= last / RATE_HZ))[None]
    return Edit(clip_id, generator, kind, audio, active, truth, ((first - start) / RATE_HZ, (last - start) / RATE_HZ))


def coarse(values: np.ndarray) -> np.ndarray:
    """Mean over cells of GRID, (frequency, frame) -> (frequency / 4, frame / 4); an incomplete last cell is left out."""
    rows, frames = (size // step for size, step in zip(values.shape, GRID))
    cut = values[: rows * GRID[0], : frames * GRID[1]].astype(np.float64)
    return cut.reshape(rows, GRID[0], frames, GRID[1]).mean((1, 3))


def pro(maps: list[np.ndarray], truths: list[np.ndarray], limit: float = 0.3, steps: int = 200) -> float:
    """Per-region overlap up to a false-positive rate of `limit` (Bergmann et al. 2020), in [0, 1].

    Definition used here: thresholds are the quantiles of all cells outside the truth; at each, the overlap is the share of
    a connected true region that is found, averaged over regions; the area under overlap against false-positive rate from
    0 to `limit` is divided by `limit`. Nothing is rescaled by its own minimum or maximum.
    """
    outside = np.sort(np.concatenate([values[~truth] for values, truth in zip(maps, truths)]))
    rates = np.linspace(0, limit, steps)
    thresholds = outside[np.clip(((1 - rates) * len(outside)).astype(int), 0, len(outside) - 1)]
    overlaps = []
    for values, truth in zip(maps, truths):
        labels, count = ndimage.label(truth)
        for region in range(1, count + 1):
            inside = np.sort(values[labels == region])
            overlaps.append(1 - np.searchsorted(inside, thresholds, side="right") / len(inside))
    return float(np.trapezoid(np.mean(overlaps, axis=0), rates) / limit)


def measured(edits: list[Edit], maps: list[np.ndarray], threshold: float) -> dict[str, float]:
    """How well maps (frequency, frame) find the edits: pixel AUROC and PRO over all cells, IoU and F1 at `threshold`
    (fixed on bona fide speech), and the pointing game (is the highest cell inside?)."""
    truths = [coarse(edit.truth) > 0.5 for edit in edits]
    cells = [coarse(values) for values in maps]
    inside = np.concatenate([values[truth] for values, truth in zip(cells, truths)])
    outside = np.concatenate([values[~truth] for values, truth in zip(cells, truths)])
    found = [values > threshold for values in cells]
    union = sum(float((a | b).sum()) for a, b in zip(found, truths))
    both = sum(float((a & b).sum()) for a, b in zip(found, truths))
    total = sum(float(a.sum() + b.sum()) for a, b in zip(found, truths))
    return {"pixel AUROC": metrics.area_under_curve(-outside, -inside), "PRO@30%": pro(cells, truths),
            "IoU": both / max(union, 1), "F1": 2 * both / max(total, 1),
            "pointing": float(np.mean([truth.flat[values.argmax()] for values, truth in zip(cells, truths)])),
            "edits": len(edits)}


def frame_measures(edits: list[Edit], maps: list[np.ndarray], bonafide: list[np.ndarray], hop_s: float) -> pd.DataFrame:
    """Frame-level EER, and F1 at the 95 % quantile of bona fide frames, at 20 to 640 ms: `frame_ms, eer, f1`.

    A frame's anomaly is the mean of the map over frequency and the frame; it is fake where at least half of it is edited.
    """
    rows = []
    for size_ms in FRAME_MS:
        step = max(1, round(size_ms / 1000 / hop_s))
        pooled = lambda line: line[: len(line) // step * step].reshape(-1, step).mean(1)  # noqa: E731, B023
        limit = np.quantile(np.concatenate([pooled(values.mean(0)) for values in bonafide]), 0.95)
        anomaly = np.concatenate([pooled(values.mean(0)) for values in maps])
        fake = np.concatenate([pooled(edit.truth.any(0).astype(float)) for edit in edits]) >= 0.5
        flagged = anomaly > limit
        hits = float((flagged & fake).sum())
        rows.append({"frame_ms": size_ms, "eer": metrics.equal_error_rate(-anomaly[~fake], -anomaly[fake])[0],
                     "f1": 2 * hits / max(1.0, float(flagged.sum() + fake.sum()))})
    return pd.DataFrame(rows)


def random_map(shape: tuple[int, int], seed: int, name: str) -> np.ndarray:
    """Smooth noise, as a map that knows nothing."""
    return ndimage.gaussian_filter(seeds.stream(seed, "random map", name).standard_normal(shape), (8, 8))


def make_edits(study, experiment: str, generators: tuple[str, ...], kinds: tuple[str, ...] = KINDS,
               limit: int = 20) -> list[Edit]:
    """Edits of the first `limit` bona fide test clips of at least 1.5 s with every one of `generators`."""
    from lib.data.audio import read_audio
    from lib.paths import DATA

    table = study.test(experiment)
    table = table[table[experiment] == "test"]
    parents = table[(table.role == "bonafide") & (table.seconds >= 1.5)].head(limit)
    edits = []
    for parent in parents.itertuples():
        real = read_audio(DATA / parent.path, strict=False)[0]
        copies = table[(table.parent == parent.clip_id) & table.generator.isin(generators)]
        for copy in copies.itertuples():
            fake = read_audio(DATA / copy.path, strict=False)[0]
            for kind in kinds:
                random = seeds.stream(0, "edit", parent.clip_id, kind)  # the same place for every generator
                edits.append(edited(real, fake, kind, study.settings, random, parent.clip_id, copy.generator))
    return edits


def evaluate_maps(edits: list[Edit], bonafide: list[tuple[np.ndarray, np.ndarray]],
                  makers: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]], hop_s: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measure every map maker `(audio, active) -> (frequency, frame)` on every generator and kind of edit.

    Thresholds are the 95 % quantile of the maker's cells on `bonafide` clips (threshold part of the validation split).
    Returns the table `map, generator, kind, measures...` and the frame-level table of splices.
    """
    rows, frames = [], []
    for name, maker in makers.items():
        real = list(side_by_side(lambda clip, maker=maker: maker(*clip), bonafide))
        threshold = float(np.quantile(np.concatenate([coarse(values).ravel() for values in real]), 0.95))
        maps = list(side_by_side(lambda edit, maker=maker: maker(edit.audio, edit.active), edits))
        keys = sorted({(edit.generator, edit.kind) for edit in edits}, key=lambda key: (KINDS.index(key[1]), key[0]))
        for generator, kind in keys:
            index = [i for i, edit in enumerate(edits) if (edit.generator, edit.kind) == (generator, kind)]
            chosen, theirs = [edits[i] for i in index], [maps[i] for i in index]
            rows.append({"map": name, "generator": generator, "kind": kind, **measured(chosen, theirs, threshold)})
            if kind == "splice":
                frames.append(frame_measures(chosen, theirs, real, hop_s).assign(map=name, generator=generator))
    return pd.DataFrame(rows), pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
