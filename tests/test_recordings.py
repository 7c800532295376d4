"""A user's own recordings: verdicts and when there is none, long and odd files, pages, calibration."""

import dataclasses
import json
import os
import re
import weakref
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from lib.data.audio import AudioReport, listed, recordings_below
from lib.data.channel import pass_channel
from lib.data.decoders import SUFFIXES
from lib.detector import Detector
from lib.evaluate.metrics import conformal
from lib.model.checkpoints import DetectorError
from lib.model.images import image
from lib.paths import UsageError, shown
from lib.recordings.corpus import calibrate, judged_all
from lib.recordings.explaining import (
    BANDS,
    Collected,
    as_json,
    as_table,
    decibels,
    explained,
    map_rows,
    read_known,
    regions,
    where,
    write_csv,
    write_known,
)
from lib.recordings.judging import FAKE, REAL, UNKNOWN, Limits, Part, judged, load_detector, pieces, verdict_on
from lib.settings import RATE_HZ, Channel, View

REMOTE = r"src=[\"']?\s*(https?:|//)"
HOSTILE = "<script>alert(1)<-script>'\"&.wav"


@pytest.fixture
def save(tmp_path):
    def save(audio, name="clip.wav", rate_hz=RATE_HZ, **options):
        soundfile.write(os.fsencode(tmp_path / name), audio, rate_hz, format="WAV", **options)
        return tmp_path / name
    return save


@pytest.fixture
def clip(save, voice):
    return save(voice(4.0, 60))


# --- the rules, on numbers alone --------------------------------------------------------------------------------------

CALIBRATION = np.arange(1, 100) / 100  # 99 scores


def part(start_s=0.0, anomaly=0.5, **changes):
    return dataclasses.replace(Part(start_s, 5.0, 4.0, -20.0, anomaly, conformal(CALIBRATION, anomaly), 12.0, 30.0),
                               **changes)


def verdict(*parts, alpha=0.05, calibration=CALIBRATION, **changes):
    report = dataclasses.replace(AudioReport("a", 5.0 * len(parts), RATE_HZ, 1, 0.5, (), 8000.0, 0.1), **changes)
    detector = SimpleNamespace(evidence=None, calibration=calibration)
    return verdict_on("a", report, list(parts), {}, 0.5, detector, Limits(), alpha, {})


def test_conformal_p_values_by_hand():
    assert conformal(CALIBRATION, 2.0) == 0.01
    assert conformal(CALIBRATION, 0.0) == 1.0
    assert conformal(CALIBRATION, 0.95) == pytest.approx(0.06)  # 0.95 to 0.99: five of them


def test_the_verdict_turns_at_alpha():
    assert verdict(part(anomaly=0.955)).verdict == FAKE  # p = 0.05
    assert verdict(part(anomaly=0.945)).verdict == REAL  # p = 0.06


def test_the_whole_is_the_median_of_its_parts():
    one = verdict(part(0, 0.1), part(5, 0.2), part(10, 5.0))
    assert (one.verdict, one.anomaly) == (REAL, 0.2)
    assert "1 of 3 pieces" in one.warnings[-1] and "starts at 10 s" in one.warnings[-1]


def test_pauses_are_left_out_of_the_median():
    one = verdict(part(0, 0.2), part(5, 5.0, level_db=-60.0), part(10, 5.0, level_db=-60.0))
    assert (one.anomaly, len(one.parts)) == (0.2, 1)


@pytest.mark.parametrize(("given", "report", "words"), [
    ({}, {"effective_bandwidth_hz": 3900.0}, "narrow band: nothing above 3.9 kHz"),
    ({"crest_db": 5.0}, {}, "limited"),
    ({"range_db": 3.0}, {}, "noise, music or babble"),
    ({}, {"clipped_ratio": 0.05}, "clipped: 5.0% of the samples"),
    ({}, {"silence_ratio": 0.99}, "too little speech"),
])
def test_no_verdict_outside_what_calibration_covers(given, report, words):
    one = verdict(part(anomaly=0.1, **given), **report)
    assert one.verdict == UNKNOWN and words in one.why and one.words.startswith("cannot say: ")
    assert verdict(part(anomaly=9.0, **given), **report).verdict == UNKNOWN


