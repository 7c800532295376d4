"""Owns the benchmark: ratios of speed measured in one run, in turns: networks of the published sizes beside anomalib
and plain torch, the front end beside librosa, the command as a user starts it, how cost grows with hours of audio."""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import soundfile
import torch
from torch import nn
from torch.nn import functional

from lib.detector import Detector
from lib.model.discrepancy import discrepancy, matching_loss
from lib.model.images import FLOOR, hop_samples, image, plane_count, transform_size
from lib.model.pyramid import ResNetPyramid, folded, freeze, initialise
from lib.paths import CLIPS, atomic
from lib.report.exhibits import style
from lib.settings import RATE_HZ, Channel, View

PAIR_GFLOP = 3.664
"""Of teacher and student of width 64 up to layer 3 on one image of 3 x 128 x 256, two operations a multiplication."""
ALONE = """import atexit, re, runpy, sys
peak = lambda: re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]  # resource hands on its parent's
atexit.register(lambda: print("VmHWM", peak(), file=sys.stderr))
runpy.run_module("lib", run_name="__main__")"""


def interleaved(makers: dict[str, Callable[[], object]], rounds: int = 9) -> dict[str, np.ndarray]:
    """Seconds of each, in turns so that a busy machine slows all alike; the first two rounds warm up."""
    times: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(rounds + 2):
        for name, make in makers.items():
            began = time.perf_counter()
            make()
            times[name].append(time.perf_counter() - began)
    return {name: np.array(values[2:]) for name, values in times.items()}


class Given(nn.Module):
    """A front end for images that are there already."""

    planes = 3

    def forward(self, picture: torch.Tensor, _: None = None) -> torch.Tensor:
        return picture


def pair() -> tuple[nn.Module, nn.Module]:
    return tuple(freeze(initialise(ResNetPyramid(Given(), 64), seed, "bench")) for seed in (0, 1))


