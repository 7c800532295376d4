"""A user's own recordings: verdicts and when there is none, long and odd files, pages, calibration."""

import dataclasses
import json
import os
import re
import weakref

import numpy as np
import pytest
import soundfile
import torch
from bs4 import BeautifulSoup

from lib.data.audio import AudioReport
from lib.data.channel import pass_channel
from lib.detector import Detector
from lib.evaluate.metrics import conformal
from lib.model.checkpoints import DetectorError
from lib.model.images import image
from lib.paths import shown
from lib.recordings.explaining import Collected, heard, meaning_of_map, where, write_report, write_table
from lib.recordings.figures import Known, decibels, read_known, threshold, write_known
from lib.recordings.judging import audio_files, calibrate, judged, judged_all, load_detector, pieces
from lib.recordings.verdicts import FAKE, REAL, UNKNOWN, Limits, Part, Recording, as_json, verdict_on
from lib.report.html import remote_urls
from lib.settings import RATE_HZ, Channel, View

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


# --- the rules, on numbers alone --------------------------------------------------------------------------------------------

CALIBRATION = np.arange(1, 100) / 100  # 99 scores


def part(start_s=0.0, anomaly=0.5, **changes):
    return dataclasses.replace(Part(start_s, 5.0, 4.0, -20.0, anomaly, conformal(CALIBRATION, anomaly), 12.0, 30.0), **changes)


def verdict(*parts, alpha=0.05, calibration=CALIBRATION, **changes):
    report = dataclasses.replace(AudioReport("a", 5.0 * len(parts), RATE_HZ, 1, 0.5, (), 8000.0, 0.1), **changes)
    return verdict_on("a", report, parts, calibration, Limits(), alpha)


def test_conformal_p_values_by_hand():
    assert conformal(CALIBRATION, 2.0) == 0.01
    assert conformal(CALIBRATION, 0.0) == 1.0
    assert conformal(CALIBRATION, 0.95) == pytest.approx(0.06)  # 0.95 to 0.99: five of them


def test_the_verdict_turns_at_alpha():
    assert verdict(part(anomaly=0.955)).verdict == FAKE  # p = 0.05
    assert verdict(part(anomaly=0.945)).verdict == REAL  # p = 0.06
    assert threshold(CALIBRATION, 0.05) == 0.95
    assert threshold(CALIBRATION, 0.01) == 0.99


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


