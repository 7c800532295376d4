import numpy as np
import pytest
import torch

from lib.data.channel import apply_channel
from lib.detector import Detector
from lib.model.checkpoints import DetectorError
from lib.model.discrepancy import clip_statistics
from lib.model.pyramid import folded
from lib.model.scaling import Typicality
from tests.conftest import RATE, toy_speech


def prepared(detector, seconds=2.0, seed=3):
    return apply_channel(toy_speech(seconds, seed), detector.settings.channel)


def test_folded_networks_are_the_same_function(tiny_detector):
    audio = torch.from_numpy(toy_speech(1.0, 0))[None]
    for network in (tiny_detector.teacher, tiny_detector.student):
        for plain, fast in zip(network(audio), folded(network)(audio)):
            assert torch.allclose(plain, fast, atol=1e-3 * float(plain.abs().max()))


def test_networks_take_audio_and_share_the_image_where_it_is_there(tiny_detector):
    audio = torch.from_numpy(toy_speech(1.0, 0))[None]
    picture = tiny_detector.front(audio)
    for network in (tiny_detector.teacher, tiny_detector.student):
        assert all(torch.equal(*pair) for pair in zip(network(audio), network(audio, picture)))


def test_bf16_rounds_and_nothing_else(tiny_detector):
    audio, active = apply_channel(toy_speech(1.5, 77, 120), tiny_detector.settings.channel)
    exact = tiny_detector.score_prepared(audio, active)
    try:
        rough = tiny_detector.in_precision("bf16").score_prepared(audio, active)
        assert rough != exact and abs(rough - exact) < 0.1 * tiny_detector.calibration.std()
        assert all(level.dtype == torch.float32 for pyramid in tiny_detector.pyramids(audio)[1:] for level in pyramid)
    finally:
        assert tiny_detector.in_precision("fp32").score_prepared(audio, active) == exact
    with pytest.raises(ValueError, match="fp32 or bf16"):
        tiny_detector.in_precision("fp16")


