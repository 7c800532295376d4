import numpy as np
import pytest
import torch

from lib.audit.attacks import (
    TAPS,
    Target,
    anomaly_tensor,
    attack_table,
    filtered,
    learned_filter,
    notched,
    pictured,
)
from lib.data.channel import apply_channel
from lib.detector import Detector
from tests.conftest import toy_speech


@pytest.fixture(scope="module")
def target(tiny_detector):
    torch.set_num_threads(1)
    return Target.of(tiny_detector)


@pytest.fixture(scope="module")
def clip(tiny_detector):
    return apply_channel(toy_speech(1.5, 50, 220.0), tiny_detector.settings.channel)


@pytest.mark.parametrize("scoring", [{}, {"pooling": "mean"}, {"scaling": "signed", "pooling": "profile"},
                                     {"scaling": "signed", "pooling": "two_sided"},
                                     {"pooling": "mean", "scaling": "frequency"},
                                     {"pooling": "top", "scaling": "level"}, {"pooling": "quantile", "scaling": "none"},
                                     {"pooling": "max", "scaling": "element", "combine": "product"}])
def test_the_differentiable_score_is_the_detectors_own(tiny_detector, clip, scoring):
    settings = tiny_detector.settings.with_options({f"scoring.{name}": value for name, value in scoring.items()})
    other = Detector(settings, tiny_detector.teacher, tiny_detector.student)
    clips = [apply_channel(toy_speech(1.5, seed, 90 + 5 * seed), settings.channel) for seed in range(4)]
    other.fit_scaling(clips, list("abcd"))
    found = Target.of(other)
    picture = pictured(found, torch.from_numpy(clip[0])).requires_grad_(True)
    anomaly = anomaly_tensor(found, picture, clip[1])
    assert float(anomaly) == pytest.approx(other.score_prepared(*clip), rel=1e-3, abs=1e-5)
    slope, = torch.autograd.grad(anomaly, picture)
    assert torch.isfinite(slope).all() and slope.abs().max() > 0


def test_the_slope_is_the_change_of_the_score(target, clip):
    picture = pictured(target, torch.from_numpy(clip[0])).requires_grad_(True)
    slope, = torch.autograd.grad(anomaly_tensor(target, picture, clip[1]), picture)
    step = 1e-3 * slope / slope.norm()
    with torch.no_grad():
        up, down = (float(anomaly_tensor(target, picture + sign * step, clip[1])) for sign in (1, -1))
    assert (up - down) / 2e-3 == pytest.approx(float(slope.norm()), rel=0.1)


def test_a_learned_filter_lowers_the_score_of_what_it_was_learned_on(target, clip):
    shape = learned_filter(target, [clip], steps=6)
    assert shape.shape == (TAPS,) and np.isfinite(shape).all()
    audio = torch.from_numpy(filtered(clip[0], shape))
    with torch.no_grad():
        before, after = (float(anomaly_tensor(target, pictured(target, each), clip[1]))
                         for each in (torch.from_numpy(clip[0]), audio))
    assert after < before


def test_the_identity_filter_changes_nothing(clip):
    shape = np.zeros(TAPS)
    shape[TAPS // 2] = 1.0
    assert np.allclose(filtered(clip[0], shape), clip[0], atol=1e-6)
    doubled = filtered(clip[0], 2 * shape)
    assert np.allclose(doubled, clip[0], atol=1e-6), "the level is kept"


def test_the_table_counts_what_passes(tiny_detector):
    import pandas as pd

    calibration = tiny_detector.calibration
    before = calibration.max() + np.array([1.0, 2.0])
    rows = pd.DataFrame({"generator": "x", "before": before, "after": calibration.min() - 1})
    table = attack_table(tiny_detector, calibration, rows)
    row = table.iloc[0]
    assert (row["AUC before"], row["AUC after"], row["passing before"], row["passing after"]) == (1.0, 0.0, 0.0, 1.0)


def test_a_comb_of_notches_takes_the_lines_and_leaves_what_lies_between():
    time = np.arange(16000) / 16000
    on, between = np.sin(2 * np.pi * 800 * time), np.sin(2 * np.pi * 840 * time)
    assert np.abs(notched(on, 80.0, 2.0)).max() < 1e-3, "800 Hz is a multiple of 80 Hz"
    np.testing.assert_allclose(notched(between, 80.0, 2.0), between, atol=1e-3)
