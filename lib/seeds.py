"""Owns every random stream: one seed and a name give one stream, so that adding a stream moves no other."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


def stream(seed: int, *names: object) -> np.random.Generator:
    """A generator of its own for `seed` and `names`, independent of the order in which streams are asked for."""
    text = "/".join([str(seed), *map(str, names)])
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little"))


def integer(seed: int, *names: object) -> int:
    """A 31-bit seed for libraries that take an integer."""
    return int(stream(seed, *names).integers(2**31 - 1))


def pin(seed: int, threads: int = 2) -> None:
    """Seed torch, pin its threads (1 and 2 threads differ in the last bits) and ask for deterministic kernels."""
    import torch

    torch.manual_seed(integer(seed, "torch"))
    torch.set_num_threads(threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # As use_deterministic_algorithms(True, warn_only=True), which would load torch's compiler too: 2 s for a setting.
    torch.set_deterministic_debug_mode("warn")
    # Fresh tensors are filled before they are read in any case; filling them twice takes a tenth of a training.
    torch.utils.deterministic.fill_uninitialized_memory = False


@contextmanager
def threads(count: int) -> Iterator[None]:
    """`count` threads for torch inside the block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
