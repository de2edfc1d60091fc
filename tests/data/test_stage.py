"""Staging: one copies, the others wait, and a crash leaves nothing that could be taken for whole."""

import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from stores import write_store

from medfast.data import stage as staging
from medfast.data.loader import open_stream
from medfast.data.stage import staged
from medfast.data.store import DataError, Store, verify


@pytest.fixture
def store(tmp_path):
    return Store(write_store(tmp_path / "store", [(16, 20, 18)] * 6))


def count_copies(monkeypatch, before=lambda: None):
    real, copies = staging._copy_one, []

    def counted(source, copy):
        before()
        copies.append(copy.name)
        real(source, copy)

    monkeypatch.setattr(staging, "_copy_one", counted)
    return copies


def test_ranks_that_come_at_once_share_one_copy(store, tmp_path, monkeypatch):
    copies, found = count_copies(monkeypatch, lambda: time.sleep(0.02)), []
    ranks = [threading.Thread(target=lambda: found.append(staged(store, tmp_path / "node"))) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert len(copies) == 6 and len({copy.path for copy in found}) == 1
    assert verify(found[0]) == 6 and found[0].records == store.records
    assert not any("unfinished" in item.name for item in (tmp_path / "node").iterdir())


def test_a_crashed_copy_is_no_store_and_is_finished_by_the_next(store, tmp_path, monkeypatch):
    real = staging._copy_one

    def dies(source, copy):
        if copy.name == "v03.npy":
            copy.write_bytes(source.read_bytes()[:-9] + bytes(9))  # torn, yet as long as it should be
            raise KeyboardInterrupt
        real(source, copy)

    monkeypatch.setattr(staging, "_copy_one", dies)
    with pytest.raises(KeyboardInterrupt):
        staged(store, tmp_path / "node")
    assert not list((tmp_path / "node").rglob("STORE.json"))
    monkeypatch.setattr(staging, "_copy_one", real)
    copies = count_copies(monkeypatch)
    assert verify(staged(store, tmp_path / "node")) == 6
    assert copies == ["v03.npy", "v04.npy", "v05.npy"]
    assert staged(store, tmp_path / "node") and len(copies) == 3


def test_the_lock_of_a_killed_process_is_free(store, tmp_path):
    (tmp_path / "node").mkdir()
    script = ("import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
              "print(1, flush=True); time.sleep(60)")  # fmt: skip
    name = staged(store, tmp_path / "other").path.name
    lock = tmp_path / "node" / f".{name}.lock"
    holder = subprocess.Popen([sys.executable, "-S", "-c", script, str(lock)], stdout=subprocess.PIPE)
    holder.stdout.readline()
    with pytest.raises(DataError, match="copied nothing.*data.patience"):
        staged(store, tmp_path / "node", patience=0.3)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert verify(staged(store, tmp_path / "node", patience=5)) == 6


def test_another_state_of_the_store_is_another_copy(store, tmp_path):
    first = staged(store, tmp_path / "node")
    write = write_store(tmp_path / "more", [(16, 20, 18)] * 7)
    assert staged(Store(write), tmp_path / "node").path != first.path


def test_too_little_space_is_said_before_the_first_byte(store, tmp_path, monkeypatch):
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    copies = count_copies(monkeypatch)
    with pytest.raises(DataError, match="0.0 GB free.*leave data.stage out"):
        staged(store, tmp_path / "node")
    assert not copies


def test_a_stream_reads_the_copy_and_says_how_to_mend_it(store, tmp_path):
    window = [-21000, 29000]
    section = {"store": str(store.path), "size": 16, "window": window, "workers": 0, "stage": str(tmp_path / "n")}
    stream = open_stream(section, seed=0, batch=4, views=1, split="train")
    assert stream.store.path.parent == tmp_path / "n"
    plain = open_stream({**section, "stage": None}, seed=0, batch=4, views=1, split="train")
    assert (stream.batch(0, range(4)).views[0] == plain.batch(0, range(4)).views[0]).all()
    again = open_stream(section, seed=0, batch=4, views=1, split="train")
    for file in stream.store.path.glob("volumes/*"):
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(DataError, match=f"(?s)It is a copy: delete {stream.store.path} .* from {store.path}"):
        again.batch(0, range(4))
