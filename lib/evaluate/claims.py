"""Owns the verdicts on the paper's claims: each claim has a rule, stated here, that reads this run's tables and nothing else.

Verdicts: holds, holds in part, does not hold, not tested (its table is missing in this run). A rule says what would have to be
seen for "holds"; wording with numbers is computed. The paper's own numbers come from `reports/reference/paper.csv`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd

HOLDS, PART, FAILS, UNTESTED = "holds", "holds in part", "does not hold", "not tested"
TITLES = {"single": "one speaker", "multi": "voices never heard"}
Verdict = tuple[str, str, str, str]  # ours, best baseline, verdict, why


def _of(met: list[bool]) -> str:
    return HOLDS if all(met) else PART if any(met) else FAILS


def _detection(tables: dict[str, pd.DataFrame], experiment: str) -> Verdict:
    """Holds where the 95 % interval of every copy-synthesis generator's AUC lies above 0.5."""
    rows, others = (tables[name][tables[name].experiment == experiment] for name in ("30_per_generator", "30_baselines"))
    copies = rows[rows.kind == "copysynth"]
    others = others[others.kind == "one-class"].sort_values("copysynth")
    above = copies.auc_low > 0.5
    best = f"{others.copysynth.iloc[-1]:.2f} ({others.detector.iloc[-1]})" if len(others) else ""
    return (f"{copies.auc.mean():.2f} mean AUC", best, _of(above.tolist()),
            f"{int(above.sum())} of {len(copies)} vocoders have an interval above 0.5"
            + (f"; not {', '.join(copies.generator[~above])}" if not above.all() else ""))


def _better(tables: dict[str, pd.DataFrame], kind: str) -> Verdict:
    """Holds where ours is above every baseline of the kind in both experiments, each with a Holm-corrected p of at most 0.05."""
    pairs = tables["33_paired"]
    pairs = pairs[pairs.kind == kind]
    sure = pairs["p (Holm)"] <= 0.05
    wins, losses = (pairs["ours minus baseline"] > 0) & sure, (pairs["ours minus baseline"] < 0) & sure
    gaps = [f"{gap:+.2f} {TITLES[name]}" for name, gap in pairs.groupby("experiment", sort=False)["ours minus baseline"].min().items()]
    best = tables["30_baselines"]
    best = best[best.kind == kind].groupby("experiment", sort=False).copysynth.max()
    shown = ", ".join(f"{value:.2f} {TITLES[name]}" for name, value in best.items())
    return ("least gain in AUC: " + ", ".join(gaps), shown, _of(wins.tolist()),
            f"significantly above {int(wins.sum())} of {len(pairs)} pairings, below {int(losses.sum())}")


def _shift(tables: dict[str, pd.DataFrame], *_: object) -> Verdict:
    """Holds where scaling each element, with the one-sided mean, gains more AUC away from home (new statistics) than at home, and
    more than 0.01; in part where some kind of scaling does. Point estimates."""
    table = tables["31_shift"]
    mean = table[table.score == "mean"].set_index("scaling")
    gains = mean.drop(index="none")[["home", "away, new statistics"]] - mean.loc["none", ["home", "away, new statistics"]]
    home, away = gains["home"], gains["away, new statistics"]
    met = (away > home) & (away > 0.01)
    verdict = HOLDS if met.get("element", False) else PART if met.any() else FAILS
    return (f"element: {away['element']:+.3f} away, {home['element']:+.3f} at home", "no scaling", verdict,
            f"gains more away than at home, and more than 0.01: {', '.join(met.index[met]) or 'no kind of scaling'}")


def _maps(tables: dict[str, pd.DataFrame], *_: object) -> Verdict:
    """Holds where ours beats the log-energy map on splices in pixel AUROC and in PRO; in part with one of them."""
    table = tables["41_localisation"]
    splices = table[table.kind == "splice"].groupby("map", sort=False)[["pixel AUROC", "PRO@30%"]].mean()
    ours, energy = splices.loc["read (ours)"], splices.loc["log-energy"]
    met = (ours > energy) & (ours["pixel AUROC"] > 0.5)
    return (f"pixel AUROC {ours['pixel AUROC']:.2f}, PRO {ours['PRO@30%']:.2f}",
            f"{energy['pixel AUROC']:.2f}, {energy['PRO@30%']:.2f} (log-energy)", _of(met.tolist()),
            "splices of vocoded speech into real speech, mean over vocoders")


