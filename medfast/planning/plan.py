"""``medfast plan``: what a configuration needs on GPUs that need not be here, and which ZeRO stage it should take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from medfast.planning.cost import LAUNCH_S, REACHED, Seconds, seconds
from medfast.planning.hardware import Cluster
from medfast.planning.memory import State, grouped, state
from medfast.planning.trace import Trace, trace
from medfast.planning.traffic import payloads
from medfast.training.settings import Optim, Train
from medfast.types import Objective

__all__ = ["Plan", "Row", "make"]

RESERVED = 1.5e9  # bytes that CUDA's context, NCCL's and cuBLAS's workspaces take of a GPU
SLACK = 1.08  # what PyTorch's allocator reserves over what is asked for
EQUAL = 0.05  # times that differ by less are the same: they are estimates
LIVE = 1_000_000_000  # DeepSpeed's default of stage3_max_live_parameters, elements


@dataclass(frozen=True)
class Row:
    """One ZeRO stage. working: bytes of activations, gradients at their peak and gathered weights beside ``held``."""

    stage: int
    held: State
    working: int
    peak: int
    fits: bool
    seconds: Seconds
    payload: dict[str, float]


@dataclass(frozen=True)
class Plan:
    """micro: samples of a micro-batch, the largest at which the stage that the configuration asks for, or else some
    stage, fits; None where none does, and then the rows are those of the smallest. rows: of the stages 0 to 3."""

    train: Train
    place: Cluster
    micro: int | None
    micro_batches: int
    seen: Trace
    rows: tuple[Row, ...]
    stage: int

    @property
    def advised(self) -> Row | None:
        """The lowest stage that fits and takes no longer than the fastest that does, as far as estimates tell."""
        fitting = [row for row in self.rows if row.fits]
        least = min((row.seconds.total for row in fitting), default=0.0)
        return next((row for row in fitting if row.seconds.total <= (1 + EQUAL) * least), None)


def make(build: Callable[[], Objective], config: Mapping[str, Any], place: Cluster) -> Plan:
    """Plan a loaded configuration, whose objective ``build`` makes, on a cluster. Raises ValueError for a batch that
    its ranks cannot share."""
    train = Train(**config.get("train", {}))
    with torch.device("meta"):
        objective = build()
    sizes = grouped(objective, Optim(**config.get("optim", {})))
    section = (config.get("deepspeed") or {}).get("zero_optimization") or {}
    wanted = int(section.get("stage", 0)) if train.strategy == "deepspeed" else 0
    checkpointed = bool(config["objective"].get("backbone", {}).get("checkpoint"))
    plan = None
    for micro in _micro_batches(train, place.ranks, objective.group):
        count = train.batch // place.ranks // micro
        seen = trace(build, config["data"], micro, train.precision, place.ranks)
        rows = tuple(_row(stage, seen, config, sizes, place, count, checkpointed) for stage in range(4))
        plan = Plan(train, place, micro, count, seen, rows, wanted)
        if any(row.fits for row in rows):
            return plan
    assert plan is not None
    return replace(plan, micro=None)


def _micro_batches(train: Train, ranks: int, group: int) -> list[int]:
    """What a micro-batch may be, the largest first."""
    found, most = [], train.micro
    while True:
        try:
            _, micro = replace(train, micro=most).shares(ranks, group)
        except ValueError:
            if found:
                return found
            raise
        found.append(micro)
        if micro == 1:
            return found
        most = micro - 1


def _row(
    stage: int, seen: Trace, config: Mapping[str, Any], sizes: tuple[tuple[int, ...], ...], place: Cluster, count: int,
    checkpointed: bool,
) -> Row:  # fmt: skip
    held = state(seen, config, sizes, place.ranks, stage)
    section = (config.get("deepspeed") or {}).get("zero_optimization") or {}
    gathered = min(seen.trained, 4 * int(section.get("stage3_max_live_parameters", LIVE))) if stage == 3 else 0
    lasting = held.gradients if stage == 3 else 0  # in a buffer that stage 3 keeps
    coming = held.gradients - lasting
    working = gathered + (seen.peak if count == 1 or lasting else coming + seen.activations)
    update = coming + seen.trained // (place.ranks if stage else 1)  # one more of them: flat, or AdamW's own
    peak = held.total - coming + max(working, update)
    replica = held.teacher - -(-seen.teacher // place.ranks) if held.teacher != seen.teacher else 0
    payload = payloads(stage, seen.trained, count, replica, checkpointed) if place.ranks > 1 else {}
    took = seconds(seen, place, count, place.ranks if stage else 1, payload)
    return Row(stage, held, working, peak, peak * SLACK + RESERVED <= place.gpu.memory, took, payload)


ASSUMPTIONS = (
    "Memory: the objective's own forward and backward pass, run on tensors without data; benchmarks/memory.py holds it "
    "against the allocator on CPU. Kernels are the CPU's, with the shapes they save; autocast is CUDA's. What a "
    "library takes within an operator and gives back (cuDNN's workspace, oneDNN's own layouts) is not in it.",
    f"A GPU gives all but {RESERVED / 1e9:.1f} GB (context, NCCL, cuBLAS), and the allocator reserves {SLACK - 1:.0%} "
    "more than is asked for.",
    "Time: no measurement, and rather too short. Every operator by itself at "
    f"{REACHED['bandwidth']:.0%} of the memory's bandwidth or {REACHED['flops']:.0%} of the peak FLOP/s, whichever is "
    f"slower, and never under {LAUNCH_S * 1e6:.0f} us (eager).",
    f"Wires at {REACHED['wire']:.0%} of the slowest, nothing overlapped with computing; no time waiting for data, "
    "validating or saving.",
)
