"""Owns the audit of shortcuts (notebook 11): what tells recordings apart and is not synthesis."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
import scipy.signal

from lib import seeds
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
from lib.settings import RATE_HZ
from lib.study import Study


def trivial_auc(bonafide_numbers: pd.DataFrame, spoof_numbers: pd.DataFrame) -> pd.DataFrame:
    """What each trivial number alone tells: AUC of "higher = fake", and the better of both directions.

    The second takes its direction from the data it is measured on: a ceiling of the shortcut, and above 0.5 even for
    pure chance, on average by 0.23 sqrt(1 / bona fide clips + 1 / spoof clips). Raises MetricError.
    """
    auc = {name: metrics.area_under_curve(-bonafide_numbers[name], -spoof_numbers[name]) for name in bonafide_numbers}
    ceiling = {name: max(value, 1 - value) for name, value in auc.items()}
    return pd.DataFrame({"auc_higher_is_fake": auc, "auc_either_direction_ceiling": ceiling}).rename_axis("number")


def transplanted(audio: np.ndarray, other: np.ndarray, taps: int = 511) -> np.ndarray:
    """`audio` (samples,) with the recording chain of `other`: its long-term spectrum, in thirds of an octave, its level and the
    noise floor of its pauses."""
    power = [_thirds(one) for one in (audio, other)]
    gain_at = np.sqrt(power[1][1] / power[0][1])
    hertz = np.concatenate([[0.0], power[0][0], [RATE_HZ / 2]])
    shape = scipy.signal.firwin2(taps, hertz, np.clip(np.concatenate([gain_at[:1], gain_at, gain_at[-1:]]), 0.03, 30.0), fs=RATE_HZ)
    moved = scipy.signal.oaconvolve(audio, shape, mode="same")
    moved *= np.sqrt(np.mean(other.astype(np.float64) ** 2) / (np.mean(moved**2) + 1e-20))
    floors = [10 ** (np.quantile(frame_levels(one), 0.05) / 10) for one in (moved, other)]
    hiss = seeds.stream(0, "floor", len(audio)).standard_normal(len(audio)) * np.sqrt(max(0.0, floors[1] - floors[0]))
    return (moved + hiss).astype(np.float32)


def _thirds(audio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centre frequencies of thirds of an octave from 100 Hz to 7.2 kHz, and the mean power in each."""
    hertz, power = scipy.signal.welch(audio.astype(np.float64), RATE_HZ, nperseg=1024)
    centres = 100 * 2 ** (np.arange(19) / 3)
    around = [(hertz >= one * 2 ** (-1 / 6)) & (hertz < one * 2 ** (1 / 6)) for one in centres]
    means = [power[mask].mean() if mask.any() else np.interp(one, hertz, power) for one, mask in zip(centres, around)]
    return centres, np.array(means) + 1e-14


INTERVENTIONS: dict[str, dict[str, Degradation]] = {
    "none": {"untouched": untouched},
    "leading silence": {"0.7 s of silence before": partial(silence, seconds=0.7), "pauses cut": pauses_cut},
    "loudness": {"gain -20 dB": partial(gain, db=-20), "equal level": levelled},
    "DC": {"DC offset 0.05": partial(offset, level=0.05)},
    "bandwidth": {"low-pass 7 kHz": partial(low_passed, edge_hz=7000), "low-pass 5 kHz": partial(low_passed, edge_hz=5000)},
    "equaliser": {"tilt +1 dB/octave": partial(tilted, db_per_octave=1.0), "tilt -1 dB/octave": partial(tilted, db_per_octave=-1.0)},
    "sample rate": {f"{rate / 1000:g} kHz and back": partial(resampled, rate_hz=rate) for rate in (44100, 22050, 11025)},
    "codec": {"G.722": coded("g722", "g722"), "Opus 24 kb/s": coded("libopus", "ogg", kbps=24),
              "Vorbis 80 kb/s": coded("libvorbis", "ogg", kbps=80), "Vorbis 48 kb/s": coded("libvorbis", "ogg", kbps=48),
              "MP3 64 kb/s": coded("libmp3lame", "mp3", kbps=64)},
    "length": {"first 2 s": partial(first, seconds=2.0)},
    "noise floor": {"pauses muted": pauses_muted, "noise floor 40 dB": partial(noise, snr_db=40),
                    "noise floor 30 dB": partial(noise, snr_db=30)},
}
"""Confounds of notebook 11, each neutralised or injected: what tells recording chains apart and is not synthesis."""