def product(kind: torch.dtype) -> tuple[float, Callable[[], object]]:
    """GFLOP of a matrix product in one precision, and what computes it: of several sizes, as convolutions of 1 x 1 and
    3 x 3 (and in fp32 plainly: slow in bf16 where the processor has none), that of the highest rate, warm."""
    works = {}
    for channels, side in ((512, 1), (1024, 1), (256, 3)):
        shapes = (1, channels, 32, 64), (channels, channels, side, side)
        x, weight = (torch.randn(shape, dtype=kind).to(memory_format=torch.channels_last) for shape in shapes)
        work = partial(functional.conv2d, x, weight, padding=side // 2)
        works[channels, side] = 2e-9 * 2048 * (channels * side) ** 2, work
    if kind == torch.float32:
        for size in (768, 1536):
            a, b = torch.randn(size, size), torch.randn(size, size)
            works[size] = 2e-9 * size**3, partial(torch.mm, a, b)
    times = interleaved({name: work for name, (_, work) in works.items()}, rounds=3)
    return works[max(times, key=lambda name: works[name][0] / times[name].min())]


def anomalib(networks: tuple[nn.Module, nn.Module]) -> nn.Module | None:
    """anomalib's STFPM with the same weights, or None where it is not installed."""
    try:
        import timm
        from anomalib.models.image.stfpm.torch_model import STFPMModel
    except ImportError:
        print("anomalib is not installed: pip install -e '.[bench]'", file=sys.stderr)
        return None
    made = timm.create_model  # its weights are replaced by ours, so none are fetched
    with mock.patch("timm.create_model", lambda *names, **options: made(*names, **options | {"pretrained": False})):
        model = STFPMModel(layers=["layer1", "layer2", "layer3"], backbone="resnet18").eval()
    for own, theirs in zip(networks, (model.teacher_model, model.student_model)):
        keys = theirs.feature_extractor.load_state_dict(own.state_dict(), strict=False)
        if keys.unexpected_keys:
            raise RuntimeError(f"this release of anomalib names its layers otherwise: {keys}")
    return model


def distances(networks: tuple[nn.Module, nn.Module], x: torch.Tensor, bf16: bool = False) -> list[torch.Tensor]:
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return [discrepancy(teacher, student) for teacher, student in zip(networks[0](x), networks[1](x))]


def agreement(quick: bool) -> list[dict]:
    """Largest difference between maps of the same weights: folded against plain, joined (STFPM) against anomalib's."""
    networks, x = pair(), torch.randn(2, 3, 128, 256, generator=torch.Generator().manual_seed(0))
    plain, ours, rival = distances(networks, x), distances(tuple(map(folded, networks)), x), anomalib(networks)
    gaps = {"folded against plain": max(float((a - b).abs().max()) for a, b in zip(plain, ours))}
    if rival is not None:
        grown = [functional.interpolate(level[:, None], x.shape[2:], mode="bilinear") for level in ours]
        theirs = torch.inference_mode()(rival)(x).anomaly_map
        gaps["folded against anomalib's map"] = float((torch.stack(grown).prod(0) - theirs).abs().max())
    return [{"variant": name, "largest difference": value} for name, value in gaps.items()]


def inference(quick: bool) -> list[dict]:
    """Teacher, student and their discrepancy on 3 x 128 x 256 images: milliseconds an image, ratios of medians, and the
    best rate as a share of the best one of a matrix product in the same precision, measured in the same turns."""
    networks, rows = pair(), []
    fast, rival = tuple(map(folded, networks)), anomalib(networks)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        peaks = {"fp32": product(torch.float32), "bf16": product(torch.bfloat16)}
        for batch in (1, 8) if quick else (1, 8, 32):
            x = torch.randn(batch, 3, 128, 256)
            last = x.contiguous(memory_format=torch.channels_last)
            makers = {"plain torch pair": partial(distances, networks, x),
                      "ours: folded, channels last": partial(distances, fast, last),
                      "ours, bf16": partial(distances, fast, last, True)}
            if rival is not None:
                makers["anomalib STFPMModel"] = partial(torch.inference_mode()(rival), x)
            times = interleaved(makers | {kind: work for kind, (_, work) in peaks.items()})
            for name in makers:
                kind, each = "bf16" if "bf16" in name else "fp32", np.median(times[name])
                rate, best = PAIR_GFLOP * batch / times[name].min(), peaks[kind][0] / times[kind].min()
                rows.append({"threads": threads, "batch": batch, "variant": name, "ms each": 1000 * each / batch,
                             "times as fast as plain": np.median(times["plain torch pair"]) / each,
                             "share of GEMM peak": rate / best})
    return rows


def training(quick: bool) -> list[dict]:
    """One step of the student on 8 images of 3 x 128 x 256, two threads: forward of both, backward, a plain update."""
    torch.set_num_threads(2)
    teacher, student = pair()
    student, fast = copy.deepcopy(student).train().requires_grad_(True), folded(teacher)
    quicker, x = copy.deepcopy(student).to(memory_format=torch.channels_last), torch.randn(8, 3, 128, 256)
    last = x.contiguous(memory_format=torch.channels_last)
    kept, rival = torch.no_grad()(fast)(last), anomalib((teacher, student))

    def updated(network: nn.Module, loss: torch.Tensor) -> None:
        network.zero_grad(set_to_none=True)
        loss.backward()
        for parameter in network.parameters():
            if parameter.grad is not None:
                parameter.data -= 1e-6 * parameter.grad

    def step(network: nn.Module, features: Callable[[], list], x: torch.Tensor, bf16: bool = False) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = matching_loss(features(), network(x))
        updated(network, loss)

    plain, quickly = partial(torch.no_grad()(teacher), x), partial(torch.no_grad()(fast), last)
    makers = {"plain": partial(step, student, plain, x),
              "channels last, folded teacher": partial(step, quicker, quickly, last),
              "cached teacher": partial(step, quicker, lambda: kept, last),
              "bf16": partial(step, quicker, quickly, last, True),
              "cached teacher, bf16": partial(step, quicker, lambda: kept, last, True)}
    if rival is not None:
        from anomalib.models.image.stfpm.loss import STFPMLoss

        makers["anomalib"] = lambda: updated(rival.train().student_model, STFPMLoss()(*rival(x)))
    times = {name: np.median(values) for name, values in interleaved(makers, rounds=5).items()}
    return [{"threads": 2, "batch": 8, "variant": name, "ms each": 1000 * value / 8,
             "times as fast as plain": times["plain"] / value} for name, value in times.items()]


def front_end(quick: bool) -> list[dict]:
    """Audio to image on one thread, 5 s of noise: times real time."""
    import librosa

    torch.set_num_threads(1)
    view, plain, channel, seconds = View(), View(planes=("level",)), Channel(), 5
    audio = torch.randn(1, seconds * RATE_HZ, generator=torch.Generator().manual_seed(0))
    size, hop = transform_size(view, channel), hop_samples(view)

    def theirs() -> np.ndarray:
        magnitude = np.abs(librosa.stft(audio[0].numpy(), n_fft=size, hop_length=hop, pad_mode="constant"))
        return (np.log(magnitude / np.sqrt(view.window_s * RATE_HZ) + FLOOR) + 5.5) / 1.8

    times = interleaved({"ours, log-magnitude": partial(image, audio, plain, channel),
                         f"ours, all {plane_count(view.planes)} planes": partial(image, audio, view, channel),
                         "librosa, log-magnitude": theirs}, rounds=25)
    return [{"threads": 1, "variant": name, "times real time": seconds / np.median(values)}
            for name, values in times.items()]


def linked(folder: Path, seconds: float) -> float:
    """Fill `folder` with links to the study's real clips, over and over, until there are `seconds`; returns how many
    there are. Raises RuntimeError where no clips were prepared yet."""
    folder.mkdir()
    total, clips = 0.0, sorted((CLIPS / "bonafide").glob("*.flac"))
    if not clips:
        raise RuntimeError(f"no clips in {CLIPS / 'bonafide'}: make them with `python -m lib study --only 10`")
    for number, path in enumerate(itertools.cycle(clips)):
        if total >= seconds:
            return total
        (folder / f"{number:07d}.flac").symlink_to(path)
        total += soundfile.info(path).duration


def alone(*arguments: object) -> dict[str, float]:
    """Seconds and peak memory of `python -m lib ARGUMENTS` in a process of its own."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", ALONE, *map(str, arguments)], capture_output=True, text=True)
    taken, last = time.perf_counter() - began, done.stderr.strip().split("\n")[-1]
    if done.returncode not in (0, 1) or not last.startswith("VmHWM"):
        raise RuntimeError(f"{arguments} failed: {done.stderr.strip()[-500:]}")
    return {"seconds": taken, "peak MB": 1.024e-3 * float(last.split()[1])}


def command(quick: bool) -> list[dict]:
    """`python -m lib score` with the shipped detector: start to verdict on 10 s, a folder, one long recording."""
    minutes, rows = 10 if quick else 60, []
    with tempfile.TemporaryDirectory() as name:
        many, short, long = (Path(name) / each for each in ("many", "short.flac", "long.flac"))
        amount = linked(many, 60 * minutes)
        clips = sorted(many.iterdir())
        for target, seconds in ((short, 10), (long, 60 * minutes)):
            with soundfile.SoundFile(target, "w", RATE_HZ, 1) as file:
                for path in clips[: max(1, math.ceil(len(clips) * seconds / amount))]:
                    file.write(soundfile.read(path, dtype="float32")[0])
        works = [("start to verdict on 10 s", 10, (short,)),
                 (f"folder of {len(clips)} clips, one process", amount, ("--folder", many)),
                 (f"folder of {len(clips)} clips, two processes", amount, ("--folder", many, "--jobs", 2)),
                 (f"one recording of {minutes} min", 60 * minutes, (long,))]
        for variant, seconds, arguments in works:
            row = {"variant": variant} | alone("score", *arguments)
            rows.append(row | {"times real time": seconds / row["seconds"]})
    return rows


def growth(quick: bool) -> list[dict]:
    """Time and peak memory of scoring a manifest of 1, 3 and 10 h, each in a process of its own, by all evidence and by
    the pyramid alone, and the slope of a line through the three peaks."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        pyramid, detector = Path(name) / "pyramid", Detector.load()
        detector.evidence = None
        detector.save(pyramid)
        for hours in (0.02, 0.06, 0.2) if quick else (1, 3, 10):
            clips, scores = Path(name) / f"{hours}", Path(name) / "scores.tsv"
            seconds = linked(clips, 3600 * hours)
            for variant, options in {"all evidence": (), "pyramid alone": ("--detector", pyramid)}.items():
                row = alone("score", "--manifest", clips, "--out", scores, *options)
                rows.append({"variant": variant, "hours": hours} | row | {"times real time": seconds / row["seconds"]})
    peaks = pd.DataFrame(rows).groupby("variant")[["hours", "peak MB"]]
    slopes = {variant: np.polyfit(*part.to_numpy().T, 1)[0] for variant, part in peaks}
    return [row | {"MB an hour": slopes[row["variant"]]} for row in rows]


PARTS = {"agreement": agreement, "inference": inference, "training": training, "front-end": front_end,
         "command": command, "growth": growth}


def draw_cost(table: pd.DataFrame, target: Path | str) -> None:
    """Draw peak memory and time against hours of audio (part `growth`) into `target`. Raises ValueError without it."""
    rows = table[table.what == "growth"]
    if rows.empty:
        raise ValueError("the figure shows the part growth, which did not run")
    style()
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    for axis, value, label in zip(axes, ("peak MB", "seconds"), ("peak memory (MB)", "time (s)")):
        sns.lineplot(rows, x="hours", y=value, hue="variant", style="variant", markers=True, ax=axis)
        axis.set(xlabel="hours of audio", ylabel=label, ylim=(0, 1.3 * rows[value].max()))
    with atomic(target) as temporary:
        figure.savefig(temporary)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="ratios of speed, measured in one run")
    parser.add_argument("--only", action="append", metavar="PART", choices=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="fewer and smaller sizes")
    parser.add_argument("--figure", metavar="FILE", help="draw how cost grows (part growth) as .png or .svg")
    chosen = parser.parse_args(arguments)
    tables = []
    for name in chosen.only or PARTS:
        table = pd.DataFrame([{"what": name} | row for row in PARTS[name](chosen.quick)])
        tables.append(table)
        print(table.to_string(index=False, na_rep="", float_format="{:.4g}".format), flush=True)
    if chosen.figure:
        draw_cost(pd.concat(tables), chosen.figure)


if __name__ == "__main__":
    main()
