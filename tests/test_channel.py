import numpy as np
import pytest
import scipy.ndimage
import scipy.signal

from lib.audit.robustness import NUMBERS as CONDITION
from lib.audit.robustness import condition_numbers
from lib.data.channel import (
    FRAME,
    active_frames,
    apply_channel,
    band_filter,
    convolved,
    dispersed,
    dispersion_filter,
    limited,
    pass_channel,
    running_maximum,
    speech_bounds,
    traits,
)
from lib.evaluate.baselines import NUMBERS as TRIVIAL
from lib.evaluate.baselines import trivial_numbers
from lib.settings import RATE_HZ, Channel
from tests.conftest import toy_speech

CHANNEL = Channel()


def burst(seconds=1.5, seed=0, lead=0.0, gain=0.1):
    """Noise with a syllable-like envelope, after `lead` seconds of silence."""
    random = np.random.default_rng(seed)
    time = np.arange(int(seconds * RATE_HZ)) / RATE_HZ
    body = random.standard_normal(len(time)) * (0.6 + 0.4 * np.sin(2 * np.pi * 4 * time)) * gain
    return np.concatenate([np.zeros(int(lead * RATE_HZ)), body]).astype(np.float32)


def test_level_and_noise_floor_are_the_settings():
    audio, active = apply_channel(burst(), CHANNEL)
    mask = np.repeat(active, FRAME)[: len(audio)]
    assert 10 * np.log10(np.mean(audio[mask] ** 2)) == pytest.approx(CHANNEL.level_db, abs=0.3)
    quiet = apply_channel(burst(), CHANNEL, noise=False)[0]
    assert 10 * np.log10(np.mean((audio - quiet) ** 2)) == pytest.approx(CHANNEL.level_db - CHANNEL.snr_db, abs=0.2)


def with_ends(audio):
    """Speech that stops before the file does, so that an offset has ends to click at."""
    return np.concatenate([np.zeros(4000), audio, np.zeros(4000)]).astype(np.float32)


@pytest.mark.parametrize("gain, offset", [(0.01, 0), (9, 0), (1, 0.05), (0.5, -0.2)])
def test_gain_and_offset_change_nothing(gain, offset):
    audio = with_ends(burst())
    before, after = (pass_channel(each, CHANNEL) for each in (audio, audio * np.float32(gain) + np.float32(offset)))
    assert before.start == after.start and np.array_equal(before.active, after.active)
    assert np.allclose(before.audio, after.audio, atol=2e-5)  # the noise is a hundred times that


def test_another_bit_depth_keeps_the_noise():
    audio = burst()
    rough = (np.rint(audio * 4096) / 4096).astype(np.float32)
    noises = [apply_channel(each, CHANNEL)[0] - apply_channel(each, CHANNEL, noise=False)[0] for each in (audio, rough)]
    assert np.allclose(*noises, atol=1e-6) and noises[0].std() > 1e-3


def test_the_passage_keeps_the_recordings_own_level():
    audio = with_ends(burst())
    passage = pass_channel(0.1 * audio, CHANNEL)
    assert (passage.start, passage.start + len(passage.band)) == speech_bounds(audio, CHANNEL)
    assert np.allclose(10 * passage.band, pass_channel(audio, CHANNEL).band, atol=1e-6)
    assert 0.5 < passage.band.std() / (0.1 * burst()).std() < 1


def test_leading_silence_is_trimmed():
    assert abs(len(apply_channel(burst(lead=0.7), CHANNEL)[0]) - len(apply_channel(burst(), CHANNEL)[0])) <= 2 * FRAME


def test_band_limit():
    audio = apply_channel(burst(), CHANNEL, noise=False)[0]
    spectrum, hertz = np.abs(np.fft.rfft(audio)) ** 2, np.fft.rfftfreq(len(audio), 1 / RATE_HZ)
    assert 10 * np.log10(spectrum[hertz > 6300].mean() / spectrum[(hertz > 500) & (hertz < 5500)].mean()) < -30


def test_same_recording_gets_the_same_noise_and_another_another():
    bursts = [burst(seed=seed) for seed in (0, 0, 1)]
    noise = [apply_channel(each, CHANNEL)[0] - apply_channel(each, CHANNEL, noise=False)[0] for each in bursts]
    assert np.array_equal(noise[0], noise[1]) and not np.array_equal(noise[0], noise[2])


def test_silence_is_refused():
    with pytest.raises(ValueError, match="no speech"):
        apply_channel(np.zeros(RATE_HZ, np.float32), CHANNEL)


