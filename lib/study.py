"""Owns the study's shared work: what every notebook asks for (clips, teacher, detectors, statistics, scores), made once and
kept under a name made of everything that it depends on."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import pandas as pd
from torch import nn

from lib import seeds
from lib.data.channel import ClipReader, PreparedClips, voice_weights
from lib.data.clips import prepare, require_bonafide, save_table, validation_parts
from lib.data.generators import available
from lib.data.packages import CorpusError
from lib.detector import Detector
from lib.engine import end_with_parent, side_by_side
from lib.model.scaling import PROFILE_SCORES, Typicality
from lib.model.training import engine_of, steps_done, train_student, train_teacher
from lib.paths import DATA, REPORTS, RUNS, atomic, clear_stale_once, digest_of, write_json
from lib.report.exhibits import provenance
from lib.settings import Scoring, Settings, load_settings

if TYPE_CHECKING:
    from lib.report.exhibits import Exhibits

Item, Result = TypeVar("Item"), TypeVar("Result")

VERSION = 6
"""Raised when code changes what a cached result means; the rest of a cache key is data and settings."""


def say(text: str) -> None:
    print(text, flush=True)


say_once = cache(say)
"""A notebook asks for the same networks many times: the line that names them is printed once."""


class Progress:
    """One line with the time left: rewritten in place in a terminal, every quarter under papermill."""

    def __init__(self) -> None:
        self.stage, self.began, self.quarter = "", 0.0, -1

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self.stage:
            self.stage, self.began, self.quarter = stage, time.time(), -1
        left = (time.time() - self.began) / max(1, done) * (total - done)
        text = f"{stage}: {done}/{total}, {left:.0f} s left"
        if sys.stderr.isatty():
            print(f"\r{text}   ", end="\n" if done == total else "", file=sys.stderr, flush=True)
        elif (quarter := done * 4 // max(1, total)) != self.quarter:
            self.quarter = quarter
            say(text)


BLOCK = 64
"""Clips whose statistics are written together."""


def _save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with atomic(path) as temporary:
        np.savez(temporary, **{name.replace("/", "|"): array for name, array in arrays.items()})


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as saved:
        return {name.replace("|", "/"): saved[name] for name in saved.files}


class Study:
    """Everything that the notebooks share, computed on the first request.

    >>> study = Study.open(preset="study", seed=0)            # doctest: +SKIP
    >>> study.detector("single").score(audio, rate_hz)        # doctest: +SKIP
    """

    def __init__(self, settings: Settings, notebook: str = "00") -> None:
        self.settings, self.notebook = settings, notebook
        self.folder = RUNS / settings.preset
        self.origin = self  # the study whose teachers this one uses
        self._teachers: dict[str, tuple[nn.Module, pd.DataFrame]] = {}
        seeds.pin(settings.seed, settings.run.threads)
        clear_stale_once()

    @classmethod
    def open(cls, preset: str = "study", seed: int = 0, options: str = "", notebook: str = "00") -> Study:
        """A study of a preset, a seed and further options (see lib.settings.load_settings)."""
        return cls(load_settings(preset, seed, options), notebook)

    def with_options(self, **changes: object) -> Study:
        """The same study with options changed; a double underscore stands for the dot: `training__augment=True`."""
        named = {name.replace("__", "."): value for name, value in changes.items()}
        return Study(self.settings.with_options(named), self.notebook)

    def variant(self, **changes: object) -> Study:
        """As `with_options`, but with this study's clips and teacher: for ablations of what comes after the teacher."""
        other = self.with_options(**changes)
        other.__dict__["clips"], other.origin = self.clips, self.origin
        return other

    # --- data ----------------------------------------------------------------------------------------------------------

    @cached_property
    def clips(self) -> pd.DataFrame:
        """The clip table (lib.data.clips.prepare), made anew where another synthesiser can run. The split and every choice
        of clips come from seed 0 whatever the study's seed, so that repetitions differ in training alone."""
        data = self.settings.data
        running = [(generator.name, generator.version) for generator in available(data.generators)[0]]
        path = self.folder / f"clips-{digest_of([VERSION, dataclasses.asdict(data), running])}.parquet"
        notes = path.with_suffix(".skipped.json")
        table = pd.read_parquet(path) if path.exists() and notes.exists() else None
        if table is not None and all((DATA / name).exists() for name in table.path):
            skipped = json.loads(notes.read_text(encoding="utf-8"))
        else:
            table, skipped = prepare(data, 0, self.settings.run.threads, Progress())
            if not (table.label == "spoof").any():
                raise CorpusError(f"no synthesiser could run here, so nothing can be evaluated: {'; '.join(skipped)}")
            write_json(notes, skipped)
            save_table(table, path)
        for line in skipped:
            say_once(f"skipped: {line}")
        return table

    @cached_property
    def data_digest(self) -> str:
        return digest_of(sorted(self.clips.sha256.tolist()))

    @cached_property
    def exhibits(self) -> Exhibits:
        from lib.report.exhibits import Exhibits  # matplotlib: a worker that trains draws nothing

        return Exhibits(REPORTS, self.notebook, provenance(self.settings, self.data_digest))

    def part(self, experiment: str, name: str) -> pd.DataFrame:
        """Bona fide clips of a fitting part: train, or selection, scaling, threshold or development of the validation
        split. They went through the leak guard."""
        if name == "train":
            clips = self.clips[(self.clips.role == "bonafide") & (self.clips[experiment] == "train")]
            return require_bonafide(clips, experiment, "training", ("train",))
        parts = validation_parts(self.clips, experiment)
        clips = self.clips[self.clips.clip_id.isin(parts.index[parts == name])]
        return require_bonafide(clips, experiment, name, ("validation",))

    def test(self, experiment: str, only: str = "") -> pd.DataFrame:
        """Everything that is only ever scored: bona fide test clips, fakes and controls (`only="test"`), and the development
        fakes with their bona fide parents (`only="development"`); by default both."""
        development = (self.clips[experiment] == "development") | self.clips.clip_id.isin(self.part(experiment, "development").clip_id)
        test = self.clips[experiment] == "test"
        return self.clips[{"test": test, "development": development}.get(only, test | development)]

    def prepared(self, clips: pd.DataFrame) -> PreparedClips:
        """Clips after the shared channel: (audio (samples,), active (20 ms frame,)), read when asked for."""
        return PreparedClips([DATA / path for path in clips.path], self.settings.channel)

    def side_by_side(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """`work` of every item in order, on this study's threads (lib.engine.side_by_side)."""
        return side_by_side(work, items, self.settings.run.threads)

    # --- networks --------------------------------------------------------------------------------------------------------

    def _key(self, *parts: object) -> str:
        settings = self.settings
        # What belongs to one training alone is part of its own key: other steps of a student leave its teacher as it is.
        skipped = ("check_every", "teacher_steps", "teacher_steps_many", "student_steps", "augment")
        training = {name: value for name, value in vars(settings.training).items() if name not in skipped}
        return digest_of([VERSION, settings.seed, dataclasses.asdict(settings.channel), dataclasses.asdict(settings.view),
                          training, settings.run.threads, settings.run.training_threads, *parts])

    def _voices(self, experiment: str) -> str:
        """The experiment whose bona fide clips the teacher hears."""
        return experiment if self.settings.network.teacher_speech == "own" else "multi"

    def _fitted_on(self, experiment: str) -> list[object]:
        """The part of a key that says which clips a training hears and, where there are several voices, how they are drawn."""
        train, selection = self.part(experiment, "train"), self.part(experiment, "selection")
        drawn = [] if voice_weights(train.speaker) is None else ["voices by the root of their clips"]
        return [sorted(train.sha256), sorted(selection.sha256), *drawn]

    def _teacher_key(self, experiment: str) -> str:
        network = self.settings.network
        return self._key("teacher", network.teacher, network.teacher_width, network.levels, network.stem, network.standardise,
                         self.steps(experiment, student=False), *self._fitted_on(self._voices(experiment)))

    def _student_key(self, experiment: str) -> str:
        training = self.settings.training
        return self._key("student", dataclasses.asdict(self.settings.network), training.student_steps, training.augment,
                         self.origin._teacher_key(experiment), *self._fitted_on(experiment))

    def checkpoint(self, experiment: str, student: bool) -> Path:
        """Folder of the training of an experiment's student or teacher."""
        kind, key = ("student", self._student_key(experiment)) if student else ("teacher", self.origin._teacher_key(experiment))
        return self.folder / "checkpoints" / f"{kind}-{key}"

    def untrained(self, experiment: str, student: bool) -> bool:
        """Whether that training is still to be done, or to be finished."""
        if not student and self.settings.network.teacher != "perturbation":
            return False  # nothing is trained
        return steps_done(self.checkpoint(experiment, student)) < self.steps(experiment, student)

    def steps(self, experiment: str, student: bool) -> int:
        """Steps of the training of an experiment's student or teacher."""
        training = self.settings.training
        if student:
            return training.student_steps
        return training.teacher_steps if self._voices(experiment) == "single" else training.teacher_steps_many

    def teacher(self, experiment: str) -> tuple[nn.Module, pd.DataFrame]:
        """The frozen teacher of an experiment and its training curve (empty where nothing was trained).

        It hears the experiment's own bona fide training clips, or with `network.teacher_speech=multi` the training voices of
        the multi-speaker experiment in both; never a test clip.
        """
        if self.origin is not self:
            return self.origin.teacher(experiment)
        voices = self._voices(experiment)
        if voices not in self._teachers:
            train, held_out, key = self.part(voices, "train"), self.part(voices, "selection"), self._teacher_key(experiment)
            say_once(f"teacher: {self.settings.network.teacher}, {len(train)} clips, {train.seconds.sum() / 60:.0f} min of bona fide "
                     "speech")
            settings = self.settings.with_options({"training.teacher_steps": self.steps(experiment, student=False)})
            with seeds.threads(settings.run.training_threads):
                self._teachers[voices] = train_teacher(
                    ClipReader(train, settings.channel), ClipReader(held_out, settings.channel), settings,
                    self.checkpoint(experiment, student=False), key, say)
        return self._teachers[voices]

    def student(self, experiment: str) -> tuple[nn.Module, pd.DataFrame]:
        """The frozen student of an experiment and its training curve."""
        teacher = self.teacher(experiment)[0]
        train, held_out = self.part(experiment, "train"), self.part(experiment, "selection")
        say_once(f"student: {experiment}, {len(train)} clips, {train.seconds.sum() / 60:.0f} min of bona fide speech")
        with seeds.threads(self.settings.run.training_threads):
            return train_student(
                teacher, ClipReader(train, self.settings.channel), ClipReader(held_out, self.settings.channel), self.settings,
                self.checkpoint(experiment, student=True), self._student_key(experiment), say)

    def detector(self, experiment: str, scaling_part: str = "scaling") -> Detector:
        """The detector of an experiment: networks, scaling and typicality fitted on bona fide validation speech.

        `scaling_part="train"` fits the scaling on the student's own training clips instead, for the ablation.
        """
        scaling, threshold = self.part(experiment, scaling_part), self.part(experiment, "threshold")
        if scaling_part == "train":
            scaling = scaling.head(150)  # as many as the scaling part has
        key = digest_of([self._student_key(experiment), dataclasses.asdict(self.settings.scoring), sorted(scaling.sha256),
                         sorted(threshold.sha256)])
        folder = self.folder / "detectors" / f"{experiment}-{key}"
        if not (folder / "detector.json").exists():
            detector = Detector(self.settings, self.teacher(experiment)[0], self.student(experiment)[0])
            detector.fit_scaling(self.prepared(scaling), scaling.clip_id.tolist())
            detector.fit_threshold(self.prepared(threshold), threshold.clip_id.tolist())
            detector.save(folder)
        detector = Detector.load(folder)
        detector.key, detector.scaling_part = key, scaling_part
        return detector

    # --- statistics and scores -------------------------------------------------------------------------------------------

    def statistics(self, detector: Detector, clips: pd.DataFrame, kinds: tuple[str, ...] | None = None,
                   combines: tuple[str, ...] = ("sum", "product")) -> dict[str, np.ndarray]:
        """Detector.statistics of every clip, stacked (clip, ...), in the table's order, of all kinds or of `kinds`; cached."""
        kinds = detector.kinds if kinds is None else kinds
        key = digest_of([detector.key, clips.sha256.tolist(), kinds, combines])
        path = self.folder / "statistics" / f"{key}.npz"
        if not path.exists():
            # In parts, so that a killed run goes on where it stopped.
            prepared, parts, progress = self.prepared(clips), path.with_suffix(".parts"), Progress()
            blocks = {parts / f"{start:09d}.npz": range(start, min(start + BLOCK, len(clips))) for start in range(0, len(clips), BLOCK)}
            for part, block in blocks.items():
                if not part.exists():
                    rows = list(self.side_by_side(lambda index: detector.statistics(*prepared[index], kinds, combines), block))
                    _save_arrays(part, {name: np.stack([row[name] for row in rows]) for name in rows[0]})
                progress("scoring clips", block.stop, len(clips))
            found = [_arrays(part) for part in blocks]
            _save_arrays(path, {name: np.concatenate([one[name] for one in found]) for name in found[0]})
            shutil.rmtree(parts)
        return _arrays(path)

    def scores(self, experiment: str, only: str = "") -> pd.DataFrame:
        """Test and development clips (or `only` one of them) with their anomaly (up = fake), score (up = bona fide) and
        conformal p-value."""
        detector, clips = self.detector(experiment), self.test(experiment, only)
        anomaly = detector.anomaly_of(self.statistics(detector, clips, *detector.wanted()))
        return clips.assign(anomaly=anomaly, score=-anomaly, p_value=[detector.p_value(value) for value in anomaly])

    def ablated(self, detector: Detector, experiment: str, scoring: Scoring, fitting: str = "", only: str = "") -> pd.DataFrame:
        """Test scores under another scaling, combination or pooling of the same networks.

        Typicality is refitted on the scaling part of the experiment (or of the experiment `fitting`).
        """
        clips, model = self.test(experiment, only), None
        if scoring.pooling in PROFILE_SCORES:
            part = self.part(fitting or experiment, detector.scaling_part)
            model = Typicality.fit(self.statistics(detector, part)[f"profile/{scoring.scaling}"])
        anomaly = detector.anomaly_of(self.statistics(detector, clips), scoring, model)
        return clips.assign(anomaly=anomaly, score=-anomaly)

    def adapted(self, experiment: str, other: str) -> Detector:
        """The networks of one experiment with scaling, typicality and threshold from the validation speech of another."""
        scaling, threshold = self.part(other, "scaling"), self.part(other, "threshold")
        detector = self.detector(experiment)
        moved = Detector(detector.settings, detector.teacher, detector.student)
        moved.key = digest_of([detector.key, "adapted", scaling.sha256.tolist(), threshold.sha256.tolist()])
        folder = self.folder / "detectors" / f"{experiment}-to-{other}-{moved.key}"
        if (folder / "detector.json").exists():
            key, moved = moved.key, Detector.load(folder)
            moved.key = key
        else:
            moved.fit_scaling(self.prepared(scaling), scaling.clip_id.tolist())
            moved.fit_threshold(self.prepared(threshold), threshold.clip_id.tolist())
            moved.save(folder)
        moved.scaling_part = "scaling"
        return moved


# --- trainings side by side -------------------------------------------------------------------------------------------------


def _train(origin: Settings, settings: Settings, experiment: str, student: bool) -> None:
    study = Study(settings)
    study.origin = Study(origin) if origin != settings else study
    study.student(experiment) if student else study.teacher(experiment)


def train_side_by_side(wanted: Iterable[tuple[Study, str]]) -> None:
    """Train the networks of (study, experiment) pairs, `run.threads` at a time, so that later requests find them on disk.

    On the CPU every training has `run.training_threads` for itself, so the bits are those of one training after the other, and
    two trainings on a thread each take about two thirds of the time that they take in turn on both.
    """
    wanted = list(wanted)
    first = wanted[0][0].settings
    together = first.run.threads // first.run.training_threads
    if together < 2 or engine_of(first).device.type != "cpu":
        return
    teachers: dict[Path, tuple] = {}
    students: dict[Path, dict[Path, tuple]] = {}  # by the training of their teacher
    # The longest first, so that none is left to run alone at the end.
    for study, experiment in sorted(wanted, key=lambda one: -one[0].steps(one[1], student=False)):
        teacher, student = (study.checkpoint(experiment, kind) for kind in (False, True))
        job = study.origin.settings, study.settings, experiment
        if study.origin.untrained(experiment, student=False):
            teachers.setdefault(teacher, (*job, False))
        if study.untrained(experiment, student=True):
            students.setdefault(teacher, {}).setdefault(student, (*job, True))
    ready = [job for teacher in list(students) if teacher not in teachers for job in students.pop(teacher).values()]
    # A single student is trained when asked for; a single teacher now, or each of its students would train it for itself.
    if not teachers and len(ready) < 2:
        return
    count = len(teachers) + len(ready) + sum(map(len, students.values()))
    say(f"{count} networks are trained, {together} at a time")
    with ProcessPoolExecutor(together, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        running = {pool.submit(_train, *job): teacher for teacher, job in teachers.items()}
        running |= {pool.submit(_train, *job): None for job in ready}
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                future.result()
                freed = students.pop(running.pop(future), {})  # a teacher is there before the students that share it
                running |= {pool.submit(_train, *job): None for job in freed.values()}
                say(f"{count - len(running) - sum(map(len, students.values()))} of {count} trained")


# --- evaluation -----------------------------------------------------------------------------------------------------------


