"""Metrics against hand-computed values, properties, slow twins and, if named, a published score file."""
from __future__ import annotations

import gzip
import math
import os
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.evaluate import metrics
from lib.evaluate.metrics import MetricError

SCORES = st.lists(st.integers(-40, 40), min_size=1, max_size=25)
TWO_SCORE_FUNCTIONS = [metrics.detection_curve, metrics.equal_error_rate, metrics.area_under_curve,
                       metrics.min_dcf, metrics.act_dcf, metrics.cllr]


def slow_curve(bonafide, spoof):
    """(FRR, FAR) after each rejection, in exact fractions: lowest first, bona fide first within a tie."""
    trials = sorted([(score, 0) for score in bonafide] + [(score, 1) for score in spoof])
    points, rejected = [(Fraction(0), Fraction(1))], [0, 0]
    for _, spoofed in trials:
        rejected[spoofed] += 1
        points.append((Fraction(rejected[0], len(bonafide)), 1 - Fraction(rejected[1], len(spoof))))
    return points


def slow_eer(bonafide, spoof):
    frr, far = min(slow_curve(bonafide, spoof), key=lambda point: abs(float(point[0]) - float(point[1])))
    return float((frr + far) / 2)


def slow_min_dcf(bonafide, spoof):
    costs = [Fraction(95, 100) * frr + Fraction(1, 2) * far for frr, far in slow_curve(bonafide, spoof)]
    return float(min(costs) / Fraction(1, 2))


def slow_auc(bonafide, spoof):
    return sum((b > s) + 0.5 * (b == s) for b in bonafide for s in spoof) / (len(bonafide) * len(spoof))


def slow_cllr(bonafide, spoof):
    real = sum(math.log2(1 + math.exp(-score)) for score in bonafide) / len(bonafide)
    return (real + sum(math.log2(1 + math.exp(score)) for score in spoof) / len(spoof)) / 2


def synthetic_scores():
    """A score set with ties that is the same on every machine: logistic-map noise, two decimals."""
    noise, state = [], 0.3141592
    for _ in range(900):
        state = 3.99 * state * (1 - state)
        noise.append(state)
    return [round(4 * x + 0.5, 2) for x in noise[:400]], [round(4 * x - 1.5, 2) for x in noise[400:]]


# --- hand-computed ------------------------------------------------------------

def test_curve_by_hand():
    frr, far, thresholds = metrics.detection_curve([2.0, 0.0], [1.0, -1.0])
    assert frr.tolist() == [0, 0, 0.5, 0.5, 1]
    assert far.tolist() == [1, 0.5, 0.5, 0, 0]
    assert thresholds.tolist() == [-1.001, -1, 0, 1, 2]


def test_eer_by_hand():
    assert metrics.equal_error_rate([2.0, 0.0], [1.0, -1.0]) == (0.5, 0.0)
    assert metrics.equal_error_rate([3, 4], [1, 2]) == (0.0, 2.0)
    assert metrics.equal_error_rate([1, 2], [3, 4])[0] == 1.0
    # rejecting the lowest two of 1 2 3 | 0 1.5: FRR 1/3, FAR 1/2; three: 1/3 and 0. No interpolation.
    assert metrics.equal_error_rate([1, 2, 3], [0, 1.5])[0] == pytest.approx((1 / 3 + 1 / 2) / 2)


def test_ties_are_not_collapsed_and_never_help():
    # real 1, spoof 1, real 2, spoof 2: the point after "real 1" is (1/2, 1), after "spoof 1" (1/2, 1/2)
    assert metrics.equal_error_rate([1, 2], [1, 2])[0] == 0.5
    # after spoof 0: (0, 1/2); real 1: (1/3, 1/2); real 1: (2/3, 1/2), nearer than the last by a rounding
    assert metrics.equal_error_rate([1, 1, 1], [1, 0])[0] in {(1 / 3 + 1 / 2) / 2, (2 / 3 + 1 / 2) / 2}
    # all five tied save one spoof below: had the tie been collapsed the nearest point would be (0, 1/2)
    assert metrics.equal_error_rate([1, 1, 1, 1], [1, 0])[0] == 0.5


