"""Owns the study's shared work: what every notebook asks for (clips, networks, detectors, statistics, scores), made
once and kept under a name made of everything that it depends on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from concurrent.futures import as_completed
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from lib import seeds
from lib.data.channel import ClipReader, PreparedClips, voice_weights
from lib.data.clips import prepare, require_bonafide, save_table, validation_parts
from lib.data.degradations import half_recorded
from lib.data.generators import available
from lib.data.packages import CorpusError
from lib.detector import Detector
from lib.engine import processes, side_by_side
from lib.model.networks import TITLES, resolved
from lib.model.scaling import PROFILE_SCORES, Typicality
from lib.model.training import engine_of, steps_done, train_student, train_teacher
from lib.paths import DATA, REPORTS, RUNS, atomic, clear_stale_once, clocked, digest_of, kept
from lib.report.exhibits import Exhibits, progress, provenance
from lib.settings import Channel, Scoring, Settings, load_settings

Arrays = dict[str, np.ndarray]
VERSION = 7  # raised when code changes what a cached result means; the rest of a cache key is data and settings
BLOCK = 64  # clips whose statistics are written together: what a kill can cost


say = partial(print, flush=True)
say_once = cache(say)  # a notebook asks for the same networks many times


def _save_arrays(arrays: Arrays, path: Path) -> None:
    with atomic(path) as temporary:
        np.savez(temporary, **arrays)


def _arrays(path: Path) -> Arrays:
    with np.load(path) as saved:
        return dict(saved)


_STATISTICS: dict[Path, Arrays] = {}  # `_known` of folders that this process has read


def _known(folder: Path) -> Arrays:  # statistics of all clips that went through a detector; `sha256` names them
    blocks = [_arrays(path) for path in sorted(folder.glob("*.npz"))] or [{"sha256": np.empty(0, dtype=str)}]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


@lru_cache(maxsize=2)  # those of training and selection: a student hears what its teacher heard
def _reader(paths: tuple[str, ...], voices: tuple[str, ...], channel: Channel, chains: bool) -> ClipReader:
    clips = pd.DataFrame({"path": paths, "speaker": voices})
    return ClipReader(clips, channel, alter=half_recorded if chains else None)


class Study:
    """Everything that the notebooks share, computed on the first request: `Study.open("study").detector("single")`."""

    def __init__(self, settings: Settings, notebook: str = "00") -> None:
        self.settings, self.notebook = resolved(settings), notebook
        self.folder = RUNS / settings.preset.replace("full", "study")  # full goes on with what study made
        self.side_by_side = partial(side_by_side, threads=settings.run.threads)  # work and items, in order
        self._teachers: dict[str, tuple[nn.Module, pd.DataFrame]] = {}
        seeds.pin(settings.seed, settings.run.threads)
        clear_stale_once()

    @classmethod
    def open(cls, preset: str = "study", seed: int = 0, options: str = "", notebook: str = "00") -> Study:
        """A study of a preset, a seed and further options (see lib.settings.load_settings)."""
        return cls(load_settings(preset, seed, options), notebook)

    def with_options(self, **changes: object) -> Study:
        """The same study with options changed; a double underscore stands for the dot: `training__denoise=True`. What
        does not depend on them, such as the clips or the teacher of another student, is not made again."""
        named = {name.replace("__", "."): value for name, value in changes.items()}
        return Study(self.settings.with_options(named), self.notebook)

    @cached_property
    def clips(self) -> pd.DataFrame:
        """The clip table (lib.data.clips.prepare). The split and every choice of clips come from seed 0 whatever the
        study's seed, so that repetitions differ in training alone."""
        data = self.settings.data
        generators, lacking = available(data.generators)  # one that is installed later makes another table
        key = digest_of([VERSION, dataclasses.asdict(data), [f"{each.name} {each.version}" for each in generators]])
        path = self.folder / f"clips-{key}.parquet"

        def make() -> pd.DataFrame:
            table, skipped = prepare(data, 0, self.settings.run.threads, progress)
            lacking[:] = skipped
            if not (table.label == "spoof").any():
                raise CorpusError(f"no synthesiser could run here, so nothing can be evaluated: {'; '.join(skipped)}")
            return table

        if path.exists() and not all((DATA / name).exists() for name in pd.read_parquet(path).path):
            path.unlink()
        table = kept(path, make, save_table, pd.read_parquet)
        for line in lacking:
            say_once(f"skipped: {line}")
        return table

    @cached_property
    def exhibits(self) -> Exhibits:
        """Writes the notebook's figures and tables."""
        return Exhibits(REPORTS, self.notebook, provenance(self.settings, digest_of(sorted(self.clips.sha256))))

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
        """What is only ever scored: bona fide test clips, fakes and controls (`only="test"`), and development fakes
        with their bona fide parents (`only="development"`); by default both."""
        parents = self.clips.clip_id.isin(self.part(experiment, "development").clip_id)
        development, test = (self.clips[experiment] == "development") | parents, self.clips[experiment] == "test"
        return self.clips[{"test": test, "development": development}.get(only, test | development)]

    def prepared(self, clips: pd.DataFrame) -> PreparedClips:
        """Clips after the shared channel, (audio (samples,), active (20 ms frame,)), read when asked for."""
        return PreparedClips([DATA / path for path in clips.path], self.settings.channel)

    def key(self, experiment: str, student: bool) -> str:
        """The name of an experiment's student or teacher, made of all that its training depends on."""
        settings, network = self.settings, self.settings.network
        own_steps = ("teacher_steps", "teacher_steps_many", "student_steps", "denoise")  # of one training
        training = {name: each for name, each in vars(settings.training).items()
                    if name not in own_steps and each not in ("", False)}
        own = ["teacher", network.teacher, network.teacher_width, network.levels, network.stem, network.standardise]
        if student:
            teacher = self.key(experiment, student=False)
            own = ["student", dataclasses.asdict(network), settings.training.denoise, teacher]
        _, train, selection = self._fitted_on(experiment, student)
        drawn = [] if voice_weights(train.speaker) is None else ["voices by the root of their clips"]
        return digest_of([
            VERSION, settings.seed, dataclasses.asdict(settings.channel), dataclasses.asdict(settings.view), training,
            settings.run.threads, settings.run.training_threads, *own, self.steps(experiment, student),
            sorted(train.sha256), sorted(selection.sha256), *drawn])

    def _fitted_on(self, experiment: str, student: bool) -> tuple[str, pd.DataFrame, pd.DataFrame]:
        """The experiment whose bona fide speech a student or teacher hears, with its training and selection clips."""
        voices = experiment if student or self.settings.network.teacher_speech == "own" else "multi"
        return voices, self.part(voices, "train"), self.part(voices, "selection")

    def checkpoint(self, experiment: str, student: bool) -> Path:
        """Folder of the training of an experiment's student or teacher."""
        return self.folder / "checkpoints" / f"{'student' if student else 'teacher'}-{self.key(experiment, student)}"

    def steps(self, experiment: str, student: bool) -> int:
        """Steps of the training of an experiment's student or teacher."""
        training, voices = self.settings.training, self._fitted_on(experiment, student)[0]
        if student:
            return training.student_steps
        return training.teacher_steps if voices == "single" else training.teacher_steps_many

    def untrained(self, experiment: str, student: bool) -> bool:
        """Whether there is such a training, and it is still to be done or to be finished."""
        learns = student or self.settings.network.teacher == "perturbation"
        return learns and steps_done(self.checkpoint(experiment, student)) < self.steps(experiment, student)

    def teacher(self, experiment: str) -> tuple[nn.Module, pd.DataFrame]:
        """The frozen teacher of an experiment and its training curve, empty where nothing was trained."""
        key = self.key(experiment, student=False)
        if key not in self._teachers:
            self._teachers[key] = self._trained(train_teacher, experiment, student=False)
        return self._teachers[key]

    def student(self, experiment: str) -> tuple[nn.Module, pd.DataFrame]:
        """The frozen student of an experiment and its training curve."""
        return self._trained(partial(train_student, self.teacher(experiment)[0]), experiment, student=True)

    def _trained(self, work: Callable, experiment: str, student: bool) -> tuple[nn.Module, pd.DataFrame]:
        _, train, selection = self._fitted_on(experiment, student)
        name = self.settings.network.teacher
        what = f"student: {experiment}" if student else f"teacher: {TITLES.get(name, name)}"
        say_once(f"{what}, {len(train)} clips, {train.seconds.sum() / 60:.0f} min of bona fide speech")
        settings = self.settings.with_options({"training.teacher_steps": self.steps(experiment, student=False)})
        readers = (_reader(tuple(clips.path), tuple(clips.speaker), settings.channel, settings.training.chains)
                   for clips in (train, selection))
        with seeds.threads(settings.run.training_threads):
            return work(*readers, settings, self.checkpoint(experiment, student), self.key(experiment, student), say)

    def detector(self, experiment: str, scaling_part: str = "scaling", speech: str = "") -> Detector:
        """The detector of an experiment, fitted on bona fide validation speech. For ablations, `scaling_part="train"`
        fits scaling on the student's own training clips, and every statistic is of the experiment `speech`."""
        scaling, threshold = self.part(speech or experiment, scaling_part), self.part(speech or experiment, "threshold")
        if scaling_part == "train":
            scaling = scaling.head(150)  # as many as the scaling part has
        key = digest_of([self.key(experiment, student=True), dataclasses.asdict(self.settings.scoring),
                         sorted(scaling.sha256), sorted(threshold.sha256)])

        @clocked("statistics")
        def make() -> Detector:
            detector = Detector(self.settings, self.teacher(experiment)[0], self.student(experiment)[0])
            detector.fit_scaling(self.prepared(scaling), scaling.clip_id.tolist())
            detector.fit_threshold(self.prepared(threshold), threshold.clip_id.tolist())
            return detector

        path = self.folder / "detectors" / f"{experiment}-{key}" / "detector.json"
        detector = kept(path, make, lambda made, path: made.save(path.parent), lambda path: Detector.load(path.parent))
        detector.key, detector.scaling_part = key, scaling_part
        return detector

    @clocked("scoring")
    def statistics(self, detector: Detector, clips: pd.DataFrame) -> Arrays:
        """Detector.statistics of every clip, stacked (clip, ...), in the table's order. A clip goes through a detector
        once, whatever tables it is in; a killed run goes on where it stopped."""
        folder = self.folder / "statistics" / detector.key
        known = _STATISTICS.get(folder) or _known(folder)
        lacking = clips[~clips.sha256.isin(known["sha256"])].drop_duplicates("sha256")
        prepared = self.prepared(lacking)
        for first in range(0, len(lacking), BLOCK):
            some = range(first, min(first + BLOCK, len(lacking)))
            rows = list(self.side_by_side(lambda index: detector.statistics(*prepared[index]), some))
            names = lacking.sha256.iloc[some].to_numpy(str)
            block = {name: np.stack([row[name] for row in rows]) for name in rows[0]} | {"sha256": names}
            _save_arrays(block, folder / f"{digest_of(names.tolist())}.npz")
            progress("scoring clips", some.stop, len(lacking))
        known = _STATISTICS[folder] = _known(folder) if len(lacking) else known
        place = {name: index for index, name in enumerate(known["sha256"].tolist())}
        order = [place[name] for name in clips.sha256]
        return {name: values[order] for name, values in known.items() if name != "sha256"}

    def scores(self, experiment: str, only: str = "") -> pd.DataFrame:
        """Clips of `test` with their anomaly (up = fake), score (up = bona fide) and conformal p-value."""
        detector, clips = self.detector(experiment), self.test(experiment, only)
        anomaly = detector.anomaly_of(self.statistics(detector, clips))
        return clips.assign(anomaly=anomaly, score=-anomaly, p_value=[detector.p_value(value) for value in anomaly])

    def ablated(self, detector: Detector, experiment: str, scoring: Scoring, fitting: str = "",
                only: str = "") -> pd.DataFrame:
        """Test scores under another scaling, combination or pooling of the same networks, typicality refitted on the
        scaling part of the experiment (or of `fitting`)."""
        clips, model = self.test(experiment, only), None
        if scoring.pooling in PROFILE_SCORES:
            part = self.part(fitting or experiment, detector.scaling_part)
            model = Typicality.fit(self.statistics(detector, part)[f"profile/{scoring.scaling}"])
        anomaly = detector.anomaly_of(self.statistics(detector, clips), scoring, model)
        return clips.assign(anomaly=anomaly, score=-anomaly)


