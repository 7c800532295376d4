"""Owns where things live: every folder of the project, and the ways of writing into one whole or not at all."""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import platform
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

PACKAGE = Path(__file__).resolve().parent
"""The folder of the library itself."""
PROJECT = PACKAGE.parent
ROOT = Path(os.environ.get("STUDY_ROOT") or PROJECT).absolute()
"""The project's folder; the environment variable STUDY_ROOT moves everything that is generated elsewhere."""

NOTEBOOKS = PROJECT / "notebooks"
TEXTS = PACKAGE / "data" / "texts"
TEMPLATES = PACKAGE / "report" / "templates"
SHIPPED = PACKAGE / "weights" / "detector"
DATA = ROOT / "data"
PACKAGES = DATA / "packages"
CLIPS = DATA / "clips"
WEIGHTS = DATA / "weights"
"""Weights of pretrained networks that the user brings."""
RUNS = ROOT / "runs"
REPORTS = ROOT / "reports"
REFERENCE = PROJECT / "reports" / "reference"


NODE = re.sub(r"[^A-Za-z0-9]", "", platform.node())[:24] or "host"
DAY_S = 86_400
Value = TypeVar("Value")


def temporary_prefix() -> str:
    """How the name of a temporary file or folder begins: with the machine and the process that writes it."""
    return f".tmp-{NODE}-{os.getpid()}-"


def clear_stale(*folders: Path | str) -> None:
    """Remove the temporary files and folders that killed processes left below `folders`."""
    for path in [path for folder in folders for path in Path(folder).rglob(".tmp-*")]:
        with suppress(OSError):
            if _abandoned(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _abandoned(path: Path) -> bool:
    """Whether the process that wrote there has ended; where nobody knows, whether it wrote a day ago or before."""
    node, process = [*path.name.split("-"), "", ""][1:3]
    if node == NODE and process.isdigit() and int(process) != os.getpid():
        try:
            os.kill(int(process), 0)
        except OSError as error:
            return isinstance(error, ProcessLookupError)
    return time.time() - path.stat().st_mtime > DAY_S


@functools.cache
def clear_stale_once() -> None:
    """`clear_stale` of everything that the study generates, at most once a process."""
    clear_stale(PACKAGES, CLIPS, RUNS, REPORTS)


@contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it replaces `path` only when the block ends without an error.

    The bytes are on disk before the rename: a killed process leaves the old file or the new one, never half of one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix is kept, because writers such as soundfile choose the format by it.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=temporary_prefix(), suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def kept(path: Path, make: Callable[[], Value], save: Callable[[Value, Path], object],
         load: Callable[[Path], Value]) -> Value:
    """What is made once and kept: `load(path)`, after `save(make(), path)` where nothing is there yet.

    `path` names everything that the value depends on; `save` writes whole or not at all.
    """
    if not path.exists():
        save(make(), path)
    return load(path)


def write_text(path: Path | str, text: str) -> None:
    """Write `text` (UTF-8) to `path` atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path | str, value: object) -> None:
    """Write `value` as indented JSON to `path` atomically. Non-finite numbers are an error (ValueError)."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False, default=str) + "\n")


def file_digest(path: Path | str) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_of(value: object, length: int = 12) -> str:
    """Short SHA-256 of a JSON-like value: the name of a cache entry."""
    text = json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


_INNER: list[float] = []
"""Seconds in clocks inside each open clock."""


@contextmanager
def clocked(kind: str) -> Iterator[None]:
    """Count the block's seconds as `kind` of work for the report's table of times: one JSON line in the file that the
    environment variable STUDY_TIMES names, without the seconds of clocks inside. Only a notebook's main thread is
    counted, not its workers."""
    file, began = os.environ.get("STUDY_TIMES"), time.perf_counter()
    worker = not multiprocessing.current_process().name.startswith(("MainProcess", "WarmKernel"))
    if not file or worker or threading.current_thread() is not threading.main_thread():
        yield
        return
    _INNER.append(0.0)
    try:
        yield
    finally:
        seconds = time.perf_counter() - began
        own = seconds - _INNER.pop()
        if _INNER:
            _INNER[-1] += seconds
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps({"kind": kind, "seconds": round(own, 3), "end": time.time()}) + "\n")


def shown(path: object) -> str:
    """A file name that can be printed and written: control characters and bytes that are not UTF-8 are spelled out."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


class UsageError(ValueError):
    """What a user asked for makes no sense; the message says what would."""


DETECTOR_FILES = {"detector.json", "detector.safetensors", "limits.json", "known.json"}


def require_outputs(outputs: Iterable[str], inputs: Iterable[Path | str], folders: bool = False) -> None:
    """Raise UsageError for an output that cannot be written, is read as well, or is named twice; names are those that
    the user gave. Outputs are files, or `folders` of detectors, of which the one that ships is never written."""
    outputs, inputs = list(outputs), list(inputs)
    for number, name in enumerate(outputs):
        path = Path(name)
        try:
            held = {each.name for each in path.iterdir()} if path.is_dir() else set()
            base = next(folder for folder in path.absolute().parents if folder.exists())
            rules = [  # the folder of a name with `..` may come to be later, and lead elsewhere then
                (".." in path.parts and not path.parent.exists(), "leads through a folder that is not there"),
                (SHIPPED in (path.resolve(), *path.resolve().parents), "belongs to the detector that ships"),
                (path.is_file() and path.name in DETECTOR_FILES, "belongs to a detector"),
                (any(map(functools.partial(_same, name), inputs)), "is read, and would be written"),
                (any(map(functools.partial(_same, name), outputs[:number])), "is named for two outputs"),
                ((path.is_dir() or name.endswith(os.sep)) and not folders, "is a folder, no file"),
                (path.exists() and not path.is_dir() and (folders or not path.is_file()), "is there already, and is no "
                 + ("folder" if folders else "regular file")),
                (bool(held - DETECTOR_FILES), "holds other files"),
                (path.exists() and not os.access(path, os.W_OK), "may not be written: Permission denied")]
            if reasons := [text for holds, text in rules if holds]:
                raise UsageError(f"{name} {reasons[0]}: name another output")
            with tempfile.TemporaryFile(dir=base):
                pass
        except OSError as error:
            raise UsageError(f"{name} cannot be written: {error.strerror}") from None


def _same(one: Path | str, other: Path | str) -> bool:
    if os.path.abspath(one) == os.path.abspath(other):
        return True
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


Input, Output, OutputFolder = (type(name, (str,), {}) for name in ("Input", "Output", "OutputFolder"))
"""Names of files and folders that a command reads, of files that it writes, of a folder that it makes."""


def whole(least: int) -> Callable[[str], int]:
    """A type of whole numbers from `least` on."""
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} on, not {text!r}")
        return int(text)
    return number


def tell(kind: str, pairs: list[tuple[str, str]]) -> None:
    """Say of each (name, text) on standard error that it is `kind`; of many, the first 20."""
    for name, text in pairs[:20]:
        print(f"{kind}: {shown(name)}: {text}", file=sys.stderr)
    if len(pairs) > 20:
        print(f"{kind}: {len(pairs) - 20} more", file=sys.stderr)
