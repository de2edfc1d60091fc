"""``medfast data pack``: a copy of a store in few large files, or in another layout. Resumable, hashed, read back.

    out/shards/00000.shard     arrays one behind the other, each on a page of its own
        index.jsonl            where each lies; lines are added when their shard is whole on the disk
        STORE.json             written last: before, the folder is no store
        .pack.json             while it is unfinished: what it is made of

Parallel file systems serve a few files of gigabytes better than 100,000 of megabytes. What was in ``private/`` is not
copied, so a packed store can be given away without it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medfast.data import layouts
from medfast.data.files import DataError, append, digest, naming, put, read_lines, seal, sync_folder, write_durably
from medfast.data.layouts import SUFFIXES
from medfast.data.progress import Progress
from medfast.data.store import KINDS, NEEDED, Header, Store

__all__ = ["pack"]

PAGE = 4096
Made = tuple[dict[str, Any], dict[str, bytes | memoryview]]  # index line without places, kind -> its array's bytes
_ZERO = bytes(PAGE)


def pack(
    path: str | Path, out: str | Path, *, layout: str | None = None, shard_gb: float = 2.0, plain: bool = False,
    progress: bool = True,
) -> Store:  # fmt: skip
    """Copy the store at ``path`` to a new folder ``out``; every array is checked against its hash on the way.

    layout: that of the copy, the store's own where None. shard_gb: size of a shard in gigabytes; an array is never cut.
    plain: a file a volume, as ``prepare`` writes them. A run that was killed goes on from its last whole shard. Raises
    ValueError for bad arguments and a folder that holds something else, DataError for damaged volumes.
    """
    source, out = Store(path), Path(out)
    layout = layouts.check(layout or source.layout)
    if not shard_gb > 0:
        raise ValueError(f"shard_gb is {shard_gb}; it is the size of a shard in gigabytes, above 0")
    header = Header(source.recipe, layout, packed=not plain)
    done = _begin(out, header, source)
    number = 1 + max((record["shard"] for record in done), default=-1) if header.packed else 0
    with Progress(len(source) - len(done), progress, "volumes") as shown:
        for group in _groups(source, len(done), int(shard_gb * 1e9) if header.packed else 1):
            made = (_encoded(source, index, layout) for index in group)
            for row in _shard(out, made, number) if header.packed else _plain(out, made, layout):
                append(out / "index.jsonl", row)
                shown.step()
            number += 1
    content = header.content()
    write_durably(out / ".STORE.json", content)
    os.replace(out / ".STORE.json", out / "STORE.json")
    (out / ".pack.json").unlink()
    sync_folder(out)
    return Store(out)


def _begin(out: Path, header: Header, source: Store) -> list[dict[str, Any]]:
    """Make the folder, or take it up where an earlier run left it: the index lines that are there."""
    told = json.dumps([header.content().decode(), [record["hash"] for record in source.records]]).encode()
    note = out / ".pack.json"
    if out.exists() and any(out.iterdir()) and not note.is_file():
        raise ValueError(f"{out} is not empty; give a new folder")
    if note.is_file() and note.read_bytes() != told:
        raise ValueError(f"{out} holds an unfinished copy of another store or layout; delete it, or give a new folder")
    folders = ["shards"] if header.packed else [kind for kind in KINDS if kind == "volumes" or _labels(source)]
    for folder in folders:
        (out / folder).mkdir(parents=True, exist_ok=True)
    write_durably(note, told)
    rows = read_lines(out / "index.jsonl", *NEEDED)
    if header.packed and rows:  # the last shard may lack lines: it is written again
        rows = [row for row in rows if row["shard"] < rows[-1]["shard"]]
        write_durably(out / "index.jsonl", b"".join(map(seal, rows)))
    return rows


def _labels(source: Store) -> bool:
    return any("label" in record for record in source.records)


def _arrays(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of an index line that say where an array lies, by kind."""
    return [record, *([record["label"]] if "label" in record else [])]


def _groups(source: Store, first: int, size: int) -> Iterator[list[int]]:
    """Indices of the volumes of a shard, from ``first`` on, by their bytes in the source."""
    group, total = [], 0
    for index in range(first, len(source)):
        count = sum(about["bytes"] for about in _arrays(source.records[index]))
        if group and total + count > size:
            yield group
            group, total = [], 0
        group.append(index)
        total += count
    if group:
        yield group


def _encoded(source: Store, index: int, layout: str) -> Made:
    """(index line without places, kind -> bytes of the array in the new layout). DataError for damaged arrays."""
    if problem := source.problem(index):
        raise DataError(f"{problem}. {source.remedy}.")
    record = source.records[index]
    made = {}
    for kind in KINDS:
        if kind == "volumes" or "label" in record:
            place = source.place(index, kind)
            if layout == source.layout:
                with place.file.open("rb") as stream:
                    stream.seek(place.offset)
                    made[kind] = stream.read(place.bytes)
            else:
                made[kind] = layouts.encode(layout, layouts.open_voxels(source.layout, place)[...])
    row = {name: value for name, value in record.items() if name not in ("shard", "offset")}
    if "label" in row:
        row["label"] = {name: value for name, value in row["label"].items() if name not in ("shard", "offset")}
    return row, made


def _shard(out: Path, made: Iterator[Made], number: int) -> list[dict[str, Any]]:
    """Write one shard and return the index lines of what is in it."""
    file, rows = out / "shards" / f"{number:05d}.shard", []
    with file.open("wb", buffering=0) as stream:
        for row, arrays in made:
            rows.append(row)
            for about, content in zip(_arrays(row), arrays.values(), strict=True):
                with naming(file, len(content)):
                    put(stream, _ZERO[: -stream.tell() % PAGE])
                    about |= {"shard": number, "offset": stream.tell(), **_hashed(content)}
                    put(stream, content)
        with naming(file, stream.tell()):
            os.fsync(stream.fileno())
    sync_folder(file.parent)
    for about in (about for row in rows for about in _arrays(row)):
        if digest(file, about["offset"], about["bytes"]) != about["hash"]:
            raise DataError(f"{file} does not hold what was written to it: check the disk")
    return rows


def _plain(out: Path, made: Iterator[Made], layout: str) -> list[dict[str, Any]]:
    rows = []
    for row, arrays in made:
        rows.append(row)
        for about, (kind, content) in zip(_arrays(row), arrays.items(), strict=True):
            about |= _hashed(content)
            write_durably(out / kind / f"{row['id']}{SUFFIXES[layout]}", content)
            sync_folder(out / kind)
    return rows


def _hashed(content: bytes | memoryview) -> dict[str, Any]:
    return {"hash": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
