"""Owns how well scores separate bona fide from spoof speech, and how sure we may be of it.

Scores go up for bona fide, anomalies for fakes; rates are fractions in [0, 1]. `act_dcf` and `cllr` read scores as
log-likelihood ratios in nats. MetricError: an empty class, NaN or Inf, not one-dimensional.
"""
from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import NamedTuple

import numpy as np
import scipy  # its parts are imported when they are first used

MOST_FLIPPED = 16  # clusters of which all sign flips are made (65,536 of them)


class MetricError(ValueError):
    """Scores, rates or clusters from which no honest number can be computed."""


class Interval(NamedTuple):
    """An estimate with the limits of its confidence interval."""

    value: float
    low: float
    high: float


class Paired(NamedTuple):
    """Mean of one difference a cluster, its t interval, and what two tests say of "no difference"."""

    difference: float
    low: float
    high: float
    agree: int  # clusters whose difference has the sign of the mean
    clusters: int
    p_flips: float  # exact: share of all 2^k sign flips whose mean is as far from 0; NaN above MOST_FLIPPED clusters
    p_t: float  # t test


def _require(holds: bool, expected: str, found: object, remedy: str) -> None:
    if not holds:
        raise MetricError(f"expected {expected}, found {found}. {remedy}")


def _vector(values, name: str) -> np.ndarray:
    try:
        vector = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise MetricError(f"expected numbers as {name}, found {values!r:.60}. Parse them first.") from error
    _require(vector.ndim == 1 and vector.size > 0, f"a non-empty one-dimensional sequence of {name}",
             f"shape {vector.shape}", "Check that the set holds both classes, labelled bonafide and spoof.")
    broken = np.flatnonzero(~np.isfinite(vector))
    _require(not broken.size, f"finite {name}", f"{broken.size} NaN or Inf of {vector.size}, first at index "
             f"{broken[:1].tolist()}", "Find the clip behind it and score it again; do not drop it silently.")
    return vector


def _both(bonafide, spoof) -> tuple[np.ndarray, np.ndarray]:
    return _vector(bonafide, "bonafide scores"), _vector(spoof, "spoof scores")


def _fraction(value: float, name: str) -> float:
    _require(0.0 < value < 1.0, f"{name} strictly between 0 and 1", value, "Write 1 % as 0.01.")
    return float(value)


def detection_curve(bonafide, spoof) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """False rejection rate, false acceptance rate, threshold: each (bonafide + spoof + 1,), as ASVspoof has them.

    Point i rejects the i lowest scores, bona fide first among equal ones (ties are not collapsed); point 0 rejects
    none, at the lowest - 0.001. Raises MetricError, also on constant scores."""
    bonafide, spoof = _both(bonafide, spoof)
    scores = np.concatenate([bonafide, spoof])
    _require(scores.min() < scores.max(), "at least two different scores", f"{scores.size} x {scores[0]:g}",
             "A constant ranks nothing: check that the detector is trained and that the clips differ.")
    order = np.argsort(scores, kind="stable")
    is_bonafide = order < bonafide.size
    frr = np.append(0.0, np.cumsum(is_bonafide) / bonafide.size)
    far = np.append(1.0, (spoof.size - np.cumsum(~is_bonafide)) / spoof.size)
    return frr, far, np.append(scores[order[0]] - 0.001, scores[order])


def equal_error_rate(bonafide, spoof) -> tuple[float, float]:
    """EER in [0, 1] and its threshold (rejected: score at or below it), exactly as ASVspoof computes it.

    The mean of FRR and FAR at the first point of `detection_curve` where they are nearest, not interpolated: below
    about 200 clips it moves in visible steps. Above 0.5 suspect inverted scores. Raises MetricError."""
    frr, far, thresholds = detection_curve(bonafide, spoof)
    nearest = np.argmin(np.abs(frr - far))
    return float((frr[nearest] + far[nearest]) / 2), float(thresholds[nearest])


