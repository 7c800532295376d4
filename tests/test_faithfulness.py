import numpy as np
import pandas as pd
import pytest

from lib.audit.faithfulness import SHARES, STRETCH, curve_areas, exchange_curves, exchanged, slider_panel

VALUES = np.array([0, 3, 0, 0, 6, 0, 0, 1, 0, 0], dtype=np.float32)  # of the fake's stretches; the real clip is silent
ORDER = np.argsort(-VALUES, kind="stable")


def middles(audio):
    """Sum of the middle samples of all stretches, away from the fades."""
    return float(audio[STRETCH // 2 :: STRETCH].sum())


def curves_of(orders):
    fake = np.repeat(VALUES, STRETCH)
    return exchange_curves(np.zeros_like(fake), fake, orders, middles)


def test_both_curves_by_hand():
    table = curves_of({"map": ORDER, "least": ORDER[::-1]})
    assert SHARES == (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
    found = {key: part.relative.tolist() for key, part in table.groupby(["curve", "order"])}
    # Of ten stretches 0, 1, 2, 5, 8, 9, 10 are exchanged; 6, 3 and 1 of the score's 10 lie in three of them.
    assert found["deletion", "map"] == pytest.approx([1, 0.4, 0.1, 0, 0, 0, 0])
    assert found["insertion", "map"] == pytest.approx([0, 0.6, 0.9, 1, 1, 1, 1])
    assert found["deletion", "least"] == pytest.approx([1, 1, 1, 1, 0.9, 0.6, 0])
    assert found["insertion", "least"] == pytest.approx([0, 0, 0, 0, 0.1, 0.4, 1])


def test_areas_by_hand():
    one = curves_of({"map": ORDER, "random": np.arange(10), "energy": ORDER})
    table = pd.concat([one.assign(clip_id=f"{parent}{copy}", parent=parent) for parent in "ab" for copy in "xy"])
    areas = curve_areas(table).set_index(["curve", "order"])
    # Trapezoids of the curves above: 0.07 + 0.0375 + 0.0125.
    assert areas.area["deletion", "map"] == pytest.approx(0.12)
    assert areas.area["insertion", "map"] == pytest.approx(0.88)
    # In their own order the stretches leave 10, 10, 7, 1, 0, 0, 0 of ten.
    assert areas.area["deletion", "random"] == pytest.approx(0.1 + 0.1275 + 0.1 + 0.0125)
    assert areas["minus random"]["deletion", "map"] == pytest.approx(0.12 - 0.34)
    assert areas["area low"]["deletion", "map"] == pytest.approx(0.12)
    assert areas["minus random high"]["deletion", "map"] == pytest.approx(-0.22)
    assert areas["minus energy"]["deletion", "map"] == 0 and areas["minus energy high"]["deletion", "map"] == 0
    assert (areas.clips == 4).all()
    assert curve_areas(table[table.parent == "a"])["area low"].isna().all(), "one parent shows no spread"
    assert curve_areas(table.head(0)).empty


def test_an_exchange_fades_at_its_seams_only():
    inside, outside = np.ones(4 * STRETCH), np.zeros(4 * STRETCH)
    mixed = exchanged(inside, outside, np.array([False, True, True, False]))
    assert not mixed[: STRETCH - 40].any() and not mixed[3 * STRETCH + 40 :].any()
    assert (mixed[STRETCH + 40 : 3 * STRETCH - 40] == 1).all()
    assert np.abs(np.diff(mixed)).max() < 0.02
    assert (exchanged(inside, outside, np.ones(4, bool)) == 1).all(), "all of it is the other clip to the last sample"


def test_sliders_draw_the_scores_and_the_share_beyond_the_line():
    random, saved = np.random.default_rng(0), {"kinds": np.array(["none", "frequency"])}
    for name, middle in (("fitted", 0.0), ("held out", 0.0), ("real", 0.0), ("world", -3.0)):
        saved[f"bands/{name}"] = random.normal(middle, 1, (40, 2, 3, 6)).astype(np.float32)
        for kind in saved["kinds"]:
            saved |= {f"map/{name}/{kind}/{level}": random.normal(size=(12, 20)) for level in (1, 2, 3)}
    aucs = {score: slider_panel(saved, 2, "none", score).axes[2].lines[0].get_xdata()[0]
            for score in ("mean", "one-sided", "two-sided")}
    assert aucs["mean"] == 0 and aucs["one-sided"] < 0.5 and aucs["two-sided"] == 1, "too normal, seen both ways"
    labels = [text.get_text() for text in slider_panel(saved, 1, "none", "two-sided").axes[1].get_legend().get_texts()]
    assert "world: 100% beyond the line" in labels
