"""Owns every option of the study as frozen dataclasses, its presets and recipes, and the checks of what a user sets."""

from __future__ import annotations

import dataclasses
import difflib
import operator
import re
import typing
from dataclasses import dataclass, field
from typing import Annotated, Literal

from lib.paths import UsageError, digest_of

RATE_HZ = 16000  # the sample rate of everything in the study
Count, Width = Annotated[int, (1, 10_000_000)], Annotated[int, (1, 128)]  # types with the range of a number
Seconds, ClipSeconds = Annotated[float, (0.001, 1)], Annotated[float, (0.3, 60)]
Hertz, Dispersion = Annotated[float, (0, RATE_HZ / 2)], Annotated[float, (0, 0.1)]


class SettingsError(UsageError):
    """An option is unknown or has a value that it cannot take; the message names what it can."""


@dataclass(frozen=True)
class Data:
    corpus: Literal["embedded", "librispeech"] = "embedded"  # Debian packages, or a network; the next four replace it
    train: tuple[str, ...] = ()  # corpora of bona fide training speech, NAME:FOLDER joined by +, see lib/data/public.py
    validation: tuple[str, ...] = ()  # of held-out bona fide speech; empty: a share of the training corpora
    test: tuple[str, ...] = ()  # of bona fide and fake test speech
    single: tuple[str, ...] = ()  # of the one-speaker experiment; empty: the test voice with the most clips
    fakes_per_generator: Count = 60  # at most this many test clips of each generator of such a corpus
    single_train: Count = 280  # clips of the one speaker that the student is fitted on
    single_validation: Count = 300  # held-out clips of that speaker: selection, scaling, thresholds
    single_test: Count = 40  # test clips of that speaker
    multi_train_per_speaker: Count = 650  # at most this many training clips of each of the ~30 voices; here all of them
    multi_validation_per_speaker: Count = 36
    multi_test_per_speaker: Count = 14
    development: Count = 40  # validation clips that get development fakes (never used as test)
    texts: Count = 20  # sentences for each text-to-speech generator
    min_s: ClipSeconds = 1.0  # shorter clips are left out
    max_s: ClipSeconds = 5.0  # longer clips are cropped to this
    generators: tuple[str, ...] = ()  # empty: all that this machine can run
    hold_out: tuple[str, ...] = ()  # collections of the embedded corpora, such as tuxpaint, whose voices are all tests
    more: tuple[str, ...] = ()  # corpora, as in train, of which 40 readers at most are test voices beside the others


@dataclass(frozen=True)
class Channel:
    enabled: bool = True  # off leaves every clip as it is on the disk
    low_hz: Hertz = 60.0  # band limit of all audio, real and fake alike
    high_hz: Hertz = 6000.0
    crest_db: Annotated[float, (0, 60)] = 8.0  # look-ahead limiter, this far above the active speech's level; 0: none
    dispersion_s: tuple[Dispersion, Dispersion] = (0.002, 0.004)  # all-pass filters around the limiter; 0: none
    level_db: Annotated[float, (-80, 0)] = -26.0  # root mean square of the active speech, dB full scale
    snr_db: Annotated[float, (-20, 200)] = 32.0  # white noise added below the active speech
    pause_db: Annotated[float, (1, 200)] = 35.0  # frames this far below the loudest 1 % are pauses: trimmed or masked


PLANES = ("level", "advance", "delay", "short", "pulse")
"""Groups of planes of the image: log-magnitude; cosine and sine of the phase step from frame to frame, and from bin to
bin (group delay); log-magnitude through a short window, and through a shorter one four times a hop (glottal pulses)."""
SPEECH_MODELS = ("wav2vec2", "hubert", "wavlm")  # teachers whose weights torchaudio downloads
DAMAGES = tuple("average of periods,contrast of harmonics,smoothing over frequency,smoothing over time,jitter of level,"
                "smoothing of group delay,drift of phase,scrambling of phase,noise for harmonics".split(","))


