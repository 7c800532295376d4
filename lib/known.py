"""Owns what a detector keeps of known generators: the anomalies of their test clips, to set a recording beside."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.detector import DetectorError
from lib.paths import file_digest, write_json
from lib.verdicts import shown

NAME, MAX_BYTES = "known.json", 2_000_000
KINDS = {"bonafide": "real speech, voices never heard", "copysynth": "copy by a vocoder", "tts": "text to speech",
         "control": "real speech after a round trip"}


@dataclass(frozen=True)
class Known:
    """Test clips of one generator, or real ones, as the detector judged them."""

    name: str
    kind: str  # of KINDS
    anomalies: np.ndarray  # (clip,) sorted; up = fake

    @property
    def quantiles(self) -> np.ndarray:
        """5, 25, 50, 75 and 95 % of the anomalies, (5,)."""
        return np.quantile(self.anomalies, [0.05, 0.25, 0.5, 0.75, 0.95])

    def above(self, anomaly: float) -> float:
        """Share of the clips at least as anomalous."""
        return float(np.mean(self.anomalies >= anomaly))


def write_known(folder: Path | str, clips: Iterable[tuple[str, str, float]]) -> Path:
    """Keep `(kind, generator, anomaly)` of test clips beside the detector in `folder`."""
    groups: dict[tuple[str, str], list[float]] = {}
    for kind, name, anomaly in clips:
        groups.setdefault((kind, name if kind != "bonafide" else "real speech"), []).append(round(float(anomaly), 5))
    order = sorted(groups, key=lambda pair: (list(KINDS).index(pair[0]), pair[1]))
    path = Path(folder) / NAME
    write_json(path, {"format": 1, "sha256": file_digest(Path(folder) / "detector.safetensors"), "groups": [
        {"name": name, "kind": kind, "anomalies": sorted(groups[kind, name])} for kind, name in order]})
    return path


def read_known(folder: Path | str) -> list[Known]:
    """What `write_known` kept; empty where nothing was kept, as after a calibration, which moves all anomalies.

    Raises DetectorError where the file is damaged or belongs to another detector.
    """
    path = Path(folder) / NAME
    if not path.exists():
        return []
    mend = f"delete it, or copy it again with the detector: {shown(path)}"
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes")
        sheet = json.loads(path.read_text(encoding="utf-8"))
        found = [Known(str(group["name"]), str(group["kind"]), np.sort(np.asarray(group["anomalies"], dtype=np.float64)))
                 for group in sheet["groups"]]
        if sheet["format"] != 1 or any(one.kind not in KINDS or one.anomalies.ndim != 1 or not len(one.anomalies)
                                       or not np.isfinite(one.anomalies).all() for one in found):
            raise ValueError("other contents")
        digest = sheet["sha256"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DetectorError(f"expected anomalies of known generators, found {type(error).__name__}: {error}; {mend}") from None
    if digest != file_digest(Path(folder) / "detector.safetensors"):
        raise DetectorError(f"the anomalies of known generators belong to another detector; {mend}")
    return found
