"""Owns the training loop: random crops of bona fide speech, checkpoints that resume bit for bit, selection by bona fide
validation loss, and the two trainings of the study (perturbation teacher, matching student)."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from torch import nn
from torch.nn import functional

from lib import seeds
from lib.data.channel import ClipReader, channel_noise
from lib.engine import Engine, current
from lib.model.checkpoints import CheckpointError, sound, stored
from lib.model.discrepancy import matching_loss
from lib.model.images import FrontEnd
from lib.model.networks import PerturbationTeacher, new_student, new_teacher, resolved
from lib.model.perturbations import KINDS, Damage, perturbed
from lib.model.pyramid import Standardised, freeze, initialise, settle
from lib.paths import clear_stale, clocked, write_json
from lib.settings import RATE_HZ, SPEECH_MODELS, Settings

Draw = Callable[[int], tuple[np.ndarray, np.random.Generator]]
"""What a step is made from: its crops, and the random stream that goes on from there. It depends on the step alone."""
Loss = Callable[[nn.Module, np.ndarray, np.random.Generator], torch.Tensor]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """One cycle as a pure function of the step, so that a resumed run needs no scheduler state: a fifth of linear
    warm-up from a tenth of the peak, then a half cosine down to a hundredth."""
    rise = max(1, steps // 5)
    if step < rise:
        return peak * (0.1 + 0.9 * step / rise)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))))


class _Steps(torch.utils.data.Dataset):
    def __init__(self, draw: Draw, first: int, steps: int) -> None:
        self.draw, self.first, self.steps = draw, first, steps

    def __len__(self) -> int:
        return self.steps - self.first

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.random.Generator]:
        return self.draw(self.first + index)


def drawn(draw: Draw, first: int, steps: int, workers: int) -> Iterator[tuple[np.ndarray, np.random.Generator]]:
    """`draw(step)` of every step in order; with `workers`, made ahead by that many processes with a cache each."""
    data = _Steps(draw, first, steps)
    if not workers:
        return (data[index] for index in range(len(data)))
    # fork: the closures behind `draw` cannot be pickled, and workers touch neither the device nor torch's threads.
    return iter(torch.utils.data.DataLoader(data, batch_size=None, num_workers=workers, collate_fn=lambda item: item,
                                            multiprocessing_context="fork", prefetch_factor=4))


@clocked("training")
def fit(network: nn.Module, draw: Draw, loss: Loss, validation: Callable[[nn.Module], float], settings: Settings,
        steps: int, folder: Path, key: str, say: Callable[[str], None] = lambda _: None) -> pd.DataFrame:
    """Minimise `loss(network, *draw(step))` for `steps` steps, then leave the weights with the lowest
    `validation(network)` in `network`, frozen.

    Everything random in a step comes from its number, so a run killed at any step and started again equals one that was
    never interrupted, bit for bit on one device and thread count. Of several processes (lib.engine), each has the loss
    of its own rows, a mean over rows; all must see one file system, on which the first one writes. `folder` gets
    best-STEP.safetensors, last-STEP.safetensors and checkpoint.json, which is written last and names the other two:
    they count from then on. Returns the curve: step, loss, validation.
    Raises CheckpointError where the folder holds a checkpoint of another `key`, FloatingPointError on a NaN loss.
    """
    engine, folder = engine_of(settings), Path(folder)
    if engine.main:
        folder.mkdir(parents=True, exist_ok=True)
    # A second run of the same training waits, and finds it done.
    with FileLock(folder / ".lock") if engine.main else nullcontext():
        if engine.main:
            clear_stale(folder)
        saved = _saved(folder, key)
        if saved["step"] < steps:  # an optimiser for nothing would load torch's compiler: 2 s
            _advance(engine, copy.deepcopy(network), draw, loss, validation, settings, steps, folder, saved, say)
        engine.wait()
        saved = _saved(folder, key)
        network.load_state_dict(sound(folder, saved["files"]["best"]))
    freeze(network)
    return pd.DataFrame(saved["history"])


def _saved(folder: Path, key: str) -> dict[str, object]:
    """The sheet of the training in `folder`, or that of one that has not begun."""
    sheet = folder / "checkpoint.json"
    if not sheet.exists():
        return {"key": key, "step": 0, "best": math.inf, "history": [], "files": {}}
    saved = json.loads(sheet.read_text())
    if saved["key"] != key:
        raise CheckpointError(f"{folder} holds another training; remove it or choose another folder")
    return saved


def steps_done(folder: Path) -> int:
    """Steps of the training that `folder` holds; 0 where there is none."""
    sheet = Path(folder) / "checkpoint.json"
    return json.loads(sheet.read_text())["step"] if sheet.exists() else 0


def _advance(engine: Engine, network: nn.Module, draw: Draw, loss: Loss, validation: Callable[[nn.Module], float],
             settings: Settings, steps: int, folder: Path, saved: dict[str, object],
             say: Callable[[str], None]) -> None:
    """Train from what is `saved` to the last of `steps`."""
    training, shared = settings.training, engine.share(network)
    parameters = dict(network.named_parameters())
    kind, options = (torch.optim.SGD, {"momentum": 0.9}) if training.optimiser == "sgd" else (torch.optim.AdamW, {})
    optimiser = kind(parameters.values(), lr=training.learning_rate, weight_decay=training.weight_decay, **options)
    if saved["files"]:
        _restore(network, optimiser, sound(folder, saved["files"]["last"]), engine.device)
    first, began, since = saved["step"], time.time(), []
    ahead = drawn(draw, first, steps, settings.run.workers)
    for step in range(first, steps):
        network.train()
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, training.learning_rate)
        with torch.autocast(engine.device.type, torch.bfloat16, enabled=training.precision == "bf16"):
            value = loss(shared, *next(ahead))
        since.append(engine.mean(value))
        if not math.isfinite(since[-1]):
            raise FloatingPointError(f"the training loss is {since[-1]} at step {step}; lower training.learning_rate")
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        optimiser.step()
        if (step + 1) % training.check_every == 0 or step + 1 == steps:
            network.eval()
            with torch.no_grad():
                held_out = validation(network)
            saved["history"].append({"step": step + 1, "loss": float(np.mean(since)), "validation": held_out})
            if engine.main:
                keep(folder, saved, network, optimiser)
            left = (time.time() - began) / (step + 1 - first) * (steps - step - 1)
            say(f"step {step + 1}/{steps}  loss {np.mean(since):.4f}  validation {held_out:.4f}  {left:.0f} s left")
            since = []


def _restore(network: nn.Module, optimiser: torch.optim.Optimizer, state: dict[str, torch.Tensor],
             device: torch.device) -> None:
    network.load_state_dict({name[6:]: value for name, value in state.items() if name.startswith("model.")})
    slots: dict[str, dict[str, torch.Tensor]] = {}
    for _, slot, name in (text.split(".", 2) for text in state if text.startswith("optim.")):
        value = state[f"optim.{slot}.{name}"]
        # AdamW counts its steps in a number that belongs on the CPU.
        slots.setdefault(name, {})[slot] = value.to(device) if value.ndim else value
    for name, parameter in network.named_parameters():
        optimiser.state[parameter] = slots.get(name, {})


def keep(folder: Path, saved: dict[str, object], network: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Write the checkpoint of the last entry of the history in `saved`, and bring `saved` up to date."""
    stale, files = saved["files"], dict(saved["files"])
    saved["step"], held_out = saved["history"][-1]["step"], saved["history"][-1]["validation"]
    if held_out < saved["best"]:
        saved["best"] = held_out
        files["best"] = stored(folder / f"best-{saved['step']}.safetensors", network.state_dict())
    tensors = {f"model.{name}": value for name, value in network.state_dict().items()}
    for name, parameter in network.named_parameters():
        state = optimiser.state[parameter].items()
        tensors |= {f"optim.{slot}.{name}": value for slot, value in state if torch.is_tensor(value)}
    files["last"] = stored(folder / f"last-{saved['step']}.safetensors", tensors)
    saved["files"] = files
    write_json(folder / "checkpoint.json", saved)
    for kind, (name, _) in stale.items():
        if files[kind][0] != name:
            (folder / name).unlink(missing_ok=True)