@dataclass(frozen=True)
class View:
    window_s: Seconds = 0.032  # analysis window: long resolves harmonics, short resolves glottal pulses
    short_s: Seconds = 0.008  # window of the plane "short"
    pulse_s: Seconds = 0.005  # window of the planes "pulse"
    hop_s: Annotated[float, (0.001, 0.1)] = 0.008
    bins: Annotated[int, (8, 2048)] = 192  # frequency rows between low_hz and high_hz of the shared channel
    planes: tuple[Literal[PLANES], ...] = PLANES  # ("level",) is a plain spectrogram


@dataclass(frozen=True)
class Network:
    teacher: Literal["perturbation", "random", "imagenet", "resnet18", "lite0", *SPEECH_MODELS] = "perturbation"
    # perturbation is trained here on bona fide speech; imagenet is resnet18 where its weights are, else lite0
    teacher_speech: Literal["own", "multi"] = "own"  # the experiment's own bona fide speech, or the many voices in both
    teacher_width: Width = 24  # channels of the first residual stage; ResNet-18 has 64
    student_width: Width = 24  # the paper's choice is the teacher's width
    student_planes: tuple[Literal[PLANES], ...] = ("level",)  # planes that the student sees; empty: all of the view's
    standardise: bool = True  # teacher features of mean 0 and deviation 1 on real speech; off is the published form
    levels: Annotated[int, (1, 4)] = 3  # residual stages in the pyramid
    stem: Literal[tuple(range(1, 16, 2))] = 7  # side of the first convolution


@dataclass(frozen=True)
class Training:
    teacher_steps: Count = 2400  # steps of a perturbation teacher of one voice
    teacher_steps_many: Count = 4800  # and of one of many voices
    student_steps: Count = 600  # optimiser steps of the student
    batch: Count = 8
    window_s: Annotated[float, (0.05, 60)] = 1.016  # length of each random crop
    optimiser: Literal["sgd", "adamw"] = "adamw"  # sgd is the published one, with learning_rate=0.4
    learning_rate: Annotated[float, (1e-9, 100)] = 2e-3  # the highest of a cycle
    weight_decay: Annotated[float, (0, 1)] = 1e-4
    chains: bool = True  # every second bona fide clip through a random recording chain first: what is normal
    denoise: bool = True  # the student hears damaged speech, and learns the teacher's features of the undamaged
    without: Literal["", *DAMAGES] = ""  # a kind of damage that the teacher does not learn: leave one out
    check_every: Count = 100  # steps between two looks at the bona fide validation loss
    precision: Literal["fp32", "bf16"] = "fp32"


@dataclass(frozen=True)
class Scoring:
    scaling: Literal["none", "level", "frequency", "channel", "element", "signed", "read"] = "read"
    combine: Literal["sum", "product"] = "sum"  # of the levels' maps
    pooling: Literal["mean", "max", "top", "quantile", "one_sided", "two_sided", "profile"] = "one_sided"
    bands: Count = 6  # frequency bands of the discrepancy profile, for each level


@dataclass(frozen=True)
class Run:
    seeds: Count = 1  # repetitions of every training in notebook 33
    rivals: Count = 1  # at most so many of these of the baselines, ablations and other kinds of evidence
    bootstrap: Count = 1000  # resamples of every interval
    threads: Count = 2
    training_threads: Count = 1  # of one training on a CPU; `threads` has room for several
    device: str = "auto"  # of training: a GPU where there is one, else the CPU; or cpu, cuda, cuda:1, mps
    workers: Annotated[int, (0, 1024)] = 0  # processes that read and crop training clips ahead; worth it with a GPU


