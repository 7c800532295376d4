"""Every loader on a small tree in exactly its layout, and the traps that such trees set."""
from __future__ import annotations

import math
import urllib.error
import warnings

import numpy as np
import pytest
import soundfile

from lib.data.public import COLUMNS, DATASETS, DatasetError, download_dataset, load_dataset


def audio(path, rate=16_000):
    """A burst of noise of 0.1 s, whatever the suffix says (soundfile cannot write every one)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).normal(0, 0.1, rate // 10)
    kind = {".wav": "WAV", ".flac": "FLAC", ".mp3": "MP3"}[path.suffix]
    soundfile.write(path, noise, rate, format=kind)
    return path


def text(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def loaded(name, root, check=True):
    """The manifest, after what must hold for every corpus."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        table = load_dataset(name, root, check)
    assert list(table) == list(COLUMNS) and len(table) and (table["corpus"] == name).all()
    assert set(table["label"]) <= {"bonafide", "spoof"} and table["clip_id"].is_unique
    assert ((table["label"] == "bonafide") == (table["generator"] == "")).all()
    assert all((root / path).is_file() for path in table["path"]) if root.is_dir() else True
    if check:
        assert np.allclose(table["seconds"], 0.1, atol=0.06) and (table["rate_hz"] > 0).all()
    else:
        assert table["seconds"].isna().all() and (table["rate_hz"] == 0).all()
    assert not table.drop(columns="seconds").isna().any().any() and table.attrs["release"]
    return table.set_index("clip_id")


# --- ASVspoof -----------------------------------------------------------------------

def asvspoof2019(home):
    endings = [("train", "train.trn", "T"), ("dev", "dev.trl", "D"), ("eval", "eval.trl", "E")]
    for split, end, letter in endings:
        text(home / f"ASVspoof2019_LA_cm_protocols/ASVspoof2019.LA.cm.{end}.txt",
             f"LA_0079 LA_{letter}_1000001 - - bonafide", f"LA_0080 LA_{letter}_1000002 - A07 spoof")
        for number in (1, 2):
            audio(home / f"ASVspoof2019_LA_{split}/flac/LA_{letter}_100000{number}.flac")
    return home


@pytest.mark.parametrize("above", ["", "LA", "copy/LA"])
def test_asvspoof2019(tmp_path, above):
    asvspoof2019(tmp_path / above)
    table = loaded("asvspoof2019_la", tmp_path)
    assert table["split"].tolist() == ["train"] * 2 + ["validation"] * 2 + ["test"] * 2
    spoof = table.loc["LA_E_1000002"]
    assert (spoof.label, spoof.generator, spoof.speaker, spoof.role) == ("spoof", "A07", "LA_0080", "spoof")
    assert spoof.path == f"{above}/ASVspoof2019_LA_eval/flac/LA_E_1000002.flac".lstrip("/")


def test_asvspoof2019_inside_elsewhere_and_in_part(tmp_path):
    home = asvspoof2019(tmp_path / "LA")
    with pytest.raises(DatasetError, match=f"inside the corpus: give .*{home.name}"):
        load_dataset("asvspoof2019_la", home / "ASVspoof2019_LA_train" / "flac")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match=r"datashare.*ODC-By|expected ASVspoof2019_LA_cm_protocols"):
        load_dataset("asvspoof2019_la", tmp_path / "empty")
    (home / "ASVspoof2019_LA_train").rename(tmp_path / "gone")
    table = load_dataset("asvspoof2019_la", home)
    assert set(table["split"]) == {"validation", "test"} and "absent: train" in table.attrs["release"]


def test_missing_unreadable_empty_and_extra_files_in_one_report(tmp_path):
    home = asvspoof2019(tmp_path)
    eval_folder = home / "ASVspoof2019_LA_eval/flac"
    (eval_folder / "LA_E_1000001.flac").unlink()
    (eval_folder / "LA_E_1000002.flac").write_bytes(b"no audio")
    soundfile.write(home / "ASVspoof2019_LA_dev/flac/LA_D_1000001.flac", np.zeros(0), 16_000, format="WAV")
    assert len(load_dataset("asvspoof2019_la", home)) == 6  # nothing opened, nothing noticed
    with pytest.raises(DatasetError, match="3 problems") as caught:
        load_dataset("asvspoof2019_la", home, check=True)
    for fragment in ("LA_E_1000001.flac: missing", "LA_E_1000002.flac: unreadable",
                     "LA_D_1000001.flac: unreadable: no samples"):
        assert fragment in str(caught.value)
    home = asvspoof2019(tmp_path / "whole")
    audio(home / "ASVspoof2019_LA_eval/flac/LA_E_9999999.flac")
    with pytest.warns(UserWarning, match=r"1 audio files that no row names.*LA_E_9999999.*71237 are "
                                            r"published"):
        load_dataset("asvspoof2019_la", home, check=True)


