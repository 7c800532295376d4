"""The training loop on toy clips: it learns, resumes bit for bit after a kill, and refuses damaged checkpoints."""

import json
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from lib.data.channel import ClipReader, PreparedClips, voice_weights
from lib.detector import Detector
from lib.model import networks
from lib.model.checkpoints import CheckpointError
from lib.model.images import FrontEnd
from lib.model.networks import resolved
from lib.model.pyramid import ResNetPyramid, initialise
from lib.model.training import learning_rate, train_student, train_teacher
from lib.settings import Channel, View, load_settings
from tests.conftest import toy_speech

OPTIONS = {
    "network.teacher": "random",
    "network.teacher_width": 4,
    "network.student_width": 4,
    "training.student_steps": 12,
    "training.batch": 2,
    "training.check_every": 3,
    "training.teacher_steps": 4,
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for number in range(6):
        soundfile.write(folder / f"{number}.flac", toy_speech(1.5, number), 16000)
    return folder, pd.DataFrame({"path": [f"{number}.flac" for number in range(6)], "speaker": list("aaaabc")})


def train(clips, folder, say=lambda _: None, **options):
    torch.set_num_threads(1)
    settings = load_settings("smoke", 0, OPTIONS | options)
    reader = ClipReader(clips[1], settings.channel, clips[0])
    teacher, _ = train_teacher(reader, reader, settings, folder / "teacher", "teacher")
    return train_student(teacher, reader, reader, settings, folder / "student", "student", say)


def test_student_learns_and_history_is_kept(clips, tmp_path):
    student, history = train(clips, tmp_path)
    assert list(history.step) == [3, 6, 9, 12] and history.loss.iloc[-1] < history.loss.iloc[0]
    assert not any(parameter.requires_grad for parameter in student.parameters())
    again, same = train(clips, tmp_path)  # nothing is trained a second time
    assert history.equals(same)
    assert all(torch.equal(a, b) for a, b in zip(student.state_dict().values(), again.state_dict().values()))


@pytest.mark.parametrize("kind", ["perturbation", "lite0"])
def test_other_teachers(clips, tmp_path, kind):
    if kind == "lite0":
        pytest.importorskip("efficientnet_lite_pytorch")
    options = {"network.teacher": kind, "training.student_steps": 2, "network.student_planes": ""}
    assert np.isfinite(train(clips, tmp_path, **options)[1].loss).all()


def test_sgd_and_bf16(clips, tmp_path):
    for number, options in enumerate(({"training.optimiser": "sgd"}, {"training.precision": "bf16"})):
        _, history = train(clips, tmp_path / str(number), **options, **{"training.student_steps": 3})
        assert np.isfinite(history.loss).all()


CHILD = """
import sys, pandas as pd, pathlib
sys.path.insert(0, {root!r})
from tests.test_training import train
clips = pd.DataFrame({{"path": [f"{{n}}.flac" for n in range(6)], "speaker": list("aaaabc")}})
train((pathlib.Path({folder!r}), clips), pathlib.Path({out!r}))
"""


def test_killed_training_resumes_bit_for_bit(clips, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(clips, whole)
    root = str(Path(__file__).parent.parent)
    code = CHILD.format(root=root, folder=str(clips[0]), out=str(cut))
    child = subprocess.Popen([sys.executable, "-c", code], cwd=root)
    sheet = cut / "student" / "checkpoint.json"
    for _ in range(1200):
        if sheet.exists() or child.poll() is not None:
            break
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    killed_at = json.loads(sheet.read_text())["step"]
    train(clips, cut)
    for name in ("best", "last"):
        one, two = (load_file(next((folder / "student").glob(f"{name}-*.safetensors"))) for folder in (whole, cut))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), (
            f"killed at step {killed_at}"
        )
    stray = [path for path in cut.rglob(".tmp-*") if path.stat().st_mtime > sheet.stat().st_mtime]
    assert not stray


def test_a_training_that_is_asked_for_twice_at_once_is_done_once(clips, tmp_path):
    lines, together = [], threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        both = pool.map(lambda _: (together.wait(), train(clips, tmp_path, lines.append))[1], range(2))
        (_, one), (_, two) = both
    assert one.equals(two) and len(lines) == len(one)


def test_damaged_and_foreign_checkpoints_are_refused(clips, tmp_path):
    train(clips, tmp_path)
    best = next((tmp_path / "student").glob("best-*.safetensors"))
    data = bytearray(best.read_bytes())
    data[-5] ^= 1
    best.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        train(clips, tmp_path)
    sheet = tmp_path / "student" / "checkpoint.json"
    sheet.write_text(sheet.read_text().replace('"student"', '"another"'))
    with pytest.raises(CheckpointError, match="another training"):
        train(clips, tmp_path)


def test_reader_keeps_little_and_repeats_short_clips(clips):
    settings = load_settings("smoke")
    reader = ClipReader(clips[1], settings.channel, clips[0], limit_bytes=1)
    one = reader.crops(4, 40000, np.random.default_rng(0))
    assert one.shape == (4, 40000) and len(reader._kept) == 1
    roomy = ClipReader(clips[1], settings.channel, clips[0])
    assert np.array_equal(one, roomy.crops(4, 40000, np.random.default_rng(0)))


def published(clips, folder, **options):
    """Teacher, student and detector of the recipe stfpm, through the classes that a study uses."""
    torch.set_num_threads(1)
    settings = resolved(load_settings("smoke", 0, {
        "recipe": "stfpm", "training.student_steps": 3, "training.check_every": 3, "training.batch": 4, **options}))
    reader = ClipReader(clips[1], settings.channel, clips[0])
    teacher, _ = train_teacher(reader, reader, settings, folder / "teacher", "teacher")
    student, history = train_student(teacher, reader, reader, settings, folder / "student", "student")
    detector = Detector(settings, teacher, student)
    speech = PreparedClips([clips[0] / path for path in clips[1].path], settings.channel)
    detector.fit_scaling(speech, list(clips[1].path))
    detector.fit_threshold(speech, list(clips[1].path))
    return detector, speech[0], history


def test_the_published_recipe_trains_scores_maps_and_is_read_again(clips, tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    detector, clip, history = published(clips, tmp_path, **{"network.teacher": "lite0"})
    assert np.isfinite(history.loss).all() and type(detector.student) is type(detector.teacher)
    values = detector.statistics(*clip, ("none", "level", "frequency", "element"))
    names = {f"{kind}/{combine}/{pooling}" for kind in ("none", "level", "frequency", "element")
             for combine in ("product", "sum") for pooling in ("max", "mean")}
    assert names <= set(values) and all(np.isfinite(values[name]) for name in names)
    assert detector.score_prepared(*clip) == pytest.approx(values["element/product/max"])
    explained = detector.explain_prepared(*clip)
    assert detector.map_kind == "element" and explained.image.shape[0] == 1  # one plain picture
    assert np.allclose(explained.map, np.logaddexp(0, np.array(explained.levels)).prod(0), rtol=1e-3)
    again = Detector.load(detector.save(tmp_path / "saved"))
    assert again.score_prepared(*clip) == pytest.approx(detector.score_prepared(*clip), rel=1e-5)


def test_torchvisions_resnet_is_taken_where_its_weights_are(clips, tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "WEIGHTS", tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    assert resolved(load_settings("smoke", 0, "recipe=stfpm")).network.teacher == "lite0"
    assert networks.RESNET18 in networks.why_unavailable("resnet18")
    front = FrontEnd(View(planes=("level",)), Channel(), colours=True)
    weights = initialise(ResNetPyramid(front, 64, 4), 7, "torchvision").state_dict()
    torch.save(weights | {"fc.weight": torch.zeros(1000, 512)}, tmp_path / networks.RESNET18)
    detector, clip, _ = published(clips, tmp_path / "run")
    assert detector.settings.network.teacher == "resnet18" and detector.teacher.channels == (64, 128, 256)
    assert torch.equal(detector.teacher.layer3[1].conv2.weight, weights["layer3.1.conv2.weight"])
    assert detector.student.channels == detector.teacher.channels and not len(detector.student.heads)
    again = Detector.load(detector.save(tmp_path / "saved"))
    assert again.score_prepared(*clip) == pytest.approx(detector.score_prepared(*clip), rel=1e-5)


def test_the_learning_rate_is_the_settings_whatever_the_optimiser(clips, tmp_path):
    options = {"training.optimiser": "sgd", "training.student_steps": 3, "training.denoise": False}
    curves = [
        train(clips, tmp_path / str(rate), **options, **{"training.learning_rate": rate})[1] for rate in (1e-6, 0.1)
    ]
    assert curves[0].validation.iloc[-1] > curves[1].validation.iloc[-1] + 0.01


def test_learning_rate_rises_and_falls():
    rates = [learning_rate(step, 100, 1.0) for step in range(100)]
    assert np.argmax(rates) == 20 and max(rates) <= 1.0 and rates[-1] < 0.02 and rates[0] == pytest.approx(0.1)


def test_voices_are_drawn_by_the_root_of_their_clips(clips):
    one, four = voice_weights(pd.Series(["a"] * 9)), voice_weights(pd.Series(list("aaaab")))
    assert one is None  # one voice: every clip alike
    assert four == pytest.approx([1 / 6] * 4 + [1 / 3])  # 2 to 1, where clips are 4 to 1
    reader = ClipReader(clips[1], load_settings("smoke").channel, clips[0])
    drawn = [reader.weights[:4].sum(), *reader.weights[4:]]
    assert drawn == pytest.approx([0.5, 0.25, 0.25])
