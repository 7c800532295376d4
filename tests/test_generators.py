"""Recipes on toy speech: shape, level, determinism. What pip gives is needed; voices are tried where they are there."""

import numpy as np
import pytest

from lib.data.generators import GENERATORS, available
from tests.conftest import toy_speech

AUDIO = toy_speech(1.2, 4)
SLOW = ("hifigan_universal", "hifigan_ljspeech")
FAST = [item for item in GENERATORS.values() if item.kind != "tts" and not item.missing() and item.name not in SLOW]
VOICES = [item for item in GENERATORS.values() if item.kind == "tts"]


@pytest.mark.parametrize("generator", FAST, ids=lambda item: item.name)
def test_copies_align_with_their_parent(generator):
    made = generator.run(AUDIO, 3)
    assert made.shape == AUDIO.shape and made.dtype == np.float32
    assert np.isfinite(made).all() and np.abs(made).max() <= 1
    assert np.array_equal(made, generator.run(AUDIO, 3))
    gain = 20 * np.log10(np.sqrt(np.mean(made**2)) / np.sqrt(np.mean(AUDIO**2)))
    assert abs(gain) < 6


@pytest.mark.parametrize("generator", VOICES, ids=lambda item: item.name)
def test_voices_speak(generator):
    if generator.missing():
        pytest.skip(generator.missing())
    text = "Сегодня утром мы долго гуляли." if generator.texts == "ru" else "The ferry leaves every morning."
    made = generator.run(text, 0)
    assert 0.8 < len(made) / 16000 < 8 and np.isfinite(made).all() and np.abs(made).max() > 0.01
    assert np.array_equal(made, generator.run(text, 0)), "made again, it is the same"


def test_families_and_roles():
    test = [item for item in GENERATORS.values() if item.kind != "control" and not item.development]
    assert len(test) >= 8 and len({item.family for item in test}) >= 5
    assert {item.name for item in GENERATORS.values() if item.development} & {item.name for item in test} == set()


def test_what_is_missing_is_said_with_its_remedy(monkeypatch):
    import lib.data.generators

    monkeypatch.setattr(lib.data.generators.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(lib.data.generators.shutil, "which", lambda name: None)
    ready, missing = available(("world", "espeak_ru"))
    assert not ready and "pip install 'pyworld'" in missing[0] and "apt-get install espeak-ng" in missing[1]
    with pytest.raises(KeyError, match="unknown generator"):
        available(("worlds",))
