"""Owns the audit of shortcuts (notebook 11): what tells recordings apart and is not synthesis."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.signal
import scipy.stats

from lib import seeds
from lib.data.audio import read_audio
from lib.data.channel import apply_channel, frame_levels
from lib.data.degradations import (
    Degradation,
    coded,
    first,
    gain,
    levelled,
    low_passed,
    noise,
    offset,
    pauses_cut,
    pauses_muted,
    resampled,
    silence,
    tilted,
    untouched,
)
from lib.detector import Detector
from lib.evaluate import metrics
from lib.paths import DATA, clocked
from lib.settings import RATE_HZ

if TYPE_CHECKING:
    from lib.study import Study


def trivial_auc(bonafide_numbers: pd.DataFrame, spoof_numbers: pd.DataFrame) -> pd.DataFrame:
    """What each trivial number alone tells: AUC of "higher = fake", and the better of both directions.

    The second takes its direction from the data it is measured on: a ceiling of the shortcut, and above 0.5 even for
    pure chance, on average by 0.23 sqrt(1 / bona fide clips + 1 / spoof clips). Raises MetricError.
    """
    auc = {name: metrics.area_under_curve(-bonafide_numbers[name], -spoof_numbers[name]) for name in bonafide_numbers}
    ceiling = {name: max(value, 1 - value) for name, value in auc.items()}
    return pd.DataFrame({"auc_higher_is_fake": auc, "auc_either_direction_ceiling": ceiling}).rename_axis("number")


def nearest_voices(clips: pd.DataFrame, each: int = 8) -> pd.DataFrame:
    """For every bona fide voice of the many-voice experiment the nearest one of another split: `voice, split, nearest,
    its split, cosine, own`, nearest pair first.

    cosine: of the voices' mean embeddings over `each` clips, by a speaker encoder that knows none of them (Resemblyzer,
    after Wan et al. 2018); own: of the embeddings of two halves of the voice's own clips, what one speaker looks like.
    Without that package (the extra `speakers`) a line says so and the table is empty.
    """
    names = ["voice", "split", "nearest", "its split", "cosine", "own"]
    try:
        from resemblyzer import VoiceEncoder, preprocess_wav
    except ImportError as error:
        print(f"voices are not compared: {error}; pip install -e '.[speakers]'")
        return pd.DataFrame(columns=names)
    encoder, halves, split_of = VoiceEncoder("cpu", verbose=False), {}, {}
    for voice, part in clips[(clips.role == "bonafide") & (clips.multi != "")].groupby("speaker"):
        audios = [preprocess_wav(read_audio(DATA / path, strict=False)[0]) for path in part.path.head(each)]
        embedded = np.stack([encoder.embed_utterance(audio) for audio in audios])
        halves[voice], split_of[voice] = [embedded[first::2].mean(0) for first in (0, 1) if first < len(embedded)], part
    unit = {voice: np.mean(parts, axis=0) / np.linalg.norm(np.mean(parts, axis=0)) for voice, parts in halves.items()}
    rows = []
    for voice, part in split_of.items():
        split = part.multi.iloc[0]
        others = [other for other, theirs in split_of.items() if theirs.multi.iloc[0] != split]
        near = max(others, key=lambda other: unit[voice] @ unit[other])
        first, second = halves[voice][0], halves[voice][-1]
        own = first @ second / np.linalg.norm(first) / np.linalg.norm(second) if len(halves[voice]) > 1 else np.nan
        rows.append((voice, split, near, split_of[near].multi.iloc[0], float(unit[voice] @ unit[near]), own))
    return pd.DataFrame(rows, columns=names).sort_values("cosine", ascending=False, ignore_index=True)


def transplanted(audio: np.ndarray, other: np.ndarray, taps: int = 511) -> np.ndarray:
    """`audio` (samples,) with the recording chain of `other`: its long-term spectrum, in thirds of an octave, its level
    and the noise floor of its pauses."""
    (hertz, own), (_, others) = _thirds(audio), _thirds(other)
    gains = np.clip(np.pad(np.sqrt(others / own), 1, mode="edge"), 0.03, 30.0)
    shape = scipy.signal.firwin2(taps, [0.0, *hertz, RATE_HZ / 2], gains, fs=RATE_HZ)
    moved = scipy.signal.oaconvolve(audio, shape, mode="same")
    moved *= np.sqrt(np.mean(other.astype(np.float64) ** 2) / (np.mean(moved**2) + 1e-20))
    floors = [10 ** (np.quantile(frame_levels(each), 0.05) / 10) for each in (moved, other)]
    hiss = seeds.stream(0, "floor", len(audio)).standard_normal(len(audio)) * np.sqrt(max(0.0, floors[1] - floors[0]))
    return (moved + hiss).astype(np.float32)


def _thirds(audio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centre frequencies of thirds of an octave from 100 Hz to 7.2 kHz, and the mean power in each."""
    hertz, power = scipy.signal.welch(audio.astype(np.float64), RATE_HZ, nperseg=1024)
    centres, means = 100 * 2 ** (np.arange(19) / 3), []
    for centre in centres:
        mask = (hertz >= centre * 2 ** (-1 / 6)) & (hertz < centre * 2 ** (1 / 6))
        means.append(power[mask].mean() if mask.any() else np.interp(centre, hertz, power))
    return centres, np.array(means) + 1e-14


