"""Every number of README's results is found in a table of the reference run; `python tests/test_readme.py` prints the
rows as they have to be."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).parent.parent
TITLES = {"single": "one speaker", "multi": "voices never heard"}


def table(name):
    return pd.read_csv(ROOT / "reports" / "reference" / "full" / f"{name}.csv")


def cell(row):
    return f"{row.auc:.2f} [{row.auc_low:.2f}, {row.auc_high:.2f}]"


def outside_rows():
    for row in table("36_evidence").to_dict("records"):
        yield (f"| {row['evidence']} | {row['macro AUC']:.2f} [{row['low']:.2f}, {row['high']:.2f}] | "
               f"{row['pooled AUC']:.2f} | {row['found']:.0%} | {row['false alarms']:.1%} |")


def family_rows():
    lines = table("30_summary").set_index(["experiment", "fakes"])
    for fakes in [name for name in lines.loc["single"].index if name in lines.loc["multi"].index]:
        one, many = lines.loc[("single", fakes)], lines.loc[("multi", fakes)]
        yield (f"| {fakes} | {cell(one)} | {one.eer:.0%} | {cell(many)} | {many['within voices']:.2f} | "
               f"{many.eer:.0%} |")


def kind_rows():
    lines = table("50_evidence").set_index(["experiment", "fakes"])
    for (experiment, fakes), row in lines.iterrows():
        yield f"| {TITLES[experiment]}, {fakes} | " + " | ".join(f"{value:.2f}" for value in row) + " |"


def other_rows():
    lines = table("30_baselines")
    lines = lines[lines.fakes.isin(["all copies", "text to speech"]) & ~lines.kind.isin(["ours", "evidence"])]
    wide = lines.pivot_table(index=["kind", "system"], columns=["experiment", "fakes"], values="auc", sort=False)
    for (kind, system), row in wide.iterrows():
        values = [row[experiment, fakes] for experiment in TITLES for fakes in ("all copies", "text to speech")]
        yield f"| {system} ({kind}) | " + " | ".join(f"{value:.2f}" for value in values) + " |"


SECTIONS = (outside_rows, family_rows, kind_rows, other_rows)


@pytest.mark.parametrize("rows", SECTIONS)
def test_every_row_of_the_results_is_the_reference_runs(rows):
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    lacking = [row for row in rows() if row not in readme]
    assert not lacking, "\n".join(lacking)


def numbers_in(names):
    """Every number of the tables, and in their words, as absolute values."""
    tables = [table(name) for name in names]
    words = " ".join(str(cell) for each in tables for cell in each.select_dtypes(exclude="number").to_numpy().ravel())
    plain = [each.select_dtypes("number").to_numpy(float).ravel() for each in tables]
    return np.abs(np.concatenate([*plain, [float(each) for each in re.findall(r"\d+\.\d+", words)]]))


def claims():
    """Sentences of README that name tables, with these: the introduction and the points below the result tables."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    results = text[text.index("## Results") : text.index("## The tree")]
    for point in re.split(r"\n(?=- )", results[results.index("\n- **") :]):
        if names := re.findall(r"`(\d\d_\w+)\.csv`", point):
            yield " ".join(point.split()), names
    yield " ".join(text[: text.index("![")].split()), ["33_paired", "36_evidence", "36_without"]


@pytest.mark.parametrize(("text", "names"), claims())
def test_every_number_of_a_claim_is_in_a_table_that_it_names(text, names):
    known = numbers_in(names)
    said = re.findall(r"(?<![\w.])[-+]?(\d\.\d+)(?![\d.]| %)", text)
    shares = [share for pair in re.findall(r"(?:(\d+) to )?([\d.]+) %", text) for share in pair if share]
    lacking = [each for each in said if not np.isclose(known, float(each), atol=0.5001 * 10 ** -len(each[2:])).any()]
    lacking += [f"{each} %" for each in shares if not np.isclose(100 * known, float(each), atol=0.5001 * 10 ** -len(
        each.partition(".")[2])).any()]
    assert said or shares
    assert not lacking, f"{', '.join(lacking)} of {text[:80]!r}"


if __name__ == "__main__":
    for section in SECTIONS:
        print("\n".join(section()), end="\n\n")
