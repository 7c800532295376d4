"""Owns operating points set on real speech alone (notebook 34): what p-values do to new voices and sources, and what
minutes of real speech from there, or of one person, buy. Tables are made of score frames (lib.data.scorefiles)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from lib import seeds
from lib.data.scorefiles import OURS, score_frame
from lib.evaluate import metrics
from lib.paths import DATA, clocked
from lib.settings import RATE_HZ

if TYPE_CHECKING:
    from lib.detector import Detector
    from lib.study import Study

LEVELS = (0.01, 0.05, 0.10)
CONSTRUCTIONS = ("clips", "speakers", "speakers, doubled")
WITHOUT, AWAY = f"{OURS}, without ", "One-speaker detector on other voices"  # a fold: fitted on the other voices


def p_values(calibration: Iterable[float], speakers: Iterable[str], anomalies: np.ndarray,
             construction: str = "speakers") -> np.ndarray:
    """p-values in (0, 1] of "real speech like the calibration's", one a clip, small = fake.

    calibration: anomalies (clip,) of bona fide clips that no fit has seen; speakers: who speaks in each. anomalies: of
    the tested clips (clip,), or under one model a speaker (speaker, clip), speakers sorted: then each is compared with
    the calibration clips of that speaker alone, whom the model has not heard (cross-conformal, Vovk 2015).
    clips: (1 + number of calibration clips at least as anomalous) / (clips + 1). speakers: the same with one vote a
    speaker, spread over his or her clips (CDF pooling, Dunn, Wasserman & Ramdas 2023); doubled: twice that, at most 1.
    Raises MetricError for empty or non-finite anomalies, ValueError for an unknown construction or other lengths.
    """
    if construction not in CONSTRUCTIONS:
        raise ValueError(f"construction {construction!r} is not one of {', '.join(CONSTRUCTIONS)}")
    calibration, names = np.asarray(calibration, dtype=np.float64), np.asarray(list(speakers), dtype=str)
    if names.shape != calibration.shape:
        raise ValueError(f"expected a speaker for each of {len(calibration)} calibration clips, found {len(names)}")
    groups = [calibration[names == name] for name in np.unique(names)]
    rows = np.broadcast_to(anomalies, (len(groups), np.shape(anomalies)[-1]))
    # How many of a speaker's clips are at least as anomalous: the conformal p-value without its "+ 1".
    counts = [metrics.conformal(group, row) * (len(group) + 1) - 1 for group, row in zip(groups, rows)]
    if construction == "clips":
        return (1 + np.sum(counts, axis=0)) / (len(calibration) + 1)
    shares = [count / len(group) for count, group in zip(counts, groups)]
    pooled = (1 + np.sum(shares, axis=0)) / (len(groups) + 1)
    return pooled if construction == "speakers" else np.minimum(1.0, 2 * pooled)


def smallest(calibration: np.ndarray, speakers: Iterable[str], construction: str) -> float:
    """The least p-value that a construction can give: levels below it flag nothing."""
    return float(p_values(calibration, speakers, np.array([np.max(calibration) + 1.0]), construction)[0])


def calibration_frame(study: Study, detector: Detector, experiment: str) -> pd.DataFrame:
    """A score frame of what p-values need: the bona fide calibration clips of an experiment (split "threshold").

    A score with typicality and several voices also gets one system a voice (WITHOUT): that voice's calibration clips
    and all test clips under a typicality that was fitted on the other voices' scaling clips. The calibration holds
    voices whose other clips fitted the typicality, which flatters them; a new voice has no such clips.
    """
    from lib.model.scaling import PROFILE_SCORES, Typicality

    threshold, scaling = study.part(experiment, "threshold"), study.part(experiment, detector.scaling_part)
    test, scoring = study.test(experiment, only="test"), detector.settings.scoring
    of_threshold, of_test = (study.statistics(detector, part) for part in (threshold, test))

    def framed(clips: pd.DataFrame, anomaly: np.ndarray, system: str) -> pd.DataFrame:
        frame = score_frame(clips.assign(anomaly=anomaly), experiment, system, "ours", study.settings.seed, study.clips)
        return frame.replace({"split": {"development": "threshold"}})

    frames = [framed(threshold, detector.anomaly_of(of_threshold), OURS)]
    if scoring.pooling in PROFILE_SCORES and threshold.speaker.nunique() > 1:
        profiles = study.statistics(detector, scaling)[f"profile/{scoring.scaling}"]
        for name in threshold.speaker.unique():
            others, own = (scaling.speaker != name).to_numpy(), (threshold.speaker == name).to_numpy()
            model = Typicality.fit(profiles[others]) if others.sum() >= 3 else detector.typicality
            kept = {key: value[own] for key, value in of_threshold.items()}
            frames.append(framed(threshold[own], detector.anomaly_of(kept, typicality=model), WITHOUT + name))
            frames.append(framed(test, detector.anomaly_of(of_test, typicality=model), WITHOUT + name))
    return pd.concat(frames, ignore_index=True)


class Setting(NamedTuple):
    """A calibration and what is tested against it."""

    calibration: pd.DataFrame  # speaker, anomaly
    scores: pd.DataFrame  # rows of a score frame: the tested clips
    anomalies: np.ndarray  # of those, (clip,) or (fold, clip)
    constructions: tuple[str, ...]

    def p(self, construction: str) -> np.ndarray:
        """p-values of the tested clips."""
        return p_values(self.calibration.anomaly, self.calibration.speaker, self.anomalies, construction)


def settings_of(frame: pd.DataFrame) -> Iterator[tuple[str, Setting]]:
    """The settings of a frame with calibration, from the fair one to the unfair one. Controls are left out."""
    frame = frame[frame.role != "control"]
    tested, known = frame[frame.split == "test"], frame[frame.split == "threshold"]
    of = {name: known[(known.experiment == name) & (known.system == OURS)] for name in ("single", "multi")}
    for name, experiment, system, home in (
            ("same voice", "single", OURS, "single"), ("new voices", "multi", OURS, "multi"),
            ("another corpus", "multi", AWAY, "single")):
        part = tested[(tested.experiment == experiment) & (tested.system == system)]
        if len(part) and len(of[home]):
            constructions = CONSTRUCTIONS if home == "multi" else CONSTRUCTIONS[:1]
            yield name, Setting(of[home], part, part.anomaly.to_numpy(), constructions)
    folds = tested[tested.system.str.startswith(WITHOUT)]
    if len(folds):
        wide = folds.pivot(index="clip_id", columns="system", values="anomaly").sort_index(axis=1)
        rows = folds.drop_duplicates("clip_id").set_index("clip_id").loc[wide.index].reset_index()
        left_out = known[known.system.str.startswith(WITHOUT)]
        yield "new voices, cross-conformal", Setting(left_out, rows, wide.T.to_numpy(), CONSTRUCTIONS)


def rate_interval(flagged: np.ndarray, anomalies: np.ndarray, clusters: Iterable[str]) -> metrics.Interval:
    """Share of flagged clips with a 95 % interval over clusters (voices), as of an AUC (metrics.auc_interval)."""
    rate, clusters = float(np.mean(flagged)), list(clusters)
    variance = metrics.cluster_variance((flagged - rate) / len(flagged), [], clusters, [])
    return metrics.auc_interval(rate, *variance, metrics.effective_clips(anomalies, clusters))


def points(frame: pd.DataFrame, levels: Iterable[float] = LEVELS) -> pd.DataFrame:
    """One row a setting, construction and nominal level: `false alarms` of real test clips with a 95 % interval over
    voices (over clips where there is one voice) and the highest rate of one voice; `resolved`, whether any clip could
    be flagged at the level; and what is found of copies and of speech synthesis, means over generators."""
    rows = []
    for name, setting in settings_of(frame):
        scores, real = setting.scores, (setting.scores.role == "bonafide").to_numpy()
        voices = scores.speaker if scores.speaker[real].nunique() > 1 else scores.clip_id
        lines = setting.anomalies if setting.anomalies.ndim == 1 else setting.anomalies.mean(axis=0)
        for construction in setting.constructions:
            p = setting.p(construction)
            least = smallest(setting.calibration.anomaly, setting.calibration.speaker, construction)
            for level in levels:
                flagged = p <= level
                rate, low, high = rate_interval(flagged[real], lines[real], voices[real])
                table = scores.assign(flagged=flagged)
                shares = table.groupby(["role", "generator"]).flagged.mean().groupby("role").mean()
                worst = table[real].groupby("speaker").flagged.mean().max()
                rows.append({"setting": name, "construction": construction, "nominal": level, "false alarms": rate,
                             "low": low, "high": high, "worst voice": worst, "resolved": level >= least,
                             "copies found": shares.get("copysynth", np.nan),
                             "speech synthesis found": shares.get("tts", np.nan)})
    return pd.DataFrame(rows)


def detection(frame: pd.DataFrame, levels: Iterable[float] = LEVELS) -> pd.DataFrame:
    """Share of each generator's clips flagged at each level, p-values over clips: a row a setting and generator."""
    tables = []
    for name, setting in settings_of(frame):
        flags = {f"{level:.0%}": setting.p("clips") <= level for level in levels}
        groups = setting.scores.assign(clips=1.0, **flags)
        groups = groups[groups.role != "bonafide"].groupby(["role", "generator"], sort=False)
        table = groups[list(flags)].mean().assign(clips=groups.size()).reset_index()
        tables.append(table.assign(setting=name))
    return pd.concat(tables, ignore_index=True)