def test_no_verdict_without_parts_or_with_too_few_calibration_clips():
    assert "too little speech" in verdict(seconds=1.0).why
    assert "calibrated on 9 clips" in verdict(part(), calibration=CALIBRATION[:9]).why
    assert verdict(part(anomaly=3), calibration=CALIBRATION[:19]).verdict == FAKE


def test_names_are_made_printable():
    assert shown("a\nb\x1b[31m.wav") == "a\\nb\\x1b[31m.wav"
    assert shown(os.fsdecode(b"a\xff.wav")) == "a\\xff.wav"
    assert shown("ünï 😀.wav") == "ünï 😀.wav"


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_short_recording_is_scored_as_the_detector_scores_it(tiny_detector, clip):
    audio = soundfile.read(clip, dtype="float32")[0]
    one = judged(tiny_detector, clip)
    assert one.verdict == REAL and len(one.parts) == 1
    assert one.anomaly == tiny_detector.score(audio, RATE_HZ)


def test_pieces_cover_a_recording_without_a_short_rest(save, voice):
    audio = voice(7.4, 61)
    path = save(audio, subtype="FLOAT")
    found = list(pieces(path, 3.0))
    assert [start for start, _ in found] == [0.0, 3.0] and [len(one) / RATE_HZ for _, one in found] == [3.0, 4.4]
    assert np.array_equal(np.concatenate([one for _, one in found]), audio)


def patched(at, value):
    """Writes `value` over bytes of a file's header or body."""
    def patch(path, audio):
        content = bytearray(path.read_bytes())
        content[at : at + len(value)] = value
        path.write_bytes(content)
    return patch