def test_duplicate_ids_and_bad_protocol_lines(tmp_path):
    home = asvspoof2019(tmp_path)
    protocol = home / "ASVspoof2019_LA_cm_protocols/ASVspoof2019.LA.cm.dev.trl.txt"
    text(protocol, "LA_0079 LA_T_1000001 - - bonafide")
    with pytest.raises(DatasetError, match="repeated or empty.*LA_T_1000001"):
        load_dataset("asvspoof2019_la", home)
    text(protocol, "LA_0079 LA_D_1000001 - - bona-fide")
    with pytest.raises(DatasetError, match="line 1"):
        load_dataset("asvspoof2019_la", home)
    text(protocol, "LA_0079 ../../secret - - bonafide")
    with pytest.raises(DatasetError, match="paths below it"):
        load_dataset("asvspoof2019_la", home)


def test_asvspoof2019_other_tracks_are_named(tmp_path):
    text(tmp_path / "PA/ASVspoof2019_PA_cm_protocols/ASVspoof2019.PA.cm.train.trn.txt", "PA_0079 PA_T_1 aaa - bonafide")
    with pytest.raises(DatasetError, match="expected ASVspoof2019_LA_cm_protocols.*found .'PA'"):
        load_dataset("asvspoof2019_la", tmp_path)


def asvspoof2021(home, track, rows, parts):
    text(home / f"keys/{track}/CM/trial_metadata.txt", *rows)
    for number, row in enumerate(rows):
        audio(home / parts[number % len(parts)] / f"{row.split()[1]}.flac")
    return home


LA21 = ["LA_0009 LA_E_9332881 alaw ita_tx A07 spoof notrim eval",
        "LA_0007 LA_E_5013670 none - bonafide bonafide notrim progress"]
DF21 = ["LA_0023 DF_E_2000011 nocodec asvspoof A14 spoof notrim progress traditional_vocoder - - - -",
        "TEF2 DF_E_2000013 low_m4a vcc2020 bonafide bonafide notrim eval bonafide - - - -"]
DF_PARTS = [f"ASVspoof2021_DF_eval_part0{part}/ASVspoof2021_DF_eval/flac" for part in range(2)]


def test_asvspoof2021_la(tmp_path):
    table = loaded("asvspoof2021_la", asvspoof2021(tmp_path, "LA", LA21, ["ASVspoof2021_LA_eval/flac"]))
    assert tuple(table.loc["LA_E_9332881", ["condition", "generator", "split"]]) == ("alaw", "A07", "test")
    assert tuple(table.loc["LA_E_5013670", ["condition", "label", "split"]]) == ("", "bonafide", "")


@pytest.mark.parametrize("stage", [8, 13])
def test_asvspoof2021_df_both_keys(tmp_path, stage):
    rows = [" ".join(row.split()[:stage]) for row in DF21]
    table = loaded("asvspoof2021_df", asvspoof2021(tmp_path, "DF", rows, DF_PARTS))
    assert tuple(table.loc["DF_E_2000013", ["condition", "split"]]) == ("low_m4a", "test")
    assert table.loc["DF_E_2000011", "family"] == ("traditional_vocoder" if stage == 13 else "")
    assert table.loc["DF_E_2000013", "path"].startswith("ASVspoof2021_DF_eval_part01/")
    assert ("stage 1" in load_dataset("asvspoof2021_df", tmp_path).attrs["release"]) == (stage == 8)


