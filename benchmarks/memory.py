"""What ``medfast plan`` says of memory against what PyTorch's allocator was asked for, on CPU.

    python benchmarks/memory.py [--cases 3 ...]      # all twelve; appends to results/memory.jsonl, exit 1 on a miss

A case is a shrunk preset that the training code itself steps, on one rank or on two through DeepSpeed at each ZeRO
stage. Measured are the storages of all tensors of the process, after set-up, after an update and after a backward pass,
and the most that a forward and backward pass held, by the allocator's own events. Nothing of the prediction's is used.
One thread: oneDNN's convolutions take scratch for each, which no GPU does (MoCo v3 on two threads holds 15 % more).
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rows import ROOT, append, environment
from torch.profiler import ProfilerActivity, profile

from medfast import config as configuration
from medfast.planning.example import example
from medfast.planning.memory import grouped, state
from medfast.planning.trace import trace
from medfast.training import deepspeed_engine
from medfast.training.distributed import world
from medfast.training.ema import Sharded
from medfast.training.strategies import AllReduce
from medfast.types import Objective

KEPT, WORKING = 0.02, 0.10  # allowed relative errors: of what stays, and of activations with gradients at their peak
BUCKET = {"reduce_bucket_size": 16_000_000, "allgather_bucket_size": 16_000_000}  # DeepSpeed's own are 2 GB


@dataclass(frozen=True)
class Case:
    """A shrunk preset. micro: samples of the one micro-batch. stage: of ZeRO on two ranks, None for one rank."""

    preset: str
    micro: int = 2
    precision: str = "fp32"
    stage: int | None = None
    overrides: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        return 1 if self.stage is None else 2

    def config(self) -> dict[str, Any]:
        given = [f"train.precision={self.precision}", f"train.batch={self.micro * self.ranks}", *self.overrides]
        if self.stage is None:
            given.append("train.strategy=ddp")
        config = configuration.load(ROOT / "configs" / f"{self.preset}.yaml", *given, tiny=True)
        zero = {"stage": self.stage or 0, **(BUCKET if self.stage else {})}
        return {**config, "deepspeed": {"zero_optimization": zero}}


WIDE = ("objective.backbone.embed=24",)  # parameters enough that ZeRO's padding is none of the 2 %
CASES = (
    Case("smart"),
    Case("smart", precision="bf16"),
    Case("smart", 1, "fp32", None, ("objective.backbone.checkpoint=true",)),
    Case("smit", 4),
    Case("ibot", 3),
    Case("mae", 4),
    Case("moco_v3", 4),
    Case("swinfuse"),
    Case("smart", 2, "fp32", 0, WIDE),
    Case("smart", 2, "fp32", 1, WIDE),
    Case("smart", 2, "fp32", 2, WIDE),
    Case("smart", 2, "fp32", 3, WIDE),
)


def held() -> int:
    """Bytes of all storages that this process's tensors have; DeepSpeed keeps some on "meta", which are none."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some modules' attributes warn of being looked at
        tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and not x.is_meta]
    tensors += [x.grad for x in tensors if x.is_leaf and x.grad is not None]
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values())


def most(call: Callable[[], Any]) -> int:
    """The most bytes that ``call`` has at a time over those before it, by the events of the CPU's allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    events = [x for x in seen.profiler.kineto_results.events() if x.name() == "[memory]"]
    in_order = sorted(events, key=lambda x: x.start_ns())
    sizes = (event.nbytes() for event in in_order)  # type: ignore[attr-defined]  # torch's stub leaves it out
    return max(itertools.accumulate(sizes), default=0)


def measured(case: Case) -> dict[str, int]:
    """Bytes on this rank, by what they are: ``State``'s names, and "working", the peak of a micro-batch."""
    config = case.config()
    train, optim = configuration.train_settings(config), configuration.Optim(**config["optim"])
    with world() as here:
        levels = [held()]
        objective: Objective = configuration.build(config).train()
        objective.gather = here.gather
        levels.append(held())
        batch = example(objective, config["data"], case.micro)
        clock = torch.tensor(0.1, dtype=torch.float64)
        beside = held() - levels[-1]

        arguments = (objective, optim, train, here, 1)
        strategy = (AllReduce(*arguments) if train.strategy == "ddp"
                    else deepspeed_engine.Engine(*arguments, config["deepspeed"]))  # fmt: skip

        def backward() -> None:
            output = strategy.forward(batch, clock)
            strategy.backward(torch.stack(list(output.losses.values())).sum())

        levels.append(held() - beside)
        weights = own(objective)
        backward()
        strategy.step(1e-4, 0.1, 0.5)
        levels.append(held() - beside)
        weights = own(objective) - weights  # stage 3 has made small ones whole
        working = beside + most(backward)
        levels.append(held() - beside)
    taught = [] if objective.teacher is None else objective.teacher.state().values()
    teacher = sum(x.untyped_storage().nbytes() for x in taught)
    if isinstance(average := getattr(strategy, "average", None), Sharded):
        teacher += sum(x.untyped_storage().nbytes() for x in average.master.values())
    _, begun, updated, graded = (level - levels[0] for level in levels[1:])
    lasting = cut_gradients(strategy)
    return {"parameters": begun - teacher - lasting + weights, "gradients": graded - updated + lasting,
            "optimizer": updated - begun - weights, "teacher": teacher, "working": working}  # fmt: skip


