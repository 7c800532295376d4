"""Owns evidence at work: the texture student of a study, its detector with all evidence calibrated, the clips of an
experiment scored by each kind of evidence and by all together; and recordings from outside, corpus by corpus."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lib import seeds
from lib.data.audio import header, read_audio
from lib.data.degradations import recorded
from lib.data.scorefiles import read_scores
from lib.engine import side_by_side
from lib.evaluate.metrics import area_under_curve, clopper_pearson, conformal
from lib.model.evidence import WEIGHTS
from lib.model.texture import TextureStudent, roughness, train_texture_student
from lib.paths import DATA, atomic, clocked, digest_of, kept
from lib.settings import RATE_HZ

if TYPE_CHECKING:
    from pathlib import Path

    from lib.detector import Detector
    from lib.study import Study

TITLES = {"pyramid": "Damage readings", "steady": "Steady readings", "lines": "Constant lines",
          "texture": "Smooth texture", "sameness": "Texture student", "all": "All evidence"}
"""Kinds of evidence in tables and figures."""
STUDENT_CLIPS = 400
"""Training clips that the texture student hears at most, each as it is and through a random recording chain."""
VERSION = 2  # raised when code changes what is kept


def _audio(path: str) -> np.ndarray:
    return read_audio(DATA / path, RATE_HZ, strict=False)[0]


@clocked("training")
def texture_student(study: Study, experiment: str) -> TextureStudent:
    """A student fitted on the roughness of bona fide training clips, all voices in turn, and of their copies through
    random recording chains."""
    clips = study.part(experiment, "train")
    turn = clips.groupby("speaker", sort=False).cumcount().sort_values(kind="stable")
    paths = clips.loc[turn.index[:STUDENT_CLIPS]].path.tolist()

    def both(path: str) -> list[tuple]:
        audio, random = _audio(path), seeds.stream(study.settings.seed, "chain", path)
        return [roughness(audio), roughness(recorded(audio, random))]

    pairs = sum(study.side_by_side(both, paths), [])
    steps = 1500 if study.settings.training.student_steps >= 600 else 60  # as short as the preset's other trainings
    return train_texture_student(pairs, seeds.integer(study.settings.seed, "texture student"), steps)


def evidence_detector(study: Study, experiment: str) -> Detector:
    """The detector of an experiment with every kind of evidence calibrated on the bona fide threshold clips."""
    detector, threshold = study.detector(experiment), study.part(experiment, "threshold")
    train = study.part(experiment, "train")
    key = digest_of([VERSION, detector.key, sorted(train.sha256), sorted(threshold.sha256), WEIGHTS])

    def make() -> Detector:
        student = texture_student(study, experiment)
        recordings = [(_audio(path), RATE_HZ) for path in threshold.path]
        detector.fit_evidence(recordings, threshold.corpus.tolist(), student, threshold.clip_id.tolist())
        return detector

    path = study.folder / "detectors" / f"{experiment}-evidence-{key}" / "detector.json"
    joint = kept(path, make, lambda made, path: made.save(path.parent), lambda path: type(detector).load(path.parent))
    joint.key = key
    return joint


def judged(detector: Detector, audio: np.ndarray, rate_hz: int = RATE_HZ) -> dict[str, float]:
    """Each kind of evidence of a recording (samples,), their weighted sum `all` (up = fake), their conformal p-values
    (`p_lines`, ..., `p_all`), the spacing of lines in Hz and the seconds; of a detector without evidence, the pyramid's
    anomaly and p-value. Raises ValueError for less than 0.3 s."""
    if detector.evidence is None:
        anomaly = detector.score(audio, rate_hz)
        return {"pyramid": anomaly, "p_pyramid": detector.p_value(anomaly)}
    measured, evidence = detector.measure(audio, rate_hz), detector.evidence
    values, seconds = measured.values, measured.seconds
    alone = {f"p_{name}": value for name, value in evidence.p_values(values, seconds).items()}
    return dict(zip(WEIGHTS, values)) | alone | {
        "all": evidence.joint(values, seconds), "p_all": evidence.p_value(values, seconds),
        "spacing_hz": measured.lines.spacing_hz or np.nan, "seconds": seconds}


@clocked("scoring")
def evidence_scores(study: Study, experiment: str, only: str = "") -> pd.DataFrame:
    """Clips of `Study.test` with what `judged` says of each."""
    joint, clips = evidence_detector(study, experiment), study.test(experiment, only)

    def save(table: pd.DataFrame, path: object) -> None:
        with atomic(path) as temporary:
            table.to_parquet(temporary)

    def make() -> pd.DataFrame:
        rows = study.side_by_side(lambda path: judged(joint, _audio(path)), clips.path)
        return pd.DataFrame(list(rows)).drop(columns="seconds")

    path = study.folder / "evidence" / f"{digest_of([joint.key, clips.sha256.tolist()])}.parquet"
    table = kept(path, make, save, pd.read_parquet)
    return pd.concat([clips.reset_index(drop=True), table], axis=1)


def as_systems(table: pd.DataFrame) -> pd.DataFrame:
    """`evidence_scores` in long form: a row a clip and kind of evidence, `system`, `anomaly` and `score`; where nothing
    could be measured, the median of real speech."""
    parts = []
    for name, title in TITLES.items():
        anomaly = table[name].fillna(table.loc[table.role == "bonafide", name].median())
        parts.append(table.assign(system=title, anomaly=anomaly, score=-anomaly))
    return pd.concat(parts, ignore_index=True)


def called(table: pd.DataFrame, alpha: float = 0.05) -> pd.DataFrame:
    """A row a kind of evidence of clips with p-values (`judged`): the share of real clips called at p <= alpha with its
    exact 95 % interval, and the shares of copies, speech synthesis and controls."""
    rows = []
    for kind, title in TITLES.items():
        hit, roles = table[f"p_{kind}"] <= alpha, table.role
        count, real = int(hit[roles == "bonafide"].sum()), int((roles == "bonafide").sum())
        low, high = clopper_pearson(count, real)
        rows.append({"evidence": title, "false alarms": count / real, "low": low, "high": high,
                     **{name: hit[roles == role].mean() for role, name in
                        (("copysynth", "copies found"), ("tts", "speech synthesis found"), ("control", "controls"))}})
    return pd.DataFrame(rows)


# --- recordings from outside ------------------------------------------------------------------------------------------


def read_outside(manifest: Path) -> pd.DataFrame:
    """A manifest (CSV: path, label, corpus, generator where it has one). Raises ValueError for one without these."""
    table = pd.read_csv(manifest, dtype=str, keep_default_na=False)
    if missing := {"path", "label", "corpus"} - set(table):
        lacking = ", ".join(sorted(missing))
        raise ValueError(f"{manifest}: expected the columns path, label and corpus, found no {lacking}")
    if odd := set(table.label) - {"bonafide", "spoof"}:
        raise ValueError(f"{manifest}: expected the labels bonafide and spoof, found {sorted(odd)[0]!r}")
    return table


def scored_outside(scores: Path, manifest: Path) -> pd.DataFrame:
    """The manifest with a score file's anomalies, clip_id or path being its ids, as `all`; `p_all` is conformal among
    the real recordings of the other corpora. Raises ValueError where a recording has no score, or ScoreFileError."""
    table, known = read_outside(manifest), read_scores(scores).set_index("clip_id").score
    ids = table.get("clip_id", table.path)
    if len(absent := ids[~ids.isin(known.index)]):
        raise ValueError(f"{scores}: expected a score of each recording of {manifest}, found none of {len(absent)}, "
                         f"such as {absent.iloc[0]}; leave those out of the manifest")
    table["all"] = -known.loc[ids].to_numpy(float)
    for corpus, part in table.groupby("corpus"):
        others = table[(table.label == "bonafide") & (table.corpus != corpus)]["all"]
        table.loc[part.index, "p_all"] = conformal(others.to_numpy(), part["all"].to_numpy())
    return table


def outside_scores(detector: Detector, manifest: Path) -> pd.DataFrame:
    """Recordings of a manifest with what `judged` says of each, read at its own rate. Raises ValueError for a manifest
    that `read_outside` refuses, AudioError for a recording that cannot be read."""
    table = read_outside(manifest)

    def row(path: str) -> dict[str, float]:
        rate_hz = min(max(header(manifest.parent / path)[1], RATE_HZ), 48_000)
        return judged(detector, read_audio(manifest.parent / path, rate_hz, strict=False)[0], rate_hz)

    return pd.concat([table, pd.DataFrame(list(side_by_side(row, table.path)))], axis=1)


def by_corpus(table: pd.DataFrame, kind: str = "all", alpha: float = 0.05) -> pd.DataFrame:
    """A row a corpus of `outside_scores`: clips, AUC of one kind of evidence where it has both classes, share of fakes
    called at p <= alpha, and false alarms with an exact 95 % interval."""
    rows = []
    for corpus, part in table.groupby("corpus", sort=True):
        real, fake = part[part.label == "bonafide"], part[part.label == "spoof"]
        both = len(real) and len(fake)
        auc = area_under_curve(-real[kind].fillna(0).to_numpy(), -fake[kind].fillna(0).to_numpy()) if both else np.nan
        alarms = int((real[f"p_{kind}"] <= alpha).sum())
        low, high = clopper_pearson(alarms, len(real)) if len(real) else (np.nan, np.nan)
        rows.append({"corpus": corpus, "real": len(real), "fake": len(fake), "auc": auc,
                     "found": (fake[f"p_{kind}"] <= alpha).mean() if len(fake) else np.nan,
                     "false alarms": alarms / len(real) if len(real) else np.nan, "low": low, "high": high})
    return pd.DataFrame(rows)


def outside_summary(table: pd.DataFrame, resamples: int = 1000, alpha: float = 0.05) -> pd.DataFrame:
    """A row a kind of evidence: macro AUC (mean over corpora with both classes) with a 95 % bootstrap interval over
    corpora, pooled AUC, fakes found at the threshold that 5 % of the table's real recordings exceed, and at p <= alpha,
    and false alarms."""
    rows, real = [], table.label == "bonafide"
    for kind in (kind for kind in TITLES if kind in table):
        corpora = by_corpus(table, kind, alpha).auc.dropna().to_numpy()
        picks = seeds.stream(0, "outside", kind).integers(len(corpora), size=(resamples, len(corpora)))
        low, high = np.quantile(corpora[picks].mean(axis=1), [0.025, 0.975])
        values = table[kind].fillna(table.loc[real, kind].median())
        limit = values[real].quantile(0.95)
        rows.append({"evidence": TITLES[kind], "macro AUC": corpora.mean(), "low": low, "high": high,
                     "pooled AUC": area_under_curve(-values[real].to_numpy(), -values[~real].to_numpy()),
                     "found at 5 %": (values[~real] > limit).mean(),
                     "found": (table.loc[~real, f"p_{kind}"] <= alpha).mean(),
                     "false alarms": (table.loc[real, f"p_{kind}"] <= alpha).mean()})
    return pd.DataFrame(rows)


def outside_text(scores: Path, manifest: Path) -> str:
    """`outside_summary` and `by_corpus` of a score file, in words and numbers; raises what `scored_outside` does."""
    table = scored_outside(scores, manifest)
    both = outside_summary(table).drop(columns="evidence"), by_corpus(table)
    return "\n\n".join(each.to_string(index=False, float_format="{:.3f}".format) for each in both)
