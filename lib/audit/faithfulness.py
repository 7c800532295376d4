"""Owns what maps are read for (notebook 40), the checks of their honesty (notebook 41: deletion and insertion, random
networks, correlation with energy), and the small statistics behind the sliders of notebook 05."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.stats
from matplotlib.figure import Figure

from lib import seeds
from lib.data.audio import read_audio
from lib.data.channel import apply_channel, speech_bounds
from lib.data.clips import crop_start
from lib.data.packages import EMBEDDED, VOICES, package_root, phone_labels
from lib.detector import Detector
from lib.evaluate import metrics
from lib.model.discrepancy import Explanation, band_means
from lib.model.images import hop_samples
from lib.model.pyramid import initialise
from lib.paths import DATA, SHIPPED, clocked
from lib.settings import RATE_HZ

if TYPE_CHECKING:
    from lib.study import Study

PHONE_CLASSES: dict[str, tuple[str, ...]] = {
    # Labels of the msu_ru voice: a doubled consonant is palatalised; vowels differ by stress and place.
    "vowel": ("a", "aa", "ae", "ay", "e", "ee", "ei", "i", "ii", "ih", "o", "oo", "u", "uu", "uj", "ur", "y", "yy",
              "ax"),
    "stop": ("p", "pp", "b", "bb", "t", "tt", "d", "dd", "k", "kk", "g", "gg"),
    "fricative": ("f", "ff", "v", "vv", "s", "ss", "z", "zz", "sh", "zh", "sch", "h", "hh", "x", "xx"),
    "affricate": ("c", "ch"),
    "nasal": ("m", "mm", "n", "nn"),
    "liquid": ("l", "ll", "r", "rr", "j"),
    "silence": ("pau", "sil", "#"),
}
CLASS_OF = {phone: name for name, phones in PHONE_CLASSES.items() for phone in phones}
SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
CURVES = ("deletion", "insertion")
STRETCH = 1600
"""Samples (100 ms) that are exchanged together."""
SLIDERS, SHOWN_S = SHIPPED.parent / "statistics.npz", 2.5
"""What ships of `slider_statistics`, and the seconds of its maps."""


# --- what a map is read for ---------------------------------------------------------------------------------------


def explanations(study: Study, detector: Detector, experiment: str, limit: int) -> Iterator[tuple]:
    """(row of the clip table, explanation) of the first `limit` bona fide test clips and their copies."""
    table = study.test(experiment, only="test")
    parents = set(table[table.role == "bonafide"].clip_id.head(limit))
    copies = (table.role == "copysynth") & table.parent.isin(parents)
    table = table[table.clip_id.isin(parents) | copies]
    for row, clip in zip(table.itertuples(), study.prepared(table)):
        yield row, detector.explain_prepared(*clip)


def frame_kinds(explanation: Explanation) -> dict[str, np.ndarray]:
    """Which frames (frame,) are onsets (the level rises by 6 dB within 40 ms), else voiced or unvoiced (more energy
    below or above 1 kHz)."""
    level = np.exp(2 * (explanation.image[0] * 1.8 - 5.5))  # back from log-magnitude to power
    low, energy = explanation.row_hz < 1000, 10 * np.log10(level.sum(0) + 1e-12)
    back = max(1, round(0.04 / explanation.hop_s))
    onset = explanation.active & (energy - np.concatenate([energy[:1].repeat(back), energy[:-back]]) > 6)
    voiced = level[low].sum(0) > level[~low].sum(0)
    rest = explanation.active & ~onset
    return {"onset": onset, "voiced": rest & voiced, "unvoiced": rest & ~voiced}


def phone_classes(study: Study, clip: tuple, explanation: Explanation) -> dict[str, np.ndarray]:
    """Which frames (frame,) belong to each class of phones; none for a clip without phone labels.

    A clip is a crop that begins at the recording's first active frame, and the channel trims again, so label times are
    shifted by both.
    """
    if clip.corpus != "festvox-ru":
        return {}
    stem = clip.source.removesuffix(".wav")
    whole, _ = read_audio(package_root(EMBEDDED[0]) / VOICES / "wav" / f"{stem}.wav", strict=False)
    audio, _ = read_audio(DATA / clip.path, strict=False)
    shift = (speech_bounds(audio, study.settings.channel)[0] + crop_start(whole)) / RATE_HZ
    labels = phone_labels(stem)
    times = np.arange(explanation.map.shape[1]) * explanation.hop_s + shift
    index = np.minimum(np.searchsorted([end for _, end, _ in labels], times), len(labels) - 1)
    classes = np.array([CLASS_OF.get(labels[i][2], "other") for i in index])
    return {name: classes == name for name in np.unique(classes)}


def map_profiles(study: Study, detector: Detector, experiment: str, limit: int = 24, bands: int = 24) -> pd.DataFrame:
    """Mean map within parts of each clip: `generator, clip_id, by, part, anomaly`; by frequency (Hz, active frames), by
    what a frame is (`frame_kinds`), by class of phone (`phone_classes`)."""
    rows = []
    for clip, explanation in explanations(study, detector, experiment, limit):
        name, line = clip.generator or "bona fide", explanation.map[:, explanation.active].mean(1)
        for part, hertz in zip(np.array_split(line, bands), np.array_split(explanation.row_hz, bands)):
            rows.append((name, clip.clip_id, "frequency", round(float(hertz.mean())), float(part.mean())))
        line = explanation.map.mean(0)
        kinds = {"frame": frame_kinds(explanation), "phone": phone_classes(study, clip, explanation)}
        rows += [(name, clip.clip_id, by, kind, float(line[mask].mean()))
                 for by, masks in kinds.items() for kind, mask in masks.items() if mask.any()]
    return pd.DataFrame(rows, columns=["generator", "clip_id", "by", "part", "anomaly"])


# --- deletion and insertion ---------------------------------------------------------------------------------------


def exchanged(inside: np.ndarray, outside: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """`outside` (samples,) with the stretches of `mask` (stretch,) bool from `inside`; a fade of 5 ms at every seam
    keeps the exchange itself from being the anomaly."""
    weight = np.pad(np.repeat(mask.astype(float), STRETCH), (40, 39), mode="edge")
    weight = np.convolve(weight, np.ones(80) / 80, mode="valid")
    return (outside * (1 - weight) + inside * weight).astype(np.float32)


def exchange_curves(real: np.ndarray, fake: np.ndarray, orders: dict[str, np.ndarray],
                    score: Callable[[np.ndarray], float]) -> pd.DataFrame:
    """Both curves of an aligned pair (samples,), whole stretches long: `curve, order, share, relative`.

    deletion: stretches of the fake become real; insertion: stretches of the real clip become fake; each in every one of
    `orders` (stretch,), first to last. relative is 0 at the real clip's `score` and 1 at the fake's. What one order
    deletes, its reverse inserts: the same sound, which is scored once.
    """
    known: dict[bytes, float] = {}

    def scored(synthetic: np.ndarray) -> float:
        if synthetic.tobytes() not in known:
            known[synthetic.tobytes()] = score(exchanged(fake, real, synthetic))
        return known[synthetic.tobytes()]

    count, rows = len(real) // STRETCH, []
    base, top = scored(np.zeros(count, dtype=bool)), scored(np.ones(count, dtype=bool))
    for curve in CURVES:
        for name, order in orders.items():
            for share in SHARES:
                synthetic = np.full(count, curve == "deletion")
                synthetic[order[: round(share * count)]] ^= True
                rows.append((curve, name, share, (scored(synthetic) - base) / (top - base)))
    return pd.DataFrame(rows, columns=["curve", "order", "share", "relative"])


@clocked("scoring")
def faithfulness(study: Study, detector: Detector, experiment: str, generators: tuple[str, ...],
                 limit: int = 10) -> pd.DataFrame:
    """`exchange_curves` of vocoded test clips and their real parents (the first `limit`), with `clip_id, parent,
    generator`.

    Stretches go in the order of the map (most anomalous first), its reverse (least first), of energy (loudest first),
    or at random. The exchange happens before the shared channel, with the fake's own level; pairs whose fake does not
    score above the real clip say nothing and are left out.
    """
    table, channel = study.test(experiment, only="test"), study.settings.channel
    parents = table[table.role == "bonafide"].head(limit).set_index("clip_id").path
    copies = table[table.parent.isin(parents.index) & table.generator.isin(generators)]

    def score(audio: np.ndarray) -> float:
        return detector.score_prepared(*apply_channel(audio, channel))

    def curves(copied) -> pd.DataFrame | None:
        real, fake = (read_audio(DATA / path, strict=False)[0] for path in (parents[copied.parent], copied.path))
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
        order, loudest = (np.argsort(-values.reshape(count, STRETCH).mean(1), kind="stable")
                          for values in (line, fake**2))
        orders = {"map": order, "least": order[::-1], "energy": loudest,
                  "random": seeds.stream(0, "exchange", copied.clip_id).permutation(count)}
        return exchange_curves(real, fake, orders, score).assign(
            clip_id=copied.clip_id, parent=copied.parent, generator=copied.generator)

    tables = [each for each in study.side_by_side(curves, list(copies.itertuples())) if each is not None]
    names = ["clip_id", "parent", "generator", "curve", "order", "share", "relative"]
    return pd.concat(tables, ignore_index=True)[names] if tables else pd.DataFrame(columns=names)


def curve_areas(curves: pd.DataFrame) -> pd.DataFrame:
    """Area under the curves of `faithfulness`, mean over real parents, and how far it is from the random order's and
    from that of energy on the same clips, each with a 95 % t interval over parents.

    A faithful map has a smaller area than both under deletion, and a larger one under insertion. With one parent the
    intervals are NaN; without curves there are no rows.
    """
    rows = []
    if not curves.empty:
        areas = curves.groupby(["curve", "order", "parent", "clip_id"], sort=False)[["share", "relative"]].apply(
            lambda part: float(np.trapezoid(part.relative, part.share))).unstack([0, 1]).groupby("parent").mean()
        for curve, order in areas.columns:
            own, row = areas[curve, order], {"curve": curve, "order": order}
            for name, less in (("area", 0), ("minus random", areas[curve, "random"]),
                               ("minus energy", areas[curve, "energy"] if (curve, "energy") in areas else np.nan)):
                values = own - less
                known = len(values) > 1 and values.notna().all()
                mean, low, high = metrics.paired(values)[:3] if known else (values.mean(), np.nan, np.nan)
                row |= {name: mean, f"{name} low": low, f"{name} high": high}
            rows.append(row | {"sentences": len(own), "clips": curves.clip_id.nunique()})
    return pd.DataFrame(rows)


# --- sanity -------------------------------------------------------------------------------------------------------


def randomised_maps(detector: Detector, bonafide: list[tuple[np.ndarray, np.ndarray]],
                    clips: list[tuple[np.ndarray, np.ndarray]]) -> pd.DataFrame:
    """Rank correlation of each clip's map with that of the same detector whose student, or teacher, has random weights
    (scaling refitted on `bonafide`): `randomised, mean, min, max`. Near 1 would mean that training leaves no trace."""
    rows = []
    for name in ("student", "teacher"):
        other = Detector(detector.settings, copy.deepcopy(detector.teacher), copy.deepcopy(detector.student))
        initialise(getattr(other, name), 1, "randomised")
        other.fit_scaling(bonafide, [])
        for clip in clips:
            trained, random = (which.explain_prepared(*clip).map.ravel()[::7] for which in (detector, other))
            rows.append((name, float(scipy.stats.spearmanr(trained, random)[0])))
    table = pd.DataFrame(rows, columns=["randomised", "correlation"])
    return table.groupby("randomised", sort=False).correlation.agg(["mean", "min", "max"]).reset_index()


def energy_correlation(detector: Detector, clips: list[tuple[np.ndarray, np.ndarray]],
                       kinds: tuple[str, ...]) -> pd.DataFrame:
    """Mean rank correlation over clips of the map with the image's log-magnitude, a row for each kind of scaling."""
    rows = []
    for kind in dict.fromkeys(kinds):  # each once, whichever kind the detector's own map has
        correlations = []
        for clip in clips:
            explanation = detector.explain_prepared(*clip, kind=kind)
            parts = explanation.image[0], explanation.map
            level, values = (part[:, explanation.active].ravel()[::5] for part in parts)
            correlations.append(scipy.stats.spearmanr(values, level)[0])
        rows.append({"scaling": kind, "correlation with log-energy": float(np.mean(correlations)), "clips": len(clips)})
    return pd.DataFrame(rows)


