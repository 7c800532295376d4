"""Owns constant lines: tones that stand still in a recording at multiples of a frame rate of the network that made it.

A network that makes waveforms climbs from a frame rate to samples; every stage leaves faint lines at multiples of its
rate, whoever speaks. Real speech has none, but electronics do: mains hum (50, 60 Hz), USB frames (1000 Hz), converters
(375 Hz), the bands of an MP3 (44100 / 32 Hz). Lines on those frequencies are left out. Nothing is fitted here: each
spacing is compared with its own neighbours.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import scipy.fft
from numpy.lib.stride_tricks import sliding_window_view
from scipy.ndimage import uniform_filter1d

# Sample rate / hop of usual networks, and their next stages up to four times that rate. 60 Hz is left to the mains.
SPACINGS_HZ = (50.0, 62.5, 75.0, 80.0, 22050 / 256, 93.75, 100.0, 125.0, 150.0, 160.0, 22050 / 128, 187.5, 200.0, 250.0,
               300.0, 320.0, 22050 / 64)
DISTURBANCES_HZ = (1000.0, 375.0, 44100 / 32)  # their multiples are never counted (within 1.5 Hz)
MAINS_HZ = (50.0, 60.0)  # their multiples are not counted below MAINS_TOP_HZ (within 0.5 Hz): a grid is never exact
MAINS_TOP_HZ, LOW_HZ, TOP_HZ = 1500.0, 60.0, 11700.0
STRONGEST = 8.0  # a line counts for no more than this many times its surroundings: many lines, not one loud tone
SHORTEST_S, EDGE_DB = 0.4, 80.0
NEIGHBOURS = np.concatenate([[0.0], -np.linspace(0.012, 0.06, 16), np.linspace(0.012, 0.06, 16)])
BLIND_HZ, BLIND_STEP_HZ = (45.0, 215.0), 0.25


@dataclass(frozen=True)
class Lines:
    """What was found: `strength` in deviations of neighbouring spacings, up = fake; spacing None: nothing to hear."""

    strength: float
    spacing_hz: float | None
    count: int  # lines that stand out three times or more
    tested: int  # lines that were looked at
    top_hz: float  # the highest that stands out

    def sentence(self) -> str:
        if self.spacing_hz is None:
            return "too little sound to look for constant lines"
        found = f"lines every {self.spacing_hz:.1f} Hz up to {self.top_hz / 1000:.1f} kHz"
        return f"{found} ({self.count} of {self.tested} stand out)"


NOTHING = Lines(0.0, None, 0, 0, 0.0)


def whitened_spectrum(audio: np.ndarray, rate_hz: int) -> tuple[np.ndarray, float, float]:
    """Power over its own surroundings, (samples,) -> (bins,) with mean 1; the width of a bin and the band edge in Hz.

    In frames of 64 ms every cell is limited to the level around it (300 Hz): voice and silence weigh alike. Then the
    whole recording is transformed at once, so a tone that keeps its phase gains with length, and speech does not. Bins
    are divided by the mean over 40 Hz. Above the edge, EDGE_DB below the strongest, a resampler or codec left nothing.
    Raises ValueError for audio that is not one finite channel of SHORTEST_S or more.
    """
    if audio.ndim != 1 or len(audio) < SHORTEST_S * rate_hz or not np.isfinite(audio).all():
        raise ValueError(f"expected finite audio (samples,) of {SHORTEST_S} s at {rate_hz} Hz, found {audio.shape}")
    length = 2 * (hop := round(0.032 * rate_hz))
    window = np.sin(np.pi * (np.arange(length) + 0.5) / length).astype(np.float32)
    padded = np.pad(audio.astype(np.float32), (hop, 2 * hop - len(audio) % hop))
    frames = sliding_window_view(padded, length)[::hop]
    cells = scipy.fft.rfft(frames * window, axis=1)
    power = cells.real**2 + cells.imag**2
    mean_power = power.mean(axis=0)
    reached = np.flatnonzero(mean_power > mean_power.max() * 10 ** (-EDGE_DB / 10)).max(initial=0) * rate_hz / length
    edge_hz = float(250 * np.round(reached / 250))  # a coarse grid keeps the tables of spacings few
    around = uniform_filter1d(power, round(300 * length / rate_hz) | 1, axis=1, mode="nearest")
    gain = 1 / np.sqrt(np.maximum(np.maximum(power, around), 1e-9 * length))
    gain[np.mean(frames**2, axis=1) < 1e-9] = 0  # digital silence stays silent
    limited = scipy.fft.irfft(cells * gain, length, axis=1) * window
    whole = (limited[:-1, hop:] + limited[1:, :hop]).ravel()[: len(audio)]
    size = scipy.fft.next_fast_len(2 * len(audio), real=True)
    spectrum = scipy.fft.rfft(whole * np.hanning(len(whole)).astype(np.float32), size)
    power = spectrum.real**2 + spectrum.imag**2
    bin_hz = rate_hz / size
    return power / (uniform_filter1d(power, round(40 / bin_hz) | 1, mode="nearest") + 1e-20), bin_hz, edge_hz


@functools.lru_cache(maxsize=256)
def line_frequencies(spacing_hz: float, top_hz: float) -> np.ndarray:
    """Multiples of a spacing between two frequencies without those that electronics leave, (lines,) in Hz."""
    lines = spacing_hz * np.arange(np.ceil(LOW_HZ / spacing_hz), np.floor(top_hz / spacing_hz) + 1)
    return lines[~disturbed(lines)]


def disturbed(frequencies_hz: np.ndarray) -> np.ndarray:
    """Whether electronics are known to leave a tone there, (any,) -> the same."""

    def near(comb_hz: float, width_hz: float | np.ndarray) -> np.ndarray:
        return np.abs(frequencies_hz - comb_hz * np.round(frequencies_hz / comb_hz)) < width_hz

    drift_hz = np.maximum(0.5, 4e-4 * frequencies_hz)
    mains = np.any([near(hz, drift_hz) for hz in MAINS_HZ], axis=0) & (frequencies_hz < MAINS_TOP_HZ)
    return mains | np.any([near(hz, 1.5) for hz in DISTURBANCES_HZ], axis=0)


def comb_strength(power: np.ndarray, bin_hz: float, spacing_hz: float, top_hz: float) -> float:
    """How far the lines of a spacing stand above those of 32 spacings 1.2 to 6 % beside it, in their deviations.

    C(p) = mean over k of min(max of the two bins about k p, 8);  (C(p) - mean C(p')) / (deviation C(p') sqrt(33 / 32)).
    """
    if len(lines := line_frequencies(spacing_hz, top_hz)) < 6:
        return 0.0
    at = np.minimum((lines * (1 + NEIGHBOURS[:, None]) / bin_hz).astype(np.intp), len(power) - 2)
    means = np.minimum(np.maximum(power[at], power[at + 1]), STRONGEST).mean(axis=1)
    beside = means[1:]
    return float((means[0] - beside.mean()) / (beside.std(ddof=1) * np.sqrt(1 + 1 / len(beside)) + 1e-3))


def constant_lines(audio: np.ndarray, rate_hz: int, spacings_hz: tuple[float, ...] = SPACINGS_HZ) -> Lines:
    """The strongest comb among usual frame rates, from 60 Hz to the recording's own Nyquist frequency or 11.7 kHz."""
    if not audible(audio, rate_hz):
        return NOTHING
    power, bin_hz, edge_hz = whitened_spectrum(audio, rate_hz)
    top_hz = min(TOP_HZ, 0.975 * rate_hz / 2, edge_hz)
    strength, spacing_hz = max((comb_strength(power, bin_hz, hz, top_hz), hz) for hz in spacings_hz)
    return _found(power, bin_hz, spacing_hz, top_hz, strength)


