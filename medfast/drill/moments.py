"""When a fault strikes, and how: what is installed in the process of a run before the run begins.

``at_step`` and ``at_file`` give an exact moment; ``kill``, ``stall``, ... are what happens then. Nothing of the code
under test is replaced: moments come from hooks that PyTorch and Python offer. Two faults that no machine can be asked
for are put in by hand: a voxel that is infinite in memory (``inf_voxel``) and a wall clock that jumps (``clock``).
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from medfast.data.loader import Stream
from medfast.types import Batch, Objective

__all__ = ["STRUCK", "at_file", "at_step", "clock", "delay", "inf_voxel", "kill", "nan_gradient", "stall"]

STRUCK = "the drill's fault strikes now"  # printed by the process of the run, so that no fault is missed
Install = Callable[[], None]  # in the process of a run, before it begins
Act = Callable[..., object]  # at its moment; one at a step is given the objective
_EVENTS = ("open", "os.rename", "os.mkdir")  # of Python's audit; os.replace is a rename


def at_step(step: int, act: Act) -> Install:
    """Act in the thread of training, when the objective is called for the first time in this step."""

    def install() -> None:
        done = []

        def hook(module, arguments) -> None:
            if isinstance(module, Objective) and module.training and not done and int(arguments[0].key.step) == step:
                done.append(step)
                _say()
                act(module)

        register_module_forward_pre_hook(hook)

    return install


def at_file(pattern: str, act: Act, nth: int = 1, again: bool = False) -> Install:
    """Act in the thread that is about to open, rename or make a path with ``pattern`` in it, the ``nth`` time that one
    does so (again: and every time after)."""
    found, count = re.compile(pattern), 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        if event not in _EVENTS or not any(isinstance(x, str) and found.search(x) for x in map(_text, arguments[:2])):
            return
        count += 1
        if count == nth or again and count > nth:
            _say()
            act()

    return lambda: sys.addaudithook(hook)


def _say() -> None:
    os.write(1, f"{STRUCK}\n".encode())  # past all buffers, as the process may be about to die


def _text(argument: object) -> object:
    return os.fspath(argument) if isinstance(argument, os.PathLike) else argument


def kill(number: int) -> Act:
    """A signal to the process that comes to the moment."""
    return lambda *_: os.kill(os.getpid(), number)


def stall(*_: object) -> None:
    """The thread gets no further, as in a read from a server that has gone."""
    while True:
        time.sleep(3600)


def delay(seconds: float) -> Act:
    return lambda *_: time.sleep(seconds)


def clock(seconds: float) -> Act:
    """The wall clock of this process jumps. Setting the machine's would strike everybody on it."""

    def jump(*_: object) -> None:
        now, now_ns = time.time, time.time_ns
        time.time = lambda: now() + seconds
        time.time_ns = lambda: now_ns() + int(seconds * 1e9)

    return jump


def nan_gradient(objective: Objective) -> None:
    """The next gradient of one weight is NaN."""
    weight = next(p for p in objective.parameters() if p.requires_grad and p.ndim > 1)

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        handle.remove()
        return torch.full_like(gradient, float("nan"))

    handle = weight.register_hook(spoil)


def inf_voxel(step: int) -> Install:
    """One voxel of one view of this step's first micro-batch is infinite as it leaves the loader."""

    def install() -> None:
        original = Stream.run

        def run(self: Stream, schedule: Any) -> Iterator[Batch]:
            done = False
            for batch in original(self, schedule):
                if not done and int(batch.key.step) == step:
                    done, views = True, [x.clone() for x in batch.views]
                    _say()
                    views[0].view(-1)[views[0].numel() // 2] = float("inf")
                    batch = replace(batch, views=tuple(views))
                yield batch

        Stream.run = run

    return install