def slider_statistics(study: Study, experiment: str, most: int = 60) -> dict[str, np.ndarray]:
    """Of an experiment's detector, about 1 MB: `bands/GROUP` (clip, kind, level, band), means of scaled maps over
    active frames, of real speech (fitted, held out, real) and of every copying generator, `most` clips each; and
    `map/GROUP/KIND/LEVEL` (frequency, frame) of one real test clip and of its copies."""
    detector, test = study.detector(experiment), study.test(experiment, only="test")
    real, copies = (test[test.role == role] for role in ("bonafide", "copysynth"))
    longest = real[real.clip_id.isin(copies.parent)].sort_values("seconds", kind="stable")
    parent, saved = longest.clip_id.iloc[-1], {"kinds": np.array(detector.kinds)}
    groups = {"fitted": study.part(experiment, "scaling"), "held out": study.part(experiment, "threshold"),
              "real": real, **dict(list(copies.groupby("generator", sort=False)))}
    for name, clips in groups.items():
        shown = (clips.clip_id == parent) | (clips.parent == parent)
        some, rows = clips[shown | (np.arange(len(clips)) % -(-len(clips) // most) == 0)], []
        for clip_id, clip in zip(some.index, study.prepared(some)):
            picture, levels = detector.clip_residuals(*clip)
            for kind in detector.kinds:
                maps = [detector.scaling.apply(index, values, kind) for index, (values, _) in enumerate(levels)]
                rows.append(band_means([drawn[:, mask] for drawn, (_, mask) in zip(maps, levels)], 6))
                for level, drawn in enumerate(maps if shown[clip_id] else (), 1):
                    frames = round(SHOWN_S / study.settings.view.hop_s * drawn.shape[1] / picture.shape[-1])
                    saved[f"map/{name}/{kind}/{level}"] = drawn[:, :frames].numpy().astype(np.float16)
        saved[f"bands/{name}"] = np.stack(rows).reshape(len(some), len(detector.kinds), len(levels), -1)
    return saved


def slider_panel(saved: dict[str, np.ndarray], level: int = 1, kind: str = "frequency", score: str = "mean",
                 alpha: float = 0.05, copy: str = "world") -> Figure:
    """Maps of one `level` of a real clip and of its `copy`; scores of both groups and the line that a share `alpha` of
    held-out real speech exceeds; the AUC of every generator. `score`: the mean of the map, or the root mean square of
    z, its band means in deviations of fitted real speech (two-sided), or of max(z, 0) (one-sided)."""
    place, figure, scores = saved["kinds"].tolist().index(kind), Figure(figsize=(13, 4), layout="constrained"), {}
    bands = {name[6:]: values[:, place, level - 1] for name, values in saved.items() if name.startswith("bands/")}
    middle, spread = bands["fitted"].mean(0), bands.pop("fitted").std(0) + 1e-9
    for name, values in bands.items():
        z = np.maximum((values - middle) / spread, 0 if score == "one-sided" else -np.inf)
        scores[name] = values.mean(1) if score == "mean" else np.sqrt((z**2).mean(1))
    axes = figure.subplot_mosaic([["real", "all", "auc"], [copy, "all", "auc"]])
    real, held = scores["real"], np.sort(scores.pop("held out"))
    line = held[-max(1, int(alpha * (len(held) + 1)))]
    limits = np.quantile(saved[f"map/real/{kind}/{level}"], (0.5, 0.995)).astype(float)
    edges = np.histogram_bin_edges(np.concatenate([real, scores[copy], held]), 25)
    for name in ("real", copy):
        axes[name].imshow(saved[f"map/{name}/{kind}/{level}"].astype(float), vmin=limits[0], vmax=limits[1],
                          cmap="magma", origin="lower", extent=(0, SHOWN_S, 0.06, 6), aspect="auto")
        axes[name].grid(False)
        axes[name].set(title=f"map of level {level}: {name}", xlabel="time (s)", ylabel="kHz")
        share = np.mean(scores[name] >= line)
        axes["all"].hist(scores[name], edges, alpha=0.6, label=f"{name}: {share:.0%} beyond the line")
    axes["all"].axvline(line, color="black", linestyle="--")
    axes["all"].set(xlabel=f"anomaly ({score})", ylabel="clips", title=f"line: alpha {alpha:g} of held-out real speech")
    axes["all"].legend(loc="upper right")
    aucs = {name: metrics.area_under_curve(-real, -values) for name, values in scores.items() if name != "real"}
    axes["auc"].plot(list(aucs.values()), list(aucs), "o")
    axes["auc"].axvline(0.5, color="grey", linewidth=1)
    axes["auc"].set(xlim=(-0.02, 1.02), xlabel="AUC of each copy (0.5 is guessing)")
    return figure
