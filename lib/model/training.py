"""Owns the training loop: random crops of bona fide speech, checkpoints that resume bit for bit, selection by bona fide
validation loss, and the two trainings of the study (perturbation teacher, matching student)."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional

from lib import seeds
from lib.data.channel import ClipReader, channel_noise
from lib.engine import Engine, current
from lib.model.checkpoints import CheckpointError, _sound, _stored
from lib.model.discrepancy import matching_loss
from lib.model.images import channel_count, image
from lib.model.networks import EfficientNetPyramid, PerturbationTeacher, new_student, token_teacher
from lib.model.perturbations import Damage, perturbed
from lib.model.pyramid import ResNetPyramid, Standardised, freeze, initialise, settle
from lib.paths import clear_stale, locked, write_json
from lib.settings import RATE_HZ, TOKEN_TEACHERS, Settings


def augmented(crops: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Bona fide crops through random recording chains: equaliser tilt of up to 6 dB an octave-decade, level, extra noise."""
    spectrum = np.fft.rfft(crops)
    octaves = np.log2(np.maximum(np.fft.rfftfreq(crops.shape[1], 1 / RATE_HZ), 60) / 1000)
    tilt = random.uniform(-2, 2, (len(crops), 1))
    shaped = np.fft.irfft(spectrum * 10 ** (tilt * octaves / 20), crops.shape[1])
    scale = np.sqrt((crops**2).mean(1, keepdims=True) / np.maximum((shaped**2).mean(1, keepdims=True), 1e-12))
    gain = 10 ** (random.uniform(-3, 3, (len(crops), 1)) / 20)
    noise = random.standard_normal(crops.shape) * np.sqrt((crops**2).mean(1, keepdims=True))
    return (shaped * scale * gain + noise * 10 ** (-random.uniform(25, 45, (len(crops), 1)) / 20)).astype(np.float32)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """One cycle as a pure function of the step, so that a resumed run needs no scheduler state: a fifth of linear
    warm-up from a tenth of the peak, then a half cosine down to a hundredth."""
    rise = max(1, steps // 5)
    if step < rise:
        return peak * (0.1 + 0.9 * step / rise)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))))


Draw = Callable[[int], tuple[np.ndarray, np.random.Generator]]
"""What a step is made from: its crops, and the random stream that goes on from there. It depends on the step alone."""


class _Steps(torch.utils.data.Dataset):
    def __init__(self, draw: Draw, first: int, steps: int) -> None:
        self.draw, self.first, self.steps = draw, first, steps

    def __len__(self) -> int:
        return self.steps - self.first

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.random.Generator]:
        return self.draw(self.first + index)


def drawn(draw: Draw, first: int, steps: int, workers: int) -> Iterator[tuple[np.ndarray, np.random.Generator]]:
    """`draw(step)` of every step in order; with `workers`, made ahead by that many processes (each with its own cache)."""
    data = _Steps(draw, first, steps)
    if not workers:
        return (data[index] for index in range(len(data)))
    # fork: the closures behind `draw` cannot be pickled, and workers touch neither the device nor torch's threads.
    return iter(torch.utils.data.DataLoader(data, batch_size=None, num_workers=workers, collate_fn=lambda item: item,
                                            multiprocessing_context="fork", prefetch_factor=4))


def fit(network: nn.Module, draw: Draw, loss: Callable[[np.ndarray, np.random.Generator], torch.Tensor],
        validation: Callable[[], float], settings: Settings, steps: int, folder: Path, key: str,
        say: Callable[[str], None] = lambda _: None) -> pd.DataFrame:
    """Minimise `loss(*draw(step))` for `steps` steps and leave the weights with the lowest `validation()` in `network`.

    Everything random in a step comes from its number, so a run killed at any step and started again equals one that was
    never interrupted, bit for bit on one device and thread count. Of several processes (lib.engine), each has the loss of its
    own rows, a mean over rows; all must see one file system, on which the first one writes. `folder` gets
    best-STEP.safetensors, last-STEP.safetensors and checkpoint.json, which is written last and names the other two: they
    count from then on. Returns the curve: step, loss, validation.
    Raises CheckpointError where the folder holds a checkpoint of another `key`, FloatingPointError on a NaN loss.
    """
    engine, folder = engine_of(settings), Path(folder)
    with ExitStack() as held:
        if engine.main:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(folder / ".lock"))  # a second run of the same training waits, and finds it done
            clear_stale(folder)
        return _fitted(engine, network, draw, loss, validation, settings, steps, folder, key, say)


def _fitted(engine: Engine, network: nn.Module, draw: Draw, loss: Callable, validation: Callable, settings: Settings, steps: int,
            folder: Path, key: str, say: Callable[[str], None]) -> pd.DataFrame:
    from safetensors.torch import load_file

    network, sheet = engine.share(network), folder / "checkpoint.json"
    saved = json.loads(sheet.read_text()) if sheet.exists() else {"key": key, "step": 0, "best": math.inf, "history": [], "files": {}}
    if saved["key"] != key:
        raise CheckpointError(f"{folder} holds another training; remove it or choose another folder")
    if saved["step"] < steps:  # an optimiser for nothing would load torch's compiler: 2 s
        _advance(engine, network, draw, loss, validation, settings, steps, folder, saved, say)
    engine.wait()
    saved = json.loads(sheet.read_text())
    engine.release(network).load_state_dict(load_file(_sound(folder, saved["files"]["best"])))
    freeze(network)
    return pd.DataFrame(saved["history"])


