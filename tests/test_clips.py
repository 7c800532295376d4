import pandas as pd
import pytest

from lib.data.clips import LeakError, _jobs, check_table, require_bonafide, validation_parts
from lib.data.generators import GENERATORS
from lib.settings import Data


def table():
    """Forty validation clips, ten of training and test, and a fake of every test and of four validation clips."""
    rows = []
    for split, count in (("train", 10), ("validation", 40), ("test", 10)):
        for number in range(count):
            rows.append({"clip_id": f"{split}{number}", "role": "bonafide", "label": "bonafide", "single": split,
                         "multi": split, "speaker": f"{split}-voice", "parent": "", "sha256": f"{split}{number}",
                         "generator": ""})
    held_out = [row for row in rows if row["single"] == "validation"]
    for parent in [row for row in rows if row["single"] == "test"] + held_out[:4]:
        split = "test" if parent["single"] == "test" else "development"
        rows.append(parent | {"clip_id": parent["clip_id"] + "__world", "role": "copysynth", "label": "spoof",
                              "generator": "world", "parent": parent["clip_id"], "single": split, "multi": split,
                              "sha256": "f" + parent["sha256"]})
    return pd.DataFrame(rows)


def test_clean_table_passes():
    check_table(table())


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.assign(single=t.single.where(t.role == "bonafide", "train")), "synthetic clips in a fitting split"),
    (lambda t: t.assign(clip_id="one"), "not unique"),
    (lambda t: t.assign(sha256="same"), "the same audio is in two splits"),
    (lambda t: t.assign(speaker="one voice"), "a speaker is in two splits"),
])
def test_leaks_in_the_table_are_refused(change, message):
    with pytest.raises(LeakError, match=message):
        check_table(change(table()))


def test_nothing_but_bona_fide_fitting_clips_passes_the_guard():
    clips = table()
    train = clips[clips.single == "train"]
    assert require_bonafide(train, "single", "training", ("train",)) is train
    for wrong in (clips[clips.single == "test"], clips[clips.label == "spoof"], pd.concat([train, train]),
                  train.iloc[:0], clips[clips.single == "validation"]):
        with pytest.raises(LeakError):
            require_bonafide(wrong, "single", "training", ("train",))
    with pytest.raises(LeakError, match="test split"):
        require_bonafide(clips[(clips.single == "test") & (clips.role == "bonafide")], "single", "scaling", ("test",))


def test_development_fakes_are_never_test_fakes():
    clips = table().assign(path="", source="", corpus="", licence="", text="")
    made = [GENERATORS[name] for name in ("kokoro_ja", "hibari", "world", "world_conversion")]
    rows = pd.DataFrame([row for _, row in _jobs(clips[clips.role == "bonafide"], made, Data(texts=2, development=3))])
    splits = rows.groupby("generator")[["single", "multi"]].agg(set)
    assert splits.single.to_dict() == splits.multi.to_dict() == {
        name: {"development" if GENERATORS[name].development else "test"} for name in splits.index}
    counts = rows.groupby("generator").size().to_dict()
    assert counts == {"kokoro_ja": 2, "hibari": 2, "world": 10, "world_conversion": 6}


def test_development_clips_are_spread_over_voices():
    clips = table()
    clips = clips[clips.role == "bonafide"].assign(path="", source="", corpus="", licence="", text="")
    clips.loc[clips.single == "validation", "speaker"] = ["one"] * 35 + ["two"] * 4 + ["three"]
    rows = pd.DataFrame([row for _, row in _jobs(clips, [GENERATORS["world_conversion"]], Data(development=7))])
    parents = clips.set_index("clip_id").speaker[rows.parent.unique()]
    assert parents.value_counts().to_dict() == {"one": 3, "two": 3, "three": 1}


def test_controls_never_fit_anything():
    control = table().head(1).assign(role="control")
    with pytest.raises(LeakError):
        require_bonafide(control, "single", "training", ("train",))


def test_validation_parts_are_disjoint_and_stable():
    clips = table()
    parts = validation_parts(clips, "single")
    assert set(parts.index) == set(clips.clip_id[(clips.single == "validation") & (clips.role == "bonafide")])
    assert set(parts.index[parts == "development"]) == {f"validation{number}" for number in range(4)}
    assert set(parts) == {"development", "selection", "scaling", "threshold"}
    shuffled = validation_parts(clips.sample(frac=1, random_state=3), "single")
    assert parts.sort_index().equals(shuffled.sort_index())


def test_a_synthesiser_installed_later_is_used_and_what_is_missing_is_said_again(tmp_path, monkeypatch, capsys):
    from lib import study

    made, ready = [], [GENERATORS["world"]]

    def prepared(*_):
        made.append(len(ready))
        return table().assign(path="clip.flac"), ["hibari: missing"]

    monkeypatch.setattr(study, "available", lambda names: (list(ready), ["hibari: missing"]))
    monkeypatch.setattr(study, "prepare", prepared)
    monkeypatch.setattr(study, "DATA", tmp_path)
    monkeypatch.setattr(study, "RUNS", tmp_path)
    (tmp_path / "clip.flac").touch()
    for expected in ([1], [1]):  # the second time the table is there, and what is missing is said all the same
        study.say_once.cache_clear()
        assert len(study.Study.open("smoke").clips) == len(table()) and made == expected
        assert "skipped: hibari: missing" in capsys.readouterr().out
    ready.append(GENERATORS["hibari"])
    assert len(study.Study.open("smoke").clips) == len(table()) and made == [1, 2]
    (tmp_path / "clip.flac").unlink()  # and made anew where clips are gone
    assert len(study.Study.open("smoke").clips) == len(table()) and made == [1, 2, 2]