# --- files ------------------------------------------------------------------------------------------------------------------


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
    "NaN": (lambda path, audio: soundfile.write(path, np.where(np.arange(len(audio)) == 9, np.nan, audio), RATE_HZ, "FLOAT"),
            "non-finite samples"),
    "Inf": (lambda path, audio: soundfile.write(path, np.where(np.arange(len(audio)) == 9, np.inf, audio), RATE_HZ, "FLOAT"),
            "non-finite samples"),
    "integers as floats": (lambda path, audio: soundfile.write(path, audio * 32768, RATE_HZ, "FLOAT"), "finite samples in [-1, 1]"),
    "flipped FLAC byte": (flipped, "damaged"),
    "wrong extension": (lambda path, audio: path.write_bytes(RAW * 40), "libsndfile can read"),
    "rate of 2147483647 Hz": (patched(24, (2**31 - 1).to_bytes(4, "little")), "a rate of 8000 to 192000 Hz, found 2147483647 Hz"),
    "rate of 0 Hz": (patched(24, bytes(4)), "libsndfile can read"),
    "65,535 channels": (patched(22, b"\xff\xff"), "Too many channels"),
    "silent": (lambda path, audio: soundfile.write(path, 0 * audio, RATE_HZ), "no speech"),
    "one sample": (lambda path, audio: soundfile.write(path, audio[:1], RATE_HZ), "at least 0.3 s"),
    "half a second": (lambda path, audio: soundfile.write(path, audio[: RATE_HZ // 2], RATE_HZ), "too little speech"),
    "antiphase": (lambda path, audio: soundfile.write(path, np.stack([audio, -audio], 1), RATE_HZ), "channels that cancel"),
    "8 kHz": (lambda path, audio: soundfile.write(path, audio[::2], 8000), "narrow band"),
    "noise": (lambda path, audio: soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(len(audio)), RATE_HZ),
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
    collected = Collected(tiny_detector)

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
        assert a.verdict == b.verdict and (a.anomaly is b.anomaly is None or a.anomaly == pytest.approx(b.anomaly, rel=1e-4))


def test_folders_are_searched_for_recordings(tmp_path):
    for name in ("b.WAV", "a/c.flac", "a/.hidden.wav", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [path.name for path in audio_files(tmp_path)] == ["c.flac", "b.WAV"]
    with pytest.raises(ValueError, match="no such folder"):
        audio_files(tmp_path / "none")


def test_the_json_form_is_stable(tiny_detector, clip, tmp_path):
    sheet = as_json([judged(tiny_detector, clip), judged(tiny_detector, tmp_path / "no.wav")], {"folder": "d"}, 0.05)
    sheet = json.loads(json.dumps(sheet, allow_nan=False))
    assert list(sheet) == ["schema", "alpha", "detector", "files"] and sheet["schema"] == 1
    assert list(sheet["files"][0]) == list(sheet["files"][1]) == [
        "path", "verdict", "why", "anomaly", "p_value", "seconds", "speech_s", "bandwidth_hz", "crest_db", "range_db", "warnings", "parts"]
    assert list(sheet["files"][0]["parts"][0]) == [
        "start_s", "seconds", "speech_s", "level_db", "anomaly", "p_value", "crest_db", "range_db"]
    assert sheet["files"][1]["anomaly"] is None


# --- pages ------------------------------------------------------------------------------------------------------------------


def test_the_page_works_offline_and_names_are_escaped(tiny_detector, save, voice, tmp_path):
    target = tmp_path / "page.html"
    one = write_report(tiny_detector, save(voice(4.0, 60), HOSTILE), target, names={"detector": "<b>d</b>"})
    text = target.read_text()
    assert one.verdict == REAL and not remote_urls(text)
    assert "<script" not in text and "<b>" not in text and "&lt;script&gt;" in text
    assert text.count("data:image/png;base64,") == 2 and "data:audio/flac;base64," in text
    assert not re.search(r"<img(?![^>]*\balt=\"[^\"]+\")", text)
    assert "Most anomalous moments" in text and "The map shows" in text and "What this cannot tell" in text and "About " in text


def test_a_long_recording_has_a_timeline_and_plays_its_most_anomalous_piece(tiny_detector, save, voice, tmp_path):
    path = save(np.concatenate([voice(3.0, seed) for seed in range(8)] + [np.zeros(7 * RATE_HZ, np.float32)] + [voice(3.0, 3)]))
    one = write_report(tiny_detector, path, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    worst = max(one.parts, key=lambda each: each.anomaly)
    assert text.count("data:image/png;base64,") == 3 and f"The most anomalous piece, {worst.start_s:.0f} s" in text
    assert len(text) < 2_000_000


def test_a_page_without_score_says_why(tiny_detector, tmp_path):
    write_report(tiny_detector, tmp_path / "no.wav", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "nothing there" in text and "was not scored" in text and "<audio" not in text


def test_every_figure_of_a_page_has_its_numbers_under_a_fold(tiny_detector, save, voice, tmp_path):
    write_report(tiny_detector, save(voice(32.0, 60)), tmp_path / "page.html", known=KNOWN)
    page = BeautifulSoup((tmp_path / "page.html").read_text(), "html.parser")
    folds = page.select("details.data")
    assert len(folds) == len(page.find_all("img")) == 4 and not any(fold.has_attr("open") for fold in folds)
    assert all(len(fold.find_all("tr")) > 2 for fold in folds)


KNOWN = [Known("real speech", "bonafide", np.array([0.8, 0.9, 1.0, 1.1])), Known("<b>world", "copysynth", np.array([1.0, 5.0]))]


def test_a_page_sets_the_recording_beside_known_generators(tiny_detector, clip, tmp_path):
    one = write_report(tiny_detector, clip, tmp_path / "page.html", known=KNOWN)
    text = (tmp_path / "page.html").read_text()
    assert "Beside known generators" in text and "&lt;b&gt;world" in text and "<b>" not in text
    assert KNOWN[1].above(one.anomaly) == np.mean(KNOWN[1].anomalies >= one.anomaly)
    assert "Beside known generators" not in (write_report(tiny_detector, clip, tmp_path / "x.html") and (tmp_path / "x.html").read_text())


def test_known_generators_are_kept_beside_the_detector(tiny_detector, tmp_path):
    assert read_known(tiny_detector.save(tmp_path)) == []
    write_known(tmp_path, [("tts", "b", 2.0), ("bonafide", "", 0.9), ("copysynth", "a", 3.0), ("copysynth", "a", 1.0)])
    found = read_known(tmp_path)
    assert [(one.kind, one.name, one.anomalies.tolist()) for one in found] == [
        ("bonafide", "real speech", [0.9]), ("copysynth", "a", [1.0, 3.0]), ("tts", "b", [2.0])]
    assert found[1].above(2.0) == 0.5 and found[1].quantiles[2] == 2.0


@pytest.mark.parametrize("change", [
    lambda sheet: "{", lambda sheet: "[]", lambda sheet: json.dumps(sheet | {"format": 2}), lambda sheet: json.dumps(sheet | {"groups": 3}),
    lambda sheet: json.dumps(sheet | {"groups": [{"name": "a", "kind": "tts", "anomalies": [float("nan")]}]}),
    lambda sheet: json.dumps(sheet | {"groups": [{"name": "a", "kind": "other", "anomalies": [1.0]}]}),
    lambda sheet: json.dumps(sheet | {"groups": [{"name": "a", "kind": "tts", "anomalies": []}]}),
    lambda sheet: json.dumps(sheet | {"sha256": "0" * 64})], ids=range(8))
def test_damaged_or_foreign_anomalies_of_known_generators_are_refused(tiny_detector, tmp_path, change):
    path = write_known(tiny_detector.save(tmp_path), [("tts", "b", 2.0)])
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(DetectorError, match="delete it"):
        read_known(tmp_path)


def test_the_table_page_escapes_names(tmp_path):
    write_table([Recording(HOSTILE, UNKNOWN, "<i>why</i>")], tmp_path / "page.html", "one", {})
    text = (tmp_path / "page.html").read_text()
    assert "<script" not in text and "<i>" not in text and not remote_urls(text)


def test_the_map_is_blank_in_pauses_and_at_the_ends(tiny_detector, save, voice):
    path = save(np.concatenate([np.zeros(RATE_HZ, np.float32), voice(3.0, 60)]))
    stretch = heard(tiny_detector, path)
    assert 0.9 < stretch.start_s < 1.3 and stretch.stop_s == pytest.approx(4.0, abs=0.2)
    assert np.isnan(stretch.map[:, :10]).all() and np.isnan(stretch.map[:, -10:]).all()
    assert not np.isnan(stretch.map[:, stretch.mapped]).any()
    above, moments, bands = where(stretch)
    assert re.search(r"\d\.\d s \(-?\d\.\d\d\)", moments) and "kHz" in bands
    share = np.mean(stretch.map[:, stretch.mapped] > tiny_detector.map_limits[1])
    assert above.startswith(f"{share:.1%} of the map is above {tiny_detector.map_limits[1]:.2f}")


def test_the_map_of_a_page_is_the_default_one_on_the_scale_of_the_detector(tiny_detector, clip, tmp_path, monkeypatch):
    stretch = heard(tiny_detector, clip)
    prepared = pass_channel(soundfile.read(clip, dtype="float32")[0], tiny_detector.settings.channel)
    assert np.array_equal(stretch.explanation.map, tiny_detector.explain_prepared(prepared.audio, prepared.active).map)
    assert (stretch.kind, stretch.limits) == (tiny_detector.map_kind, tiny_detector.map_limits)
    monkeypatch.setattr(Detector, "map_kind", "frequency")
    collected = Collected(tiny_detector)
    judged(tiny_detector, clip, visit=collected)
    residuals = tiny_detector.clip_residuals(prepared.audio, prepared.active)[1]
    levels = [(tiny_detector.scaling.apply(index, parts, "frequency"), mask) for index, (parts, mask) in enumerate(residuals)]
    bands = tiny_detector.profile([one for one, _ in levels], [mask for _, mask in levels]).numpy().reshape(len(levels), -1)
    assert np.allclose(collected.bands[0][2], bands.mean(0))  # the timeline shows the same map as the figure
    other = heard(tiny_detector, clip)
    assert other.kind == "frequency" and not np.allclose(other.map, stretch.map, equal_nan=True)
    assert meaning_of_map(other) != meaning_of_map(stretch) and f"{stretch.limits[1]:.2f}" in meaning_of_map(stretch)


def test_a_detector_without_a_colour_scale_draws_no_page(tiny_detector, clip, tmp_path):
    path = tiny_detector.save(tmp_path / "old") / "detector.json"
    sheet = json.loads(path.read_text())
    del sheet["map"]
    path.write_text(json.dumps(sheet))
    assert judged(Detector.load(path.parent), clip).verdict == REAL
    with pytest.raises(DetectorError, match="no colour scale.*calibrate it again"):
        write_report(Detector.load(path.parent), clip, tmp_path / "page.html")


def test_decibels_of_a_sine():
    view, channel = View(channels=("level",)), Channel()
    audio = np.sin(2 * np.pi * 1000 * np.arange(RATE_HZ) / RATE_HZ).astype(np.float32)
    level = decibels(image(torch.from_numpy(audio)[None], view, channel)[0, 0].numpy(), view)
    assert level[:, 30:90].max() == pytest.approx(0.0, abs=0.5)


# --- detectors --------------------------------------------------------------------------------------------------------------


def test_calibration_on_own_speech_is_saved_with_its_limits(saved_detector, save, voice, tmp_path):
    paths = [save(voice(9.0, seed), f"{seed}.wav") for seed in range(100, 104)] + [tmp_path / "no.wav"]
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "known.json").write_text("of the detector that was here before")
    detector, skipped = calibrate(paths, tmp_path / "own", saved_detector)
    assert read_known(tmp_path / "own") == []
    again, limits, names = load_detector(tmp_path / "own")
    assert len(skipped) == 1 and "nothing there" in skipped[0]
    assert np.array_equal(again.calibration, detector.calibration) and names["calibration_clips"] == len(detector.calibration) == 6
    assert all(value <= default for value, default in zip(dataclasses.astuple(limits), dataclasses.astuple(Limits())))
    assert not set(detector.fitted_on["scaling"]) & set(detector.fitted_on["threshold"])
    base = Detector.load(saved_detector)
    assert all(bool((a == b).all()) for a, b in zip(again.student.state_dict().values(), base.student.state_dict().values()))


def test_calibration_on_narrow_band_speech_admits_narrow_band_recordings(saved_detector, save, voice, tmp_path):
    paths = [save(voice(9.0, seed)[::2], f"{seed}.wav", 8000) for seed in range(100, 104)]
    calibrate(paths, tmp_path / "own", saved_detector)
    detector, limits, _ = load_detector(tmp_path / "own")
    assert limits.bandwidth_hz < 4100 and judged(detector, paths[0], limits, alpha=0.2).verdict != UNKNOWN


def test_calibration_needs_speech(saved_detector, save, voice, tmp_path):
    with pytest.raises(DetectorError, match="at least 8 pieces"):
        calibrate([save(voice(4.0, 60))], tmp_path / "own", saved_detector)
    assert not (tmp_path / "own").exists()


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
