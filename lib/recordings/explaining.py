"""Owns what is shown of one recording (notebook 90): its map and spectrogram, where it is unusual, and what is known of
other clips' anomalies under the same detector."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from lib.data.channel import Passage, pass_channel
from lib.detector import Detector
from lib.model.checkpoints import DetectorError
from lib.model.discrepancy import Explanation
from lib.model.evidence import WEIGHTS
from lib.model.images import image
from lib.paths import atomic, file_digest, shown, write_json
from lib.settings import RATE_HZ, View

if TYPE_CHECKING:
    import pandas as pd

    from lib.recordings.judging import Part, Piece, Recording

SCHEMA = 2
EVIDENCE = tuple(WEIGHTS)  # every kind of evidence, in the order of tables
BANDS = 6  # frequency bands in which a map is told
EDGE_S = 0.12  # at both ends of a map the networks see padding
PAUSE_DB = 35.0  # pieces this far below the loudest one are pauses
LEVEL_LIMITS = (-80.0, -20.0)  # dB: every spectrogram's colours; the shared channel brings all speech to one level
MOST_REGIONS, LEAST_PLACES = 5, 40
USUAL = {"read": "0 is usual for real speech", "signed": "1 is usual for real speech"}
KINDS = {"bonafide": "real speech, voices never heard", "copysynth": "copy by a vocoder", "tts": "text to speech",
         "control": "real speech after a round trip"}
KNOWN, MOST_BYTES = "known.json", 2_000_000


@dataclass(frozen=True)
class Region:
    """Connected places of a map above what real calibration speech exceeds in 0.1 % of places."""

    start_s: float
    seconds: float
    low_hz: float
    high_hz: float
    strength: float  # mean of the map there


@dataclass(frozen=True)
class Stretch:
    """A stretch of a recording with all that is drawn of it."""

    audio: np.ndarray  # (samples,) as read, from `audio_s` on
    audio_s: float
    level_db: np.ndarray  # (frequency, frame) after the shared channel
    explanation: Explanation
    kind: str  # of the map, of lib.model.scaling.SCALINGS
    limits: tuple[float, float]  # colour scale of the map

    @property
    def start_s(self) -> float:
        return self.explanation.start_s

    @property
    def stop_s(self) -> float:
        return self.start_s + self.explanation.map.shape[1] * self.explanation.hop_s

    @property
    def map(self) -> np.ndarray:
        """(frequency, frame), NaN in frames that mean nothing."""
        return meaningful(self.explanation)


def meaningful(explanation: Explanation) -> np.ndarray:
    """The map (frequency, frame), NaN in pauses and at both ends."""
    end, mask = round(EDGE_S / explanation.hop_s), explanation.active.copy()
    mask[:end] = mask[max(0, len(mask) - end) :] = False
    return np.where(mask, explanation.map, np.nan)


def decibels(level: np.ndarray, view: View) -> np.ndarray:
    """The image plane `level` (lib.model.images) as dB of a sine of full scale, for the view's long window."""
    samples = view.window_s * RATE_HZ
    # A full-scale sine has magnitude n / 4 in a Hann window of n samples; the image divides by the root of n.
    return (level * 1.8 - 5.5) * 20 / np.log(10) + 10 * np.log10(samples) - 20 * np.log10(samples / 4)


def explained(detector: Detector, audio: np.ndarray, audio_s: float = 0.0, passage: Passage | None = None) -> Stretch:
    """Map and spectrogram of samples (samples,) at 16 kHz, read from `audio_s` of a recording on; of a minute at most.

    Raises ValueError where they are silent, DetectorError for a detector that keeps no colour scale.
    """
    settings = detector.settings
    passage = passage or pass_channel(audio, settings.channel)
    view = dataclasses.replace(settings.view, planes=("level",))
    level = image(torch.from_numpy(passage.audio)[None], view, settings.channel)[0, 0].numpy()
    explanation = detector.explain_prepared(passage.audio, passage.active, audio_s + passage.start / RATE_HZ)
    return Stretch(audio, audio_s, decibels(level, view), explanation, detector.map_kind, detector.map_limits)