def engine_of(settings: Settings) -> Engine:
    """The engine that trains what the settings name."""
    plain = resolved(settings).network.teacher in SPEECH_MODELS  # one-dimensional: nothing to gain from channels last
    return current(settings.run.device, "contiguous" if plain else "channels_last")


def _noisy(crops: np.ndarray, settings: Settings, random: np.random.Generator,
           rows: slice = slice(None)) -> torch.Tensor:
    """The `rows` of a batch of crops, each with the channel's noise."""
    return torch.from_numpy((crops + channel_noise(crops.shape, settings.channel, random))[rows])


def perturbation_loss(network: nn.Module, crops: np.ndarray, settings: Settings, random: np.random.Generator,
                      rows: slice = slice(None)) -> torch.Tensor:
    """Binary cross-entropy of naming, place by place and level by level, which perturbation was applied to `rows`."""
    kinds = tuple(kind for kind in KINDS if kind != settings.training.without)
    damaged, damage = perturbed(torch.from_numpy(crops), random, kinds)
    engine = engine_of(settings)
    total = torch.zeros((), device=engine.device)
    damage = Damage(engine.give(damage.boxes[rows]), engine.give(damage.kinds[rows]), damage.size)
    for logits in network(engine.give(_noisy(damaged.numpy(), settings, random, rows))):
        target = damage.on_grid(settings.channel.low_hz, settings.channel.high_hz, logits.shape[2:])
        weight = logits.new_tensor(2.0)  # a damaged place is the rarer one
        total = total + functional.binary_cross_entropy_with_logits(logits, target, pos_weight=weight)
    return total