def test_single_trials():
    assert metrics.equal_error_rate([1], [0])[0] == 0.0
    assert metrics.equal_error_rate([0], [1])[0] == 1.0
    assert metrics.area_under_curve([1], [0]) == 1.0
    assert metrics.min_dcf([1], [0]) == 0.0


def test_auc_by_hand():
    assert metrics.area_under_curve([3, 1], [2, 1]) == (1 + 1 + 0 + 0.5) / 4
    assert metrics.area_under_curve([5, 5], [5]) == 0.5


def test_costs_by_hand():
    assert metrics.min_dcf([2.0, 0.0], [1.0, -1.0]) == pytest.approx(0.5 / 0.5 * 0.5)  # accept all but -1
    assert metrics.min_dcf([0], [1]) == 1.0  # inverted: no better than accepting everything
    # Bayes threshold -0.6419: one of two real below, one of two spoof above
    assert metrics.act_dcf([0, -0.65], [-0.64, -5]) == pytest.approx((0.95 * 0.5 + 0.5 * 0.5) / 0.5)
    assert metrics.act_dcf([-9], [9]) == pytest.approx(2.9)
    assert metrics.min_dcf([2, 0], [1, -1], p_spoof=0.5, c_miss=1, c_fa=1) == pytest.approx(0.5)


def test_cllr_by_hand_and_without_overflow():
    assert metrics.cllr([0], [0]) == pytest.approx(1)
    assert metrics.cllr([math.log(3)], [math.log(1 / 3)]) == pytest.approx(math.log2(4 / 3))
    assert metrics.cllr([-1000], [1000]) == pytest.approx(1000 / math.log(2))
    assert metrics.cllr([1000], [-1000]) == 0


def test_conformal_p_values():
    assert metrics.conformal([-1, -2, -3], [0, -1, -2.5, -9]).tolist() == [0.25, 0.5, 0.75, 1.0]
    assert metrics.conformal([1, 2, 3], 2.0) == 0.75 and metrics.conformal([1, 2, 3], float("inf")) == 0.25
    calibration, fresh = np.random.default_rng(0).normal(size=(2, 4000))
    assert np.mean(metrics.conformal(calibration, fresh) <= 0.05) == pytest.approx(0.05, abs=0.012)


def test_clopper_pearson_known_values():
    assert metrics.clopper_pearson(0, 10) == pytest.approx((0, 1 - 0.025 ** 0.1))
    assert metrics.clopper_pearson(10, 10) == pytest.approx((0.025 ** 0.1, 1))
    assert metrics.clopper_pearson(5, 10) == pytest.approx((0.1870860284474045, 0.8129139715525955))
    for bad in [(-1, 10), (11, 10), (0, 0), (1.5, 3)]:
        with pytest.raises(MetricError, match="whole"):
            metrics.clopper_pearson(*bad)


def test_holm():
    assert metrics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert metrics.holm([0.9, 0.8]).tolist() == [1.0, 1.0]
    with pytest.raises(MetricError, match=r"\[0, 1\]"):
        metrics.holm([0.5, 1.2])


# --- properties ------------------------------------------------------------

@given(SCORES, SCORES)
def test_against_slow_twins(bonafide, spoof):
    assert metrics.area_under_curve(bonafide, spoof) == pytest.approx(slow_auc(bonafide, spoof), abs=1e-12)
    assert metrics.cllr(bonafide, spoof) == pytest.approx(slow_cllr(bonafide, spoof), rel=1e-12)
    if len(set(bonafide + spoof)) > 1:
        eer = metrics.equal_error_rate(bonafide, spoof)[0]
        assert eer == pytest.approx(slow_eer(bonafide, spoof), abs=1e-12)
        assert metrics.min_dcf(bonafide, spoof) == pytest.approx(slow_min_dcf(bonafide, spoof), abs=1e-12)


