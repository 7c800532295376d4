"""Owns results: a row a generator, a row a baseline, a score file whole."""

from __future__ import annotations

import importlib
import math
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import norm

from lib.data.scorefiles import FEW_TRIALS, LABELS, ScoreFileError, _refuse, _refuse_some, read_key, read_scores
from lib.evaluate import metrics
from lib.evaluate.baselines import Baseline
from lib.evaluate.metrics import detection_curve, equal_error_rate
from lib.paths import atomic


def clusters(table: pd.DataFrame, experiment: str) -> np.ndarray:
    """Cluster of each clip for the bootstrap: the speaker, or with one speaker the real clip that pairs share."""
    parents = np.where(table.parent == "", table.clip_id, table.parent)
    return parents if experiment == "single" else np.asarray(table.speaker)


def per_generator(scores: pd.DataFrame, experiment: str, resamples: int, split: str = "test", seed: int = 0,
                  intervals: bool = True) -> pd.DataFrame:
    """One row a generator and control: AUC and EER (fake = positive) with 95 % clustered bootstrap intervals.

    split "test": test fakes against the bona fide test clips; "development": development fakes against the development clips.
    """
    fakes = scores[(scores[experiment] == split) & (scores.role != "bonafide")]
    real = scores[(scores.role == "bonafide") & (scores[experiment] == ("test" if split == "test" else "validation"))]
    rows = []
    for (role, family, name), group in fakes.groupby(["role", "family", "generator"], sort=False):
        b, s = real.score.to_numpy(), group.score.to_numpy()
        row = {"experiment": experiment, "kind": role, "family": family, "generator": name, "clips": len(group),
               "auc": metrics.area_under_curve(b, s), "eer": metrics.equal_error_rate(b, s)[0]}
        if intervals:
            given = (b, s, clusters(real, experiment), clusters(group, experiment), resamples)
            row["auc_low"], row["auc_high"] = metrics.clustered_bootstrap(metrics.area_under_curve, *given, seed=seed)
            row["eer_low"], row["eer_high"] = metrics.clustered_bootstrap(
                lambda one, two: metrics.equal_error_rate(one, two)[0], *given, seed=seed)
        rows.append(row)
    order = {"copysynth": 0, "tts": 1, "spoof": 2, "control": 3}
    return pd.DataFrame(rows).sort_values("kind", key=lambda kind: kind.map(order), kind="stable").reset_index(drop=True)


def summary_row(table: pd.DataFrame) -> dict[str, float]:
    """Means over generators: copy-synthesis (the headline), text to speech, all fakes, lowest; and the resample control."""
    fakes = table[table.kind != "control"]
    mean = lambda rows: float(rows.auc.mean()) if len(rows) else float("nan")  # noqa: E731
    control = table[table.generator == "control_resample"].auc
    return {"copysynth": mean(table[table.kind == "copysynth"]), "tts": mean(table[table.kind == "tts"]), "all": mean(fakes),
            "lowest": float(fakes.auc.min()), "control": float(control.iloc[0]) if len(control) else float("nan")}


@dataclass(frozen=True)
class Entry:
    """A baseline of the registry: `factory()` makes a new one, `factory(pyramid)` where it needs a teacher's."""

    title: str
    kind: str  # trivial, one-class (fit on bona fide clips), ablation (of the study's own) or supervised (fit on spoof clips too)
    name: str  # module:class, imported when first needed
    needs_teacher: str = ""  # "features" or "readings": which pyramid of the teacher the factory is given

    def factory(self, *arguments: object, **options: object) -> Baseline:
        module, _, name = self.name.partition(":")
        return getattr(importlib.import_module(module), name)(*arguments, **options)