class Collected:
    """Keeps of the pieces of a long recording that `judged` visits the band means, and the most anomalous one whole."""

    def __init__(self) -> None:
        self.bands: list[tuple[float, float, np.ndarray]] = []  # start_s, seconds, means (BANDS,) of the map
        self.loudest_db = -math.inf
        self.most: tuple[Part, Piece] | None = None

    def __call__(self, part: Part, piece: Piece) -> None:
        rows = np.array_split(piece.explanation.map[:, piece.explanation.active], BANDS)
        self.bands.append((part.start_s, part.seconds, np.array([row.mean() for row in rows])))
        self.loudest_db = max(self.loudest_db, part.level_db)
        if self.most and self.most[0].level_db <= self.loudest_db - PAUSE_DB:
            self.most = None  # it was a pause
        loud = part.level_db > self.loudest_db - PAUSE_DB
        if loud and (not self.most or part.anomaly > self.most[0].anomaly):
            self.most = part, piece


# --- where and why ----------------------------------------------------------------------------------------------------


def regions(explanation: Explanation, limit: float) -> tuple[Region, ...]:
    """The regions of a map above `limit`, at most MOST_REGIONS, those with most of it first; specks are left out."""
    from scipy import ndimage

    drawn = meaningful(explanation)
    labels, _ = ndimage.label(drawn > limit)
    weighed = []
    for label, (rows, frames) in enumerate(ndimage.find_objects(labels), 1):
        inside = drawn[rows, frames][labels[rows, frames] == label]
        if len(inside) >= LEAST_PLACES:
            hertz, hop_s = explanation.row_hz[rows], explanation.hop_s
            start_s, seconds = explanation.start_s + frames.start * hop_s, (frames.stop - frames.start) * hop_s
            region = Region(start_s, seconds, float(hertz[0]), float(hertz[-1]), float(inside.mean()))
            weighed.append((float((inside - limit).sum()), region))
    return tuple(region for _, region in sorted(weighed, key=lambda pair: -pair[0])[:MOST_REGIONS])


def spoken(recording: Recording, alpha: float) -> str:
    """Which evidence speaks against a recording: all with a p-value of at most alpha, else the strongest."""
    ranked = sorted(recording.evidence, key=lambda name: recording.evidence[name].p_value)
    names = [name for name in ranked if recording.evidence[name].p_value <= alpha] or ranked[:1]
    texts = {"lines": recording.lines.sentence() if recording.lines else "", "texture": "too smooth above 4 kHz",
             "sameness": "its texture varies too little", "pyramid": "damage",
             "steady": "its fine structure varies too little over time"}
    if recording.regions:
        place = recording.regions[0]
        texts["pyramid"] = (f"damage at {place.start_s:.1f}-{place.start_s + place.seconds:.1f} s, "
                            f"{place.low_hz / 1000:.1f}-{place.high_hz / 1000:.1f} kHz")
    return "; ".join(texts[name] for name in names)


def where(stretch: Stretch) -> list[str]:
    """In words: how much of the map is unusual, and in which seconds and kilohertz."""
    drawn, (low, high) = stretch.map, stretch.limits
    if np.isnan(drawn).all():
        return ["The speech is too short for a map."]
    share, usual = np.mean(drawn[~np.isnan(drawn)] > high), USUAL.get(stretch.kind, "more is more anomalous")
    words = [f"{share:.1%} of the map is above {high:.2f}, which real calibration speech exceeds in 0.1 % of places "
             f"({usual})."]
    for region in regions(stretch.explanation, high):
        band = f"{region.low_hz / 1000:.1f} to {region.high_hz / 1000:.1f} kHz"
        words.append(f"Unusual from {clock(region.start_s, 1)} on for {region.seconds:.1f} s, {band}: "
                     f"{region.strength:.2f} on average.")
    row, frame = np.unravel_index(np.nanargmax(drawn), drawn.shape)
    at_s, at_khz = stretch.start_s + frame * stretch.explanation.hop_s, stretch.explanation.row_hz[row] / 1000
    words.append(f"Highest: {drawn[row, frame]:.2f} at {clock(at_s, 1)}, {at_khz:.1f} kHz; the median of real "
                 f"calibration speech is {low:.2f}.")
    return words


def band_names(explanation: Explanation) -> list[str]:
    """The bands of a map in words."""
    edges = np.linspace(*explanation.row_hz[[0, -1]] / 1000, BANDS + 1)
    return [f"{low:.1f} to {high:.1f} kHz" for low, high in zip(edges, edges[1:])]