def own(objective: Objective) -> int:
    """Bytes of the storages that parameters have; next to none where ZeRO-3 has cut them."""
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in objective.parameters()}.values())


def cut_gradients(strategy: Any) -> int:
    """Bytes of the buffer that ZeRO-3 has for gradients from the start to the end; 0 for every other strategy."""
    optimizer = getattr(getattr(strategy, "engine", None), "optimizer", None)
    buffer = getattr(optimizer, "grad_partitions_flat_buffer", None)
    return 0 if buffer is None else buffer.untyped_storage().nbytes()


def predicted(case: Case) -> dict[str, int]:
    """The same of ``medfast plan``."""
    config = case.config()
    given = (config["data"], case.micro, case.precision, case.ranks)
    seen = trace(lambda: configuration.build(config), *given, cuda=False)
    with torch.device("meta"):
        sizes = grouped(configuration.build(config), configuration.Optim(**config["optim"]))
    held = state(seen, config, sizes, case.ranks, case.stage or 0)
    if case.stage == 3:  # its bucket is there from the start, and weights are gathered for the pass
        return {**asdict(held), "parameters": held.parameters + held.buckets, "working": seen.peak + seen.trained}
    return {**asdict(held), "working": seen.peak + held.buckets}


def run(case: Case, number: int) -> dict[str, int]:
    """``measured`` in processes of its own; of each kind the most that a rank holds."""
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if case.ranks > 1 else []
    command = [sys.executable, *launch, str(Path(__file__)), "--worker", str(number)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"parameters"')]
    if done.returncode or len(rows) != case.ranks:
        sys.exit(f"case {number} failed:\n{done.stderr[-3000:]}")
    return {name: max(row[name] for row in rows) for name in rows[0]}


def compare(case: Case, number: int) -> dict[str, Any]:
    """A row of the table. kept_error: of each kind of state, working_error: of a micro-batch's peak; relative."""
    found, said = run(case, number), predicted(case)
    errors = {name: said[name] / found[name] - 1 if found[name] else 0.0 for name in found}
    kept = {name: round(error, 4) for name, error in errors.items() if name != "working"}
    return {
        "config": case.preset, "micro": case.micro, "precision": case.precision, "ranks": case.ranks,
        "zero": case.stage, "overrides": list(case.overrides), "measured": found,
        "predicted": {name: said[name] for name in found},
        "kept_error": kept, "working_error": round(errors["working"], 4),
        "ok": all(abs(x) <= KEPT for x in kept.values()) and abs(errors["working"]) <= WORKING,
    }  # fmt: skip


def main(numbers: list[int]) -> int:
    """Print the table; 0 if all are within bounds."""
    rows = []
    print(f"{'case':<34} {'measured MiB: state':>20} {'working':>9}   {'worst error: state':>18} {'working':>9}")
    for number in numbers:
        row = compare(CASES[number], number)
        rows.append({**environment(), **row})
        where = f"{row['config']} {row['precision']} x{row['micro']} zero {row['zero']} of {row['ranks']}"
        kept = sum(size for name, size in row["measured"].items() if name != "working")
        worst = max(row["kept_error"].values(), key=abs)
        print(f"{where:<34} {kept / 2**20:>20.1f} {row['measured']['working'] / 2**20:>9.1f}   {worst:>18.2%} "
              f"{row['working_error']:>9.2%}{'' if row['ok'] else '  RED'}", flush=True)  # fmt: skip
    append("memory", rows)
    return int(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="`medfast plan` and the allocator, on CPU.")
    parser.add_argument("--cases", type=int, nargs="+", default=range(len(CASES)), metavar="N")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker is None:
        sys.exit(main(list(given.cases)))
    print(json.dumps(measured(CASES[given.worker])), flush=True)