def by_voice(frame: pd.DataFrame, levels: Iterable[float] = LEVELS[1:]) -> pd.DataFrame:
    """Share of each new voice's real clips that is flagged, a row a voice; with where it is from."""
    setting = dict(settings_of(frame))["new voices, cross-conformal"]
    columns = {f"flagged at {level:.0%}, {construction}": setting.p(construction) <= level
               for construction in CONSTRUCTIONS[:2] for level in levels}
    real = setting.scores.assign(clips=1, **columns)[setting.scores.role == "bonafide"].groupby(["speaker", "source"])
    return real[list(columns)].mean().assign(clips=real.size()).reset_index()


TABLES = {"34_points": ("34_scores", lambda frame, _: points(frame)),
          "34_detection": ("34_scores", lambda frame, _: detection(frame)),
          "34_per_voice": ("34_scores", lambda frame, _: by_voice(frame))}
"""For lib.evaluate.results.recheck."""


@clocked("scoring")
def recalibrated(study: Study, detector: Detector, speech: pd.DataFrame, test: pd.DataFrame,
                 minutes: Iterable[float] = (0, 1, 2, 5), levels: Iterable[float] = (0.05, 0.10),
                 progress: Callable[[str], None] = print) -> pd.DataFrame:
    """What `minutes` of the bona fide clips `speech` from a new source repair on the clips `test` of that source.

    One row an amount, a repair and a level: `false alarms` with interval, `copies found`, `AUC` (mean over copies'
    generators), `calibration clips`, `resolved`. Repairs: threshold alone (all of the speech calibrates), or all of it
    (`Detector.fit`: half for scaling and typicality, half for the threshold). The networks never change. With 0 minutes
    the detector stays as it is.
    """
    speech = speech.iloc[seeds.stream(0, "recalibration").permutation(len(speech))]
    ends, variants = speech.seconds.cumsum().to_numpy() / 60, {}
    for amount in minutes:
        if not amount:
            variants[0, "none"] = detector
            continue
        some = speech[ends <= amount]
        if ends[-1] < amount or len(some) < 8:
            progress(f"left out: {amount:g} min of new speech, there are {ends[-1]:.1f} min in clips")
            continue
        for repair in ("threshold", "scaling, typicality and threshold"):
            moved = _unfitted(detector)
            if repair == "threshold":
                moved.scaling, moved.typicality = detector.scaling, detector.typicality
                moved.fit_threshold(study.prepared(some), some.clip_id.tolist())
            else:
                moved.fit([DATA / path for path in some.path])
            variants[amount, repair] = moved
    clips = study.prepared(test)

    def scored(index: int) -> list[float]:
        # The networks are the same, so one pass through them serves every variant.
        residuals = detector.clip_residuals(*clips[index])[1]
        return [variant.score_residuals(residuals) for variant in variants.values()]

    anomalies = np.array(list(study.side_by_side(scored, range(len(clips))))).T
    real, copies, rows = (test.role == "bonafide").to_numpy(), (test.role == "copysynth").to_numpy(), []
    voices = test.speaker[real] if test.speaker[real].nunique() > 1 else test.clip_id[real]
    masks = [copies & (test.generator == name).to_numpy() for name in test.generator[copies].unique()]
    for ((amount, repair), variant), anomaly in zip(variants.items(), anomalies):
        p = metrics.conformal(variant.calibration, anomaly)
        auc = float(np.mean([metrics.area_under_curve(-anomaly[real], -anomaly[mask]) for mask in masks]))
        for level in levels:
            rate, low, high = rate_interval(p[real] <= level, anomaly[real], voices)
            rows.append({"minutes": amount, "repair": repair, "nominal": level, "false alarms": rate, "low": low,
                         "high": high, "copies found": float(np.mean([(p[mask] <= level).mean() for mask in masks])),
                         "AUC": auc, "calibration clips": len(variant.calibration),
                         "resolved": bool(1 / (len(variant.calibration) + 1) <= level)})
    return pd.DataFrame(rows)