def _advance(engine: Engine, network: nn.Module, draw: Draw, loss: Callable, validation: Callable, settings: Settings, steps: int,
             folder: Path, saved: dict[str, object], say: Callable[[str], None]) -> None:
    """Train from what is `saved` to the last of `steps`."""
    from safetensors.torch import load_file

    training, parameters = settings.training, dict(network.named_parameters())
    if training.optimiser == "sgd":
        optimiser = torch.optim.SGD(parameters.values(), lr=0.4, momentum=0.9, weight_decay=training.weight_decay)
    else:
        optimiser = torch.optim.AdamW(parameters.values(), lr=training.learning_rate, weight_decay=training.weight_decay)
    peak = 0.4 if training.optimiser == "sgd" else training.learning_rate
    first, best, history, files = saved["step"], saved["best"], saved["history"], saved["files"]
    if files:
        state = load_file(_sound(folder, files["last"]))
        network.load_state_dict({name[6:]: value for name, value in state.items() if name.startswith("model.")})
        for name, parameter in parameters.items():
            slots = {text.split(".", 2)[1]: state[text] for text in state if text.startswith("optim.") and
                     text.split(".", 2)[2] == name}
            # AdamW counts its steps in a number that belongs on the CPU.
            optimiser.state[parameter] = {slot: value.to(engine.device) if value.ndim else value for slot, value in slots.items()}
    began, since = time.time(), []
    ahead = drawn(draw, first, steps, settings.run.workers)
    for step in range(first, steps):
        network.train()
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        with torch.autocast(engine.device.type, torch.bfloat16, enabled=training.precision == "bf16"):
            value = loss(*next(ahead))
        since.append(engine.mean(value.item()))
        if not math.isfinite(since[-1]):
            raise FloatingPointError(f"the training loss is {since[-1]} at step {step}; lower training.learning_rate")
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        engine.average(parameters.values())
        optimiser.step()
        if (step + 1) % training.check_every == 0 or step + 1 == steps:
            network.eval()
            with torch.no_grad():
                held_out = validation()
            history.append({"step": step + 1, "loss": float(np.mean(since)), "validation": held_out})
            since = []
            if engine.main:
                files, best = _kept(folder, saved["key"], network, optimiser, history, files, best)
            rate = (time.time() - began) / (step + 1 - first)
            say(f"step {step + 1}/{steps}  loss {history[-1]['loss']:.4f}  validation {held_out:.4f}  "
                f"{rate * (steps - step - 1):.0f} s left")


def steps_done(folder: Path) -> int:
    """Steps of the training that `folder` holds; 0 where there is none."""
    sheet = Path(folder) / "checkpoint.json"
    return json.loads(sheet.read_text())["step"] if sheet.exists() else 0


def engine_of(settings: Settings) -> Engine:
    layout = settings.run.layout
    if layout == "auto" and settings.network.teacher in ("imagenet", *TOKEN_TEACHERS):
        layout = "contiguous"  # depthwise and one-dimensional convolutions gain nothing
    return current(settings.run.device, layout)


def _kept(folder: Path, key: str, network: nn.Module, optimiser: torch.optim.Optimizer, history: list[dict[str, float]],
          files: dict[str, list[str]], best: float) -> tuple[dict[str, list[str]], float]:
    """Write the checkpoint of the last entry of `history`; the files that count now, and the lowest validation loss."""
    step, held_out, stale, files = history[-1]["step"], history[-1]["validation"], files, dict(files)
    if held_out < best:
        best = held_out
        files["best"] = _stored(folder / f"best-{step}.safetensors", network.state_dict())
    tensors = {f"model.{name}": value for name, value in network.state_dict().items()}
    for name, parameter in network.named_parameters():
        tensors |= {f"optim.{slot}.{name}": value for slot, value in optimiser.state[parameter].items() if torch.is_tensor(value)}
    files["last"] = _stored(folder / f"last-{step}.safetensors", tensors)
    write_json(folder / "checkpoint.json", {"key": key, "step": step, "best": best, "history": history, "files": files})
    for kind, (name, _) in stale.items():
        if files[kind][0] != name:
            (folder / name).unlink(missing_ok=True)
    return files, best


def _images(crops: np.ndarray, settings: Settings, random: np.random.Generator, rows: slice = slice(None),
            engine: Engine | None = None) -> torch.Tensor:
    """Images of the `rows` of a batch of crops, each with its noise; on the CPU, or where `engine` computes."""
    noisy = torch.from_numpy((crops + channel_noise(crops.shape, settings.channel, random))[rows])
    if engine is None:
        return image(noisy, settings.view, settings.channel)
    return image(engine.give(noisy), settings.view, settings.channel).contiguous(memory_format=engine.layout)


