import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.model.discrepancy import discrepancy, matching_loss, residual
from lib.model.scaling import SCALINGS, Scaling, local_mean


def features(seed: int, channels: int = 5, rows: int = 6, frames: int = 40) -> torch.Tensor:
    return torch.randn(1, channels, rows, frames, generator=torch.Generator().manual_seed(seed))


def test_discrepancy_by_hand():
    teacher, student = torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1), torch.tensor([1.0, 1.0]).reshape(1, 2, 1, 1)
    assert discrepancy(teacher, student).item() == pytest.approx(1 - math.cos(math.pi / 4), abs=1e-6)
    assert discrepancy(teacher, -teacher).item() == pytest.approx(2.0, abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 10))
def test_discrepancy_properties(seed, gain):
    one, two = features(seed), features(seed + 1)
    found = discrepancy(one, two)
    assert found.min() >= -1e-6 and found.max() <= 2 + 1e-6
    assert torch.allclose(found, discrepancy(two, one), atol=1e-6)
    assert torch.allclose(found, discrepancy(gain * one, two), atol=1e-5)  # only the direction counts
    assert discrepancy(one, one).abs().max() < 1e-6


def test_discrepancy_is_half_the_squared_residual():
    one, two = features(1), features(2)
    assert torch.allclose(0.5 * (residual(one, two) ** 2).sum(1), discrepancy(one, two), atol=1e-6)


def test_matching_loss_sums_level_means():
    one, two = [features(1), features(3, rows=3)], [features(2), features(4, rows=3)]
    by_hand = sum(discrepancy(a, b).mean().item() for a, b in zip(one, two))
    assert matching_loss(one, two).item() == pytest.approx(by_hand)


def test_local_mean_equals_slow_twin():
    parts = features(5)[0]
    fast = local_mean(parts, 3, 5)
    for row, frame in ((0, 0), (2, 7), (5, 39)):
        window = parts[:, max(0, row - 1) : row + 2, max(0, frame - 2) : frame + 3]
        assert torch.allclose(fast[:, row, frame], window.mean((1, 2)), atol=1e-6)
    assert local_mean(parts, 99, 999).shape == parts.shape


@pytest.fixture
def fitted():
    clips = [[(residual(features(i), features(i + 50))[0], torch.ones(40, dtype=torch.bool))] for i in range(30)]
    return clips, fit_on(clips, [(3, 5)])


def fit_on(clips, *geometry):
    scaling = Scaling(*geometry)
    return scaling.fit(scaling.moments(clip) for clip in clips)


@pytest.mark.parametrize("kind", ["level", "frequency", "channel", "element"])
def test_scaled_bona_fide_has_mean_zero(fitted, kind):
    clips, scaling = fitted
    maps = torch.stack([scaling.apply(0, clip[0][0], kind) for clip in clips])
    assert abs(maps.mean().item()) < 1e-3
    if kind in ("level", "frequency"):
        assert maps.std().item() == pytest.approx(1, abs=0.02)


def test_signed_map_is_one_on_bona_fide(fitted):
    clips, scaling = fitted
    maps = torch.stack([scaling.apply(0, clip[0][0], "signed") ** 2 for clip in clips])
    assert maps.mean().item() == pytest.approx(1, abs=0.02)


def test_signed_sees_a_bias_that_the_discrepancy_hides(fitted):
    clips, scaling = fitted
    parts = clips[0][0][0]
    flipped = -parts.abs()  # the same discrepancy everywhere, but always wrong in one direction
    assert torch.allclose(scaling.apply(0, flipped, "none"), scaling.apply(0, parts, "none"))
    assert scaling.apply(0, flipped, "signed").mean() > 1.5 * scaling.apply(0, parts, "signed").mean()


def test_level_scaling_keeps_a_single_levels_ranking(fitted):
    clips, scaling = fitted
    none, level = ([scaling.apply(0, clip[0][0], kind).mean().item() for clip in clips] for kind in ("none", "level"))
    assert sorted(range(30), key=none.__getitem__) == sorted(range(30), key=level.__getitem__)


def test_scaling_round_trip_and_errors(fitted):
    clips, scaling = fitted
    again = Scaling.from_tensors(scaling.tensors())
    for kind in [kind for kind in SCALINGS if kind != "read"]:
        assert torch.equal(again.apply(0, clips[0][0][0], kind), scaling.apply(0, clips[0][0][0], kind))
    with pytest.raises(ValueError, match="bona fide clips"):
        fit_on([], [(3, 5)])
    with pytest.raises(ValueError, match="has none"):
        scaling.apply(0, clips[0][0][0], "read")
    with pytest.raises(ValueError, match="not one of"):
        scaling.apply(0, clips[0][0][0], "time")


def test_read_map_sees_only_what_the_readers_read():
    clips = [[(residual(features(i), features(i + 50))[0], torch.ones(40, dtype=torch.bool))] for i in range(20)]
    channels = clips[0][0][0].shape[0]
    reader = torch.zeros(2, channels)
    reader[0, 1], reader[1, 2] = 1.0, 1.0
    scaling = fit_on(clips, [(3, 5)], [reader], [[(1, 1), (3, 5)]])
    maps = torch.stack([scaling.apply(0, clip[0][0], "read") for clip in clips])
    assert abs(maps.mean().item()) < 1e-3
    parts = clips[0][0][0]
    unread, read = parts.clone(), parts.clone()
    unread[0] += 0.5
    read[1] += 0.5
    before = scaling.apply(0, parts, "read")
    assert torch.equal(scaling.apply(0, unread, "read"), before)
    # One of two kinds moves by 0.5 in both neighbourhoods: by hand, half of a half of it over each deviation.
    spread = scaling.levels[0]["read_deviation"][:, 0]
    by_hand = (0.125 / spread).sum(0)[:, None].expand_as(before)
    assert torch.allclose(scaling.apply(0, read, "read") - before, by_hand, atol=1e-5)
    again = Scaling.from_tensors(scaling.tensors())
    assert torch.equal(again.apply(0, parts, "read"), before)
    with pytest.raises(ValueError, match="this teacher has none"):
        fit_on(clips, [(3, 5)]).apply(0, parts, "read")


def test_steadiness_by_hand():
    swings = torch.tensor([0.0, 2.0, 0.0, 2.0]).reshape(1, 1, 4)  # deviation 1 over time, ln 1 = 0
    active, reader = torch.tensor([True, True, True, True]), torch.ones(1, 1)
    scaling = Scaling([(1, 1)], [reader], [[(1, 1)]])
    assert scaling.steadiness([(swings, active)]) == pytest.approx(0.0, abs=1e-6)
    assert scaling.steadiness([(swings / math.e, active)]) == pytest.approx(1.0, abs=1e-6), "less variation, up"
    assert scaling.steadiness([(swings, torch.tensor([True, False, True, False]))]) > 15, "no variation where speech is"
    assert math.isnan(Scaling([(1, 1)]).steadiness([(swings, active)])), "no readers, nothing to read"