@dataclass(frozen=True)
class Settings:
    preset: Literal["smoke", "study", "full", "paper"] = "study"
    seed: Annotated[int, (0, 2**32 - 1)] = 0
    recipe: Literal["readings", "stfpm"] = "readings"  # the options of RECIPES
    data: Data = field(default_factory=Data)
    channel: Channel = field(default_factory=Channel)
    view: View = field(default_factory=View)
    network: Network = field(default_factory=Network)
    training: Training = field(default_factory=Training)
    scoring: Scoring = field(default_factory=Scoring)
    run: Run = field(default_factory=Run)

    @property
    def title(self) -> str:
        """The name of the recipe in tables and figures."""
        return {"readings": "Damage readings", "stfpm": "Feature pyramid matching (as published)"}[self.recipe]

    def digest(self) -> str:
        """Short hash of every option, printed under every table and figure."""
        return digest_of(dataclasses.asdict(self))

    def options(self) -> dict[str, object]:
        """Every option under its dotted name, such as `training.batch`."""
        flat: dict[str, object] = {}
        for name, value in vars(self).items():
            inside = dataclasses.is_dataclass(value)
            flat |= {f"{name}.{key}": entry for key, entry in vars(value).items()} if inside else {name: value}
        return flat

    def with_options(self, changes: dict[str, object]) -> Settings:
        """A copy with dotted options changed, texts as the option's type. A recipe or teacher brings what belongs to it
        unless `changes` has it. Raises SettingsError for an unknown name, naming the nearest, and for a bad value."""
        known, result = self.options(), self
        for name, value in {**self._implied(changes), **changes}.items():
            if name not in known:
                tail = [key for key in known if key.split(".")[-1] == name]
                near = (tail or difflib.get_close_matches(name, known, n=1, cutoff=0.4) or ["seed"])[0]
                raise SettingsError(f"unknown option {name!r}; the nearest known one is {near!r}")
            section, _, key = name.rpartition(".")
            owner = getattr(result, section) if section else result
            owner = dataclasses.replace(owner, **{key: _converted(name, value, type(owner), key)})
            result = dataclasses.replace(result, **{section: owner}) if section else owner
        if wrong := [pair for pair in ORDERED if operator.ge(*map(result.options().get, pair))]:
            raise SettingsError("option {!r} has to be less than {!r}".format(*wrong[0]))
        return result

    def _implied(self, changes: dict[str, object]) -> dict[str, object]:
        recipe, implied = changes.get("recipe", self.recipe), {}
        if recipe != self.recipe and recipe in RECIPES:
            implied = dict(RECIPES[recipe])
            # As many crops in all: fewer steps of larger batches.
            share = self.training.batch / int(changes.get("training.batch", implied["training.batch"]))
            implied |= {f"training.{name}": max(1, round(getattr(self.training, name) * share))
                        for name in ("student_steps", "check_every")}
        now = self.options() | implied
        teachers = self.network.teacher, changes.get("network.teacher", now["network.teacher"])
        had, has = (name == "perturbation" for name in teachers)
        if had and not has and now["scoring.scaling"] == "read":
            implied |= SIGNED
        elif has and not had and SIGNED.items() <= now.items():
            implied |= READ
        return implied


READ, SIGNED = ({"scoring.scaling": scaling, "scoring.pooling": pooling}
                for scaling, pooling in (("read", "one_sided"), ("signed", "two_sided")))
"""How a teacher with readers is scored, and the next best without (notebook 20)."""
ORDERED = (("data.min_s", "data.max_s"), ("channel.low_hz", "channel.high_hz"))
ROLES = ("data.train", "data.validation", "data.test", "data.single", "data.more")
ROLE_STARTS = r"[+,](?=\s*(?:[\w-]+(?:@\w+)?:|embedded\b))"  # of a corpus; a folder's name may hold + and , too


def _converted(name: str, value: object, owner: type, key: str) -> object:
    """`value` as the annotated type of `owner.key` and within its range, or SettingsError."""
    kind = typing.get_type_hints(owner, include_extras=True)[key]
    if typing.get_origin(kind) is not tuple:
        return _single(name, value, kind)
    item_kind, last = typing.get_args(kind)
    items = re.split(ROLE_STARTS if name in ROLES else "[+,]", value) if isinstance(value, str) else value
    items = tuple(_single(name, item, item_kind) for item in items if str(item).strip())
    if last is not ... and len(items) != 2:
        raise SettingsError(f"option {name!r} takes two values joined by +, not {value!r}")
    return items


