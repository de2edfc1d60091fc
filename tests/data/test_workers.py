"""What goes wrong in workers reaches the one who waits: damage, with or without a budget, death, standstill."""

import multiprocessing
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
from stores import write_store

from medfast.data import loader
from medfast.data.executor_dali import Source
from medfast.data.loader import open_stream
from medfast.data.store import DataError, Store
from medfast.data.watch import STAGES, Watch, memory
from medfast.data.workers import Workers

SHAPES = [(30, 33, 40), (36, 30, 28), (40, 40, 28), (33, 34, 35), (50, 30, 30)]
SECTION = {"size": 24, "window": [-21000, 29000], "holdout": 0.2}


def opened(folder, workers=1, seed=11, **data):
    section = {"store": str(folder), "workers": workers, **SECTION, **data}
    return open_stream(section, seed=seed, batch=6, views=2, split="train")


def schedule(count=3):
    return [(step, range(6)) for step in range(count)]


def same(a, b):
    params = all(torch.equal(a.params[name], b.params[name]) for name in a.params)
    return params and torch.equal(a.boxes, b.boxes) and all(map(torch.equal, a.views, b.views))


def spoil(folder, *names):
    for name in names:
        file = folder / "volumes" / f"{name}.npy"
        file.write_bytes(file.read_bytes()[:-1] + b"?")


@pytest.fixture
def store(tmp_path):
    return write_store(tmp_path / "s", SHAPES)


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_volumes_are_left_out_counted_and_named_up_to_a_budget(store, workers):
    whole = opened(store)
    names = whole.volumes
    spoil(store, names[1], names[2])
    with pytest.raises(DataError, match=r"1 damaged volumes may be left out \(data.skip\)"):
        list(opened(store, workers, skip=1).run(schedule()))
    with pytest.raises(DataError, match=f"{names[1]}|{names[2]}"):
        list(opened(store, workers).run(schedule()))
    stream = opened(store, workers, skip=2)
    batches = list(stream.run(schedule()))
    assert sorted(stream.damaged) == sorted(names[1:3]) and "SHA-256" in stream.damaged[names[1]]
    for step, batch in enumerate(batches):
        drawn = whole.cutter.plan(step, torch.arange(6)).volume
        instead = np.where((drawn == 1) | (drawn == 2), 3, drawn)  # the next that is sound
        assert batch.params["volume"].tolist() == whole.cutter.members[instead].tolist()
    again = opened(store, 0, skip=2)  # from the middle, in another order: the same samples
    assert all(same(again.batch(step, range(6)), batches[step]) for step in (2, 0, 1))


def test_a_volume_that_fails_later_is_left_out_too(store):
    stream = opened(store, 0, skip=1)
    list(stream.run(schedule()))
    os.truncate(store / "volumes" / f"{stream.volumes[0]}.npy", 500)
    assert len(list(stream.run(schedule()))) == 3 and list(stream.damaged) == [stream.volumes[0]]
    assert "cannot be read any more" in stream.damaged[stream.volumes[0]]


def test_the_last_sound_volume_is_never_left_out(tmp_path):
    folder = write_store(tmp_path / "s", SHAPES[:1])
    spoil(folder, "v00")
    with pytest.raises(DataError, match="v00"):
        opened(folder, 0, skip=9).batch(0, range(6))


@pytest.mark.parametrize("entry", ["run", "batch"])
def test_a_stuck_read_is_reported_with_its_file_and_no_hang(store, entry, monkeypatch):
    release, real = threading.Event(), Store.touched
    stream = opened(store, patience=0.5)
    monkeypatch.setattr(Store, "touched", lambda self, index: (release.wait(60), real(self, index))[1])
    begin = time.monotonic()
    with pytest.raises(DataError, match=r"no batch came for .*\(data.patience\): worker \d+ has been reading .*v\d\d"
                                        r".npy for \d+ s and holds \d+ MB; \d+ MB of this machine's"):  # fmt: skip
        list(stream.run(schedule())) if entry == "run" else stream.batch(0, range(6))
    assert time.monotonic() - begin < 10
    release.set()
    stream.close()


def test_stages_are_timed(store):
    stream = opened(store, 2)
    list(stream.run(schedule()))
    spent = stream.seconds()
    assert list(spent) == list(STAGES) and all(0 < seconds < 60 for seconds in spent.values())