def _unfitted(detector: Detector) -> Detector:
    moved = type(detector)(detector.settings, detector.teacher, detector.student)
    moved._fast, moved.evidence = detector._fast, detector.evidence
    return moved


@clocked("scoring")
def of_persons(detector: Detector, clips: pd.DataFrame, minutes: Iterable[float] = (1, 2),
               tests: int = 8) -> pd.DataFrame:
    """What a detector with all evidence says of each speaker of `clips` (clip_id, path, speaker, role, generator,
    parent, seconds) as it is (0 minutes) and after `Detector.fit` on minutes of that person's other real speech.

    One row a clip and amount: `speaker`, `minutes`, `generator` (empty: real), `anomaly` and `p_value` of all evidence,
    `pyramid`. Of each person `tests` real clips are judged, those with copies first, and their copies; where there are
    none, WORLD and Griffin-Lim make one in turn. An amount of which there is less than half is left out.
    """
    from lib.data.audio import read_audio
    from lib.data.generators import GENERATORS
    from lib.engine import side_by_side

    rows = []
    for name, own in clips.groupby("speaker", sort=False):
        real, copies = own[own.role == "bonafide"], own[own.role == "copysynth"]
        real = real.iloc[seeds.stream(0, "person", name).permutation(len(real))]
        real = real.iloc[np.argsort(~real.clip_id.isin(copies.parent), kind="stable")]
        tested, speech, variants = real[:tests], real[tests:], {0: detector}
        copies, before = copies[copies.parent.isin(tested.clip_id)], (speech.seconds.cumsum() - speech.seconds) / 60
        for amount in (amount for amount in minutes if speech.seconds.sum() / 60 >= amount / 2):
            variants[amount] = _unfitted(detector).fit([DATA / path for path in speech.path[before < amount]])
        audio = [(kind, read_audio(DATA / path)[0]) for kind, path in
                 zip([*[""] * len(tested), *copies.generator], [*tested.path, *copies.path])]
        if copies.empty:
            audio += [(kind, GENERATORS[kind].run(sound, 0))
                      for (_, sound), kind in zip(audio, tests * ("world", "griffin_lim"))]
        rows += [{"speaker": name} | row for each in side_by_side(partial(_under, variants), audio) for row in each]
    return pd.DataFrame(rows)


