"""A copy of a store on this machine's own disk: made by one process, waited for by the others, whole or not there.

The copy's name is a hash of the store's header and index, so another state of the store is another copy. The process
that copies holds a lock, which the system takes away when it dies; the next one goes on with what is there.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from medfast.data.files import DataError, digest, sync_folder, write_durably
from medfast.data.store import KINDS, Store

__all__ = ["staged"]

_POLL = 0.2  # seconds
_CHUNK = 1 << 24


def staged(store: Store, where: Path, patience: float = 600.0) -> Store:
    """The store's copy under ``where``, complete: what is copied is hashed on the way and read back.

    patience: seconds for which the process that copies may make no progress before the others give up. Damaged volumes
    are copied as they are: the loader judges them. Raises DataError for too little space, a disk that returns something
    else than was written, and where another process no longer gets on.
    """
    name = hashlib.sha256((store.path / "STORE.json").read_bytes() + (store.path / "index.jsonl").read_bytes())
    target = where / f"medfast-{name.hexdigest()[:16]}"
    where.mkdir(parents=True, exist_ok=True)
    with _locked(where / f".{target.name}.lock", lambda: _bytes(_unfinished(target)), target, patience):
        if not (target / "STORE.json").is_file():
            _copy(store, _unfinished(target))
            os.replace(_unfinished(target), target)
            sync_folder(where)
    return Store(target, remedy=f"It is a copy: delete {target} to have it made again from {store.path}; if that is "
                                "damaged too, run 'medfast data verify' on it")  # fmt: skip


def _unfinished(target: Path) -> Path:
    return target.with_name(f".{target.name}.unfinished")


@contextmanager
def _locked(file: Path, progress: Callable[[], int], target: Path, patience: float) -> Iterator[None]:
    """Hold the lock, once nobody else does. DataError where who holds it makes no progress for too long."""
    with file.open("w") as stream:
        seen, since = -1, time.monotonic()
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                now, there = time.monotonic(), progress()
                if there != seen:
                    seen, since = there, now
                if now - since > patience:
                    raise DataError(
                        f"another process has copied nothing to {target} for {now - since:.0f} s (data.patience), and "
                        f"holds {file}: see whether it hangs, end it, and start again, which goes on with its copy"
                    ) from None
                time.sleep(_POLL)
        yield


def _files(store: Store) -> dict[Path, str | None]:
    """Files with arrays, by path in the store -> SHA-256 that the index has of it, None for shards."""
    found: dict[Path, str | None] = {}
    for index, record in enumerate(store.records):
        for kind in KINDS:
            if kind == "volumes" or "label" in record:
                about = record if kind == "volumes" else record["label"]
                file = store.place(index, kind).file.relative_to(store.path)
                found[file] = None if store.packed else about["hash"]
    return found


def _copy(store: Store, to: Path) -> None:
    """Copy what is not there yet; header and index come last."""
    files = {file: wanted for file, wanted in _files(store).items() if (store.path / file).is_file()}
    missing = {file: wanted for file, wanted in files.items() if not _same(store.path / file, to / file, wanted)}
    needed = sum((store.path / file).stat().st_size for file in missing)
    to.mkdir(exist_ok=True)
    if (free := shutil.disk_usage(to).free) < needed:
        raise DataError(f"{to.parent} has {free / 1e9:.1f} GB free, a copy of {store.path} needs {needed / 1e9:.1f} GB "
                        "more: free some, or leave data.stage out")  # fmt: skip
    for file in missing:
        (to / file).parent.mkdir(exist_ok=True)
        _copy_one(store.path / file, to / file)
    for folder in {file.parent for file in files}:
        sync_folder(to / folder)
    for name in ("index.jsonl", "STORE.json"):
        write_durably(to / name, (store.path / name).read_bytes())
    sync_folder(to)


def _same(source: Path, copy: Path, wanted: str | None) -> bool:
    """Whether an earlier, unfinished run has copied this file whole."""
    if not copy.is_file() or copy.stat().st_size != source.stat().st_size:
        return False
    return digest(copy) == (wanted or digest(source))


def _copy_one(source: Path, copy: Path) -> None:
    found = hashlib.sha256()
    with source.open("rb") as incoming, copy.open("wb") as outgoing:
        while part := incoming.read(_CHUNK):
            found.update(part)
            outgoing.write(part)
        outgoing.flush()
        os.fsync(outgoing.fileno())
    if digest(copy) != found.hexdigest():
        raise DataError(f"{copy} does not hold what was copied to it: check the disk")


def _bytes(folder: Path) -> int:
    """Bytes of the files in a folder, which may change meanwhile."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(place, name)).st_size
            except FileNotFoundError:
                continue
    return total
