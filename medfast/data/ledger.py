"""Write side of a store: one writer, who can be killed at any moment and leaves at worst files that the next removes.

A volume is written under ``.tmp``, forced to the disk and read back; then it gets its name; then its line is appended
to the index. What has no line does not exist.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medfast.data.files import DataError, append, read_lines, seal, sync_folder, write_durably
from medfast.data.image import Bad
from medfast.data.inputs import Case
from medfast.data.layouts import SUFFIXES
from medfast.data.split import pseudonym
from medfast.data.store import NEEDED, VERSION, Header, read_header, recipe_hash

__all__ = ["Ledger", "Made", "volume_id"]

FOLDERS = ("volumes", "labels")
_PASSING = ("unreadable", "duplicate")  # verdicts that hold for one run, as they do not depend on the file alone


@dataclass(frozen=True)
class Made:
    """A good case. record, temporary: its index line, and folder of the store -> where its array waits; None where the
    store has it."""

    id: str
    record: dict[str, Any] | None
    temporary: dict[str, Path] | None


def volume_id(source: str, recipe: dict[str, Any]) -> str:
    """Says nothing of a file's name. source: SHA-256 of the file's bytes."""
    return hashlib.sha256(f"{source} {recipe_hash(recipe)}".encode()).hexdigest()[:12]


class Ledger:
    """Opens (and makes) the store at ``path`` for writing; a context manager that holds its lock.

    part: None, or "3/8" for one of eight runs that write at the same time, each its own index and private files; the
    next run without a part joins them. layout: a name of ``layouts``. Raises ValueError where the store has another
    recipe or layout, DataError where the folder is something else, or of an earlier version, or another run is writing
    to it. index: id -> line.
    """

    def __init__(self, path: Path, recipe: dict[str, Any], part: str | None = None, layout: str = "npy"):
        self.path, self.recipe, self.whole, self.layout = path, recipe, part is None, layout
        self._tail = "" if part is None else f".{part.replace('/', '-of-')}"
        self.temporary, self.private = path / f".tmp{self._tail}", path / "private"
        self._salting = threading.Lock()
        self.index: dict[str, dict[str, Any]] = {}
        self._voxels: dict[str, str] = {}
        self._claimed: dict[str, Path] = {}
        self._sources: dict[str, dict[str, Any]] = {}
        self._refused: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Ledger:
        self._check_place()
        for folder in (self.path / "volumes", self.private):
            folder.mkdir(parents=True, exist_ok=True)
        self._lock = contextlib.ExitStack()
        try:
            self._hold(".lock", fcntl.LOCK_EX if self.whole else fcntl.LOCK_SH)
            if not self.whole:
                self._hold(f".lock{self._tail}", fcntl.LOCK_EX)
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

    def _hold(self, name: str, how: int) -> None:
        stream = self._lock.enter_context((self.path / name).open("w"))
        fcntl.flock(stream, how | fcntl.LOCK_NB)

    def _check_place(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise DataError(f"{self.path} is a file; a store is a folder")
        known = ("STORE.json", "index.", "volumes", "labels", "private", ".tmp", ".lock")
        if not self.path.exists() or (self.path / "STORE.json").exists():
            return
        if foreign := sorted(item.name for item in self.path.iterdir() if not item.name.startswith(known)):
            raise DataError(f"{self.path} is no store and not empty (it holds {foreign[0]!r}); give a new folder")

    def _check_recipe(self) -> None:
        described = self.path / "STORE.json"
        if not described.exists():
            self._replace(described, Header(self.recipe, self.layout).content())
            return
        header = read_header(self.path)
        if header.version != VERSION:
            raise DataError(f"{self.path} has version {header.version}, this medfast writes version {VERSION}: run "
                            f"'medfast data migrate {self.path}' first, which reads no volume")  # fmt: skip
        if header.packed:
            raise DataError(f"{self.path} is packed, which nobody adds to: prepare into the store it was packed from, "
                            "and pack that again")  # fmt: skip
        if header.layout != self.layout:
            raise ValueError(f"{self.path} has the layout {header.layout}, now {self.layout} is asked for; one store "
                             "has one. 'medfast data pack' makes a copy in another layout")  # fmt: skip
        old = header.recipe
        different = [name for name in sorted({*old, *self.recipe}) if old.get(name) != self.recipe.get(name)]
        if different:
            name = different[0]
            raise ValueError(
                f"{self.path} was prepared with {name} {old.get(name)!r}, now {self.recipe.get(name)!r} is asked for; "
                "one store has one recipe. Give another folder, or the same settings."
            )

    def _tidy(self) -> None:
        """Forget damaged lines and those whose volume is gone or cut, and verdicts that may no longer hold: on changed
        files, and on copies, whose twin may be gone. A whole run joins the parts and removes volumes that have no line.
        """
        sizes = {folder: _sizes(self.path / folder) for folder in FOLDERS}
        for file in self._ours(self.path, "index"):
            for record in read_lines(file, *NEEDED, "voxels", mend=True):
                there = all(sizes[folder].get(self._name(record["id"])) == size for folder, size in _arrays(record))
                if there and self._voxels.setdefault(record["voxels"], record["id"]) == record["id"]:
                    self.index[record["id"]] = record
        self._rewrite(self._own("index"), list(self.index.values()))
        stamped = ("path", "size", "changed")
        sources = self._read("sources", *stamped, "id")
        self._sources = {row["path"]: row for row in sources}
        self._rewrite(self._own("sources"), list(self._sources.values()))
        rows = self._read("quarantine", *stamped, "kind", "message")
        self._refused = {row["path"]: row for row in rows if row["kind"] not in _PASSING and _unchanged(row)}
        self._rewrite(self._own("quarantine"), list(self._refused.values()))
        if self.whole:
            self._remove_rests(sizes)

    def _own(self, name: str) -> Path:
        return (self.path if name == "index" else self.private) / f"{name}{self._tail}.jsonl"

    def _ours(self, folder: Path, name: str) -> list[Path]:
        """The files of this name: a part's own, a whole run's own and then all parts'."""
        own = folder / f"{name}{self._tail}.jsonl"
        return [own] if not self.whole else [own, *sorted(set(folder.glob(f"{name}.*-of-*.jsonl")) - {own})]

    def _read(self, name: str, *needed: str) -> list[dict[str, Any]]:
        return [row for file in self._ours(self.private, name) for row in read_lines(file, *needed, mend=True)]

    def _remove_rests(self, sizes: dict[str, dict[str, int]]) -> None:
        for folder, names in sizes.items():
            for name in names:
                record = self.index.get(name.removesuffix(SUFFIXES[self.layout]))
                if record is None or folder not in dict(_arrays(record)):
                    (self.path / folder / name).unlink()
        for folder, name in ((self.path, "index"), (self.private, "sources"), (self.private, "quarantine")):
            for file in self._ours(folder, name)[1:]:
                file.unlink()
        for rest in self.path.glob(".tmp.*"):
            shutil.rmtree(rest, ignore_errors=True)

    def _name(self, volume: str) -> str:
        return f"{volume}{SUFFIXES[self.layout]}"

    def _rewrite(self, file: Path, rows: list[dict[str, Any]]) -> None:
        """Make a file hold these rows and nothing else."""
        content = b"".join(map(seal, rows))
        if content and not file.exists() or file.exists() and file.read_bytes() != content:
            self._replace(file, content)

    def _replace(self, file: Path, content: bytes) -> None:
        write_durably(self.temporary / file.name, content)
        os.replace(self.temporary / file.name, file)
        sync_folder(file.parent)

    def pseudonym(self, name: str) -> str:
        """Tells patients and datasets of this store apart and says nothing of who they are: the salt stays private."""
        with self._salting:
            file = self.private / "salt"
            if not file.exists():
                with contextlib.suppress(FileExistsError):
                    write_durably(self.temporary / "salt", secrets.token_hex(16).encode())
                    os.link(self.temporary / "salt", file)  # atomic: of parts that come at once, one wins
            return pseudonym(file.read_bytes(), name)

    def earlier(self, case: Case) -> Made | dict[str, Any] | None:
        """The verdict on a case that has not changed since, else None. Reads nothing of files but size and time."""
        path, stamp = str(case.path), _stamp(case.files + ((case.label,) if case.label else ()))
        row = self._refused.get(path)
        if row and row["size"] == stamp["size"] and row["changed"] == stamp["changed"]:
            return row
        row = self._sources.get(path)
        same = row and row["size"] == stamp["size"] and row["changed"] == stamp["changed"]
        return Made(row["id"], None, None) if row and same and row["id"] in self.index else None

    def commit(self, case: Case, result: Made | Bad | dict[str, Any]) -> str | dict[str, Any]:
        """Make a result part of the store. Returns the volume's id, or the row of the quarantine ledger."""
        if isinstance(result, dict):
            return result
        if isinstance(result, Bad):
            return self._refuse(case, result.kind, str(result))
        twin = self._claimed.get(result.id)
        if twin is not None:
            return self._refuse(case, "duplicate", f"the same image as {twin}", result.temporary)
        if result.record is not None and result.temporary is not None and result.id not in self.index:
            kept = self._voxels.get(result.record["voxels"])
            if kept in self._claimed:
                return self._refuse(case, "duplicate", f"the same voxels as {self._claimed[kept]}", result.temporary)
            if kept is not None:  # the file that it was made of is gone; this one stands for it
                _drop(result.temporary)
                return self._claim(case, kept)
            try:
                self._keep(result.record, result.temporary)
            except OSError:  # what has no line is not left behind either
                for folder in result.temporary:
                    with contextlib.suppress(OSError):
                        (self.path / folder / self._name(result.id)).unlink()
                raise
            self.index[result.id] = result.record
            self._voxels[result.record["voxels"]] = result.id
        return self._claim(case, result.id)

    def _keep(self, record: dict[str, Any], temporary: dict[str, Path]) -> None:
        """Arrays get their names, the volume's own last, then its line is written."""
        for folder, waiting in reversed(temporary.items()):
            (self.path / folder).mkdir(exist_ok=True)
            os.replace(waiting, self.path / folder / self._name(record["id"]))
            sync_folder(self.path / folder)
        append(self._own("index"), record)

    def _claim(self, case: Case, volume: str) -> str:
        self._claimed[volume] = case.path
        row = {"path": str(case.path), "id": volume, **_described(case)}
        if self._sources.get(str(case.path)) != row:
            append(self._own("sources"), row)
        return volume

    def _refuse(self, case: Case, kind: str, message: str, temporary: dict[str, Path] | None = None) -> dict[str, Any]:
        _drop(temporary or {})
        row = {"path": str(case.path), "kind": kind, "message": message, **_described(case)}
        append(self._own("quarantine"), row)
        return row


