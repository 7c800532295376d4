"""Owns devices and processes: where networks and batches live, and how several processes train as one.

A process that `accelerate launch` started is one of several; any other is alone. All of them draw the same whole batch from
the same random stream, each reads and computes its own rows of it, and gradients, losses and batch-norm statistics are
averaged over all. So the number of processes changes rounding and speed, never the experiment.
"""

from __future__ import annotations

import datetime
import functools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

PATIENCE = datetime.timedelta(days=2)
"""How long processes wait for one another: the first one prepares a whole corpus or fits a detector meanwhile."""


Item, Result = TypeVar("Item"), TypeVar("Result")


class EngineError(RuntimeError):
    """A device or a number of processes cannot be used; the message says what is there."""


class _Sum(torch.autograd.Function):
    """The sum of a tensor over the processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(context, value: torch.Tensor) -> torch.Tensor:
        total = value.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(context, gradient: torch.Tensor) -> torch.Tensor:
        return _Sum.forward(context, gradient.contiguous())


class SharedBatchNorm(nn.BatchNorm2d):
    """Batch norm over the rows of all processes. torch's own SyncBatchNorm refuses CPU tensors, so it could not be tested
    without GPUs; this one is the same code on either."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        count = torch.distributed.get_world_size() * x.numel() // x.shape[1]
        wide = x.float()
        mean = _Sum.apply(wide.sum((0, 2, 3))) / count
        centred = wide - mean[:, None, None]
        variance = _Sum.apply((centred**2).sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean += share * (mean - self.running_mean)
            self.running_var += share * (variance * count / (count - 1) - self.running_var)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class Engine:
    """A device, the layout of images on it, and this process's place among `world` of them."""

    def __init__(self, device: torch.device, rank: int = 0, world: int = 1, channels_last: bool | None = None) -> None:
        self.device, self.rank, self.world = device, rank, world
        self.layout = torch.contiguous_format if channels_last is False else torch.channels_last

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def place(self, network: nn.Module) -> nn.Module:
        """The network on the device, in the device's layout; in place."""
        return network.to(self.device).to(memory_format=self.layout)

    def share(self, network: nn.Module) -> nn.Module:
        """As `place`; with several processes its batch norms see the rows of all of them."""
        if self.world > 1:
            for module in network.modules():
                if type(module) is nn.BatchNorm2d:
                    module.__class__ = SharedBatchNorm  # the same parameters and buffers, so optimisers and files stay valid
        return self.place(network)

    def release(self, network: nn.Module) -> nn.Module:
        """The network back on the CPU, contiguous and by itself, where detectors are fitted and saved; in place."""
        for module in network.modules():
            if type(module) is SharedBatchNorm:
                module.__class__ = nn.BatchNorm2d
        return network.to("cpu").to(memory_format=torch.contiguous_format)

    def give(self, batch: torch.Tensor) -> torch.Tensor:
        """A CPU tensor on the device: through pinned memory and without waiting where that is a GPU."""
        if self.device.type == "cuda":
            batch = batch.pin_memory()
        return batch.to(self.device, non_blocking=True)

    def rows(self, batch: int) -> slice:
        """This process's rows of a batch. Raises EngineError where they cannot be dealt out evenly."""
        if batch % self.world:
            raise EngineError(f"training.batch is {batch}, which {self.world} processes cannot share evenly: choose a multiple "
                              f"of {self.world}, or another number of processes")
        each = batch // self.world
        return slice(self.rank * each, (self.rank + 1) * each)

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the processes."""
        if self.world > 1:
            from accelerate.utils import reduce

            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            flat = reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
            for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
                gradient.copy_(part.view(gradient.shape))

    def mean(self, value: float) -> float:
        """The mean over the processes, equal in all; of one process, the value itself. NaN in one is NaN in all."""
        if self.world == 1:
            return value
        from accelerate.utils import reduce

        return float(reduce(torch.tensor(value, dtype=torch.float64 if self.device.type != "mps" else torch.float32,
                                         device=self.device), "mean"))

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            torch.distributed.barrier()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The block runs in the main process, then in all others, which find what it left."""
        if not self.main:
            self.wait()
        yield
        if self.main:
            self.wait()


def end_with_parent() -> None:
    """Let this worker process end when the process that started it does: one that was killed cannot say goodbye, and its
    workers would wait for work for ever."""

    def watch(parent: multiprocessing.process.BaseProcess) -> None:
        parent.join()
        os._exit(1)

    if parent := multiprocessing.parent_process():
        threading.Thread(target=watch, args=(parent,), daemon=True).start()


def side_by_side(work: Callable[[Item], Result], items: Iterable[Item], threads: int | None = None) -> Iterator[Result]:
    """`work` of every item in order: as many items side by side as torch has threads (or `threads`), on one thread each, which is
    faster than one item on all threads and gives the same bits whatever their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads or before, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(work, items)
    finally:
        torch.set_num_threads(before)


def device_named(name: str) -> torch.device:
    """The device that the option run.device names; auto is a GPU where there is one. Raises EngineError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise EngineError(f"run.device is {name!r}, which cannot be used here: {str(error).splitlines()[0]}; expected auto, cpu, "
                          "cuda, cuda:1 or mps") from None
    return device


@functools.cache
def current(device: str = "auto", layout: str = "auto") -> Engine:
    """The engine of this process for the options run.device and run.layout."""
    last = None if layout == "auto" else layout == "channels_last"
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Engine(device_named(device), channels_last=last)
    try:
        from accelerate import PartialState
    except ImportError:
        raise EngineError("several processes need the extra `distributed`: pip install accelerate") from None
    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=PATIENCE)
    return Engine(state.device, state.process_index, state.num_processes, last)
