"""Saved detectors: equal after a round trip, refused with a reason when damaged, foreign or hostile."""

import json
import pickle
import shutil
import struct

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from lib.detector import Detector
from lib.model import checkpoints
from lib.model.checkpoints import DetectorError
from lib.paths import file_digest
from lib.settings import RATE_HZ


@pytest.fixture
def copy(saved_detector, tmp_path):
    return shutil.copytree(saved_detector, tmp_path / "detector")


def refused(folder, *words):
    with pytest.raises(DetectorError) as caught:
        Detector.load(folder)
    message = str(caught.value)
    assert str(folder) in message and all(word in message for word in words), message
    return message


def sheet_changed(folder, change):
    """Rewrite detector.json after `change` was called on its content; the hash of the weights is brought up to date."""
    path = folder / "detector.json"
    sheet = json.loads(path.read_text())
    sheet["sha256"] = file_digest(folder / "detector.safetensors")
    change(sheet)
    path.write_text(json.dumps(sheet))


def weights_changed(folder, change):
    """Save changed tensors, with a sheet whose hash agrees: the checks behind the hash have to find it."""
    tensors = load_file(folder / "detector.safetensors")
    change(tensors)
    save_file(tensors, folder / "detector.safetensors")
    sheet_changed(folder, lambda sheet: None)


def test_round_trip_gives_equal_scores_and_facts(tiny_detector, saved_detector, voice):
    again, audio = Detector.load(saved_detector), voice(2.0, 70)
    # A product of matrices rounds by where in memory they lie.
    assert again.score(audio, RATE_HZ) == pytest.approx(tiny_detector.score(audio, RATE_HZ), rel=1e-6)
    assert np.array_equal(again.calibration, tiny_detector.calibration)
    assert again.settings == tiny_detector.settings
    assert again.fitted_on == tiny_detector.fitted_on
    assert again.map_limits == tiny_detector.map_limits
    assert np.allclose(again.explain(audio, RATE_HZ).map, tiny_detector.explain(audio, RATE_HZ).map, atol=1e-5)


def test_saving_twice_gives_the_same_bytes(tiny_detector, saved_detector, tmp_path):
    tiny_detector.save(tmp_path)
    for name in ("detector.safetensors", "detector.json"):
        assert (tmp_path / name).read_bytes() == (saved_detector / name).read_bytes()


@pytest.mark.parametrize("scale", [
    3, {}, {"kind": "signed", "limits": [0, 1]}, {"kind": "read", "limits": [1]}, {"kind": "read", "limits": [2, 1]},
    {"kind": "read", "limits": [0, float("nan")]}, {"kind": "read", "limits": ["<b>", 1]}], ids=range(7))
def test_a_damaged_or_foreign_colour_scale_is_refused(copy, scale):
    sheet_changed(copy, lambda sheet: sheet.update(map=scale))
    refused(copy, "does not fit")


@pytest.mark.parametrize("name", ["detector.json", "detector.safetensors"])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    refused(copy, name, "missing", "Detector.save")


def test_a_flipped_byte_is_found_by_the_hash(copy):
    path = copy / "detector.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    refused(copy, "damaged", "SHA-256")


def test_a_truncated_file_is_found(copy):
    path = copy / "detector.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(copy, "SHA-256")
    sheet_changed(copy, lambda sheet: None)
    refused(copy, "cannot be read")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_renamed_pickle_runs_nothing(copy, tmp_path):
    bomb = pickle.dumps(Bomb(tmp_path / "ran"))
    (copy / "detector.safetensors").write_bytes(bomb)
    sheet_changed(copy, lambda sheet: None)
    refused(copy, "cannot be read")
    (copy / "detector.json").write_bytes(bomb)
    refused(copy, "not a detector's sheet")
    assert not (tmp_path / "ran").exists()
    pickle.loads(bomb).close()
    assert (tmp_path / "ran").exists()  # it would have run


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"format": 1}', "[" * 100_000,
                                  '{"format": 1, "settings": 3, "sha256": 0}'])
def test_json_that_is_no_sheet_is_refused(copy, text):
    (copy / "detector.json").write_text(text)
    refused(copy, "detector.json")


def test_bytes_that_are_no_text_are_refused(copy):
    (copy / "detector.json").write_bytes(b"\xff\xfe\x00{")
    refused(copy, "detector.json")


def test_a_newer_format_is_refused(copy):
    sheet_changed(copy, lambda sheet: sheet.update(format=2))
    refused(copy, "format 2", "newer")


@pytest.mark.parametrize(("section", "name", "value"), [
    ("network", "teacher_width", 129), ("network", "student_width", -1), ("network", "levels", 0),
    ("view", "bins", 10**9)])
def test_sizes_out_of_bounds_are_refused_before_anything_is_built(copy, section, name, value):
    sheet_changed(copy, lambda sheet: sheet["settings"][section].update({name: value}))
    refused(copy, "lies between")


def test_settings_of_the_wrong_type_or_choice_are_refused(copy):
    sheet_changed(copy, lambda sheet: sheet["settings"]["network"].update(teacher="a_pickle"))
    refused(copy, "one of")


def test_weights_that_do_not_fit_the_settings_are_refused(copy):
    sheet_changed(copy, lambda sheet: sheet["settings"]["network"].update(teacher_width=8))
    refused(copy, "do not fit")


def test_a_stem_that_would_shift_the_features_is_refused(copy):
    sheet_changed(copy, lambda sheet: sheet["settings"]["network"].update(stem=4))
    refused(copy, "one of 1, 3, 5", "not 4")


def test_a_sheet_from_before_the_stem_was_an_option_means_seven(copy):
    sheet_changed(copy, lambda sheet: sheet["settings"]["network"].pop("stem"))
    assert checkpoints.read_detector(copy)[0].network.stem == 7


def test_a_sheet_from_before_planes_had_their_name_is_read(copy, tiny_detector):
    def older(sheet):
        settings = sheet["settings"]
        settings["view"]["channels"] = settings["view"].pop("planes")
        settings["network"]["student_channels"] = settings["network"].pop("student_planes")
        del settings["recipe"]

    sheet_changed(copy, older)
    assert Detector.load(copy).settings == tiny_detector.settings


def test_a_tensor_that_is_missing_is_refused(copy):
    weights_changed(copy, lambda tensors: tensors.pop("calibration"))
    refused(copy, "do not fit")


def test_weights_that_are_not_finite_are_refused(copy):
    def poison(tensors):
        name = next(name for name in tensors if name.startswith("student.") and name.endswith("weight"))
        tensors[name].view(-1)[0] = float("nan")

    weights_changed(copy, poison)
    refused(copy, "not finite")


def test_a_header_that_claims_huge_tensors_allocates_nothing(copy):
    huge = {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}
    header = json.dumps({"teacher.conv1.weight": huge}).encode()
    (copy / "detector.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)
    sheet_changed(copy, lambda sheet: None)
    refused(copy, "cannot be read")
    (copy / "detector.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    sheet_changed(copy, lambda sheet: None)
    refused(copy, "cannot be read")


def test_a_file_above_the_bound_is_not_read(copy, monkeypatch):
    monkeypatch.setattr(checkpoints, "MAX_BYTES", 100)
    refused(copy, "more than 100")


def test_the_shipped_detector_is_the_default(saved_detector, monkeypatch, tmp_path):
    monkeypatch.setattr("lib.detector.SHIPPED", saved_detector)
    assert len(Detector.load().calibration) == 24
    monkeypatch.setattr("lib.detector.SHIPPED", tmp_path / "none")
    with pytest.raises(DetectorError, match="missing"):
        Detector.load()
