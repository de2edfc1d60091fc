"""Faults of one rank of two."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

from medfast.drill.faults_signals import saving
from medfast.drill.judge import Expected
from medfast.drill.moments import Install, at_file, at_step, kill, nan_gradient, stall
from medfast.drill.scene import Injection, Scene

__all__ = ["ranks"]

LOST = (69,)  # exit code: a rank is hung or missing


def ranks() -> list[Injection]:
    def lost(
        fault: str, at: str, rank: int, words: str, inject: Callable[[Scene], Install] | None, **more: Any
    ) -> Injection:
        return Injection(fault, f"{at}, rank {rank} of 2", Expected(LOST, words, "again"), inject=inject, rank=rank,
                         ranks=2, struck=True, settings=("train.watchdog_s={patience}",), **more)  # fmt: skip

    def send(number: int, step: int) -> Callable[[Scene], Install]:
        return lambda _: at_step(step, kill(number))

    def stuck(_: Scene) -> Install:
        return at_step(3, stall)

    dead, frozen = signal.SIGKILL, signal.SIGSTOP
    first, second = (f"{who} .*(dead|frozen|cut off|cannot be reached)" for who in ("rank 0('s machine)?", "rank 1"))
    meta = saving(4)["meta.json is written"]
    return [
        lost("killed rank", "step 3", 1, second, send(dead, 3), quick=True),
        lost("killed rank", "step 3", 0, first, send(dead, 3)),
        lost("killed rank", "step 5", 1, second, send(dead, 5), kept=2),
        lost("killed rank", "while saving, meta.json is written", 0, first, lambda _: at_file(meta, kill(dead)),
             kept=2),
        lost("hung rank", "SIGSTOP, step 3", 1, second, send(frozen, 3), hangs=True),
        lost("hung rank", "SIGSTOP, step 3", 0, first, send(frozen, 3), hangs=True),
        lost("hung rank", "no further in step 3", 1, "rank 1 .*gets no further", stuck, hangs=True),
        lost("hung rank", "no further in step 3", 0, "rank 0 .*gets no further", stuck, hangs=True),
        lost("missing rank", "never started", 1, "rank 1 of 2 did not come", None, absent=True, quick=True),
        lost("missing rank", "never started", 0, "rank 0 cannot be reached", None, absent=True),
        Injection("SIGTERM", "step 3, rank 1 of 2", Expected((75,), "stopped by a signal after . steps", "again"),
                  inject=send(signal.SIGTERM, 3), rank=1, ranks=2, kept=4),
        Injection("NaN gradient", "step 3, rank 1 of 2", Expected((0,), "step 3 is skipped", "skipped"),
                  inject=lambda _: at_step(3, nan_gradient), rank=1, ranks=2),
    ]  # fmt: skip
