"""A folder of prepared volumes: what ``medfast data prepare`` writes and what the loader reads.

    store/STORE.json                  format, version, layout, recipe and its hash
          index.jsonl                 one line per volume, append-only; a torn last line is no line
          volumes/<id>.npy            int16 HU, (d, h, w); see ``nifti`` for the directions of the axes. Or <id>.b2nd
          labels/<id>.npy             classes on the same grid, where there were any
          shards/00000.shard          in place of both in a packed store (``pack``)
          private/sources.jsonl       which file each id came from
          private/quarantine.jsonl    which files were refused, and why

An index line holds: id; shape (d, h, w); hash (SHA-256 of the file's bytes); bytes (how many); voxels (SHA-256 of the
decoded source voxels); spacing in mm (d, h, w); affine, 4x4, (d, h, w, 1) to RAS millimetres; percentiles in HU; body,
the box [d0, h0, w0, d1, h1, w1) of the largest body; foreground, the share of voxels above -500 HU; source, shape,
spacing, orientation and angle as they were; notes; group and dataset, pseudonyms of both, where they were given; shard
and offset in a packed store; check, a hash of the line. Nothing outside ``private/`` names a source file, repeats text
of its header or holds a date.

Version 1 had no layout and no checks; it is read as it is, and written to by nobody (``migrate``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medfast.data import layouts
from medfast.data.files import AGAIN, DataError, append, as_object, digest, read_lines, sync_folder, write_durably
from medfast.data.layouts import Place, Voxels

__all__ = ["DataError", "Header", "Store", "append", "digest", "explain", "read_header", "read_lines", "recipe_hash",
           "sync_folder", "verify", "write_durably"]  # fmt: skip

FORMAT = "medfast store"
VERSION = 2
READS = (1, 2)
NEEDED = ("id", "shape", "hash", "bytes", "body")  # of an index line, to read its volume
KINDS = {"volumes": "volume", "labels": "label of volume"}
_DTYPES = {"volumes": ("int16",), "labels": ("uint8", "int16")}


@dataclass(frozen=True)
class Header:
    """What STORE.json says. layout: a name of ``layouts``. packed: arrays lie in shards."""

    recipe: dict[str, Any]
    layout: str = "npy"
    packed: bool = False
    version: int = VERSION

    def content(self) -> bytes:
        """STORE.json, with a check over all of it."""
        about = {"format": FORMAT, "version": self.version, "layout": self.layout, "packed": self.packed,
                 "recipe": self.recipe, "recipe_hash": recipe_hash(self.recipe)}  # fmt: skip
        check = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
        return json.dumps({**about, "check": check}, indent=1).encode() + b"\n"


class Store:
    """Read side of a store. Picklable, holds no open file.

    ``records``: the index, sorted by id. ``recipe``: the settings that every volume was made with. ``layout``,
    ``packed``: as in ``Header``. ``remedy``: what to do about a damaged file. Raises DataError where there is no store,
    its version is another, or an index line is broken; ModuleNotFoundError where its layout cannot be read here.
    """

    def __init__(self, path: str | Path, remedy: str | None = None):
        self.path = Path(path)
        if not (self.path / "STORE.json").is_file():
            raise DataError(f"{self.path} is no store: it has no STORE.json. 'medfast data prepare' makes one.")
        header = read_header(self.path)
        self.recipe, self.layout, self.packed = header.recipe, layouts.check(header.layout), header.packed
        self.remedy = remedy or (f"Pack {self.path} anew from the store it came from" if self.packed else
                                 f"Delete its file in {self.path} if it is there. {AGAIN}")  # fmt: skip
        if parts := sorted(self.path.glob("index.*-of-*.jsonl")):
            raise DataError(f"{self.path} is in parts ({parts[0].name}...): run 'medfast data prepare' once more on "
                            "the same input and store, without --part, which joins them")  # fmt: skip
        rows = read_lines(self.path / "index.jsonl", *NEEDED, unsealed=header.version == 1)
        self.records = sorted(rows, key=lambda record: record["id"])
        self._checked: set[int] = set()

    def __len__(self) -> int:
        return len(self.records)

    @property
    def channels(self) -> int:
        return self.recipe.get("channels") or 1

    @property
    def dimensions(self) -> int:
        """Spatial axes of an item: 3, or 2 for pictures."""
        return self.recipe.get("dimensions", 3)

    def place(self, index: int, kind: str = "volumes") -> Place:
        """Where the array of a volume lies, or its labels', which it must have."""
        record = self.records[index]
        about = record if kind == "volumes" else record["label"]
        if self.packed:
            return Place(self.path / "shards" / f"{about['shard']:05d}.shard", about["offset"], about["bytes"])
        return Place(self.path / kind / f"{record['id']}{layouts.SUFFIXES[self.layout]}", 0, about["bytes"])

    def file(self, index: int) -> Path:
        """The file that a volume lies in."""
        return self.place(index).file

    def volume(self, index: int) -> Voxels:
        """Read-only int16 voxels (d, h, w), (c, d, h, w) or (h, w), in the recipe's unit; slices are read on demand.

        The hash is checked on first touch; a mismatch is a DataError.
        """
        if problem := self.touched(index):
            raise DataError(f"{problem}. {self.remedy}.")
        return self.open(index)

    def open(self, index: int) -> Voxels:
        """As ``volume``, but nothing is checked. OSError or ValueError where the file is gone or cut."""
        return layouts.open_voxels(self.layout, self.place(index), self.records[index]["shape"])

    def label(self, index: int) -> Voxels | None:
        """Read-only classes, on the grid of the volume; None where the case had none. Their hash is checked."""
        if "label" not in self.records[index]:
            return None
        if problem := self.problem(index, "labels"):
            raise DataError(f"{problem}. {self.remedy}.")
        return layouts.open_voxels(self.layout, self.place(index, "labels"))

    def touched(self, index: int) -> str | None:
        """What is wrong with the volume's file, or None; its hash is taken only until it was right once."""
        if index in self._checked:
            return None
        problem = self.problem(index, "volumes")
        if problem is None:
            self._checked.add(index)
        return problem

    def problem(self, index: int, *kinds: str) -> str | None:
        """What is wrong with the files of a volume, or None. kinds: "volumes", "labels"; both where none is named."""
        for kind in kinds or KINDS:
            if kind == "volumes" or "label" in self.records[index]:
                try:
                    found = self._problem(index, kind)
                except (OSError, ValueError) as error:
                    found = f"{KINDS[kind]} {self.records[index]['id']} cannot be read: {error}"
                if found:
                    return found
        return None

    def _problem(self, index: int, kind: str) -> str | None:
        record, place = self.records[index], self.place(index, kind)
        about, what = (record if kind == "volumes" else record["label"]), f"{KINDS[kind]} {record['id']}"
        if not place.file.is_file():
            return f"{what} of the index is missing: there is no {place.file}"
        size = place.file.stat().st_size
        if self.packed and size < place.offset + place.bytes:
            return f"{what} lies beyond the end of {place.file}, which has {size} bytes"
        if not self.packed and size != place.bytes:
            return f"{what} has {size} bytes, its index line says {place.bytes}"
        if digest(place.file, place.offset, place.bytes) != about["hash"]:
            return f"{what} is not what was written: its SHA-256 differs from its index line"
        array = layouts.open_voxels(self.layout, place)
        shape = record["shape"] if kind == "volumes" else record["shape"][-(len(record["body"]) // 2) :]
        if np.dtype(array.dtype).name not in _DTYPES[kind] or list(array.shape) != shape:
            return f"{what} is {array.dtype} {list(array.shape)}, its index line says {_DTYPES[kind][0]} {shape}"
        return None


def verify(store: Store) -> int:
    """Hash every array again, and look for files of no index line. Returns how many volumes there are; raises DataError
    naming all that changed."""
    problems = [problem for index in range(len(store)) if (problem := store.problem(index))]
    places = {store.place(i, kind).file for i, record in enumerate(store.records)
              for kind in (KINDS if "label" in record else ("volumes",))}  # fmt: skip
    folders = ["shards"] if store.packed else list(KINDS)
    extra = sorted(file for folder in folders for file in (store.path / folder).glob("*") if file not in places)
    problems += [f"{file} is of no line of the index, which may have lost its last" for file in extra]
    problems += _between(store) if store.packed and not problems else []
    if problems:
        found = "\n  ".join(problems)
        raise DataError(f"{len(problems)} problems among {len(store)} volumes:\n  {found}\n{store.remedy}.")
    return len(store)


def _between(store: Store) -> list[str]:
    """What is wrong between the arrays of shards, where there are zeros and nothing else."""
    ends: dict[Path, list[tuple[int, int]]] = {}
    for index, record in enumerate(store.records):
        for kind in KINDS if "label" in record else ("volumes",):
            place = store.place(index, kind)
            ends.setdefault(place.file, []).append((place.offset, place.offset + place.bytes))
    problems = []
    for file, spans in sorted(ends.items()):
        spans.sort()
        begins, ends_ = [0, *(stop for _, stop in spans)], [*(start for start, _ in spans), file.stat().st_size]
        with file.open("rb") as stream:
            for start, stop in zip(begins, ends_, strict=True):
                stream.seek(start)
                if start != stop and (start == spans[-1][1] or any(stream.read(stop - start))):
                    problems.append(f"{file} holds something between its arrays, at byte {start}")
    return problems


def explain(store: Store, volume: str) -> dict[str, Any]:
    """What the store knows of one volume or of one file: its index line, whether its files are what was written, and
    from ``private/``, where that is there, its source or the reason of its refusal. For the eyes of who may see names.

    volume: an id, or the path of a source file. DataError where nothing knows it.
    """
    private = store.path / "private"
    sources, refused = (read_lines(private / f"{name}.jsonl", "path", unsealed=True)
                        for name in ("sources", "quarantine"))  # fmt: skip
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


def recipe_hash(recipe: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def read_header(path: Path) -> Header:
    """What a store's STORE.json says, which must be there; DataError where it is damaged or of a version not read."""
    described = path / "STORE.json"
    content = described.read_bytes()
    about = as_object(content, "format", "version")
    if about is not None and (about["format"] != FORMAT or about["version"] not in READS):
        raise DataError(f"{described} says {about['format']!r} version {about['version']!r}; this medfast reads "
                        f"{FORMAT!r} versions {' and '.join(map(str, READS))}. A newer one may read it.")  # fmt: skip
    header = None
    if about is not None and isinstance(about.get("recipe"), dict):
        known = {name: about[name] for name in ("layout", "packed") if name in about}
        header = Header(about["recipe"], **known, version=about["version"])
    if header is None or header.version > 1 and header.content() != content:
        raise DataError(f"{described} is damaged, so nobody knows how the volumes were made. "
                        f"Delete {path} and run 'medfast data prepare' again.")  # fmt: skip
    return header
