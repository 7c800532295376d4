"""Owns results: tables that are made of score frames (lib.data.scorefiles) alone, and a score file of the field, whole.
Nothing here needs audio or torch, so that `recheck` can rebuild the tables of a run from its scores."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import t

from lib.data import scorefiles
from lib.data.scorefiles import LABELS, ScoreFileError, clusters, parts_of, read_labelled
from lib.evaluate import metrics
from lib.evaluate.metrics import Interval
from lib.paths import atomic


class Sides(NamedTuple):
    """Real clips and fakes of one system and split: rows of a frame, anomalies (clip, seed), clusters (clip,)."""

    real: pd.DataFrame
    fake: pd.DataFrame
    of_real: np.ndarray
    of_fake: np.ndarray
    real_clusters: np.ndarray
    fake_clusters: np.ndarray

    @classmethod
    def of(cls, frame: pd.DataFrame) -> Sides:
        """Of a score frame; clips that a seed did not score are left out."""
        wide = frame.pivot(index="clip_id", columns="seed", values="anomaly").dropna()
        rows = frame.drop_duplicates("clip_id").set_index("clip_id").loc[wide.index].reset_index()
        real, names, anomalies = (rows.role == "bonafide").to_numpy(), clusters(rows), wide.to_numpy()
        return cls(*(rows[mask].reset_index(drop=True) for mask in (real, ~real)), anomalies[real], anomalies[~real],
                   names[real], names[~real])

    def influence(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """AUC of each seed and generator, and what each real clip and fake adds to their mean (auc_influence)."""
        names, seeds = np.unique(self.fake.generator), self.of_real.shape[1]
        values, on_real, on_fake = np.zeros((seeds, len(names))), np.zeros(len(self.real)), np.zeros(len(self.fake))
        for column, name in enumerate(names):
            mask = (self.fake.generator == name).to_numpy()
            for seed in range(seeds):
                values[seed, column], *parts = metrics.auc_influence(-self.of_real[:, seed], -self.of_fake[mask, seed])
                on_real += parts[0] / values.size
                on_fake[mask] += parts[1] / values.size
        return values, on_real, on_fake


def _with_seeds(variance: float, freedom: float, values: np.ndarray) -> tuple[float, float]:
    """Variance over clusters and over seeds of a mean over seeds (seed,), with Satterthwaite's degrees of freedom."""
    if len(values) < 2 or np.ptp(values) == 0:
        return variance, freedom
    own = values.var(ddof=1) / len(values)
    return variance + own, (variance + own) ** 2 / (variance**2 / freedom + own**2 / (len(values) - 1))


def mean_auc(sides: Sides) -> tuple[Interval, float]:
    """Mean AUC over generators and seeds with a 95 % interval over clusters and seeds, and the least generator's."""
    values, *parts = sides.influence()
    spread = metrics.cluster_variance(*parts, sides.real_clusters, sides.fake_clusters)
    sizes = [metrics.effective_clips(sides.of_real.mean(1), sides.real_clusters)]
    for _, group in sides.fake.groupby("generator"):
        sizes.append(metrics.effective_clips(sides.of_fake[group.index].mean(1), sides.fake_clusters[group.index]))
    spread = _with_seeds(*spread, values.mean(axis=1))
    return metrics.auc_interval(float(values.mean()), *spread, min(sizes)), float(values.mean(axis=0).min())


def mean_eer(sides: Sides, resamples: int = 0, seed: int = 0) -> Interval:
    """The same of the EER, by a bootstrap of clusters and seeds; without resamples there is no interval (NaN)."""
    masks = [(sides.fake.generator == name).to_numpy() for name in sides.fake.generator.unique()]
    pairs = [[(-real, -fake[mask]) for mask in masks] for real, fake in zip(sides.of_real.T, sides.of_fake.T)]
    value = float(np.mean([metrics.equal_error_rate(*pair)[0] for of_seed in pairs for pair in of_seed]))
    if not resamples:
        return Interval(value, math.nan, math.nan)
    times, others = metrics.bootstrap_weights(sides.real_clusters, sides.fake_clusters, resamples, seed)
    rates = np.array([np.nanmean([metrics.resampled_error_rates(*pair, times, others[:, mask])
                                  for pair, mask in zip(of_seed, masks)], axis=0) for of_seed in pairs])
    drawn = np.random.default_rng(seed).integers(len(pairs), size=rates.shape)
    k = max(2, min(len(set(names)) for names in (sides.real_clusters, sides.fake_clusters)))
    low, high = metrics.percentile_interval(np.take_along_axis(rates, drawn, axis=0).mean(axis=0), k)
    # A bootstrap of a perfect sample has no width: there, the exact bound for no error.
    bound = 1 - 0.025 ** (1 / metrics.effective_clips(sides.of_real.mean(1), sides.real_clusters))
    return Interval(value, low, high if value else max(high, bound))