def test_asvspoof2021_refuses(tmp_path):
    asvspoof2021(tmp_path, "DF", DF21, DF_PARTS)
    audio(tmp_path / "ASVspoof2021_LA_eval/flac/LA_E_1.flac")
    with pytest.raises(DatasetError, match="expected the LA key"):
        load_dataset("asvspoof2021_la", tmp_path)
    (tmp_path / DF_PARTS[1] / "DF_E_2000013.flac").unlink()
    with pytest.raises(DatasetError, match="1 without audio.*Unpack every part"):
        load_dataset("asvspoof2021_df", tmp_path)
    (tmp_path / "keys").rename(tmp_path / "no keys")
    (tmp_path / "no keys/DF/CM/trial_metadata.txt").unlink()
    with pytest.raises(DatasetError, match="key is a separate archive"):
        load_dataset("asvspoof2021_df", tmp_path)


def asvspoof5(home, form):
    parts = [("flac_T", "train", "train", "T"), ("flac_D", "dev.track_1", "dev", "D"),
             ("flac_E_eval", "eval.track_1", "eval", "E")]
    for folder, stem, old, letter in parts:
        if form == "new":
            text(home / f"ASVspoof5.{stem}.tsv", f"{letter}_1 {letter}_0001 F - - - - bonafide bonafide -",
                 f"{letter}_2 {letter}_0002 M C05 3 77 AC1 A05 spoof -")
        else:
            text(home / f"ASVspoof5.{old}.metadata.txt", f"{letter}_1 {letter}_0001 F - bonafide bonafide",
                 f"{letter}_2 {letter}_0002 M - A05 spoof")
        for number in (1, 2):
            audio(home / folder / f"{letter}_000{number}.flac")
    return home


def test_asvspoof5_with_its_protocols_in_a_folder_of_their_own_and_in_part(tmp_path):
    home = asvspoof5(tmp_path / "asvspoof5", "new")
    (home / "ASVspoof5_protocols").mkdir()
    for path in home.glob("*.tsv"):
        path.rename(home / "ASVspoof5_protocols" / path.name)
    assert len(loaded("asvspoof5", tmp_path)) == 6
    (home / "flac_E_eval/E_0001.flac").unlink()
    with pytest.raises(DatasetError, match="E_0001.flac: missing"):
        load_dataset("asvspoof5", tmp_path, check=True)
    protocol = home / "ASVspoof5_protocols/ASVspoof5.train.tsv"
    text(protocol, "SPEAKER_ID FLAC_FILE_NAME SPEAKER_GENDER CODEC CODEC_Q CODEC_SEED ATTACK_TAG ATTACK_LABEL KEY TMP",
         *protocol.read_text().splitlines())
    with pytest.raises(DatasetError, match="line 1: expected 10 columns with bonafide or spoof in column 9"):
        load_dataset("asvspoof5", tmp_path)


@pytest.mark.parametrize("form", ["new", "older"])
def test_asvspoof5(tmp_path, form):
    table = loaded("asvspoof5", asvspoof5(tmp_path, form))
    assert table["split"].tolist() == ["train"] * 2 + ["validation"] * 2 + ["test"] * 2
    assert tuple(table.loc["E_0002", ["generator", "condition"]]) == ("A05", "C05" if form == "new" else "")
    assert table.loc["T_0001", "generator"] == ""  # the column says "bonafide"
    assert ("older" in load_dataset("asvspoof5", tmp_path).attrs["release"]) == (form == "older")


# --- Other sets with spoofed speech -------------------------------------------------

@pytest.mark.parametrize("inner", ["", "wavs"])
def test_in_the_wild(tmp_path, inner):
    home = tmp_path / "release_in_the_wild"
    text(home / "meta.csv", "file,speaker,label", "0.wav,Alec Guinness,spoof", '1.wav,"King, Jr.",bona-fide')
    for number in (0, 1):
        audio(home / inner / f"{number}.wav")
    table = loaded("in_the_wild", tmp_path)
    assert table["label"].tolist() == ["spoof", "bonafide"] and table.loc["1", "speaker"] == "King, Jr."
    assert loaded("in_the_wild", home).loc["0", "path"] == (f"{inner}/" if inner else "") + "0.wav"
    text(home / "meta.csv", "file,speaker,label", "0.wav,A,fake")
    with pytest.raises(DatasetError, match="found .'fake'"):
        load_dataset("in_the_wild", home)


MLAAD_HEADER = ("path|original_file|language|is_original_language|duration|training_data|model_name|"
                "architecture|transcript")


