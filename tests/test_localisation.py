import numpy as np
import pytest

from lib.audit import localisation
from lib.audit.localisation import (
    KINDS,
    Edit,
    by_sentence,
    coarse,
    edited,
    frame_measures,
    masked,
    measured,
    over_sentences,
    overlaps,
)
from lib.data.channel import apply_channel
from lib.evaluate import metrics
from lib.settings import load_settings
from tests.conftest import toy_speech


def edit_of(truth):
    return Edit("clip", "world", "splice", np.zeros(1), np.ones(1, bool), truth)


def box(rows=(8, 24), frames=(40, 80), shape=(48, 200)):
    truth = np.zeros(shape, bool)
    truth[rows[0] : rows[1], frames[0] : frames[1]] = True
    return truth


def test_a_perfect_map_scores_perfectly_and_its_negative_not_at_all():
    truth = box()
    noise = np.random.default_rng(0).standard_normal(truth.shape) * 0.01
    good, bad = measured([edit_of(truth)], [truth + noise], 0.5), measured([edit_of(truth)], [noise - truth], 0.5)
    assert good["pixel AUROC"] == good["IoU"] == good["F1"] == good["pointing"] == 1
    assert good["PRO@30%"] == pytest.approx(1)
    assert bad["pixel AUROC"] == 0 and bad["PRO@30%"] == 0 and bad["pointing"] == 0


def test_a_map_that_knows_nothing_is_at_chance():
    truths = [box() for _ in range(20)]
    random = np.random.default_rng(1)
    maps = [random.standard_normal(truth.shape) for truth in truths]
    found = measured([edit_of(truth) for truth in truths], maps, 0.0)
    assert found["pixel AUROC"] == pytest.approx(0.5, abs=0.03)
    assert found["PRO@30%"] == pytest.approx(0.15, abs=0.02)  # overlap = rate: the area under a diagonal to 0.3


def test_pro_by_hand():
    truth = np.array([[True, True, False, False, False, False, False, False, False, False]] * 2)
    values = np.array([[2.0, 0.5, 1.0, 0, 0, 0, 0, 0, 0, 0]] * 2)
    # Half of the region lies above every outside cell; the other half is found once 1 of 8 outside cells is passed.
    assert 0.75 < overlaps([values], [truth], limit=0.3)[0] < 0.85


def test_coarse_is_the_mean_of_cells():
    values = np.arange(8 * 9, dtype=float).reshape(8, 9)
    assert coarse(values).shape == (2, 2) and coarse(values)[0, 0] == values[:4, :4].mean()


def test_frame_measures_at_every_length():
    truth = box(rows=(0, 48))
    table = frame_measures([edit_of(truth)], [truth.astype(float)], [np.zeros((48, 200))], 0.008)
    assert list(table.frame_ms) == [20, 40, 80, 160, 320, 640]
    assert table.eer.iloc[0] < 0.05 and table.f1.iloc[0] > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_edits_change_what_the_truth_says_and_nothing_else(kind):
    settings = load_settings("smoke", 0, "channel.enabled=false")
    real, fake = toy_speech(3.0, 1), toy_speech(3.0, 2)
    edit = edited(real, fake, kind, settings, np.random.default_rng(5))
    assert edit.truth.shape == (192, 1 + len(edit.audio) // 128) and 0 < edit.truth.mean() < 0.8
    changed = np.abs(edit.audio - real[: len(edit.audio)]) > 1e-4
    frames = np.flatnonzero(edit.truth.any(0))
    first, last = frames[0] * 128, min(len(changed), frames[-1] * 128 + 1)
    assert changed[first:last].mean() > 0.3
    if kind != "band":  # a place begins and ends within a frame of the image
        assert not changed[: max(0, first - 128)].any() and not changed[last + 128 :].any()
    if kind == "splice":
        assert edit.truth[:, edit.truth.any(0)].all()


def test_the_same_place_for_every_generator():
    settings = load_settings("smoke")
    frames = []
    for seed in (2, 3):
        edit = edited(toy_speech(3.0, 1), toy_speech(3.0, seed), "splice", settings, np.random.default_rng(9))
        frames.append(np.flatnonzero(edit.truth.any(0))[[0, -1]])
    assert np.abs(frames[0] - frames[1]).max() <= 4  # 32 ms: the channel trims each its own pauses


def test_sentences_add_up_to_the_measure_and_their_spread_is_its_interval():
    random, truth = np.random.default_rng(3), box()
    edits = [Edit(f"clip {n}", "world", "splice", np.zeros(1), np.ones(1, bool), truth) for n in range(6)]
    maps = [random.standard_normal(truth.shape) + 0.4 * (n + 1) * truth for n in range(6)]
    table, cells = by_sentence(edits, maps), [coarse(values) for values in maps]
    inside = np.concatenate([values[coarse(truth) > 0.5] for values in cells])
    outside = np.concatenate([values[coarse(truth) <= 0.5] for values in cells])
    assert table["pixel AUROC"].mean() == pytest.approx(metrics.area_under_curve(-outside, -inside))
    assert table["pixel AUROC"].argmin() == 0 and measured(edits, maps, 0)["PRO@30%"] == table["PRO@30%"].mean()
    row = over_sentences(table.assign(map="ours"), ["map"]).iloc[0]
    expected = metrics.paired(table["PRO@30%"])
    assert (row["PRO@30%"], row["PRO@30% low"]) == pytest.approx((expected.difference, expected.low))
    assert row.sentences == 6


def test_pauses_lie_below_every_map_alike():
    values, active = np.array([[5.0, 1.0, 3.0], [9.0, 2.0, 2.0]]), np.array([False, True, True])
    found = masked(values, active)
    assert (found[:, 1:] == values[:, 1:]).all() and (found[:, 0] < 1.0).all() and (found[:, 0] > 0.99).all()
    assert (masked(np.ones((2, 3)), active)[:, 0] < 1).all(), "activity alone is a map"
    assert masked(values, np.zeros(3, bool)) is values


def test_all_maps_of_a_clip_from_one_pass(tiny_detector, monkeypatch):
    audio, active = apply_channel(toy_speech(1.5, 3), tiny_detector.settings.channel)
    explanation = tiny_detector.explain_prepared(audio, active)
    monkeypatch.setattr(localisation, "saliency", lambda *_: np.ones(explanation.map.shape))
    maps = localisation.drawn_maps(tiny_detector, None, audio, active)
    assert list(maps)[0] == f"{tiny_detector.map_kind} (ours)" and len(maps) == len(set(maps)) == 9
    assert {values.shape for values in maps.values()} == {explanation.map.shape}
    inside = explanation.active
    assert np.allclose(maps[f"{tiny_detector.map_kind} (ours)"][:, inside], explanation.map[:, inside])
    plain = tiny_detector.explain_prepared(audio, active, kind="none")
    assert np.allclose(maps["product, no scaling"][:, inside], np.prod(plain.levels, axis=0)[:, inside])
    for values in maps.values():
        assert inside.all() or values[:, ~inside].max() < values[:, inside].min(), "pauses lie lowest in every map"