def apart(works: Iterable[Callable[[Study, str], object]], pairs: list[tuple[Study, str]]) -> None:
    """Each of `works(study, experiment)` of all pairs in processes of one thread, for what it keeps on the disk."""
    jobs = [(work, study.settings, experiment) for work in works for study, experiment in pairs]
    with processes(min(len(jobs), jobs[0][1].run.threads)) as pool:
        list(pool.map(_apart, jobs))


def _apart(job: tuple[Callable[[Study, str], object], Settings, str]) -> None:
    work, study, experiment = job[0], Study(job[1]), job[2]
    with seeds.threads(1):
        work(study, experiment)


def _train(jobs: list[tuple[Settings, str, bool]]) -> None:
    for settings, experiment, student in jobs:
        study = Study(settings)
        study.student(experiment) if student else study.teacher(experiment)


@clocked("training")
def train_side_by_side(pairs: Iterable[tuple[Study, str]]) -> None:
    """Train the networks of (study, experiment) pairs side by side on the CPU, each on its own `run.training_threads`;
    later requests find them on disk. Two on a thread each take two thirds of the time they take in turn on both."""
    pairs, jobs, taken = list(pairs), {}, set()
    if not pairs:
        return
    settings = pairs[0][0].settings
    together = settings.run.threads // settings.run.training_threads
    if together < 2 or engine_of(settings).device.type != "cpu":
        return
    # The longest first, so that none runs alone at the end; a new teacher and its students one after another.
    for study, experiment in sorted(pairs, key=lambda pair: -pair[0].steps(pair[1], student=False)):
        group = None
        for student in (False, True):
            if study.untrained(experiment, student):
                place = study.checkpoint(experiment, student)
                group = group or place
                if place not in taken:
                    jobs.setdefault(group, []).append((study.settings, experiment, student))
                taken.add(place)
    if len(jobs) < 2:  # trained when asked for
        return
    say(f"{sum(map(len, jobs.values()))} networks are trained, {together} at a time")
    with processes(together) as pool:
        for number, done in enumerate(as_completed([pool.submit(_train, group) for group in jobs.values()]), 1):
            done.result()
            say(f"{number} of {len(jobs)} trainings done")