def test_watch_tells_of_the_dead_and_leaves_no_files():
    watch = Watch()
    folder = watch.folder
    with watch.reading(4):
        assert f"worker {os.getpid()} has been reading v4 for 0 s" in watch.stuck(lambda index: f"v{index}")
        died = watch.died(os.getpid(), -signal.SIGKILL, lambda index: f"v{index}")
    assert "was killed by SIGKILL while it read v4; it held" in died and "memory runs out" in died
    assert watch.died(1, 3, str) == "worker 1 ended with exit code 3."
    assert watch.stuck(str) == "no worker is reading a file" and "MB" in memory()
    del watch
    assert not folder.exists()


def test_threads_end_with_their_owner_and_errors_arrive():
    pool = Workers(2, "test-pool")
    with pytest.raises(ZeroDivisionError):
        pool.submit(lambda: 1 / 0).result()
    assert pool.submit(pow, 2, 5).result() == 32
    threads = pool._threads
    del pool
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive() and thread.daemon
    closed = Workers(1, "test-pool")
    closed.close()
    with pytest.raises(RuntimeError, match="closed"):
        closed.submit(int)


def test_dali_takes_boxes_from_processes_and_names_one_that_is_killed(store, capfd):
    pytest.importorskip("nvidia.dali")
    changes = {"cutout": True, "flip": True, "zoom": [0.8, 1.0], "skip": 2,
               "intensity": {"noise": {"p": 1.0}, "gain": {"p": 1.0}}}  # fmt: skip
    names = opened(store).volumes
    spoil(store, names[1], names[2])  # neighbours: what is drawn first stands two places before what comes
    ours = opened(store, 0, executor="dali", **changes)
    stream = opened(store, 2, executor="dali", patience=600.0, **changes)
    batches = stream.run(schedule(40))
    for step in range(4):
        assert same(next(batches), ours.batch(step, range(6))), "processes and threads give the same bits"
    assert stream.damaged == ours.damaged and sorted(ours.damaged) == names[1:3] and stream.seconds()["read"] > 0
    assert capfd.readouterr().err.count(f"volume {names[2]} is not what was written") == 2, "once from each stream"
    pids = [process.pid for process in stream._processes]
    assert len(set(pids)) == 2 and os.getpid() not in pids
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(DataError, match=rf"worker {pids[1]} was killed by SIGKILL.*memory runs out. Now \d+ MB of"):
        for _ in range(20):
            next(batches)
    stream.close()


def test_damage_that_a_process_of_dali_meets_is_the_same_error_and_leaves_no_process(store):
    pytest.importorskip("nvidia.dali")
    names = opened(store).volumes
    spoil(store, names[1], names[2])
    said = []
    for executor in ("torch", "dali"):
        stream = opened(store, 1, executor=executor, skip=1, patience=600.0)
        with pytest.raises(DataError, match=r"SHA-256 .*1 damaged volumes may be left out \(data.skip\)") as caught:
            list(stream.run(schedule(3)))
        said.append(str(caught.value))
        processes = stream._processes
        stream.close()  # while the error still holds on to the pipeline
        assert not any(process.is_alive() for process in processes)
    assert said[0] == said[1] and processes and not multiprocessing.active_children()


@pytest.mark.slow
def test_a_process_that_stands_still_is_reported(store):
    pytest.importorskip("nvidia.dali")
    stream = opened(store, 1, executor="dali", patience=600.0)
    batches = stream.run(schedule(40))
    next(batches)
    stream._patience = 0.6
    os.kill(stream._processes[0].pid, signal.SIGSTOP)
    with pytest.raises(DataError, match="no batch came for"):
        for _ in range(20):
            next(batches)
    stream.close()


class _KilledAtStart(Source):
    def __setstate__(self, state):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_of_dali_that_is_killed_while_it_starts_is_the_same_error(store, monkeypatch):
    pytest.importorskip("nvidia.dali")
    monkeypatch.setattr(loader, "Source", _KilledAtStart)
    stream = opened(store, 1, executor="dali", patience=600.0)
    with pytest.raises(DataError, match=r"ended before it was ready, of 1 \(data.workers\).* MB are available"):
        next(stream.run(schedule()))
    stream.close()
