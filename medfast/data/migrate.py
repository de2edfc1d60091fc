"""``medfast data migrate``: a store of an earlier version becomes one of this version, in place."""

from __future__ import annotations

import fcntl
import os
from dataclasses import replace
from pathlib import Path

from medfast.data.files import DataError, read_lines, seal, sync_folder, write_durably
from medfast.data.store import NEEDED, VERSION, read_header

__all__ = ["migrate"]


def migrate(path: str | Path) -> str:
    """Bring a store to the present version and say what was done. Volumes are not read; 'medfast data verify' does.

    Version 1 to 2: lines get their checks, STORE.json its layout. A run that was killed is repeated whole. Raises
    DataError where there is no store, it is damaged, or another run is writing to it.
    """
    path = Path(path)
    if not (path / "STORE.json").is_file():
        raise DataError(f"{path} is no store: it has no STORE.json")
    header = read_header(path)
    if header.version == VERSION:
        return f"{path} has version {VERSION} already"
    with (path / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another run is writing to {path}; wait for it, or end it") from None
        for file in (*path.glob("index*.jsonl"), *path.glob("private/*.jsonl")):
            needed = NEEDED if file.parent == path else ("path",)
            _replace(file, b"".join(seal(row) for row in read_lines(file, *needed, unsealed=True)))
        _replace(path / "STORE.json", replace(header, version=VERSION).content())
    return f"{path} had version {header.version}, has version {VERSION} now; 'medfast data verify' checks its volumes"


def _replace(file: Path, content: bytes) -> None:
    new = file.with_name(f".tmp.{file.name}")
    write_durably(new, content)
    os.replace(new, file)
    sync_folder(file.parent)
