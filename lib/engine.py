"""Owns devices and processes: where networks and batches live, how several processes train as one, the one pool of
threads and the one pool of processes.

A process that `accelerate launch` started is one of several; any other is alone. All of them draw the same whole batch
from the same random stream, and each reads and computes its own rows of it; accelerate averages gradients, and batch
norms see all rows. So the number of processes changes rounding and speed, never the experiment.
"""

from __future__ import annotations

import datetime
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

if TYPE_CHECKING:
    from accelerate import Accelerator

PATIENCE = datetime.timedelta(days=2)
"""How long processes wait for one another: the first one prepares a whole corpus or fits a detector meanwhile."""
Item, Result = TypeVar("Item"), TypeVar("Result")


class EngineError(RuntimeError):
    """A device or a number of processes cannot be used; the message says what is there."""


class GatheredBatchNorm(nn.BatchNorm2d):
    """Batch norm over the rows of all processes on CPUs, which torch.nn.SyncBatchNorm refuses: every process normalises
    the whole batch and goes on with its own rows. Several processes are tested with it where there is no GPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        from torch import distributed
        from torch.distributed.nn.functional import all_gather

        first = distributed.get_rank() * len(x)
        return super().forward(torch.cat(all_gather(x)))[first : first + len(x)]

    @classmethod
    def convert(cls, network: nn.Module) -> nn.Module:
        """The network with its batch norms of this class, in place."""
        for name, child in network.named_children():
            if isinstance(child, nn.BatchNorm2d):
                gathered = cls(child.num_features, child.eps, child.momentum)
                gathered.load_state_dict(child.state_dict())
                setattr(network, name, gathered)
            else:
                cls.convert(child)
        return network


class Engine:
    """A device, the layout of images on it, and this process's place among those that `accelerator` joins."""

    def __init__(self, device: torch.device, layout: torch.memory_format = torch.channels_last,
                 accelerator: Accelerator | None = None) -> None:
        self.device, self.layout, self.accelerator = device, layout, accelerator
        self.rank = accelerator.process_index if accelerator else 0
        self.world = accelerator.num_processes if accelerator else 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def place(self, network: nn.Module) -> nn.Module:
        """The network on the device, in the device's layout; in place."""
        return network.to(self.device).to(memory_format=self.layout)

    def share(self, network: nn.Module) -> nn.Module:
        """The placed network for training: what comes out averages gradients over the processes in `backward`."""
        if not self.accelerator:
            return self.place(network)
        convert = GatheredBatchNorm.convert if self.device.type == "cpu" else nn.SyncBatchNorm.convert_sync_batchnorm
        return self.accelerator.prepare_model(self.place(convert(network)))

    def give(self, batch: torch.Tensor) -> torch.Tensor:
        """A CPU tensor on the device: through pinned memory and without waiting where that is a GPU."""
        if self.device.type == "cuda":
            batch = batch.pin_memory()
        return batch.to(self.device, non_blocking=True)

    def rows(self, batch: int) -> slice:
        """This process's rows of a batch. Raises EngineError where they cannot be dealt out evenly."""
        if batch % self.world:
            raise EngineError(f"training.batch is {batch}, which {self.world} processes cannot share evenly: choose a "
                              f"multiple of {self.world}, or another number of processes")
        each = batch // self.world
        return slice(self.rank * each, (self.rank + 1) * each)

    def mean(self, value: torch.Tensor) -> float:
        """The mean over the processes of a number, equal in all. NaN in one is NaN in all."""
        value = value.detach()
        return float((self.accelerator.gather(value) if self.accelerator else value).mean())

    def wait(self) -> None:
        """Until all processes are here."""
        if self.accelerator:
            self.accelerator.wait_for_everyone()

    def main_first(self) -> AbstractContextManager:
        """The block runs in the main process, then in all others, which find what it left."""
        return self.accelerator.main_process_first() if self.accelerator else nullcontext()


def device_named(name: str) -> torch.device:
    """The device that the option run.device names; auto is a GPU where there is one. Raises EngineError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise EngineError(f"run.device is {name!r}, which cannot be used here: {str(error).splitlines()[0]}; expected "
                          "auto, cpu, cuda, cuda:1 or mps") from None
    return device


@functools.cache
def current(device: str = "auto", layout: str = "channels_last") -> Engine:
    """The engine of this process for the option run.device, with images in a layout of torch's."""
    form = torch.contiguous_format if layout == "contiguous" else torch.channels_last
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Engine(device_named(device), form)
    try:
        from accelerate import Accelerator, InitProcessGroupKwargs
    except ImportError:
        raise EngineError("several processes need the extra `distributed`: pip install accelerate") from None
    joined = Accelerator(cpu=device == "cpu" or not torch.cuda.is_available(),
                         kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
    return Engine(joined.device, form, joined)


def side_by_side(work: Callable[[Item], Result], items: Iterable[Item], threads: int | None = None) -> Iterator[Result]:
    """`work` of every item in order: as many side by side as torch has threads (or `threads`), on one thread each,
    which is faster than one item on all threads and gives the same bits whatever their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads or before, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(work, items)
    finally:
        torch.set_num_threads(before)


@contextmanager
def processes(count: int, start: Callable[..., None] | None = None,
              arguments: tuple = ()) -> Iterator[ProcessPoolExecutor]:
    """A pool of `count` new processes that each call `start(*arguments)` first. They end with this process, and stop at
    once where the block does with an error; Ctrl-C is the caller's to handle."""
    context, others = multiprocessing.get_context("spawn"), set(multiprocessing.active_children())
    with ProcessPoolExecutor(count, context, _begin, (start, arguments)) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
            raise


def _begin(start: Callable[..., None] | None, arguments: tuple) -> None:
    def watch(parent: multiprocessing.process.BaseProcess) -> None:
        parent.join()  # one that was killed cannot say goodbye, and its workers would wait for work for ever
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if parent := multiprocessing.parent_process():
        threading.Thread(target=watch, args=(parent,), daemon=True).start()
    if start:
        start(*arguments)


def in_processes(work: Callable[[Item], Result], items: Iterable[Item], count: int,
                 start: Callable[..., None] | None = None, arguments: tuple = ()) -> Iterator[Result]:
    """`work` of every item in order in a pool of `processes`, each with one thread for torch."""
    with processes(count, _with_one_thread, (start, arguments)) as pool:
        yield from pool.map(work, items)


def _with_one_thread(start: Callable[..., None] | None, arguments: tuple) -> None:
    torch.set_num_threads(1)
    if start:
        start(*arguments)
