"""The detector that ships: all evidence, named, and calm on real speech; a recording with lines is called by them."""

import numpy as np
import soundfile

from lib.detector import Detector
from lib.model.evidence import WEIGHTS
from lib.paths import SHIPPED
from lib.recordings.explaining import read_known
from lib.recordings.judging import FAKE, judged
from tests.conftest import toy_speech
from tests.test_lines import RATE, comb


def test_it_has_all_evidence_of_several_sources():
    evidence = Detector.load().evidence
    assert evidence.names == tuple(WEIGHTS) and len(set(evidence.sources)) >= 5 and len(evidence.seconds) >= 400
    assert np.isfinite(evidence.sums).all()


def test_lines_are_named_in_the_verdict_at_the_rate_of_the_recording(tmp_path):
    rate_hz = 24000
    speech = np.interp(np.arange(0, 5, 1 / rate_hz), np.arange(0, 5, 1 / RATE), toy_speech(5.0))
    lines = comb(93.75, 5.0, rate_hz, top_hz=11000, level=2e-3)
    soundfile.write(tmp_path / "a.wav", 0.5 * speech + lines, rate_hz)
    recording = judged(Detector.load(), tmp_path / "a.wav")
    assert recording.lines.spacing_hz == 93.75 and recording.lines.top_hz > 9000
    assert recording.evidence["lines"].p_value < 0.02
    assert recording.verdict != FAKE or "lines every 93.8 Hz" in recording.words


def test_the_clips_of_known_origin_are_this_detectors():
    kinds = {group.kind for group in read_known(SHIPPED)}
    assert {"bonafide", "copysynth", "tts", "control"} <= kinds
