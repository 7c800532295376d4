"""Any corpus in any role: who ends up in which split, which fakes are test clips, and what is refused."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

from lib.data import clips as protocols
from lib.data import public
from lib.data.clips import check_table, prepare, single_budget
from lib.data.layouts import DatasetError
from lib.data.packages import Source
from lib.data.public import cast_of, roles_of
from lib.paths import NODE
from lib.settings import Data, load_settings
from tests.conftest import toy_speech


def speech(path, seed, rate_hz=16_000):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, toy_speech(1.3, seed), rate_hz)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Small trees: LibriSpeech without validation, ASVspoof 2019 LA evaluation, LJSpeech, copies by two vocoders."""
    home = tmp_path_factory.mktemp("corpora")
    for speaker in range(100, 110):
        folder = home / "LibriSpeech" / "train-clean-100" / str(speaker) / "1"
        names = [f"{speaker}-1-{index:04d}" for index in range(3)]
        for index, name in enumerate(names):
            speech(folder / f"{name}.flac", 10 * speaker + index)
        (folder / f"{speaker}-1.trans.txt").write_text("".join(f"{name} WORDS\n" for name in names))
    lines = [f"LA_{10 + index % 3:04d} LA_E_{index:07d} - {'-' if index < 9 else f'A{7 + index % 2:02d}'} "
             f"{'bonafide' if index < 9 else 'spoof'}\n" for index in range(19)]
    protocol = home / "LA/ASVspoof2019_LA_cm_protocols/ASVspoof2019.LA.cm.eval.trl.txt"
    protocol.parent.mkdir(parents=True)
    protocol.write_text("".join(lines))
    for index in range(19):
        speech(home / f"LA/ASVspoof2019_LA_eval/flac/LA_E_{index:07d}.flac", 200 + index)
    names = [f"LJ001-{index:04d}" for index in range(20)]
    for index, name in enumerate(names):
        speech(home / f"LJ/wavs/{name}.wav", 300 + index)
        speech(home / f"WaveFake/ljspeech_melgan/{name}_gen.wav", 400 + index)
        speech(home / f"WaveFake/ljspeech_waveglow/{name}.wav", 500 + index)
    (home / "LJ/metadata.csv").write_text("".join(f"{name}|words|words\n" for name in names))
    return home


def options(home, **changes):
    parts = {"train": "librispeech:{}/LibriSpeech", "test": "asvspoof2019la:{}/LA",
             "single": "lj_speech:{}/LJ+wavefake:{}/WaveFake"} | changes
    roles = {name: tuple(filter(None, text.replace("{}", str(home)).split("+"))) for name, text in parts.items()}
    return Data(**roles, single_train=8, single_validation=6, single_test=4, multi_train_per_speaker=2,
                multi_validation_per_speaker=2, multi_test_per_speaker=2, development=2, fakes_per_generator=3,
                generators=("control_resample",))


@pytest.fixture(scope="module")
def table(corpora, tmp_path_factory):
    home = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocols, "DATA", home)
        patch.setattr(protocols, "CLIPS", home / "clips")
        yield prepare(options(corpora), workers=1)[0]


def test_the_clip_table_of_three_corpora(table):
    check_table(table)
    real = table[table.role == "bonafide"]
    assert real.single.value_counts().to_dict() == {"train": 8, "validation": 6, "test": 4, "": len(real) - 18}
    assert set(real.speaker[real.single != ""]) == {"ljspeech-LJ"}
    voices = real[real.multi != ""].groupby("multi").speaker.agg(set).to_dict()
    assert len(voices["train"]) == 8  # three of four are dealt to training, the rest to validation
    assert len(voices["train"]) + len(voices["validation"]) == 10 and not voices["train"] & voices["validation"]
    assert voices["test"] == {"ljspeech-LJ", *(f"asvspoof2019_la-LA_{number:04d}" for number in (10, 11, 12))}
    assert set(real.corpus) == {"librispeech", "asvspoof2019_la", "ljspeech"}
    assert not table.clip_id.str.contains(" ").any()


