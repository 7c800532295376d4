"""Owns the checks of a map's honesty: deletion curves, randomised networks, correlation with energy."""

from __future__ import annotations

import numpy as np
import pandas as pd
import scipy.stats

from lib import seeds
from lib.detector import Detector
from lib.pyramid import initialise
from lib.spectrograms import hop_samples

SHARES = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)


def deletion_curve(study, detector: Detector, experiment: str, generators: tuple[str, ...], limit: int = 10) -> pd.DataFrame:
    """Replace more and more 100 ms stretches of vocoded clips by the real parent's: `clip_id, generator, order, share,
    relative`, where relative is 1 at the untouched fake and 0 at the real clip.

    Stretches go in the order of the map (most anomalous first), of energy, or at random. The exchange happens before the
    shared channel, with the fake's own level; pairs whose fake does not score above the real clip say nothing and are
    left out.
    """
    from lib.audio import read_audio
    from lib.channel import apply_channel, speech_bounds
    from lib.paths import DATA

    table = study.test(experiment)
    table = table[table[experiment] == "test"]
    parents = table[table.role == "bonafide"].head(limit)
    channel, step = study.settings.channel, 1600
    rows = []
    for parent in parents.itertuples():
        real = read_audio(DATA / parent.path, strict=False)[0]
        for copy in table[(table.parent == parent.clip_id) & table.generator.isin(generators)].itertuples():
            fake = read_audio(DATA / copy.path, strict=False)[0]
            size = min(len(real), len(fake)) // step * step
            one, two = real[:size], fake[:size]
            prepared, active = apply_channel(two, channel)
            explained = detector.explain_prepared(prepared, active)
            base = detector.score_prepared(*apply_channel(one, channel))
            if explained.anomaly <= base:
                continue
            start = speech_bounds(two, channel)[0]
            line = np.zeros(size)
            grown = np.repeat(explained.map.mean(0), hop_samples(study.settings.view))[: size - start]
            line[start : start + len(grown)] = grown
            orders = {"map": -line.reshape(-1, step).mean(1), "energy": -(two**2).reshape(-1, step).mean(1),
                      "random": seeds.stream(0, "deletion", copy.clip_id).random(size // step)}
            for name, key in orders.items():
                order = np.argsort(key, kind="stable")
                for share in SHARES:
                    mask = np.zeros(size // step, dtype=bool)
                    mask[order[: round(share * len(order))]] = True
                    # A fade of 5 ms at every seam keeps the exchange itself from being the anomaly.
                    weight = np.convolve(np.repeat(mask.astype(float), step), np.ones(80) / 80, mode="same")
                    mixed = (two * (1 - weight) + one * weight).astype(np.float32)
                    anomaly = detector.score_prepared(*apply_channel(mixed, channel))
                    rows.append((copy.clip_id, copy.generator, name, share, (anomaly - base) / (explained.anomaly - base)))
    return pd.DataFrame(rows, columns=["clip_id", "generator", "order", "share", "relative"])


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


