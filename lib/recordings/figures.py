"""Owns the figures on a user's recording. Colours mean the same in every one: the spectrogram is drawn from -80 to -20 dB
after the shared channel, which brings all speech to one level, and the anomaly map on the scale that the detector keeps of
real calibration speech, from the median of its maps to what 0.1 % of them exceed."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib.model.checkpoints import DetectorError
from lib.model.maps import Explanation
from lib.paths import file_digest, shown, write_json
from lib.recordings.verdicts import Recording
from lib.report.exhibits import LEVEL_COLOURS, MAP_COLOURS
from lib.settings import RATE_HZ, View

LEVEL_LIMITS = (-80.0, -20.0)
MAP_UNITS = {"read": "0 = usual for real speech", "signed": "1 = usual for real speech",
             "none": "discrepancy"}
"""What is usual in a kind of map (lib.model.scaling.SCALINGS); those of the other kinds are standardised, as read is."""
EDGE_S = 0.12
PAUSE_COLOUR, LINE_COLOUR, BAR_COLOUR = "#d9d9d9", "#c1272d", "#8fb3c9"
REAL_COLOUR, FAKE_COLOUR = "#0a5a86", "#c98a1b"


@dataclass(frozen=True)
class Stretch:
    """A stretch of a recording with all that is drawn of it."""

    audio: np.ndarray  # as read, from `audio_s` on
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
    def mapped(self) -> np.ndarray:
        """Which frames of the map mean something, (frame,) bool: no pauses, and no ends, where the networks see padding."""
        end = round(EDGE_S / self.explanation.hop_s)
        mask = self.explanation.active.copy()
        mask[:end] = mask[max(0, len(mask) - end) :] = False
        return mask

    @property
    def map(self) -> np.ndarray:
        """(frequency, frame), NaN in frames that mean nothing."""
        return np.where(self.mapped, self.explanation.map, np.nan)


def decibels(level: np.ndarray, view: View) -> np.ndarray:
    """The image channel `level` (lib.model.images) as dB of a sine of full scale, for the view's long window."""
    samples = view.window_s * RATE_HZ
    # A full-scale sine has magnitude n / 4 in a Hann window of n samples; the image divides by the root of n.
    return (level * 1.8 - 5.5) * 20 / np.log(10) + 10 * np.log10(samples) - 20 * np.log10(samples / 4)


def map_unit(kind: str) -> str:
    """What is usual in a map of this kind."""
    return MAP_UNITS.get(kind, MAP_UNITS["read"])


def maps(stretch: Stretch) -> str:
    """Spectrogram and anomaly map over time, as a data address."""
    figure = Figure((10, 5.6), dpi=110, layout="constrained")
    low, high = stretch.explanation.row_hz[[0, -1]] / 1000
    for axis, drawn, limits, colours, label in zip(
            figure.subplots(2, 1, sharex=True), (stretch.level_db, stretch.map), (LEVEL_LIMITS, stretch.limits),
            (LEVEL_COLOURS, MAP_COLOURS), ("level (dB)", f"anomaly map\n({map_unit(stretch.kind)})")):
        artist = axis.imshow(drawn, origin="lower", aspect="auto", interpolation="nearest", cmap=colours, vmin=limits[0],
                             vmax=limits[1], extent=(stretch.start_s, stretch.stop_s, low, high))
        axis.set(ylabel="frequency (kHz)", facecolor=PAUSE_COLOUR)
        figure.colorbar(artist, ax=axis, label=label, extend="both", pad=0.01)
    axis.set_xlabel("time in the recording (s); grey: pauses and ends, where the map means nothing")
    return _png(figure)