BASELINES = {
    "trivial_numbers": Entry("Trivial numbers, z-score", "trivial", "lib.evaluate.baselines:TrivialNumbers"),
    "lfcc_gmm": Entry("LFCC, Gaussian mixture", "one-class", "lib.evaluate.baselines:LfccGmm"),
    "spectrogram_svm": Entry("Spectrogram one-class SVM", "one-class", "lib.evaluate.baselines:SpectrogramSvm"),
    "spectrogram_mahalanobis": Entry("Spectrogram Mahalanobis", "one-class", "lib.evaluate.baselines:SpectrogramMahalanobis"),
    "autoencoder": Entry("Convolutional autoencoder", "one-class", "lib.evaluate.baseline_networks:Autoencoder"),
    "deep_svdd": Entry("Deep SVDD", "one-class", "lib.evaluate.baseline_networks:DeepSvdd"),
    "teacher_mahalanobis": Entry("Teacher Gaussian (PaDiM)", "one-class", "lib.evaluate.baseline_networks:TeacherMahalanobis", "features"),
    "teacher_knn": Entry("Teacher neighbours (PatchCore)", "one-class", "lib.evaluate.baseline_networks:TeacherKnn", "features"),
    "teacher_readings": Entry("Teacher's readings, no student", "ablation", "lib.evaluate.baseline_networks:TeacherReadings", "readings"),
    "supervised_resnet": Entry("Supervised ResNet", "supervised", "lib.evaluate.supervised:SupervisedResNet"),
    "supervised_lcnn": Entry("Supervised LCNN on LFCC", "supervised", "lib.evaluate.supervised:SupervisedLcnn"),
}
"""Every baseline by the name it has in tables, simplest first."""


def _joined(score_path: Path, key_path: Path | None) -> pd.DataFrame:
    """clip_id, score, label, attack of exactly the clips of the key, or of its `eval` subset if any."""
    scores = read_scores(score_path)
    if key_path is None:
        _refuse(score_path, [] if "label" in scores else ["expected labels, found none: name the key too"])
        return scores
    key = read_key(key_path)
    wanted = key[key["subset"] == "eval"] if (key["subset"] == "eval").any() else key
    missing = wanted.loc[~wanted["clip_id"].isin(scores["clip_id"]), "clip_id"].tolist()
    extra = scores.loc[~scores["clip_id"].isin(key["clip_id"]), "clip_id"].tolist()
    if missing or extra:
        raise ScoreFileError(
            f"{score_path}: expected the {len(wanted)} clips of {key_path}, found {len(missing)} missing "
            f"{missing[:3]} and {len(extra)} unknown {extra[:3]}. Score every clip of the key and no other; "
            "compare spelling, file extension and folders of the ids.")
    table = wanted.merge(scores, on="clip_id", suffixes=("", "_scored"), validate="one_to_one")
    if "label_scored" in table:
        differ = table.loc[table["label"] != table["label_scored"], "clip_id"]
        _refuse_some(score_path, f"the labels of {key_path}", differ, "One of the two is out of date.")
        table["attack"] = table["attack"].where(table["attack"] != "", table["attack_scored"])
    return table


def _warnings(bonafide: np.ndarray, spoof: np.ndarray, eer: float) -> list[str]:
    found = []
    if eer > 0.5:
        found.append(f"EER {100 * eer:.1f} %: scores look inverted: higher must mean bona fide")
    for label, scores in zip(LABELS, (bonafide, spoof), strict=True):
        if scores.size < FEW_TRIALS:
            found.append(f"few trials: {scores.size} {label}, each {100 / scores.size:.1f} % of its rate")
    distinct = np.unique(np.concatenate([bonafide, spoof])).size
    if distinct < 3:
        found.append(f"only {distinct} distinct scores: these look like decisions, not scores")
    return found


def _against_one_attack(attack: str, bonafide: np.ndarray, spoof: np.ndarray) -> dict:
    eer = cost = math.nan  # where the clips of this attack and all bona fide clips share one score
    with suppress(metrics.MetricError):
        eer, cost = metrics.equal_error_rate(bonafide, spoof)[0], metrics.min_dcf(bonafide, spoof)
    return {"attack": attack, "spoof": spoof.size, "eer": eer,
            "auc": metrics.area_under_curve(bonafide, spoof), "min_dcf": cost}