@given(SCORES, SCORES)
def test_monotone_invariance_symmetry_and_range(bonafide, spoof):
    auc = metrics.area_under_curve(bonafide, spoof)
    stretched = [np.asarray(scores) ** 3 * 2.0 + 7 for scores in (bonafide, spoof)]
    assert 0 <= auc <= 1 and auc == metrics.area_under_curve(*stretched)
    assert auc == pytest.approx(1 - metrics.area_under_curve(spoof, bonafide), abs=1e-12)
    assert metrics.cllr(bonafide, spoof) >= 0 and 0 <= metrics.act_dcf(bonafide, spoof) <= 2.9 + 1e-12
    if len(set(bonafide + spoof)) > 1:
        eer, threshold = metrics.equal_error_rate(bonafide, spoof)
        assert 0 <= eer <= 1 and eer == metrics.equal_error_rate(*stretched)[0]
        rate = (np.mean(np.asarray(bonafide) <= threshold) + np.mean(np.asarray(spoof) > threshold)) / 2
        assert rate == pytest.approx(eer, abs=1e-12) or len(set(bonafide + spoof)) < len(bonafide + spoof)
        assert 0 <= metrics.min_dcf(bonafide, spoof) <= 1
        assert metrics.min_dcf(bonafide, spoof) <= metrics.act_dcf(bonafide, spoof) + 1e-12
        frr, far, thresholds = metrics.detection_curve(bonafide, spoof)
        assert all((np.diff(frr) >= 0) & (np.diff(far) <= 0) & (np.diff(thresholds) >= 0))


@settings(max_examples=30)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_monotone_and_no_smaller(p_values):
    adjusted, order = metrics.holm(p_values), np.argsort(p_values, kind="stable")
    assert (adjusted >= p_values).all() and (adjusted <= 1).all() and (np.diff(adjusted[order]) >= 0).all()


# --- refusals ------------------------------------------------------------

@pytest.mark.parametrize("function", TWO_SCORE_FUNCTIONS)
@pytest.mark.parametrize(("bonafide", "spoof", "message"), [
    ([], [1.0], "bonafide scores"), ([1.0], [], "spoof scores"),
    ([1, float("nan")], [0], r"NaN.*index \[1\]"), ([1], [float("inf")], "NaN or Inf"),
    ([[1.0]], [0.0], "one-dimensional"), (["high"], [0], "numbers")])
def test_refuses(function, bonafide, spoof, message):
    with pytest.raises(MetricError, match=message):
        function(bonafide, spoof)


@pytest.mark.parametrize("function", [metrics.detection_curve, metrics.equal_error_rate, metrics.min_dcf])
def test_constant_scores_are_an_error(function):
    with pytest.raises(MetricError, match="constant"):
        function([1.5, 1.5], [1.5])


def test_other_functions_refuse():
    with pytest.raises(MetricError, match="Write 1 % as 0.01"):
        metrics.clopper_pearson(1, 2, level=95)
    with pytest.raises(MetricError, match="calibration"):
        metrics.conformal([], [1])
    with pytest.raises(MetricError, match="calibration"):
        metrics.conformal([1, float("nan")], [1])
    with pytest.raises(MetricError, match="p_spoof"):
        metrics.min_dcf([1], [0], p_spoof=1)
    with pytest.raises(MetricError, match="costs"):
        metrics.act_dcf([1], [0], c_fa=0)


# --- clusters ------------------------------------------------------------

def overlapping(real=60, fake=60, seed=0, shift=1.0):
    generator = np.random.default_rng(seed)
    return generator.normal(shift, 1, real), generator.normal(0, 1, fake)


def bootstrapped(statistic, bonafide, spoof, real_names, fake_names, resamples=1000, level=0.95, seed=0):
    """The interval of statistic(scores, scores), each clip as often as it was drawn."""
    weights = metrics.bootstrap_weights(real_names, fake_names, resamples, seed)
    values = [statistic(np.repeat(bonafide, real), np.repeat(spoof, fake)) for real, fake in zip(*weights)]
    clusters = min(len(set(map(str, names))) for names in (real_names, fake_names))
    return metrics.percentile_interval(values, clusters, level)


def widened(tail, k):
    """Hesterberg's quantile, by hand: Phi(-sqrt(k / (k - 1)) t)."""
    from scipy.stats import norm, t
    return norm.cdf(-math.sqrt(k / (k - 1)) * t.ppf(1 - tail, k - 1))