def train_teacher(reader: ClipReader, held_out: ClipReader, settings: Settings, folder: Path, key: str,
                  say: Callable[[str], None] = lambda _: None) -> tuple[nn.Module, pd.DataFrame]:
    """The teacher of `settings.network.teacher`, frozen, and its training curve (empty where nothing is trained).

    random: seeded He-normal weights, batch norms settled on bona fide speech. perturbation: a pyramid trained to name
    local perturbations of bona fide speech. The others are pretrained (lib.model.networks).
    """
    training, seed, samples = settings.training, settings.seed, round(settings.training.window_s * RATE_HZ)
    random = seeds.stream(seed, "settle")
    speech = [_noisy(reader.crops(training.batch, samples, random), settings, random) for _ in range(8)]
    pyramid, readers, history = new_teacher(settings), [], pd.DataFrame()
    if settings.network.teacher == "random":
        settle(initialise(pyramid, seed, "teacher"), speech)
    elif settings.network.teacher == "perturbation":
        teacher = initialise(PerturbationTeacher(pyramid), seed, "teacher")
        rows = engine_of(settings).rows(training.batch)

        def draw(step: int) -> tuple[np.ndarray, np.random.Generator]:
            random = seeds.stream(seed, "teacher", step)
            return reader.crops(training.batch, samples, random, rows), random

        def loss(network: nn.Module, crops: np.ndarray, random: np.random.Generator) -> torch.Tensor:
            return perturbation_loss(network, crops, settings, random, rows)

        def validation(network: nn.Module) -> float:
            random = seeds.stream(0, "teacher validation")
            crops = (held_out.crops(16, samples, random) for _ in range(6))
            return float(np.mean([perturbation_loss(network, batch, settings, random).item() for batch in crops]))

        history = fit(teacher, draw, loss, validation, settings, training.teacher_steps, folder, key, say)
        readers = [reader.weight[:, :, 0, 0] for reader in teacher.readers]
    freeze(pyramid)
    return Standardised(pyramid, readers).measure(speech) if settings.network.standardise else pyramid, history


def train_student(teacher: nn.Module, reader: ClipReader, held_out: ClipReader, settings: Settings, folder: Path,
                  key: str, say: Callable[[str], None] = lambda _: None) -> tuple[nn.Module, pd.DataFrame]:
    """A student that imitates `teacher` on bona fide speech (Wang et al. 2021), frozen, and its curve."""
    training, seed, samples = settings.training, settings.seed, round(settings.training.window_s * RATE_HZ)
    student, engine = new_student(teacher, settings), engine_of(settings)
    front, placed, rows = FrontEnd(settings.view, settings.channel), copy.deepcopy(teacher), engine.rows(training.batch)
    engine.place(placed)

    def matched(network: nn.Module, crops: np.ndarray, random: np.random.Generator,
                rows: slice = slice(None)) -> torch.Tensor:
        floor = channel_noise(crops.shape, settings.channel, random)
        audio = engine.give(torch.from_numpy((crops + floor)[rows]))
        with torch.no_grad():
            picture = front(audio)
            features = placed(audio, picture)
        if training.denoise:  # told what to remove: it hears damage, and answers with what the teacher sees without
            damaged = perturbed(torch.from_numpy(crops), random)[0]
            audio = engine.give((damaged + torch.from_numpy(floor))[rows])
            picture = front(audio)
        return matching_loss(features, network(audio, picture))

    def draw(step: int) -> tuple[np.ndarray, np.random.Generator]:
        random = seeds.stream(seed, "student", step)
        return reader.crops(training.batch, samples, random, rows), random

    def loss(network: nn.Module, crops: np.ndarray, random: np.random.Generator) -> torch.Tensor:
        return matched(network, crops, random, rows)

    def validation(network: nn.Module) -> float:
        random = seeds.stream(0, "student validation")
        crops = (held_out.crops(16, samples, random) for _ in range(6))
        return float(np.mean([matched(network, batch, random).item() for batch in crops]))

    return student, fit(student, draw, loss, validation, settings, training.student_steps, folder, key, say)
