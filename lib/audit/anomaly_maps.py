"""Owns what is read out of anomaly maps: fixed colour limits, profiles over frequency, frame kinds and phone classes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from lib.data.channel import speech_bounds
from lib.data.packages import phone_labels
from lib.settings import RATE_HZ

PHONE_CLASSES: dict[str, tuple[str, ...]] = {
    # Labels of the msu_ru voice: a doubled consonant is palatalised; vowels differ by stress and place.
    "vowel": ("a", "aa", "ae", "ay", "e", "ee", "ei", "i", "ii", "ih", "o", "oo", "u", "uu", "uj", "ur", "y", "yy", "ur", "ax"),
    "stop": ("p", "pp", "b", "bb", "t", "tt", "d", "dd", "k", "kk", "g", "gg"),
    "fricative": ("f", "ff", "v", "vv", "s", "ss", "z", "zz", "sh", "zh", "sch", "h", "hh", "x", "xx"),
    "affricate": ("c", "ch"),
    "nasal": ("m", "mm", "n", "nn"),
    "liquid": ("l", "ll", "r", "rr", "j"),
    "silence": ("pau", "sil", "#"),
}
_CLASS_OF = {phone: name for name, phones in PHONE_CLASSES.items() for phone in phones}


def map_limits(detector, clips: list[tuple[np.ndarray, np.ndarray]], kind: str | None = None) -> tuple[float, float]:
    """Colour limits for every map of a detector: median and 99.9 % quantile of active cells of bona fide clips."""
    return detector.colour_limits(clips, kind)


def gallery(study, experiment: str, number: int = 0) -> pd.DataFrame:
    """Bona fide test clip `number` of an experiment and everything that was made from it, the real one first."""
    table = study.test(experiment)
    table = table[table[experiment] == "test"]
    real = table[table.role == "bonafide"]
    parent = real.iloc[number % len(real)]
    return pd.concat([real[real.clip_id == parent.clip_id], table[table.parent == parent.clip_id]])


def explanations(study, detector, experiment: str, limit: int, roles: tuple[str, ...] = ("bonafide", "copysynth")) -> Iterator:
    """(row of the clip table, explanation, prepared audio) of the first `limit` bona fide test clips and their copies."""
    table = study.test(experiment)
    table = table[(table[experiment] == "test") & table.role.isin(roles)]
    parents = set(table[table.role == "bonafide"].clip_id.head(limit))
    table = table[table.clip_id.isin(parents) | table.parent.isin(parents)]
    for row, clip in zip(table.itertuples(), study.prepared(table)):
        yield row, detector.explain_prepared(*clip), clip[0]


def band_profiles(study, detector, experiment: str, limit: int = 24, bands: int = 24) -> pd.DataFrame:
    """Mean map over active frames in frequency bands, one row a clip and band: `generator, clip_id, hertz, anomaly`."""
    rows = []
    for clip, explanation, _ in explanations(study, detector, experiment, limit):
        line = explanation.map[:, explanation.active].mean(1)
        for part, hertz in zip(np.array_split(line, bands), np.array_split(explanation.row_hz, bands)):
            rows.append((clip.generator or "bona fide", clip.clip_id, round(float(hertz.mean())), float(part.mean())))
    return pd.DataFrame(rows, columns=["generator", "clip_id", "hertz", "anomaly"])


def frame_kinds(study, detector, experiment: str, limit: int = 24) -> pd.DataFrame:
    """Mean map by what a frame is, one row a clip and kind: onset (the level rises by
    6 dB within 40 ms), voiced or unvoiced (more energy below or above 1 kHz): `generator, clip_id, frame, anomaly`."""
    rows = []
    for clip, explanation, _ in explanations(study, detector, experiment, limit):
        level = np.exp(2 * (explanation.image[0] * 1.8 - 5.5))  # back from log-magnitude to power
        low = explanation.row_hz < 1000
        energy = 10 * np.log10(level.sum(0) + 1e-12)
        back = max(1, round(0.04 / explanation.hop_s))
        rise = energy - np.concatenate([energy[:1].repeat(back), energy[:-back]])
        voiced = level[low].sum(0) > level[~low].sum(0)
        line = explanation.map.mean(0)
        masks = {"onset": explanation.active & (rise > 6)}
        masks["voiced"] = explanation.active & ~masks["onset"] & voiced
        masks["unvoiced"] = explanation.active & ~masks["onset"] & ~voiced
        name = clip.generator or "bona fide"
        rows += [(name, clip.clip_id, kind, float(line[mask].mean())) for kind, mask in masks.items() if mask.any()]
    return pd.DataFrame(rows, columns=["generator", "clip_id", "frame", "anomaly"])


def phone_table(study, detector, experiment: str, limit: int = 24) -> pd.DataFrame:
    """Mean map within each class of phones, one row a clip and class: `generator, clip_id, class, anomaly`.

    Only clips of the corpus with phone labels count. A clip is a crop that begins at the recording's first active frame,
    and the channel trims again, so label times are shifted by both.
    """
    from lib.data.audio import read_audio
    from lib.data.clips import crop_start
    from lib.data.packages import EMBEDDED, VOICES, package_root
    from lib.paths import DATA

    rows, shifts = [], {}
    for clip, explanation, _ in explanations(study, detector, experiment, limit):
        if clip.corpus != "festvox-ru":
            continue
        stem = clip.source.removesuffix(".wav")
        if stem not in shifts:
            whole, _ = read_audio(package_root(EMBEDDED[0]) / VOICES / "wav" / f"{stem}.wav", strict=False)
            shifts[stem] = crop_start(whole) / RATE_HZ, phone_labels(stem)
        crop_s, labels = shifts[stem]
        audio, _ = read_audio(DATA / clip.path, strict=False)
        trim_s = speech_bounds(audio, study.settings.channel)[0] / RATE_HZ
        times = np.arange(explanation.map.shape[1]) * explanation.hop_s + trim_s + crop_s
        ends = np.array([end for _, end, _ in labels])
        index = np.minimum(np.searchsorted(ends, times), len(labels) - 1)
        classes = np.array([_CLASS_OF.get(labels[i][2], "other") for i in index])
        line = explanation.map.mean(0)
        rows += [(clip.generator or "bona fide", clip.clip_id, name, float(line[classes == name].mean())) for name in np.unique(classes)]
    return pd.DataFrame(rows, columns=["generator", "clip_id", "class", "anomaly"])


