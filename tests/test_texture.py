"""Texture: known values of noise, invariances, edges; the texture student and its map; recording chains."""

import numpy as np
import pytest
import torch

from lib.data.degradations import recorded
from lib.model.texture import (
    BANDS,
    CELLS,
    GROUPS,
    ROUGHNESS,
    TextureStudent,
    roughness,
    sameness,
    smoothness,
    train_texture_student,
    variation,
    window_starts,
)
from tests.test_lines import RATE, speechlike, voice

NOISE = np.random.default_rng(0).standard_normal(5 * RATE).astype(np.float32)


def test_noise_lies_below_its_local_mean_by_part_of_eulers_number():
    sound = speechlike()
    sound[: 2 * RATE] *= 1e-3  # a floor that the rest stands 20 dB above
    assert -0.577 < smoothness(sound, RATE) < -0.35  # 7 bins of a Hann window depend on each other


def test_clicks_are_smoother_than_noise_and_harmonics_rougher():
    noise, clicks = speechlike(), np.zeros(5 * RATE, np.float32)
    noise[: 2 * RATE] *= 1e-3
    clicks[2 * RATE :: 700] = 1
    voiced = voice(180.0, wobble=0.0)
    voiced[: 2 * RATE] *= 1e-3
    sounds = (clicks + 1e-4 * noise, noise, voiced)
    smooth, rough, rougher = (smoothness(np.float32(sound), RATE) for sound in sounds)
    assert smooth > rough > rougher


def test_an_equaliser_does_not_move_texture():
    sound = speechlike()
    sound[: 2 * RATE] *= 1e-3
    tilted = np.convolve(sound, [1, -0.9])[: len(sound)].astype(np.float32)
    assert smoothness(tilted, RATE) == pytest.approx(smoothness(sound, RATE), abs=0.03)


def test_smoothness_of_nothing_is_not_a_number_and_of_no_audio_an_error():
    assert np.isnan(smoothness(np.zeros(RATE, np.float32), RATE)) and np.isnan(smoothness(speechlike(0.2), RATE))
    for bad in (np.zeros((2, RATE)), np.full(RATE, np.nan)):
        with pytest.raises(ValueError, match="finite audio"):
            smoothness(bad, RATE)


def test_white_noise_is_as_rough_as_rayleigh_magnitudes():
    rough, level = roughness(NOISE)
    below, above = (rough[ROUGHNESS.index(f"{name} 64 ms")].exp().mean() - 1e-3 for name in ("below", "above"))
    assert rough.shape == (len(ROUGHNESS), BANDS, 78) and level.shape == (BANDS, 78)
    # Variance pi^2 / 6 = 1.645, less what the moving average over 13 bins takes away (windows overlap: about a ninth).
    assert 1.3 < float(below + above) < 1.645
    assert torch.allclose(rough, roughness(NOISE * np.float32(0.01))[0], atol=2e-3), "a gain changes nothing"


@pytest.mark.parametrize("audio", [NOISE[:4000], np.zeros(RATE, np.float32), np.zeros(0, np.float32)])
def test_too_short_or_silent_is_an_error_and_no_score(audio):
    with pytest.raises(ValueError, match="texture needs"):
        roughness(audio)
    assert np.isnan(sameness(TextureStudent().eval(), audio))


def test_variation_is_the_log_variance_of_the_cells():
    level = torch.arange(CELLS).float().expand(BANDS, CELLS)
    rough = torch.zeros(len(ROUGHNESS), BANDS, CELLS)
    rough[0, :, ::2] = 2.0  # half 0, half 2 over time: variance 1; alike in all bands: none over frequency
    values = variation(rough, level).view(2, len(ROUGHNESS), len(GROUPS))
    assert torch.allclose(values[0, 0], torch.tensor(1.01).log().expand(len(GROUPS)), atol=0.02)
    assert torch.allclose(values[1, 0], torch.tensor(0.01).log().expand(len(GROUPS)), atol=0.02)


def test_windows_cover_the_recording():
    for cells in (CELLS, CELLS + 1, 3 * CELLS + 7):
        starts = window_starts(cells)
        assert starts[0] == 0 and starts[-1] + CELLS == cells and max(np.diff([*starts, starts[-1]])) <= CELLS


def test_less_variation_is_more_anomalous_and_the_map_has_the_grid_of_cells():
    clips = [roughness(speechlike(4.0, seed=seed)) for seed in range(6)]
    student = train_texture_student(clips, seed=0, steps=20)
    again = train_texture_student(clips, seed=0, steps=20)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters()))
    rough, level = roughness(NOISE * (1.1 + np.sin(np.arange(len(NOISE)) / 2000)).astype(np.float32))
    mean = rough.mean((1, 2), keepdim=True)
    flat = mean + 0.1 * (rough - mean)
    assert float(student.surprise(flat, level).mean()) > float(student.surprise(rough, level).mean())


def test_chains_keep_length_and_level():
    for seed in range(12):
        made = recorded(NOISE, np.random.default_rng(seed))
        assert made.shape == NOISE.shape and np.isfinite(made).all()
        assert np.isclose(np.mean(made**2), np.mean(NOISE**2), rtol=0.01)
