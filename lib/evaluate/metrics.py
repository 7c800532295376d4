"""How well scores separate bona fide from spoof speech, and how sure we may be of it.

Convention everywhere: score up = bona fide; rates are fractions in [0, 1], never per cent. Scores are finite,
one-dimensional and in no unit, save that `act_dcf` and `cllr` read them as log-likelihood ratios in nats.
Needs numpy (`clopper_pearson` also scipy). `MetricError`: an empty class, NaN or Inf, not one-dimensional.
"""
from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import numpy as np


class MetricError(ValueError):
    """Scores, rates or clusters from which no honest number can be computed."""


class OperatingPoint(NamedTuple):
    """A threshold fixed on held-out real speech, and what it does to a test. Flagged: score < threshold."""
    threshold: float
    held_out_rate: float  # share of held-out real clips flagged, never above the stated rate
    false_alarm_rate: float  # share of real test clips flagged (the FRR in the words of ASVspoof)
    detection_rate: float  # share of spoof clips flagged
    resolved: bool  # False: fewer held-out clips than 1 / stated rate, so the threshold is only their minimum


class PairedDifference(NamedTuple):
    """Statistic of system A minus that of system B on the same trials, interval and two-sided p-value."""
    difference: float
    low: float
    high: float
    p_value: float


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
    """False rejection rate, false acceptance rate, threshold: each (bonafide + spoof + 1,), for DET plots.

    Point i rejects the i lowest scores, bona fide first among equal ones (ties are not collapsed); point 0
    rejects none, at the lowest - 0.001. Source: ASVspoof. Raises MetricError, also on constant scores.
    """
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

    The mean of FRR and FAR at the first point of `detection_curve` where they are nearest, not interpolated:
    below about 200 clips it moves in visible steps. Above 0.5 suspect inverted scores. Raises MetricError.
    """
    frr, far, thresholds = detection_curve(bonafide, spoof)
    nearest = np.argmin(np.abs(frr - far))
    return float((frr[nearest] + far[nearest]) / 2), float(thresholds[nearest])


def area_under_curve(bonafide, spoof) -> float:
    """Probability that a bona fide clip outscores a spoof clip, ties counting 1/2 (Mann-Whitney U / nm).

    By ranks, O(n log n). Constant scores give 0.5. Raises MetricError on an empty class, NaN or Inf.
    """
    bonafide, spoof = _both(bonafide, spoof)
    spoof = np.sort(spoof)
    below, not_above = (np.searchsorted(spoof, bonafide, side).sum() for side in ("left", "right"))
    return float((below + not_above) / (2 * bonafide.size * spoof.size))


def _cost_weights(p_spoof: float, c_miss: float, c_fa: float) -> np.ndarray:
    _require(0 < c_miss < np.inf and 0 < c_fa < np.inf, "positive costs", (c_miss, c_fa), "Use 1 and 10.")
    miss, false = c_miss * (1 - _fraction(p_spoof, "p_spoof")), c_fa * p_spoof
    return np.array([miss, false]) / min(miss, false)


def min_dcf(bonafide, spoof, p_spoof: float = 0.05, c_miss: float = 1.0, c_fa: float = 10.0) -> float:
    """Detection cost in [0, 1] at the best threshold: 1 is the better of "accept all" and "reject all".

    min over t of (c_miss (1 - p) FRR(t) + c_fa p FAR(t)) / min(c_miss (1 - p), c_fa p), as in ASVspoof 5.
    The threshold is chosen on the test set: a bound, not an operating point. Raises MetricError.
    """
    miss, false = _cost_weights(p_spoof, c_miss, c_fa)
    frr, far, _ = detection_curve(bonafide, spoof)
    return float(np.min(miss * frr + false * far))


def act_dcf(bonafide, spoof, p_spoof: float = 0.05, c_miss: float = 1.0, c_fa: float = 10.0) -> float:
    """Detection cost, as `min_dcf`, at the Bayes threshold -ln(c_miss (1 - p) / (c_fa p)), here -0.6419.

    Needs calibrated log-likelihood ratios, and calibrating takes spoof scores: no longer "real speech only".
    """
    (bonafide, spoof), (miss, false) = _both(bonafide, spoof), _cost_weights(p_spoof, c_miss, c_fa)
    threshold = -np.log(miss / false)
    return float(miss * np.mean(bonafide < threshold) + false * np.mean(spoof >= threshold))


def cllr(bonafide, spoof) -> float:
    """Cost of log-likelihood ratios in bits: 0 perfect, 1 says nothing, more misleads. Never overflows.

    (mean log2(1 + e^-bonafide) + mean log2(1 + e^spoof)) / 2, Bruemmer & du Preez 2006. Raises MetricError.
    """
    bonafide, spoof = _both(bonafide, spoof)
    return float((np.logaddexp(0, -bonafide).mean() + np.logaddexp(0, spoof).mean()) / (2 * np.log(2)))


def operating_point(held_out_bonafide, test_bonafide, spoof, frr: float = 0.05) -> OperatingPoint:
    """What a threshold that flags at most `frr` (0.01, 0.05) of held-out real speech does to the test clips.

    Threshold: the held-out score with floor(frr x held-out clips) before it in rising order. Or MetricError.
    """
    held_out, (real, spoof) = _vector(held_out_bonafide, "held-out scores"), _both(test_bonafide, spoof)
    allowed = int(_fraction(frr, "frr") * held_out.size + 1e-9)
    threshold = float(np.sort(held_out)[allowed])
    rates = (float(np.mean(scores < threshold)) for scores in (held_out, real, spoof))
    return OperatingPoint(threshold, *rates, resolved=allowed > 0)


def conformal_p_values(calibration, scores) -> np.ndarray:
    """p-value in (0, 1] of "drawn like the calibration speech" for each score, shape (scores,); small = fake.

    (1 + number of calibration scores <= score) / (calibration clips + 1), on real clips that neither
    training nor scaling saw. Source: Bates et al. 2023. Raises MetricError.
    """
    calibration = np.sort(_vector(calibration, "calibration scores"))
    not_above = np.searchsorted(calibration, _vector(scores, "scores"), "right")
    return (1 + not_above) / (calibration.size + 1)


def clopper_pearson(k: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Exact interval (low, high) of the rate behind `k` events in `n` independent trials, or MetricError."""
    from scipy.stats import beta
    _require(0 <= k <= n > 0 == k % 1 == n % 1, "whole numbers 0 <= k <= n, n > 0", (k, n), "Count again.")
    tail = (1 - _fraction(level, "level")) / 2
    low = beta.ppf(tail, k, n - k + 1) if k else 0.0
    return float(low), float(beta.ppf(1 - tail, k + 1, n - k) if k < n else 1.0)