def test_bootstrap_covers_is_seeded_and_fast():
    bonafide, spoof = overlapping()
    clusters = np.arange(60) // 3
    began = time.perf_counter()
    low, high = bootstrapped(metrics.area_under_curve, bonafide, spoof, clusters, clusters)
    assert time.perf_counter() - began < 1
    assert low < metrics.area_under_curve(bonafide, spoof) < high
    again = bootstrapped(metrics.area_under_curve, bonafide, spoof, clusters, clusters)
    other = bootstrapped(metrics.area_under_curve, bonafide, spoof, clusters, clusters, 1000, 0.95, 1)
    assert (low, high) == again != other


def test_bootstrap_against_a_slow_twin():
    bonafide, spoof = overlapping(12, 12)
    names = [f"speaker {i // 3}" for i in range(12)]
    generator, values = np.random.default_rng(7), []
    for _ in range(50):
        drawn = [f"speaker {i}" for i in generator.integers(4, size=4)]
        real = [score for name in drawn for score, own in zip(bonafide, names, strict=True) if own == name]
        fake = [score for name in drawn for score, own in zip(spoof, names, strict=True) if own == name]
        values.append(slow_auc(real, fake))
    tail = widened(0.05, 4)
    assert tail < 0.02
    expected = np.quantile(values, [tail, 1 - tail])
    assert bootstrapped(metrics.area_under_curve, bonafide, spoof, names, names, 50, 0.9, 7) == pytest.approx(expected)


def test_few_large_clusters_widen_the_interval():
    generator = np.random.default_rng(3)
    speaker = np.repeat(np.arange(6), 20)
    bonafide = generator.normal(0, 2, 6)[speaker] + generator.normal(1, 0.3, 120)
    spoof, spoof_names = generator.normal(0, 1, 120), [f"spoof {i}" for i in range(120)]
    by_speaker, by_clip = (bootstrapped(metrics.area_under_curve, bonafide, spoof, names, spoof_names)
                           for names in (speaker, range(120)))
    assert by_speaker[1] - by_speaker[0] > 2 * (by_clip[1] - by_clip[0])
    auc, *influence = metrics.auc_influence(bonafide, spoof)
    by_speaker = metrics.cluster_variance(*influence, speaker, spoof_names)[0]
    assert by_speaker > 4 * metrics.cluster_variance(*influence, range(120), spoof_names)[0]


def test_pairs_are_drawn_together():
    bonafide, _ = overlapping(30, 1)
    parents = [f"clip {i}" for i in range(30)]
    gap = bootstrapped(lambda real, fake: np.mean(real) - np.mean(fake), bonafide, bonafide - 0.5, parents, parents)
    assert gap == pytest.approx((0.5, 0.5))
    _, *influence = metrics.auc_influence(bonafide, bonafide)
    assert metrics.cluster_variance(*influence, parents, parents)[0] == pytest.approx(0, abs=1e-12)


def test_strata_are_drawn_by_themselves_so_that_no_class_is_missing():
    real, fake = metrics.bootstrap_weights(["a", "a", "b"], ["sentence"] * 4 + ["other"] * 2, 200)
    assert set(real.sum(1)) == {2, 3, 4} and set(fake.sum(1)) == {4, 6, 8}
    low, high = bootstrapped(metrics.area_under_curve, [1, 2, 3, 4], [0.5, 3.5, 2, 1], list("aabb"), list("ccdd"))
    assert 0 <= low <= high <= 1


def test_bootstrap_refuses():
    with pytest.raises(MetricError, match="at least 2 clusters"):
        bootstrapped(metrics.area_under_curve, [1, 2], [0], ["a", "a"], ["a"])
    with pytest.raises(MetricError, match="cluster name"):
        metrics.cluster_variance([1, 2], [0], ["a"], ["a"])
    with pytest.raises(MetricError, match="resample"):
        bootstrapped(metrics.area_under_curve, [1], [0], ["a"], ["b"], 0)


