"""Properties of constant lines on sounds made by hand."""

import numpy as np
import pytest

from lib.model import lines

RATE = 16000


def speechlike(seconds=5.0, rate=RATE, seed=0):
    """Noise in slow syllables: no voice, no lines."""
    random = np.random.default_rng(seed)
    samples = random.standard_normal(int(seconds * rate))
    syllables = 0.02 + np.abs(np.sin(2 * np.pi * 2.1 * np.arange(len(samples)) / rate))
    return (0.1 * samples * syllables).astype(np.float32)


def comb(spacing_hz, seconds=5.0, rate=RATE, top_hz=7800, level=3e-3, seed=1):
    time = np.arange(int(seconds * rate)) / rate
    random = np.random.default_rng(seed)
    return sum(level * np.cos(2 * np.pi * (k * spacing_hz * time + random.random()))
               for k in range(1, int(top_hz / spacing_hz) + 1)).astype(np.float32)


def voice(f0_hz, seconds=5.0, wobble=0.0, seed=2):
    random = np.random.default_rng(seed)
    time = np.arange(int(seconds * RATE)) / RATE
    phase = np.cumsum(f0_hz * (1 + wobble * np.sin(2 * np.pi * 3 * time))) / RATE
    return sum(0.1 / k * np.cos(2 * np.pi * k * phase + random.random())
               for k in range(1, int(7800 / f0_hz))).astype(np.float32)


@pytest.mark.parametrize("spacing_hz", [62.5, 80.0, 22050 / 256, 93.75])
def test_a_known_comb_is_found_and_named(spacing_hz):
    found = lines.constant_lines(speechlike() + comb(spacing_hz), RATE)
    assert found.strength > 8 and found.spacing_hz == spacing_hz and found.top_hz > 7000
    assert found.sentence().startswith(f"lines every {spacing_hz:.1f} Hz up to 7.")


def test_blind_names_a_comb_that_is_in_no_list():
    found = lines.blind_lines(speechlike() + comb(71.3), RATE)
    assert found.strength > 8 and abs(found.spacing_hz - 71.3) < 0.05


@pytest.mark.parametrize("rate", [22050, 24000, 44100])
def test_own_rates_hear_lines_above_8_khz(rate):
    found = lines.constant_lines(speechlike(rate=rate) + comb(93.75, rate=rate, top_hz=10500), rate)
    assert found.spacing_hz == 93.75 and found.top_hz > 9000


@pytest.mark.parametrize("name", ["noise", "hum", "usb", "mp3", "voice", "chords"])
def test_other_steady_sounds_are_not_lines(name):
    sound = speechlike()
    sound = sound + {"noise": 0, "hum": comb(50.02, top_hz=1400, level=0.02), "usb": comb(1000),
                     "mp3": comb(44100 / 32), "voice": voice(123.4),
                     "chords": voice(220.0) + voice(277.18) + voice(329.63)}[name]
    assert lines.constant_lines(np.float32(sound), RATE).strength < 5


def test_silence_and_short_clips_are_no_evidence():
    for audio in (np.zeros(RATE, np.float32), np.zeros(0, np.float32), speechlike(0.2)):
        assert lines.constant_lines(audio, RATE) == lines.blind_lines(audio, RATE) == lines.NOTHING
    assert abs(lines.constant_lines(speechlike(0.5), RATE).strength) < 5


def test_scale_does_not_matter_and_zeros_between_words_do_not_hide_lines():
    sound = speechlike() + comb(80.0)
    louder, gated = lines.constant_lines(4 * sound, RATE), sound.copy()
    assert louder.strength == pytest.approx(lines.constant_lines(sound, RATE).strength, rel=0.02)
    gated[RATE : 2 * RATE] = 0
    assert lines.constant_lines(gated, RATE).spacing_hz == 80.0


def test_electronics_are_left_out_and_neighbours_are_compared():
    assert not np.isin([1000.0, 2000.0, 375.0 * 5], lines.line_frequencies(62.5, 7800)).any()
    assert 1562.5 in lines.line_frequencies(62.5, 7800)
    assert lines.comb_strength(np.ones(64000), 0.125, 80.0, 7800) == 0.0


def test_rejects_what_is_no_audio():
    for bad in (np.zeros((2, RATE)), np.full(RATE, np.nan)):
        with pytest.raises(ValueError, match="finite audio"):
            lines.whitened_spectrum(bad, RATE)


def test_what_is_drawn_of_a_comb():
    drawn = lines.comb_of(speechlike() + comb(80.0), RATE, 80.0)
    middle = len(drawn.mean) // 2
    assert drawn.beside_hz[middle] == 0 and drawn.mean.argmax() == middle
    assert drawn.mean[middle] > 2 * np.median(drawn.mean) and len(drawn.hz) == len(drawn.power) == 900
    assert len(drawn.lines_hz) == 8 and not (drawn.lines_hz % 80).any()
    near = np.abs(drawn.hz[:, None] - drawn.lines_hz).min(axis=1) < 2
    assert drawn.power[near].max() == lines.STRONGEST and drawn.power[near].mean() > 1.3 * drawn.power[~near].mean()
    none = lines.comb_of(speechlike(), RATE, 80.0).mean
    assert none.max() < 1.6 * np.median(none)
    for name in ("whole", "cut"):
        with pytest.raises(ValueError, match="expected"):
            lines.comb_of(speechlike(0.3 if name == "cut" else 1.0), RATE, 9000.0 if name == "whole" else 80.0)