def _resampled(statistic: Callable, clusters: tuple, sizes: tuple, resamples: int, seed: int) -> np.ndarray:
    """statistic(bonafide indices, spoof indices) of each resample of whole clusters with both classes."""
    names, found = [np.asarray([*map(str, each)]) for each in clusters], tuple(len(each) for each in clusters)
    _require(found == sizes, f"a cluster name for each of {sizes} scores", found, "Use one table for both.")
    _require(resamples >= 1, "at least 1 resample", resamples, "Use 1000 for a report.")
    unique, member = np.unique(np.concatenate(names), return_inverse=True)
    _require(unique.size > 1, "at least 2 clusters", unique.tolist(),
             "One speaker shows no spread between speakers: cluster by parent clip, or add speakers.")
    generator, trials, values = np.random.default_rng(seed), [np.arange(size) for size in sizes], []
    for _ in range(resamples):
        times = np.bincount(generator.integers(unique.size, size=unique.size), minlength=unique.size)[member]
        picked = np.repeat(trials[0], times[:sizes[0]]), np.repeat(trials[1], times[sizes[0]:])
        if picked[0].size and picked[1].size:
            with suppress(MetricError):  # for example all scores of a resample equal
                values.append(statistic(*picked))
    _require(2 * len(values) >= resamples, "a statistic for most resamples", f"{len(values)} of {resamples} "
             f"over {unique.size} clusters", "Most lack a class: add speakers or cluster by parent clip.")
    return _vector(values, "bootstrap values, one number a resample")


def clustered_bootstrap(statistic: Callable, bonafide, spoof, bonafide_clusters, spoof_clusters,
                        resamples: int = 1000, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile interval (low, high) of statistic(bonafide, spoof), resampling whole clusters.

    A cluster is what clips share (speaker, or parent clip), one name a score; the union of names is drawn
    from, so real clips and their copy-synthesis under one name stay together. Resamples without both classes
    are left out; MetricError where they are the majority, or below 2 clusters. Bengio & Mariethoz 2004.
    """
    (bonafide, spoof), tail = _both(bonafide, spoof), (1 - _fraction(level, "level")) / 2
    values = _resampled(lambda real, fake: statistic(bonafide[real], spoof[fake]),
                        (bonafide_clusters, spoof_clusters), (bonafide.size, spoof.size), resamples, seed)
    return tuple(np.quantile(values, [tail, 1 - tail]).tolist())


def paired_difference(bonafide_a, spoof_a, bonafide_b, spoof_b, bonafide_clusters, spoof_clusters,
                      resamples: int = 1000, level: float = 0.95, seed: int = 0,
                      statistic: Callable = area_under_curve) -> PairedDifference:
    """Clustered bootstrap of the AUC (or `statistic`) of A minus that of B: same trials in the same order.

    p = 2 min(share of differences <= 0, share >= 0), share = (count + 1) / (resamples + 1). Or MetricError.
    """
    (real_a, fake_a), (real_b, fake_b) = _both(bonafide_a, spoof_a), _both(bonafide_b, spoof_b)
    sizes, tail = (real_a.size, fake_a.size), (1 - _fraction(level, "level")) / 2
    _require(sizes == (real_b.size, fake_b.size), f"the same trials for A and B, {sizes}",
             (real_b.size, fake_b.size), "Join the two score files by clip id first.")
    values = _resampled(lambda r, f: statistic(real_a[r], fake_a[f]) - statistic(real_b[r], fake_b[f]),
                        (bonafide_clusters, spoof_clusters), sizes, resamples, seed)
    p_value = 2 * (min(np.sum(values <= 0), np.sum(values >= 0)) + 1) / (values.size + 1)
    difference = statistic(real_a, fake_a) - statistic(real_b, fake_b)
    low, high = np.quantile(values, [tail, 1 - tail]).tolist()
    return PairedDifference(difference, low, high, float(min(1.0, p_value)))


def holm(p_values) -> np.ndarray:
    """Holm's adjusted p-values in the given order: compare each with the level itself. Or MetricError."""
    p_values = _vector(p_values, "p-values")
    _require(min(p_values) >= 0 and max(p_values) <= 1, "p-values in [0, 1]", p_values, "Compute them again.")
    order = np.argsort(p_values, kind="stable")
    stepped = np.maximum.accumulate(p_values[order] * np.arange(p_values.size, 0, -1))
    return np.minimum(stepped, 1.0)[np.argsort(order)]


def conformal(calibration: np.ndarray, anomaly: float) -> float:
    """Share of calibration clips at least as anomalous, (1 + count) / (n + 1)."""
    return float((1 + (calibration >= anomaly).sum()) / (len(calibration) + 1))
