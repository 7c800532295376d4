"""Owns operating points set on real speech alone: p-values whose unit is the speaker, what they do to new voices and new
sources, and what a few minutes of real speech from the new source repair.

Anomalies everywhere, up = fake. Clips of one speaker are not independent of each other, so calibration clips and a new voice's clip
are not exchangeable; speakers are. Constructions (`p_values`), of which the first assumes most and the last least:

- clips: (1 + number of calibration clips at least as anomalous) / (clips + 1); valid where the clip's own speaker is in the
  calibration (split conformal; Bates et al. 2023);
- speakers: the same with every speaker one vote, spread over his or her clips: "CDF pooling" of Dunn, Wasserman & Ramdas (JASA
  2023, Distribution-Free Prediction Sets for Two-Layer Hierarchical Models), asymptotically valid in the number of speakers;
- speakers, guaranteed: twice that, at most 1. It is the mean over all ways to take one clip a speaker, each of which gives a
  valid p-value, and twice a mean of p-values is valid (their "repeated subsampling"; Vovk & Wang 2020). With k speakers no
  p-value is below 2 / (k + 1), so a strict level needs many speakers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lib import seeds
from lib.detector import Detector
from lib.evaluate import metrics
from lib.model.scaling import PROFILE_SCORES, Typicality

if TYPE_CHECKING:
    from lib.study import Study

LEVELS = (0.01, 0.05, 0.10)
CONSTRUCTIONS = ("clips", "speakers", "speakers, guaranteed")
MINUTES = (0, 1, 2, 5)


def p_values(calibration: np.ndarray, speakers: Iterable[str], anomalies: np.ndarray, construction: str = "speakers") -> np.ndarray:
    """p-values in (0, 1] of "real speech like the calibration's", one an anomaly, small = fake.

    calibration: anomalies (clip,) of bona fide clips that no fit has seen; speakers: who speaks in each. Raises MetricError for
    empty or non-finite anomalies, ValueError for an unknown construction or a speaker list that does not fit.
    """
    if construction not in CONSTRUCTIONS:
        raise ValueError(f"construction {construction!r} is not one of {', '.join(CONSTRUCTIONS)}")
    calibration, names = np.asarray(calibration, dtype=np.float64), np.asarray(list(speakers), dtype=str)
    if names.shape != calibration.shape:
        raise ValueError(f"expected a speaker for each of {len(calibration)} calibration clips, found {len(names)}")
    if construction == "clips":
        return metrics.conformal_p_values(-calibration, -np.asarray(anomalies))
    groups = [calibration[names == name] for name in np.unique(names)]
    # A speaker's share of clips at least as anomalous: the conformal p-value without its "+ 1".
    shares = [(metrics.conformal_p_values(-group, -np.asarray(anomalies)) * (len(group) + 1) - 1) / len(group) for group in groups]
    pooled = (1 + np.sum(shares, axis=0)) / (len(groups) + 1)
    return pooled if construction == "speakers" else np.minimum(1.0, 2 * pooled)


def smallest(calibration: np.ndarray, speakers: Iterable[str], construction: str) -> float:
    """The least p-value that a construction can give: levels below it flag nothing."""
    return float(p_values(calibration, speakers, np.array([np.max(calibration) + 1.0]), construction)[0])


def left_out(study: Study, detector: Detector, experiment: str) -> pd.DataFrame:
    """Calibration anomalies of an experiment's bona fide validation clips, each under a typicality that was fitted on the other
    speakers (cross-conformal, Vovk 2015): `clip_id, speaker, anomaly`.

    The shipped calibration holds clips of speakers whose other clips fitted the typicality, which flatters them; a new voice has
    no such clips. With one speaker, or a score without typicality, the threshold part's own anomalies.
    """
    scoring = detector.settings.scoring
    threshold, scaling = study.part(experiment, "threshold"), study.part(experiment, detector.scaling_part)
    statistics = study.statistics(detector, threshold, *detector.wanted())
    anomaly = detector.anomaly_of(statistics)
    speakers = scaling.speaker.to_numpy()
    if scoring.pooling in PROFILE_SCORES and threshold.speaker.nunique() > 1:
        profiles = study.statistics(detector, scaling, *detector.wanted())[f"profile/{scoring.scaling}"]
        for name in threshold.speaker.unique():
            others, his = speakers != name, (threshold.speaker == name).to_numpy()
            if others.sum() >= 3:
                part = {key: value[his] for key, value in statistics.items()}
                anomaly[his] = detector.anomaly_of(part, typicality=Typicality.fit(profiles[others]))
    return pd.DataFrame({"clip_id": threshold.clip_id.to_numpy(), "speaker": threshold.speaker.to_numpy(), "anomaly": anomaly})


def points(calibration: pd.DataFrame, scores: pd.DataFrame, constructions: Iterable[str] = CONSTRUCTIONS,
           levels: Iterable[float] = LEVELS) -> pd.DataFrame:
    """Operating points of test `scores` (`role, generator, speaker, anomaly`) against `calibration` (`speaker, anomaly`): one row
    a construction and nominal level.

    `false alarms` of real clips with their 95 % Clopper-Pearson interval (`low`, `high`), which takes clips for independent;
    `worst voice`, the highest rate of one voice; `resolved`, whether any clip could be flagged at the level; `copies found` and
    `speech synthesis found`, the mean over generators of the share flagged, NaN where there are none.
    """
    real = scores[scores.role == "bonafide"]
    rows = []
    for construction in constructions:
        p = p_values(calibration.anomaly, calibration.speaker, scores.anomaly, construction)
        least = smallest(calibration.anomaly.to_numpy(), calibration.speaker, construction)
        for level in levels:
            flagged = pd.Series(p <= level, index=scores.index)
            count = int(flagged[real.index].sum())
            low, high = metrics.clopper_pearson(count, len(real))
            found = {kind: flagged[scores.role == role].groupby(scores.generator).mean().mean()
                     for kind, role in (("copies found", "copysynth"), ("speech synthesis found", "tts"))}
            rows.append({"construction": construction, "nominal": level, "false alarms": count / len(real), "low": low, "high": high,
                         "worst voice": float(flagged[real.index].groupby(real.speaker).mean().max()), "resolved": level >= least} | found)
    return pd.DataFrame(rows)


def detection(calibration: pd.DataFrame, scores: pd.DataFrame, construction: str = "clips",
              levels: Iterable[float] = LEVELS) -> pd.DataFrame:
    """Share of each generator's clips flagged at each level: `role, generator, clips` and a column a level."""
    p = p_values(calibration.anomaly, calibration.speaker, scores.anomaly, construction)
    flags = scores.assign(**{f"{level:.0%}": p <= level for level in levels})
    names = [f"{level:.0%}" for level in levels]
    table = flags[flags.role != "bonafide"].groupby(["role", "generator"], sort=False)[names].mean().reset_index()
    table.insert(2, "clips", flags.groupby(["role", "generator"], sort=False).size().loc[list(zip(table.role, table.generator))].to_numpy())
    return table