def within_voices(sides: Sides) -> pd.Series:
    """Mean AUC over generators and seeds of each voice's real clips against its own copies; without any, all fakes."""
    values = {}
    for voice, group in sides.real.groupby("speaker"):
        own = (sides.fake.speaker == voice).to_numpy()
        own, mine = own if own.any() else np.ones(len(own), dtype=bool), group.index.to_numpy()
        part = Sides(group, sides.fake[own], sides.of_real[mine], sides.of_fake[own], group.speaker, own)
        values[voice] = part.influence()[0].mean()
    return pd.Series(values, name="auc")


def _by_generator(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    for name in frame.generator[frame.role != "bonafide"].unique():
        yield name, frame[(frame.role == "bonafide") | (frame.generator == name)]


def _rates(sides: Sides, resamples: int) -> dict[str, float]:
    names, (auc, lowest) = ("auc", "auc_low", "auc_high", "eer", "eer_low", "eer_high", "lowest"), mean_auc(sides)
    return dict(zip(names, [*auc, *mean_eer(sides, resamples), lowest]))


def summary(frame: pd.DataFrame, resamples: int = 0) -> pd.DataFrame:
    """A row a system, experiment and family (`parts_of`) of the test: AUC and EER, means over generators and seeds with
    intervals (of the EER where there are resamples), the least AUC of a generator, and the mean AUC within voices."""
    rows, names = [], ["system", "kind", "experiment"]
    for keys, group in frame[frame.split == "test"].groupby(names, sort=False):
        for name, part in parts_of(group):
            voices, within = within_voices(sides := Sides.of(part)), [math.nan] * 3
            if len(voices) > 1:
                exact = metrics.auc_interval(voices.mean(), 0, 1, len(voices))  # where all voices are alike
                within = metrics.paired(voices) if np.ptp(voices) else exact
            row = dict(zip(names, keys)) | {"fakes": name, "seeds": part.seed.nunique()} | _rates(sides, resamples)
            rows.append(row | {"within voices": within[0], "within_low": np.clip(within[1], 0, 1),
                               "within_high": np.clip(within[2], 0, 1)})
    return pd.DataFrame(rows)


def per_generator(scores: pd.DataFrame, experiment: str, resamples: int = 0, split: str = "test", seed: int = 0,
                  intervals: bool = True) -> pd.DataFrame:
    """A row a generator and control: AUC and EER with 95 % intervals (of the EER where there are resamples).

    scores: a score frame of one system (means over its seeds), or rows of the clip table with `anomaly`. split "test":
    test fakes against bona fide test clips; "development": development fakes against the development clips."""
    frame = scores if "split" in scores else scorefiles.score_frame(scores, experiment)
    frame, rows = frame[(frame.experiment == experiment) & (frame.split == split)], []
    for name, part in _by_generator(frame):
        fakes = part[part.role != "bonafide"]
        row = {"experiment": experiment, "kind": fakes.role.iloc[0], "family": fakes.family.iloc[0], "generator": name,
               "clips": fakes.clip_id.nunique()} | _rates(Sides.of(part), resamples if intervals else 0)
        rows.append({key: value for key, value in row.items() if key != "lowest" and (intervals or "_" not in key)})
    order = [*scorefiles.ROLES, "control"].index
    return pd.DataFrame(rows).sort_values("kind", key=lambda kinds: kinds.map(order), kind="stable", ignore_index=True)


def summary_row(table: pd.DataFrame) -> dict[str, float]:
    """Means over a table of generators: copy-synthesis, text to speech, all fakes, lowest; and the resample control."""
    fakes, control = table[table.kind != "control"], table[table.generator == "control_resample"]
    kinds = {"copysynth": fakes[fakes.kind == "copysynth"], "tts": fakes[fakes.kind == "tts"], "all": fakes}
    return {name: float(rows.auc.mean()) for name, rows in kinds.items()} | {
        "lowest": float(fakes.auc.min()), "control": float(control.auc.mean())}


def per_voice(frame: pd.DataFrame, experiment: str = "multi") -> pd.DataFrame:
    """One row a test voice: where it is from, its real clips, and its own copies against them, mean over seeds."""
    part = frame[(frame.experiment == experiment) & (frame.split == "test")]
    part = part[part.role.isin(["bonafide", "copysynth"])]
    auc = pd.DataFrame({name: within_voices(Sides.of(each)) for name, each in _by_generator(part)})
    real = part[part.role == "bonafide"].groupby("speaker")
    table = pd.DataFrame({"source": real.source.first(), "bona fide clips": real.clip_id.nunique(),
                          "mean AUC": auc.mean(axis=1), "lowest AUC": auc.min(axis=1)})
    return table.rename_axis("voice").reset_index()


def paired_table(frame: pd.DataFrame, ours: str = "") -> pd.DataFrame:
    """Ours (default: of the kind "ours") minus each other system on the same clips, mean over generators and seeds: the
    difference of AUC with an interval over clusters; with several voices also the mean difference within voices, how
    many agree with its sign, and p by sign flips. `p (Holm)` corrects those, with one voice t tests over sentences."""
    rows, ours = [], ours or frame.system[frame.kind == "ours"].iloc[0]
    for experiment, group in frame[frame.split == "test"].groupby("experiment", sort=False):
        for fakes, role in (("all copies", "copysynth"), ("all speech synthesis", "tts")):
            part = group[group.role.isin(["bonafide", role])]
            for (system, kind), theirs in part[part.system != ours].groupby(["system", "kind"], sort=False):
                if (part.role == role).any():
                    rows.append({"experiment": experiment, "fakes": fakes, "baseline": system, "kind": kind,
                                 **_difference(part[part.system == ours], theirs)})
    table = pd.DataFrame(rows)
    table["p (Holm)"] = metrics.holm(table["p (sign flips)"].fillna(table["p (t)"]))
    return table


def _difference(mine: pd.DataFrame, theirs: pd.DataFrame) -> dict[str, float]:
    ours, other = Sides.of(mine), Sides.of(theirs)
    if not ours.real.clip_id.equals(other.real.clip_id) or not ours.fake.clip_id.equals(other.fake.clip_id):
        raise metrics.MetricError(f"{theirs.system.iloc[0]} scored other clips than {mine.system.iloc[0]}")
    (values, *parts), (others, *rest) = ours.influence(), other.influence()
    gap, gaps = values.mean() - others.mean(), [a - b for a, b in zip(parts, rest)]
    spread = metrics.cluster_variance(*gaps, ours.real_clusters, ours.fake_clusters)
    if len(values) == len(others):
        spread = _with_seeds(*spread, values.mean(axis=1) - others.mean(axis=1))
    error, voices = max(spread[0] ** 0.5, 1e-12), within_voices(ours) - within_voices(other)
    # Where no pair of clips is ordered differently, the exact bound for clusters that were not seen.
    half = t.ppf(0.975, spread[1]) * error if spread[0] else 1 - 0.025 ** (1 / len(set(ours.real_clusters)))
    row = {"difference": gap, "low": gap - half, "high": gap + half, "p (t)": 2 * t.sf(abs(gap) / error, spread[1])}
    if len(voices) < 2:
        return row | {"within voices": math.nan, "voices agreeing": "", "p (sign flips)": math.nan}
    test = metrics.paired(voices)
    return row | {"within voices": test.difference, "voices agreeing": f"{test.agree} of {test.clusters}",
                  "p (sign flips)": test.p_flips}


def pooling(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean AUC of each "scaling, pooling" (systems) on development fakes, which choose, and on test fakes."""
    rows = []
    for (experiment, system), part in frame.groupby(["experiment", "system"], sort=False):
        early, test = (summary_row(per_generator(part, experiment, 0, split, intervals=False))
                       for split in ("development", "test"))
        rows.append({"experiment": experiment, "scaling": system.split(", ")[0], "pooling": system.split(", ")[1],
                     "development": early["copysynth"], "development tts": early["tts"],
                     **{name: test[name] for name in ("copysynth", "tts", "control")}})
    return pd.DataFrame(rows)


TABLES: dict[str, tuple[str, Callable[[pd.DataFrame, int], pd.DataFrame]]] = {
    "30_per_generator": ("30_scores", lambda frame, resamples: pd.concat(
        [per_generator(frame[frame.kind == "ours"], name, resamples) for name in frame.experiment.unique()])),
    "30_summary": ("30_scores", lambda frame, resamples: summary(frame[frame.kind == "ours"], resamples)),
    "30_baselines": ("30_scores", lambda frame, _: summary(frame)),
    "30_per_voice": ("30_scores", lambda frame, _: per_voice(frame[frame.kind == "ours"])),
    "32_pooling": ("32_scores", lambda frame, _: pooling(frame)),
    "33_seeds": ("30_scores", lambda frame, _: pd.concat(
        [summary(part).assign(seed=seed) for seed, part in frame[frame.kind == "ours"].groupby("seed")])),
    "33_ensemble": ("30_scores", lambda frame, _: summary(frame[frame.kind == "ours"].groupby(
        [name for name in frame if name not in ("seed", "anomaly")]).anomaly.mean().reset_index().assign(seed=-1))),
    "33_paired": ("30_scores", lambda frame, _: paired_table(frame)),
}
"""Tables of a run by name: the score file that each is made of, and how, with so many resamples."""


def recheck(scores: Path | str, tables: Path | str, builders: dict = TABLES, resamples: int = 1000
            ) -> list[tuple[str, float]]:
    """Rebuild the tables of a run from its score files and hold them against the CSV files in `tables`: each with its
    largest difference in any number, infinite where rows, columns or words differ or a file lacks."""
    worst = []
    for name, (source, build) in builders.items():
        files, gap = (Path(scores) / f"{source}.csv.gz", Path(tables) / f"{name}.csv"), math.inf
        if all(path.exists() for path in files):
            text = build(scorefiles.load_scores(files[0]), resamples).to_csv(index=False, float_format="%.6f")
            built, kept = pd.read_csv(io.StringIO(text)), pd.read_csv(files[1])
            numbers = list(built.select_dtypes("number"))
            if list(built) == list(kept) and built.drop(columns=numbers).equals(kept.drop(columns=numbers)):
                gaps = np.abs(built[numbers].fillna(math.inf) - kept[numbers].fillna(math.inf)).fillna(0)
                gap = float(gaps.to_numpy().max(initial=0))
        worst.append((name, gap))
    return worst


def _warnings(sides: dict[str, np.ndarray], eer: float) -> list[str]:
    lines = [f"EER {100 * eer:.1f} %: scores look inverted: higher must mean bona fide"] if eer > 0.5 else []
    lines += [f"few trials: {scores.size} {label}, each {100 / scores.size:.1f} % of its rate"
              for label, scores in sides.items() if scores.size < scorefiles.FEW_TRIALS]
    distinct = np.unique(np.concatenate(list(sides.values()))).size
    return lines + [f"only {distinct} distinct scores: these look like decisions, not scores"] * (distinct < 3)


def evaluate(score_path: str | os.PathLike, key_path: str | os.PathLike | None = None) -> dict:
    """Every number of one score file; without a key, the labels of an asvspoof2019 file are used.

    Returns bonafide and spoof (counts), eer, eer_threshold, auc, min_dcf, act_dcf, cllr, attacks (dicts: attack, spoof,
    eer, auc, min_dcf against all bona fide clips), warnings (sentences). Rates lie in [0, 1], cllr is in bits; act_dcf
    and cllr mean something for calibrated scores only. Or ScoreFileError."""
    table = read_labelled(score_path, key_path)
    bonafide, spoof = (table.loc[table["label"] == label, "score"].to_numpy() for label in LABELS)
    if not (bonafide.size and spoof.size):
        raise ScoreFileError(f"{score_path}: expected both classes, found {bonafide.size} bonafide and "
                             f"{spoof.size} spoof clips. Add the other class: one alone has no error rate.")
    attacks = []
    try:
        for attack, scores in table[table["label"] == "spoof"].groupby("attack")["score"]:
            eer = cost = math.nan  # where the clips of this attack and all bona fide clips share one score
            with suppress(metrics.MetricError):
                eer, cost = metrics.equal_error_rate(bonafide, scores)[0], metrics.min_dcf(bonafide, scores)
            attacks.append({"attack": attack, "spoof": scores.size, "eer": eer,
                            "auc": metrics.area_under_curve(bonafide, scores), "min_dcf": cost})
        eer, threshold = metrics.equal_error_rate(bonafide, spoof)
        rest = {name: getattr(metrics, name)(bonafide, spoof) for name in ("min_dcf", "act_dcf", "cllr")}
    except metrics.MetricError as error:
        raise ScoreFileError(f"{score_path}: {error}") from error
    return {"bonafide": bonafide.size, "spoof": spoof.size, "eer": eer, "eer_threshold": threshold,
            "auc": metrics.area_under_curve(bonafide, spoof), **rest, "attacks": attacks,
            "warnings": table.attrs.get("left_out", []) + _warnings(dict(zip(LABELS, (bonafide, spoof))), eer)}


def write_det(score_path: str | os.PathLike, key_path: str | os.PathLike | None, target: str | os.PathLike) -> None:
    """Draw all spoof clips and each of up to 9 attacks against all bona fide clips into `target` (.png or .svg)."""
    from matplotlib.figure import Figure
    from sklearn.metrics import DetCurveDisplay

    table = read_labelled(score_path, key_path)
    real, spoof = (table[table["label"] == label] for label in LABELS)
    attacks = [pair for pair in spoof.groupby("attack") if pair[0]]
    axis = (figure := Figure((6, 5.6), dpi=120, layout="constrained")).subplots()
    for name, group in [("all", spoof), *(attacks if 1 < len(attacks) <= 9 else [])]:
        both, eer = pd.concat([real, group]), metrics.equal_error_rate(real["score"], group["score"])[0]
        DetCurveDisplay.from_predictions(both["label"] == "bonafide", both["score"], ax=axis, name=f"{name}: {eer:.2%}")
    axis.set(xlabel="fakes accepted", ylabel="real speech refused", title=Path(score_path).name)
    with atomic(target) as temporary:
        figure.savefig(temporary, format=Path(target).suffix[1:] or "png")