def mlaad(home):
    for language, folder in [("en", "OpenAI TTS-1 HD"), ("de", "Cartesia.ai (Sonic-3)")]:
        place = home / "fake" / language / folder
        text(place / "meta.csv", MLAAD_HEADER,
             f"./fake/{language}/{folder}/a "
             f"b.wav|en_US/by_book/female/judy/emma/wavs/emma_01.wav|{language}|True|1.0"
             f"|unknown|{folder}|VITS|He said: \"no")
        audio(place / "a b.wav", 22_050)
    return home


def test_mlaad(tmp_path):
    table = loaded("mlaad", mlaad(tmp_path / "MLAADv5"))
    clip = table.loc["MLAAD/fake/en/OpenAI TTS-1 HD/a b"]
    assert (clip.role, clip.generator, clip.family) == ("tts", "OpenAI TTS-1 HD", "VITS")
    assert clip.parent == "en_US/by_book/female/judy/emma/wavs/emma_01" and clip.text == 'He said: "no'
    assert load_dataset("mlaad", tmp_path).attrs["release"] == "v5: 2 models, 2 languages"
    with pytest.raises(DatasetError, match="inside the corpus"):
        load_dataset("mlaad", tmp_path / "MLAADv5/fake/en")
    quoted = tmp_path / "MLAADv5/fake/en/OpenAI TTS-1 HD/meta.csv"
    text(quoted, "path|transcript", 'x/a b.wav|"one | two ""three"""')
    assert load_dataset("mlaad", tmp_path)["text"].tolist()[1] == 'one | two "three"'
    text(quoted, "path|transcript", "x/a b.wav|first\u2028second\x85third\x0cfourth")
    assert load_dataset("mlaad", tmp_path)["text"].tolist()[1] == "first\u2028second\x85third\x0cfourth"
    text(quoted, "path|transcript", 'x/a b.wav|"first | \nsecond"')
    assert load_dataset("mlaad", tmp_path)["text"].tolist()[1] == "first | \nsecond"
    quoted.unlink()
    with pytest.raises(DatasetError, match="OpenAI TTS-1 HD"):
        load_dataset("mlaad", tmp_path)


def test_m_ailabs_ids_are_the_parents_of_mlaad(tmp_path):
    for inner in ("en_US/by_book/female/judy/emma", "en_US/by_book/mix/dorothy"):
        name = f"{inner.rsplit('/', 1)[1]}_01"
        text(tmp_path / "real" / inner / "metadata.csv", f'{name}|Said "so|Said "so')
        audio(tmp_path / "real" / inner / "wavs" / f"{name}.wav")
    table = loaded("m_ailabs", tmp_path / "real")
    assert set(load_dataset("mlaad", mlaad(tmp_path / "MLAAD"))["parent"]) <= set(table.index)
    assert table["speaker"].tolist() == ["judy", ""] and table["text"].iloc[0] == 'Said "so'
    assert set(loaded("m_ailabs", tmp_path / "real/en_US").index) == set(table.index)


def test_wavefake(tmp_path):
    names = {"ljspeech_melgan": "LJ001-0001_gen", "ljspeech_waveglow": "LJ001-0001", "ljspeech_hifiGAN":
             "LJ001-0001_gen", "jsut_parallel_wavegan": "BASIC5000_0001_gen",
             "common_voices_prompts_from_conformer_fastspeech2_pwg_ljspeech": "gen_7"}
    for folder, name in names.items():
        audio(tmp_path / "generated_audio" / folder / f"{name}.wav", 22_050)
    table = loaded("wavefake", tmp_path)
    for folder in ("ljspeech_melgan/LJ001-0001_gen", "ljspeech_waveglow/LJ001-0001"):
        assert tuple(table.loc[folder, ["parent", "role", "speaker"]]) == ("LJ001-0001", "copysynth", "LJ")
    assert table.loc["ljspeech_hifiGAN/LJ001-0001_gen", "generator"] == "hifiGAN"
    assert table.loc["jsut_parallel_wavegan/BASIC5000_0001_gen", "parent"] == "BASIC5000_0001"
    prompts = table[table["role"] == "tts"]
    assert len(prompts) == 1 and prompts["parent"].tolist() == [""]


