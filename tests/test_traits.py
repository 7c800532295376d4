import numpy as np
import pytest

from lib.audit.robustness import NUMBERS as CONDITION
from lib.audit.robustness import condition_numbers
from lib.data.channel import FRAME, active_frames, traits
from lib.evaluate.baselines import NUMBERS as TRIVIAL
from lib.evaluate.baselines import trivial_numbers
from tests.conftest import RATE, toy_speech


def test_a_tone_after_a_pause_by_hand():
    tone = 0.1 * np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE)
    audio = np.concatenate([np.zeros(10 * FRAME), tone])
    found = traits(audio, active_frames(audio, 35.0))
    assert found["leading_silence_s"] == pytest.approx(0.2) and found["speech_s"] == pytest.approx(1)
    assert found["duration_s"] == pytest.approx(1.2) and found["paused_share"] == pytest.approx(1 / 6)
    assert found["crest_db"] == pytest.approx(20 * np.log10(2**0.5), abs=0.01)
    assert found["level_db"] == pytest.approx(10 * np.log10(0.005 / 1.2), abs=0.01)
    assert found["noise_floor_db"] == pytest.approx(-120 - 10 * np.log10(0.005), abs=0.01), "silence counts as -120 dB"
    assert 1000 < found["rolloff_hz"] < found["bandwidth_hz"] < 1500
    # 0.99 of the peak is passed for 0.0451 of a period of 16 samples to each side: one sample a half wave, no two beside each other.
    assert found["clipped_share"] == 0


def test_both_that_take_numbers_take_these():
    audio = toy_speech(2.0, 3)
    audio -= audio.mean()
    active = active_frames(audio, 35.0)
    found = traits(audio, active)
    assert trivial_numbers(audio, active) == {name: found[name] for name in TRIVIAL}
    assert dict(zip(CONDITION, condition_numbers(audio))) == pytest.approx({name: found[name] for name in CONDITION}, rel=1e-4, abs=1e-4)
