"""Owns tensors and sheets on disk: written whole, hashed, and checked before any of them is used."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lib.model.evidence import Evidence
from lib.model.networks import new_student, new_teacher
from lib.model.pyramid import Standardised, freeze
from lib.model.scaling import Scaling, Typicality
from lib.paths import atomic, file_digest, write_json
from lib.settings import Settings

MAX_BYTES = 800_000_000
"""Above any detector of this study (a few MB, with speech models 700), far below what would fill a machine."""
HINT = "expected a folder written by Detector.save, with detector.json and detector.safetensors"
OLD_NAMES = {"view.channels": "view.planes", "network.student_channels": "network.student_planes"}
"""Options as sheets of before name them."""


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged or of another experiment; the message says what to do."""


class DetectorError(RuntimeError):
    """A detector cannot be loaded or used; the message says what was expected and what to do."""


def stored(path: Path, tensors: dict[str, torch.Tensor]) -> list[str]:
    """Write tensors atomically; their file name and SHA-256."""
    from safetensors.torch import save_file

    with atomic(path) as temporary:
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, temporary)
    return [path.name, file_digest(path)]


def sound(folder: Path, file: list[str]) -> dict[str, torch.Tensor]:
    """The tensors of a file if its bytes are the recorded ones; else CheckpointError (a flipped byte would load)."""
    from safetensors.torch import load_file

    path = folder / file[0]
    if not path.exists() or file_digest(path) != file[1]:
        raise CheckpointError(f"{path} is missing or damaged (its SHA-256 differs from checkpoint.json): remove "
                              f"{folder} and train again")
    return load_file(path)


def write_detector(folder: Path, settings: Settings, networks: dict[str, nn.Module], scaling: Scaling,
                   typicality: Typicality, calibration: np.ndarray, facts: dict[str, object],
                   evidence: Evidence | None = None) -> None:
    """Write detector.safetensors and then detector.json (settings, `facts`, SHA-256) into `folder`, each atomically."""
    parts = {name: network.state_dict() for name, network in networks.items()} | {"scaling": scaling.tensors()}
    if evidence:
        parts["evidence"], facts = evidence.tensors(), facts | {"evidence": evidence.sheet()}
    tensors = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
    for name in ("mean", "deviation", "precision"):
        # The precision is most of the file: single precision is plenty for it.
        kind = np.float32 if name == "precision" else np.float64
        tensors[f"typicality.{name}"] = torch.from_numpy(np.asarray(getattr(typicality, name), dtype=kind))
    tensors["calibration"] = torch.from_numpy(np.asarray(calibration, dtype=np.float64))
    digest = stored(folder / "detector.safetensors", tensors)[1]
    sheet = {"format": 1, "settings": dataclasses.asdict(settings), **facts, "sha256": digest}
    write_json(folder / "detector.json", sheet)


def read_detector(folder: Path) -> tuple[Settings, dict[str, torch.Tensor], dict[str, object]]:
    """Settings, tensors and the JSON sheet of a saved detector that may be damaged or hostile: bounds and hashes are
    checked before any tensor is made. Raises DetectorError for what Detector.save did not write."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    weights, sheet_path = folder / "detector.safetensors", folder / "detector.json"
    for path in (sheet_path, weights):
        if not path.is_file():
            raise DetectorError(f"{path} is missing; {HINT}")
        if path.stat().st_size > MAX_BYTES:
            raise DetectorError(f"{path} has {path.stat().st_size:,} bytes, more than {MAX_BYTES:,}; {HINT}")
    try:
        sheet = json.loads(sheet_path.read_text(encoding="utf-8"))
        digest = sheet["sha256"]
        if sheet["format"] != 1:
            raise DetectorError(f"{sheet_path}: format {sheet['format']} is newer than this program; update it")
        settings = _settings(sheet["settings"])
    except DetectorError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = f"{type(error).__name__}: {str(error)[:200]}"
        raise DetectorError(f"{sheet_path} is not a detector's sheet ({why}); {HINT}") from None
    if file_digest(weights) != digest:
        raise DetectorError(f"{weights} is damaged or was changed: its SHA-256 is not the one in {sheet_path.name}; "
                            "copy it again")
    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise DetectorError(f"{weights} cannot be read ({str(error)[:200]}); {HINT}") from None
    for name, value in tensors.items():
        if math.prod(value.shape) * value.element_size() > MAX_BYTES or not torch.isfinite(value.float()).all():
            raise DetectorError(f"{weights}: tensor {name!r} is oversized or not finite; copy the detector again")
    return settings, tensors, sheet


def _settings(stated: dict[str, object]) -> Settings:
    """The settings of a sheet, which may lack newer options and have older ones. Raises as `with_options` does."""
    default = Settings()
    flat = {name: stated[name] for name in ("preset", "seed")} | {"recipe": stated.get("recipe", default.recipe)}
    for section in (name for name, value in vars(default).items() if dataclasses.is_dataclass(value)):
        flat |= {OLD_NAMES.get(f"{section}.{key}", f"{section}.{key}"): value for key, value in stated[section].items()}
    if flat["network.teacher"] == "imagenet":  # of before there was another
        flat["network.teacher"] = "lite0"
    return default.with_options({name: value for name, value in flat.items() if name in default.options()})


def restored(folder: Path, settings: Settings, tensors: dict[str, torch.Tensor],
             sheet: dict[str, object]) -> dict[str, object]:
    """Teacher, student, scaling, typicality, calibration and evidence of a saved detector, by name, from what
    `read_detector` gave. Raises DetectorError."""

    def part(name: str) -> dict[str, torch.Tensor]:
        return {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(name + ".")}

    try:
        teacher = new_teacher(settings, pretrained=False)
        student = new_student(teacher, settings)
        if settings.network.standardise:
            readers = [tensors[name] for name in sorted(tensors) if name.startswith("teacher.reader")]
            teacher = Standardised(teacher, readers)
        for network, name in ((teacher, "teacher"), (student, "student")):
            network.load_state_dict(part(name))
            freeze(network)
        typicality = Typicality(**{name: value.numpy() for name, value in part("typicality").items()})
        evidence = Evidence.restored(part("evidence"), sheet["evidence"]) if "evidence" in sheet else None
        return {"teacher": teacher, "student": student, "evidence": evidence,
                "scaling": Scaling.from_tensors(part("scaling")),
                "typicality": typicality, "calibration": tensors["calibration"].numpy()}
    except (KeyError, RuntimeError, TypeError, ValueError, IndexError, ArithmeticError) as error:
        raise DetectorError(f"{folder}: the weights do not fit the settings beside them ({str(error)[:200]}); "
                            "expected files written by Detector.save") from None


def colour_scale(folder: Path, sheet: dict[str, object], kind: str) -> tuple[float, float] | None:
    """The colour limits of maps of `kind` that a sheet keeps; None where it keeps none. Raises DetectorError."""
    if "map" not in sheet:
        return None
    try:
        low, high = (float(value) for value in sheet["map"]["limits"])
        if sheet["map"]["kind"] == kind and -1e6 < low <= high < 1e6:
            return low, high
    except (KeyError, TypeError, ValueError):
        pass
    raise DetectorError(f"{folder}: the colour scale {str(sheet['map'])[:100]} does not fit a map of kind {kind}; "
                        "calibrate again")
