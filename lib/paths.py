"""Owns where things live: every folder of the project, and the atomic ways of writing a file into one."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(os.environ.get("STUDY_ROOT") or Path(__file__).resolve().parent.parent)
"""The project's folder; the environment variable STUDY_ROOT moves everything that is generated elsewhere."""

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
TEXTS = Path(__file__).resolve().parent / "texts"
DATA = ROOT / "data"
PACKAGES = DATA / "packages"
CLIPS = DATA / "clips"
RUNS = ROOT / "runs"
REPORTS = ROOT / "reports"
REFERENCE = Path(__file__).resolve().parent.parent / "reports" / "reference"


@contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it replaces `path` only when the block ends without an error.

    The bytes are flushed to disk before the rename, so that a killed process leaves the old file or the new one,
    never half of one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix is kept, because writers such as soundfile choose the format by it.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".tmp-", suffix=path.suffix)
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
