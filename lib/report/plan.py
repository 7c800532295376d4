"""Owns the forecast of a study: its stages, the clips it wants, and roughly how much time, memory and disk it will take."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from lib.paths import DATA, PACKAGES, ROOT, RUNS
from lib.settings import Settings, load_settings

VOICES = {"train": 29, "validation": 8, "test": 7}
"""Voices of the embedded corpora besides the one of the single-speaker experiment."""
CLIP_BYTES_PER_S = 22_000  # 16 kHz FLAC of speech
PACKAGE_BYTES = 480e6
KEPT_BYTES = 600e6  # what lib.data.channel.ClipReader keeps in memory at most
UNITS_S = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}
TRAINING = ("20", "21", "33")
"""Notebooks whose time goes into training; that of the others into the clips."""


class PlanError(RuntimeError):
    """The study does not fit on this machine; the message says what is missing."""


@dataclass(frozen=True)
class Stage:
    """One notebook and how long it takes on two cores."""

    name: str
    seconds: float | None  # None: unknown at this preset
    source: str  # measured in an earlier run, stated in its first lines for this preset, or estimated from the study preset


@dataclass(frozen=True)
class Plan:
    stages: list[Stage]
    real_clips: int  # at most: some voices have fewer
    made_clips: int
    speech_s: float
    memory_bytes: float
    disk_bytes: float  # still to be written
    free_bytes: float

    @property
    def seconds(self) -> float:
        return sum(stage.seconds or 0 for stage in self.stages)

    def require_disk(self) -> None:
        """Raise PlanError where the free disk is below the estimate."""
        if self.free_bytes < self.disk_bytes:
            raise PlanError(f"the study needs about {size(self.disk_bytes)} of disk below {ROOT}, found "
                            f"{size(self.free_bytes)} free; free some, or set STUDY_ROOT to a folder on a larger disk, or take "
                            "--preset smoke")

    def lines(self) -> list[str]:
        """The plan as text, a line an entry."""
        rows = [f"  {stage.name:26s} {duration(stage.seconds):>9s}  {stage.source}" for stage in self.stages]
        clips = f"at most {self.real_clips} real and {self.made_clips} synthetic, about {duration(self.speech_s)} of speech"
        return ["stages:", *rows,
                f"clips:   {clips}",
                f"time:    about {duration(self.seconds)} on two cores without a GPU, and without what is cached already",
                f"memory:  about {size(self.memory_bytes)}",
                f"disk:    about {size(self.disk_bytes)} more below {ROOT}, {size(self.free_bytes)} free"]


def duration(seconds: float | None) -> str:
    """A time in words: `45 s`, `12 min`, `3.5 h`, `4 days`."""
    if seconds is None:
        return "unknown"
    if seconds >= 2 * UNITS_S["day"]:
        return f"{seconds / UNITS_S['day']:.0f} days"
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """A number of bytes in words: `450 MB`, `2.1 GB`."""
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


def stated_seconds(notebook: Path, preset: str) -> float | None:
    """What a notebook's first lines say of its time at `preset`; None where they do not say."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    prose = "".join("".join(cell["source"]) for cell in cells[:2] if cell["cell_type"] == "markdown")
    line = prose.partition("*Time:*")[2].partition("\n")[0]
    if found := re.search(rf"\b{preset}\b\D{{0,12}}?([\d.]+) (second|minute|hour|day)", line):
        return float(found[1].rstrip(".")) * UNITS_S[found[2]]
    return 5.0 if "seconds at every preset" in line else None


def _clips(settings: Settings) -> tuple[int, int]:
    """The most real and made clips that a study with these settings has."""
    from lib.data.generators import GENERATORS

    data = settings.data
    tests = data.single_test + VOICES["test"] * data.multi_test_per_speaker
    real = (data.single_train + data.single_validation + tests + VOICES["train"] * data.multi_train_per_speaker
            + VOICES["validation"] * data.multi_validation_per_speaker)
    chosen = [each for each in GENERATORS.values() if not data.generators or each.name in data.generators]
    return real, sum(data.texts if each.kind == "tts" else 2 * data.development if each.development else tests for each in chosen)


def work(settings: Settings) -> dict[str, float]:
    """What the time of a study grows with, in units that compare settings: `training` and `clips`."""
    network, training = settings.network, settings.training
    pair = network.teacher_width**2 + network.student_width**2
    steps = (training.teacher_steps + training.teacher_steps_many) / 2 + training.student_steps
    return {"training": steps * training.batch * training.window_s * pair, "clips": sum(_clips(settings)) * settings.data.max_s * pair}


def _stage(path: Path, settings: Settings) -> Stage:
    stamp = RUNS / settings.preset / "stamps" / f"{path.stem}.json"
    if stamp.exists():
        return Stage(path.stem, json.loads(stamp.read_text(encoding="utf-8"))["seconds"], "measured")
    if (stated := stated_seconds(path, settings.preset)) is not None:
        return Stage(path.stem, stated, "stated")
    study = stated_seconds(path, "study")
    kind = "training" if path.name[:2] in TRAINING else "clips"
    share = work(settings)[kind] / work(load_settings("study"))[kind]
    return Stage(path.stem, None if study is None else study * max(1.0, share), "estimated")


def planned(settings: Settings, only: tuple[str, ...] = (), start: str = "") -> Plan:
    """The plan of a study with these settings. Raises lib.report.run.StudyError for a number that no notebook has."""
    from lib.report.run import notebooks

    stages = [_stage(path, settings) for path in notebooks(only, start)]
    data, network = settings.data, settings.network
    real, made = _clips(settings)
    speech_s = (real + made) * 0.8 * data.max_s
    weights = 4 * 2.8e6 * ((network.teacher_width / 64) ** 2 + (network.student_width / 64) ** 2)
    # Three copies of each network (weights and two moments), about eight pairs in the ablations and two a seed.
    disk = speech_s * CLIP_BYTES_PER_S + 3 * weights * (8 + 2 * settings.run.seeds) + 150e6
    disk += 0 if PACKAGES.exists() else PACKAGE_BYTES
    folders = (DATA / "clips", RUNS / settings.preset)
    written = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
    # A notebook's kernel with torch, the training clips that the reader keeps, and the batch's activations.
    crop = settings.training.batch * settings.training.window_s / settings.view.hop_s * settings.view.bins
    memory = 1.3e9 + min(KEPT_BYTES, 64_000 * real * 0.8 * data.max_s) + 4 * crop * network.teacher_width * 12
    base = next(folder for folder in (ROOT, *ROOT.parents) if folder.exists())
    return Plan(stages, real, made, speech_s, memory, max(50e6, disk - written), shutil.disk_usage(base).free)
