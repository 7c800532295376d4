"""Owns the detector: teacher, student, scaling and typicality as one object that scores, explains, is fitted, saved, loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from lib.data.channel import FRAME, apply_channel, pass_channel
from lib.engine import side_by_side
from lib.model.checkpoints import DetectorError
from lib.model.discrepancy import band_means, residual
from lib.model.images import activity, channel_count, hop_samples, image
from lib.model.maps import Explanation, _colour_limits, _drawn, stride_of, upsampled
from lib.model.networks import EfficientNetPyramid, new_student, token_teacher
from lib.model.pyramid import PRECISIONS, ResNetPyramid, Standardised, folded, freeze
from lib.model.scaling import LOCAL_HZ, LOCAL_S, POOLINGS, READ_EXTENTS, SCALINGS, Scaling, Typicality, moments, readings
from lib.paths import SHIPPED, atomic, file_digest, write_json
from lib.settings import RATE_HZ, TOKEN_TEACHERS, Scoring, Settings

BLOCK_S, OVERLAP_S = 20.0, 1.3
"""Longer recordings go through the networks in blocks. The deepest level sees 105 frames (0.84 s) to either side; the
overlap is wider, so that blocks give what the whole recording would."""


class Detector:
    """A one-class detector of synthetic speech. In three lines:

    >>> detector = Detector.load("lib/weights/detector")           # doctest: +SKIP
    >>> detector.score(audio, rate_hz)                             # doctest: +SKIP
    >>> detector.explain(audio, rate_hz).map                       # doctest: +SKIP
    """

    def __init__(self, settings: Settings, teacher: nn.Module, student: nn.Module) -> None:
        if settings.scoring.scaling == "read" and not len(getattr(teacher, "readers", [])):
            # Without readers the signed residual, both ways, is the next best (notebook 20).
            settings = settings.with_options({"scoring.scaling": "signed", "scoring.pooling": "two_sided"})
        self.settings, self.teacher, self.student = settings, teacher, student
        self.scaling: Scaling | None = None
        self.typicality: Typicality | None = None
        self.calibration = np.empty(0)  # sorted anomaly scores of bona fide threshold clips
        self.scale: tuple[float, float] | None = None  # colour scale of maps of `map_kind`, from bona fide threshold clips
        self.fitted_on: dict[str, list[str]] = {}  # ids of the clips behind every statistic
        self.key, self.scaling_part = "", "scaling"  # of the study that made it: cache name and part behind the scaling
        self.precision = "fp32"
        self._fast: tuple[nn.Module, nn.Module] | None = None

    def in_precision(self, precision: str) -> Detector:
        """This detector, from now on with networks that compute in `precision`, one of PRECISIONS. Raises ValueError for another."""
        if precision not in PRECISIONS:
            raise ValueError(f"expected a precision of {' or '.join(PRECISIONS)}, found {precision!r}")
        self.precision, self._fast = precision, None
        return self

    # --- networks ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def pyramids(self, audio: np.ndarray) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """Image (1, channel, frequency, frame) and both pyramids of `audio` (samples,) after the shared channel."""
        if self._fast is None:
            self._fast = folded(self.teacher, self.precision), folded(self.student, self.precision)
        picture = image(torch.from_numpy(np.ascontiguousarray(audio))[None], self.settings.view, self.settings.channel)
        given = picture.contiguous(memory_format=torch.channels_last)
        wanted, got = ([level.float() for level in network(given)] for network in self._fast)
        return picture, wanted, got

    def clip_residuals(self, audio: np.ndarray, active: np.ndarray) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """The image (channel, frequency, frame) and, for each level, the residual (channel, frequency, frame) and the
        activity (frame,) of one clip after the shared channel. Long clips go through in overlapping blocks."""
        block, overlap = round(BLOCK_S * RATE_HZ), round(OVERLAP_S * RATE_HZ)
        if len(audio) > block + overlap:
            return self._long_residuals(audio, active, block, overlap)
        picture, wanted, got = self.pyramids(audio)
        return picture[0], self.residuals(wanted, got, active, picture.shape[-1])

    def residuals(self, wanted: list[torch.Tensor], got: list[torch.Tensor], active: np.ndarray,
                  frames: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each level of both pyramids (1, channel, frequency, frame) of an image of `frames`, the residual (channel,
        frequency, frame) and the activity (frame,); differentiable."""
        whole, levels = activity(active, self.settings.view, frames), []
        for t, s in zip(wanted, got):
            parts = residual(t, s)[0]
            mask = whole[np.minimum(np.arange(parts.shape[-1]) * stride_of(frames, parts.shape[-1]), frames - 1)]
            levels.append((parts, torch.from_numpy(mask if mask.any() else np.ones_like(mask))))
        return levels

    def _long_residuals(self, audio, active, block, overlap):
        # Blocks start on a common multiple of the hop, the deepest stride and the activity frames, so pieces abut exactly.
        unit = int(np.lcm.reduce([hop_samples(self.settings.view) * 16, FRAME]))
        step, margin = block // unit * unit, max(1, overlap // unit) * unit
        pictures, levels = [], []
        for start in range(0, len(audio), step):
            first, last = max(0, start - margin), min(len(audio), start + step + margin)
            if last - max(start, first) < unit and start:
                break
            picture, found = self.clip_residuals(audio[first:last], active[first // FRAME : -(-last // FRAME)])
            ends = last == len(audio)
            cut = (start - first) // hop_samples(self.settings.view)
            size = None if ends else step // hop_samples(self.settings.view)
            pictures.append(picture[..., cut : None if ends else cut + size])
            for index, (parts, mask) in enumerate(found):
                stride = stride_of(picture.shape[-1], parts.shape[-1])
                a = cut // stride
                b = None if ends else a + size // stride
                if len(levels) <= index:
                    levels.append(([], []))
                levels[index][0].append(parts[..., a:b])
                levels[index][1].append(mask[a:b])
            if ends:
                break
        return torch.cat(pictures, -1), [(torch.cat(parts, -1), torch.cat(masks)) for parts, masks in levels]

    # --- maps and scores --------------------------------------------------------------------------------------------

    def combined(self, levels: list[torch.Tensor], shape: tuple[int, int], combine: str) -> torch.Tensor:
        """The anomaly map (frequency, frame): levels (frequency_l, frame_l) upsampled (bilinear) to `shape` and joined.

        sum: mean of the levels' maps, so that a scaled map stays in deviations. product (Wang et al. 2021, eq. 5): of
        unscaled maps; a scaled map can be negative, so its levels go through the softplus first.
        """
        grown = [upsampled(level, shape) for level in levels]
        if combine == "sum":
            return torch.stack(grown).mean(0)
        if any((level < 0).any() for level in grown):
            grown = [functional.softplus(level) for level in grown]
        return torch.stack(grown).prod(0)

    def profile(self, levels: list[torch.Tensor], masks: list[torch.Tensor]) -> torch.Tensor:
        """Mean over active frames in each of `scoring.bands` frequency bands: levels (..., frequency, frame) ->
        (levels * ... * bands,). Of maps, the discrepancy profile; of residuals or readings (channel, frequency, frame), the signed one.
        Differentiable."""
        return band_means([level[..., mask] for level, mask in zip(levels, masks)], self.settings.scoring.bands)

    def extents(self, seconds: float, hertz: float) -> list[tuple[int, int]]:
        """Rows and frames of a neighbourhood of `seconds` and `hertz` at each level."""
        view, channel = self.settings.view, self.settings.channel
        frames, rows = round(seconds / view.hop_s), round(hertz / (channel.high_hz - channel.low_hz) * view.bins)
        probe = torch.zeros(1, channel_count(view.channels), view.bins, 64)
        with torch.no_grad():
            strides = [(view.bins / level.shape[2], 64 / level.shape[3]) for level in self.teacher(probe)]
        return [(max(1, round(rows / tall)), max(1, round(frames / wide))) for tall, wide in strides]

    @staticmethod
    def pooled(whole: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Utterance scores (scalars) of a map (frequency, frame) over its active frames, `mask` (frame,) bool: mean, maximum, mean
        of the top 5 %, and the 95 % quantile over time of the mean over frequency. Differentiable."""
        kept = whole[:, mask] if mask.any() else whole
        values = kept.flatten()
        return {"mean": values.mean(), "max": values.max(), "top": values.topk(max(1, len(values) // 20)).values.mean(),
                "quantile": torch.quantile(kept.mean(0), 0.95)}

    @property
    def kinds(self) -> tuple[str, ...]:
        """The scalings that this detector can do: `read` needs a teacher with readers."""
        return SCALINGS if self.scaling.reading else tuple(kind for kind in SCALINGS if kind != "read")

    def statistics(self, audio: np.ndarray, active: np.ndarray, kinds: Iterable[str] | None = None,
                   combines: Iterable[str] = ("sum", "product")) -> dict[str, np.ndarray | float]:
        """Everything that the ablations compare, of one clip after the channel: `profile/KIND` (levels * bands,) and
        `KIND/COMBINE/POOLING` numbers."""
        return self.statistics_of(self.clip_residuals(audio, active)[1], self.kinds if kinds is None else kinds, combines)

    def statistics_of(self, levels: list[tuple[torch.Tensor, torch.Tensor]], kinds: Iterable[str],
                      combines: Iterable[str]) -> dict[str, np.ndarray | float]:
        """The same from what `clip_residuals` gave."""
        # Utterance scores are pooled on the grid of the finest level: the image's has 16 times as many places, all of them
        # interpolated.
        shape, mask = tuple(levels[0][0].shape[-2:]), levels[0][1]
        found: dict[str, np.ndarray | float] = {}
        combines = tuple(combines)
        for kind in kinds:
            drawn = combines or kind not in ("signed", "read")  # their profiles need no maps
            maps = [self.scaling.apply(index, parts, kind) for index, (parts, _) in enumerate(levels)] if drawn else []
            profiled = self.profiled([parts for parts, _ in levels], kind, maps)
            found[f"profile/{kind}"] = self.profile(profiled, [mask for _, mask in levels]).numpy()
            for combine in combines:
                whole = self.combined(maps, shape, combine)
                found |= {f"{kind}/{combine}/{name}": float(value) for name, value in self.pooled(whole, mask).items()}
        return found

    def profiled(self, parts: list[torch.Tensor], kind: str, maps: list[torch.Tensor] = ()) -> list[torch.Tensor]:
        """What the profile of a scaling is the mean of, for each level: the residual itself (signed), its readings (read), or the
        scaled maps. Differentiable."""
        if kind == "signed":
            return parts
        if kind == "read":
            return [readings(*pair) for pair in zip(parts, self.teacher.readers)]
        return list(maps) or [self.scaling.apply(index, part, kind) for index, part in enumerate(parts)]

    def anomaly_of(self, statistics: dict[str, np.ndarray], scoring: Scoring | None = None,
                   typicality: Typicality | None = None) -> np.ndarray:
        """Anomaly scores (clip,), up = fake, from stacked statistics under `scoring` (default: the detector's own)."""
        scoring = scoring or self.settings.scoring
        if scoring.pooling in POOLINGS:
            return np.asarray(statistics[f"{scoring.scaling}/{scoring.combine}/{scoring.pooling}"])
        model = typicality or self.typicality
        if model is None:
            raise DetectorError("this detector is not fitted on bona fide speech yet: call fit")
        return model.score(scoring.pooling, statistics[f"profile/{scoring.scaling}"])

    def wanted(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Kinds and combinations of `statistics` that this detector's own score needs."""
        scoring = self.settings.scoring
        return (scoring.scaling,), (scoring.combine,) if scoring.pooling in POOLINGS else ()

    # --- fitting on bona fide speech ----------------------------------------------------------------------------------

    def fit_scaling(self, clips: Iterable[tuple[np.ndarray, np.ndarray]], ids: list[str]) -> None:
        """Fit discrepancy scaling and typicality on bona fide clips after the channel that the student was not fitted on.

        They are passed over once, and again where the profile is one of scaled maps; a sequence that reads its clips when asked
        for keeps memory flat."""
        clips = clips if isinstance(clips, Sequence) else list(clips)
        kind, readers = self.settings.scoring.scaling, getattr(self.teacher, "readers", [])
        extent = self.extents(LOCAL_S, LOCAL_HZ)
        wide = list(zip(*(self.extents(*size) for size in READ_EXTENTS))) if readers else []
        unscaled = kind in ("signed", "read")

        def heard(index: int) -> tuple[list, np.ndarray | None]:
            levels = self.clip_residuals(*clips[index])[1]
            profiled = self.profiled([parts for parts, _ in levels], kind) if unscaled else []
            return (moments(levels, extent, readers, wide),
                    self.profile(profiled, [mask for _, mask in levels]).numpy() if unscaled else None)

        def summed() -> Iterator[list]:  # the moments of a clip are larger than its profile, and are not kept
            for found, profile in side_by_side(heard, range(len(clips))):
                profiles.append(profile)
                yield found

        profiles: list[np.ndarray | None] = []
        self.scaling = Scaling.from_moments(summed(), extent, readers, wide)
        if not unscaled:
            profiles = list(side_by_side(
                lambda index: self.statistics(*clips[index], *self.wanted())[f"profile/{kind}"], range(len(clips))))
        self.typicality = Typicality.fit(np.stack(profiles))
        self.fitted_on["scaling"] = list(ids)

    def fit_threshold(self, clips: Iterable[tuple[np.ndarray, np.ndarray]], ids: list[str]) -> None:
        """Keep the anomaly scores of further bona fide clips as the calibration of p-values and thresholds, and the colour
        scale of their maps."""
        clips = clips if isinstance(clips, Sequence) else list(clips)
        drawn = _drawn(len(clips))

        def heard(index: int) -> tuple[float, np.ndarray | None]:
            audio, active = clips[index]
            picture, levels = self.clip_residuals(audio, active)
            if index not in drawn:
                return self.score_residuals(levels), None
            explanation = self.explanation(picture, levels, active)
            return explanation.anomaly, explanation.cells

        anomalies, cells = zip(*side_by_side(heard, range(len(clips))))
        self.scale, self.calibration = _colour_limits([cells[index] for index in drawn]), np.sort(anomalies)
        self.fitted_on["threshold"] = list(ids)

    def colour_limits(self, clips: Sequence[tuple[np.ndarray, np.ndarray]], kind: str | None = None) -> tuple[float, float]:
        """Colour limits for all maps of `kind` (default: `map_kind`): median and 99.9 % quantile of the active places of the
        maps of bona fide clips, at most MOST_DRAWN of them."""
        cells = side_by_side(lambda index: self.explain_prepared(*clips[index], kind=kind).cells, _drawn(len(clips)))
        return _colour_limits(list(cells))

    def fit(self, paths: Iterable[Path | str]) -> Detector:
        """Recalibrate scaling, typicality and threshold on your own real speech (files; a few minutes of it), in place.

        The networks stay. Half of the pieces, as long as the study's clips (5 s), serves scaling, the other half the threshold.
        Raises DetectorError where there are fewer than 8 pieces of at least 1 s.
        """
        from lib.data.audio import read_audio

        clips, ids, length = [], [], round(self.settings.data.max_s * RATE_HZ)
        for path in paths:
            audio, _ = read_audio(path, RATE_HZ)
            for start in range(0, len(audio) - RATE_HZ + 1, length):
                piece = audio[start : start + length]
                try:
                    clips.append(apply_channel(piece, self.settings.channel))
                except ValueError:
                    continue  # a silent piece teaches nothing
                ids.append(f"{Path(path).name}@{start / RATE_HZ:g}s")
        if len(clips) < 8:
            raise DetectorError(f"recalibration needs at least 8 pieces of speech of 1 to 5 s, found {len(clips)}; "
                                "give about two minutes of real speech from the new source")
        self.fit_scaling(clips[::2], ids[::2])
        self.fit_threshold(clips[1::2], ids[1::2])
        return self

    # --- use ------------------------------------------------------------------------------------------------------------

    def _prepared(self, audio: np.ndarray, rate_hz: int) -> tuple[np.ndarray, np.ndarray, float]:
        audio = np.asarray(audio, dtype=np.float32)
        if audio.ndim != 1 or not np.isfinite(audio).all():
            raise ValueError(f"expected finite mono samples of shape (samples,), found shape {audio.shape}"
                             f"{'' if np.isfinite(audio).all() else ' with NaN or Inf'}")
        if rate_hz != RATE_HZ:
            import soxr

            audio = soxr.resample(audio, rate_hz, RATE_HZ, quality="HQ")
        if len(audio) < 0.3 * RATE_HZ:
            raise ValueError(f"too short: expected at least 0.3 s, found {len(audio) / RATE_HZ:.2f} s")
        passage = pass_channel(audio, self.settings.channel)
        return passage.audio, passage.active, passage.start / RATE_HZ

    def score(self, audio: np.ndarray, rate_hz: int) -> float:
        """Anomaly of a recording (samples,), up = fake. Raises ValueError for bad samples, DetectorError if not fitted."""
        prepared, active, _ = self._prepared(audio, rate_hz)
        return self.score_prepared(prepared, active)

    def score_prepared(self, audio: np.ndarray, active: np.ndarray) -> float:
        """Anomaly of a clip that went through the shared channel (lib.data.channel.apply_channel)."""
        return self.score_residuals(self.clip_residuals(audio, active)[1])

    def score_residuals(self, levels: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
        """The same from what `clip_residuals` gave."""
        found = self.statistics_of(levels, *self.wanted())
        return float(self.anomaly_of({name: np.stack([value]) for name, value in found.items()})[0])

    def p_value(self, anomaly: float) -> float:
        """Share of bona fide calibration clips that are at least as anomalous (conformal: (1 + count) / (n + 1))."""
        return float((1 + (self.calibration >= anomaly).sum()) / (len(self.calibration) + 1))

    @property
    def map_kind(self) -> str:
        """The kind of map that `explain` draws: read where the teacher has readers, else the scaling of the score."""
        return "read" if self.scaling.reading else self.settings.scoring.scaling

    @property
    def map_limits(self) -> tuple[float, float]:
        """The colour scale of every map of `map_kind` (`colour_limits` of the calibration clips).

        Raises DetectorError for a detector that keeps none.
        """
        if self.scale is None:
            raise DetectorError("this detector keeps no colour scale for its maps, because an earlier version saved it: "
                                "calibrate it again (python -m lib calibrate), or call fit_threshold")
        return self.scale

    def explain(self, audio: np.ndarray, rate_hz: int) -> Explanation:
        """Score and map of a recording (samples,)."""
        prepared, active, start = self._prepared(audio, rate_hz)
        return self.explain_prepared(prepared, active, start)

    def explain_prepared(self, audio: np.ndarray, active: np.ndarray, start_s: float = 0.0,
                         kind: str | None = None) -> Explanation:
        """The same for a clip that went through the shared channel; `kind` (of lib.model.scaling.SCALINGS) draws another map than
        `map_kind`. Pauses say nothing: there the map has its lowest value of this clip."""
        picture, levels = self.clip_residuals(audio, active)
        return self.explanation(picture, levels, active, start_s, kind)

    def explanation(self, picture: torch.Tensor, levels: list[tuple[torch.Tensor, torch.Tensor]], active: np.ndarray,
                    start_s: float = 0.0, kind: str | None = None) -> Explanation:
        """The same from what `clip_residuals` gave."""
        from lib.model.images import row_hz

        kind = kind or self.map_kind
        maps = [self.scaling.apply(index, parts, kind) for index, (parts, _) in enumerate(levels)]
        shape = tuple(picture.shape[-2:])
        grown = [self.combined([level], shape, "sum").numpy() for level in maps]
        heard = activity(active, self.settings.view, shape[1])
        for level in grown:
            level[:, ~heard] = level[:, heard].min() if heard.any() else level.min()
        return Explanation(self.score_residuals(levels), np.mean(grown, axis=0), grown, picture.numpy(), heard, start_s,
                           self.settings.view.hop_s, row_hz(self.settings.view, self.settings.channel))

    # --- on disk --------------------------------------------------------------------------------------------------------

    def save(self, folder: Path | str) -> Path:
        """Write detector.safetensors and detector.json (settings, clip ids, SHA-256) into `folder`, atomically."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"teacher.{name}": value for name, value in self.teacher.state_dict().items()}
        tensors |= {f"student.{name}": value for name, value in self.student.state_dict().items()}
        tensors |= {f"scaling.{name}": value for name, value in self.scaling.tensors().items()}
        for name in ("mean", "deviation", "precision", *(["left_out"] if len(self.typicality.left_out) else [])):
            # The precision is most of the file (1008 x 1008): single precision is plenty for it.
            kind = np.float32 if name == "precision" else np.float64
            tensors[f"typicality.{name}"] = torch.from_numpy(np.asarray(getattr(self.typicality, name), dtype=kind))
        tensors["calibration"] = torch.from_numpy(np.asarray(self.calibration, dtype=np.float64))
        with atomic(folder / "detector.safetensors") as temporary:
            save_file({name: value.contiguous() for name, value in tensors.items()}, temporary)
        write_json(folder / "detector.json", {
            "format": 1, "settings": dataclasses.asdict(self.settings), "fitted_on": self.fitted_on,
            **({"map": {"kind": self.map_kind, "limits": self.scale}} if self.scale else {}),
            "sha256": file_digest(folder / "detector.safetensors")})
        return folder

    @classmethod
    def load(cls, folder: Path | str | None = None) -> Detector:
        """Read a detector; by default the one that ships with the project.

        Nothing in the files can run code. Raises DetectorError for a missing, damaged, foreign or oversized file.
        """
        from lib.model.checkpoints import read_detector

        settings, tensors, sheet = read_detector(Path(folder) if folder else SHIPPED)
        part = lambda prefix: {name[len(prefix) + 1 :]: value for name, value in tensors.items() if name.startswith(prefix + ".")}  # noqa: E731
        network, inputs = settings.network, channel_count(settings.view.channels)
        try:
            teacher = (token_teacher(settings, pretrained=False) if network.teacher in TOKEN_TEACHERS else
                       EfficientNetPyramid(False, 0, inputs) if network.teacher == "imagenet" else
                       ResNetPyramid(inputs, network.teacher_width, network.levels, stem=network.stem))
            student = new_student(teacher, settings)
            readers = [tensors[name] for name in sorted(tensors) if name.startswith("teacher.reader")]
            teacher = Standardised(teacher, readers) if network.standardise else teacher
            teacher.load_state_dict(part("teacher"))
            student.load_state_dict(part("student"))
            detector = cls(settings, freeze(teacher), freeze(student))
            detector.scaling = Scaling.from_tensors(part("scaling"))
            detector.typicality = Typicality(**{name: value.numpy() for name, value in part("typicality").items()})
            detector.calibration = tensors["calibration"].numpy()
            if "map" in sheet:
                low, high = (float(value) for value in sheet["map"]["limits"])
                if sheet["map"]["kind"] != detector.map_kind or not -1e6 < low <= high < 1e6:
                    raise ValueError(f"the colour scale {str(sheet['map'])[:100]} is not one of a map of kind {detector.map_kind}")
                detector.scale = low, high
        except (KeyError, RuntimeError, TypeError, ValueError, IndexError, ArithmeticError) as error:
            raise DetectorError(f"{folder or SHIPPED}: the weights do not fit the settings beside them ({str(error)[:200]}); "
                                "expected files written by Detector.save") from None
        detector.fitted_on = sheet.get("fitted_on", {})
        return detector


