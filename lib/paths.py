"""Owns where things live: every folder of the project, and the atomic ways of writing a file into one."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
"""The folder of the library itself."""
PROJECT = PACKAGE.parent
ROOT = Path(os.environ.get("STUDY_ROOT") or PROJECT)
"""The project's folder; the environment variable STUDY_ROOT moves everything that is generated elsewhere."""

NOTEBOOKS = PROJECT / "notebooks"
TEXTS = PACKAGE / "data" / "texts"
TEMPLATES = PACKAGE / "report" / "templates"
SHIPPED = PACKAGE / "weights" / "detector"
DATA = ROOT / "data"
PACKAGES = DATA / "packages"
CLIPS = DATA / "clips"
RUNS = ROOT / "runs"
REPORTS = ROOT / "reports"
REFERENCE = PROJECT / "reports" / "reference"


NODE = re.sub(r"[^A-Za-z0-9]", "", platform.node())[:24] or "host"
BEGAN = time.time()
DAY_S = 86_400


def temporary_prefix() -> str:
    """How the name of a temporary file or folder begins: it names machine and process, so that what a killed process left
    can be told from what a live one is writing."""
    return f".tmp-{NODE}-{os.getpid()}-"


def clear_stale(*folders: Path | str) -> int:
    """Remove the temporary files and folders that killed processes left below `folders`; returns how many.

    What a live process of this machine may be writing stays, and for a day what another machine may be.
    """
    count = 0
    for folder in folders:
        for place, inner, names in os.walk(folder):
            for name in [name for name in (*inner, *names) if name.startswith(".tmp-")]:
                path = Path(place) / name
                with suppress(OSError):
                    if _abandoned(name, path.stat().st_mtime):
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
                        count += 1
            inner[:] = [name for name in inner if not name.startswith(".tmp-")]
    return count


def _abandoned(name: str, written: float) -> bool:
    made = re.match(r"\.tmp-([A-Za-z0-9]+)-(\d+)-", name)
    if not made or made[1] != NODE or time.time() - written > DAY_S:
        return time.time() - written > DAY_S
    if int(made[2]) == os.getpid():
        return written < BEGAN - 1  # of an earlier process with this number, as in a restarted container
    try:
        os.kill(int(made[2]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


@functools.cache
def clear_stale_once() -> int:
    """`clear_stale` of everything that the study generates, at most once a process."""
    return clear_stale(PACKAGES, CLIPS, RUNS, REPORTS)


@contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it replaces `path` only when the block ends without an error.

    The bytes are flushed to disk before the rename, so that a killed process leaves the old file or the new one,
    never half of one.
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
        with suppress(OSError):  # some systems cannot open a folder
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(path: Path | str) -> Iterator[None]:
    """Hold the lock of the file `path`, made where it is missing: other processes that want it wait. It is free again when this
    process ends, however it does. Nothing is held where the system has no such locks."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    own = os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
    try:
        fcntl.flock(own, fcntl.LOCK_EX)
        yield
    finally:
        os.close(own)


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


def shown(path: object) -> str:
    """A file name that can be printed and written: control characters and bytes that are not UTF-8 are spelled out."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