def test_resampled_error_rates_are_those_of_the_repeated_clips():
    bonafide, spoof = overlapping(40, 30, shift=0.7)
    real, fake = metrics.bootstrap_weights(np.arange(40) // 4, [f"sentence {i // 3}" for i in range(30)], 100)
    found = metrics.resampled_error_rates(bonafide, spoof, real, fake)
    slow = [metrics.equal_error_rate(np.repeat(bonafide, a), np.repeat(spoof, b))[0] for a, b in zip(real, fake)]
    # A clip that was drawn several times is rejected at once: a step of the curve, not its middle.
    assert np.abs(found - slow).max() < 0.06 and np.abs(np.mean(found - slow)) < 0.01
    whole = np.ones((1, 40), int), np.ones((1, 30), int)
    assert metrics.resampled_error_rates(bonafide, spoof, *whole)[0] == pytest.approx(
        metrics.equal_error_rate(bonafide, spoof)[0])
    assert np.isnan(metrics.resampled_error_rates(bonafide, spoof, real[:1], 0 * fake[:1])).all()


def test_influence_and_variance_by_hand():
    # Real 3 beats both fakes, real 1 one of them: AUC 3/4. Fake 0 is beaten by both, fake 2 by one.
    auc, real, fake = metrics.auc_influence([3, 1], [0, 2])
    assert auc == 0.75 and real.tolist() == [0.125, -0.125] and fake.tolist() == [0.125, -0.125]
    # Four clusters in two strata of two: each 2 / 1 x (0.125^2 + 0.125^2).
    variance, freedom = metrics.cluster_variance(real, fake, "ab", "cd")
    assert variance == pytest.approx(2 * 2 * 2 * 0.125**2) and freedom == pytest.approx(2)
    # Real and fake of one name are one cluster, with the sum of what its clips add.
    assert metrics.cluster_variance(real, fake, "ab", "ab") == (pytest.approx(2 * 2 * 0.25**2), 1)
    assert metrics.cluster_variance(real, fake, "ab", "ba") == (pytest.approx(0), 1)


def test_the_variance_is_that_of_many_samples():
    """Five voices of four clips each: the mean estimated variance against the variance of 2,000 AUCs."""
    voice, generator, aucs, variances = np.repeat(np.arange(5), 4), np.random.default_rng(0), [], []
    for _ in range(2000):
        levels = generator.normal(0, 0.7, (2, 5))[:, voice]
        real, fake = levels + generator.normal(0, 0.7, (2, 20)) + [[1], [0]]
        auc, *influence = metrics.auc_influence(real, fake)
        aucs.append(auc)
        variances.append(metrics.cluster_variance(*influence, voice, voice)[0])
    assert np.mean(variances) == pytest.approx(np.var(aucs), rel=0.15)


def test_an_interval_never_degenerates():
    """A perfect AUC of 40 pairs: the exact bound for no event in 40 trials, 0.025^(1/40) = 0.912."""
    assert metrics.auc_interval(1.0, 0.0, 39, 40) == (1.0, pytest.approx(0.9119, abs=1e-4), 1.0)
    assert metrics.auc_interval(0.0, 0.0, 39, 40) == (0.0, 0.0, pytest.approx(1 - 0.9119, abs=1e-4))
    value, low, high = metrics.auc_interval(0.9, 0.03**2, 7, 15)
    # Logit 2.197 -+ 2.365 x 0.03 / 0.09
    assert (low, high) == (pytest.approx(1 / (1 + math.exp(-(2.1972 - 2.3646 / 3))), abs=1e-4),
                           pytest.approx(1 / (1 + math.exp(-(2.1972 + 2.3646 / 3))), abs=1e-4))
    assert value - low > high - value, "towards 1 there is less room"


def test_effective_clips():
    assert metrics.effective_clips([1, 2, 3, 4], "abcd") == 4
    assert metrics.effective_clips(np.repeat(np.arange(5.0), 6), np.repeat(np.arange(5), 6)) == pytest.approx(5)
    scores = np.random.default_rng(0).normal(size=300)
    assert 150 < metrics.effective_clips(scores, np.arange(300) // 30) <= 300


def test_paired_by_hand():
    """Differences 1, 2, 3: of the eight sign flips, all three alike reach the mean: p = 2/8; t = 2 / (1 / sqrt 3)."""
    test = metrics.paired([1, 2, 3])
    assert (test.difference, test.agree, test.clusters, test.p_flips) == (2, 3, 3, 0.25)
    assert (test.low, test.high) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-3)
    assert test.p_t == pytest.approx(0.0742, abs=1e-4)
    # -1, 2, 3 and its mirror image, and 1, 2, 3 and its own: four of eight.
    other = metrics.paired([-1, 2, 3])
    assert (other.agree, other.p_flips) == (2, 0.5)
    assert metrics.paired([0.0] * 8)[:7] == (0, 0, 0, 8, 8, 1, 1)
    assert metrics.paired(np.ones(8)).p_flips == pytest.approx(2 / 256)
    assert math.isnan(metrics.paired(np.ones(40)).p_flips) and metrics.paired(np.ones(40)).p_t == 0
    with pytest.raises(MetricError, match="2 clusters"):
        metrics.paired([1.0])


def test_paired_p_values_are_about_uniform_when_nothing_differs():
    differences = np.random.default_rng(0).normal(size=(2000, 8))
    p_values = np.array([(test.p_flips, test.p_t) for test in map(metrics.paired, differences[:400])])
    assert (np.mean(p_values < 0.1, axis=0) < 0.14).all() and (np.abs(p_values.mean(0) - 0.5) < 0.06).all()


@pytest.mark.parametrize(("auc", "rho"), [(0.6, 0.1), (0.75, 0.4), (0.9, 0.7), (0.99, 0.4)])
def test_intervals_cover_with_the_studys_own_voices(auc, rho):
    """Eight voices of 14, 14, 14, 14, 14, 9, 5 and 3 clips: nominal 95 %; a percentile bootstrap covers 83 to 89 %."""
    assert metrics.coverage((14, 14, 14, 14, 14, 9, 5, 3), auc, rho, trials=300) >= 0.92


# --- golden ------------------------------------------------------------

def test_synthetic_golden():
    bonafide, spoof = synthetic_scores()
    assert metrics.equal_error_rate(bonafide, spoof)[0] == pytest.approx(slow_eer(bonafide, spoof), abs=1e-12)
    assert metrics.min_dcf(bonafide, spoof) == pytest.approx(slow_min_dcf(bonafide, spoof), abs=1e-12)
    assert metrics.area_under_curve(bonafide, spoof) == pytest.approx(slow_auc(bonafide, spoof), abs=1e-12)
    assert metrics.cllr(bonafide, spoof) == pytest.approx(slow_cllr(bonafide, spoof), rel=1e-12)
    rejected = sum(score < -math.log(1.9) for score in bonafide)
    accepted = sum(score >= -math.log(1.9) for score in spoof)
    expected = (0.95 * rejected / 400 + 0.5 * accepted / 500) / 0.5
    assert metrics.act_dcf(bonafide, spoof) == pytest.approx(expected)


@pytest.mark.skipif(not os.environ.get("GOLDEN_SCORES"), reason="GOLDEN_SCORES names no score file")
def test_published_scores():
    """RawGAT-ST (mul), the 71,237 trials of ASVspoof 2019 LA eval, `utt attack label score` lines."""
    path = os.environ["GOLDEN_SCORES"]
    scores = {"bonafide": [], "spoof": []}
    with (gzip.open if path.endswith(".gz") else open)(path, "rt") as lines:
        for line in lines:
            _, _, label, score = line.split()
            scores[label].append(float(score))
    bonafide, spoof = scores["bonafide"], scores["spoof"]
    assert (len(bonafide), len(spoof)) == (7355, 63882)
    assert 100 * metrics.equal_error_rate(bonafide, spoof)[0] == pytest.approx(1.060135, abs=5e-7)
    assert metrics.min_dcf(bonafide, spoof) == pytest.approx(0.02989, abs=5e-6)
    assert metrics.act_dcf(bonafide, spoof) == pytest.approx(0.0444, abs=5e-5)
    assert metrics.cllr(bonafide, spoof) == pytest.approx(0.0663, abs=5e-5)