def perturbation_loss(network: nn.Module, crops: np.ndarray, settings: Settings, random: np.random.Generator,
                      rows: slice = slice(None)) -> torch.Tensor:
    """Binary cross-entropy of naming, place by place and level by level, which perturbation was applied to `rows`."""
    damaged, damage = perturbed(torch.from_numpy(crops), random)
    engine = engine_of(settings)
    total = torch.zeros((), device=engine.device)
    damage = Damage(engine.give(damage.boxes[rows]), engine.give(damage.kinds[rows]), damage.size)
    for logits in network(_images(damaged.numpy(), settings, random, rows, engine)):
        target = damage.on_grid(settings.channel.low_hz, settings.channel.high_hz, logits.shape[2:])
        total = total + functional.binary_cross_entropy_with_logits(logits, target, pos_weight=logits.new_tensor(2.0))
    return total


def train_teacher(reader: ClipReader, held_out: ClipReader, settings: Settings, folder: Path, key: str,
                  say: Callable[[str], None] = lambda _: None) -> tuple[nn.Module, pd.DataFrame]:
    """The teacher of `settings.network.teacher`, frozen, and its training curve (empty where nothing is trained).

    random: seeded He-normal weights, batch norms settled on bona fide speech. imagenet: EfficientNet-Lite0. whisper: the
    encoder of Whisper-tiny (lib.model.whisper). wav2vec2, hubert, wavlm: lib.model.speech_models. perturbation: a pyramid trained to name
    local perturbations of bona fide speech.
    """
    network, training, seed = settings.network, settings.training, settings.seed
    inputs, samples = channel_count(settings.view.channels), round(training.window_s * RATE_HZ)
    random = seeds.stream(seed, "settle")
    speech = [_images(reader.crops(training.batch, samples, random), settings, random) for _ in range(8)]

    def finished(pyramid: nn.Module, readers: list[torch.Tensor] = ()) -> nn.Module:
        return Standardised(freeze(pyramid), readers).measure(speech) if network.standardise else freeze(pyramid)

    if network.teacher == "imagenet":
        return finished(EfficientNetPyramid(pretrained=True, inputs=inputs)), pd.DataFrame()
    if network.teacher in TOKEN_TEACHERS:
        return finished(token_teacher(settings)), pd.DataFrame()
    if network.teacher == "random":
        teacher = initialise(ResNetPyramid(inputs, network.teacher_width, network.levels, stem=network.stem), seed, "teacher")
        return finished(settle(teacher, speech)), pd.DataFrame()
    teacher = initialise(PerturbationTeacher(inputs, network.teacher_width, network.levels, network.stem), seed, "teacher")

    rows = engine_of(settings).rows(training.batch)

    def draw(step: int) -> tuple[np.ndarray, np.random.Generator]:
        random = seeds.stream(seed, "teacher", step)
        return reader.crops(training.batch, samples, random, rows), random

    def loss(crops: np.ndarray, random: np.random.Generator) -> torch.Tensor:
        return perturbation_loss(teacher, crops, settings, random, rows)

    def validation() -> float:
        random = seeds.stream(0, "teacher validation")
        return float(np.mean([perturbation_loss(teacher, held_out.crops(16, samples, random), settings, random).item()
                              for _ in range(6)]))

    history = fit(teacher, draw, loss, validation, settings, training.teacher_steps, folder, key, say)
    return finished(teacher.pyramid, [reader.weight[:, :, 0, 0] for reader in teacher.readers]), history


def train_student(teacher: nn.Module, reader: ClipReader, held_out: ClipReader, settings: Settings, folder: Path, key: str,
                  say: Callable[[str], None] = lambda _: None) -> tuple[nn.Module, pd.DataFrame]:
    """A student that imitates `teacher` on bona fide speech (Wang et al. 2021), frozen, and its curve."""
    training, seed = settings.training, settings.seed
    student, samples = new_student(teacher, settings), round(training.window_s * RATE_HZ)
    engine = engine_of(settings)
    rows = engine.rows(training.batch)

    def batch_loss(crops: np.ndarray, random: np.random.Generator, rows: slice = slice(None)) -> torch.Tensor:
        images = _images(crops, settings, random, rows, engine)
        with torch.no_grad():
            wanted = teacher(images)
        return matching_loss(wanted, student(images))

    def draw(step: int) -> tuple[np.ndarray, np.random.Generator]:
        random = seeds.stream(seed, "student", step)
        return reader.crops(training.batch, samples, random, rows), random

    def loss(crops: np.ndarray, random: np.random.Generator) -> torch.Tensor:
        return batch_loss(augmented(crops, random) if training.augment else crops, random, rows)

    def validation() -> float:
        random = seeds.stream(0, "student validation")
        return float(np.mean([batch_loss(held_out.crops(16, samples, random), random).item() for _ in range(6)]))

    engine.place(teacher)
    try:
        return student, fit(student, draw, loss, validation, settings, training.student_steps, folder, key, say)
    finally:
        engine.release(teacher)