def test_off_leaves_audio_alone():
    audio = burst()
    assert np.array_equal(apply_channel(audio, Channel(enabled=False))[0], audio)


def test_all_pass_keeps_magnitudes_and_delays_high_frequencies():
    spectrum = np.fft.rfft(dispersion_filter(0.004))
    assert np.allclose(np.abs(spectrum), 1, atol=1e-6)
    click = np.zeros(2000)
    click[100] = 1
    assert abs(int(np.argmax(np.abs(dispersed(click, 0.0)))) - 100) == 0
    energy = dispersed(click, 0.004) ** 2
    assert 100 < (energy * np.arange(2000)).sum() / energy.sum() < 100 + 0.004 * RATE_HZ


def test_limiter_takes_peaks_away():
    audio = burst().astype(np.float64)
    audio[5000] = 3.0
    active = active_frames(audio, 35)
    done = limited(audio, active, 8.0)
    assert crest(done) < 11 and np.abs(done).max() < np.abs(audio).max()


def crest(audio):
    return 20 * np.log10(np.abs(audio).max() / np.sqrt(np.mean(audio**2)))


def test_channel_brings_crest_factors_together():
    natural = burst(seed=4)
    studio = (np.tanh(natural / 0.08) * 0.08).astype(np.float32)  # peak-limited, as some corpora are
    before = crest(natural) - crest(studio)
    after = [crest(apply_channel(audio, CHANNEL, noise=False)[0]) for audio in (natural, studio)]
    assert before > 3 and abs(after[0] - after[1]) < 0.4 * before


def test_band_filter_is_the_windowed_sinc_of_scipy():
    known = scipy.signal.firwin(513, [60, 6000], pass_zero=False, fs=16000, window=("kaiser", 7.0))
    assert np.allclose(band_filter(60, 6000), known, rtol=0, atol=1e-12)


@pytest.mark.parametrize("samples", [1, 64, 65, 513, 3584, 3585, 70_000])
@pytest.mark.parametrize("taps", [65, 513, 2048])
def test_convolution_by_blocks_is_the_convolution(samples, taps):
    random = np.random.default_rng(samples)
    audio, weights = random.standard_normal(samples), random.standard_normal(taps)
    whole = np.concatenate([scipy.signal.fftconvolve(audio, weights), np.zeros(samples)])
    for start in (0, taps // 2, taps - 1):
        assert np.allclose(convolved(audio, weights, start), whole[start : start + samples], rtol=0, atol=1e-9)
    assert convolved(audio.astype(np.float32), weights).dtype == np.float32


@pytest.mark.parametrize("half", [1, 2, 3, 32, 33])
@pytest.mark.parametrize("samples", [1, 5, 64, 65, 1000])
def test_running_maximum_is_that_of_scipy(samples, half):
    values = np.abs(np.random.default_rng(half).standard_normal(samples))
    assert (running_maximum(values, half) == scipy.ndimage.maximum_filter1d(values, 2 * half + 1)).all()


def test_a_tone_after_a_pause_by_hand():
    tone = 0.1 * np.sin(2 * np.pi * 1000 * np.arange(RATE_HZ) / RATE_HZ)
    audio = np.concatenate([np.zeros(10 * FRAME), tone])
    numbers = traits(audio, active_frames(audio, 35.0))
    assert numbers["leading_silence_s"] == pytest.approx(0.2) and numbers["speech_s"] == pytest.approx(1)
    assert numbers["duration_s"] == pytest.approx(1.2) and numbers["paused_share"] == pytest.approx(1 / 6)
    assert numbers["crest_db"] == pytest.approx(20 * np.log10(2**0.5), abs=0.01)
    assert numbers["level_db"] == pytest.approx(10 * np.log10(0.005 / 1.2), abs=0.01)
    assert numbers["noise_floor_db"] == pytest.approx(-120 - 10 * np.log10(0.005), abs=0.01), "silence is -120 dB"
    assert 1000 < numbers["rolloff_hz"] < numbers["bandwidth_hz"] < 1500
    # 0.99 of the peak is passed for 0.0451 of a period of 16 samples each side: no two are neighbours.
    assert numbers["clipped_share"] == 0


def test_both_that_take_numbers_take_these():
    audio = toy_speech(2.0, 3)
    audio -= audio.mean()
    active = active_frames(audio, 35.0)
    numbers = traits(audio, active)
    assert trivial_numbers(audio, active) == {name: numbers[name] for name in TRIVIAL}
    expected = pytest.approx({name: numbers[name] for name in CONDITION}, rel=1e-4, abs=1e-4)
    assert dict(zip(CONDITION, condition_numbers(audio))) == expected
