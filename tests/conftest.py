"""What several test modules share: toy speech, and a tiny detector fitted on it."""

from fractions import Fraction

import numpy as np
import pytest
import torch

RATE = 16_000


def toy_speech(seconds=1.5, seed=0, pitch_hz=120.0):
    """Something with a voice's traits, (samples,) float32: a gliding pulse train with formants, breath, pauses."""
    random = np.random.default_rng(seed)
    time = np.arange(round(seconds * RATE)) / RATE
    pitch = pitch_hz * (1 + 0.15 * np.sin(2 * np.pi * (0.7 * time + random.uniform())) + 0.1 * random.uniform(-1, 1))
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    voice = sum(
        np.cos(k * phase + 0.1 * k) / (1 + 0.04 * k) / (1 + abs(k * pitch_hz - 700) / 900) for k in range(1, 45)
    )
    rhythm = np.clip(np.sin(2 * np.pi * (3.1 * time + random.uniform())) + 0.3, 0.003, None)
    audio = (voice + 1.5 * random.standard_normal(len(time))) * rhythm
    return (0.5 * audio / np.abs(audio).max()).astype(np.float32)


def encoded(path, codec, audio, rate_hz, form=None):
    """Write mono `audio` (samples,) through an encoder of FFmpeg, in the container that the name or `form` says."""
    import av

    with av.open(str(path), "w", format=form) as target:
        stream = target.add_stream(codec, rate=rate_hz, layout="mono")
        stream.bit_rate = 12_200 if "amr" in codec else 64_000
        frame = av.AudioFrame.from_ndarray(np.asarray(audio, np.float32)[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate_hz, 0, Fraction(1, rate_hz)
        resampler = av.AudioResampler(
            stream.codec_context.format, "mono", rate_hz, stream.codec_context.frame_size or None
        )
        for part in (*resampler.resample(frame), *resampler.resample(None), None):
            target.mux(stream.encode(part))
    return path


def pytest_collection_modifyitems(items):
    """The notebooks first: they take longest, and with several workers the other files are tested beside them."""
    items.sort(key=lambda item: item.get_closest_marker("study") is None)


@pytest.fixture(scope="session")
def voice():
    """The function `toy_speech`, for modules that cannot import this one."""
    return toy_speech


@pytest.fixture(scope="session")
def tiny_detector():
    """A detector of width 4 with random networks, calibrated on 24 toy clips: every path of the real one."""
    from lib.data.channel import apply_channel
    from lib.detector import Detector
    from lib.model.networks import new_student, new_teacher
    from lib.model.pyramid import Standardised, initialise, settle
    from lib.settings import READ, load_settings

    torch.set_num_threads(1)
    options = {"network.teacher_width": 4, "network.student_width": 4, "network.teacher": "random", **READ}
    settings = load_settings("smoke", options=options)
    clips = [apply_channel(toy_speech(1.5, seed, 90 + 5 * seed), settings.channel) for seed in range(32)]
    batches = [torch.from_numpy(audio[:RATE])[None] for audio, _ in clips[:4]]
    teacher = settle(initialise(new_teacher(settings), 0, "teacher"), batches)
    generator = torch.Generator().manual_seed(0)
    # As if it had learnt to name three kinds.
    readers = [torch.randn(3, count, generator=generator) for count in teacher.channels]
    teacher = Standardised(teacher, readers).measure(batches)
    detector = Detector(settings, teacher, settle(new_student(teacher, settings), batches))
    detector.fit_scaling(clips[:8], [f"toy-{index}" for index in range(8)])
    detector.fit_threshold(clips[8:], [f"toy-{index}" for index in range(8, 32)])
    return detector


@pytest.fixture(scope="session")
def saved_detector(tiny_detector, tmp_path_factory):
    """The folder of the tiny detector; copy it before changing a file."""
    return tiny_detector.save(tmp_path_factory.mktemp("detector"))