def intervention_table(scores: pd.DataFrame, interventions: dict[str, dict[str, Degradation]]) -> pd.DataFrame:
    """What each intervention does, from `degraded_scores`: one row an intervention.

    `shift` of the median anomaly of real speech in standard deviations of untouched real speech; `real told apart`, the AUC of
    touched against untouched real speech (0.5: the detector does not hear it); and the mean AUC over generators where both kinds
    are touched, real speech alone, or fakes alone. All compare with the row of `untouched`.
    """
    group_of = {name: group for group, names in interventions.items() for name in names}
    real = {name: part.anomaly.to_numpy() for name, part in scores[scores.role == "bonafide"].groupby("condition", sort=False)}
    fakes = {name: [one.anomaly.to_numpy() for _, one in part.groupby("generator", sort=False)]
             for name, part in scores[scores.role != "bonafide"].groupby("condition", sort=False)}
    base = next(iter(real))
    rows = []
    for name in real:
        mean = lambda one, others: float(np.mean([metrics.area_under_curve(-one, -other) for other in others]))  # noqa: E731
        rows.append({"confound": group_of[name], "intervention": name,
                     "shift": (np.median(real[name]) - np.median(real[base])) / real[base].std(),
                     "real told apart": metrics.area_under_curve(-real[base], -real[name]), "AUC, both": mean(real[name], fakes[name]),
                     "AUC, real only": mean(real[name], fakes[base]), "AUC, fakes only": mean(real[base], fakes[name])})
    return pd.DataFrame(rows)


def swapped_scores(study: Study, detector: Detector, clips: pd.DataFrame, limit: int = 20) -> pd.DataFrame:
    """Anomaly of real clips and of their copies, each with its own recording chain and with the other's: `generator, parent,
    speech, channel, anomaly`.

    The real clip goes through 22.05 kHz and back, a vocoder's rate, and takes the long-term spectrum, level and noise floor of
    its copy (`transplanted`); the copy takes those of its real parent. Words, voice and synthesis stay where they were.
    """
    from lib.data.audio import read_audio
    from lib.paths import DATA

    reals = clips[clips.role == "bonafide"].head(limit)
    audio_of = {clip.clip_id: read_audio(DATA / clip.path, strict=False)[0] for clip in reals.itertuples()}
    copies = clips[(clips.role == "copysynth") & clips.parent.isin(audio_of)]

    def scored(audio: np.ndarray) -> float:
        return detector.score_prepared(*apply_channel(audio, study.settings.channel))

    own = dict(zip(audio_of, study.side_by_side(scored, audio_of.values())))

    def swapped(copy: tuple[str, str]) -> tuple[float, float, float]:
        real, fake = audio_of[copy[0]], read_audio(DATA / copy[1], strict=False)[0]
        there = transplanted(resampled(real, seeds.stream(0, "swap"), 22050), fake)
        return scored(there), scored(fake), scored(transplanted(fake, real))

    rows = []
    pairs = list(zip(copies.parent, copies.path))
    for generator, (parent, _), found in zip(copies.generator, pairs, study.side_by_side(swapped, pairs)):
        values = (("real", "own", own[parent]), ("real", "of its copy", found[0]), ("copy", "own", found[1]),
                  ("copy", "of its real parent", found[2]))
        rows += [(generator, parent, speech, channel, value) for speech, channel, value in values]
    return pd.DataFrame(rows, columns=["generator", "parent", "speech", "channel", "anomaly"])


def swap_table(scores: pd.DataFrame, resamples: int) -> pd.DataFrame:
    """Medians of `swapped_scores` in standard deviations about the median of real speech with its own chain, with 95 % intervals
    over parents: one row a generator, speech and channel; and the AUC of that cell against real speech with its own chain."""
    own = scores[(scores.speech == "real") & (scores.channel == "own")].drop_duplicates("parent").set_index("parent").anomaly
    z = (scores.anomaly - own.median()) / own.std()
    rows = []
    for keys, part in scores.assign(z=z).groupby(["generator", "speech", "channel"], sort=False):
        values = part.z.to_numpy()
        picks = seeds.stream(0, "swap", *keys).integers(len(values), size=(max(100, resamples), len(values)))
        low, high = np.quantile(np.median(values[picks], axis=1), [0.025, 0.975])
        auc = metrics.area_under_curve(-own.to_numpy(), -part.anomaly.to_numpy())
        rows.append(dict(zip(("generator", "speech", "channel"), keys)) | {
            "median": float(np.median(values)), "low": float(low), "high": float(high), "AUC against real": auc})
    return pd.DataFrame(rows)
