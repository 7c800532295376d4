"""Owns the reading of detectors that may be damaged or hostile: bounds and hashes are checked before any tensor is made."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import torch

from lib.paths import atomic, file_digest
from lib.settings import Channel, Data, Network, Run, Scoring, Settings, Training, View

MAX_BYTES = 400_000_000
"""Above any detector of this study (a few MB, with a self-supervised teacher 300), far below what would fill a machine."""


def read_detector(folder: Path) -> tuple[Settings, dict[str, torch.Tensor], dict[str, object]]:
    """Settings, tensors and the JSON sheet of a saved detector.

    Raises lib.detector.DetectorError, saying what is wrong, for anything that Detector.save did not write.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    

    weights, sheet_path = folder / "detector.safetensors", folder / "detector.json"
    hint = "expected a folder written by Detector.save, with detector.json and detector.safetensors"
    for path in (sheet_path, weights):
        if not path.is_file():
            raise DetectorError(f"{path} is missing; {hint}")
        if path.stat().st_size > MAX_BYTES:
            raise DetectorError(f"{path} has {path.stat().st_size:,} bytes, more than {MAX_BYTES:,}; {hint}")
    try:
        sheet = json.loads(sheet_path.read_text(encoding="utf-8"))
        stated, digest = sheet["settings"], sheet["sha256"]
        if sheet["format"] != 1:
            raise DetectorError(f"{sheet_path}: format {sheet['format']} is newer than this program; update it")
        stated["network"].setdefault("stem", 7)  # sheets from before the option
        values = {name: stated[name] for name in ("preset", "seed")}
        flat = {f"{section}.{key}": value for section, kind in SECTIONS.items() for key, value in stated[section].items()
                if key in {field.name for field in dataclasses.fields(kind)}}
        settings = Settings().with_options({**values, **flat})
        network = settings.network
        sizes = (network.teacher_width, network.student_width, network.levels, settings.view.bins, network.stem)
        if not all(0 < size <= limit for size, limit in zip(sizes, (128, 128, 4, 4096, 15))):
            raise DetectorError(f"{sheet_path}: sizes {sizes} are out of bounds; {hint}")
    except DetectorError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DetectorError(f"{sheet_path} is not a detector's sheet ({type(error).__name__}: {str(error)[:200]}); {hint}") from None
    if file_digest(weights) != digest:
        raise DetectorError(f"{weights} is damaged or was changed: its SHA-256 is not the one in {sheet_path.name}; copy it again")
    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise DetectorError(f"{weights} cannot be read ({str(error)[:200]}); {hint}") from None
    for name, value in tensors.items():
        if math.prod(value.shape) * value.element_size() > MAX_BYTES or not torch.isfinite(value.float()).all():
            raise DetectorError(f"{weights}: tensor {name!r} is oversized or not finite; copy the detector again")
    return settings, tensors, sheet


class DetectorError(RuntimeError):
    """A detector cannot be loaded or used; the message says what was expected and what to do."""


SECTIONS = {"data": Data, "channel": Channel, "view": View, "network": Network, "training": Training, "scoring": Scoring, "run": Run}


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged or of another experiment; the message says what to do."""


def _stored(path: Path, tensors: dict[str, torch.Tensor]) -> list[str]:
    """Write tensors atomically; their file name and SHA-256."""
    from safetensors.torch import save_file

    with atomic(path) as temporary:
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, temporary)
    return [path.name, file_digest(path)]


def _sound(folder: Path, file: list[str]) -> Path:
    """The file if its bytes are the recorded ones; else CheckpointError (one flipped byte loads silently otherwise)."""
    path = folder / file[0]
    if not path.exists() or file_digest(path) != file[1]:
        raise CheckpointError(f"{path} is missing or damaged (its SHA-256 differs from checkpoint.json): remove {folder} and "
                              "train again")
    return path
