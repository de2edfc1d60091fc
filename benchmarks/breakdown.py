"""Where the time of one optimizer step goes, and what torch.compile and CUDA graphs change.

    python benchmarks/breakdown.py configs/smart.yaml --device cuda --precision bf16 --batch 8

Appends to results/breakdown.jsonl. Parts: copy of the views to the device, teacher, student, losses and the rest of the
forward pass, backward, update, teacher's average. Modes: eager, compiled, graph (the whole step but the copy captured
once as a CUDA graph and replayed). What a mode cannot do is said and makes no row. Beside each row is what
`medfast plan` says of its memory.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rows import append, environment
from step import arguments, check
from torch import nn

from medfast import config as configuration
from medfast.planning.example import example
from medfast.planning.trace import trace
from medfast.types import Batch, Objective

MODES = ("eager", "compiled", "graph")
PARTS = ("copy", "teacher", "student", "losses", "backward", "update", "average")


class Clock:
    """Milliseconds of each part, by the device's own clock; marks made inside of a part belong to it no more."""

    def __init__(self, device: str):
        self.device, self.marks = device, []  # (part that begins here, time or event)

    def mark(self, part: str) -> None:
        if self.device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((part, event))
        else:
            self.marks.append((part, time.perf_counter()))

    def read(self) -> dict[str, float]:
        if self.device == "cuda":
            torch.cuda.synchronize()
        found: dict[str, float] = defaultdict(float)
        for (part, begin), (_, end) in zip(self.marks, self.marks[1:], strict=False):
            found[part] += begin.elapsed_time(end) if self.device == "cuda" else 1e3 * (end - begin)
        self.marks = []
        return {part: found[part] for part in PARTS}


class Step:
    """One optimizer step in parts."""

    def __init__(self, objective: Objective, host: Batch, device: str, precision: str):
        self.objective, self.host, self.device, self.precision = objective, host, device, precision
        self.parameters = dict(objective.named_parameters())
        cuda = device == "cuda"
        lr = torch.tensor(1e-4, device=device) if cuda else 1e-4
        self.optimizer = torch.optim.AdamW(objective.parameters(), lr=lr, capturable=cuda, foreach=True)
        self.t = torch.tensor(0.1, device=device, dtype=torch.float64)
        self.clock = Clock(device)

    def copy(self) -> Batch:
        moved = self.host.to(torch.device(self.device))
        key = moved.key._replace(step=torch.zeros((), dtype=torch.int64, device=self.device))
        return Batch(moved.views, None, key, params=moved.params, targets=moved.targets)

    def compute(self, batch: Batch) -> None:
        self.clock.mark("losses")
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16"):
            output = self.objective(batch, self.t)
        self.clock.mark("backward")
        torch.stack(list(output.losses.values())).sum().backward()
        self.clock.mark("update")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.absorb(output.sums)
        self.clock.mark("average")
        if self.objective.teacher is not None:
            state = {**self.parameters, **dict(self.objective.named_buffers())}
            self.objective.teacher.update(state, 0.996)

    def __call__(self) -> dict[str, float]:
        self.clock.mark("copy")
        self.compute(self.copy())
        self.clock.mark("end")
        return self.clock.read()


@contextmanager
def watched(objective: Objective, clock: Clock) -> Iterator[None]:
    """Time inside of the student's and the teacher's backbones is theirs."""
    hooks = []
    owners = {"student": objective} | ({} if objective.teacher is None else {"teacher": objective.teacher})
    for part, owner in owners.items():
        network = getattr(owner, "backbone", None)
        if isinstance(network, nn.Module):
            hooks.append(network.register_forward_pre_hook(lambda *_, part=part: clock.mark(part)))
            hooks.append(network.register_forward_hook(lambda *_: clock.mark("losses")))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def captured(step: Step) -> Callable[[], dict[str, float]]:
    """The step after its copy as one CUDA graph, whose views are overwritten before each replay."""
    static = step.copy()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step.compute(static)
    torch.cuda.current_stream().wait_stream(side)
    step.clock, quiet = Clock("cpu"), step.clock  # no events of another clock inside of the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.compute(static)

    def replay() -> dict[str, float]:
        quiet.mark("copy")
        for view, given in zip(static.views, step.host.views, strict=True):
            view.copy_(given, non_blocking=True)
        quiet.mark("losses")
        graph.replay()
        quiet.mark("end")
        return quiet.read()

    return replay


def measure(mode: str, config: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """A row of one mode."""
    objective = configuration.build(config).to(given.device).train()
    if objective.teacher is not None:
        objective.teacher.to(given.device)
    host = example(objective, config["data"], given.batch)
    step = Step(objective, host, given.device, given.precision)
    if given.device == "cuda":
        step.host = _pinned(host)
        torch.cuda.reset_peak_memory_stats()
    if mode == "compiled":
        objective.compile()
    with watched(objective, step.clock) if mode == "eager" else _nothing():
        call = captured(step) if mode == "graph" else step
        rounds = [call() for _ in range(given.rounds + 3)][3:]
    parts = {part: round(statistics.median(found[part] for found in rounds), 3) for part in PARTS}
    total = statistics.median(sum(found.values()) for found in rounds)
    peak = torch.cuda.max_memory_allocated() if given.device == "cuda" else None
    return {
        "mode": mode, "ms_p50": round(total, 3), "parts_ms": parts,
        "volumes_per_s": round(1e3 * given.batch / total, 3), "peak_mib": None if peak is None else peak >> 20,
    }  # fmt: skip


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _pinned(batch: Batch) -> Batch:
    targets = {name: tuple(x.pin_memory() for x in per_view) for name, per_view in batch.targets.items()}
    return Batch(tuple(x.pin_memory() for x in batch.views), None, batch.key, params=batch.params, targets=targets)


def main() -> int:
    parser = arguments("Where the time of one optimizer step goes.", rounds=10)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    given = parser.parse_args()
    check(given.config, given.device)
    config = configuration.load(given.config, tiny=given.tiny)
    cuda = given.device == "cuda"
    seen = trace(lambda: configuration.build(config), config["data"], given.batch, given.precision, cuda=cuda)
    said = seen.parameters + seen.buffers + seen.teacher + 2 * seen.trained + max(seen.peak, 3 * seen.trained)
    for mode in given.modes:
        if mode == "graph" and not cuda:
            print("graph: no row: CUDA graphs need --device cuda")
            continue
        try:
            row = measure(mode, config, given)
        except Exception as error:  # noqa: BLE001 - compilers and captures fail in ways of their own; the others go on
            print(f"{mode}: no row: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
            continue
        row |= {"config": given.config, "tiny": given.tiny, "batch": given.batch, "precision": given.precision,
                "rounds": given.rounds, "planned_mib": said >> 20}  # fmt: skip
        append("breakdown", [{**environment(given.device), **row}])
        print(f"{mode}: {row['ms_p50']:.1f} ms, {row['volumes_per_s']} volumes/s, peak {row['peak_mib']} MiB "
              f"(planned {row['planned_mib']}); {row['parts_ms']}", flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