def map_rows(stretch: Stretch) -> pd.DataFrame:
    """Means of the map in BANDS bands, a row for every half second that means something."""
    import pandas as pd

    drawn, step = stretch.map, round(0.5 / stretch.explanation.hop_s)
    rows = {}
    for first in range(0, drawn.shape[1], step):
        cells = drawn[:, first : first + step]
        if not np.isnan(cells).all():
            start_s = round(stretch.start_s + first * stretch.explanation.hop_s, 1)
            rows[start_s] = [np.nanmean(band) for band in np.array_split(cells, BANDS)]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=band_names(stretch.explanation))
    return table.rename_axis("from (s)").reset_index()


def clock(seconds: float, digits: int = 0) -> str:
    """`3.2 s` or `12:05`."""
    return f"{seconds:.{digits}f} s" if seconds < 60 else f"{int(seconds // 60)}:{int(seconds % 60):02d}"


# --- results of many recordings ---------------------------------------------------------------------------------------


def as_json(recordings: list[Recording], names: dict[str, object], alpha: float,
            left_out: Iterable[tuple[str, str]] = (), complete: bool = True) -> dict[str, object]:
    """What `score --json` writes (README): every field of `Recording`; `schema` changes when one changes its name or
    meaning. `left_out` are files with the reason; `complete` is false where Ctrl-C came first."""
    return {"schema": SCHEMA, "complete": complete, "alpha": alpha, "detector": names,
            "files": [dataclasses.asdict(recording) for recording in recordings],
            "left_out": [{"path": shown(path), "reason": reason} for path, reason in left_out]}


def as_table(recordings: list[Recording]) -> pd.DataFrame:
    """A row a recording: its numbers and words, each evidence by its kind, warnings joined; no parts."""
    import pandas as pd

    rows = []
    for recording in recordings:
        row = {name: value for name, value in vars(recording).items() if not isinstance(value, tuple | dict)}
        for kind in EVIDENCE:
            evidence = recording.evidence.get(kind)
            row |= {f"{kind}_anomaly": evidence and evidence.anomaly, f"{kind}_p_value": evidence and evidence.p_value}
        rows.append(row | {"warnings": "; ".join(recording.warnings)})
    return pd.DataFrame(rows)


def write_csv(table: pd.DataFrame, path: Path | str) -> None:
    """Write a table of `as_table`. A cell that begins like a formula, which a spreadsheet would run, gets a quote."""
    with atomic(path) as temporary:
        table.replace(r"^(?=[=+\-@\t\r])", "'", regex=True).to_csv(temporary, index=False)


# --- clips of known origin --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """Test clips of one generator, or real ones, as the detector judged them."""

    name: str
    kind: str  # of KINDS
    anomalies: np.ndarray  # (clip,) sorted; up = fake


def write_known(folder: Path | str, clips: Iterable[tuple[str, str, float]]) -> Path:
    """Keep `(kind, generator, anomaly)` of test clips beside the detector in `folder`."""
    groups: dict[tuple[str, str], list[float]] = {}
    for kind, name, anomaly in clips:
        pair = kind, name if kind != "bonafide" else "real speech"
        groups.setdefault(pair, []).append(round(float(anomaly), 5))
    order = sorted(groups, key=lambda pair: (list(KINDS).index(pair[0]), pair[1]))
    rows = [{"name": name, "kind": kind, "anomalies": sorted(groups[kind, name])} for kind, name in order]
    digest = file_digest(Path(folder) / "detector.safetensors")
    write_json(Path(folder) / KNOWN, {"format": 1, "sha256": digest, "groups": rows})
    return Path(folder) / KNOWN


def read_known(folder: Path | str) -> list[Known]:
    """What `write_known` kept; empty where nothing was kept, as after a calibration, which moves all anomalies.

    Raises DetectorError where the file is damaged or belongs to another detector.
    """
    path = Path(folder) / KNOWN
    if not path.exists():
        return []
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes")
        sheet = json.loads(path.read_text(encoding="utf-8"))
        groups = [Known(str(group["name"]), str(group["kind"]), np.sort(np.asarray(group["anomalies"], np.float64)))
                  for group in sheet["groups"]]
        sound = [group.kind in KINDS and group.anomalies.ndim == 1 and len(group.anomalies)
                 and np.isfinite(group.anomalies).all() for group in groups]
        if sheet["format"] != 1 or not all(sound):
            raise ValueError("other contents")
        if sheet["sha256"] != file_digest(Path(folder) / "detector.safetensors"):
            raise ValueError("those of another detector")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DetectorError(f"{shown(path)}: expected anomalies of known generators, found {type(error).__name__}: "
                            f"{error}; delete it, or copy it again with the detector") from None
    return groups
