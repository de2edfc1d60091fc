"""Bytes of the collectives of an optimizer step, on two and on four ranks, against the formulas of docs/scaling.md.

    python benchmarks/traffic.py [--ranks 2 4] [--stages ddp 0 1 2 3]    # gloo; appends to results/traffic.jsonl
    python benchmarks/traffic.py --tables                                # prints the tables of docs/scaling.md

Counted below torch.distributed, where every collective becomes an operator of c10d with its tensors, whoever calls it.
A step has two micro-batches. Exit 1 where a count is further than 3 % from its formula.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from typing import Any

import torch
from rows import ROOT, append, environment
from scaling import tables
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from medfast import config as configuration
from medfast.planning.example import example
from medfast.planning.traffic import payloads
from medfast.training import deepspeed_engine
from medfast.training.distributed import World, world
from medfast.training.strategies import AllReduce

ALLOWED = 0.03
MICROS = 2
KINDS = {  # operator of c10d -> (collective, which argument holds the whole payload)
    "allreduce_": ("all_reduce", 0), "allreduce_coalesced_": ("all_reduce", 0),
    "allgather_": ("all_gather", 0), "_allgather_base_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0), "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_": ("reduce_scatter", 1), "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "broadcast_": ("broadcast", 0), "reduce_": ("reduce", 0),
}  # fmt: skip


class Counter(TorchDispatchMode):
    """Adds up payloads by collective, in bytes. ValueError for a collective that it does not know."""

    def __init__(self):
        super().__init__()
        self.bytes: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, _, name = func._schema.name.partition("::")
        if space == "c10d" and name not in ("barrier", "monitored_barrier_"):
            if name not in KINDS:
                raise ValueError(f"the collective {name} is not counted: add it to KINDS of benchmarks/traffic.py")
            kind, at = KINDS[name]
            self.bytes[kind] += sum(x.nbytes for x in tree_leaves(args[at]) if isinstance(x, Tensor))
        return func(*args, **(kwargs or {}))


def config(stage: str, ranks: int) -> dict[str, Any]:
    """A shrunk SMART; buckets and thresholds of DeepSpeed that suit its size."""
    given = [f"train.batch={MICROS * ranks}", "train.micro=1", "train.precision=bf16", "objective.backbone.embed=24",
             "data.size=32", f"train.strategy={'ddp' if stage == 'ddp' else 'deepspeed'}"]  # fmt: skip
    if stage == "3":
        given.append("train.teacher=sharded")
    found = configuration.load(ROOT / "configs" / "smart.yaml", *given, tiny=True)
    zero = {"stage": 0 if stage == "ddp" else int(stage), "reduce_bucket_size": 1_000_000,
            "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0}  # fmt: skip
    return {**found, "deepspeed": {"zero_optimization": zero}}


def counted(stage: str, here: World) -> dict[str, Any]:
    """Payloads of the second optimizer step, and the bytes that the formulas need."""
    found = config(stage, here.size)
    train, optim = configuration.train_settings(found), configuration.Optim(**found["optim"])
    objective = configuration.build(found).to(here.device).train()
    objective.gather = here.gather
    trained = sum(p.nbytes for p in objective.parameters() if p.requires_grad)
    arguments = (objective, optim, train, here, MICROS)
    strategy = AllReduce(*arguments) if stage == "ddp" else deepspeed_engine.Engine(*arguments, found["deepspeed"])
    batch, clock = example(objective, found["data"], 1), torch.tensor(0.1, dtype=torch.float64)
    for _ in range(2):
        with Counter() as counter:
            for _ in range(MICROS):
                output = strategy.forward(batch, clock)
                strategy.backward(torch.stack(list(output.losses.values())).sum())
            strategy.step(1e-4, 0.1, 0.5)
            strategy.teach(0.996)
    teacher = objective.teacher
    replica = sum(p.nbytes for p in teacher.parameters()) if teacher is not None and stage == "3" else 0
    return {"payloads": dict(counter.bytes), "trained": trained, "replica": replica}


def launch(stage: str, ranks: int) -> dict[str, Any]:
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    done = subprocess.run([*command, __file__, "--worker", stage], env=env, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"payloads"')]
    if done.returncode or not lines:
        sys.exit(f"stage {stage} on {ranks} ranks failed:\n{done.stderr[-3000:]}")
    return json.loads(lines[0])


def main(stages: list[str], counts: list[int]) -> int:
    """Print and keep the table; 0 if all counts are as said."""
    rows = []
    print(f"{'ZeRO':<5} {'ranks':>5}  {'collective':<15} {'counted':>13} {'formula':>13} {'error':>8}")
    for ranks in counts:
        for stage in stages:
            found = launch(stage, ranks)
            number = 0 if stage == "ddp" else int(stage)
            said = payloads(number, found["trained"], MICROS, found["replica"])
            large = {kind for kind, size in found["payloads"].items() if size > ALLOWED * found["trained"]}
            for kind in sorted({*said, *large}):
                size, formula = found["payloads"].get(kind, 0), said.get(kind, 0)
                error = size / formula - 1 if formula else 1.0
                print(f"{stage:<5} {ranks:>5}  {kind:<15} {size:>13,} {formula:>13,.0f} {error:>8.2%}"
                      f"{'' if abs(error) <= ALLOWED else '  RED'}", flush=True)  # fmt: skip
                rows.append({
                    **environment(), "zero": stage, "ranks": ranks, "micro_batches": MICROS, "collective": kind,
                    "bytes": size, "formula": round(formula), "error": round(error, 4),
                })  # fmt: skip
    append("traffic", rows)
    return int(any(abs(row["error"]) > ALLOWED for row in rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Bytes of the collectives of an optimizer step.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--stages", nargs="+", default=["ddp", "0", "1", "2", "3"], choices=("ddp", "0", "1", "2", "3"))
    parser.add_argument("--tables", action="store_true", help="print the tables of docs/scaling.md instead")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.tables:
        print(tables())
    elif given.worker is None:
        sys.exit(main(given.stages, given.ranks))
    else:
        with world() as here:
            made = counted(given.worker, here)
            if here.first:
                print(json.dumps(made), flush=True)
