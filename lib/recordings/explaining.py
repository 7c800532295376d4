"""Owns the pages on a user's recordings: one recording with its player, its maps and what they mean; a table of many.

Memory is bounded on long recordings: of each piece a few numbers are kept, and everything only of the most anomalous one.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch

from lib.data.audio import read_audio
from lib.data.channel import Passage, pass_channel
from lib.detector import Detector
from lib.model.images import image
from lib.recordings.figures import KINDS, Known, Stretch, beside_known, decibels, histogram, histogram_edges, maps, timeline
from lib.recordings.judging import Piece, judged
from lib.recordings.verdicts import FAKE, PAUSE_DB, REAL, Limits, Part, Recording
from lib.report import html
from lib.settings import RATE_HZ

WHOLE_S, BANDS = 30.0, 6
"""Up to this length a page shows and plays the whole recording; beyond it a timeline and the most anomalous piece."""
CANNOT = (
    "Whether the words are true, who speaks, or whether the recording was cut or taken out of context.",
    "How a fake was made: anomalous means unlike the calibration speech, no more.",
    "Speech unlike the calibration speech (another language, singing, a child, an unusual microphone, room or codec) can be "
    "anomalous and yet real; a fake whose traces the networks do not see is consistent with real speech.",
    "The p-value holds where the recording is of the same sort as the calibration speech: for your own source, calibrate on it.",
    "The map says where the networks disagree in an unusual way. It is a hint where to listen, not a proof.",
)

MEANINGS = {
    "read": ("0 is usual for real speech",
             "how much damage there is at each time and frequency in what the student network failed to predict: the teacher learnt to "
             "name kinds of damage, and its readings, averaged over 0.4 s, are told in deviations of real speech, where 0 is usual. The "
             "anomaly is computed from the same error, averaged over whole bands."),
    "signed": ("1 is usual for real speech",
               "how far the student network's error is from its usual one at each time and frequency, in deviations of real speech, "
               "where 1 is usual. The anomaly is computed from the same error."),
}
OTHER_MAP = ("larger is more anomalous", "how far the student network is from the teacher at each time and frequency.")
"""Of each kind of map (lib.model.scaling.SCALINGS): what is usual, and what it shows."""


class Collected:
    """Keeps of each visited piece its band means, and the samples of the most anomalous one."""

    def __init__(self, detector: Detector) -> None:
        self.detector, self.bands, self.loudest_db = detector, [], -math.inf
        self.most: tuple[Part, Piece] | None = None

    def __call__(self, part: Part, piece: Piece) -> None:
        kind = self.detector.map_kind
        maps = [self.detector.scaling.apply(index, parts, kind) for index, (parts, _) in enumerate(piece.levels)]
        profile = self.detector.profile(maps, [mask for _, mask in piece.levels]).numpy()
        self.bands.append((part.start_s, part.seconds, profile.reshape(len(maps), -1).mean(0)))
        self.loudest_db = max(self.loudest_db, part.level_db)
        if self.most and self.most[0].level_db <= self.loudest_db - PAUSE_DB:
            self.most = None  # it was a pause
        if part.level_db > self.loudest_db - PAUSE_DB and (not self.most or part.anomaly > self.most[0].anomaly):
            self.most = part, piece


def explained(detector: Detector, audio: np.ndarray, audio_s: float, passage: Passage) -> Stretch:
    """The map and spectrogram of samples (as read, from `audio_s` of the recording on) and their passage."""
    settings = detector.settings
    view = dataclasses.replace(settings.view, channels=("level",))
    level = image(torch.from_numpy(passage.audio)[None], view, settings.channel)[0, 0].numpy()
    begins_s = audio_s + passage.start / RATE_HZ
    return Stretch(audio, audio_s, decibels(level, view),
                   detector.explain_prepared(passage.audio, passage.active, begins_s), detector.map_kind, detector.map_limits)


def heard(detector: Detector, path: Path | str, channel: int | None = None) -> Stretch:
    """A whole recording with its map and spectrogram; for recordings of up to about a minute."""
    audio = read_audio(path, RATE_HZ, channel=channel)[0]
    return explained(detector, audio, 0.0, pass_channel(audio, detector.settings.channel))


def write_report(detector: Detector, path: Path | str, target: Path | str, limits: Limits | None = None, alpha: float = 0.05,
                 names: dict[str, object] | None = None, channel: int | None = None,
                 known: Iterable[Known] = ()) -> Recording:
    """Judge the recording at `path` and write its page, which needs no network; returns what was found.

    `known` are the anomalies of known generators (lib.recordings.known) under the same detector.
    """
    found = Collected(detector)
    recording = judged(detector, path, limits, alpha, found, channel)
    sections, player = [], None
    if recording.parts:
        whole = recording.seconds <= WHOLE_S
        stretch = heard(detector, path, channel) if whole else explained(
            detector, found.most[1].audio, found.most[1].start_s, found.most[1].passage)
        end_s = stretch.audio_s + len(stretch.audio) / RATE_HZ
        player = _sound(stretch.audio), (f"The recording at {RATE_HZ // 1000} kHz" if whole else
                                         f"The most anomalous piece, {clock(stretch.audio_s)} to {clock(end_s)}")
        sections = _sections(detector, recording, stretch, [] if whole else found.bands, alpha, list(known))
    unit = {"seconds": "s", "speech_s": "s", "bandwidth_hz": "Hz", "crest_db": "dB", "range_db": "dB"}
    label = {"seconds": "length", "speech_s": "active speech", "bandwidth_hz": "effective bandwidth",
             "crest_db": "peak above mean level", "range_db": "loud above quiet frames", "anomaly": "anomaly (up = fake)",
             "p_value": "p-value"}
    values = {text: (getattr(recording, name), unit.get(name, "")) for name, text in label.items()}
    facts = [("file", recording.path)]
    facts += [(text, f"{value:.4g} {of}") for text, (value, of) in values.items() if value is not None]
    facts += [("note", text) for text in recording.warnings]
    html._write_page(target, "recording.html.j2", kind="recording", title=Path(recording.path).name, provenance=names or {},
                     verdict=recording.words, meaning=_meaning(recording, len(detector.calibration)), player=player,
                     sections=sections, facts=facts, limits=CANNOT)
    return recording


def write_table(recordings: Iterable[Recording], target: Path | str, summary: str, names: dict[str, object]) -> None:
    """A page with one row a recording."""
    number = lambda value, digits: "" if value is None else f"{value:.{digits}f}"  # noqa: E731
    html._write_page(target, "recording.html.j2", kind="recordings", title="Recordings", provenance=names, summary=summary,
                     recordings=list(recordings), number=number)


def _meaning(recording: Recording, count: int) -> str:
    if recording.p_value is None:
        return "The recording was not scored."
    percent = f"{100 * recording.p_value:.{int(recording.p_value < 0.1)}f} %"
    compared = f"{percent} of real speech is at least as anomalous, judged by {count} recordings of real calibration speech"
    return {REAL: f"About {compared}. This does not prove that it is real.",
            FAKE: f"Only about {compared}. This does not prove that it is fake."}.get(
                recording.verdict, f"For what it is worth: about {compared}.")


@dataclass(frozen=True)
class Section:
    """A section of the page: a figure with its alt text, and what it draws as a table under a fold."""

    heading: str
    paragraphs: list[str]
    image: str  # a data address
    alt: str
    columns: tuple[str, ...]
    rows: list[tuple]


def _sections(detector: Detector, recording: Recording, stretch: Stretch, bands: list[tuple[float, float, np.ndarray]],
              alpha: float, known: list[Known]) -> list[Section]:
    """The sections of the page; `bands` is empty where no timeline is wanted."""
    calibration, sections, heading = detector.calibration, [], "What the detector hears"
    names = band_names(stretch)
    if bands:
        heading = f"The most anomalous piece, from {clock(stretch.start_s)}"
        text = (f"Each piece of {detector.settings.data.max_s:g} s by itself; above the dashed line it is anomalous at alpha "
                f"{alpha:g}. Grey: pauses, not scored. The colours below are means of the anomaly map, on the scale of the map "
                "further down.")
        means = {round(start, 3): values for start, _, values in bands}
        sections.append(Section(
            "The whole recording", [text], timeline(recording, bands, calibration, alpha, stretch),
            "Anomaly, and mean of the anomaly map in six frequency bands, over the time of the recording.",
            ("from (s)", "anomaly", "p-value", *names),
            [(f"{part.start_s:.1f}", f"{part.anomaly:.2f}", f"{part.p_value:.3f}",
              *(f"{value:.2f}" for value in means[round(part.start_s, 3)])) for part in recording.parts]))
    sections.append(Section(
        heading, [*where(stretch), meaning_of_map(stretch)], maps(stretch),
        "Spectrogram above, anomaly map below, over time, on fixed colour scales.",
        ("from (s)", *names), map_rows(stretch)))
    edges = histogram_edges(calibration, recording.anomaly)
    counts = np.histogram(np.minimum(calibration, edges[-1]), edges)[0]
    sections.append(Section(
        "Beside real speech", ["The anomaly of this recording among those of the calibration speech. Too odd and too regular "
                               "both count as anomalous."], histogram(calibration, recording.anomaly),
        f"Histogram of the anomalies of {len(calibration)} real recordings, and a line at {recording.anomaly:.2f}, this one.",
        ("anomaly from", "to", "calibration clips"),
        [(f"{low:.2f}", f"{high:.2f}", str(count)) for low, high, count in zip(edges, edges[1:], counts) if count]))
    if known:
        sections.append(Section(
            "Beside known generators", ["The same for test clips of the study: real speech of voices that the detector never "
                                        "heard, and fakes of generators that it never heard. Where both overlap at the line, the "
                                        "detector cannot tell such a fake from real speech."],
            beside_known(known, recording.anomaly),
            f"Ranges of the anomalies of real speech and of {len(known)} groups of test clips, and a line at this recording.",
            ("clips of", "kind", "number", "5 %", "median", "95 %", "at least as anomalous as this"),
            [(one.name, KINDS[one.kind], str(len(one.anomalies)), *(f"{one.quantiles[index]:.2f}" for index in (0, 2, 4)),
              f"{one.above(recording.anomaly):.0%}") for one in known]))
    return sections


def band_names(stretch: Stretch) -> tuple[str, ...]:
    """The six bands of a map in words."""
    edges = np.linspace(*stretch.explanation.row_hz[[0, -1]] / 1000, BANDS + 1)
    return tuple(f"{low:.1f} to {high:.1f} kHz" for low, high in zip(edges, edges[1:]))


def map_rows(stretch: Stretch) -> list[tuple]:
    """Means of the map in six bands over every half second that means something."""
    explanation, step = stretch.explanation, round(0.5 / stretch.explanation.hop_s)
    rows = []
    for first in range(0, explanation.map.shape[1], step):
        mask = stretch.mapped[first : first + step]
        if mask.any():
            parts = np.array_split(explanation.map[:, first : first + step][:, mask], BANDS)
            rows.append((f"{stretch.start_s + first * explanation.hop_s:.1f}", *(f"{part.mean():.2f}" for part in parts)))
    return rows


def where(stretch: Stretch) -> list[str]:
    """In words: the most anomalous moments and the most anomalous band."""
    explanation, mask = stretch.explanation, stretch.mapped
    if not mask.any():
        return ["The speech is too short for a map."]
    span, moments = max(1, round(0.3 / explanation.hop_s)), []
    near = np.convolve(mask.astype(float), np.ones(span), "same")
    level = np.convolve(explanation.map.mean(0) * mask, np.ones(span), "same") / np.maximum(near, 1)
    level[near < span / 2] = -np.inf
    while len(moments) < 3 and level.max() > -np.inf:
        top = int(level.argmax())
        moments.append(f"{clock(stretch.start_s + top * explanation.hop_s, 1)} ({level[top]:.2f})")
        level[max(0, top - 2 * span) : top + 2 * span] = -np.inf
    bands = [(float(rows.mean()), edges[0], edges[-1]) for rows, edges in
             zip(np.array_split(explanation.map[:, mask], BANDS), np.array_split(explanation.row_hz, BANDS))]
    high, low = max(bands), min(bands)
    above = float((explanation.map[:, mask] > stretch.limits[1]).mean())
    return [f"{above:.1%} of the map is above {stretch.limits[1]:.2f}, which real calibration speech exceeds in 0.1 % of places.",
            f"Most anomalous moments: {', '.join(moments)} (mean over frequency; {MEANINGS.get(stretch.kind, OTHER_MAP)[0]}).",
            f"Most anomalous band: {high[1] / 1000:.1f} to {high[2] / 1000:.1f} kHz, {high[0]:.2f} on average; least: "
            f"{low[1] / 1000:.1f} to {low[2] / 1000:.1f} kHz, {low[0]:.2f}."]


def meaning_of_map(stretch: Stretch) -> str:
    """In words: what the map shows and what its colours mean."""
    low, high = stretch.limits
    return (f"The map shows {MEANINGS.get(stretch.kind, OTHER_MAP)[1]} The colours are the same for every recording: from {low:.2f}, "
            f"the median of real calibration speech, to {high:.2f}. Grey: pauses and the two ends, where the map means nothing.")


def _sound(audio: np.ndarray) -> str:
    soundfile.write(buffer := io.BytesIO(), np.clip(audio, -1, 1), RATE_HZ, format="FLAC", subtype="PCM_16")
    return "data:audio/flac;base64," + base64.b64encode(buffer.getvalue()).decode()


def clock(seconds: float, digits: int = 0) -> str:
    """`3.2 s` or `12:05`."""
    return f"{seconds:.{digits}f} s" if seconds < 60 else f"{int(seconds // 60)}:{int(seconds % 60):02d}"


