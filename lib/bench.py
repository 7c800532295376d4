"""Owns the benchmark: ratios of speed measured in one run, interleaved, medians. Never part of the tests."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch

from lib.detector import folded
from lib.discrepancy import discrepancy, matching_loss
from lib.pyramid import ResNetPyramid, freeze, initialise
from lib.settings import RATE_HZ, Channel, View
from lib.spectrograms import image


def interleaved(makers: dict[str, Callable[[], object]], rounds: int = 9) -> dict[str, float]:
    """Median seconds of each, measured in turns so that a busy machine slows all alike."""
    times: dict[str, list[float]] = {name: [] for name in makers}
    for round_ in range(rounds + 2):
        for name, make in makers.items():
            began = time.perf_counter()
            make()
            if round_ >= 2:  # the first two warm up
                times[name].append(time.perf_counter() - began)
    return {name: float(np.median(values)) for name, values in times.items()}


def _pair(inputs: int = 3, width: int = 64) -> tuple[torch.nn.Module, torch.nn.Module]:
    return tuple(freeze(initialise(ResNetPyramid(inputs, width), seed, "bench")) for seed in (0, 1))


def gemm_peak() -> float:
    """Measured peak of a single-precision matrix product in GFLOP/s, at the current number of threads."""
    a, b = torch.randn(1536, 1536), torch.randn(1536, 1536)
    seconds = interleaved({"gemm": lambda: a @ b})["gemm"]
    return 2 * 1536**3 / seconds / 1e9


def _anomalib(pair: tuple[torch.nn.Module, torch.nn.Module]):
    """anomalib's STFPM with the same weights, or None where it is not installed."""
    try:
        from anomalib.models.image.stfpm.torch_model import STFPMModel
    except ImportError:
        return None
    model = STFPMModel(layers=["layer1", "layer2", "layer3"], backbone="resnet18").eval()
    for own, theirs in zip(pair, (model.teacher_model, model.student_model)):
        theirs.feature_extractor.load_state_dict(own.state_dict(), strict=False)
    return model


def inference(threads: tuple[int, ...] = (1, 2), batches: tuple[int, ...] = (1, 8, 32)) -> pd.DataFrame:
    """Teacher and student of width 64 and their discrepancy on 3 x 128 x 256 images: milliseconds an image and ratios."""
    pair, rows = _pair(), []
    fast = tuple(folded(network) for network in pair)
    rival = _anomalib(pair)
    for count in threads:
        torch.set_num_threads(count)
        peak = gemm_peak()
        for batch in batches:
            x = torch.randn(batch, 3, 128, 256)
            last = x.contiguous(memory_format=torch.channels_last)

            def run(networks=pair, given=x, bf16=False):
                with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    return [discrepancy(t, s) for t, s in zip(networks[0](given), networks[1](given))]

            makers = {"plain torch pair": run, "ours: folded, channels last": lambda: run(fast, last),  # noqa: B023
                      "ours, bf16": lambda: run(fast, last, True)}  # noqa: B023
            if rival is not None:
                makers["anomalib STFPMModel"] = lambda: torch.inference_mode()(rival)(x)  # noqa: B023
            found = interleaved(makers)
            for name, seconds in found.items():
                rows.append({"what": "inference", "threads": count, "batch": batch, "variant": name, "ms each": 1000 * seconds / batch,
                             "times as fast as plain": found["plain torch pair"] / seconds,
                             "share of GEMM peak": 3.664 * batch / seconds / peak})
    return pd.DataFrame(rows)


def training_step(threads: int = 2, batch: int = 8) -> pd.DataFrame:
    """One step of the student on 3 x 128 x 256 images: forward of both, backward, optimiser."""
    torch.set_num_threads(threads)
    teacher, student = _pair()
    student = copy.deepcopy(student).train().requires_grad_(True)
    quick = copy.deepcopy(student).to(memory_format=torch.channels_last)
    x = torch.randn(batch, 3, 128, 256)
    last, fast = x.contiguous(memory_format=torch.channels_last), folded(teacher)
    with torch.no_grad():
        kept = fast(last)

    def step(network, given, wanted, bf16=False):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = matching_loss(wanted(), network(given))
        network.zero_grad(set_to_none=True)
        loss.backward()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter -= 1e-6 * parameter.grad

    plain = torch.no_grad()(lambda: teacher(x))
    quickly = torch.no_grad()(lambda: fast(last))
    found = interleaved({
        "plain": lambda: step(student, x, plain),
        "channels last, folded teacher": lambda: step(quick, last, quickly),
        "cached teacher": lambda: step(quick, last, lambda: kept),
        "bf16": lambda: step(quick, last, quickly, True),
        "cached teacher, bf16": lambda: step(quick, last, lambda: kept, True),
    }, rounds=5)
    return pd.DataFrame([{"what": "training step", "threads": threads, "batch": batch, "variant": name, "ms each": 1000 * value / batch,
                          "times as fast as plain": found["plain"] / value} for name, value in found.items()])


def front_end() -> pd.DataFrame:
    """Audio to image on one thread: times real time, for the plain spectrogram, the study's six channels, and librosa."""
    import librosa

    torch.set_num_threads(1)
    audio = torch.randn(1, 60 * RATE_HZ)
    array = audio[0].numpy()
    found = interleaved({
        "ours, log-magnitude": lambda: image(audio, View(channels=("level",)), Channel()),
        "ours, six channels": lambda: image(audio, View(), Channel()),
        "librosa, log-magnitude": lambda: np.log(np.abs(librosa.stft(array, n_fft=512, hop_length=128)) + 1e-5),
    }, rounds=5)
    rows = [{"what": "front end", "threads": 1, "variant": name, "times real time": 60 / value} for name, value in found.items()]
    return pd.DataFrame(rows)


def agreement() -> dict[str, float]:
    """Largest difference of our discrepancy maps from the plain pair's, and from anomalib's where it is installed."""
    pair = _pair()
    x = torch.randn(2, 3, 128, 256, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        plain = [discrepancy(t, s) for t, s in zip(pair[0](x), pair[1](x))]
        fast = tuple(folded(network) for network in pair)
        ours = [discrepancy(t, s) for t, s in zip(fast[0](x), fast[1](x))]
    return {"folded against plain": max(float((a - b).abs().max()) for a, b in zip(plain, ours))}


def run(quick: bool = False) -> pd.DataFrame:
    """The whole table; `quick` leaves out large batches."""
    return pd.concat([inference(batches=(1, 8) if quick else (1, 8, 32)), training_step(), front_end()], ignore_index=True)