def _under(variants: dict[float, Detector], recording: tuple[str, np.ndarray]) -> list[dict[str, object]]:
    from lib.data.channel import apply_channel

    (generator, audio), first, rows = recording, variants[0], []  # one pass serves all, whose networks are the same
    levels = first.clip_residuals(*apply_channel(audio, first.settings.channel))[1]
    known = first.evidence.measure(audio, RATE_HZ, (np.nan, first.scaling.steadiness(levels)))
    for amount, variant in variants.items():
        pyramid, joint = variant.score_residuals(levels), variant.evidence
        values = np.where(np.array(joint.names) == "pyramid", pyramid, known.values), known.seconds
        rows.append({"minutes": amount, "generator": generator, "anomaly": joint.joint(*values),
                     "p_value": joint.p_value(*values), "pyramid": pyramid})
    return rows


def person_points(table: pd.DataFrame, alpha: float = 0.05) -> pd.DataFrame:
    """A row an amount of minutes of `of_persons`: AUC of each person's real clips against copies, mean and lowest, by
    all evidence and by the pyramid; copies found and false alarms at p <= alpha with exact 95 % intervals."""
    rows = []
    for amount, part in table.groupby("minutes"):
        copy, row = part.generator != "", {"minutes": amount, "persons": part.speaker.nunique()}
        for title, column in (("AUC", "anomaly"), ("AUC of the pyramid", "pyramid")):
            aucs = [metrics.area_under_curve(*(-own[own.generator.eq("") == real][column] for real in (True, False)))
                    for _, own in part.groupby("speaker")]
            row |= {title: float(np.mean(aucs)), f"lowest {title}": min(aucs)}
        for title, some in (("found", copy), ("false alarms", ~copy)):
            count, number = int((part.p_value[some] <= alpha).sum()), int(some.sum())
            names, bounds = (title, f"{title}, low", f"{title}, high"), metrics.clopper_pearson(count, number)
            row |= dict(zip(names, (count / number, *bounds)))
        rows.append(row)
    return pd.DataFrame(rows)
