import numpy as np
import pytest

from lib.channel import FRAME, active_frames, apply_channel, dispersed, dispersion_filter, limited
from lib.settings import RATE_HZ, Channel

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


def test_gain_changes_nothing_but_the_noise():
    one, two = (apply_channel(burst(gain=gain), CHANNEL, noise=False)[0] for gain in (0.01, 0.2))
    assert np.allclose(one, two, atol=1e-4)


def test_leading_silence_is_trimmed():
    assert abs(len(apply_channel(burst(lead=0.7), CHANNEL)[0]) - len(apply_channel(burst(), CHANNEL)[0])) <= 2 * FRAME


def test_band_limit():
    audio = apply_channel(burst(), CHANNEL, noise=False)[0]
    spectrum, hertz = np.abs(np.fft.rfft(audio)) ** 2, np.fft.rfftfreq(len(audio), 1 / RATE_HZ)
    assert 10 * np.log10(spectrum[hertz > 6300].mean() / spectrum[(hertz > 500) & (hertz < 5500)].mean()) < -30


def test_same_recording_gets_the_same_noise():
    assert np.array_equal(apply_channel(burst(), CHANNEL)[0], apply_channel(burst(), CHANNEL)[0])


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
    crest = 20 * np.log10(np.abs(done).max() / np.sqrt(np.mean(done**2)))
    assert crest < 11 and np.abs(done).max() < np.abs(audio).max()


def test_channel_brings_crest_factors_together():
    crest = lambda audio: 20 * np.log10(np.abs(audio).max() / np.sqrt(np.mean(audio**2)))  # noqa: E731
    natural = burst(seed=4)
    studio = (np.tanh(natural / 0.08) * 0.08).astype(np.float32)  # peak-limited, as some corpora are
    before = crest(natural) - crest(studio)
    one, two = (crest(apply_channel(audio, CHANNEL, noise=False)[0]) for audio in (natural, studio))
    assert before > 3 and abs(one - two) < 0.4 * before