def flipped(path, audio):
    soundfile.write(path, audio, RATE_HZ, format="FLAC")
    patched(path.stat().st_size // 2, b"\xff\x00\xff")(path, audio)


def unreadable(path, audio, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(type(path), "open", refuse)  # root reads everything, whatever its mode


RAW = b"".join(number.to_bytes(1, "little") for number in range(256))
BAD = {
    "empty": (lambda path, audio: path.write_bytes(b""), "an empty file"),
    "text": (lambda path, audio: path.write_text("no audio\n" * 20), "libsndfile can read"),
    "header of 20 bytes": (lambda path, audio: path.write_bytes(path.read_bytes()[:20]), "libsndfile can read"),
    "truncated": (lambda path, audio: path.write_bytes(path.read_bytes()[: 44 + len(audio)]), "cut short"),
    "header alone": (lambda path, audio: path.write_bytes(path.read_bytes()[:44]), "cut short"),
    "no samples": (lambda path, audio: soundfile.write(path, audio[:0], RATE_HZ), "no samples declared"),
    "directory": (lambda path, audio: (path.unlink(), path.mkdir()), "a directory"),
    "missing": (lambda path, audio: path.unlink(), "nothing there"),
    "unreadable": (unreadable, "a readable file, found Permission denied"),
    "NaN": (lambda path,
            audio: soundfile.write(path, np.where(np.arange(len(audio)) == 9, np.nan, audio), RATE_HZ, "FLOAT"),
            "non-finite samples"),
    "Inf": (lambda path,
            audio: soundfile.write(path, np.where(np.arange(len(audio)) == 9, np.inf, audio), RATE_HZ, "FLOAT"),
            "non-finite samples"),
    "integers as floats": (lambda path, audio: soundfile.write(path, audio * 32768, RATE_HZ, "FLOAT"),
                           "finite samples in [-1, 1]"),
    "flipped FLAC byte": (flipped, "damaged"),
    "wrong extension": (lambda path, audio: path.write_bytes(RAW * 40), "libsndfile can read"),
    "rate of 2147483647 Hz": (patched(24, (2**31 - 1).to_bytes(4, "little")),
                              "a rate of 8000 to 192000 Hz, found 2147483647 Hz"),
    "rate of 0 Hz": (patched(24, bytes(4)), "libsndfile can read"),
    "65,535 channels": (patched(22, b"\xff\xff"), "Too many channels"),
    "silent": (lambda path, audio: soundfile.write(path, 0 * audio, RATE_HZ), "no speech"),
    "one sample": (lambda path, audio: soundfile.write(path, audio[:1], RATE_HZ), "at least 0.3 s"),
    "half a second": (lambda path, audio: soundfile.write(path, audio[: RATE_HZ // 2], RATE_HZ), "too little speech"),
    "antiphase": (lambda path, audio: soundfile.write(path, np.stack([audio, -audio], 1), RATE_HZ),
                  "channels that cancel"),
    "8 kHz": (lambda path, audio: soundfile.write(path, audio[::2], 8000), "narrow band"),
    "noise": (lambda path,
              audio: soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(len(audio)), RATE_HZ),
              "noise, music or babble"),
    "one click": (lambda path, audio: soundfile.write(path, (np.arange(len(audio)) == 9000).astype(float), RATE_HZ),
                  "too little speech"),
    "clipped": (lambda path, audio: soundfile.write(path, np.clip(audio * 60, -1, 1), RATE_HZ), "clipped"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_recordings_get_a_reason_and_no_verdict(tiny_detector, clip, voice, name, monkeypatch):
    spoil, words = BAD[name]
    spoil(clip, voice(4.0, 60), *([monkeypatch] if spoil is unreadable else []))
    one = judged(tiny_detector, clip)
    assert one.verdict == UNKNOWN and words in one.why and "\n" not in one.why
    json.dumps(dataclasses.asdict(one), allow_nan=False)


def test_only_one_piece_of_a_long_recording_is_kept(tiny_detector, save, voice):
    path, alive, most = save(np.concatenate([voice(5.0, seed) for seed in range(12)])), [], []
    collected = Collected()

    def visit(part, piece):
        collected(part, piece)
        alive.append(weakref.ref(piece))
        most.append(sum(one() is not None for one in alive))

    one = judged(tiny_detector, path, visit=visit)
    assert len(one.parts) == len(most) > 10 and max(most) <= 3  # this one, the one before, the most anomalous one


def test_one_channel_of_antiphase_stereo_can_be_judged(tiny_detector, save, voice):
    audio = voice(4.0, 60)
    path = save(np.stack([audio, -audio], 1), subtype="FLOAT")
    assert judged(tiny_detector, path, channel=0).anomaly == tiny_detector.score(audio, RATE_HZ)
    assert judged(tiny_detector, path, channel=7).verdict == UNKNOWN


@pytest.mark.parametrize("name", [HOSTILE, "a\nb.wav", "-rf.wav", "ünï 😀.wav", os.fsdecode(b"a\xff\xfe.wav")])
def test_any_file_name_is_read_and_shown(tiny_detector, save, voice, name):
    one = judged(tiny_detector, save(voice(4.0, 60), name))
    assert one.verdict == REAL and one.path.isprintable()
    json.dumps(dataclasses.asdict(one)).encode()


def test_loudness_rate_and_channels_do_not_move_the_verdict(tiny_detector, save, voice):
    audio = voice(4.0, 60)
    reference = judged(tiny_detector, save(audio, subtype="FLOAT"))
    assert judged(tiny_detector, save(np.stack([audio, audio], 1), subtype="FLOAT")).anomaly == reference.anomaly
    for gain, offset in ((0.1, 0), (1, 0.03)):
        other = judged(tiny_detector, save((gain * audio + offset).astype(np.float32), subtype="FLOAT"))
        assert other.verdict == reference.verdict and other.anomaly == pytest.approx(reference.anomaly, rel=1e-3)
    assert judged(tiny_detector, save(np.repeat(audio, 3), rate_hz=48_000)).verdict == reference.verdict


def test_many_recordings_in_order_and_in_processes(saved_detector, clip, save, voice, tmp_path):
    other = save(voice(4.0, 61), "other.wav")
    paths = [clip, tmp_path / "missing.wav", other]
    one, two = list(judged_all(paths, saved_detector)), list(judged_all(paths, saved_detector, jobs=2))
    assert [each.path for each in one] == [str(path) for path in paths]
    assert [each.verdict for each in one] == [REAL, UNKNOWN, REAL]
    for a, b in zip(one, two):
        assert a.verdict == b.verdict
        assert (a.anomaly is b.anomaly is None or a.anomaly == pytest.approx(b.anomaly, rel=1e-4))


def test_folders_give_all_recordings_and_what_was_left_out(tmp_path, save, voice, monkeypatch):
    (tmp_path / "phone" / "deep").mkdir(parents=True)
    content = save(voice(1.0, 60)).read_bytes()
    for name in ("b.WAV", "deep/c.flac", "deep/no_suffix", "d.opus", "e.m4a", "f.amr"):
        (tmp_path / "phone" / name).write_bytes(content)
    others = {".hidden.wav": "hidden", "notes.txt": "no sound", "picture.webp": "no sound",
              "linked": "a link to a folder",
              "gone.wav": "a link to nothing", "pipe.wav": "no regular file"}
    (tmp_path / "phone" / ".hidden.wav").write_bytes(content)
    (tmp_path / "phone" / "notes.txt").write_text("x")
    (tmp_path / "phone" / "picture.webp").write_bytes(b"RIFF1234WEBPVP8 ")
    (tmp_path / "phone" / "linked").symlink_to(tmp_path)
    (tmp_path / "phone" / "gone.wav").symlink_to("nowhere")
    (tmp_path / "phone" / "link.wav").symlink_to("b.WAV")
    os.mkfifo(tmp_path / "phone" / "pipe.wav")
    paths, left_out = recordings_below(tmp_path / "phone")
    assert [path.name for path in paths] == ["b.WAV", "d.opus", "c.flac", "no_suffix", "e.m4a", "f.amr", "link.wav"]
    assert {os.path.basename(path): reason for path, reason in left_out} == others
    once, left_out = listed([tmp_path / "phone" / "b.WAV"], [tmp_path / "phone", tmp_path / "phone"])
    assert len(once) == 6 and sum("the same file as" in reason for _, reason in left_out) == 2
    assert (str(tmp_path / "phone"), "named twice") in left_out


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_kind_that_a_decoder_reads_is_a_recording_of_its_folder(tmp_path, suffix):
    (tmp_path / f"a{suffix.upper()}").write_bytes(b"whatever it begins with")
    assert recordings_below(tmp_path) == ([tmp_path / f"a{suffix.upper()}"], [])


def test_folders_that_cannot_be_opened_are_left_out_and_said(tmp_path, save, voice, monkeypatch):
    path, scandir = save(voice(1.0, 60)), os.scandir
    (tmp_path / "closed").mkdir()

    def refusing(place):
        if os.fspath(place).endswith("closed"):
            raise PermissionError(13, "Permission denied", os.fspath(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refusing)
    paths, left_out = recordings_below(tmp_path)
    assert paths == [path] and left_out == [(str(tmp_path / "closed"), "cannot be opened: Permission denied")]


def test_folders_without_recordings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        recordings_below(tmp_path / "none")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="notes.txt: no sound"):
        recordings_below(tmp_path)
    with pytest.raises(ValueError, match="nothing there"):
        listed([tmp_path / "none"], there=True)


def test_the_json_form_is_stable(tiny_detector, clip, tmp_path):
    recordings = [judged(tiny_detector, clip), judged(tiny_detector, tmp_path / "no.wav")]
    sheet = as_json(recordings, {"folder": "d"}, 0.05, [("a.txt", "no sound")], False)
    sheet = json.loads(json.dumps(sheet, allow_nan=False))
    assert list(sheet) == ["schema", "complete", "alpha", "detector", "files", "left_out"]
    assert (sheet["schema"], sheet["complete"]) == (2, False)
    assert sheet["left_out"] == [{"path": "a.txt", "reason": "no sound"}]
    assert (
        list(sheet["files"][0])
        == list(sheet["files"][1])
        == [
            "path",
            "verdict",
            "why",
            "says",
            "anomaly",
            "p_value",
            "evidence",
            "lines",
            "seconds",
            "speech_s",
            "bandwidth_hz",
            "crest_db",
            "range_db",
            "decoder",
            "warnings",
            "regions",
            "parts",
        ]
    )
    assert list(sheet["files"][0]["parts"][0]) == [
        "start_s", "seconds", "speech_s", "level_db", "anomaly", "p_value", "crest_db", "range_db", "steadiness"]
    assert sheet["files"][0]["evidence"] == {
        "pyramid": {"anomaly": recordings[0].anomaly, "p_value": recordings[0].p_value}}
    assert sheet["files"][1]["p_value"] is None and sheet["files"][1]["evidence"] == {}


def test_cells_of_the_table_do_not_run_as_formulas(tiny_detector, clip, tmp_path):
    names = ["=HYPERLINK(1).wav", "+1.wav", "-1.wav", "@a.wav", "\ta.wav", "plain =1.wav"]
    recordings = [dataclasses.replace(judged(tiny_detector, clip), path=name, p_value=-1.0) for name in names]
    write_csv(as_table(recordings), tmp_path / "o.csv")
    table = pd.read_csv(tmp_path / "o.csv")
    assert table.path.tolist() == ["'" + name for name in names[:5]] + names[5:] and (table.p_value == -1).all()
    assert {"verdict", "why", "pyramid_anomaly", "pyramid_p_value", "warnings"} <= set(table)


# --- what is shown of one recording -----------------------------------------------------------------------------------


def test_regions_of_a_map_drawn_by_hand(tiny_detector, voice):
    explanation = explained(tiny_detector, voice(4.0, 60)).explanation
    drawn = np.zeros_like(explanation.map)
    drawn[20:40, 100:150] = 5.0
    drawn[100:110, 200:220] = 9.0
    drawn[150, 300:310] = 9.0  # a speck
    quiet = dataclasses.replace(explanation, map=drawn, active=np.ones(drawn.shape[1], bool), start_s=2.0)
    largest, smaller = regions(quiet, 1.0)
    assert (largest.start_s, largest.seconds, largest.strength) == pytest.approx((2.0 + 100 * 0.008, 50 * 0.008, 5.0))
    assert (largest.low_hz, largest.high_hz) == (explanation.row_hz[20], explanation.row_hz[39])
    assert smaller.strength == 9.0 and regions(quiet, 10.0) == ()
    pauses = dataclasses.replace(quiet, active=np.arange(drawn.shape[1]) >= 170)
    assert [region.strength for region in regions(pauses, 1.0)] == [9.0]


def test_anomalous_pieces_have_their_regions_in_the_result(tiny_detector, clip, monkeypatch):
    assert judged(tiny_detector, clip).regions == ()
    low = tiny_detector.scale
    monkeypatch.setattr(tiny_detector, "calibration", np.full(24, -1.0))
    monkeypatch.setattr(tiny_detector, "scale", (low[0] - 2, low[0] - 1))
    recording = judged(tiny_detector, clip, alpha=0.05)
    assert recording.verdict == FAKE and recording.regions and recording.regions[0].strength > low[0] - 1


@pytest.mark.parametrize("change", [
    lambda sheet: "{", lambda sheet: "[]", lambda sheet: json.dumps(sheet | {"format": 2}),
    lambda sheet: json.dumps(sheet | {"groups": 3}),
    lambda sheet: json.dumps(sheet | {"groups": [{"name": "a", "kind": "tts", "anomalies": [float("nan")]}]}),
    lambda sheet: json.dumps(sheet | {"groups": [{"name": "a", "kind": "other", "anomalies": [1.0]}]}),
    lambda sheet: json.dumps(sheet | {"groups": [{"name": "a", "kind": "tts", "anomalies": []}]}),
    lambda sheet: json.dumps(sheet | {"sha256": "0" * 64})], ids=range(8))
def test_damaged_or_foreign_anomalies_of_known_generators_are_refused(tiny_detector, tmp_path, change):
    path = write_known(tiny_detector.save(tmp_path), [("tts", "b", 2.0)])
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(DetectorError, match="delete it"):
        read_known(tmp_path)


def test_known_generators_are_kept_beside_the_detector(tiny_detector, tmp_path):
    assert read_known(tiny_detector.save(tmp_path)) == []
    write_known(tmp_path, [("tts", "b", 2.0), ("bonafide", "", 0.9), ("copysynth", "a", 3.0), ("copysynth", "a", 1.0)])
    assert [(group.kind, group.name, group.anomalies.tolist()) for group in read_known(tmp_path)] == [
        ("bonafide", "real speech", [0.9]), ("copysynth", "a", [1.0, 3.0]), ("tts", "b", [2.0])]


def test_the_map_is_blank_in_pauses_and_at_the_ends(tiny_detector, voice):
    stretch = explained(tiny_detector, np.concatenate([np.zeros(RATE_HZ, np.float32), voice(3.0, 60)]))
    assert 0.9 < stretch.start_s < 1.3 and stretch.stop_s == pytest.approx(4.0, abs=0.2)
    assert np.isnan(stretch.map[:, :10]).all() and np.isnan(stretch.map[:, -10:]).all()
    inner = stretch.explanation.active.copy()
    inner[:15] = inner[-15:] = False
    assert not np.isnan(stretch.map[:, inner]).any() and np.isnan(stretch.map[:, ~inner]).all()
    share, high = np.mean(stretch.map[:, inner] > tiny_detector.map_limits[1]), tiny_detector.map_limits[1]
    words = where(stretch)
    assert words[0].startswith(f"{share:.1%} of the map is above {high:.2f}")
    assert re.search(r"Highest: -?\d+\.\d\d at \d\.\d s, \d\.\d kHz", words[-1])
    assert len(words) == 2 + len(regions(stretch.explanation, high))
    table = map_rows(stretch)
    assert len(table.columns) == 1 + BANDS and "kHz" in table.columns[1] and table.notna().all(axis=None)
    assert table.iloc[:, 1:].mean(axis=None) == pytest.approx(np.nanmean(stretch.map), abs=0.2)


def test_the_map_of_a_page_is_the_default_one_on_the_scale_of_the_detector(tiny_detector, clip):
    audio = soundfile.read(clip, dtype="float32")[0]
    stretch, prepared = explained(tiny_detector, audio), pass_channel(audio, tiny_detector.settings.channel)
    assert np.array_equal(stretch.explanation.map, tiny_detector.explain_prepared(prepared.audio, prepared.active).map)
    assert (stretch.kind, stretch.limits) == (tiny_detector.map_kind, tiny_detector.map_limits)


def test_the_timeline_shows_band_means_of_the_map_and_costs_no_other_score(tiny_detector, save, voice):
    path, collected = save(np.concatenate([voice(3.0, seed) for seed in range(4)])), Collected()
    recording = judged(tiny_detector, path, visit=collected)
    assert recording == judged(tiny_detector, path)
    assert [start_s for start_s, _, _ in collected.bands] == [part.start_s for part in recording.parts]
    part, piece = collected.most
    assert part.anomaly == max(each.anomaly for each in recording.parts)
    means = next(means for start_s, _, means in collected.bands if start_s == part.start_s)
    rows = np.array_split(piece.explanation.map[:, piece.explanation.active], BANDS)
    assert means == pytest.approx([row.mean() for row in rows])


def test_a_detector_without_a_colour_scale_judges_and_draws_no_map(tiny_detector, clip, tmp_path):
    path = tiny_detector.save(tmp_path / "old") / "detector.json"
    sheet = json.loads(path.read_text())
    del sheet["map"]
    path.write_text(json.dumps(sheet))
    assert judged(Detector.load(path.parent), clip).verdict == REAL
    with pytest.raises(DetectorError, match="no colour scale.*calibrate"):
        explained(Detector.load(path.parent), soundfile.read(clip, dtype="float32")[0])


def test_decibels_of_a_sine():
    view, channel = View(planes=("level",)), Channel()
    audio = np.sin(2 * np.pi * 1000 * np.arange(RATE_HZ) / RATE_HZ).astype(np.float32)
    level = decibels(image(torch.from_numpy(audio)[None], view, channel)[0, 0].numpy(), view)
    assert level[:, 30:90].max() == pytest.approx(0.0, abs=0.5)


# --- detectors --------------------------------------------------------------------------------------------------------


def test_calibration_on_own_speech_is_saved_with_its_limits(saved_detector, save, voice, tmp_path):
    paths = [save(voice(9.0, seed, seed), f"{seed}.wav") for seed in range(100, 104)] + [tmp_path / "no.wav"]
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "known.json").write_text("of the detector that was here before")
    detector, stated, left_out, notes = calibrate(paths, tmp_path / "own", saved_detector, "Ann")
    assert read_known(tmp_path / "own") == [] and notes == []
    again, limits, names = load_detector(tmp_path / "own")
    assert [path for path, _ in left_out] == [str(tmp_path / "no.wav")] and "nothing there" in left_out[0][1]
    assert names == stated and (names["name"], names["recordings"]) == ("Ann", 4) and 18 < names["speech_s"] < 36
    assert names["smallest_alpha"] == pytest.approx(1 / 7, abs=1e-4)
    assert np.array_equal(again.calibration, detector.calibration)
    assert names["calibration_clips"] == len(detector.calibration) == 6
    assert all(value <= default for value, default in zip(dataclasses.astuple(limits), dataclasses.astuple(Limits())))
    assert not set(detector.fitted_on["scaling"]) & set(detector.fitted_on["threshold"])
    base = Detector.load(saved_detector)
    assert all(bool((a == b).all()) for a,
               b in zip(again.student.state_dict().values(), base.student.state_dict().values()))


def test_calibration_on_narrow_band_speech_admits_narrow_band_recordings(saved_detector, save, voice, tmp_path):
    paths = [save(voice(9.0, seed, seed)[::2], f"{seed}.wav", 8000) for seed in range(100, 104)]
    calibrate(paths, tmp_path / "own", saved_detector)
    detector, limits, _ = load_detector(tmp_path / "own")
    assert limits.bandwidth_hz < 4100 and judged(detector, paths[0], limits, alpha=0.2).verdict != UNKNOWN


def test_calibration_needs_speech(saved_detector, save, voice, tmp_path):
    with pytest.raises(DetectorError, match="at least 8 pieces"):
        calibrate([save(voice(4.0, 60))], tmp_path / "own", saved_detector)
    assert not (tmp_path / "own").exists()
    noise = [save(0.1 * np.random.default_rng(seed).standard_normal(9 * RATE_HZ), f"{seed}.wav") for seed in range(5)]
    with pytest.raises(DetectorError, match="pieces"):
        calibrate(noise, tmp_path / "own", saved_detector)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.wav", "1.wav", "2.wav", "3.wav", "4.wav", "clip.wav"]


@pytest.fixture
def speech(save, voice):
    """Eight recordings of real speech from one source."""
    return [save(voice(9.0, seed, 90 + seed), f"{seed}.wav") for seed in range(100, 108)]


def copied(path, target, gain=1.0, start=0, **options):
    audio, rate_hz = soundfile.read(path, dtype="float32")
    soundfile.write(target, gain * audio[start:], rate_hz, **options)
    return target


def test_calibration_counts_the_same_sound_once(saved_detector, speech, tmp_path):
    copies = [copied(speech[0], tmp_path / "same.flac"),
              copied(speech[1], tmp_path / "quieter.wav", 0.3, subtype="FLOAT"),
              copied(speech[2], tmp_path / "shorter.wav", start=4321)]
    result = calibrate([*speech, *speech, *copies], tmp_path / "own", saved_detector)
    assert result.names["recordings"] == 8 and len(result.left_out) == 11
    reasons = {os.path.basename(path): reason for path, reason in result.left_out}
    assert all(reasons[path.name].startswith("the same file as") for path in speech)
    assert [reasons[path.name].endswith(f"{speech[index]}") and reasons[path.name].startswith("the same sound as")
            for index, path in enumerate(copies)] == [True] * 3
    once = calibrate(speech, tmp_path / "once", saved_detector)
    assert np.array_equal(once.detector.calibration, result.detector.calibration)


def test_calibration_leaves_out_what_is_no_speech_or_outside_the_known(saved_detector, speech, save, voice, tmp_path):
    random, real = np.random.default_rng(0), voice(9.0, 140)
    others = {save(0.1 * random.standard_normal(9 * RATE_HZ), "noise.wav"): "noise",
              save(0 * real, "silent.wav"): "no speech",
              save(voice(9.0, 141)[::2], "narrow.wav", 8000): "narrow band",
              save(voice(0.5, 142), "short.wav"): "too little",
              save(np.clip(real * 60, -1, 1), "clipped.wav"): "clipped"}
    result = calibrate([*speech, *others], tmp_path / "own", saved_detector)
    reasons = dict(result.left_out)
    assert set(reasons) == set(map(str, others)) and all(words in reasons[str(path)] for path, words in others.items())
    assert load_detector(tmp_path / "own")[1] == load_detector(saved_detector)[1], "nothing was widened"


def test_calibration_names_a_recording_unlike_the_others(saved_detector, speech, tmp_path, monkeypatch):
    assert calibrate(speech, tmp_path / "own", saved_detector).notes == []

    def marked(detector, path, *rest):
        recording = judged(detector, path, *rest)
        return dataclasses.replace(recording, anomaly=9.0) if path == speech[3] else recording

    monkeypatch.setattr("lib.recordings.corpus.judged", marked)
    (name, text), = calibrate(speech, tmp_path / "own", saved_detector).notes
    assert name == str(speech[3]) and "unlike the others, anomaly 9.00" in text

    def known(detector, path, *rest):  # two fakes hide each other, but not from the real speech of the detector
        changes = {"anomaly": 9.0, "p_value": 0.002, "verdict": FAKE, "says": "lines"}
        return dataclasses.replace(judged(detector, path, *rest), **(changes if path in speech[3:5] else {}))

    monkeypatch.setattr("lib.recordings.corpus.judged", known)
    notes = calibrate(speech, tmp_path / "own", saved_detector).notes
    assert notes == [(str(path), "anomalous: lines, p 0.002; is it real speech?") for path in speech[3:5]]


@pytest.mark.parametrize("name", ["notes", "new/../notes"])
def test_calibration_removes_no_other_folder(saved_detector, clip, tmp_path, name):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("keep me")
    with pytest.raises(UsageError, match="name another output"):
        calibrate([clip], tmp_path / name, saved_detector)
    assert (tmp_path / "notes" / "a.txt").read_text() == "keep me"


def test_an_interrupted_calibration_leaves_the_earlier_one_whole(saved_detector, speech, tmp_path, monkeypatch):
    calibrate(speech[:5], tmp_path / "own", saved_detector)
    before = {path.name: path.read_bytes() for path in (tmp_path / "own").iterdir()}

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lib.recordings.corpus.write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(speech, tmp_path / "own", saved_detector)
    assert {path.name: path.read_bytes() for path in (tmp_path / "own").iterdir()} == before
    assert not [*tmp_path.glob(".tmp-*")]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"bandwidth_hz": "x", "crest_db": 1, "range_db": 1}'])
def test_damaged_limits_are_refused(tiny_detector, tmp_path, text):
    tiny_detector.save(tmp_path)
    (tmp_path / "limits.json").write_text(text)
    with pytest.raises(DetectorError, match="limits.json is damaged"):
        load_detector(tmp_path)


def test_without_a_shipped_detector_the_error_says_how_to_get_one(monkeypatch, tmp_path):
    monkeypatch.setattr("lib.recordings.judging.SHIPPED", tmp_path)
    with pytest.raises(DetectorError, match="make study.*--detector"):
        load_detector()
