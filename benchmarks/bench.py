"""Owns the benchmark: ratios of speed measured in one run, interleaved, medians. Never part of the tests.

Its parts (`PARTS`) can be run one by one: the networks on the published sizes, the front end, the command as a user starts
it, and how memory and time grow with hours of audio and with the networks' width.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import torch
from torch.nn import functional

from lib.data.channel import ClipReader, PreparedClips
from lib.detector import Detector
from lib.engine import Engine
from lib.evaluate.metrics import equal_error_rate
from lib.model.discrepancy import discrepancy, matching_loss
from lib.model.images import FLOOR, channel_count, hop_samples, image, transform_size
from lib.model.networks import PerturbationTeacher, new_student
from lib.model.pyramid import PRECISIONS, ResNetPyramid, Standardised, folded, freeze, initialise
from lib.model.training import perturbation_loss
from lib.paths import CLIPS, atomic
from lib.recordings.corpus import score_manifest
from lib.settings import RATE_HZ, Channel, Settings, View, load_settings
from lib.study import Study


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
        import timm
        from anomalib.models.image.stfpm.torch_model import STFPMModel
    except ImportError:
        return None
    made = timm.create_model
    with mock.patch("timm.create_model", lambda *names, **options: made(*names, **options | {"pretrained": False})):
        # Its weights are replaced by ours, so none are fetched.
        model = STFPMModel(layers=["layer1", "layer2", "layer3"], backbone="resnet18").eval()
    for own, theirs in zip(pair, (model.teacher_model, model.student_model)):
        lacking = theirs.feature_extractor.load_state_dict(own.state_dict(), strict=False)
        used = [name for name in lacking.missing_keys if name.startswith(("conv1", "bn1", "layer1", "layer2", "layer3"))]
        if lacking.unexpected_keys or used:
            raise RuntimeError(f"this release of anomalib names its layers otherwise: {lacking}")
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
            rows += [] if rival is not None else [{"what": "inference", "threads": count, "batch": batch, "variant": NO_RIVAL}]
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
    rival = _anomalib((teacher, student))
    makers = {} if rival is None else {"anomalib (its teacher, student and loss)": _anomalib_step(rival, x)}
    found = interleaved(makers | {
        "plain": lambda: step(student, x, plain),
        "channels last, folded teacher": lambda: step(quick, last, quickly),
        "cached teacher": lambda: step(quick, last, lambda: kept),
        "bf16": lambda: step(quick, last, quickly, True),
        "cached teacher, bf16": lambda: step(quick, last, lambda: kept, True),
    }, rounds=5)
    return pd.DataFrame([{"what": "training step", "threads": threads, "batch": batch, "variant": name, "ms each": 1000 * value / batch,
                          "times as fast as plain": found["plain"] / value} for name, value in found.items()])


def _anomalib_step(rival: torch.nn.Module, x: torch.Tensor) -> Callable[[], None]:
    from anomalib.models.image.stfpm.loss import STFPMLoss

    loss, student = STFPMLoss(), [each for each in rival.student_model.parameters()]
    rival.train()

    def step() -> None:
        for parameter in student:
            parameter.grad = None
        loss(*rival(x)).backward()
        with torch.no_grad():
            for parameter in student:
                if parameter.grad is not None:
                    parameter -= 1e-6 * parameter.grad

    return step


def front_end() -> pd.DataFrame:
    """Audio to image on one thread, clips of 5 s as in the study: times real time, for the plain spectrogram, the study's ten
    image planes, and librosa; and how far the plain spectrogram is from librosa's."""
    import librosa

    torch.set_num_threads(1)
    view, channel, seconds = View(), Channel(), 5
    audio = torch.randn(1, seconds * RATE_HZ, generator=torch.Generator().manual_seed(0))
    array, plain = audio[0].numpy(), View(channels=("level",))
    size, hop, planes = transform_size(view, channel), hop_samples(view), channel_count(view.channels)

    def theirs() -> np.ndarray:
        magnitude = np.abs(librosa.stft(array, n_fft=size, hop_length=hop, pad_mode="constant"))
        return (np.log(magnitude / np.sqrt(view.window_s * RATE_HZ) + FLOOR) + 5.5) / 1.8

    found = interleaved({
        "ours, log-magnitude": lambda: image(audio, plain, channel),
        f"ours, all {planes} planes": lambda: image(audio, view, channel),
        "librosa, log-magnitude": theirs,
    }, rounds=25)
    ours = image(audio, plain, channel)[0, 0].numpy()
    first = round(channel.low_hz * size / RATE_HZ)
    gap = float(np.abs(ours - theirs()[first : first + view.bins]).max())
    return pd.DataFrame([{"what": "front end", "threads": 1, "variant": name, "times real time": seconds / value,
                          "largest difference": gap if name == "ours, log-magnitude" else None} for name, value in found.items()])