def _placed(scores: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Twice the number of `others` below each score, ties counting 1/2."""
    others = np.sort(others)
    return np.searchsorted(others, scores, "left") + np.searchsorted(others, scores, "right")


def area_under_curve(bonafide, spoof) -> float:
    """Probability that a bona fide clip outscores a spoof clip, ties counting 1/2 (Mann-Whitney U / nm)."""
    bonafide, spoof = _both(bonafide, spoof)
    return float(_placed(bonafide, spoof).sum() / (2 * bonafide.size * spoof.size))


def _cost_weights(p_spoof: float, c_miss: float, c_fa: float) -> np.ndarray:
    _require(0 < c_miss < np.inf and 0 < c_fa < np.inf, "positive costs", (c_miss, c_fa), "Use 1 and 10.")
    miss, false = c_miss * (1 - _fraction(p_spoof, "p_spoof")), c_fa * p_spoof
    return np.array([miss, false]) / min(miss, false)


def min_dcf(bonafide, spoof, p_spoof: float = 0.05, c_miss: float = 1.0, c_fa: float = 10.0) -> float:
    """Detection cost in [0, 1] at the best threshold of this test: 1 is the better of "accept all" and "reject all".

    min over t of (c_miss (1 - p) FRR(t) + c_fa p FAR(t)) / min(c_miss (1 - p), c_fa p), as in ASVspoof 5."""
    miss, false = _cost_weights(p_spoof, c_miss, c_fa)
    frr, far, _ = detection_curve(bonafide, spoof)
    return float(np.min(miss * frr + false * far))


def act_dcf(bonafide, spoof, p_spoof: float = 0.05, c_miss: float = 1.0, c_fa: float = 10.0) -> float:
    """Detection cost, as `min_dcf`, at the Bayes threshold -ln(c_miss (1 - p) / (c_fa p)), here -0.6419.

    Needs calibrated log-likelihood ratios, and calibrating takes spoof scores: no longer "real speech only"."""
    (bonafide, spoof), (miss, false) = _both(bonafide, spoof), _cost_weights(p_spoof, c_miss, c_fa)
    threshold = -np.log(miss / false)
    return float(miss * np.mean(bonafide < threshold) + false * np.mean(spoof >= threshold))


def cllr(bonafide, spoof) -> float:
    """Cost of log-likelihood ratios in bits: 0 perfect, 1 says nothing, more misleads. Never overflows.

    (mean log2(1 + e^-bonafide) + mean log2(1 + e^spoof)) / 2, Bruemmer & du Preez 2006. Raises MetricError."""
    bonafide, spoof = _both(bonafide, spoof)
    return float((np.logaddexp(0, -bonafide).mean() + np.logaddexp(0, spoof).mean()) / (2 * np.log(2)))


def conformal(calibration, anomaly) -> np.ndarray | float:
    """p-value in (0, 1] of "drawn like the calibration speech" for each anomaly (up = fake); small = fake.

    (1 + number of calibration anomalies >= anomaly) / (calibration clips + 1), on real clips that neither
    training nor scaling saw. Source: Bates et al. 2023. One number for a number. Raises MetricError."""
    calibration = np.sort(_vector(calibration, "calibration anomalies"))
    below = np.searchsorted(calibration, np.asarray(anomaly, dtype=np.float64), "left")
    p_values = (1 + calibration.size - below) / (calibration.size + 1)
    return float(p_values) if np.ndim(anomaly) == 0 else p_values


def clopper_pearson(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Exact interval (low, high) of the rate behind `k` events in `n` independent trials, or MetricError."""
    _require(0 <= k <= n > 0 == k % 1 == n % 1, "whole numbers 0 <= k <= n, n > 0", (k, n), "Count again.")
    interval = scipy.stats.binomtest(int(k), int(n)).proportion_ci(_fraction(level, "level"), method="exact")
    return tuple(map(float, interval))


def holm(p_values) -> np.ndarray:
    """Holm's adjusted p-values in the given order: compare each with the level itself. Or MetricError."""
    p_values = _vector(p_values, "p-values")
    _require(min(p_values) >= 0 and max(p_values) <= 1, "p-values in [0, 1]", p_values, "Compute them again.")
    order = np.argsort(p_values, kind="stable")
    stepped = np.maximum.accumulate(p_values[order] * np.arange(p_values.size, 0, -1))
    return np.minimum(stepped, 1.0)[np.argsort(order)]


def auc_influence(bonafide, spoof) -> tuple[float, np.ndarray, np.ndarray]:
    """AUC and what each bona fide (m,) and spoof clip (n,) adds to it: its share of pairs in the right order less the
    AUC, over the clips of its class (DeLong et al. 1988). Either sums to 0; `cluster_variance` takes them."""
    bonafide, spoof = _both(bonafide, spoof)
    auc = area_under_curve(bonafide, spoof)
    real, fake = _placed(bonafide, spoof) / (2 * spoof.size), 1 - _placed(spoof, bonafide) / (2 * bonafide.size)
    return auc, (real - auc) / real.size, (fake - auc) / fake.size


def _clusters(bonafide_clusters, spoof_clusters, sizes: tuple[int, int]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Number of each clip's cluster, bona fide first, and the strata: clusters with bona fide clips, those without."""
    names = [np.asarray([*map(str, each)]) for each in (bonafide_clusters, spoof_clusters)]
    counts = tuple(each.size for each in names)
    _require(counts == sizes, f"a cluster name for each of {sizes} scores", counts, "Use one table for both.")
    unique, member = np.unique(np.concatenate(names), return_inverse=True)
    real = np.isin(unique, names[0])
    strata = [np.flatnonzero(mask) for mask in (real, ~real) if mask.any()]
    _require(max(map(len, strata)) > 1, "at least 2 clusters", unique.tolist(),
             "One speaker shows no spread between speakers: cluster by parent clip, or add speakers.")
    return member, strata


def cluster_variance(real, spoof, bonafide_clusters, spoof_clusters) -> tuple[float, float]:
    """Variance of a sum of influences (of one AUC, or means and differences of several) whose clips share clusters, and
    its degrees of freedom (Satterthwaite's): the sum over strata of k / (k - 1) times the squared deviations of the k
    cluster totals. Of one AUC this is Obuchowski's estimate (Biometrics 1997). Strata are those of `_clusters`."""
    member, strata = _clusters(bonafide_clusters, spoof_clusters, (len(real), len(spoof)))
    totals = np.bincount(member, np.concatenate([real, spoof]))
    parts = [(np.var(totals[each]) * each.size**2 / (each.size - 1), each.size - 1) for each in strata if each.size > 1]
    variance = sum(part for part, _ in parts)
    freedom = variance**2 / sum(part**2 / k for part, k in parts) if variance > 0 else min(k for _, k in parts)
    return float(variance), float(freedom)


def effective_clips(scores, clusters) -> float:
    """How many independent clips say as much as these clustered ones: n / (1 + (m - 1) rho) with m the mean size of a
    clip's cluster, rho the share of the variance of ranks that lies between clusters (Kish 1965)."""
    ranks, names = scipy.stats.rankdata(scores), np.asarray([*map(str, clusters)])
    _, member, sizes = np.unique(names, return_inverse=True, return_counts=True)
    if sizes.size in (1, ranks.size):
        return float(sizes.size)
    within = np.sum((ranks - (np.bincount(member, ranks) / sizes)[member]) ** 2) / (ranks.size - sizes.size)
    rho = np.clip(1 - within / max(ranks.var(ddof=1), 1e-12), 0, 1)
    return float(ranks.size / (1 + (np.sum(sizes**2) / ranks.size - 1) * rho))


def auc_interval(auc: float, variance: float, freedom: float, pairs: float, level: float = 0.95) -> Interval:
    """Interval of an AUC (or mean of AUCs) on the logit scale with a t quantile, so that it stays within [0, 1].

    Where less than half of one of `pairs` independent pairs (`effective_clips` of the smaller class) is out of order,
    data show no variance: there the exact bound for no event in so many trials, tail^(1 / pairs) (Clopper-Pearson)."""
    tail = (1 - _fraction(level, "level")) / 2
    if min(auc, 1 - auc) * pairs < 0.5:
        bound = tail ** (1 / pairs)
        return Interval(auc, bound, 1.0) if auc > 0.5 else Interval(auc, 0.0, 1 - bound)
    half = scipy.stats.t.ppf(1 - tail, freedom) * np.sqrt(variance) / (auc * (1 - auc))
    ends = scipy.special.expit(scipy.special.logit(auc) + np.array([-half, half]))
    return Interval(auc, *map(float, ends))


def bootstrap_weights(bonafide_clusters, spoof_clusters, resamples: int = 1000, seed: int = 0) -> list[np.ndarray]:
    """How often each bona fide (resample, m) and each spoof clip (resample, n) is in each resample of whole clusters.

    A cluster is what clips share (speaker, or parent clip): real clips and their copies under one name stay together
    (Bengio & Mariethoz 2004). Strata (`_clusters`) are drawn each by itself, so that no class is missing."""
    _require(resamples >= 1, "at least 1 resample", resamples, "Use 1000 for a report.")
    sizes, generator = (len(bonafide_clusters), len(spoof_clusters)), np.random.default_rng(seed)
    member, strata = _clusters(bonafide_clusters, spoof_clusters, sizes)
    times = np.zeros((resamples, member.max() + 1), dtype=int)
    for row in times:
        for each in strata:
            row += np.bincount(each[generator.integers(each.size, size=each.size)], minlength=row.size)
    return np.split(times[:, member], [sizes[0]], axis=1)


def percentile_interval(values, clusters: int, level: float = 0.95) -> tuple[float, float]:
    """Interval (low, high) of a statistic from its values over resamples of so many clusters: quantiles further out the
    fewer there are, at Phi(-sqrt(k / (k - 1)) t) for t of k - 1 (Hesterberg 2015). NaN values are left out."""
    distance = scipy.stats.t.ppf((1 + _fraction(level, "level")) / 2, clusters - 1) * np.sqrt(clusters / (clusters - 1))
    return tuple(np.nanquantile(values, scipy.stats.norm.cdf([-distance, distance])).tolist())


def resampled_error_rates(bonafide, spoof, real_times: np.ndarray, fake_times: np.ndarray) -> np.ndarray:
    """The EER of each resample (resample,) of `bootstrap_weights`, NaN where a class is missing; as `equal_error_rate`,
    but a clip that was drawn several times is rejected at once."""
    order = np.argsort(np.concatenate(_both(bonafide, spoof)), kind="stable")
    times, is_real = np.concatenate([real_times, fake_times], axis=1)[:, order], order < len(bonafide)
    with np.errstate(invalid="ignore"):
        frr, accepted = (np.cumsum(part, axis=1) / part.sum(axis=1, keepdims=True)
                         for part in (times * is_real, times * ~is_real))
    nearest = np.argmin(np.nan_to_num(np.abs(frr - 1 + accepted), nan=9), axis=1)[:, None]
    return np.take_along_axis((frr + 1 - accepted) / 2, nearest, axis=1)[:, 0]


def paired(differences, level: float = 0.95) -> Paired:
    """What paired differences (cluster,), one for each voice, say of their mean. Exact sign flips assume symmetry under
    "no difference" alone (Fisher 1935); of k clusters their least p-value is 2 / 2^k. MetricError below 2."""
    values, tail = _vector(differences, "differences"), (1 - _fraction(level, "level")) / 2
    k, mean = values.size, float(values.mean())
    _require(k > 1, "at least 2 clusters", k, "One voice shows no spread between voices.")
    error = values.std(ddof=1) / np.sqrt(k)
    half = scipy.stats.t.ppf(1 - tail, k - 1) * error
    p_t = 2 * scipy.stats.t.sf(abs(mean) / error, k - 1) if error > 0 else float(mean == 0)
    flips = np.array([*product((1, -1), repeat=k)]) if k <= MOST_FLIPPED else np.empty((0, k))
    p_flips = np.mean(np.abs(flips @ values / k) >= abs(mean) - 1e-12) if len(flips) else np.nan
    agree = int((np.sign(values) == np.sign(mean)).sum())
    return Paired(mean, mean - half, mean + half, agree, k, float(p_flips), float(p_t))


def coverage(sizes: Iterable[int], auc: float = 0.75, rho: float = 0.4, shared: float = 0.5, trials: int = 400,
             seed: int = 0, level: float = 0.95) -> float:
    """Share of simulated tests whose `auc_interval` holds the true AUC, with voices of as many clips as `sizes` says.
    Clips are normal; a share `rho` of their variance is the voice's, whose real and fake means correlate by `shared`;
    `auc` is that of clips of different voices, and the truth counts the pairs within a voice as well."""
    sizes, generator, hits = np.asarray(list(sizes)), np.random.default_rng(seed), 0
    voices, shift = np.repeat(np.arange(sizes.size), sizes), np.sqrt(2) * scipy.stats.norm.ppf(_fraction(auc, "auc"))
    inside = np.sum(sizes**2) / np.sum(sizes) ** 2
    truth = (1 - inside) * auc + inside * scipy.stats.norm.cdf(shift / np.sqrt(2 - 2 * rho * shared))
    for _ in range(trials):
        own, other, common = np.sqrt(rho) * generator.standard_normal((3, sizes.size))
        means = np.sqrt(1 - shared) * np.array([own, other]) + np.sqrt(shared) * common
        noise = np.sqrt(1 - rho) * generator.standard_normal((2, voices.size))
        real, fake = means[:, voices] + noise + [[shift], [0]]
        value, *influence = auc_influence(real, fake)
        pairs = min(effective_clips(scores, voices) for scores in (real, fake))
        _, low, high = auc_interval(value, *cluster_variance(*influence, voices, voices), pairs, level)
        hits += low <= truth <= high
    return float(hits / trials)
