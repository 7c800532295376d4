"""Owns the checks of a map's honesty: deletion and insertion curves, randomised networks, correlation with energy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import scipy.stats

from lib import seeds
from lib.detector import Detector
from lib.evaluate import metrics
from lib.model.images import hop_samples
from lib.model.pyramid import initialise

SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
CURVES = ("deletion", "insertion")
STRETCH = 1600
"""Samples (100 ms) that are exchanged together."""


def exchanged(inside: np.ndarray, outside: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """`outside` (samples,) with the stretches of `mask` (stretch,) bool from `inside`; a fade of 5 ms at every seam keeps the
    exchange itself from being the anomaly."""
    weight = np.pad(np.repeat(mask.astype(float), STRETCH), (40, 39), mode="edge")
    weight = np.convolve(weight, np.ones(80) / 80, mode="valid")
    return (outside * (1 - weight) + inside * weight).astype(np.float32)


def exchange_curves(real: np.ndarray, fake: np.ndarray, orders: dict[str, np.ndarray],
                    score: Callable[[np.ndarray], float]) -> pd.DataFrame:
    """Both curves of an aligned pair (samples,), whole stretches long: `curve, order, share, relative`.

    deletion: stretches of the fake become real; insertion: stretches of the real clip become fake; each in every one of `orders`
    (stretch,), first to last. relative is 0 at the real clip's `score` and 1 at the fake's. What one order deletes, its reverse
    inserts: insertion at a share is deletion in the reverse order at the rest, the same sound, and is scored once.
    """
    found: dict[bytes, float] = {}

    def scored(synthetic: np.ndarray) -> float:
        if synthetic.tobytes() not in found:
            found[synthetic.tobytes()] = score(exchanged(fake, real, synthetic))
        return found[synthetic.tobytes()]

    count, rows = len(real) // STRETCH, []
    base, top = scored(np.zeros(count, dtype=bool)), scored(np.ones(count, dtype=bool))
    for curve in CURVES:
        for name, order in orders.items():
            for share in SHARES:
                synthetic = np.full(count, curve == "deletion")
                synthetic[order[: round(share * count)]] ^= True
                rows.append((curve, name, share, (scored(synthetic) - base) / (top - base)))
    return pd.DataFrame(rows, columns=["curve", "order", "share", "relative"])


def faithfulness(study, detector: Detector, experiment: str, generators: tuple[str, ...], limit: int = 10) -> pd.DataFrame:
    """`exchange_curves` of vocoded test clips and their real parents (the first `limit`): `clip_id, parent, generator` and those.

    Stretches go in the order of the map (most anomalous first), its reverse (least first), of energy (loudest first), or at
    random. The exchange happens before the shared channel, with the fake's own level; pairs whose fake does not score above
    the real clip say nothing and are left out.
    """
    from lib.data.audio import read_audio
    from lib.data.channel import apply_channel, speech_bounds
    from lib.paths import DATA

    table = study.test(experiment)
    table = table[table[experiment] == "test"]
    parents = table[table.role == "bonafide"].head(limit).set_index("clip_id").path
    copies = table[table.parent.isin(parents.index) & table.generator.isin(generators)]
    channel = study.settings.channel

    def score(audio: np.ndarray) -> float:
        return detector.score_prepared(*apply_channel(audio, channel))

    def curves(copy) -> pd.DataFrame | None:
        real, fake = (read_audio(DATA / path, strict=False)[0] for path in (parents[copy.parent], copy.path))
        count = min(len(real), len(fake)) // STRETCH
        real, fake = real[: count * STRETCH], fake[: count * STRETCH]
        explained = detector.explain_prepared(*apply_channel(fake, channel))
        if explained.anomaly <= score(real):
            return None
        grown = np.repeat(explained.map.mean(0), hop_samples(study.settings.view))
        start = speech_bounds(fake, channel)[0]
        # What the channel trims has no map; it counts as pauses do, the least anomalous.
        line = np.full(len(fake), grown.min())
        line[start : start + len(grown)] = grown[: len(fake) - start]
        order = np.argsort(-line.reshape(count, STRETCH).mean(1), kind="stable")
        orders = {"map": order, "least": order[::-1], "energy": np.argsort(-(fake**2).reshape(count, STRETCH).mean(1), kind="stable"),
                  "random": seeds.stream(0, "exchange", copy.clip_id).permutation(count)}
        return exchange_curves(real, fake, orders, score).assign(clip_id=copy.clip_id, parent=copy.parent, generator=copy.generator)

    found = [one for one in study.side_by_side(curves, list(copies.itertuples())) if one is not None]
    names = ["clip_id", "parent", "generator", "curve", "order", "share", "relative"]
    return pd.concat(found, ignore_index=True)[names] if found else pd.DataFrame(columns=names)


def curve_areas(curves: pd.DataFrame, resamples: int = 1000) -> pd.DataFrame:
    """Mean area under the curves of `faithfulness`, and how far it is from the random order's on the same clips, with 95 %
    intervals that resample real parents: `curve, order, area, low, high, minus random, minus low, minus high, clips`.

    A faithful map has a smaller area than random under deletion, and a larger one under insertion. With one parent the
    intervals are NaN; without curves there are no rows.
    """
    columns = ["curve", "order", "area", "low", "high", "minus random", "minus low", "minus high", "clips"]
    if curves.empty:
        return pd.DataFrame(columns=columns)
    areas = curves.groupby(["curve", "order", "parent", "clip_id"], sort=False)[["share", "relative"]].apply(
        lambda part: float(np.trapezoid(part.relative, part.share))).unstack([0, 1])
    parents = areas.index.get_level_values("parent")
    rows = []
    for curve, order in areas.columns:
        own, chance = areas[curve, order].to_numpy(), areas[curve, "random"].to_numpy()
        row = {"curve": curve, "order": order, "area": own.mean(), "low": np.nan, "high": np.nan,
               "minus random": own.mean() - chance.mean(), "minus low": np.nan, "minus high": np.nan, "clips": len(own)}
        if parents.nunique() > 1:
            for names, statistic in ((("low", "high"), lambda one, _: one.mean()),
                                     (("minus low", "minus high"), lambda one, other: one.mean() - other.mean())):
                row |= zip(names, metrics.clustered_bootstrap(statistic, own, chance, parents, parents, resamples))
        rows.append(row)
    return pd.DataFrame(rows, columns=columns)


def randomised_maps(study, detector: Detector, bonafide: list[tuple[np.ndarray, np.ndarray]],
                    clips: list[tuple[np.ndarray, np.ndarray]]) -> pd.DataFrame:
    """Rank correlation of each clip's map with that of the same detector whose student, or teacher, has random weights
    (scaling refitted on `bonafide`): `randomised, correlation`. Near 1 would mean that training leaves no trace."""
    import copy

    rows = []
    for name in ("student", "teacher"):
        other = Detector(detector.settings, copy.deepcopy(detector.teacher), copy.deepcopy(detector.student))
        network = getattr(other, name)
        initialise(network, 1, "randomised")
        other.fit_scaling(bonafide, [])
        for audio, active in clips:
            one, two = (which.explain_prepared(audio, active).map.ravel() for which in (detector, other))
            rows.append((name, float(scipy.stats.spearmanr(one[::7], two[::7])[0])))
    table = pd.DataFrame(rows, columns=["randomised", "correlation"])
    return table.groupby("randomised", sort=False).correlation.agg(["mean", "min", "max"]).reset_index()


def energy_correlation(detector: Detector, clips: list[tuple[np.ndarray, np.ndarray]], kinds: tuple[str, ...]) -> pd.DataFrame:
    """Mean rank correlation over clips of the map with the image's log-magnitude, for each kind of scaling."""
    rows = []
    for kind in kinds:
        found = []
        for audio, active in clips:
            explanation = detector.explain_prepared(audio, active, kind=kind)
            level = explanation.image[0][:, explanation.active].ravel()
            found.append(scipy.stats.spearmanr(explanation.map[:, explanation.active].ravel()[::5], level[::5])[0])
        rows.append({"scaling": kind, "correlation with log-energy": float(np.mean(found)), "clips": len(found)})
    return pd.DataFrame(rows)