@pytest.mark.parametrize("home", ["for-norm", "for-norm/for-norm", "for-2sec/for-2seconds",
                                  "for-rerec/for-rerecorded"])
def test_fake_or_real(tmp_path, home):
    for split in ("training", "validation", "testing"):
        for kind in ("real", "fake"):
            audio(tmp_path / home / split / kind / "file1.wav")
            audio(tmp_path / home / split / kind / "file1.mp3", 24_000)
    for root in (tmp_path, tmp_path / home.split("/")[0], tmp_path / home):
        table = loaded("fake_or_real", root)
        assert len(table) == 12 and table["split"].value_counts().tolist() == [4, 4, 4]
        assert table.loc["testing/fake/file1.mp3", "label"] == "spoof"
    assert load_dataset("fake_or_real", tmp_path).attrs["release"] == home.split("/")[0]
    with pytest.raises(DatasetError, match="inside the corpus"):
        load_dataset("fake_or_real", tmp_path / home / "training")
    audio(tmp_path / "for-original/training/real/x.wav")
    with pytest.raises(DatasetError, match="expected one variant"):
        load_dataset("fake_or_real", tmp_path)
    assert "label leaks" in load_dataset("fake_or_real", tmp_path / "for-original").attrs["release"]


def test_timit_tts_and_vidtimit(tmp_path):
    for condition in ("CLEAN", "AUG"):
        audio(tmp_path / f"TIMIT-TTS/{condition}/single_speaker/gtts/sa1.wav")
        audio(tmp_path / f"TIMIT-TTS/{condition}/multi_speaker/vits/fadg0/sa1.wav")
    for speaker in ("fadg0", "mabw0"):
        audio(tmp_path / f"VidTIMIT/{speaker}/audio/sa1.wav", 32_000)
    table = loaded("timit_tts", tmp_path)
    assert tuple(table.loc["AUG/multi_speaker/vits/fadg0/sa1", ["generator", "speaker", "condition"]]) == (
        "vits", "fadg0", "AUG")
    assert table.loc["CLEAN/single_speaker/gtts/sa1", "speaker"] == "" and len(table) == 4
    real = loaded("vidtimit", tmp_path / "VidTIMIT")
    assert real.index.tolist() == ["fadg0/sa1", "mabw0/sa1"] and (real["rate_hz"] == 32_000).all()


# --- Bona fide speech ---------------------------------------------------------------

def ljspeech(home):
    text(home / "metadata.csv", 'LJ001-0001|He said "stop|He said "stop', "LJ001-0002|in 1455|in fourteen "
                                                                          "fifty-five")
    for number in (1, 2):
        audio(home / f"wavs/LJ001-000{number}.wav", 22_050)
    return home


def test_ljspeech(tmp_path):
    table = loaded("ljspeech", ljspeech(tmp_path / "LJSpeech-1.1"))
    assert table["text"].tolist() == ['He said "stop', "in fourteen fifty-five"]  # an open quote
    assert loaded("ljspeech", tmp_path)["path"].iloc[0] == "LJSpeech-1.1/wavs/LJ001-0001.wav"
    with pytest.raises(DatasetError, match="inside the corpus: give .*LJSpeech-1.1"):
        load_dataset("ljspeech", tmp_path / "LJSpeech-1.1/wavs")
    text(tmp_path / "LJSpeech-1.1/metadata.csv", "LJ001-0001,He said,He said")
    with pytest.raises(DatasetError, match=r"expected id\|text\|normalised"):
        load_dataset("ljspeech", tmp_path)


def test_librispeech(tmp_path):
    home = tmp_path / "LibriSpeech"
    for subset, speaker in [("train-clean-100", 19), ("dev-other", 84), ("test-clean", 61)]:
        text(home / f"{subset}/{speaker}/198/{speaker}-198.trans.txt", f"{speaker}-198-0000 THE WORDS")
        audio(home / f"{subset}/{speaker}/198/{speaker}-198-0000.flac")
    (tmp_path / "dev-clean.tar.gz").write_bytes(b"the archive beside its folder")
    table = loaded("librispeech", tmp_path)
    assert sorted(table["split"]) == ["test", "train", "validation"]
    assert tuple(table.loc["84-198-0000", ["speaker", "text", "split"]]) == ("84", "THE WORDS", "validation")
    with pytest.raises(DatasetError, match="inside the corpus"):
        load_dataset("librispeech", home / "test-clean/61")