def recalibrated(study: Study, detector: Detector, speech: pd.DataFrame, test: pd.DataFrame, minutes: Iterable[float] = MINUTES,
                 levels: Iterable[float] = (0.05, 0.10), progress: Callable[[str], None] = print) -> pd.DataFrame:
    """What `minutes` of the bona fide clips `speech` from a new source repair on the clips `test` of that source.

    One row an amount, a repair and a level: `false alarms` with interval, `copies found`, `AUC` (mean over copy-synthesis
    generators), `calibration clips`, `resolved`. Repairs: threshold alone (all of the speech calibrates), or all of it
    (`Detector.fit`: half for scaling and typicality, half for the threshold). The networks never change. With 0 minutes the
    detector stays as it is.
    """
    from lib.paths import DATA

    order = seeds.stream(0, "recalibration").permutation(len(speech))
    speech = speech.iloc[order]
    ends = speech.seconds.cumsum().to_numpy() / 60
    variants: dict[tuple[float, str], Detector] = {}
    for amount in minutes:
        if not amount:
            variants[0, "none"] = detector
            continue
        some = speech[ends <= amount]
        if ends[-1] < amount or len(some) < 8:
            progress(f"left out: {amount:g} min of new speech, there are {ends[-1]:.1f} min in clips")
            continue
        for repair in ("threshold", "scaling, typicality and threshold"):
            moved = Detector(detector.settings, detector.teacher, detector.student)
            moved._fast = detector._fast
            if repair == "threshold":
                moved.scaling, moved.typicality = detector.scaling, detector.typicality
                moved.fit_threshold(study.prepared(some), some.clip_id.tolist())
            else:
                moved.fit([DATA / path for path in some.path])
            variants[amount, repair] = moved
    clips = study.prepared(test)

    def scored(index: int) -> list[float]:
        # The networks are the same, so one pass through them serves every variant.
        levels_found = detector.clip_residuals(*clips[index])[1]
        return [variant.score_residuals(levels_found) for variant in variants.values()]

    found = np.array(list(study.side_by_side(scored, range(len(clips)))))
    real, copies = (test.role == "bonafide").to_numpy(), (test.role == "copysynth").to_numpy()
    rows = []
    for (amount, repair), variant, anomaly in zip(variants, variants.values(), found.T):
        p = metrics.conformal_p_values(-variant.calibration, -anomaly)
        groups = test.generator[copies].groupby(test.generator[copies]).groups
        by_name = {name: test.index.get_indexer(index) for name, index in groups.items()}
        auc = np.mean([metrics.area_under_curve(-anomaly[real], -anomaly[index]) for index in by_name.values()])
        for level in levels:
            count = int((p[real] <= level).sum())
            low, high = metrics.clopper_pearson(count, int(real.sum()))
            rows.append({"minutes": amount, "repair": repair, "nominal": level, "false alarms": count / real.sum(), "low": low,
                         "high": high, "copies found": float(np.mean([(p[index] <= level).mean() for index in by_name.values()])),
                         "AUC": float(auc), "calibration clips": len(variant.calibration),
                         "resolved": bool(1 / (len(variant.calibration) + 1) <= level)})
    return pd.DataFrame(rows)
