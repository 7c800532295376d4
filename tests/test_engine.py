"""Devices and processes: two processes train the curve of one, and a GPU's code path is right on a CPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from lib.engine import Engine, EngineError, current, device_named, in_processes, processes
from tests.conftest import toy_speech
from tests.test_training import train

ROOT = Path(__file__).parent.parent
TRAIN = """
import json, sys, pandas as pd, torch, pathlib
from tests.test_training import train
clips = (pathlib.Path(sys.argv[1]), pd.DataFrame({"path": [f"{n}.flac" for n in range(6)], "speaker": list("aaaabc")}))
train(clips, pathlib.Path(sys.argv[2]), **json.loads(sys.argv[3]))
from lib.engine import current
import os
os.write(1, f"process {current('cpu').rank} of {current('cpu').world}\\n".encode())  # in one piece
"""


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for number in range(6):
        soundfile.write(folder / f"{number}.flac", toy_speech(1.5, number), 16000)
    return folder, pd.DataFrame({"path": [f"{number}.flac" for number in range(6)], "speaker": list("aaaabc")})


def launched(processes, *arguments, **environment):
    """Run a script or `-m module` under accelerate; fails with what it printed. Without a GPU, --multi_gpu starts plain
    processes that talk through gloo (--cpu would want MPI)."""
    pytest.importorskip("accelerate")
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        str(processes),
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
        *map(str, arguments),
    ]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_two_processes_train_the_curve_of_one(clips, tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    # Small steps: AdamW divides by the size of the gradient, so larger ones make much of rounding in a gradient near 0.
    options = {"network.teacher": "perturbation", "run.device": "cpu", "training.learning_rate": 1e-4}
    said = launched(2, tmp_path / "train.py", clips[0], tmp_path / "two", json.dumps(options))
    assert "process 0 of 2" in said and "process 1 of 2" in said
    train(clips, tmp_path / "one", **options)
    for part, steps in (("teacher", 4), ("student", 12)):
        one, two = (pd.DataFrame(json.loads((tmp_path / name / part / "checkpoint.json").read_text())["history"])
                    for name in ("one", "two"))
        assert one.step.iloc[-1] == steps
        # Rounding alone: up to 4e-5 on some processors; a row or a gradient that lacks moves the loss by 1e-2.
        np.testing.assert_allclose(one.to_numpy(), two.to_numpy(), rtol=2e-4)
    assert not [*tmp_path.rglob(".tmp-*")]


def test_a_batch_that_cannot_be_shared_is_refused():
    joined = lambda rank, world: SimpleNamespace(process_index=rank, num_processes=world)  # noqa: E731
    assert Engine(torch.device("cpu"), accelerator=joined(1, 2)).rows(8) == slice(4, 8)
    with pytest.raises(EngineError, match="multiple of 3"):
        Engine(torch.device("cpu"), accelerator=joined(1, 3)).rows(8)


def worked(item):
    return item + offset["by"], torch.get_num_threads()


def begin(by):
    offset["by"] = by


offset = {}


def test_processes_begin_alike_keep_the_order_and_stop_with_the_caller():
    assert list(in_processes(worked, range(5), 2, begin, (10,))) == [(10 + number, 1) for number in range(5)]
    began = time.time()
    with pytest.raises(KeyboardInterrupt), processes(2) as pool:
        waiting = [pool.submit(time.sleep, 60) for _ in range(5)]
        raise KeyboardInterrupt
    assert time.time() - began < 30 and not any(job.done() and not job.cancelled() for job in waiting)


def test_devices_that_are_not_here_are_named():
    assert device_named("cpu").type == "cpu"
    with pytest.raises(EngineError, match="expected auto, cpu"):
        device_named("gpu")
    if not torch.cuda.is_available():
        assert device_named("auto").type == "cpu"
        with pytest.raises(EngineError, match="cannot be used here"):
            device_named("cuda:7")


LAST = {
    "network.teacher_width": 8,
    "network.student_width": 8,
    "training.student_steps": 9,
}


def test_workers_change_nothing(clips, tmp_path):
    assert train(clips, tmp_path / "plain")[1].equals(train(clips, tmp_path / "ahead", **{"run.workers": 2})[1])


def test_channels_last_changes_nothing_but_rounding(clips, tmp_path, monkeypatch):
    turned = train(clips, tmp_path / "turned", **LAST)
    monkeypatch.setattr("lib.model.training.engine_of", lambda settings: current(settings.run.device, "contiguous"))
    plain = train(clips, tmp_path / "plain", **LAST)[1]
    # AdamW's first steps are as long for a gradient of rounding size as for any other: rounding grows with the steps.
    np.testing.assert_allclose(plain.head(1).to_numpy(), turned[1].head(1).to_numpy(), rtol=1e-4)
    np.testing.assert_allclose(plain.to_numpy(), turned[1].to_numpy(), rtol=1e-3)
    assert all(value.is_contiguous() for value in turned[0].state_dict().values())


def test_channels_last_resumes_bit_for_bit(clips, tmp_path, monkeypatch):
    options = LAST | {"training.precision": "bf16"}
    whole = train(clips, tmp_path / "whole", **options)[0].state_dict()
    from lib.model import training

    keep, calls = training.keep, []

    def stopping(*arguments):
        keep(*arguments)
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "keep", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(clips, tmp_path / "cut", **options)
    again = train(clips, tmp_path / "cut", **options)[0].state_dict()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