def test_a_map_has_the_images_axes(tiny_detector):
    audio, active = prepared(tiny_detector)
    explanation = tiny_detector.explain_prepared(audio, active)
    view = tiny_detector.settings.view
    assert explanation.map.shape == explanation.image.shape[1:] == (view.bins, 1 + len(audio) // 128)
    assert len(explanation.active) == explanation.map.shape[1] and len(explanation.row_hz) == view.bins
    assert all(level.shape == explanation.map.shape for level in explanation.levels)
    assert np.isfinite(explanation.map).all()


def test_the_colour_scale_runs_from_the_median_to_the_highest_thousandth(tiny_detector):
    clips = [prepared(tiny_detector, seed=seed) for seed in (3, 4)]
    low, high = tiny_detector.colour_limits(clips)
    cells = np.concatenate([tiny_detector.explain_prepared(*clip).cells for clip in clips])
    assert np.mean(cells > high) == pytest.approx(0.001, abs=2e-4)
    assert np.mean(cells > low) == pytest.approx(0.5, abs=1e-3)
    assert tiny_detector.map_limits[0] < tiny_detector.map_limits[1]


@pytest.mark.parametrize("gain, offset", [(0.1, 0.0), (1.0, 0.03), (0.3, -0.1)])
def test_gain_and_offset_do_not_change_the_score(tiny_detector, gain, offset):
    audio = toy_speech(2.0, 5)
    other = gain * audio + np.float32(offset)
    assert tiny_detector.score(other, RATE) == pytest.approx(tiny_detector.score(audio, RATE), rel=1e-3)


def test_score_and_explain_agree_and_repeat(tiny_detector):
    audio = toy_speech(2.0, 6)
    scores = [tiny_detector.score(audio, RATE) for _ in range(2)]
    assert scores[0] == scores[1] == tiny_detector.explain(audio, RATE).anomaly


def test_time_shift_shifts_the_map(tiny_detector):
    audio, _ = prepared(tiny_detector, 4.0)
    shift = 16 * 128  # the deepest stride, in samples
    moved = np.concatenate([np.zeros(shift, np.float32), audio])
    active = np.ones(300, dtype=bool)
    one, two = (tiny_detector.explain_prepared(part, active, kind="frequency").map for part in (audio, moved))
    far = 130  # beyond the receptive field of either edge
    assert np.allclose(one[:, far:-far], two[:, far + 16 : -far], atol=1e-3)


def test_padding_reaches_no_further_than_the_receptive_field(tiny_detector):
    audio, _ = prepared(tiny_detector, 3.0)
    active = np.ones(400, dtype=bool)
    longer = np.concatenate([audio, np.zeros(16 * 128 * 4, np.float32)])
    one, two = (tiny_detector.explain_prepared(part, active, kind="frequency").map for part in (audio, longer))
    assert np.allclose(one[:, :-130], two[:, : one.shape[1] - 130], atol=1e-3)


def test_long_recordings_go_through_in_blocks_with_the_same_result(tiny_detector, monkeypatch):
    import lib.detector

    audio, active = prepared(tiny_detector, 8.0)
    whole = tiny_detector.clip_residuals(audio, active)
    monkeypatch.setattr(lib.detector, "BLOCK_S", 2.0)
    blocks = tiny_detector.clip_residuals(audio, active)
    assert whole[0].shape == blocks[0].shape and torch.allclose(whole[0], blocks[0], atol=1e-4)
    for (one, mask), (two, other) in zip(whole[1], blocks[1]):
        assert one.shape == two.shape and torch.equal(mask, other)
        # At the seams a block sees the other side through its margin of a second: wider than the receptive field.
        assert (one - two).abs().max() < 1e-4 * one.abs().max()


def test_typicality_is_one_on_what_it_was_fitted_on_and_looks_both_ways():
    random = np.random.default_rng(0)
    profiles = random.standard_normal((400, 6)) * 3 + 5
    model = Typicality.fit(profiles)
    assert np.sqrt((model.score("profile", profiles) ** 2).mean()) == pytest.approx(1, abs=0.1)
    assert np.sqrt((model.score("two_sided", profiles) ** 2).mean()) == pytest.approx(1, abs=0.01)
    high, low = (model.score("two_sided", np.full((1, 6), value)) for value in (11.0, -1.0))
    assert high[0] > 1.8 and low[0] == pytest.approx(high[0], rel=0.2)
    with pytest.raises(ValueError, match="at least 3"):
        Typicality.fit(profiles[:2])


def test_p_values_are_conformal(tiny_detector):
    scores = tiny_detector.calibration
    assert tiny_detector.p_value(scores.max() + 1) == pytest.approx(1 / (len(scores) + 1))
    assert tiny_detector.p_value(scores.min() - 1) == 1.0


def test_recalibration_on_own_recordings(saved_detector, tmp_path):
    from lib.data.audio import write_audio

    for number in range(6):
        write_audio(tmp_path / f"{number}.wav", toy_speech(9.0, 40 + number), RATE)
    detector = Detector.load(saved_detector).fit(sorted(tmp_path.glob("*.wav")))
    assert len(detector.calibration) == 9 and detector.fitted_on["scaling"][0] == "0.wav@0s"
    sides = [{name.split("@")[0] for name in detector.fitted_on[part]} for part in ("scaling", "threshold")]
    assert len(sides[0]) == len(sides[1]) == 3 and not sides[0] & sides[1], "no recording calibrates what it scaled"
    write_audio(tmp_path / "long.wav", toy_speech(30.0, 50), RATE)
    detector.fit([tmp_path / "long.wav", tmp_path / "0.wav"])
    assert detector.fitted_on["scaling"] == [f"long.wav@{start}s" for start in range(0, 18, 3)]
    assert detector.fitted_on["threshold"][0] == "long.wav@18s", "neighbouring pieces are on one side"
    with pytest.raises(DetectorError, match="at least 8 pieces"):
        detector.fit([tmp_path / "0.wav"])


@pytest.mark.parametrize(("audio", "message"), [
    (np.full(16000, np.nan, np.float32), "NaN"),
    (np.zeros((2, 16000), np.float32), "mono"),
    (np.zeros(100, np.float32), "too short"),
    (np.zeros(16000, np.float32), "no speech"),
])
def test_bad_samples_are_refused(tiny_detector, audio, message):
    with pytest.raises(ValueError, match=message):
        tiny_detector.score(audio, RATE)


def test_one_sided_leaves_out_what_is_below_the_mean():
    model = Typicality(np.zeros(4), np.ones(4), np.eye(4))
    profiles = np.array([[-7.0, 0, 0, 0], [2.0, 0, 0, 0], [2.0, -7.0, 0, 0]])
    assert np.allclose(model.score("one_sided", profiles), [0, 1, 1])  # sqrt(4 / 4)
    assert np.allclose(model.score("two_sided", profiles), [3.5, 1, np.sqrt(53 / 4)])


def test_without_readers_a_score_of_readings_is_refused(tiny_detector):
    settings = tiny_detector.settings
    assert (settings.scoring.scaling, settings.scoring.pooling) == ("read", "one_sided")
    with pytest.raises(DetectorError, match="set scoring.scaling=signed and scoring.pooling=two_sided"):
        Detector(settings, tiny_detector.teacher.pyramid, tiny_detector.student)


@pytest.mark.parametrize("kind", ["none", "signed", "frequency", "read"])
def test_the_map_is_combined_as_the_settings_say(tiny_detector, kind):
    clip = prepared(tiny_detector)
    product = Detector(tiny_detector.settings.with_options({"scoring.combine": "product"}), tiny_detector.teacher,
                       tiny_detector.student)
    product.scaling, product.typicality = tiny_detector.scaling, tiny_detector.typicality
    summed, multiplied = (one.explain_prepared(*clip, kind=kind) for one in (tiny_detector, product))
    levels = np.array(summed.levels)
    assert np.allclose(summed.map, levels.mean(0), atol=1e-6) and np.array_equal(levels, multiplied.levels)
    # What can be negative goes through the softplus, whatever this clip's values are.
    expected = levels if kind in ("none", "signed") else np.logaddexp(0, levels)
    assert np.allclose(multiplied.map, expected.prod(0), rtol=1e-4)


def test_the_read_profile_is_the_readers_of_the_mean_residual(tiny_detector):
    audio, active = apply_channel(toy_speech(1.5, 3, 120.0), tiny_detector.settings.channel)
    levels = tiny_detector.clip_residuals(audio, active)[1]
    found = clip_statistics(levels, tiny_detector.scaling, ("read",), (), bands=6)["profile/read"]
    bands, start = tiny_detector.settings.scoring.bands, 0
    for (parts, mask), reader in zip(levels, tiny_detector.scaling.readers):
        mean = (reader @ parts[..., mask].mean(-1)).numpy()  # (kind, frequency)
        size = mean.shape[0] * min(bands, mean.shape[1])
        assert np.allclose(found[start : start + size].reshape(len(mean), -1).mean(1), mean.mean(1), atol=1e-5)
        start += size
    assert start == len(found)