def timeline(recording: Recording, bands: list[tuple[float, float, np.ndarray]], calibration: np.ndarray, alpha: float,
             stretch: Stretch) -> str:
    """Anomaly and band means of every piece over a whole recording; `bands` are (start_s, seconds, means); `stretch` is a part
    of it, with the kind of map and its scale."""
    means = {round(start, 3): values for start, _, values in bands}
    edges_s = sorted({round(edge, 3) for start, seconds, _ in bands for edge in (start, start + seconds)})
    unit, name = (60, "minutes") if recording.seconds > 180 else (1, "s")
    edges = np.array(edges_s) / unit
    figure = Figure((10, 4.4), dpi=110, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    anomaly = {round(part.start_s, 3): part.anomaly for part in recording.parts}
    above.stairs([anomaly.get(start, np.nan) for start in edges_s[:-1]], edges, baseline=None, color="#0a5a86")
    if 1 / (len(calibration) + 1) <= alpha:
        above.axhline(threshold(calibration, alpha), color=LINE_COLOUR, linestyle="--", linewidth=1)
    above.set(ylabel="anomaly (up = fake)", xlim=(0, recording.seconds / unit), ylim=(0, None))
    drawn = np.array([means[start] if start in anomaly else bands[0][2] * np.nan for start in edges_s[:-1]]).T
    hertz = np.linspace(*stretch.explanation.row_hz[[0, -1]] / 1000, len(drawn) + 1)
    drawn = below.pcolormesh(edges, hertz, drawn, vmin=stretch.limits[0], vmax=stretch.limits[1], cmap=MAP_COLOURS)
    below.set(xlabel=f"time in the recording ({name})", ylabel="frequency (kHz)", facecolor=PAUSE_COLOUR)
    figure.colorbar(drawn, ax=[above, below], label=f"band mean of the map ({map_unit(stretch.kind)})", extend="both", pad=0.01)
    return _png(figure)


def threshold(calibration: np.ndarray, alpha: float) -> float:
    """Anomalies above this have p-values of at most alpha."""
    allowed = int(alpha * (len(calibration) + 1) + 1e-9) - 1
    return float(calibration[max(0, len(calibration) - 1 - allowed)])


def histogram_edges(calibration: np.ndarray, anomaly: float) -> np.ndarray:
    """Edges of the bins of `histogram`; the last bin holds everything above it."""
    highest = max(1.1 * anomaly, 1.2 * float(np.quantile(calibration, 0.98)))
    return np.linspace(0.95 * min(calibration[0], anomaly), highest, 41)


def histogram(calibration: np.ndarray, anomaly: float) -> str:
    """Anomalies of real calibration speech and that of one recording."""
    edges = histogram_edges(calibration, anomaly)
    figure = Figure((10, 2.6), dpi=110, layout="constrained")
    axis = figure.subplots()
    axis.hist(np.minimum(calibration, edges[-1]), bins=edges, color=BAR_COLOUR, label="real calibration speech")
    axis.axvline(anomaly, color=LINE_COLOUR, linewidth=2, label="this recording")
    axis.set(xlabel="anomaly (up = fake)", ylabel="calibration clips")
    axis.legend(loc="upper right")
    return _png(figure)


def draw_known(axis: Axes, known: list[Known]) -> None:
    """Anomalies of the test clips of known generators: 5 to 95 %, the middle half, the median."""
    for row, one in enumerate(known):
        low, lower, middle, upper, high = one.quantiles
        colour = REAL_COLOUR if one.kind in ("bonafide", "control") else FAKE_COLOUR
        axis.plot([low, high], [row, row], color=colour, linewidth=1)
        axis.plot([lower, upper], [row, row], color=colour, linewidth=5, solid_capstyle="butt")
        axis.plot(middle, row, "o", color="white", markeredgecolor=colour, markersize=5)
    axis.plot([], [], color=REAL_COLOUR, linewidth=5, label="real speech")
    axis.plot([], [], color=FAKE_COLOUR, linewidth=5, label="fakes")
    axis.set_yticks(range(len(known)), [one.name for one in known])
    axis.set(xlabel="anomaly (up = fake); thin: 5 to 95 %, thick: middle half, ring: median", ylim=(len(known) - 0.4, -0.6))


def beside_known(known: list[Known], anomaly: float) -> str:
    """The anomaly of one recording among those of known generators."""
    figure = Figure((10, 1.1 + 0.26 * len(known)), dpi=110, layout="constrained")
    axis = figure.subplots()
    axis.axvline(anomaly, color=LINE_COLOUR, linewidth=2, label="this recording")
    draw_known(axis, known)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return _png(figure)


def _png(figure: Figure) -> str:
    figure.savefig(buffer := io.BytesIO(), format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


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