def _single(name: str, value: object, kind: object) -> object:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    value = value.strip() if isinstance(value, str) else value
    if origin is Literal:
        if str(value) not in (texts := [str(each) for each in arguments]):
            raise SettingsError(f"option {name!r} is one of {', '.join(filter(None, texts))}, not {value!r}")
        return arguments[texts.index(str(value))]
    plain, (low, high) = arguments if origin is Annotated else (kind, (0, 0))
    try:
        if plain is bool:
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[str(value).lower()]
        if isinstance(value, bool) or (plain is int and isinstance(value, float) and value % 1):
            raise ValueError(value)
        converted = plain(value)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise SettingsError(f"option {name!r} takes a value of type {plain.__name__}, not {value!r}") from None
    if origin is Annotated and not low <= converted <= high:
        raise SettingsError(f"option {name!r} lies between {low:g} and {high:g}, not {value!r}")
    return converted


PRESETS: dict[str, dict[str, object]] = {
    "smoke": {  # minutes on two cores: what the tests run; every step is the real one, only smaller
        "data.single_train": 24, "data.single_validation": 32, "data.single_test": 8, "data.multi_train_per_speaker": 3,
        "data.multi_validation_per_speaker": 5, "data.multi_test_per_speaker": 2, "data.development": 6,
        "data.texts": 3, "data.max_s": 3.0, "network.teacher_width": 8, "network.student_width": 8,
        "training.teacher_steps": 30, "training.teacher_steps_many": 30, "training.student_steps": 24,
        "training.check_every": 15, "run.seeds": 2, "run.bootstrap": 200,
    },
    "study": {},
    "full": {"run.seeds": 3, "run.rivals": 3},  # `study`, three seeds, every ablation; goes on with it
    "paper": {  # the published sizes, for a GPU and the paper's corpora
        "network.teacher_width": 64, "network.student_width": 64, "training.teacher_steps": 8000,
        "training.teacher_steps_many": 8000, "training.student_steps": 20000, "training.batch": 32,
        "training.check_every": 500, "data.single_train": 480, "data.single_validation": 80, "data.single_test": 60,
        "data.multi_train_per_speaker": 400, "data.max_s": 8.0, "run.seeds": 3,
    },
}
_STFPM = {
    "network.teacher": "imagenet", "network.student_planes": (), "network.standardise": False,
    "view.planes": ("level",), "training.optimiser": "sgd", "training.learning_rate": 0.4, "training.batch": 32,
    "training.weight_decay": 1e-4, "training.chains": False, "training.denoise": False,
    "scoring.scaling": "element", "scoring.combine": "product", "scoring.pooling": "max",
}
RECIPES: dict[str, dict[str, object]] = {
    # Ours: a teacher that names designed damage, all planes for it, the magnitude for the student, readings scored.
    "readings": {name: Settings().options()[name] for name in _STFPM},
    # Wang et al. 2021, scaling of Coletta et al. 2025: an ImageNet teacher, one plain image, maximum of the product.
    "stfpm": _STFPM,
}


def load_settings(preset: str = "study", seed: int = 0, options: str | dict[str, object] = "") -> Settings:
    """Settings of a preset with a seed and further options ("training.student_steps=50,scoring.pooling=max"). Raises
    SettingsError for an unknown preset or option and for a value that it cannot take."""
    if preset not in PRESETS:
        near = difflib.get_close_matches(str(preset), PRESETS, n=1, cutoff=0.0)[0]
        raise SettingsError(f"unknown preset {preset!r}; the nearest known one is {near!r}")
    options = parse_options(options) if isinstance(options, str) else options
    if "preset" in options:
        raise SettingsError("the preset is chosen by itself (--preset), not among the options")
    return Settings().with_options({"preset": preset, **PRESETS[preset], "seed": seed}).with_options(options)


def parse_options(texts: str | list[str]) -> dict[str, str]:
    """`"seed=1,training.batch=4"`, or several such texts, as a mapping, for the command and notebooks. A comma parts
    options only before another one: a path may hold it. Raises SettingsError for a name that is given twice."""
    options: dict[str, str] = {}
    for text in [texts] if isinstance(texts, str) else texts:
        parts = re.split(r",(?=\s*(?:\w+\.\w+|seed|preset|recipe)\s*=)", text)
        for item in filter(None, (part.strip(" ,") for part in parts)):
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
        if 0 < (alpha := float(value)) < 1:
            return alpha
    except (TypeError, ValueError):
        pass
    raise SettingsError(f"alpha: expected a number between 0 and 1, such as 0.05, not {value!r}")
