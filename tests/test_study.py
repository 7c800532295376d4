import subprocess
import sys
from concurrent.futures import Future
from types import SimpleNamespace

import pandas as pd
import pytest

from lib import study
from lib.settings import load_settings


class Pool:
    """Runs each job when it is handed in, as a pool with one worker and no queue would, and keeps their order."""

    def __init__(self, jobs):
        self.jobs = jobs

    def __call__(self, *_):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def submit(self, _, origin, settings, experiment, student):
        self.jobs.append((settings, experiment, student))
        future = Future()
        future.set_result(None)
        return future


def asked(name, done=(), steps=100, origin=None):
    """A study whose networks are named; those of `done` are trained."""
    one = SimpleNamespace(settings=name, steps=lambda experiment, student: 10 if student else steps)
    one.origin = origin or one
    one.checkpoint = lambda experiment, student: f"{one.settings}'s student" if student else f"{one.origin.settings}'s teacher"
    one.untrained = lambda experiment, student: one.checkpoint(experiment, student) not in done
    return one


@pytest.fixture
def trained(monkeypatch):
    jobs = []
    monkeypatch.setattr(study, "ProcessPoolExecutor", Pool(jobs))
    settings = load_settings("smoke", 0, {"run.threads": 2, "run.device": "cpu"})

    def run(*studies):
        monkeypatch.setattr(study, "engine_of", lambda _: SimpleNamespace(device=SimpleNamespace(type="cpu")))
        # The first study's settings say how many threads there are; names stand for all others.
        first = SimpleNamespace(**vars(studies[0]))
        first.settings = settings
        study.train_side_by_side([(first, "single"), *((one, "single") for one in studies[1:])])
        return [(one if isinstance(one, str) else "first", student) for one, _, student in jobs]

    return run


def test_a_teacher_is_trained_once_and_before_its_students(trained):
    base = asked("a")
    found = trained(base, asked("b", origin=base), asked("c", origin=base))
    assert [student for _, student in found] == [False, True, True, True]
    assert {name for name, student in found if student} == {"first", "b", "c"}


def test_the_longest_teacher_starts_first_and_no_student_waits_for_another_ones_teacher(trained):
    found = trained(asked("a"), asked("long", steps=900), asked("ready", done=("ready's teacher",)))
    assert found[:3] == [("long", False), ("first", False), ("ready", True)]
    assert len(found) == 5


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
    one = SimpleNamespace(folder=tmp_path, settings=load_settings("smoke"), part=lambda *_: clips, prepared=lambda _: [],
                          _student_key=lambda experiment: f"key of {experiment}", teacher=networks("teacher"), student=networks("student"))
    monkeypatch.setattr(study, "Detector", lambda *_: Saved())
    study.Detector.load = Saved.load
    first = study.Study.detector(one, "single")
    assert asked_for == [("teacher", "single"), ("student", "single")] and first.folder.parent == tmp_path / "detectors"
    assert study.Study.detector(one, "single").folder == first.folder and len(asked_for) == 2
    one.settings = one.settings.with_options({"scoring.pooling": "mean"})
    assert study.Study.detector(one, "single").folder != first.folder and len(asked_for) == 4


def test_a_preset_with_short_trainings_has_short_baselines():
    one = SimpleNamespace(settings=load_settings("smoke"))
    assert study.Study.shortened(one, SimpleNamespace(steps=250)).steps == one.settings.training.student_steps
    assert study.Study.shortened(one, SimpleNamespace(steps=3)).steps == 3
    assert not hasattr(study.Study.shortened(one, SimpleNamespace()), "steps")


def test_pinning_asks_for_deterministic_kernels_without_loading_the_compiler():
    code = ("import sys, torch; from lib.seeds import pin; pin(0, 1); "
            "print(torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(), "
            "torch.get_num_threads(), 'torch._dynamo' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "1", "False"]
