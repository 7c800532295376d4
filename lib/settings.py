"""Owns every option of the study as frozen dataclasses, the three presets, and the checks of what a user sets."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field

from lib.paths import digest_of

RATE_HZ = 16000
"""The sample rate of everything in the study."""


class SettingsError(ValueError):
    """An option is unknown or has a value of the wrong type; the message names the nearest one."""


@dataclass(frozen=True)
class Data:
    corpus: str = "embedded"  # embedded (Debian packages) or librispeech (needs the network)
    single_train: int = 300  # clips of the one speaker that the student is fitted on
    single_validation: int = 200  # held-out clips of that speaker: selection, scaling, thresholds
    single_test: int = 40  # test clips of that speaker
    multi_train_per_speaker: int = 60  # at most this many training clips of each of the ~25 voices
    multi_validation_per_speaker: int = 36
    multi_test_per_speaker: int = 14
    development: int = 24  # validation clips that get development fakes (never used as test)
    texts: int = 20  # sentences for each text-to-speech generator
    min_s: float = 1.0  # shorter clips are left out
    max_s: float = 5.0  # longer clips are cropped to this, in seconds
    generators: tuple[str, ...] = ()  # empty: all that this machine can run


@dataclass(frozen=True)
class Channel:
    enabled: bool = True  # off shows the resampling trap
    low_hz: float = 60.0  # band limit of all audio, real and fake alike
    high_hz: float = 6000.0
    level_db: float = -26.0  # root mean square of the active speech, dB full scale
    snr_db: float = 32.0  # white noise added below the active speech
    pause_db: float = 35.0  # frames this far below the loudest 1 % are pauses: trimmed at the ends, masked inside


@dataclass(frozen=True)
class View:
    """One time-frequency image of speech, and with it one teacher-student pair."""

    name: str = "narrow"
    window_s: float = 0.064  # analysis window: long resolves harmonics, short resolves glottal pulses
    hop_s: float = 0.016
    bins: int = 384  # frequency rows between low_hz and high_hz of the channel
    kind: str = "magnitude"  # magnitude, phase or mel


@dataclass(frozen=True)
class Network:
    teacher: str = "random"  # random, imagenet, trained, whisper
    teacher_width: int = 24  # channels of the first residual stage; ResNet-18 has 64
    student_width: int = 0  # 0: as the teacher (the paper); smaller: an asymmetric student
    student_view: str = "same"  # same, or smooth: the student sees a mel-smoothed spectrogram
    levels: int = 3  # residual stages in the pyramid


@dataclass(frozen=True)
class Training:
    epochs: int = 8
    batch: int = 16
    window_frames: int = 64
    optimiser: str = "adamw"  # sgd is the published recipe (learning rate 0.4), adamw needs fewer epochs
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    windows_per_clip: int = 3  # random crops of each clip an epoch
    augment: bool = False  # equaliser tilt, level and noise on bona fide training speech
    precision: str = "fp32"  # fp32 or bf16


@dataclass(frozen=True)
class Scoring:
    scaling: str = "frequency"  # none, level, frequency, channel, element
    combine: str = "sum"  # sum, mean or product of the levels' maps
    pooling: str = "profile"  # mean, max, top, quantile, two_sided, profile
    profile_rows: int = 16  # frequency bands of the discrepancy profile, for each level


@dataclass(frozen=True)
class Run:
    seeds: int = 3  # repetitions of every training in notebook 33
    bootstrap: int = 1000  # resamples of every interval
    threads: int = 2


@dataclass(frozen=True)
class Settings:
    preset: str = "study"
    seed: int = 0
    data: Data = field(default_factory=Data)
    channel: Channel = field(default_factory=Channel)
    views: tuple[View, ...] = (View(),)
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
            elif item.name != "views":
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
    """`value` as the annotated type of `owner.key`, or SettingsError."""
    kind = typing.get_type_hints(owner)[key]
    choices = CHOICES.get(name)
    try:
        if isinstance(kind, types.GenericAlias):  # tuple[str, ...]
            items = value.split(",") if isinstance(value, str) else value
            return tuple(str(item).strip() for item in items if str(item).strip())
        if kind is bool:
            if isinstance(value, str):
                return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[value.lower()]
            if not isinstance(value, bool):
                raise ValueError(value)
            return value
        if isinstance(value, bool) or (kind is int and isinstance(value, float) and value != int(value)):
            raise ValueError(value)
        converted = kind(value)
    except (KeyError, TypeError, ValueError):
        label = getattr(kind, "__name__", str(kind))
        raise SettingsError(f"option {name!r} takes a value of type {label}, not {value!r}") from None
    if choices and converted not in choices:
        raise SettingsError(f"option {name!r} is one of {', '.join(choices)}, not {converted!r}")
    return converted


CHOICES: dict[str, tuple[str, ...]] = {
    "preset": ("smoke", "study", "paper"),
    "data.corpus": ("embedded", "librispeech"),
    "network.teacher": ("random", "imagenet", "trained", "whisper"),
    "network.student_view": ("same", "smooth"),
    "training.optimiser": ("sgd", "adamw"),
    "training.precision": ("fp32", "bf16"),
    "scoring.scaling": ("none", "level", "frequency", "channel", "element"),
    "scoring.combine": ("sum", "mean", "product"),
    "scoring.pooling": ("mean", "max", "top", "quantile", "two_sided", "profile"),
}