def _drop(temporary: dict[str, Path]) -> None:
    for file in temporary.values():
        file.unlink()


def _sizes(folder: Path) -> dict[str, int]:
    return {item.name: item.stat().st_size for item in folder.iterdir()} if folder.is_dir() else {}


def _arrays(record: dict[str, Any]) -> list[tuple[str, int]]:
    """(folder of the store, bytes) of what an index line stands for."""
    return [("volumes", record["bytes"])] + ([("labels", record["label"]["bytes"])] if "label" in record else [])


def _described(case: Case) -> dict[str, Any]:
    """Size and time of a case's files, and their names where they are several."""
    more = [str(file) for file in case.files[1:]] + ([str(case.label)] if case.label else [])
    return {**_stamp([case.path, *map(Path, more)]), **({"more": more} if more else {})}


def _stamp(files: Iterable[Path]) -> dict[str, int]:
    """All bytes and the latest change of some files; -1 where one is gone."""
    with contextlib.suppress(OSError):
        found = [file.stat() for file in files]
        return {"size": sum(one.st_size for one in found), "changed": max(one.st_mtime_ns for one in found)}
    return {"size": -1, "changed": -1}


def _unchanged(row: dict[str, Any]) -> bool:
    return _stamp([Path(row["path"]), *map(Path, row.get("more", []))]) == {k: row[k] for k in ("size", "changed")}