INTERVENTIONS: dict[str, dict[str, Degradation]] = {
    "none": {"untouched": untouched},
    "leading silence": {"0.7 s of silence before": partial(silence, seconds=0.7), "pauses cut": pauses_cut},
    "loudness": {"gain -20 dB": partial(gain, db=-20), "equal level": levelled},
    "DC": {"DC offset 0.05": partial(offset, level=0.05)},
    "bandwidth": {"low-pass 7 kHz": partial(low_passed, edge_hz=7000),
                  "low-pass 5 kHz": partial(low_passed, edge_hz=5000)},
    "equaliser": {"tilt +1 dB/octave": partial(tilted, db_per_octave=1.0),
                  "tilt -1 dB/octave": partial(tilted, db_per_octave=-1.0)},
    "sample rate": {f"{rate / 1000:g} kHz and back": partial(resampled, rate_hz=rate)
                    for rate in (44100, 22050, 11025)},
    "codec": {"G.722": coded("g722", "g722"), "Opus 24 kb/s": coded("libopus", "ogg", kbps=24),
              **{f"Vorbis {kbps} kb/s": coded("libvorbis", "ogg", kbps=kbps) for kbps in (80, 48)},
              "MP3 64 kb/s": coded("libmp3lame", "mp3", kbps=64)},
    "length": {"first 2 s": partial(first, seconds=2.0)},
    "noise floor": {"pauses muted": pauses_muted, "noise floor 40 dB": partial(noise, snr_db=40),
                    "noise floor 30 dB": partial(noise, snr_db=30)},
}
"""Confounds of notebook 11, each neutralised or injected: what tells recording chains apart and is not synthesis."""


MARGIN = 0.3
"""Shift of real speech that does not matter, in its standard deviations: an AUC of 0.58 at most."""


def equivalence(differences: np.ndarray, margin: float) -> tuple[metrics.Interval, float]:
    """Mean of paired differences (clip,) with its 90 % interval, and the p-value of "it lies outside +-margin" by two
    one-sided t tests (Schuirmann 1987). Where p <= 0.05 the interval lies inside: the difference does not matter.

    Raises ValueError for fewer than 2 differences or a margin of 0."""
    values = np.asarray(differences, dtype=np.float64)
    if len(values) < 2 or margin <= 0:
        raise ValueError(f"expected at least 2 differences and a margin above 0, found {len(values)} and {margin}")
    mean, freedom = float(values.mean()), len(values) - 1
    error = max(values.std(ddof=1) / np.sqrt(len(values)), 1e-300)
    half = scipy.stats.t.ppf(0.95, freedom) * error
    p_value = scipy.stats.t.sf((margin - abs(mean)) / error, freedom)
    return metrics.Interval(mean, mean - half, mean + half), float(p_value)


