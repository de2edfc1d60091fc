"""Files that outlive a crash and tell when they were changed: lines with a check, writes that are read back, hashes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["AGAIN", "DataError", "append", "as_object", "digest", "read_lines", "seal", "sealed", "sync_folder",
           "write_durably"]  # fmt: skip

AGAIN = "Run 'medfast data prepare' on the same input and store again: it makes what is missing anew"
_CHECK = b', "check": "'
_CHUNK = 1 << 22


class DataError(Exception):
    """The data cannot be trusted or there is none; the command line exits with 3."""


def digest(file: Path, offset: int = 0, count: int | None = None) -> str:
    """SHA-256 of ``count`` bytes of a file from ``offset`` on, or of all that follow."""
    found = hashlib.sha256()
    with file.open("rb") as stream:
        stream.seek(offset)
        left = os.fstat(stream.fileno()).st_size - offset if count is None else count
        while left > 0 and (part := stream.read(min(_CHUNK, left))):
            found.update(part)
            left -= len(part)
    return found.hexdigest()


def seal(row: Mapping[str, Any]) -> bytes:
    """A line of JSON whose last member is a hash of all text before it, so that no bit of it can change unseen."""
    text = json.dumps(row)[:-1].encode()
    return text + _CHECK + _hash(text) + b'"}\n'


def sealed(line: bytes) -> bool:
    """Whether a line, without its end, is as ``seal`` wrote it."""
    text, mark, tail = line.rpartition(_CHECK)
    return bool(mark) and tail == _hash(text) + b'"}'


def _hash(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest()[:16].encode()


def read_lines(file: Path, *needed: str, mend: bool = False, unsealed: bool = False) -> list[dict[str, Any]]:
    """The rows of a file of sealed lines; [] if there is none. A last line without its newline was never finished.

    A line that changed since it was written, or that lacks one of the keys ``needed``, is a DataError; with mend, it is
    left out. unsealed: take lines without a check too, as they were before version 2.
    """
    if not file.exists():
        return []
    *lines, _torn = file.read_bytes().split(b"\n")
    rows = [as_object(line, *needed) if unsealed and _CHECK not in line or sealed(line) else None for line in lines]
    broken = [number for number, line in enumerate(lines) if line and rows[number] is None]
    if broken and not mend:
        raise DataError(f"line {broken[0] + 1} of {file} is damaged. {AGAIN}.")
    return [{name: value for name, value in row.items() if name != "check"} for row in rows if row is not None]


def as_object(text: bytes, *needed: str) -> dict[str, Any] | None:
    """A JSON object that has these keys, or None."""
    try:
        found = json.loads(text)
    except ValueError:  # no JSON, or no UTF-8
        return None
    return found if isinstance(found, dict) and set(needed) <= set(found) else None


def append(file: Path, row: Mapping[str, Any]) -> None:
    """Add a sealed row for good: it is on the disk when this returns. A torn tail of a killed run is cut off first."""
    with file.open("a+b") as stream:
        end = stream.seek(0, os.SEEK_END)
        if end:
            stream.seek(end - 1)
            if stream.read(1) != b"\n":
                stream.seek(0)
                stream.truncate(stream.read().rfind(b"\n") + 1)
        stream.write(seal(row))
        stream.flush()
        os.fsync(stream.fileno())


def write_durably(file: Path, content: bytes | memoryview) -> str:
    """Write, force to the disk, read back. Returns the SHA-256; DataError where the disk returns something else."""
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    found = digest(file)
    if found != hashlib.sha256(content).hexdigest():
        raise DataError(f"{file} does not hold what was written to it: check the disk")
    return found


def sync_folder(folder: Path) -> None:
    """Make the names in a folder as durable as their contents."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
