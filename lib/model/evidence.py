"""Owns the joint decision: statistics of a recording, each standardised on real speech of like length, their weighted
sum, and its conformal p-value. Nothing here has seen a fake. A statistic is higher for fakes; NaN means that there was
nothing to measure, and counts as typical of real speech.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lib.model.lines import Lines, constant_lines
from lib.model.texture import TextureStudent, at_rate, sameness, smoothness

WEIGHTS = {"pyramid": 0.3, "steady": 0.35, "lines": 1.0, "texture": 0.7, "sameness": 0.5}
"""Kinds of evidence and their weights; chosen on external development recordings (notebook 36)."""
LIMITS = {"lines": (0.0, 12.0)}
"""Of standardised statistics, else OTHER_LIMITS: none outvotes the others without bound, and little of one is hardly a
sign of real speech."""
OTHER_LIMITS = (-1.0, 12.0)
UNMEASURED = -1e9
"""Stands for NaN on disk."""
LIKE_LENGTH = 400
"""Real recordings nearest in length that a recording is compared with."""


@dataclass(frozen=True)
class Measured:
    """What was measured of one recording: `values` in the order of WEIGHTS, its seconds, and the lines themselves."""

    values: np.ndarray
    seconds: float
    lines: Lines


def measured(audio: np.ndarray, rate_hz: int, pyramid: tuple[float, float], student: TextureStudent) -> Measured:
    """Every statistic of `audio` (samples,) at its own rate, of which the pyramid said (anomaly, steadiness)."""
    lines = constant_lines(audio, rate_hz)
    values = {"pyramid": pyramid[0], "steady": pyramid[1], "lines": lines.strength if lines.spacing_hz else np.nan,
              "texture": smoothness(audio, rate_hz), "sameness": sameness(student, at_rate(audio, rate_hz))}
    return Measured(np.array([values[name] for name in WEIGHTS], dtype=float), len(audio) / rate_hz, lines)


class Evidence:
    """Real speech to compare with: `values` (recordings, statistics) in the order of `names`, `seconds` (recordings,)
    and `sources`, the corpora that they are from; and the texture student that measured it."""

    def __init__(self, student: TextureStudent, values: np.ndarray, seconds: np.ndarray, sources: Sequence[str],
                 weights: Mapping[str, float] = WEIGHTS, sums_known: np.ndarray | None = None) -> None:
        self.student = student
        self.values, self.seconds = np.asarray(values, dtype=float), np.asarray(seconds, dtype=float)
        self.names, self.sources = tuple(weights), np.array(list(sources), dtype=str)
        if self.values.shape != (len(self.seconds), len(weights)) or len(self.sources) != len(self.seconds):
            raise ValueError(f"expected {len(self.seconds)} recordings x {list(weights)}, found {self.values.shape}")
        self.weights = np.array([weights[name] for name in self.names])
        self.limits = np.array([LIMITS.get(name, OTHER_LIMITS) for name in self.names]).T
        sums = (self.joint(row, seconds) for row, seconds in zip(self.values, self.seconds))
        self.sums = np.array(list(sums)) if sums_known is None else sums_known

    def like_length(self, seconds: float) -> np.ndarray:
        """Indices of the LIKE_LENGTH real recordings nearest in the logarithm of length."""
        far = np.abs(np.log(np.maximum(self.seconds, 0.1) / max(seconds, 0.1)))
        return np.argsort(far, kind="stable")[:LIKE_LENGTH]

    def standardised(self, values: np.ndarray, seconds: float) -> np.ndarray:
        """(value - median) / (1.4826 MAD) among real speech of like length, within the limits; NaN is 0; (names,)."""
        like = self.values[self.like_length(seconds)]
        like = np.where(np.isnan(like).all(axis=0), 0.0, like)  # what no real recording could be measured by is typical
        centre = np.nanmedian(like, axis=0)
        spread = np.maximum(1.4826 * np.nanmedian(np.abs(like - centre), axis=0), 1e-9)
        return np.clip(np.nan_to_num((np.asarray(values, dtype=float) - centre) / spread), *self.limits)

    def joint(self, values: np.ndarray, seconds: float) -> float:
        """The weighted sum of standardised statistics, up = fake."""
        return float(self.weights @ self.standardised(values, seconds))

    def p_value(self, values: np.ndarray, seconds: float) -> float:
        """Conformal p-value of all evidence together: (1 + real recordings of like length whose sum is as high) /
        (1 + their number); small = fake."""
        like = self.sums[self.like_length(seconds)]
        return float((1 + np.sum(like >= self.joint(values, seconds))) / (1 + len(like)))

    def p_values(self, values: np.ndarray, seconds: float) -> dict[str, float]:
        """The same of each statistic by itself; 1 for one that could not be measured."""
        like = self.values[self.like_length(seconds)]
        counts = 1 + np.nansum(like >= np.asarray(values, dtype=float), axis=0)
        alone = np.where(np.isnan(values), 1.0, counts / (1 + np.sum(~np.isnan(like), axis=0)))
        return dict(zip(self.names, alone.tolist()))

    def joined_by(self, source: str, measured: Sequence[Measured], without: str) -> Evidence:
        """The same with further real recordings; the statistic `without` is forgotten of those that were there."""
        values = self.values.copy()
        values[:, self.names.index(without)] = np.nan
        return Evidence(self.student, np.concatenate([values, [each.values for each in measured]]),
                        np.concatenate([self.seconds, [each.seconds for each in measured]]),
                        [*self.sources, *[source] * len(measured)], dict(zip(self.names, self.weights)))

    def without(self, source: str) -> Evidence:
        """The same from all sources but one."""
        others = self.sources != source
        return Evidence(self.student, self.values[others], self.seconds[others], self.sources[others],
                        dict(zip(self.names, self.weights)))

    def false_alarms(self, alpha: float = 0.05) -> dict[str, float]:
        """Share of each source's real speech with p <= alpha where all other sources calibrate: the unit that new
        recordings come in is the source."""
        rates = {}
        for source in np.unique(self.sources):
            others, own = self.without(source), np.flatnonzero(self.sources == source)
            rates[str(source)] = float(np.mean([others.p_value(self.values[i], self.seconds[i]) <= alpha for i in own]))
        return rates

    def measure(self, audio: np.ndarray, rate_hz: int, pyramid: tuple[float, float]) -> Measured:
        """`measured` with this student."""
        return measured(audio, rate_hz, pyramid, self.student)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything as tensors without NaN; with `sheet`, `restored` is the inverse."""
        arrays = {"values": np.nan_to_num(self.values, nan=UNMEASURED), "seconds": self.seconds, "sums": self.sums,
                  "source": np.searchsorted(np.unique(self.sources), self.sources)}
        student = {f"student.{name}": value for name, value in self.student.state_dict().items()}
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()} | student

    def sheet(self) -> dict[str, object]:
        """What the tensors cannot say, as JSON."""
        return {"weights": dict(zip(self.names, self.weights.tolist())), "sources": np.unique(self.sources).tolist()}

    @classmethod
    def restored(cls, tensors: dict[str, torch.Tensor], sheet: dict[str, object]) -> Evidence:
        """From `tensors` and `sheet`. Raises KeyError, TypeError, ValueError, IndexError or RuntimeError where they do
        not fit."""
        student = TextureStudent()
        student.load_state_dict({name[8:]: value for name, value in tensors.items() if name.startswith("student.")})
        values = np.where((array := tensors["values"].numpy()) == UNMEASURED, np.nan, array)
        sources = np.array(sheet["sources"], dtype=str)[tensors["source"].numpy()]
        return cls(student.eval().requires_grad_(False), values, tensors["seconds"].numpy(), sources, sheet["weights"],
                   tensors["sums"].numpy())
