"""Signals: from the scheduler that wants the node back, and the one that nobody can answer."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable

from medfast.drill.judge import Expected
from medfast.drill.moments import Install, at_file, at_step, kill
from medfast.drill.scene import Injection, Scene

__all__ = ["killed", "preempted", "saving"]

PREEMPTED = (75,)
NAMED = r"/step_00000004$"  # the first that touches this name is the rename
POINTED = r"\.latest\.unfinished"  # three times for each checkpoint


def saving(step: int) -> dict[str, str]:
    """Moments while a checkpoint is written: name -> the path that is made or opened then."""
    folder = rf"step_{step:08d}\.unfinished"
    files = ("meta.json", "checksums.json", "COMPLETE")
    return {"its folder is made": f"{folder}$", **{f"{x} is written": f"{folder}/{re.escape(x)}" for x in files}}


def _send(number: int, step: int) -> Callable[[Scene], Install]:
    return lambda _: at_step(step, kill(number))


def _while_saving(number: int, pattern: str, nth: int = 1) -> Callable[[Scene], Install]:
    return lambda _: at_file(pattern, kill(number), nth)


def preempted() -> list[Injection]:
    def stops(fault: str, at: str, inject: Callable[[Scene], Install], kept: int, quick: bool = False) -> Injection:
        words = "stopped by a signal after . steps"
        return Injection(fault, at, Expected(PREEMPTED, words, "again"), inject=inject, kept=kept, quick=quick)

    def twice(*_: object) -> None:
        kill(signal.SIGTERM)()
        kill(signal.SIGUSR1)()

    term = signal.SIGTERM
    return [
        stops("SIGTERM", "step 0", _send(term, 0), 1),
        stops("SIGTERM", "step 3", _send(term, 3), 4, True),
        stops("SIGUSR1", "step 2", _send(signal.SIGUSR1, 2), 3),
        stops("SIGTERM", "and SIGUSR1 at once, step 3", lambda _: at_step(3, twice), 4),
        Injection("SIGTERM", "step 5, the last", Expected(), inject=_send(term, 5)),
        *(stops("SIGTERM while saving", name, _while_saving(term, pattern), 2, name == "meta.json is written")
          for name, pattern in saving(2).items()),
    ]  # fmt: skip


def killed() -> list[Injection]:
    def dies(at: str, inject: Callable[[Scene], Install], kept: int, quick: bool = False, **more) -> Injection:
        return Injection("kill -9", at, Expected((-9,), "", "again"), inject=inject, kept=kept, quick=quick, **more)

    number = signal.SIGKILL
    return [
        dies("step 0", _send(number, 0), 0),
        dies("step 3", _send(number, 3), 0),
        dies("step 5", _send(number, 5), 2),
        *(dies(f"while saving, {name}", _while_saving(number, pattern), 2, name == "COMPLETE is written")
          for name, pattern in saving(4).items()),
        dies("while saving, the checkpoint gets its name", _while_saving(number, NAMED), 2),
        dies("while saving, the pointer is moved to it", _while_saving(number, POINTED, 4), 4),
        dies("while saving, the one before it is deleted", _while_saving(number, r"\.step_00000002\.unfinished$", 5), 4,
             options=("train.keep_last=1",)),
    ]  # fmt: skip
