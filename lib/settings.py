"""Owns every option of the study as frozen dataclasses, the three presets, and the checks of what a user sets."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from dataclasses import dataclass, field

from lib.paths import UsageError, digest_of

RATE_HZ = 16000
"""The sample rate of everything in the study."""


class SettingsError(UsageError):
    """An option is unknown or has a value of the wrong type; the message names the nearest one."""


@dataclass(frozen=True)
class Data:
    corpus: str = "embedded"  # embedded (Debian packages) or librispeech (needs the network); the next four replace it
    train: tuple[str, ...] = ()  # corpora of bona fide training speech, NAME:FOLDER joined by +, see lib/data/public.py
    validation: tuple[str, ...] = ()  # of held-out bona fide speech; empty: a share of the training corpora
    test: tuple[str, ...] = ()  # of bona fide and fake test speech
    single: tuple[str, ...] = ()  # of the one-speaker experiment; empty: the test voice with the most clips
    fakes_per_generator: int = 60  # at most this many test clips of each generator of such a corpus
    single_train: int = 280  # clips of the one speaker that the student is fitted on
    single_validation: int = 300  # held-out clips of that speaker: selection, scaling, thresholds
    single_test: int = 40  # test clips of that speaker
    multi_train_per_speaker: int = 650  # at most this many training clips of each of the ~30 voices; here all that there are
    multi_validation_per_speaker: int = 36
    multi_test_per_speaker: int = 14
    development: int = 40  # validation clips that get development fakes (never used as test)
    texts: int = 20  # sentences for each text-to-speech generator
    min_s: float = 1.0  # shorter clips are left out
    max_s: float = 5.0  # longer clips are cropped to this, in seconds
    generators: tuple[str, ...] = ()  # empty: all that this machine can run


@dataclass(frozen=True)
class Channel:
    enabled: bool = True  # off shows the resampling trap
    low_hz: float = 60.0  # band limit of all audio, real and fake alike
    high_hz: float = 6000.0
    crest_db: float = 8.0  # look-ahead limiter, this far above the active speech's level; 0 leaves it out
    dispersion_s: tuple[float, float] = (0.002, 0.004)  # all-pass filters before and after the limiter; 0 leaves one out
    level_db: float = -26.0  # root mean square of the active speech, dB full scale
    snr_db: float = 32.0  # white noise added below the active speech
    pause_db: float = 35.0  # frames this far below the loudest 1 % are pauses: trimmed at the ends, masked inside


CHANNELS = ("level", "advance", "delay", "short", "pulse")
"""Groups of image channels: log-magnitude, phase advance from frame to frame (cosine and sine), phase step from bin to
bin (cosine and sine: the group delay), log-magnitude through a short window, and through a shorter one four times a hop
(glottal pulses). Two further groups: "mel" is an image of its own, log-magnitude in `bins` mel bands; "wave", for teachers that hear
waveforms, holds the samples themselves."""
SPEECH_MODELS = ("wav2vec2", "hubert", "wavlm")
"""Teachers whose weights torchaudio downloads (lib/model/speech_models.py)."""
TOKEN_TEACHERS = ("whisper", *SPEECH_MODELS)
"""Teachers without a frequency axis: their levels have one row."""


@dataclass(frozen=True)
class View:
    """The time-frequency image of speech that teacher and student see."""

    window_s: float = 0.032  # analysis window: long resolves harmonics, short resolves glottal pulses
    short_s: float = 0.008  # window of the channel "short"
    pulse_s: float = 0.005  # window of the channels "pulse"
    hop_s: float = 0.008
    bins: int = 192  # frequency rows between low_hz and high_hz of the shared channel
    channels: tuple[str, ...] = CHANNELS  # groups of image channels; ("level",) is a plain spectrogram


@dataclass(frozen=True)
class Network:
    teacher: str = "perturbation"  # trained here on bona fide speech; or random, imagenet, whisper, wav2vec2, hubert, wavlm
    teacher_speech: str = "own"  # what it is trained on: the experiment's own bona fide speech, or multi: the many voices in both
    teacher_width: int = 24  # channels of the first residual stage; ResNet-18 has 64
    student_width: int = 24  # the teacher's width is the paper's choice; smaller is an asymmetric student
    student_channels: tuple[str, ...] = ("level",)  # image channels that the student sees; empty: all of the view's
    standardise: bool = True  # teacher features of mean 0 and deviation 1 on bona fide speech; off is the published form
    levels: int = 3  # residual stages in the pyramid
    stem: int = 7  # side of the first convolution; 3 takes a fifth less time and learns less of the same speech (notebook 20)


@dataclass(frozen=True)
class Training:
    teacher_steps: int = 2400  # steps of a perturbation teacher of one voice
    teacher_steps_many: int = 4800  # and of one of many voices
    student_steps: int = 600  # optimiser steps of the student
    batch: int = 8
    window_s: float = 1.016  # seconds of each random crop
    optimiser: str = "adamw"  # sgd is the published recipe (learning rate 0.4), adamw needs fewer steps
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    augment: bool = False  # equaliser tilt, level and noise on bona fide training speech
    check_every: int = 100  # steps between two looks at the bona fide validation loss
    precision: str = "fp32"  # fp32 or bf16


@dataclass(frozen=True)
class Scoring:
    scaling: str = "read"  # none, level, frequency, channel, element, signed, read (signed where the teacher has no readers)
    combine: str = "sum"  # sum or product of the levels' maps
    pooling: str = "one_sided"  # mean, max, top, quantile, one_sided, two_sided, profile
    bands: int = 6  # frequency bands of the discrepancy profile, for each level


@dataclass(frozen=True)
class Run:
    seeds: int = 3  # repetitions of every training in notebook 33
    bootstrap: int = 1000  # resamples of every interval
    threads: int = 2
    training_threads: int = 1  # of one training on a CPU; as many trainings go side by side as fit into `threads`
    device: str = "auto"  # of training: a GPU where there is one, else the CPU; or cpu, cuda, cuda:1, mps
    layout: str = "auto"  # of images in memory; auto: channels_last, but contiguous beside an ImageNet or Whisper teacher
    workers: int = 0  # processes that read and crop training clips ahead of the network; worth it with a GPU


@dataclass(frozen=True)
class Settings:
    preset: str = "study"
    seed: int = 0
    data: Data = field(default_factory=Data)
    channel: Channel = field(default_factory=Channel)
    view: View = field(default_factory=View)
    network: Network = field(default_factory=Network)
    training: Training = field(default_factory=Training)
    scoring: Scoring = field(default_factory=Scoring)
    run: Run = field(default_factory=Run)

    def digest(self) -> str:
        """Short hash of every option, printed under every table and figure."""
        return digest_of(dataclasses.asdict(self))

    def options(self) -> dict[str, object]:
        """Every option under its dotted name, such as `training.epochs`."""
        flat: dict[str, object] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if dataclasses.is_dataclass(value):
                flat |= {f"{item.name}.{key}": entry for key, entry in vars(value).items()}
            else:
                flat[item.name] = value
        return flat

    def with_options(self, changes: dict[str, object]) -> Settings:
        """A copy with dotted options changed; texts such as "8" or "true" are converted to the option's type.

        Raises SettingsError for an unknown name (naming the nearest) and for a value of the wrong type.
        """
        known = self.options()
        result = self
        for name, value in changes.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
                tail = [key for key in known if key.split(".")[-1] == name]
                hint = (tail or near or ["seed"])[0]
                raise SettingsError(f"unknown option {name!r}; the nearest known one is {hint!r}")
            section, _, key = name.rpartition(".")
            owner = getattr(result, section) if section else result
            changed = dataclasses.replace(owner, **{key: _converted(name, value, type(owner), key)})
            result = dataclasses.replace(result, **{section: changed}) if section else changed
        return result


def _converted(name: str, value: object, owner: type, key: str) -> object:
    """`value` as the annotated type of `owner.key` and within its range, or SettingsError."""
    kind = typing.get_type_hints(owner)[key]
    try:
        if isinstance(kind, types.GenericAlias):  # tuple[str, ...]
            items = re.split(ROLE_STARTS if name in ROLES else "[+,]", value) if isinstance(value, str) else value
            kinds = typing.get_args(kind)
            converted = tuple(kinds[0](str(item).strip()) for item in items if str(item).strip())
            if kinds[-1] is not Ellipsis and len(converted) != len(kinds):
                raise ValueError(value)
        elif kind is bool:
            words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
            converted = words[str(value).lower()]
        elif isinstance(value, bool) or (kind is int and isinstance(value, float) and value != int(value)):
            raise ValueError(value)
        else:
            converted = kind(value)
    except (KeyError, TypeError, ValueError, OverflowError):
        label = getattr(kind, "__name__", str(kind))
        raise SettingsError(f"option {name!r} takes a value of type {label}, not {value!r}") from None
    low, high = RANGES.get(name, ANY_COUNT)
    for number in converted if isinstance(converted, tuple) else (converted,):
        if isinstance(number, int | float) and not isinstance(number, bool) and not low <= number <= high:
            raise SettingsError(f"option {name!r} lies between {low:g} and {high:g}, not {number!r}")
    if name in CHOICES and converted not in CHOICES[name]:
        raise SettingsError(f"option {name!r} is one of {', '.join(CHOICES[name])}, not {converted!r}")
    return converted


PRESETS: dict[str, dict[str, object]] = {
    # Minutes on two cores: what the tests run. Every step is the real one, only smaller.
    "smoke": {
        "data.single_train": 24, "data.single_validation": 32, "data.single_test": 8, "data.multi_train_per_speaker": 3,
        "data.multi_validation_per_speaker": 5, "data.multi_test_per_speaker": 2, "data.development": 6, "data.texts": 3,
        "data.max_s": 3.0, "network.teacher_width": 8, "network.student_width": 8, "training.teacher_steps": 30,
        "training.teacher_steps_many": 30, "training.student_steps": 24, "training.batch": 8, "training.check_every": 15,
        "run.seeds": 2, "run.bootstrap": 200,
    },
    "study": {},
    # The published sizes, for a GPU and the paper's corpora.
    "paper": {
        "network.teacher_width": 64, "network.student_width": 64, "training.teacher_steps": 8000, "training.teacher_steps_many": 8000,
        "training.student_steps": 20000, "training.batch": 32, "training.check_every": 500,
        "data.single_train": 480, "data.single_validation": 80, "data.single_test": 60, "data.multi_train_per_speaker": 400,
        "data.max_s": 8.0,
    },
}


def load_settings(preset: str = "study", seed: int = 0, options: str | dict[str, object] = "") -> Settings:
    """Settings of a preset with a seed and further options ("training.student_steps=50,scoring.pooling=max").

    Raises SettingsError for an unknown preset or option or an ill-typed value.
    """
    if preset not in PRESETS:
        near = difflib.get_close_matches(str(preset), PRESETS, n=1, cutoff=0.0)[0]
        raise SettingsError(f"unknown preset {preset!r}; the nearest known one is {near!r}")
    if isinstance(options, str):
        options = parse_options(options)
    if "preset" in options:
        raise SettingsError("the preset is chosen by itself (--preset), not among the options")
    return Settings().with_options({"preset": preset, **PRESETS[preset], "seed": seed, **options})


CHOICES: dict[str, tuple[str, ...]] = {
    "preset": ("smoke", "study", "paper"),
    "data.corpus": ("embedded", "librispeech"),
    "network.teacher": ("random", "imagenet", *TOKEN_TEACHERS, "perturbation"),
    "network.teacher_speech": ("own", "multi"),
    "training.optimiser": ("sgd", "adamw"),
    "training.precision": ("fp32", "bf16"),
    "run.layout": ("auto", "contiguous", "channels_last"),
    "scoring.scaling": ("none", "level", "frequency", "channel", "element", "signed", "read"),
    "scoring.combine": ("sum", "product"),
    "scoring.pooling": ("mean", "max", "top", "quantile", "one_sided", "two_sided", "profile"),
}


ROLES = ("data.train", "data.validation", "data.test", "data.single")
ROLE_STARTS = r"[+,](?=\s*(?:[\w-]+(?:@\w+)?:|embedded\b))"
"""Corpora are joined by plus signs or commas, which a folder's name may hold too."""
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**32 - 1), "data.min_s": (0.3, 60), "data.max_s": (0.3, 60), "channel.low_hz": (0, RATE_HZ / 2),
    "channel.high_hz": (0, RATE_HZ / 2), "channel.crest_db": (0, 60), "channel.dispersion_s": (0, 0.1),
    "channel.level_db": (-80, 0), "channel.snr_db": (-20, 200), "channel.pause_db": (1, 200), "view.window_s": (0.001, 1),
    "view.short_s": (0.001, 1), "view.pulse_s": (0.001, 1), "view.hop_s": (0.001, 0.1), "view.bins": (8, 2048),
    "network.levels": (1, 4), "network.stem": (1, 31), "training.window_s": (0.05, 60), "training.learning_rate": (1e-9, 100),
    "training.weight_decay": (0, 1), "run.workers": (0, 1024),
}
ANY_COUNT = (1, 1e7)
"""Least and largest value of every option that is a number; counts that are not named lie in ANY_COUNT."""


def parse_options(texts: str | list[str]) -> dict[str, str]:
    """`"seed=1,training.batch=4"`, or several such texts, as a mapping: the one parser of the command and the notebooks.

    A comma parts options only before another one, so a list or a path may hold commas. Raises SettingsError for a text
    without an equals sign and for a name that is given twice.
    """
    options: dict[str, str] = {}
    for text in [texts] if isinstance(texts, str) else texts:
        for item in filter(None, (item.strip(" ,") for item in re.split(r",(?=\s*(?:\w+\.\w+|seed|preset)\s*=)", text))):
            name, equals, value = (part.strip() for part in item.partition("="))
            if not equals:
                raise SettingsError(f"expected NAME=VALUE, such as seed=1, not {item!r}")
            if name in options:
                raise SettingsError(f"option {name!r} is given twice: {options[name]!r} and {value!r}")
            options[name] = value
    return options


def checked_alpha(value: object) -> float:
    """`value` as the share of real speech that may be called anomalous. Raises SettingsError."""
    try:
        alpha = float(value)
    except (TypeError, ValueError):
        alpha = math.nan
    if not 0 < alpha < 1:
        raise SettingsError(f"alpha: expected a number between 0 and 1, such as 0.05, not {value!r}")
    return alpha
