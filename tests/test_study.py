from concurrent.futures import Future
from types import SimpleNamespace

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
