"""Files that outlive a crash and tell when they were changed: lines with a check, writes that are read back, hashes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

__all__ = ["AGAIN", "DataError", "WriteFailed", "append", "as_object", "digest", "naming", "put", "read_lines", "seal",
           "sealed", "sync_folder", "write_durably"]  # fmt: skip

AGAIN = "Run 'medfast data prepare' on the same input and store again: it makes what is missing anew"
_CHECK = b', "check": "'
_CHUNK = 1 << 22


class DataError(Exception):
    """The data cannot be trusted or there is none; the command line exits with 3."""


class WriteFailed(OSError):
    """A file could not be written (disk full, read-only); the command line exits with 74."""


@contextmanager
def naming(file: Path, count: int) -> Iterator[None]:
    """What the system says of writing ``count`` bytes names no file; as a WriteFailed it does, and says how much room
    there is."""
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(file.parent).free if file.parent.is_dir() else 0
        raise WriteFailed(
            f"{file} could not be written: {error.strerror or error}; it takes {count / 1e6:.1f} MB, "
            f"{free / 1e6:.1f} MB are free there. What was written before is whole: make room or give write permission "
            "there, then the same command goes on"
        ) from error


def put(stream: FileIO, content: bytes | memoryview) -> None:
    """Write all of it. stream: opened without a buffer, whose errors would come again when it is closed."""
    left = memoryview(content).cast("B")
    while left:
        left = left[stream.write(left) :]


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
    """Add a sealed row for good: it is on the disk when this returns. A torn tail of a killed run is cut off first.

    WriteFailed where the disk does not take it; the file is then as it was.
    """
    line = seal(row)
    with naming(file, len(line)), file.open("a+b", buffering=0) as stream:
        end = stream.seek(0, os.SEEK_END)
        if end:
            stream.seek(end - 1)
            if stream.read(1) != b"\n":
                stream.seek(0)
                end = stream.truncate(stream.read().rfind(b"\n") + 1)
        try:
            put(stream, line)
            os.fsync(stream.fileno())
        except OSError:
            stream.truncate(end)
            raise


def write_durably(file: Path, content: bytes | memoryview) -> str:
    """Write, force to the disk, read back. Returns the SHA-256; DataError where the disk returns something else,
    WriteFailed where it does not take it, and then there is no half of the file."""
    with naming(file, len(content)), file.open("wb", buffering=0) as stream:
        try:
            put(stream, content)
            os.fsync(stream.fileno())
        except OSError:
            file.unlink()
            raise
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