def evaluate(score_path: str | os.PathLike, key_path: str | os.PathLike | None = None) -> dict:
    """Every number of one score file; without a key, the labels of an asvspoof2019 file are used.

    Returns bonafide and spoof (counts), eer, eer_threshold, auc, min_dcf, act_dcf, cllr, attacks (a list of
    dicts: attack, spoof, eer, auc, min_dcf against all bona fide clips), warnings (sentences). Rates lie in
    [0, 1], cllr is in bits; act_dcf and cllr mean something for calibrated scores only. Or ScoreFileError.
    """
    table = _joined(Path(score_path), None if key_path is None else Path(key_path))
    bonafide, spoof = (table.loc[table["label"] == label, "score"].to_numpy() for label in LABELS)
    if not (bonafide.size and spoof.size):
        raise ScoreFileError(f"{score_path}: expected both classes, found {bonafide.size} bonafide and "
                             f"{spoof.size} spoof clips. Add the other class: one alone has no error rate.")
    try:
        eer, threshold = metrics.equal_error_rate(bonafide, spoof)
        attacks = [_against_one_attack(attack, bonafide, scores.to_numpy())
                   for attack, scores in table[table["label"] == "spoof"].groupby("attack")["score"]]
        rest = {name: getattr(metrics, name)(bonafide, spoof) for name in ("min_dcf", "act_dcf", "cllr")}
    except metrics.MetricError as error:
        raise ScoreFileError(f"{score_path}: {error}") from error
    return {"bonafide": bonafide.size, "spoof": spoof.size, "eer": eer, "eer_threshold": threshold,
            "auc": metrics.area_under_curve(bonafide, spoof), **rest, "attacks": attacks,
            "warnings": _warnings(bonafide, spoof, eer)}


TICKS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)


def write_det(score_path: str | os.PathLike, key_path: str | os.PathLike | None, target: str | os.PathLike) -> None:
    """Draw all spoof clips and each attack against all bona fide clips into `target` (.png or .svg).

    The files are those that lib.evaluate.results.evaluate accepted; it has the checks.
    """
    table = read_scores(score_path)
    if key_path is not None:
        key = read_key(key_path)
        key = key[key["subset"] == "eval"] if (key["subset"] == "eval").any() else key
        table = key.merge(table[["clip_id", "score"]], on="clip_id", validate="one_to_one")
    bonafide, spoof = (table[table["label"] == label] for label in ("bonafide", "spoof"))
    figure = Figure((6, 5.6), dpi=120, layout="constrained")
    axis = figure.subplots()
    attacks = [(name, group) for name, group in spoof.groupby("attack") if name]
    groups = [("all", spoof)] + (attacks if 1 < len(attacks) <= 9 else [])
    lowest = max(TICKS[0], 0.5 / max(len(bonafide), 1))
    for name, group in groups:
        real, fake = bonafide["score"].to_numpy(), group["score"].to_numpy()
        miss, alarm, _ = detection_curve(real, fake)
        rate = equal_error_rate(real, fake)[0]
        drawn = [norm.ppf(np.clip(values, lowest / 2, 1 - lowest / 2)) for values in (alarm, miss)]
        axis.step(*drawn, where="post", label=f"{name}: EER {rate:.2%}", linewidth=2 if name == "all" else 1)
    ticks = [value for value in TICKS if value >= lowest / 2]
    axis.plot(norm.ppf([lowest, 0.8]), norm.ppf([lowest, 0.8]), color="grey", linewidth=0.8, linestyle=":")
    for which in ("x", "y"):
        axis.set(**{f"{which}ticks": norm.ppf(ticks), f"{which}ticklabels": [f"{100 * value:g}" for value in ticks],
                    f"{which}lim": norm.ppf([lowest / 2, 0.9])})
    axis.set(xlabel="fakes accepted (%)", ylabel="real speech refused (%)", title=Path(score_path).name)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    with atomic(target) as temporary:
        figure.savefig(temporary, format=Path(target).suffix[1:] or "png")