def test_fakes_of_corpora_are_test_clips_and_copies_follow_their_parents(table):
    fakes = table[table.role.isin(["spoof", "copysynth", "tts"])]
    assert fakes.groupby("generator").size().to_dict() == {
        "asvspoof2019_la-A07": 3, "asvspoof2019_la-A08": 3, "wavefake-melgan": 3, "wavefake-waveglow": 3}
    attacks, copies = fakes[fakes.corpus == "asvspoof2019_la"], fakes[fakes.corpus == "wavefake"]
    assert set(attacks.multi) == {"test"} and set(attacks.single) == {""}
    parents = table.set_index("clip_id").loc[copies.parent]
    assert set(parents.single) == {"test"} and copies.single.tolist() == parents.single.tolist()
    assert copies.multi.tolist() == parents.multi.tolist()


def test_corpora_with_splits_give_their_own_and_others_are_named(corpora):
    sources, voice, _ = cast_of(options(corpora, single=""))
    assert voice.startswith("asvspoof2019_la-LA_")
    assert {source.split for source in sources} == {"train", "validation", "test"}
    with pytest.raises(DatasetError, match=r"no split 'validation', only \['train'\]"):
        cast_of(options(corpora, validation="librispeech@validation:{}/LibriSpeech"))


def test_one_voice_is_shared_out_by_clip_but_never_with_test(corpora):
    sources, _, _ = cast_of(options(corpora, train="ljspeech:{}/LJ", single=""))
    split = {source.clip_id: source.split for source in sources if source.corpus == "ljspeech"}
    assert set(split.values()) == {"train", "validation"} and len(split) == 20
    with pytest.raises(DatasetError, match="no test voice may be fitted on"):
        cast_of(options(corpora, train="ljspeech:{}/LJ", test="ljspeech:{}/LJ", single=""))


@pytest.mark.parametrize(("changes", "message"), [
    ({"train": ""}, "at least"),
    ({"test": "wavefake:{}/WaveFake"}, "no bona fide clips for test"),
    ({"train": "vctk:{}/none"}, "was taken from vctk"),
    ({"train": "librispeach:{}/LibriSpeech"}, "expected NAME:FOLDER.*librispeech.*found"),
    ({"train": "librispeech"}, "expected NAME:FOLDER"),
    ({"train": "embedded:{}"}, "embedded takes no folder"),
    ({"train": "librispeech@dev:{}/LibriSpeech"}, "SPLIT among train"),
    ({"train": "ljspeech:{}/LJ"}, "nothing is left for train"),
])
def test_roles_that_cannot_be_played(corpora, changes, message):
    with pytest.raises(DatasetError, match=message):
        cast_of(options(corpora, **changes))


def test_a_missing_folder_says_where_to_get_the_corpus(corpora):
    with pytest.raises(DatasetError, match="datashare.ed.ac.uk.*ODC-By"):
        cast_of(options(corpora, test="asvspoof2019_la:{}/none"))


def test_further_readers_are_test_voices_beside_the_embedded_ones(corpora, monkeypatch):
    own = Source(Path("a.wav"), "klettres", "klettres-nb", "test", "GPL-2+")
    monkeypatch.setattr(public, "embedded_sources", lambda hold_out: [own])
    monkeypatch.setattr(public, "MOST_READERS", 4)
    more = Data(more=(f"librispeech:{corpora}/LibriSpeech", f"ljspeech:{corpora}/LJ"))
    (first, *further), voice, fakes = cast_of(more)
    assert (first, voice, fakes) == (own, "festvox-ru", None)
    assert {source.split for source in further} == {"test"}
    voices = {source.speaker for source in further}
    assert len(voices) == 4 and voices <= {f"librispeech-{name}" for name in range(100, 110)} | {"ljspeech-LJ"}
    assert cast_of(more)[0] == [own, *further]  # chosen by a hash, not by chance
    plain, wider = (cast_of(options(corpora, more=corpus))[0] for corpus in ("", "ljspeech:{}/LJ"))
    added = [source for source in wider if source not in plain]
    assert len(wider) > len(plain) and {(source.speaker, source.split) for source in added} <= {("ljspeech-LJ", "test")}


