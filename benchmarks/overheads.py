"""What a run costs beside its forward and backward passes: teacher's average, checkpoints, DeepSpeed, a second rank.

    python benchmarks/overheads.py [--steps 12]      # on a quiet machine; appends to results/overheads.jsonl

Each number is of `pretrain` itself, whose rows of metrics say how long steps and saving took, on views that are made
once; runs that are compared take turns. Goals (exit 1 where one is missed): average and replica under 2 % of a step,
a checkpoint stalls for less than a step, ZeRO stage 0 within 5 % of a plain all-reduce. Two ranks of one thread against
one rank of two, at the same global batch, is a row without a goal.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rows import ROOT, append, environment

from medfast import config as configuration
from medfast.planning.example import example
from medfast.training import ema, pretrain
from medfast.types import Batch, Objective

PRESET = ROOT / "configs" / "smart.yaml"
WARM = 3  # steps that do not count


class Ready:
    """A stream whose views are there already, the same for every step."""

    note, volumes, waited = None, ("benchmark",), 0.0

    def __init__(self, objective: Objective, config: dict[str, Any]):
        self.batch_size = config["train"]["batch"]
        self.whole = example(objective, config["data"], self.batch_size)

    def batch(self, step: int, slots) -> Batch:
        rows = torch.as_tensor(list(slots))
        return replace(
            self.whole, views=tuple(x[rows] for x in self.whole.views),
            key=self.whole.key._replace(step=step, sample=rows),
            params={name: x[rows] for name, x in self.whole.params.items()},
        )  # fmt: skip

    def run(self, schedule) -> Iterator[Batch]:
        yield from (self.batch(step, slots) for step, slots in schedule)

    def close(self) -> None: ...


def worker(out: Path, overrides: list[str], tiny: bool) -> None:
    """One rank of one run; rank 0 writes how long each average took."""
    config = configuration.load(PRESET, *overrides, f"out={out}", "train.validate_crops=0", tiny=tiny)
    objective = configuration.build(config)
    took: list[float] = []
    for kind in (ema.Replicated, ema.Sharded):
        kind.update = _timed(kind.update, took)  # type: ignore[method-assign]  # a clock around it
    stream = Ready(objective, config)
    pretrain(objective, config, stream, stream)
    if os.environ.get("RANK", "0") == "0":
        (out / "teach.json").write_text(json.dumps(took))


def _timed(call, took: list[float]):
    def timed(*arguments):
        begin = time.perf_counter()
        call(*arguments)
        took.append(time.perf_counter() - begin)

    return timed


def run(ranks: int, threads: int, overrides: list[str], tiny: bool) -> dict[str, Any]:
    """A run in processes of its own: median seconds of a step and of an average, seconds that each checkpoint took."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        env |= {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])}
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
        command = [sys.executable, *launch, __file__, "--worker", str(out), *overrides, *(["--tiny"] if tiny else [])]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][WARM:]
        teach = json.loads((out / "teach.json").read_text())[WARM:]
    saves = [row["time"]["save_s"] for row in rows if row["time"]["save_s"]]
    return {"step_s": statistics.median(row["time"]["step_s"] for row in rows), "saves_s": saves,
            "teach_s": statistics.median(teach)}  # fmt: skip


def full(steps: int) -> list[dict[str, Any]]:
    """The full network on views of 64^3, an eighth of its step, so that what is beside the step weighs more."""
    given = [f"train.steps={steps}", "train.batch=2", "data.size=64", "train.precision=fp32"]
    given.append("train.checkpoint_every=3")
    rows = []
    for name, strategy, zero in (("plain", "ddp", 0), ("zero 0", "deepspeed", 0), ("zero 1", "deepspeed", 1)):
        found = run(1, 2, [*given, f"train.strategy={strategy}", f"deepspeed.zero_optimization.stage={zero}"], False)
        step, stall = found["step_s"], max(found["saves_s"])
        rows.append(_row(f"teacher's average, {name}", found["teach_s"], step, 0.02))
        rows.append(_row(f"stall of a checkpoint, {name}", stall, step, 1.0))
    return rows


def compared(steps: int, turns: int = 3) -> list[dict[str, Any]]:
    """Shrunk SMART with a batch of 4 on two ranks, and on one."""
    given = [f"train.steps={steps}", "train.batch=4", "train.precision=fp32", "train.checkpoint_every=0"]
    runs = {
        "plain all-reduce": (2, 1, [*given, "train.strategy=ddp"]),
        "zero 0": (2, 1, [*given, "train.strategy=deepspeed", "deepspeed.zero_optimization.stage=0"]),
        "one rank": (1, 2, [*given, "train.strategy=ddp"]),
    }
    took: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, (ranks, threads, overrides) in runs.items():
            took[name].append(run(ranks, threads, overrides, True)["step_s"])
    plain, zero, alone = (statistics.median(took[name]) for name in runs)
    return [_row("zero 0 over plain all-reduce, 2 ranks", zero - plain, plain, 0.05),
            _row("2 ranks over 1, same batch", plain - alone, alone, None)]  # fmt: skip


def _row(what: str, extra: float, step: float, goal: float | None) -> dict[str, Any]:
    share = extra / step
    row = {"what": what, "seconds": round(extra, 5), "step_s": round(step, 4), "share": round(share, 4), "goal": goal,
           "ok": goal is None or share <= goal}  # fmt: skip
    print(f"{what:<42} {extra:9.4f} s of {step:8.3f} s = {share:7.2%}{'' if row['ok'] else '  MISSED'}", flush=True)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description="What a run costs beside its forward and backward passes.")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_intermixed_args()
    if given.worker is not None:
        worker(given.worker, given.overrides, given.tiny)
        return 0
    rows = [*full(given.steps), *compared(given.steps)]
    append("overheads", [{**environment(), **row} for row in rows])
    return int(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
