"""Devices and processes: two processes train the curve of one, and a GPU's code path is right on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from lib import engine
from lib.engine import Engine, EngineError, device_named
from tests.conftest import toy_speech
from tests.test_training import train

ROOT = Path(__file__).parent.parent
TRAIN = """
import sys, pandas as pd, torch, pathlib
from tests.test_training import train
clips = (pathlib.Path(sys.argv[1]), pd.DataFrame({"path": [f"{n}.flac" for n in range(6)]}))
train(clips, pathlib.Path(sys.argv[2]), **{"network.teacher": "perturbation", "run.device": "cpu"})
"""


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for number in range(6):
        soundfile.write(folder / f"{number}.flac", toy_speech(1.5, number), 16000)
    return folder, pd.DataFrame({"path": [f"{number}.flac" for number in range(6)]})


def launched(processes, *arguments, **environment):
    """Run a script or `-m module` under accelerate on CPU processes; fails with what it printed."""
    pytest.importorskip("accelerate")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes), "--num_machines",
               "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", *map(str, arguments)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_two_processes_train_the_curve_of_one(clips, tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    launched(2, tmp_path / "train.py", clips[0], tmp_path / "two")
    train(clips, tmp_path / "one", **{"network.teacher": "perturbation", "run.device": "cpu"})
    for part, steps in (("teacher", 4), ("student", 12)):
        one, two = (pd.DataFrame(json.loads((tmp_path / name / part / "checkpoint.json").read_text())["history"])
                    for name in ("one", "two"))
        assert one.step.iloc[-1] == steps
        np.testing.assert_allclose(one.to_numpy(), two.to_numpy(), rtol=2e-4)
    assert not [*tmp_path.rglob(".tmp-*")]
