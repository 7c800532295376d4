"""Perturbations of bona fide speech: each kind changes what it names, nothing outside its box, nothing at random."""

import numpy as np
import pytest
import torch

from lib.model.perturbations import CHANGES, KINDS, Damage, Grid, averaged_periods, perturbed
from tests.conftest import toy_speech

VOICES = torch.from_numpy(np.stack([toy_speech(1.0, seed, 100 + 10 * seed) for seed in range(6)]))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_changes_speech_and_says_so(kind):
    made, damage = perturbed(VOICES, np.random.default_rng(1), (kind,))
    touched = damage.truth.amax((1, 2, 3)) > 0
    assert touched.any() and torch.isfinite(made).all()
    assert torch.equal(made[~touched], VOICES[~touched]), "what is called clean is the recording itself, bit for bit"
    assert ((made - VOICES).abs().amax(1) > 1e-4)[touched].all()
    other = [index for index, name in enumerate(KINDS) if name != kind]
    assert not damage.truth[:, other].any()
    level = lambda signal: signal.pow(2).mean(1).sqrt()  # noqa: E731
    assert (level(made) / level(VOICES) - 1).abs().max() < 0.01 or kind in (
        "noise for harmonics",
        "smoothing over frequency",
    )


def test_equal_streams_give_equal_damage():
    one, two, three = (perturbed(VOICES, np.random.default_rng(seed))[0] for seed in (3, 3, 4))
    assert torch.equal(one, two) and not torch.equal(one, three)


def test_time_outside_the_box_stays():
    random = np.random.default_rng(0)
    for _ in range(20):
        made, damage = perturbed(VOICES, random, ("drift of phase",))
        boxes, size = damage.truth.amax(1).amax(1), damage.size  # (batch, frame)
        for clip, real, frames in zip(made, VOICES, boxes):
            first = int(torch.nonzero(frames)[0]) if frames.any() else 0
            quiet = first * size // 4 - size
            if quiet > 2000:
                clip, real = clip[:quiet], real[:quiet]
                gain = (clip * real).sum() / (real * real).sum()  # the whole clip keeps its level
                assert (clip - real * gain).abs().max() < 1e-4
                return
    pytest.fail("no box began late")


def test_phase_kinds_leave_levels_and_level_kinds_leave_phase():
    grid, random = Grid(512, 257, 80), np.random.default_rng(0)
    level, phase = torch.randn(257, 80), torch.randn(257, 80)
    for name, change in CHANGES.items():
        new_level, new_phase = change(level, phase, random, grid)
        assert new_level.shape == new_phase.shape == level.shape
        if "phase" in name or "delay" in name:
            assert torch.equal(new_level, level) and not torch.equal(new_phase, phase)
        elif name != "noise for harmonics":
            assert torch.equal(new_phase, phase) and not torch.equal(new_level, level)


def test_averaged_periods_leave_a_periodic_signal_and_calm_an_irregular_one():
    time = torch.arange(16000) / 16000
    steady = torch.sin(2 * np.pi * 125 * time) + 0.5 * torch.sin(2 * np.pi * 250 * time)
    assert (averaged_periods(steady, 1.0) - steady)[400:-400].abs().max() < 0.02
    random = torch.Generator().manual_seed(0)
    shaky = steady * (1 + 0.5 * torch.randn(125, generator=random).repeat_interleave(128))
    rough = lambda signal: (signal[2000:14000] - signal[1872:13872]).pow(2).mean()  # noqa: E731
    assert rough(averaged_periods(shaky, 1.0)) < 0.7 * rough(shaky)


def test_truth_on_a_levels_grid_keeps_its_share():
    boxes = torch.zeros(1, 257, 60)
    boxes[0, :, 30:] = 1
    found = Damage(boxes, torch.tensor([[0.0, 1.0]]), 512).on_grid(60, 6000, (48, 32))
    assert found.shape == (1, 2, 48, 32) and not found[0, 0].any()
    assert float(found[0, 1].mean()) == pytest.approx(0.5, abs=0.01)
    assert float(found[0, 1, :, :15].max()) == 0 and float(found[0, 1, :, 17:].min()) == 1
