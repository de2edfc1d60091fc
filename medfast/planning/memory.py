"""Where the bytes of a run's state are at each ZeRO stage.

Formulas of what DeepSpeed 0.19 keeps around fp32 parameters under torch_autocast, and of our teacher;
benchmarks/memory.py holds them against what is there. N ranks, T trained parameters, E of the teacher, 4 bytes each:

            parameters            gradients           moments   buckets while a backward pass runs
  0, ddp    4T                    4T                  8T
  1         4T + 4T/N             4T/N and more       8T/N      4B (8B with overlap_comm)
  2         4T + 4T/N             4T/N and more       8T/N      4B (8B with overlap_comm)
  3         4T/N + 4T/N + 4S      4T/N, for good      8T/N      4B, and whole weights of the layers at work

More: of a parameter that a cut runs through, both ranks keep the whole gradient. S: trained parameters of at most
zero_optimization.stage3_param_persistence_threshold elements each, which stage 3 keeps whole beside their pieces.
B is zero_optimization.reduce_bucket_size, which DeepSpeed allocates whole however small the network is.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medfast.planning.trace import Trace
from medfast.training.ema import LARGE
from medfast.training.optim import groups as groups_of
from medfast.training.settings import Optim
from medfast.types import Objective

__all__ = ["State", "grouped", "state"]

BUCKET = 500_000_000  # DeepSpeed's default of reduce_bucket_size, elements
SMALL = 100_000  # and of stage3_param_persistence_threshold


@dataclass(frozen=True)
class State:
    """Bytes on one rank. parameters: with buffers and ZeRO's copies. gradients: between backward pass and update, at
    stage 3 always. teacher: its average and its replica. buckets: of ZeRO's collectives."""

    parameters: int
    gradients: int
    optimizer: int
    teacher: int
    buckets: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.teacher + self.buckets


def state(
    seen: Trace, config: Mapping[str, Any], groups: Sequence[Sequence[int]], ranks: int, stage: int
) -> State:  # fmt: skip
    """What the rank of ``ranks`` holds that holds most, at a ZeRO stage, 0 for plain all-reduce too.

    groups: elements of each trained parameter, by group of the optimizer (``medfast.training.optim.groups``).
    """
    section = (config.get("deepspeed") or {}).get("zero_optimization") or {}
    own, rest = seen.trained, seen.parameters - seen.trained + seen.buffers
    part = -(-own // ranks)
    teacher = _teacher(seen, config.get("train", {}), ranks, stage)
    if stage == 0:
        return State(own + rest, own, 2 * own, teacher, 0)
    bucket = 4 * int(section.get("reduce_bucket_size", BUCKET))
    offload = section.get("offload_optimizer") is not None
    moments = 0 if offload else 2 * part
    master = 0 if offload else part
    if stage == 3:
        small = int(section.get("stage3_param_persistence_threshold", SMALL))
        kept = 4 * sum(n for numels in groups for n in numels if n <= small)
        return State(part + rest + master + kept, part, moments, teacher, bucket)
    twice = bool(section.get("overlap_comm"))
    gradients = 4 * max(_touched(groups, rank, ranks) for rank in range(ranks))
    return State(own + rest + master, gradients, moments, teacher, bucket * (1 + twice))


def grouped(objective: Objective, optim: Optim) -> tuple[tuple[int, ...], ...]:
    """Elements of each trained parameter, by group of the optimizer."""
    parameters = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    return tuple(tuple(parameters[name].numel() for name in rule.names) for rule in groups_of(parameters, optim))


def _touched(groups: Sequence[Sequence[int]], rank: int, ranks: int) -> int:
    """Elements of the parameters that a rank's fragments touch, where each group is cut into ``ranks`` fragments."""
    found = 0
    for numels in groups:
        each = -(-sum(numels) // ranks)
        ends = itertools.accumulate(numels)
        found += sum(n for n, end in zip(numels, ends, strict=True)
                     if end > rank * each and end - n < (rank + 1) * each)  # fmt: skip
    return found


def _teacher(seen: Trace, train: Mapping[str, Any], ranks: int, stage: int) -> int:
    """A whole fp32 average; or a piece of it beside a replica, in 16 bits where the run computes in them.

    As ``medfast.training.ema.averaging`` decides. The replica's biases and norms, which stay fp32, count as 16 bits:
    they are under a hundredth of it.
    """
    bf16 = train.get("precision") == "bf16"
    wanted = train.get("teacher", "auto")
    sharded = seen.teacher // 4 >= LARGE and ranks > 1 and bf16 if wanted == "auto" else wanted == "sharded"
    if not (sharded or stage == 3):
        return seen.teacher
    replica = seen.teacher // 2 if sharded and bf16 else seen.teacher
    return replica + -(-seen.teacher // ranks)
