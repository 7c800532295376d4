import subprocess
import sys
from concurrent.futures import Future
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from lib import study
from lib.model import networks
from lib.paths import kept
from lib.settings import load_settings


@pytest.fixture
def trained(monkeypatch):
    jobs = []

    class Pool:
        """Runs each group of jobs when it is handed in, as a pool with one worker and no queue would."""

        def submit(self, _, group):
            jobs.extend(group)
            future = Future()
            future.set_result(None)
            return future

    @contextmanager
    def processes(_):
        yield Pool()

    monkeypatch.setattr(study, "processes", processes)
    monkeypatch.setattr(study, "engine_of", lambda _: SimpleNamespace(device=SimpleNamespace(type="cpu")))

    def run(*studies):
        study.train_side_by_side([(each, "single") for each in studies])
        return [(settings.name, student) for settings, _, student in jobs]

    return run


def asked(name, done=(), steps=100, teacher=""):
    """A study whose networks are named; those of `done` are trained."""
    settings = SimpleNamespace(name=name, run=SimpleNamespace(threads=2, training_threads=1))
    one = SimpleNamespace(settings=settings, steps=lambda experiment, student: 10 if student else steps)
    one.checkpoint = lambda experiment, student: f"{name}'s student" if student else f"{teacher or name}'s teacher"
    one.untrained = lambda experiment, student: one.checkpoint(experiment, student) not in done
    return one


def test_a_teacher_is_trained_once_and_before_its_students(trained):
    jobs = trained(asked("a"), asked("b", teacher="a"), asked("c", teacher="a"), asked("d"))
    assert [job for job in jobs if job[0] != "d"] == [("a", False), ("a", True), ("b", True), ("c", True)]


def test_the_longest_teacher_starts_first_and_no_student_waits_for_another_ones_teacher(trained):
    jobs = trained(asked("a"), asked("long", steps=900), asked("ready", done=("ready's teacher",)))
    assert jobs == [("long", False), ("long", True), ("a", False), ("a", True), ("ready", True)]


def test_one_student_whose_teacher_is_there_is_left_to_whoever_asks(trained):
    assert trained(asked("a", done=("a's teacher",))) == []


def test_nothing_is_trained_twice(trained):
    assert trained(asked("a", done=("a's teacher", "a's student"))) == []


def test_a_detector_that_is_there_asks_for_no_training(tmp_path, monkeypatch):
    class Saved(SimpleNamespace):
        def save(self, folder):
            folder.mkdir(parents=True)
            (folder / "detector.json").write_text("{}")

        fit_scaling = fit_threshold = lambda *_: None
        load = staticmethod(lambda folder: Saved(folder=folder))

    asked_for = []
    networks = lambda kind: lambda experiment: asked_for.append((kind, experiment)) or (kind, None)  # noqa: E731
    clips = pd.DataFrame({"clip_id": ["b", "a"], "sha256": ["2", "1"]})
    one = SimpleNamespace(
        folder=tmp_path,
        settings=load_settings("smoke"),
        part=lambda *_: clips,
        prepared=lambda _: [],
        key=lambda experiment, student: f"key of {experiment}",
        teacher=networks("teacher"),
        student=networks("student"),
    )
    monkeypatch.setattr(study, "Detector", lambda *_: Saved())
    study.Detector.load = Saved.load
    first = study.Study.detector(one, "single")
    assert asked_for == [("teacher", "single"), ("student", "single")] and first.folder.parent == tmp_path / "detectors"
    assert study.Study.detector(one, "single").folder == first.folder and len(asked_for) == 2
    one.settings = one.settings.with_options({"scoring.pooling": "mean"})
    assert study.Study.detector(one, "single").folder != first.folder and len(asked_for) == 4


@pytest.fixture
def keyed(monkeypatch):
    """The keys of teacher and student under options, of clips that stay the same."""
    clips = pd.DataFrame({"sha256": ["1"], "speaker": ["a"]})

    class Keyed(study.Study):
        def __init__(self, settings):
            self.settings = networks.resolved(settings)

        def part(self, experiment, name):
            return clips

    return lambda preset="study", **options: [
        Keyed(load_settings(preset, 0, {name.replace("__", "."): value for name, value in options.items()})).key(
            "single", student
        )
        for student in (False, True)
    ]


def test_a_key_holds_what_a_network_depends_on_and_no_more(keyed):
    teacher, student = keyed()
    assert keyed(run__seeds=3, run__bootstrap=7, scoring__pooling="mean") == [teacher, student]
    for options in ({"training__student_steps": 7}, {"network__student_planes": ""}, {"training__denoise": False}):
        assert keyed(**options)[0] == teacher and keyed(**options)[1] != student, options
    for options in ({"training__check_every": 7}, {"network__teacher": "random"}, {"view__hop_s": 0.016}):
        assert keyed(**options)[0] != teacher and keyed(**options)[1] != student, options
    assert keyed("full") == [teacher, student], "a full run goes on with what a study run made"
    folders = [study.Study(load_settings(preset)).folder.name for preset in ("smoke", "study", "full")]
    assert folders == ["smoke", "study", "study"]


def test_a_key_says_which_imagenet_teacher_there_is(keyed, monkeypatch):
    monkeypatch.setattr(networks, "resnet18_file", lambda: None)
    lite0 = keyed(recipe="stfpm")
    monkeypatch.setattr(networks, "resnet18_file", lambda: "there")
    assert keyed(recipe="stfpm") != lite0 == keyed(recipe="stfpm", network__teacher="lite0")


def test_what_is_kept_is_made_once(tmp_path):
    made = []

    def make():
        made.append(1)
        return "text"

    save, load = lambda value, path: path.write_text(value), lambda path: path.read_text()
    assert [kept(tmp_path / "a", make, save, load) for _ in range(2)] == ["text", "text"] and len(made) == 1


def test_pinning_asks_for_deterministic_kernels_without_loading_the_compiler():
    code = (
        "import sys, torch; from lib.seeds import pin; pin(0, 1); "
        "print(torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(), "
        "torch.get_num_threads(), 'torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "1", "False"]


def test_a_clip_goes_through_a_detector_once_whatever_tables_it_is_in(tmp_path, monkeypatch):
    seen = []

    class Detector:
        key = "abc"

        def statistics(self, name):
            seen.append(name)
            return {"read/sum/mean": float(ord(name)), "profile/read": np.full(2, ord(name))}

    def fresh():
        monkeypatch.setattr(study, "_STATISTICS", {})  # as in a new process
        made = object.__new__(study.Study)
        made.folder, made.side_by_side = tmp_path, lambda work, items: map(work, items)
        made.prepared = lambda clips: [(name,) for name in clips.clip_id]
        return made

    monkeypatch.setattr(study, "BLOCK", 2)
    clips = pd.DataFrame({"clip_id": list("abcde"), "sha256": [f"sha {name}" for name in "abcde"]})
    first = fresh()
    assert first.statistics(Detector(), clips.iloc[[3, 0, 1]])["read/sum/mean"].tolist() == [100, 97, 98]
    assert seen == ["d", "a", "b"] and first.statistics(Detector(), clips.iloc[:0])["profile/read"].shape == (0, 2)
    both = fresh().statistics(Detector(), clips.iloc[[4, 1, 4]])
    assert seen == ["d", "a", "b", "e"] and both["read/sum/mean"].tolist() == [101, 98, 101]
    assert both["profile/read"].tolist() == [[101, 101], [98, 98], [101, 101]] and set(both) == {
        "read/sum/mean", "profile/read"}
