"""A job never hangs: ranks tell where they are, and one that gets no further is named before the job ends.

Every rank writes a line about itself into the process group's key-value store now and then, from a thread of its own.
A rank that has made no progress for the limit reads the lines of all ranks twice. Who wrote nothing in between is gone
or frozen; else the one that is furthest behind holds the others up, in a collective that it did not come to; else the
one that waits for nobody does. Clocks of different machines are never compared.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from typing import Any

import torch.distributed as dist

from medfast.training.distributed import World
from medfast.training.rendezvous import LOST, RankLost

__all__ = ["PHASES", "Watchdog"]

PHASES = ("start", "data", "forward", "backward", "reduce", "update", "validation", "checkpoint", "end")
_BEAT_S = 2.0
_ANSWER_S = 5.0  # the store of a job's ranks answers sooner, or never
_COLLECTIVE = (os.path.join("torch", "distributed"), os.path.join("deepspeed", "comm"))  # where a waiting rank stands


class Watchdog:
    """limit: seconds without progress, 0 for a watchdog that never bites.

    What it says goes to stderr and not into the run folder, which holds no name of a host.
    """

    def __init__(self, here: World, limit: float):
        self.here, self.limit = here, limit
        self.place: tuple[int, int, int] = (-1, 0, 0)  # step, micro-batch, phase
        self._moved, self._beats, self._last = time.monotonic(), 0, ""
        self._main = threading.get_ident()
        self._pause = min(_BEAT_S, limit / 4) if limit else _BEAT_S
        self._store = _store() if here.size > 1 else None
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="medfast-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._over.set()
        self._thread.join()
        if error is not None and not isinstance(error, SystemExit):
            self._last = " ".join(str(error).split())[:300] or type(error).__name__
        self._beat("ended")

    def at(self, step: int, phase: str, micro: int = 0) -> None:
        """This rank has come so far: called by the run, many times a step."""
        self.place, self._moved = (step, micro, PHASES.index(phase)), time.monotonic()

    def lost(self, error: Exception) -> RankLost | None:
        """What an error of a collective means: some rank is not there any more. None for an error of another kind."""
        if self.here.size == 1 or not isinstance(error, RuntimeError) or not _of_a_collective(error):
            return None
        said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        return RankLost(
            f"{self.blame()}. The job ends; the same command goes on from the newest checkpoint. What this rank "
            f"noticed: {said}"
        )

    def blame(self) -> str:
        """A sentence about the rank that holds the others up; takes up to six seconds."""
        before = self._lines()
        if before is None:
            return blamed(None, None, self.here.size)
        for _ in range(3):  # others look for signs of this rank at the same time
            time.sleep(self._pause)
            self._beat()
        return blamed(before, self._lines(), self.here.size)

    def _watch(self) -> None:
        while not self._over.wait(self._pause):
            self._beat()
            if self.limit and time.monotonic() - self._moved > self.limit:
                self._bite()

    def _bite(self) -> None:
        words = f"{self.blame()}. No progress for {self.limit:.0f} s (train.watchdog_s), so the job ends; the same "
        if self._over.is_set() or time.monotonic() - self._moved <= self.limit:
            return  # it went on while we looked
        faulthandler.dump_traceback(sys.stderr)
        print(f"medfast: {words}command goes on from the newest checkpoint", file=sys.stderr, flush=True)
        os._exit(LOST)

    def _beat(self, state: str = "runs") -> None:
        """Write this rank's line."""
        if self._store is None:
            return
        self._beats += 1
        if not self._lock.acquire(timeout=_ANSWER_S):
            return  # somebody still waits for an answer of the store: blame says so
        try:
            self._store.set(f"medfast/rank/{self.here.rank}", json.dumps(self._line(state)))
        except RuntimeError:  # the store's machine is gone: blame says so
            pass
        finally:
            self._lock.release()

    def _line(self, state: str) -> dict[str, Any]:
        still = round(time.monotonic() - self._moved, 1)
        return {"state": state, "host": socket.gethostname(), "place": self.place, "beats": self._beats,
                "still_s": still, "waits": self._waits(), "error": self._last}  # fmt: skip

    def _waits(self) -> bool:
        """Whether the main thread stands in a collective."""
        frame = sys._current_frames().get(self._main)
        while frame is not None:
            if any(part in frame.f_code.co_filename for part in _COLLECTIVE):
                return True
            frame = frame.f_back
        return False

    def _lines(self) -> dict[int, dict[str, Any]] | None:
        """The line of every rank that has written one, None where the store is gone, or its process frozen: nothing
        ends the wait for such a one's answer, so another thread waits."""
        if self._store is None:
            return {0: self._line("runs")}
        found: list[dict[int, dict[str, Any]] | None] = []
        reader = threading.Thread(target=lambda: found.append(self._read()), name="medfast-reader", daemon=True)
        reader.start()
        reader.join(_ANSWER_S)
        return found[0] if found else None

    def _read(self) -> dict[int, dict[str, Any]] | None:
        store = self._store
        if store is None:
            return None
        with self._lock:
            try:
                keys = {rank: f"medfast/rank/{rank}" for rank in range(self.here.size)}
                return {rank: json.loads(store.get(key)) for rank, key in keys.items() if store.check([key])}
            except RuntimeError:
                return None


def _store() -> Any:
    """The process group's store, for a thread of its own."""
    store: Any = dist.distributed_c10d._get_default_store()
    return store.clone()


def _of_a_collective(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None:
        if any(part in trace.tb_frame.f_code.co_filename for part in _COLLECTIVE):
            return True
        trace = trace.tb_next
    return False


def blamed(before: dict[int, dict] | None, after: dict[int, dict] | None, ranks: int) -> str:
    """Who holds the others up, of two readings of all ranks' lines."""
    if before is None or after is None:
        return "rank 0's machine cannot be reached any more: the store of the job's ranks is gone or frozen"
    ended = [rank for rank, line in after.items() if line["state"] == "ended" and line["error"]]
    if ended:
        return _told("has ended with an error", ended, after)
    missing = [rank for rank in range(ranks) if rank not in after]
    if missing:
        return f"rank {', '.join(map(str, missing))} of {ranks} never reported"
    single = ranks == 1
    silent = [] if single else [r for r, line in after.items() if line["beats"] == before.get(r, {}).get("beats")]
    if silent:
        return _told("is dead, frozen or cut off, it does not even report any more", silent, after, still=False)
    behind = min(tuple(line["place"]) for line in after.values())
    last = [rank for rank, line in after.items() if tuple(line["place"]) == behind]
    if len(last) == ranks and not single:
        last = [rank for rank in last if not after[rank]["waits"]] or last
    if len(last) == ranks and not single:
        return _told("wait for each other; is the network down?", last, after)
    return _told("gets no further", last, after)


def _told(fault: str, ranks: list[int], lines: dict[int, dict], still: bool = True) -> str:
    """Each with its fault: "rank 3 on host n12 gets no further: last seen in step 41, phase data, for 65 s"."""
    parts = []
    for rank in ranks[:8]:
        line = lines[rank]
        step, micro, phase = line["place"]
        where = f"step {step}, phase {PHASES[phase]}, micro-batch {micro}" if step >= 0 else "the start of the run"
        why = f" ({line['error']})" if line["error"] else ""
        since = f", for {line['still_s']:.0f} s" if still else ""
        parts.append(f"rank {rank} on host {line['host']} {fault}{why}: last seen in {where}{since}")
    more = f"; and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return "; ".join(parts) + more