def agreement() -> pd.DataFrame:
    """Largest difference between maps of the same weights: ours against the plain pair's at every level, and the joined map
    (Wang et al. 2021, eq. 5) against anomalib's where that is installed: an oracle that somebody else wrote."""
    pair = _pair()
    x = torch.randn(2, 3, 128, 256, generator=torch.Generator().manual_seed(0))
    fast, rival = tuple(folded(network) for network in pair), _anomalib(pair)
    with torch.inference_mode():
        plain = [discrepancy(t, s) for t, s in zip(pair[0](x), pair[1](x))]
        ours = [discrepancy(t, s) for t, s in zip(fast[0](x), fast[1](x))]
        gaps = {"folded against plain": max(float((a - b).abs().max()) for a, b in zip(plain, ours))}
        if rival is not None:
            grown = [functional.interpolate(level[:, None], x.shape[2:], mode="bilinear") for level in ours]
            gaps["folded against anomalib's map"] = float((torch.stack(grown).prod(0) - _map_of(rival, x)).abs().max())
    rows = [{"what": "agreement", "variant": name, "largest difference": value} for name, value in gaps.items()]
    return pd.DataFrame(rows if rival is not None else [*rows, {"what": "agreement", "variant": NO_RIVAL}])


NO_RIVAL = "anomalib is not installed: pip install -e '.[bench]'"