def _calibrated(tables: dict[str, pd.DataFrame], *_: object) -> Verdict:
    """Holds where nominal 5 and 10 % lie inside or above the interval of false alarms, resolved, for the same voice, new voices and
    another corpus."""
    table = tables["34_points"]
    table = table[(table.construction == "clips") & table.nominal.isin([0.05, 0.10]) & table.resolved.astype(bool)]
    met = table.low <= table.nominal
    worst = table.sort_values("false alarms").tail(1)
    if not len(table):
        return "", "", UNTESTED, "too few calibration clips to resolve 5 or 10 %"
    strict = table[table.nominal == table.nominal.min()].drop_duplicates("setting")
    shown = [f"{name} {100 * rate:.0f} %" for name, rate in zip(strict.setting, strict["false alarms"])]
    return (f"false alarms at {table.nominal.min():.0%}: " + ", ".join(shown), "", _of(met.tolist()),
            f"{int(met.sum())} of {len(table)} settings and levels; worst {worst.setting.iloc[0]}")


RULES: dict[str, tuple[tuple[str, ...], Callable[..., Verdict], tuple[str, ...]]] = {
    "single-speaker detection": (("30_per_generator", "30_baselines"), _detection, ("single",)),
    "multi-speaker detection": (("30_per_generator", "30_baselines"), _detection, ("multi",)),
    "better than supervised baselines on unseen generators": (("33_paired", "30_baselines"), _better, ("supervised",)),
    "better than another one-class model": (("33_paired", "30_baselines"), _better, ("one-class",)),
    "discrepancy scaling helps most where real speech differs from the training speech": (("31_shift",), _shift, ()),
    "anomaly maps over time and frequency": (("41_localisation",), _maps, ()),
    "calibrated anomaly scores": (("34_points",), _calibrated, ()),
}


def verdicts(paper: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """The paper's claims (`claim, paper, where_we_look`) with `ours, best baseline, verdict, why, rule`, from the tables in `folder`.

    A claim without a rule or without its tables is "not tested".
    """
    rows = []
    for claim in paper.itertuples():
        names, rule, given = RULES.get(claim.claim, ((), None, ()))
        paths = {name: Path(folder) / f"{name}.csv" for name in names}
        missing = [name for name, path in paths.items() if not path.exists()]
        if rule is None or missing:
            found: Verdict = ("", "", UNTESTED, f"missing: {', '.join(missing)}" if missing else "no rule")
        else:
            found = rule({name: pd.read_csv(path) for name, path in paths.items()}, *given)
        text = " ".join((rule.__doc__ or "").split()) if rule else ""
        rows.append((claim.claim, claim.paper, *found, text, claim.where_we_look))
    return pd.DataFrame(rows, columns=["claim", "paper", "ours", "best baseline", "verdict", "why", "rule", "where"])


def limits(folder: Path) -> pd.DataFrame:
    """How far the numbers carry, `limit, number`, computed from the tables of notebooks 11, 34, 42 and 43 that are there."""
    rows: list[tuple[str, str]] = []
    names = ("11_controls", "11_interventions", "34_points", "42_robustness", "43_filters")
    read = {name: pd.read_csv(path) for name in names if (path := Path(folder) / f"{name}.csv").exists()}
    if "11_controls" in read:
        worst = read["11_controls"].sort_values("auc").iloc[-1]
        rows.append(("real speech with another history that is told from untouched real speech best",
                     f"{worst.generator}, AUC {worst.auc:.2f} [{worst.auc_low:.2f}, {worst.auc_high:.2f}]"))
    if "11_interventions" in read:
        table = read["11_interventions"]
        named = table.intervention[table.verdict == "a confound"]
        rows.append(("properties of a recording that move real speech as far as synthesis does", ", ".join(named) or "none"))
    if "34_points" in read:
        table = read["34_points"]
        row = table[(table.setting == "cross-corpus") & (table.nominal == 0.05)].iloc[0]
        rows.append(("real speech of another corpus flagged at nominal 5 %", f"{row['false alarms']:.0%} [{row.low:.0%}, {row.high:.0%}]"
                     + ("" if row.resolved else ", unresolved")))
    if "42_robustness" in read:
        table = read["42_robustness"]
        table = table[table.condition != "clean"]
        rows.append(("conditions under which more than 20 % of real speech is flagged, before and after abstaining",
                     f"{(table['false alarms'] > 0.2).sum()} and {(table['false alarms given a verdict'] > 0.2).sum()} of {len(table)}"))
    if "43_filters" in read:
        table = read["43_filters"]
        rows.append(("mean AUC before and after one learned filter a vocoder",
                     f"{table['AUC before'].mean():.2f} and {table['AUC after'].mean():.2f}"))
    return pd.DataFrame(rows, columns=["limit", "number"])
