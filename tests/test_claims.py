import pandas as pd
import pytest

from lib.evaluate.claims import FAILS, HOLDS, PART, RULES, UNTESTED, limits, verdicts
from lib.paths import REFERENCE


@pytest.fixture
def folder(tmp_path):
    tables = {
        "30_per_generator": pd.DataFrame({"experiment": ["single", "single", "multi"], "kind": "copysynth", "generator": ["a", "b", "a"],
                                          "auc": [0.9, 0.6, 0.5], "auc_low": [0.8, 0.45, 0.4]}),
        "30_baselines": pd.DataFrame([(e, d, k, v) for e in ("single", "multi") for d, k, v in (
            ("Feature pyramid matching (this study)", "ours", 0.75), ("neighbours", "one-class", 0.6), ("network", "supervised", 0.9))],
            columns=["experiment", "detector", "kind", "copysynth"]),
        "33_paired": pd.DataFrame({"experiment": ["single", "multi"] * 2, "kind": ["one-class"] * 2 + ["supervised"] * 2,
                                   "ours minus baseline": [0.15, 0.1, -0.2, 0.01], "p (Holm)": [0.01, 0.02, 0.01, 0.9]}),
        "31_shift": pd.DataFrame({"scaling": ["none", "element", "frequency"], "score": "mean", "home": [0.6, 0.62, 0.6],
                                  "away, new statistics": [0.5, 0.6, 0.5]}),
        "41_localisation": pd.DataFrame({"map": ["read (ours)", "log-energy"], "kind": "splice", "pixel AUROC": [0.7, 0.6],
                                         "PRO@30%": [0.2, 0.3]}),
        "34_points": pd.DataFrame({"setting": ["same voice", "cross-corpus"], "construction": "clips", "nominal": 0.05, "resolved": True,
                                   "false alarms": [0.05, 0.9], "low": [0.01, 0.8], "high": [0.1, 1.0]})}
    for name, table in tables.items():
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    return tmp_path


def test_every_claim_of_the_paper_has_a_rule():
    assert set(pd.read_csv(REFERENCE / "paper.csv").claim) == set(RULES)


def test_verdicts_follow_the_tables(folder):
    found = verdicts(pd.read_csv(REFERENCE / "paper.csv"), folder).set_index("claim")
    assert found.verdict.to_dict() == {
        "single-speaker detection": PART, "multi-speaker detection": FAILS, "better than supervised baselines on unseen generators": FAILS,
        "better than another one-class model": HOLDS,
        "discrepancy scaling helps most where real speech differs from the training speech": HOLDS,
        "anomaly maps over time and frequency": PART, "calibrated anomaly scores": PART}
    assert "not b" in found.loc["single-speaker detection", "why"] and found.rule.str.startswith("Holds where").all()
    assert found.loc["calibrated anomaly scores", "why"].endswith("worst cross-corpus")


def test_a_missing_table_is_not_tested(folder):
    (folder / "31_shift.csv").unlink()
    found = verdicts(pd.read_csv(REFERENCE / "paper.csv"), folder).set_index("claim")
    row = found.loc["discrepancy scaling helps most where real speech differs from the training speech"]
    assert row.verdict == UNTESTED and row.why == "missing: 31_shift"
    unknown = verdicts(pd.DataFrame({"claim": ["tea"], "paper": ["x"], "where_we_look": ["y"]}), folder)
    assert unknown.verdict[0] == UNTESTED


def test_limits_are_computed_from_what_is_there(folder):
    assert limits(folder).number.tolist() == ["90% [80%, 100%]"]
    pd.DataFrame({"AUC before": [0.8, 0.9], "AUC after": [0.4, 0.5]}).to_csv(folder / "43_filters.csv", index=False)
    assert limits(folder).number.tolist()[-1] == "0.85 and 0.45"