def _map_of(rival: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    found = rival(x)
    return found.anomaly_map if hasattr(found, "anomaly_map") else found["anomaly_map"]


def precision(quick: bool = False) -> pd.DataFrame:
    """What bf16 does to the shipped detector on the study's many-voice test (real clips and copies): EER in percent, largest
    difference of a score in standard deviations of real speech, and time of the networks."""
    torch.set_num_threads(1)
    study = Study.open("study")
    clips = study.test("multi", only="test")
    clips = clips[clips.role.isin(["bonafide", "copysynth"])].iloc[:: 10 if quick else 1]
    prepared, real = list(study.prepared(clips)), (clips.role == "bonafide").to_numpy()
    rows, first = [], None
    for name in PRECISIONS:
        detector = Detector.load().in_precision(name)
        began = time.perf_counter()
        scores = -np.array([detector.score_prepared(*clip) for clip in prepared])
        taken, first = time.perf_counter() - began, scores if first is None else first
        rows.append({"what": "precision", "threads": 1, "variant": name, "EER %": 100 * equal_error_rate(scores[real], scores[~real])[0],
                     "seconds": taken, "largest difference": float(np.abs(scores - first).max() / first[real].std())})
    return pd.DataFrame(rows)


# --- as a user starts it ----------------------------------------------------------------------------------------------------


def real_clips() -> list[Path]:
    """The study's real clips of 2 s or more, in a fixed order. Raises RuntimeError where nothing was prepared yet."""
    import soundfile

    folder = CLIPS / "bonafide"
    found = [path for path in sorted(folder.glob("*.flac")) if soundfile.info(path).duration >= 2]
    if not found:
        raise RuntimeError(f"{folder} holds no clips to measure with: make them with `python -m lib study --only 10`")
    return found


def _repeated(seconds: float) -> list[Path]:
    """Real clips of `seconds` in all, over and over again."""
    import soundfile

    found, total, clips = [], 0.0, real_clips()
    lengths = {path: soundfile.info(path).duration for path in clips}
    while total < seconds:
        path = clips[len(found) % len(clips)]
        found.append(path)
        total += lengths[path]
    return found


_PEAK = """
import json, pathlib, re, resource, sys, time
began, arguments = time.perf_counter(), sys.argv[1:]
from benchmarks import bench
import torch
getattr(bench, arguments[0])(*arguments[1:])
taken, status = time.perf_counter() - began, pathlib.Path("/proc/self/status")
# Linux hands the parent's peak on to ru_maxrss; VmHWM is this process's own.
own = re.search(r"VmHWM:\\s+(\\d+)", status.read_text()) if status.exists() else None
print(json.dumps([taken, 1024 * int(own[1]) if own else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))
"""


def _alone(work: str, *arguments: object) -> tuple[float, float]:
    """Seconds and peak resident bytes of a function of this module in a process of its own."""
    done = subprocess.run([sys.executable, "-c", _PEAK, work, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{work} failed: {done.stderr.strip().splitlines()[-1]}")
    return tuple(json.loads(done.stdout.strip().splitlines()[-1]))


def command(quick: bool = False) -> pd.DataFrame:
    """`python -m lib score` with the shipped detector: start to verdict on 10 s, a folder in two processes, an hour in one."""
    import soundfile

    clips = real_clips()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "many").mkdir()
        for index in range(100 if quick else 1000):
            (folder / "many" / f"{index:04d}.flac").symlink_to(clips[index % len(clips)])
        _joined(clips, 10, folder / "short.flac")
        _joined(clips, 600 if quick else 3600, folder / "long.flac")
        amount = sum(soundfile.info(path).duration for path in (folder / "many").iterdir())
        timed = [("start to verdict on 10 s, first", 10, ("short.flac",)), ("start to verdict on 10 s", 10, ("short.flac",)),
                 (f"folder of {100 if quick else 1000} clips, two processes", amount, ("--folder", "many", "--jobs", "2")),
                 (f"one recording of {10 if quick else 60} min", 600 if quick else 3600, ("long.flac",))]
        rows = []
        for what, seconds, arguments in timed:
            taken, peak = _alone("scored", *(str(folder / each) if (folder / each).exists() else each for each in arguments))
            rows.append({"what": "command", "variant": what, "seconds": taken, "times real time": seconds / taken, "peak MB": peak / 1e6})
    return pd.DataFrame(rows)


def _joined(clips: list[Path], seconds: float, target: Path) -> None:
    import soundfile

    with soundfile.SoundFile(target, "w", RATE_HZ, 1) as file:
        for path in clips * 1000:
            file.write(soundfile.read(path, dtype="float32")[0])
            if file.frames >= seconds * RATE_HZ:
                return


def scored(*arguments: str) -> None:
    """`python -m lib score` in this process, silently. What cannot be scored is no error here."""
    import contextlib
    import io

    from lib.cli import main

    with contextlib.redirect_stdout(io.StringIO()):
        main(["score", *arguments])


# --- how cost grows ---------------------------------------------------------------------------------------------------------

TINY = {"network.teacher": "random", "network.teacher_width": 4, "network.student_width": 4}


def _untrained(settings: Settings) -> Detector:
    """A detector with random networks of the settings' size. With TINY's, of width 4, everything around the networks costs what
    it costs in the study."""
    network, inputs = settings.network, channel_count(settings.view.channels)
    pyramid = ResNetPyramid(inputs, network.teacher_width, network.levels, stem=network.stem)
    teacher = Standardised(freeze(initialise(pyramid, 0, "teacher")))
    return Detector(settings, teacher, freeze(new_student(teacher, settings)))


def read_crops(hours: str) -> None:
    """Training's reader: every clip once through the channel, as crops of one batch after the other."""
    settings = load_settings("study", 0, TINY)
    table = pd.DataFrame({"path": [str(path) for path in _repeated(3600 * float(hours))], "speaker": ""})
    reader, random = ClipReader(table, settings.channel, Path("/")), np.random.default_rng(0)
    for start in range(0, len(table), 16):
        for index in range(start, min(start + 16, len(table))):
            reader.clean(index)
        image(torch.from_numpy(reader.crops(16, RATE_HZ, random, slice(0, 0))), settings.view, settings.channel)


def fit_statistics(hours: str) -> None:
    """Scaling, typicality and threshold of a tiny detector on all clips: two passes over the audio."""
    settings = load_settings("study", 0, TINY)
    clips = PreparedClips(_repeated(3600 * float(hours)), settings.channel)
    detector = _untrained(settings)
    detector.fit_scaling(clips, [])
    detector.fit_threshold(clips, [])


def score_all(hours: str, folder: str) -> None:
    """A whole manifest scored with a tiny detector that was fitted before, in blocks as on a cluster."""
    paths = _repeated(3600 * float(hours))
    table = pd.DataFrame({"clip_id": [f"{index}" for index in range(len(paths))], "path": [str(path) for path in paths]})
    score_manifest(table, Path(folder) / f"scores-{hours}.tsv", Engine(torch.device("cpu")), folder)


def memory(quick: bool = False) -> pd.DataFrame:
    """Peak memory and time of what passes over a corpus, on 1, 3 and 10 h of the study's clips repeated, and the slope.

    Each row is a process of its own with a tiny detector (width 4), so that the 10 h are affordable; what is measured is
    reading, channel, image, statistics and scores. The slope is that of a line through the three peaks.
    """
    sizes = (0.02, 0.06, 0.2) if quick else (1, 3, 10)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        settings = load_settings("study", 0, TINY)
        detector, clips = _untrained(settings), PreparedClips(real_clips()[:40], settings.channel)
        detector.fit_scaling(clips, [])
        detector.fit_threshold(clips, [])
        detector.save(folder)
        for work, extra in (("read_crops", ()), ("fit_statistics", ()), ("score_all", (folder,))):
            found = [(hours, *_alone(work, hours, *extra)) for hours in sizes]
            slope = float(np.polyfit(sizes, [peak / 1e6 for _, _, peak in found], 1)[0])
            rows += [{"what": "memory", "variant": WORK[work], "hours": hours, "seconds": seconds, "peak MB": peak / 1e6,
                      "times real time": 3600 * hours / seconds, "MB an hour": slope} for hours, seconds, peak in found]
    return pd.DataFrame(rows)


WORK = {"read_crops": "training's reader (keeps up to 600 MB)", "fit_statistics": "scaling, typicality, threshold",
        "score_all": "scores of a manifest"}


def _sized(width: int) -> Settings:
    return load_settings("study", 0, {"network.teacher_width": width, "network.student_width": width})


def _scoring(width: int) -> Callable[[], object]:
    """One clip of 5 s: image, both networks, residuals."""
    detector, audio = _untrained(_sized(width)), np.random.default_rng(0).standard_normal(5 * RATE_HZ).astype(np.float32)
    return lambda: detector.clip_residuals(audio, np.ones(250, bool))


def _teaching(width: int) -> Callable[[], None]:
    """One step of training the teacher: perturbations and images of a batch, forward, backward, optimiser."""
    settings = _sized(width)
    network, training = settings.network, settings.training
    teacher = PerturbationTeacher(channel_count(settings.view.channels), network.teacher_width, network.levels, network.stem)
    initialise(teacher, 0, "teacher").train()
    optimiser, random = torch.optim.AdamW(teacher.parameters()), np.random.default_rng(0)
    crops = random.standard_normal((training.batch, round(training.window_s * RATE_HZ))).astype(np.float32)

    def step() -> None:
        loss = perturbation_loss(teacher, crops, settings, random)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()

    return step


SIZED = {"score of a clip of 5 s": _scoring, "training step of the teacher, 8 crops": _teaching}


def repeat(work: str, width: str) -> None:
    """A work of `SIZED` a few times over on one thread, for its peak memory."""
    torch.set_num_threads(1)
    make = SIZED[work](int(width))
    for _ in range(5):
        make()


def width() -> pd.DataFrame:
    """Time and peak memory against the width of teacher and student, one thread. The peak is that of a process of its own."""
    torch.set_num_threads(1)
    works = [(work, size) for work in SIZED for size in (8, 16, 24, 32, 64)]
    peaks = {each: _alone("repeat", *each)[1] for each in works}
    times = interleaved({(work, size): SIZED[work](size) for work, size in works}, rounds=7)
    return pd.DataFrame([{"what": "width", "threads": 1, "variant": work, "width": size, "ms each": 1000 * times[work, size],
                          "peak MB": peaks[work, size] / 1e6} for work, size in works])


PARTS: dict[str, Callable[[bool], pd.DataFrame]] = {
    "agreement": lambda quick: agreement(),
    "inference": lambda quick: inference(batches=(1, 8) if quick else (1, 8, 32)),
    "training": lambda quick: training_step(),
    "front-end": lambda quick: front_end(),
    "precision": precision,
    "command": command,
    "width": lambda quick: width(),
    "memory": memory,
}


def run(quick: bool = False, only: tuple[str, ...] = ()) -> Iterator[pd.DataFrame]:
    """The tables of the parts, one after the other; `quick` takes fewer sizes, `only` names the parts."""
    for name, part in PARTS.items():
        if not only or name in only:
            yield part(quick)


def draw_cost(table: pd.DataFrame, target: Path | str) -> None:
    """Draw how cost grows into `target` (.png or .svg): peak memory and time against hours of audio (part `memory`) and against
    the networks' width (part `width`). Raises ValueError where one of these parts is not in `table`."""
    import matplotlib.pyplot as plt
    import seaborn as sns
    from matplotlib.ticker import LogLocator, NullFormatter

    from lib.report.exhibits import style

    if lacking := sorted({"memory", "width"} - set(table.what)):
        raise ValueError(f"the figure shows the parts memory and width; {' and '.join(lacking)} did not run")
    style()
    figure, grid = plt.subplots(2, 2, figsize=(10, 7))
    for axes, what, column, label, taken, unit in (
            (grid[0], "memory", "hours", "hours of audio", "seconds", "time (s)"),
            (grid[1], "width", "width", "width of teacher and student (channels)", "ms each", "time (ms, one thread)")):
        rows = table[table.what == what]
        for axis, value, name in ((axes[0], "peak MB", "peak memory (MB)"), (axes[1], taken, unit)):
            sns.lineplot(rows, x=column, y=value, hue="variant", style="variant", markers=True, dashes=False, ax=axis,
                         legend=axis is axes[0])
            axis.set(xscale="log", xlabel=label, ylabel=name, xticks=sorted(rows[column].unique()))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.minorticks_off()
        axes[0].set_ylim(0, 1.6 * rows["peak MB"].max())
        axes[0].legend(title="", loc="upper left")
        axes[1].set_yscale("log")
        axes[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes[1].yaxis.set_major_formatter("{x:g}")
        axes[1].yaxis.set_minor_formatter(NullFormatter())
    figure.align_ylabels()
    with atomic(target) as temporary:
        figure.savefig(temporary)
    plt.close(figure)
