"""Baselines: interface, determinism, direction on toy signals with a known answer, and clear errors."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.signal import sosfilt

from lib import seeds
from lib.audit.localisation import saliency
from lib.audit.shortcuts import trivial_auc
from lib.data.channel import FRAME, active_frames, apply_channel
from lib.evaluate import baseline_networks, baselines, metrics
from lib.evaluate.baseline_networks import BASELINES
from lib.evaluate.baselines import activity_at, checked_clips, lfcc, log_mel, trivial_numbers
from lib.model.images import row_hz
from lib.model.pyramid import ResNetPyramid, initialise
from lib.settings import RATE_HZ, Channel, View

CHANNEL = Channel()
ONE_CLASS = [name for name, entry in BASELINES.items() if entry.kind != "supervised"]
SUPERVISED = [name for name, entry in BASELINES.items() if entry.kind == "supervised"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def toy_clip(index: int, fake: bool, seconds: float = 1.2):
    """A gliding tone complex with a pause, through the channel; the fake one is breathy: its tones are half noise."""
    rng = seeds.stream(index, "toy", fake)
    time = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
    phase = 2 * np.pi * np.cumsum(rng.uniform(100, 200) * (1 + 0.1 * np.sin(2 * np.pi * 3 * time))) / RATE_HZ
    audio = sum(np.sin(k * phase + rng.uniform(0, 6)) / k for k in range(1, 25))
    if fake:
        audio = audio + sosfilt([[1, 0, -1, 1, -0.9, 0.2]], rng.standard_normal(len(time)))
    audio[round(0.5 * len(time)) : round(0.6 * len(time))] *= 1e-3
    return apply_channel((0.1 * audio).astype(np.float32), CHANNEL)


def tiny_features(audio: np.ndarray) -> list[torch.Tensor]:
    """A pyramid of a small random teacher on log-mel."""
    return TEACHER(log_mel(audio)[None, None] / 3 + 1)



class Given(torch.nn.Module):
    """A front end for images that are there already."""

    def __init__(self, planes: int) -> None:
        super().__init__()
        self.planes = planes

    def forward(self, picture: torch.Tensor, _: None = None) -> torch.Tensor:
        return picture


TEACHER = initialise(ResNetPyramid(Given(1), 8, 3), 0, "test").eval()


@pytest.fixture(scope="module")
def real():
    return [toy_clip(index, False) for index in range(24)]


@pytest.fixture(scope="module")
def fake():
    return [toy_clip(100 + index, True) for index in range(16)]


def make(name: str):
    """A new baseline, small enough for a test."""
    entry = BASELINES[name]
    baseline = entry.factory(tiny_features) if entry.needs else entry.factory()
    if hasattr(baseline, "steps"):
        baseline.steps = 25
    if isinstance(baseline, baseline_networks.Supervised):
        baseline.crop_s = 0.5
    if isinstance(baseline, baselines.TeacherKnn):
        baseline.memory, baseline.pool = 400, 2000
    if isinstance(baseline, baselines.TeacherMahalanobis):
        baseline.dimensions = 6
    if isinstance(baseline, baseline_networks.SupervisedResNet):
        baseline.view = View(bins=48, hop_s=0.016, planes=("level", "advance"))
    return baseline


@pytest.fixture(scope="module")
def fitted(real, fake):
    """Every baseline, fitted on 16 real clips (and 8 fake ones where it is supervised)."""
    return {name: make(name).fit(*((real[:16], fake[:8]) if name in SUPERVISED else (real[:16],)), seed=3)
            for name in BASELINES}


def test_registry_names_every_kind():
    kinds = {entry.kind for entry in BASELINES.values()}
    assert kinds == {"trivial", "one-class", "ablation", "pseudo-fake", "supervised"}
    needs = [entry.needs for entry in BASELINES.values() if entry.needs]
    assert needs == ["features", "features", "readings", "logits"]


@pytest.mark.parametrize("name", BASELINES)
def test_anomaly_is_one_finite_number_a_clip_and_up_for_fakes(name, fitted, real, fake):
    held_out, spoof = fitted[name].anomaly(real[16:]), fitted[name].anomaly(fake[8:])
    assert held_out.shape == spoof.shape == (8,) and held_out.dtype == np.float64
    assert np.isfinite(held_out).all() and np.isfinite(spoof).all()
    # 25 steps of Deep SVDD rank nothing reliably; perturbations are no breath, and the teacher here names no damage.
    if name not in ("Deep SVDD", "ResNet on perturbed speech", "Teacher's damage probability"):
        assert metrics.area_under_curve(-held_out, -spoof) > 0.8


@pytest.mark.parametrize("name", BASELINES)
def test_same_seed_same_bits_and_no_global_state_touched(name, fitted, real, fake):
    torch.manual_seed(11)
    expected_next = torch.rand(3)
    torch.manual_seed(11)
    again = make(name).fit(*((real[:16], fake[:8]) if name in SUPERVISED else (real[:16],)), seed=3)
    assert torch.equal(torch.rand(3), expected_next)
    clips = real[16:20] + fake[8:12]
    np.testing.assert_array_equal(again.anomaly(clips), fitted[name].anomaly(clips))


@pytest.mark.parametrize("name", ["Deep SVDD", "Supervised LCNN on LFCC", "LFCC, Gaussian mixture",
                                  "ResNet on perturbed speech", "Teacher neighbours (PatchCore)",
                                  "Teacher Gaussian (PaDiM)"])
def test_another_seed_gives_other_scores(name, fitted, real, fake):
    other = make(name).fit(*((real[:16], fake[:8]) if name in SUPERVISED else (real[:16],)), seed=4)
    assert not np.array_equal(other.anomaly(real[16:18]), fitted[name].anomaly(real[16:18]))


@pytest.mark.parametrize("name", BASELINES)
def test_a_score_does_not_depend_on_the_other_clips(name, fitted, real):
    together = fitted[name].anomaly(real[16:19])
    assert together[1] == fitted[name].anomaly([real[17]])[0]


@pytest.mark.parametrize("name", [name for name in ONE_CLASS if name.startswith(("LFCC", "Teacher"))])
def test_pauses_do_not_count(name, real):
    """Noise deep inside a masked stretch changes nothing where features are local, and much where it is not masked."""
    entry = BASELINES[name]
    local = [lambda audio: [log_mel(audio)[None, None]]] if entry.needs else []
    baseline = entry.factory(*local).fit(real[:16])
    audio, active = real[16]
    masked = active.copy()
    masked[20:40] = False
    noisy = audio.copy()
    noisy[26 * FRAME : 34 * FRAME] += seeds.stream(0, "noise").standard_normal(8 * FRAME).astype(np.float32)
    clean, inside, counted = baseline.anomaly([(audio, masked), (noisy, masked), (noisy, np.ones_like(active))])
    assert inside == pytest.approx(clean, abs=1e-5)
    assert counted > clean


@pytest.mark.parametrize("name", BASELINES)
def test_errors_say_what_is_wrong(name, fitted, real, fake):
    audio, active = real[0]
    broken = audio.copy()
    broken[5] = np.nan
    fit = (lambda clips: make(name).fit(clips, fake)) if name in SUPERVISED else make(name).fit
    for act in (fit, fitted[name].anomaly):
        for clips, message in (([], "at least one clip"), ([(broken, active)], "1 NaN or Inf"),
                               ([(audio, active[:-1])], "flag for each"),
                               ([(audio, np.zeros_like(active))], "some active"),
                               ([(audio[None], active)], "mono")):
            with pytest.raises(ValueError, match=message):
                act(clips)
    with pytest.raises(ValueError, match="Call fit"):
        make(name).anomaly(real[:1])


@pytest.mark.parametrize("name", SUPERVISED)
def test_supervised_needs_both_classes(name, real):
    with pytest.raises(ValueError, match="in spoof, found none"):
        make(name).fit(real, [])


@pytest.mark.parametrize("name", BASELINES)
def test_short_and_odd_lengths(name, fitted, real):
    audio, active = real[16]
    for samples in (FRAME * 10, FRAME * 10 + 1, FRAME * 11 - 1):
        value = fitted[name].anomaly([(audio[:samples], active[: -(-samples // FRAME)])])
        assert np.isfinite(value).all()


def test_trivial_numbers_of_a_signal_with_known_answers():
    """0.2 s of silence, then 1 s of a 1 kHz sine of amplitude 0.5: crest 3.01 dB, level -9.03 dB while it sounds."""
    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(RATE_HZ) / RATE_HZ)
    audio = np.concatenate([np.zeros(RATE_HZ // 5), tone])
    numbers = trivial_numbers(audio, active_frames(audio, 35.0))
    assert numbers["leading_silence_s"] == pytest.approx(0.2)
    assert numbers["duration_s"] == pytest.approx(1.2)
    assert numbers["paused_share"] == pytest.approx(1 / 6)
    assert numbers["crest_db"] == pytest.approx(20 * np.log10(2**0.5), abs=0.01)
    assert numbers["level_db"] == pytest.approx(20 * np.log10(0.5 / 2**0.5) + 10 * np.log10(1 / 1.2), abs=0.01)
    assert numbers["rolloff_hz"] == pytest.approx(1000, abs=60)
    assert numbers["noise_floor_db"] < -100


def test_trivial_numbers_of_noise():
    """White noise is flat to 8 kHz; integrated it falls by 6 dB an octave; gain moves the level alone."""
    noise = seeds.stream(0, "white").standard_normal(4 * RATE_HZ) * 0.05
    active = np.ones(200, dtype=bool)
    white, louder = trivial_numbers(noise, active), trivial_numbers(2 * noise, active)
    assert white["rolloff_hz"] == pytest.approx(0.95 * 8000, rel=0.02)
    assert white["tilt_db_per_octave"] == pytest.approx(0, abs=0.3)
    assert white["noise_floor_db"] == pytest.approx(0, abs=1)
    assert louder.pop("level_db") - white.pop("level_db") == pytest.approx(6.02, abs=0.01)
    assert louder == pytest.approx(white, abs=1e-3)
    brown = sosfilt([[1, 0, 0, 1, -0.999, 0]], noise)
    assert trivial_numbers(brown, active)["tilt_db_per_octave"] == pytest.approx(-6, abs=0.7)
    assert trivial_numbers(noise, active, rate_hz=8000)["duration_s"] == pytest.approx(8)


def test_trivial_auc_both_directions():
    bonafide = pd.DataFrame({"same": [1.0, 2, 3], "lower": [5.0, 6, 7], "higher": [0.0, 1, 2]})
    table = trivial_auc(bonafide, pd.DataFrame({"same": [1.0, 2, 3], "lower": [1.0, 2, 3], "higher": [5.0, 6, 1]}))
    assert table["auc_higher_is_fake"].tolist() == pytest.approx([0.5, 0.0, (3 + 3 + 1.5) / 9])
    assert table["auc_either_direction_ceiling"].tolist() == pytest.approx([0.5, 1.0, 7.5 / 9])
    with pytest.raises(ValueError, match="non-empty"):
        trivial_auc(bonafide, bonafide[:0])


def test_features_have_the_stated_shapes():
    audio = np.zeros(RATE_HZ, dtype=np.float32)
    assert log_mel(audio).shape == (64, 1 + RATE_HZ // 256)
    assert lfcc(audio).shape == (60, 1 + RATE_HZ // 160)
    assert lfcc(torch.zeros(3, RATE_HZ)).shape == (3, 60, 1 + RATE_HZ // 160)
    energy = log_mel(np.sin(2 * np.pi * 1000 * np.arange(RATE_HZ) / RATE_HZ).astype(np.float32)).mean(dim=1)
    quiet = log_mel(audio).mean(dim=1)
    assert 10 < int((energy - quiet).argmax()) < 40  # 1 kHz lies at 0.35 of the mel axis from 60 Hz to 6 kHz


def test_activity_at_keeps_the_ends_and_never_is_empty():
    active = np.array([True, True, False, False, True])
    assert activity_at(active, 9).tolist() == [True] * 4 + [False] * 4 + [True]
    assert activity_at(np.array([False, True, False]), 2).tolist() == [True, True]
    assert activity_at(active, 1).tolist() == [True]


def test_active_mean_against_hand_computed_values():
    values = torch.tensor([[[1.0, 2, 3, 4], [4, 4, 4, 4]]])
    active = torch.tensor([[1.0, 1, 1, 1, 0, 0, 0, 0]])
    found, unmasked = (baseline_networks.active_mean(values, mask) for mask in (active, 0 * active))
    torch.testing.assert_close(found, torch.tensor([[1.5, 4.0]]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(unmasked, torch.tensor([[2.5, 4.0]]))


def test_crops_are_pieces_of_their_clips_and_keep_activity():
    audio = np.arange(20 * FRAME, dtype=np.float32)
    active = np.arange(20) % 3 == 0
    pieces, flags = baseline_networks.crops([(audio, active)], 0.1, 7, seeds.stream(0))
    assert pieces.shape == (7, 5 * FRAME) and flags.shape == (7, 5)
    for piece, flag in zip(pieces, flags):
        start = int(piece[0])
        assert start % FRAME == 0 and torch.equal(piece, torch.from_numpy(audio[start : start + 5 * FRAME]))
        assert flag.bool().tolist() == active[start // FRAME : start // FRAME + 5].tolist()
    pieces, flags = baseline_networks.crops([(audio[: 2 * FRAME], active[:2])], 0.1, 1, seeds.stream(0))
    assert torch.equal(pieces[0, : 2 * FRAME], pieces[0, 2 * FRAME : 4 * FRAME])  # shorter clips are repeated


def test_k_centres_covers_every_cluster():
    points = torch.tensor([[0.0, 0], [0.1, 0], [10, 0], [10.1, 0], [0, 10]])
    assert sorted(int(index) // 2 for index in baselines.k_centres(points, 3, 0)) == [0, 1, 2]
    assert len(baselines.k_centres(points, 99, 1)) == 5


def test_row_gaussians_whiten_their_own_samples():
    values = torch.randn(5, 2, 4000, generator=torch.Generator().manual_seed(0))
    values[1] += values[0]
    values[:, 1] *= 7
    mean, whitening = baselines.TeacherMahalanobis._gaussians(values)
    assert mean.shape == (2, 5, 1) and whitening.shape == (2, 5, 5)
    squared = (whitening @ (values.transpose(0, 1) - mean)).square().sum(dim=1).mean(dim=1)
    torch.testing.assert_close(squared, torch.tensor([5.0, 5.0]), rtol=0.03, atol=0)


def test_nearest_neighbours_know_their_own_patches(real):
    baseline = baselines.TeacherKnn(tiny_features)
    baseline.neighbours = 1
    baseline.fit(real[:2])
    assert baseline.anomaly(real[:2]).max() < 1e-2 * baseline.anomaly(real[2:3])[0]


def test_deep_svdd_has_no_bias_and_a_centre_away_from_zero(fitted):
    baseline = fitted["Deep SVDD"]
    assert not [name for name, _ in baseline.network.named_parameters() if "bias" in name]
    assert baseline.centre.shape == (32, 1) and baseline.centre.abs().min() >= 0.1


def test_saliency_has_the_axes_of_the_view_and_points_at_the_evidence(fitted, real, fake):
    baseline = fitted["Supervised ResNet"]
    audio, active = fake[8]
    found = saliency(baseline, audio, active)
    assert found.shape == (len(row_hz(baseline.view, CHANNEL)), 1 + len(audio) // round(baseline.view.hop_s * RATE_HZ))
    assert found.dtype == np.float32 and (found >= 0).all() and found.max() > 0
    np.testing.assert_array_equal(found, saliency(baseline, audio, active))
    assert not np.array_equal(found, saliency(baseline, audio))
    # The gradient agrees with a finite difference along its own direction, in double precision.
    network = baseline.network.double()
    images = baseline._images(torch.from_numpy(audio)[None]).double().requires_grad_()
    flags = torch.from_numpy(active).double()[None]
    gradient, = torch.autograd.grad(network(images, flags).sum(), images)
    step = 1e-6 * gradient / gradient.norm()
    with torch.no_grad():
        slope = (network(images + step, flags) - network(images - step, flags)) / 2e-6
    network.float()
    assert float(slope) == pytest.approx(float(gradient.norm()), rel=1e-3)
    np.testing.assert_allclose(found, gradient[0].abs().amax(dim=0).numpy(), rtol=1e-3, atol=1e-5 * found.max())
    with pytest.raises(ValueError, match="Call fit"):
        saliency(make("Supervised ResNet"), audio)


def test_checked_clips_copies_nothing_and_converts(real):
    audio, active = checked_clips([(real[0][0].astype(np.float64), real[0][1].astype(int))])[0]
    assert audio.dtype == np.float32 and active.dtype == bool
    assert checked_clips(real)[0][0] is real[0][0]


def test_a_kind_of_damage_that_is_left_out_is_not_in_the_teachers_task(monkeypatch):
    """`training.without` reaches the perturbations, and an empty one is the training that there was."""
    from lib.model import training
    from lib.model.perturbations import KINDS
    from lib.settings import load_settings

    def stop(audio, random, kinds):
        seen.append(kinds)
        raise InterruptedError

    seen = []
    monkeypatch.setattr(training, "perturbed", stop)
    for without in ("", "drift of phase"):
        settings = load_settings("smoke", 0, {"training.without": without})
        with pytest.raises(InterruptedError):
            training.perturbation_loss(None, np.zeros((2, 16000), np.float32), settings, seeds.stream(0))
    assert seen == [KINDS, tuple(kind for kind in KINDS if kind != "drift of phase")]
