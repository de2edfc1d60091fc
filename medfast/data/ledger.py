"""Write side of a store: one writer, who can be killed at any moment and leaves at worst files that the next removes.

A volume is written under ``.tmp``, forced to the disk and read back; then it gets its name; then its line is appended
to the index. What has no line does not exist.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medfast.data.image import Bad
from medfast.data.store import (
    FORMAT,
    NEEDED,
    VERSION,
    DataError,
    append,
    read_lines,
    read_recipe,
    recipe_hash,
    sync_folder,
    write_durably,
)

__all__ = ["Ledger", "Made", "volume_id"]

_PASSING = ("unreadable", "duplicate")  # verdicts that hold for one run, as they do not depend on the file alone


@dataclass(frozen=True)
class Made:
    """A good file. record, temporary: its index line and where its volume waits; None where the store has it."""

    id: str
    record: dict[str, Any] | None
    temporary: Path | None


def volume_id(source: str, recipe: dict[str, Any]) -> str:
    """Says nothing of a file's name. source: SHA-256 of the file's bytes."""
    return hashlib.sha256(f"{source} {recipe_hash(recipe)}".encode()).hexdigest()[:12]


class Ledger:
    """Opens (and makes) the store at ``path`` for writing; a context manager that holds its lock.

    Raises ValueError where the store has another recipe, DataError where the folder is something else or another run is
    writing to it. index: id -> line.
    """

    def __init__(self, path: Path, recipe: dict[str, Any]):
        self.path, self.recipe = path, recipe
        self.temporary, self.private = path / ".tmp", path / "private"
        self.index: dict[str, dict[str, Any]] = {}
        self._voxels: dict[str, str] = {}
        self._claimed: dict[str, Path] = {}
        self._sources: dict[str, dict[str, Any]] = {}
        self._refused: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Ledger:
        self._check_place()
        for folder in (self.path / "volumes", self.private):
            folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(self.temporary, ignore_errors=True)
            self.temporary.mkdir()
            self._check_recipe()
            self._tidy()
        except BlockingIOError:
            self._lock.close()
            raise DataError(f"another run is writing to {self.path}; wait for it, or end it") from None
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.temporary, ignore_errors=True)
        self._lock.close()

    def _check_place(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise DataError(f"{self.path} is a file; a store is a folder")
        known = {"STORE.json", "index.jsonl", "volumes", "private", ".tmp", ".lock"}
        if not self.path.exists() or (self.path / "STORE.json").exists():
            return
        if foreign := sorted(item.name for item in self.path.iterdir() if item.name not in known):
            raise DataError(f"{self.path} is no store and not empty (it holds {foreign[0]!r}); give a new folder")

    def _check_recipe(self) -> None:
        described = self.path / "STORE.json"
        if not described.exists():
            about = {"format": FORMAT, "version": VERSION, "recipe": self.recipe}
            about["recipe_hash"] = recipe_hash(self.recipe)
            self._replace(described, json.dumps(about, indent=1).encode() + b"\n")
            return
        old = read_recipe(self.path)
        different = [name for name in sorted({*old, *self.recipe}) if old.get(name) != self.recipe.get(name)]
        if different:
            name = different[0]
            raise ValueError(
                f"{self.path} was prepared with {name} {old.get(name)!r}, now {self.recipe.get(name)!r} is asked for; "
                "one store has one recipe. Give another folder, or the same settings."
            )

    def _tidy(self) -> None:
        """Forget damaged lines and those whose volume is gone or cut, remove volumes that have no line, and verdicts
        that may no longer hold: on changed files, and on copies, whose twin may be gone.
        """
        volumes = self.path / "volumes"
        sizes = {item.name: item.stat().st_size for item in volumes.iterdir()}
        for record in read_lines(self.path / "index.jsonl", *NEEDED, "voxels", mend=True):
            if sizes.get(f"{record['id']}.npy") == record["bytes"]:
                self.index[record["id"]] = record
                self._voxels[record["voxels"]] = record["id"]
        self._rewrite(self.path / "index.jsonl", list(self.index.values()))
        for name in sizes:
            if name.removesuffix(".npy") not in self.index:
                (volumes / name).unlink()
        stamped = ("path", "size", "changed")
        sources = read_lines(self.private / "sources.jsonl", *stamped, "id", mend=True)
        self._sources = {row["path"]: row for row in sources}
        rows = read_lines(self.private / "quarantine.jsonl", *stamped, "kind", "message", mend=True)
        self._refused = {row["path"]: row for row in rows if row["kind"] not in _PASSING and _unchanged(row)}
        self._rewrite(self.private / "quarantine.jsonl", list(self._refused.values()))

    def _rewrite(self, file: Path, rows: list[dict[str, Any]]) -> None:
        """Make a file hold these rows and nothing else."""
        content = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        if file.exists() and file.read_bytes() != content:
            self._replace(file, content)

    def _replace(self, file: Path, content: bytes) -> None:
        write_durably(self.temporary / file.name, content)
        os.replace(self.temporary / file.name, file)
        sync_folder(file.parent)

    def earlier(self, file: Path) -> Made | dict[str, Any] | None:
        """The verdict on a file that has not changed since, else None. Reads nothing of the file but size and time."""
        if row := self._refused.get(str(file)):
            return row
        row = self._sources.get(str(file))
        if row and row["id"] in self.index and _unchanged(row):
            return Made(row["id"], None, None)
        return None

    def commit(self, file: Path, result: Made | Bad | dict[str, Any]) -> str | dict[str, Any]:
        """Make a result part of the store. Returns the volume's id, or the row of the quarantine ledger."""
        if isinstance(result, dict):
            return result
        if isinstance(result, Bad):
            return self._refuse(file, result.kind, str(result))
        twin = self._claimed.get(result.id)
        if twin is not None:
            return self._refuse(file, "duplicate", f"the same image as {twin}", result.temporary)
        if result.record is not None and result.temporary is not None and result.id not in self.index:
            kept = self._voxels.get(result.record["voxels"])
            if kept in self._claimed:
                return self._refuse(file, "duplicate", f"the same voxels as {self._claimed[kept]}", result.temporary)
            if kept is not None:  # the file that it was made of is gone; this one stands for it
                result.temporary.unlink()
                return self._claim(file, kept)
            os.replace(result.temporary, self.path / "volumes" / f"{result.id}.npy")
            sync_folder(self.path / "volumes")
            append(self.path / "index.jsonl", result.record)
            self.index[result.id] = result.record
            self._voxels[result.record["voxels"]] = result.id
        return self._claim(file, result.id)

    def _claim(self, file: Path, volume: str) -> str:
        self._claimed[volume] = file
        row = {"path": str(file), "id": volume, **_stamp(file)}
        if self._sources.get(str(file)) != row:
            append(self.private / "sources.jsonl", row)
        return volume

    def _refuse(self, file: Path, kind: str, message: str, temporary: Path | None = None) -> dict[str, Any]:
        if temporary is not None:
            temporary.unlink()
        row = {"path": str(file), "kind": kind, "message": message, **_stamp(file)}
        append(self.private / "quarantine.jsonl", row)
        return row


def _stamp(file: Path) -> dict[str, int]:
    with contextlib.suppress(OSError):
        found = file.stat()
        return {"size": found.st_size, "changed": found.st_mtime_ns}
    return {"size": -1, "changed": -1}


def _unchanged(row: dict[str, Any]) -> bool:
    return _stamp(Path(row["path"])) == {"size": row["size"], "changed": row["changed"]}
