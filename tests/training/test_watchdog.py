"""A rank that hangs, freezes, dies or never comes is named, and the others end instead of waiting for it."""

import os
import re
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from ranks import HERE, ROOT

from medfast.training import LOST, checkpoint, watchdog
from medfast.training.distributed import World
from medfast.training.watchdog import PHASES, blamed

FAULTS = ("hung", "frozen", "killed", "error", "missing")


def line(step, phase, beats=9, waits=True, state="runs", error="", host="n1"):
    return {"state": state, "host": host, "place": [step, 0, PHASES.index(phase)], "beats": beats, "still_s": 65.0,
            "waits": waits, "error": error}  # fmt: skip


def test_the_rank_that_is_furthest_behind_is_blamed():
    before = {0: line(8, "reduce", 4), 1: line(8, "data", 4, waits=False, host="n2"), 2: line(8, "reduce", 4)}
    after = {rank: {**found, "beats": 6} for rank, found in before.items()}
    words = blamed(before, after, 3)
    assert words == "rank 1 on host n2 gets no further: last seen in step 8, phase data, micro-batch 0, for 65 s"


def test_a_rank_that_reports_no_more_is_blamed_before_one_that_is_behind():
    before = {0: line(7, "data", 4), 1: line(8, "reduce", 4, host="n2")}
    after = {0: line(7, "data", 6), 1: line(8, "reduce", 4, host="n2")}
    assert blamed(before, after, 2).startswith("rank 1 on host n2 is dead, frozen or cut off")


def test_an_error_on_another_rank_is_passed_on():
    lines = {0: line(8, "reduce"), 1: line(8, "data", state="ended", error="volume v7 is damaged")}
    assert "rank 1 on host n1 has ended with an error (volume v7 is damaged)" in blamed(lines, lines, 2)


def test_of_ranks_in_the_same_place_the_one_outside_of_a_collective_is_blamed():
    before = {rank: line(8, "forward", 4, waits=rank != 2) for rank in range(4)}
    after = {rank: line(8, "forward", 6, waits=rank != 2) for rank in range(4)}
    assert blamed(before, after, 4).startswith("rank 2 on host n1 gets no further")
    before, after = ({rank: line(8, "reduce", beats) for rank in range(2)} for beats in (4, 6))
    assert "is the network down?" in blamed(before, after, 2)


def test_ranks_that_never_reported_and_a_store_that_is_gone():
    assert blamed({0: line(0, "data")}, {0: line(0, "data", 11)}, 3) == "rank 1, 2 of 3 never reported"
    assert "cannot be reached" in blamed(None, {}, 2)


class Frozen:
    """The store of a process that was stopped: it takes what it is sent and never answers."""

    def set(self, key, value): ...

    def check(self, keys):
        threading.Event().wait()


def test_a_store_that_never_answers_does_not_hold_the_watchdog_up(monkeypatch):
    monkeypatch.setattr(watchdog, "_ANSWER_S", 0.1)
    monkeypatch.setattr(watchdog, "_store", Frozen)
    watch = watchdog.Watchdog(World(1, 2, torch.device("cpu")), 0.4)
    begin = time.monotonic()
    with watch:
        assert watch.blame().startswith("rank 0's machine cannot be reached")
    assert time.monotonic() - begin < 30


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """(folder, {(fault, rank): (exit code, stderr)}) of launches side by side, without a launcher, as srun has them."""
    folder = tmp_path_factory.mktemp("lost")
    path = os.pathsep.join(map(str, (ROOT / "kernels", ROOT, HERE)))
    command = [sys.executable, str(HERE / "lost_rank.py"), str(folder), *FAULTS]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, timeout=300, check=True)
    found = {}
    for code in folder.glob("*.code"):
        fault, rank = code.stem.split("_")
        found[fault, int(rank)] = int(code.read_text()), code.with_suffix(".stderr").read_text()
    return folder, found


NAMED = [("hung", "gets no further"), ("frozen", "is dead, frozen"), ("killed", "is dead, frozen")]


@pytest.mark.parametrize(("fault", "words"), NAMED)
def test_the_others_name_the_rank_and_end(ended, fault, words):
    folder, found = ended
    code, told = found[fault, 0]
    assert code == LOST, told
    assert f"rank 1 on host {socket.gethostname()} {words}" in told, told
    seen = re.search("last seen in (the start of the run|step [0-3], phase)", told)
    assert seen, "a rank that is gone is where it last reported from: ranks report now and then, not at every step"
    assert checkpoint.latest(folder / fault).name == "step_00000002"


def test_a_hung_rank_ends_itself(ended):
    code, told = ended[1]["hung", 1]
    assert code == LOST
    assert "step 3, phase data" in told or "rank 0" in told, "unless the other ended first and took the store with it"
    assert "lost_rank.py" in told, "the stack shows where it hangs"


def test_an_error_of_one_rank_reaches_the_others(ended):
    (code, told), (own, said) = (ended[1]["error", rank] for rank in (0, 1))
    assert own == 2 and "volume v7 is damaged" in said
    assert code == LOST and "rank 1" in told and "volume v7 is damaged" in told


def test_a_rank_that_does_not_come_is_named(ended):
    code, told = ended[1]["missing", 0]
    assert code == LOST and "rank 1 of 2 did not come within 6 s" in told and "rank 0 on host" in told