def blind_lines(audio: np.ndarray, rate_hz: int, candidates: int = 8) -> Lines:
    """The strongest comb of any spacing from 45 to 215 Hz, with no list of rates: a coarse scan, then a closer look.

    The scan takes the highest bin of each 0.25 Hz, 300 Hz to 7.8 kHz, without the mains (50, 60, 90, 120, 180 Hz).
    """
    if not audible(audio, rate_hz):
        return NOTHING
    power, bin_hz, edge_hz = whitened_spectrum(audio, rate_hz)
    if (top_hz := min(7800.0, 0.975 * rate_hz / 2, edge_hz)) < 1000:
        return NOTHING
    centres = (np.arange(int(top_hz / BLIND_STEP_HZ)) + 0.5) * BLIND_STEP_HZ
    edges = ((centres - BLIND_STEP_HZ / 2) / bin_hz).astype(np.intp)
    cells = np.maximum.reduceat(np.minimum(power, STRONGEST), edges)
    cells[-1] = cells[-2]  # the last one reaches to the end
    cells -= uniform_filter1d(cells, round(40 / BLIND_STEP_HZ) | 1)
    cells[disturbed(centres)] = 0
    spacings = _blind_spacings(top_hz)
    sums, counts = np.zeros((2, len(spacings)), np.float32)
    for k in range(2, int(top_hz / BLIND_HZ[0]) + 1):
        first, last = np.searchsorted(spacings, [300 / k, top_hz / k * 0.9999])
        sums[first:last] += cells[(spacings[first:last] * (k / BLIND_STEP_HZ)).astype(np.int32)]
        counts[first:last] += 1
    scan = sums / np.sqrt(np.maximum(counts, 1))
    scan -= uniform_filter1d(scan, 501)
    near = 1 + np.linspace(-0.5, 0.5, 5) * BLIND_STEP_HZ / top_hz
    best = max((comb_strength(power, bin_hz, float(hz), top_hz), float(hz))
               for index in np.argpartition(scan, -candidates)[-candidates:] for hz in spacings[index] * near)
    return _found(power, bin_hz, best[1], top_hz, best[0])