def test_librispeech_alone_plays_every_part(corpora, monkeypatch):
    monkeypatch.setattr(public, "DATA", corpora)
    (corpora / "librispeech").symlink_to(corpora / "LibriSpeech")
    monkeypatch.setattr(public, "download_dataset", lambda *_: pytest.fail("it is there"))
    sources, voice, fakes = cast_of(Data(corpus="librispeech"))
    split = {source.speaker: source.split for source in sources}
    assert split[voice] == "test" and set(split.values()) == {"train", "validation", "test"} and fakes.empty
    assert len(split) == 10 and len(sources) == 30 and all(source.path.exists() for source in sources)


def test_roles_are_written_in_options():
    data = load_settings("smoke", 0, "data.train=librispeech@train:/d/L+ljspeech:/d/J,data.test=embedded").data
    assert [(role.corpus, role.folder, role.split) for role in roles_of(data.train)] == [
        ("librispeech", "/d/L", "train"), ("ljspeech", "/d/J", "")]
    assert roles_of(data.test)[0].corpus == "embedded"


def test_a_voice_with_fewer_clips_than_wanted_keeps_the_proportions():
    data = Data(single_train=60, single_validation=20, single_test=20)
    assert single_budget(data, 50) == {"train": 30, "validation": 10, "test": 10}
    assert single_budget(data, 500) == {"train": 60, "validation": 20, "test": 20}


# --- killed preparation -----------------------------------------------------------------------------------------------

CHILD = """
import sys, pathlib
from lib.paths import clear_stale_once
from lib.data.clips import prepare, save_table
from tests.test_roles import options
if __name__ == "__main__":  # workers import this file
    clear_stale_once()  # as lib.study.Study does
    save_table(prepare(options(pathlib.Path(sys.argv[1])), workers=2)[0], pathlib.Path(sys.argv[2]))
"""


def started(script, corpora, home):
    command = [sys.executable, script, corpora, home / "table.parquet"]
    places = {"STUDY_ROOT": str(home), "PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.Popen(command, env={**os.environ, **places})


def working(home):
    """Processes that work below `home`, whoever started them."""
    places = [path for path in Path("/proc").glob("[0-9]*/environ") if os.access(path, os.R_OK)]
    found = []
    for path in places:
        try:
            found += [path.parent.name] if f"STUDY_ROOT={home}".encode() in path.read_bytes() else []
        except OSError:  # it ended meanwhile
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for workers in /proc")
def test_killed_preparation_goes_on_equals_the_uninterrupted_one_and_leaves_nothing(corpora, table, tmp_path):
    script, home, random = tmp_path / "prepare.py", tmp_path / "home", np.random.default_rng()
    script.write_text(CHILD)
    for folder in ("bonafide", "control_resample"):  # once among the real clips, once while workers make others
        child = started(script, corpora, home)
        while child.poll() is None and not [*(home / "data/clips" / folder).glob("*.flac")]:
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.01))
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert not (home / "table.parquet").exists(), "killed too late to be a test"
    until = time.time() + 20
    while working(home) and time.time() < until:
        time.sleep(0.05)
    assert not working(home), "workers end with the process that was killed"
    (home / "data/clips/bonafide" / f".tmp-{NODE}-999999999-x.flac").write_text("half a")  # as a kill may leave it
    assert started(script, corpora, home).wait() == 0
    pd.testing.assert_frame_equal(pd.read_parquet(home / "table.parquet"), table)
    assert not [*home.rglob(".tmp-*")]
    assert {path.relative_to(home / "data").as_posix() for path in home.rglob("*.flac")} == set(table.path)