def intervention_table(scores: pd.DataFrame, interventions: dict[str, dict[str, Degradation]]) -> pd.DataFrame:
    """What each intervention does, from `degraded_scores`: one row an intervention, against the row of `untouched`.

    `shift`: mean change of a real clip's anomaly, in standard deviations of untouched real speech, with its 90 %
    interval and `p (within margin)` of an equivalence test on the same clips (MARGIN); `real told
    apart`, the AUC of touched against untouched real speech (0.5: the detector does not hear it); and the mean AUC over
    generators where both kinds are touched, real speech alone, or fakes alone.
    """
    group_of = {name: group for group, names in interventions.items() for name in names}
    real = scores[scores.role == "bonafide"].pivot(index="clip_id", columns="condition", values="anomaly").dropna()
    fakes = {name: [each.anomaly.to_numpy() for _, each in part.groupby("generator", sort=False)]
             for name, part in scores[scores.role != "bonafide"].groupby("condition", sort=False)}
    base, rows = scores.condition.iloc[0], []

    def mean(anomaly: pd.Series, others: list[np.ndarray]) -> float:
        return float(np.mean([metrics.area_under_curve(-anomaly, -other) for other in others]))

    for name in scores.condition.unique():
        shift, p_value = equivalence((real[name] - real[base]) / real[base].std(ddof=0), MARGIN)
        rows.append({"confound": group_of[name], "intervention": name, "shift": shift.value, "shift low": shift.low,
                     "shift high": shift.high, "p (within margin)": p_value,
                     "real told apart": metrics.area_under_curve(-real[base], -real[name]),
                     "AUC, both": mean(real[name], fakes[name]), "AUC, real only": mean(real[name], fakes[base]),
                     "AUC, fakes only": mean(real[base], fakes[name])})
    return pd.DataFrame(rows)


@clocked("scoring")
def swapped_scores(study: Study, detector: Detector, clips: pd.DataFrame, limit: int = 20) -> pd.DataFrame:
    """Anomaly of real clips and of their copies, each with its own recording chain and with the other's: `generator,
    parent, speech, channel, anomaly`.

    The real clip goes through 22.05 kHz and back, a vocoder's rate, and takes the long-term spectrum, level and noise
    floor of its copy (`transplanted`); the copy takes those of its real parent. Words, voice and synthesis stay.
    """
    reals = clips[clips.role == "bonafide"].head(limit)
    audio_of = {clip.clip_id: read_audio(DATA / clip.path, strict=False)[0] for clip in reals.itertuples()}
    copies = clips[(clips.role == "copysynth") & clips.parent.isin(audio_of)]

    def scored(audio: np.ndarray) -> float:
        return detector.score_prepared(*apply_channel(audio, study.settings.channel))

    own = dict(zip(audio_of, study.side_by_side(scored, audio_of.values())))

    def swapped(copy: tuple[str, str]) -> tuple[float, ...]:
        real, fake = audio_of[copy[0]], read_audio(DATA / copy[1], strict=False)[0]
        there = transplanted(resampled(real, seeds.stream(0, "swap"), 22050), fake)
        return own[copy[0]], scored(there), scored(fake), scored(transplanted(fake, real))

    cells = ("real", "own"), ("real", "of its copy"), ("copy", "own"), ("copy", "of its real parent")
    pairs, rows = list(zip(copies.parent, copies.path)), []
    for generator, (parent, _), values in zip(copies.generator, pairs, study.side_by_side(swapped, pairs)):
        rows += [(generator, parent, *cell, value) for cell, value in zip(cells, values)]
    return pd.DataFrame(rows, columns=["generator", "parent", "speech", "channel", "anomaly"])


def swap_table(scores: pd.DataFrame, resamples: int) -> pd.DataFrame:
    """Medians of `swapped_scores` in standard deviations about the median of real speech with its own chain, with 95 %
    intervals over parents: one row a generator, speech and channel; and the cell's AUC against that real speech."""
    names = ["generator", "speech", "channel"]
    own = scores[(scores.speech == "real") & (scores.channel == "own")].drop_duplicates("parent").anomaly
    rows = []
    for keys, part in scores.assign(z=(scores.anomaly - own.median()) / own.std()).groupby(names, sort=False):
        values = part.z.to_numpy()
        picks = seeds.stream(0, "swap", *keys).integers(len(values), size=(max(100, resamples), len(values)))
        low, high = np.quantile(np.median(values[picks], axis=1), [0.025, 0.975])
        rows.append(dict(zip(names, keys)) | {
            "median": float(np.median(values)), "low": float(low), "high": float(high),
            "AUC against real": metrics.area_under_curve(-own.to_numpy(), -part.anomaly.to_numpy())})
    return pd.DataFrame(rows)