@functools.lru_cache(maxsize=8)
def _blind_spacings(top_hz: float) -> np.ndarray:
    step = 1 + 0.8 * BLIND_STEP_HZ / top_hz
    spacings = BLIND_HZ[0] * step ** np.arange(int(np.log(BLIND_HZ[1] / BLIND_HZ[0]) / np.log(step)))
    mains = np.any([np.abs(spacings - hz) < 0.006 * hz for hz in (50, 60, 90, 120, 180)], axis=0)
    return spacings[~mains].astype(np.float32)


def audible(audio: np.ndarray, rate_hz: int) -> bool:
    """Whether there are SHORTEST_S of sound, half of them not digital silence."""
    return len(audio) >= SHORTEST_S * rate_hz and np.count_nonzero(audio) >= SHORTEST_S * rate_hz / 2


def _found(power: np.ndarray, bin_hz: float, spacing_hz: float, top_hz: float, strength: float) -> Lines:
    lines = line_frequencies(spacing_hz, top_hz)
    at = np.minimum((lines / bin_hz).astype(np.intp), len(power) - 2)
    out = lines[np.maximum(power[at], power[at + 1]) > 3]
    return Lines(strength, spacing_hz, len(out), len(lines), float(out.max(initial=0.0)))


@dataclass(frozen=True)
class Comb:
    """What is drawn of constant lines: the spectrum over its own surroundings, no more than STRONGEST."""

    hz: np.ndarray  # (cell,) the stretch in which the lines stand out most
    power: np.ndarray  # (cell,) the highest bin of each cell
    lines_hz: np.ndarray  # (line,) in that stretch
    beside_hz: np.ndarray  # (place,) from half a spacing below a line to half a spacing above it
    mean: np.ndarray  # (place,) the highest bin there, averaged over all lines


def comb_of(audio: np.ndarray, rate_hz: int, spacing_hz: float, cells: int = 900, places: int = 121) -> Comb:
    """The lines of a spacing in a recording (samples,). Raises ValueError where there is none or it is too short."""
    power, bin_hz, edge_hz = whitened_spectrum(audio, rate_hz)
    lines = line_frequencies(spacing_hz, min(TOP_HZ, 0.975 * rate_hz / 2, edge_hz) - spacing_hz)
    if not len(lines):
        raise ValueError(f"expected room for lines every {spacing_hz:g} Hz, found sound up to {edge_hz:g} Hz")

    def highest(low_hz: float, high_hz: float, count: int) -> np.ndarray:
        edges = (np.linspace(low_hz, high_hz, count + 1) / bin_hz).astype(np.intp)
        return np.minimum(np.maximum.reduceat(power[: edges[-1] + 1], edges[:-1]), STRONGEST)

    around = np.stack([highest(line - spacing_hz / 2, line + spacing_hz / 2, places) for line in lines])
    first = int(np.convolve(around[:, places // 2], np.ones(min(8, len(lines))), "valid").argmax())
    drawn = lines[first : first + 8]
    low_hz, high_hz = drawn[0] - spacing_hz / 2, drawn[-1] + spacing_hz / 2
    hz = low_hz + (np.arange(cells) + 0.5) / cells * (high_hz - low_hz)
    beside_hz = (np.arange(places) - places // 2) * spacing_hz / places
    return Comb(hz, highest(low_hz, high_hz, cells), drawn, beside_hz, around.mean(axis=0))
