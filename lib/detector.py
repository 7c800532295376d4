"""Owns the detector: teacher, student, scaling and typicality as one object that is fitted, scores and explains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lib.data.audio import audio_pieces
from lib.data.channel import apply_channel, pass_channel
from lib.engine import side_by_side
from lib.evaluate.metrics import conformal
from lib.model.checkpoints import DetectorError, colour_scale, read_detector, restored, write_detector
from lib.model.discrepancy import (
    UNSCALED,
    Explanation,
    Level,
    clip_statistics,
    colour_limits,
    combined,
    drawn_clips,
    in_blocks,
    level_residuals,
    upsampled,
)
from lib.model.evidence import Evidence, Measured, measured
from lib.model.images import FrontEnd, activity, hop_samples, row_hz
from lib.model.pyramid import PRECISIONS, folded
from lib.model.scaling import POOLINGS, SCALINGS, Scaling, Typicality
from lib.model.texture import TextureStudent
from lib.paths import SHIPPED
from lib.settings import RATE_HZ, Scoring, Settings

BLOCK_S, OVERLAP_S = 20.0, 1.3
"""Longer recordings go through the networks in blocks; the deepest level sees 0.84 s (105 frames) to either side."""
Clip = tuple[np.ndarray, np.ndarray]
"""Audio (samples,) after the shared channel and its activity (20 ms frame,), see lib.data.channel.apply_channel."""


class Detector:
    """A one-class detector of synthetic speech: `Detector.load().score(audio, rate_hz)` and `explain`.

    Raises DetectorError for a score that needs readers where the teacher has none.
    """

    def __init__(self, settings: Settings, teacher: nn.Module, student: nn.Module) -> None:
        if settings.scoring.scaling == "read" and not len(getattr(teacher, "readers", [])):
            raise DetectorError("scoring.scaling=read needs a teacher with readers (network.teacher=perturbation); set "
                                "scoring.scaling=signed and scoring.pooling=two_sided, or others")
        self.settings, self.teacher, self.student = settings, teacher, student
        self.front = FrontEnd(settings.view, settings.channel)
        self.scaling: Scaling | None = None
        self.typicality: Typicality | None = None
        self.calibration = np.empty(0)  # sorted anomaly scores of bona fide threshold clips
        self.scale: tuple[float, float] | None = None  # colour limits of maps of `map_kind`, from the same clips
        self.evidence: Evidence | None = None  # lines and texture beside the pyramid, calibrated together
        self.fitted_on: dict[str, list[str]] = {}  # ids of the clips behind every statistic
        self.key, self.scaling_part = "", "scaling"  # of the study that made it: cache name, part behind the scaling
        self.in_precision("fp32")

    def score(self, audio: np.ndarray, rate_hz: int) -> float:
        """Anomaly of a recording (samples,), up = fake: of all evidence together where this detector has calibrated it,
        else of the pyramid. Raises ValueError for bad samples."""
        if self.evidence is None:
            return self.score_prepared(*self._prepared(audio, rate_hz)[:2])
        measured = self.measure(audio, rate_hz)
        return self.evidence.joint(measured.values, measured.seconds)

    def measure(self, audio: np.ndarray, rate_hz: int, pyramid: tuple[float, float] | None = None) -> Measured:
        """Every statistic of a recording (samples,) at its own rate; `pyramid` is what `seen` says, if it is known."""
        pyramid = pyramid or self._seen(audio, rate_hz)
        return self.evidence.measure(np.asarray(audio, dtype=np.float32), rate_hz, pyramid)

    def fit_evidence(self, recordings: Iterable[tuple[np.ndarray, int]], sources: Sequence[str],
                     student: TextureStudent, ids: list[str]) -> None:
        """Calibrate all evidence on bona fide recordings (audio (samples,), rate_hz) and the corpora they are from."""
        pairs = side_by_side(lambda pair: measured(*pair, self._seen(*pair), student), recordings)
        values, seconds = zip(*((each.values, each.seconds) for each in pairs))
        self.evidence = Evidence(student, np.stack(values), seconds, sources)
        self.fitted_on["evidence"] = list(ids)

    def explain(self, audio: np.ndarray, rate_hz: int, kind: str | None = None) -> Explanation:
        """Score and map of a recording (samples,); `kind` (of SCALINGS) draws another map than `map_kind`."""
        return self.explain_prepared(*self._prepared(audio, rate_hz), kind)

    def p_value(self, anomaly: float) -> float:
        """Share of bona fide calibration clips that are at least as anomalous (lib.evaluate.metrics.conformal)."""
        return conformal(self.calibration, anomaly)

    def fit(self, paths: Iterable[Path | str]) -> Detector:
        """Recalibrate scaling, typicality and threshold on your own real speech (files; minutes of it), in place.

        Some recordings serve scaling, the others the threshold, half of the pieces (5 s) each; where one has most of
        them, its first and second half: neighbours are alike. Raises DetectorError for fewer than 8 pieces of 1 s."""
        recordings = [self._prepared_pieces(path) for path in paths]
        pieces = sum(recordings, [])
        if len(pieces) < 8:
            raise DetectorError(f"recalibration needs at least 8 pieces of speech of 1 to 5 s, found {len(pieces)}; "
                                "give about two minutes of real speech from the new source")
        halves: list[list[tuple[str, np.ndarray, Clip]]] = [[], []]
        for recording in recordings:
            min(halves, key=len).extend(recording)
        if min(map(len, halves)) < len(pieces) / 3:
            halves = [pieces[: len(pieces) // 2], pieces[len(pieces) // 2 :]]
        for fitting, half in zip((self.fit_scaling, self.fit_threshold), halves):
            seen = fitting([piece[2] for piece in half], [piece[0] for piece in half])
        if self.evidence:  # other sources were measured by another pyramid
            further = [self.measure(piece[1], RATE_HZ, each) for piece, each in zip(halves[1], seen)]
            self.evidence = self.evidence.joined_by("calibration", further, without="pyramid")
        return self

    def _prepared_pieces(self, path: Path | str) -> list[tuple[str, np.ndarray, Clip]]:
        pieces = []
        for name, audio in audio_pieces(path, self.settings.data.max_s):
            with suppress(ValueError):  # a silent piece teaches nothing
                pieces.append((name, audio, apply_channel(audio, self.settings.channel)))
        return pieces

    def _prepared(self, audio: np.ndarray, rate_hz: int) -> tuple[np.ndarray, np.ndarray, float]:
        audio = np.asarray(audio, dtype=np.float32)
        if audio.ndim != 1 or not np.isfinite(audio).all():
            raise ValueError(f"expected finite mono samples of shape (samples,), found {audio.shape}, NaN or Inf")
        if rate_hz != RATE_HZ:
            import soxr

            audio = soxr.resample(audio, rate_hz, RATE_HZ, quality="HQ")
        if len(audio) < 0.3 * RATE_HZ:
            raise ValueError(f"too short: expected at least 0.3 s, found {len(audio) / RATE_HZ:.2f} s")
        passage = pass_channel(audio, self.settings.channel)
        return passage.audio, passage.active, passage.start / RATE_HZ

    def save(self, folder: Path | str) -> Path:
        """Write detector.safetensors and detector.json (settings, clip ids, SHA-256) into `folder`, atomically."""
        scale = {"map": {"kind": self.map_kind, "limits": self.scale}} if self.scale else {}
        write_detector(Path(folder), self.settings, {"teacher": self.teacher, "student": self.student}, self.scaling,
                       self.typicality, self.calibration, {"fitted_on": self.fitted_on, **scale}, self.evidence)
        return Path(folder)

    @classmethod
    def load(cls, folder: Path | str | None = None) -> Detector:
        """Read a detector; by default the one that ships with the project. Nothing in the files can run code. Raises
        DetectorError for a missing, damaged, foreign or oversized file."""
        folder = Path(folder or SHIPPED)
        settings, tensors, sheet = read_detector(folder)
        parts = restored(folder, settings, tensors, sheet)
        detector = cls(settings, parts.pop("teacher"), parts.pop("student"))
        vars(detector).update(parts, fitted_on=sheet.get("fitted_on", {}))
        detector.scale = colour_scale(folder, sheet, detector.map_kind)
        return detector

    def in_precision(self, precision: str) -> Detector:
        """This detector, from now on with networks that compute in `precision`, one of PRECISIONS; else ValueError."""
        if precision not in PRECISIONS:
            raise ValueError(f"expected a precision of {' or '.join(PRECISIONS)}, found {precision!r}")
        self.precision, self._fast = precision, None
        return self

    @torch.inference_mode()
    def pyramids(self, audio: np.ndarray) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """Image (1, plane, frequency, frame), teacher's and student's features of `audio` (samples,)."""
        if self._fast is None:
            self._fast = folded(self.teacher, self.precision), folded(self.student, self.precision)
        batch = torch.from_numpy(np.ascontiguousarray(audio))[None]
        picture = self.front(batch)
        teacher, student = ([level.float() for level in network(batch, picture)] for network in self._fast)
        return picture, teacher, student

    def clip_residuals(self, audio: np.ndarray, active: np.ndarray) -> tuple[torch.Tensor, list[Level]]:
        """The image (plane, frequency, frame) and, for each level, the residual (channel, frequency, frame) and the
        activity (frame,) of one clip after the shared channel. Long clips go through in overlapping blocks."""
        block, overlap = round(BLOCK_S * RATE_HZ), round(OVERLAP_S * RATE_HZ)
        if len(audio) > block + overlap:
            return in_blocks(self.clip_residuals, audio, active, hop_samples(self.settings.view), block, overlap)
        picture, teacher, student = self.pyramids(audio)
        return picture[0], level_residuals(teacher, student, active, self.settings.view, picture.shape[-1])

    def score_prepared(self, audio: np.ndarray, active: np.ndarray) -> float:
        """Anomaly of a clip after the shared channel, up = fake."""
        return self.score_residuals(self.clip_residuals(audio, active)[1])

    def explain_prepared(self, audio: np.ndarray, active: np.ndarray, start_s: float = 0.0,
                         kind: str | None = None) -> Explanation:
        """Score and map of a clip after the shared channel that begins at `start_s` of its recording."""
        return self.explanation(*self.clip_residuals(audio, active), active, start_s, kind)

    def score_residuals(self, levels: list[Level]) -> float:
        """Anomaly of a clip from what `clip_residuals` gave."""
        statistics = clip_statistics(levels, self.scaling, *self.needs(), self.settings.scoring.bands)
        return float(self.anomaly_of({name: np.stack([value]) for name, value in statistics.items()})[0])

    def seen(self, levels: list[Level]) -> tuple[float, float]:
        """What the pyramid says of a clip by its levels, as `clip_residuals` gives them: anomaly and steadiness."""
        return self.score_residuals(levels), self.scaling.steadiness(levels)

    def _seen(self, audio: np.ndarray, rate_hz: int) -> tuple[float, float]:
        return self.seen(self.clip_residuals(*self._prepared(audio, rate_hz)[:2])[1])

    def explanation(self, picture: torch.Tensor, levels: list[Level], active: np.ndarray, start_s: float = 0.0,
                    kind: str | None = None) -> Explanation:
        """Score and map from what `clip_residuals` gave. Pauses say nothing: there each level has its lowest value."""
        kind, shape, view = kind or self.map_kind, tuple(picture.shape[-2:]), self.settings.view
        mask = activity(active, view, shape[1])
        grown = [upsampled(self.scaling.apply(index, values, kind), shape) for index, (values, _) in enumerate(levels)]
        for level in grown:
            level[:, ~mask] = level[:, mask].min() if mask.any() else level.min()
        whole = combined(grown, self.settings.scoring.combine, kind)
        return Explanation(*self.seen(levels), whole.numpy(), [level.numpy() for level in grown],
                           picture.numpy(), mask, start_s, view.hop_s, row_hz(view, self.settings.channel))

    @property
    def kinds(self) -> tuple[str, ...]:
        """The scalings that this detector can do: `read` needs a teacher with readers."""
        return SCALINGS if self.scaling.readers else tuple(kind for kind in SCALINGS if kind != "read")

    @property
    def map_kind(self) -> str:
        """The kind of map that `explain` draws: read where the teacher has readers, else the scaling of the score."""
        return "read" if self.scaling.readers else self.settings.scoring.scaling

    @property
    def map_limits(self) -> tuple[float, float]:
        """The colour limits of every map of `map_kind`. Raises DetectorError for a detector that keeps none."""
        if self.scale is None:
            raise DetectorError("this detector keeps no colour scale of its maps: run python -m lib calibrate")
        return self.scale

    def statistics(self, audio: np.ndarray, active: np.ndarray, kinds: Iterable[str] | None = None,
                   combines: Iterable[str] = ("sum", "product")) -> dict[str, np.ndarray | float]:
        """lib.model.discrepancy.clip_statistics of a clip after the channel, of all kinds of scaling or some."""
        kinds, levels = self.kinds if kinds is None else kinds, self.clip_residuals(audio, active)[1]
        return clip_statistics(levels, self.scaling, kinds, combines, self.settings.scoring.bands)

    def needs(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Kinds and combinations of `statistics` that this detector's own score needs."""
        scoring = self.settings.scoring
        return (scoring.scaling,), (scoring.combine,) if scoring.pooling in POOLINGS else ()

    def anomaly_of(self, statistics: dict[str, np.ndarray], scoring: Scoring | None = None,
                   typicality: Typicality | None = None) -> np.ndarray:
        """Anomaly scores (clip,), up = fake, from stacked statistics under `scoring` (default: the detector's own)."""
        scoring, model = scoring or self.settings.scoring, typicality or self.typicality
        if scoring.pooling in POOLINGS:
            return np.asarray(statistics[f"{scoring.scaling}/{scoring.combine}/{scoring.pooling}"])
        if model is None:
            raise DetectorError("this detector is not fitted on bona fide speech yet: call fit")
        return model.score(scoring.pooling, statistics[f"profile/{scoring.scaling}"])

    # --- statistics of bona fide speech -------------------------------------------------------------------------------

    def fit_scaling(self, clips: Sequence[Clip], ids: list[str]) -> None:
        """Fit discrepancy scaling and typicality on bona fide clips that the student was not fitted on.

        They are passed over once, and again where the profile is one of scaled maps; a sequence that reads its clips
        when asked for keeps memory flat."""
        kind, bands = self.settings.scoring.scaling, self.settings.scoring.bands
        self.scaling = scaling = Scaling.of(self.teacher, self.settings)
        profiles: list[np.ndarray] = []

        def measured(index: int) -> tuple[list, np.ndarray | None]:
            levels = self.clip_residuals(*clips[index])[1]
            statistics = clip_statistics(levels, scaling, [kind] if kind in UNSCALED else [], (), bands)
            return scaling.moments(levels), statistics.get(f"profile/{kind}")

        def moments() -> Iterable[list]:  # those of a clip are larger than its profile, and are not kept
            for sums, profile in side_by_side(measured, range(len(clips))):
                profiles.append(profile)
                yield sums

        scaling.fit(moments())
        if kind not in UNSCALED:
            statistics = side_by_side(lambda index: self.statistics(*clips[index], [kind], ()), range(len(clips)))
            profiles = [values[f"profile/{kind}"] for values in statistics]
        self.typicality = Typicality.fit(np.stack(profiles))
        self.fitted_on["scaling"] = list(ids)

    def fit_threshold(self, clips: Sequence[Clip], ids: list[str]) -> tuple[tuple[float, float], ...]:
        """Keep the anomaly scores of further bona fide clips as the calibration of p-values and thresholds, and the
        colour scale of their maps; what is `seen` of each, in the order of `clips`."""
        drawn = drawn_clips(len(clips))

        def measured(index: int) -> tuple[tuple[float, float], np.ndarray | None]:
            picture, levels = self.clip_residuals(*clips[index])
            if index not in drawn:
                return self.seen(levels), None
            made = self.explanation(picture, levels, clips[index][1])
            return (made.anomaly, made.steadiness), made.cells

        seen, cells = zip(*side_by_side(measured, range(len(clips))))
        self.scale, self.fitted_on["threshold"] = colour_limits([cells[index] for index in drawn]), list(ids)
        self.calibration = np.sort([anomaly for anomaly, _ in seen])
        return seen

    def colour_limits(self, clips: Sequence[Clip], kind: str | None = None) -> tuple[float, float]:
        """Colour limits for all maps of `kind` (default: `map_kind`), from the maps of bona fide clips."""
        drawn = drawn_clips(len(clips))
        return colour_limits(list(side_by_side(lambda i: self.explain_prepared(*clips[i], kind=kind).cells, drawn)))
