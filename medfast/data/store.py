"""A folder of prepared volumes: what ``medfast data prepare`` writes and what the loader reads.

    store/STORE.json                  format, version, recipe and its hash
          index.jsonl                 one line per volume, append-only; a torn last line is no line
          volumes/<id>.npy            int16 HU, (d, h, w); see ``nifti`` for the directions of the axes
          private/sources.jsonl       which file each id came from
          private/quarantine.jsonl    which files were refused, and why

An index line holds: id; shape (d, h, w); hash (SHA-256 of the .npy file); bytes (its size); voxels (SHA-256 of the
decoded source voxels); spacing in mm (d, h, w); affine, 4x4, (d, h, w, 1) to RAS millimetres; percentiles in HU; body,
the box [d0, h0, w0, d1, h1, w1) of the largest body; foreground, the share of voxels above -500 HU; source, shape,
spacing, orientation and angle as they were; notes. Nothing outside ``private/`` names a source file, repeats text of
its header or holds a date.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["DataError", "Store", "append", "digest", "explain", "read_lines", "read_recipe", "recipe_hash",
           "sync_folder", "verify", "write_durably"]  # fmt: skip

FORMAT = "medfast store"
VERSION = 1
NEEDED = ("id", "shape", "hash", "bytes", "body")  # of an index line, to read its volume
AGAIN = "Run 'medfast data prepare' on the same input and store again: it makes what is missing anew"


class DataError(Exception):
    """The data cannot be trusted or there is none; the command line exits with 3."""


class Store:
    """Read side of a store. Picklable, holds no open file.

    ``records``: the index, sorted by id. ``recipe``: the settings that every volume was made with. Raises DataError
    where there is no store, its version is another, or an index line is broken.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not (self.path / "STORE.json").is_file():
            raise DataError(f"{self.path} is no store: it has no STORE.json. 'medfast data prepare' makes one.")
        self.recipe = read_recipe(self.path)
        if parts := sorted(self.path.glob("index.*-of-*.jsonl")):
            raise DataError(f"{self.path} is in parts ({parts[0].name}...): run 'medfast data prepare' once more on "
                            "the same input and store, without --part, which joins them")  # fmt: skip
        rows = read_lines(self.path / "index.jsonl", *NEEDED)
        self.records = sorted(rows, key=lambda record: record["id"])
        self._checked: set[int] = set()

    def __len__(self) -> int:
        return len(self.records)

    def file(self, index: int) -> Path:
        return self.path / "volumes" / f"{self.records[index]['id']}.npy"

    def volume(self, index: int) -> np.ndarray:
        """Read-only int16 memory map (d, h, w) in HU. Its hash is checked on first touch; a mismatch is a DataError."""
        if index not in self._checked:
            if problem := self.problem(index):
                raise DataError(f"{problem}. Delete {self.file(index)} if it is there. {AGAIN}.")
            self._checked.add(index)
        file = self.file(index)
        return np.load(file, mmap_mode="r", allow_pickle=False)

    def label(self, index: int) -> np.ndarray | None:
        """Read-only memory map (d, h, w) of classes, on the grid of the volume; None where the case had none."""
        if "label" not in self.records[index]:
            return None
        if problem := self.problem(index):
            raise DataError(f"{problem}. {AGAIN}.")
        file = self._label(index)
        return np.load(file, mmap_mode="r", allow_pickle=False)

    def _label(self, index: int) -> Path:
        return self.path / "labels" / f"{self.records[index]['id']}.npy"

    def problem(self, index: int) -> str | None:
        """What is wrong with the files of a volume, or None."""
        record, kinds = self.records[index], ("int16",)
        found = _problem("volume", self.file(index), record, record["shape"], kinds)
        if found is None and "label" in record:
            spatial = record["shape"][-len(record["body"]) // 2 :]
            return _problem("label of volume", self._label(index), {**record, **record["label"]}, spatial,
                            ("uint8", "int16"))  # fmt: skip
        return found


def _problem(what: str, file: Path, record: dict[str, Any], shape: list[int], kinds: tuple[str, ...]) -> str | None:
    what = f"{what} {record['id']}"
    if not file.is_file():
        return f"{what} of the index is missing from {file.parent}"
    if file.stat().st_size != record["bytes"]:
        return f"{what} has {file.stat().st_size} bytes, its index line says {record['bytes']}"
    if digest(file) != record["hash"]:
        return f"{what} is not what was written: its SHA-256 differs from its index line"
    array = np.load(file, mmap_mode="r", allow_pickle=False)
    if array.dtype.name not in kinds or list(array.shape) != shape:
        return f"{what} is {array.dtype} {array.shape}, its index line says {kinds[0]} {shape}"
    return None


def verify(store: Store) -> int:
    """Hash every volume again. Returns how many there are; raises DataError naming all that changed."""
    problems = [problem for index in range(len(store)) if (problem := store.problem(index))]
    if problems:
        found = "\n  ".join(problems)
        raise DataError(f"{len(problems)} of {len(store)} volumes are damaged:\n  {found}\n"
                        f"Delete their files, {store.path / 'volumes'}/<id>.npy. {AGAIN}.")  # fmt: skip
    return len(store)


def explain(store: Store, volume: str) -> dict[str, Any]:
    """What the store knows of one volume or of one file: its index line, whether its files are what was written, and
    from ``private/``, where that is there, its source or the reason of its refusal. For the eyes of who may see names.

    volume: an id, or the path of a source file. DataError where nothing knows it.
    """
    private = store.path / "private"
    sources, refused = (read_lines(private / f"{name}.jsonl", "path") for name in ("sources", "quarantine"))
    known = [row for row in sources if volume in (row["id"], row["path"])]
    ids = {volume, *(row["id"] for row in known)}
    found = [index for index, record in enumerate(store.records) if record["id"] in ids]
    verdicts = [row for row in refused if row["path"] == volume]
    if not found and not verdicts:
        raise DataError(
            f"nothing in {store.path} is known as {volume!r}; give an id of index.jsonl, or a source's path"
        )
    return {
        "volumes": [store.records[index] for index in found],
        "files": {store.records[index]["id"]: store.problem(index) or "as they were written" for index in found},
        "sources": known,
        "refused": verdicts,
        "recipe": store.recipe,
    }


def digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def recipe_hash(recipe: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe in a store's STORE.json, which must be there; DataError where it is damaged or of another version."""
    described = path / "STORE.json"
    about = _object(described.read_bytes(), "format", "version")
    if about is not None and (about["format"], about["version"]) != (FORMAT, VERSION):
        raise DataError(f"{described} says {about['format']!r} version {about['version']!r}; "
                        f"this medfast reads {FORMAT!r} version {VERSION}. Prepare the volumes again.")  # fmt: skip
    if about is None or not isinstance(about.get("recipe"), dict):
        raise DataError(f"{described} is damaged, so nobody knows how the volumes were made. "
                        f"Delete {path} and run 'medfast data prepare' again.")  # fmt: skip
    return about["recipe"]


def read_lines(file: Path, *needed: str, mend: bool = False) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; [] if there is none. A last line without its newline was never finished.

    A line that is no JSON object with all keys ``needed`` is a DataError; with mend, it is left out.
    """
    if not file.exists():
        return []
    *lines, _torn = file.read_bytes().split(b"\n")
    rows = [_object(line, *needed) for line in lines]
    broken = [number for number, line in enumerate(lines) if line and rows[number] is None]
    if broken and not mend:
        raise DataError(f"line {broken[0] + 1} of {file} is damaged. {AGAIN}.")
    return [row for row in rows if row is not None]


def _object(text: bytes, *needed: str) -> dict[str, Any] | None:
    """A JSON object that has these keys, or None."""
    try:
        found = json.loads(text)
    except ValueError:  # no JSON, or no UTF-8
        return None
    return found if isinstance(found, dict) and set(needed) <= set(found) else None


def append(file: Path, row: Mapping[str, Any]) -> None:
    """Add one row for good: it is on the disk when this returns. A torn tail of a killed run is cut off first."""
    with file.open("a+b") as stream:
        end = stream.seek(0, os.SEEK_END)
        if end:
            stream.seek(end - 1)
            if stream.read(1) != b"\n":
                stream.seek(0)
                stream.truncate(stream.read().rfind(b"\n") + 1)
        stream.write(json.dumps(row).encode() + b"\n")
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
