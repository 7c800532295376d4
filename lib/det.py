"""Owns the detection error trade-off plot of a score file: miss against false alarm on normal-deviate axes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import norm

from lib.metrics import detection_curve, equal_error_rate
from lib.paths import atomic
from lib.scorefiles import read_key, read_scores

TICKS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)


def write_det(score_path: str | os.PathLike, key_path: str | os.PathLike | None, target: str | os.PathLike) -> None:
    """Draw all spoof clips and each attack against all bona fide clips into `target` (.png or .svg).

    The files are those that lib.scorefiles.evaluate accepted; it has the checks.
    """
    table = read_scores(score_path)
    if key_path is not None:
        key = read_key(key_path)
        key = key[key["subset"] == "eval"] if (key["subset"] == "eval").any() else key
        table = key.merge(table[["clip_id", "score"]], on="clip_id", validate="one_to_one")
    bonafide, spoof = (table[table["label"] == label] for label in ("bonafide", "spoof"))
    figure = Figure((6, 5.6), dpi=120, layout="constrained")
    axis = figure.subplots()
    attacks = [(name, group) for name, group in spoof.groupby("attack") if name]
    groups = [("all", spoof)] + (attacks if 1 < len(attacks) <= 9 else [])
    lowest = max(TICKS[0], 0.5 / max(len(bonafide), 1))
    for name, group in groups:
        real, fake = bonafide["score"].to_numpy(), group["score"].to_numpy()
        miss, alarm, _ = detection_curve(real, fake)
        rate = equal_error_rate(real, fake)[0]
        drawn = [norm.ppf(np.clip(values, lowest / 2, 1 - lowest / 2)) for values in (alarm, miss)]
        axis.step(*drawn, where="post", label=f"{name}: EER {rate:.2%}", linewidth=2 if name == "all" else 1)
    ticks = [value for value in TICKS if value >= lowest / 2]
    axis.plot(norm.ppf([lowest, 0.8]), norm.ppf([lowest, 0.8]), color="grey", linewidth=0.8, linestyle=":")
    for which in ("x", "y"):
        axis.set(**{f"{which}ticks": norm.ppf(ticks), f"{which}ticklabels": [f"{100 * value:g}" for value in ticks],
                    f"{which}lim": norm.ppf([lowest / 2, 0.9])})
    axis.set(xlabel="fakes accepted (%)", ylabel="real speech refused (%)", title=Path(score_path).name)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    with atomic(target) as temporary:
        figure.savefig(temporary, format=Path(target).suffix[1:] or "png")