def test_vctk_two_releases(tmp_path):
    new = tmp_path / "new"
    for speaker in ("p225", "p315"):
        audio(new / f"wav48_silence_trimmed/{speaker}/{speaker}_001_mic1.flac", 48_000)
    audio(new / "wav48_silence_trimmed/p225/p225_001_mic2.flac", 48_000)
    text(new / "txt/p225/p225_001.txt", "Please call Stella.")
    table = loaded("vctk", new)
    assert table.index.tolist() == ["p225_001", "p315_001"] and table["text"].tolist() == ["Please call "
                                                                                           "Stella.", ""]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_dataset("vctk", new, check=True)  # the second microphone is left out on purpose
    audio(tmp_path / "old/VCTK-Corpus/wav48/p225/p225_001.wav", 48_000)
    assert loaded("vctk", tmp_path / "old").index.tolist() == ["p225_001"]
    assert load_dataset("vctk", tmp_path / "old").attrs["release"] == "0.80"


def test_csv(tmp_path):
    for name in ("a", "b c"):
        audio(tmp_path / f"{name}.wav")
    meta = text(tmp_path / "mine.csv", "path,label,speaker,generator", "./a.wav,bonafide,x,",
                "b c.wav,spoof,x,world")
    assert loaded("csv", tmp_path).loc["b c", "generator"] == "world"
    assert len(loaded("csv", meta)) == 2


@pytest.mark.parametrize(("header", "row", "message"), [
    ("path,label", "a.wav,real", "bonafide or spoof"), ("file,label", "a.wav,spoof", "columns path"),
    ("path,label", "../a.wav,spoof", "below it"), ("path,label", "/a.wav,spoof", "below it"),
    ("path,label,split", "a.wav,spoof,dev", "split among"),
    ("path,label,role", "a.wav,spoof,bonafide", "role bon"),
    ("path,label,role", "a.wav,spoof,vc", "role among"), ("path,label,clip_id", "a.wav,spoof,", "empty"),
    ("path,label", "a.wav,spoof,x,y", "comma-separated|columns path")])
def test_csv_refuses(tmp_path, header, row, message):
    with pytest.raises(DatasetError, match=message):
        load_dataset("csv", text(tmp_path / "mine.csv", header, row))


# --- The registry -------------------------------------------------------------------

def test_registry_and_wrong_names(tmp_path):
    assert [layout.name for layout in DATASETS.values()] == list(DATASETS) and len(DATASETS) == 15
    assert all(layout.licence and layout.source and layout.title for layout in DATASETS.values())
    with pytest.raises(DatasetError, match="expected a data set among"):
        load_dataset("asvspoof", tmp_path)


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_no_folder_and_empty_folder(tmp_path, name):
    with pytest.raises(DatasetError, match="Get it from"):
        load_dataset(name, tmp_path / "none")
    with pytest.raises(DatasetError, match="found"):
        load_dataset(name, tmp_path)


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_download_refusals_name_source_and_licence(tmp_path, name, monkeypatch):
    if DATASETS[name].downloader:
        datasets = pytest.importorskip("torchaudio").datasets

        def offline(*_, **__):
            raise urllib.error.URLError("no network")
        monkeypatch.setattr(datasets, DATASETS[name].downloader, offline)
    with pytest.raises(DatasetError) as caught:
        download_dataset(name, tmp_path)
    assert DATASETS[name].source in str(caught.value) and DATASETS[name].licence in str(caught.value)


def test_download_hands_over_part_and_folder(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(pytest.importorskip("torchaudio").datasets, "LIBRISPEECH",
                        lambda root, **options: calls.append((root, options)))
    assert download_dataset("librispeech", tmp_path, "dev-clean") == tmp_path.resolve() / "LibriSpeech"
    assert calls == [(str(tmp_path.resolve()), {"download": True, "url": "dev-clean"})]


def test_unchecked_loading_opens_no_audio(tmp_path, monkeypatch):
    home = ljspeech(tmp_path)
    monkeypatch.setattr(soundfile, "info", lambda *_: pytest.fail("opened audio"))
    assert math.isnan(load_dataset("ljspeech", home)["seconds"].iloc[0])
