"""SMART itself, small, on a store of phantoms: what the runs of test_smart_runs have in common. As a script: two ranks.

torchrun --nproc_per_node 2 smart_task.py STORE FOLDER CASE...
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import tiny_task
import torch
import torch.distributed as dist

from medfast import config as configuration
from medfast.data.loader import Stream
from medfast.training import pretrain
from medfast.types import Objective

OBJECTIVE = {
    "name": "smart",
    "backbone": {"name": "swin", "embed": 12, "depths": [2, 2], "heads": [1, 2], "window": 4, "patch": 4,
                 "drop_path": 0.3, "semantic_attention": 2, "sa_heads": 4},
    "mask": {"name": "attention", "ratio": 0.7, "hint": 0.1},
    "prototypes": 64, "head_widths": [32, 32, 16],
}  # fmt: skip
STEPS, BATCH = 6, 4
SLOW = {"optim": {"lr": 1e-6, "min_lr": 1e-7, "clip": {"kind": "global", "max": 0.5}}, "train": {"steps": 10}}
FP64 = {"train": {"steps": 10, "precision": "fp64"}}


class Stopping(Stream):
    """Sends its process a signal when it prepares the batch of step ``stop_at``."""

    stop_at: int | None = None

    def _batch(self, step, rows):
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGUSR1)
        return super()._batch(step, rows)


def zero(stage: int) -> dict:
    return {"train": {"strategy": "deepspeed"}, "deepspeed": {"zero_optimization": {"stage": stage}}}


def config(store, out, *changes: dict) -> dict:
    found = {
        "objective": OBJECTIVE,
        "data": {"store": str(store), "size": 48, "workers": 1, "holdout": 0.5, "foreground": True},
        "optim": {"lr": 1e-3, "warmup": 0.2, "clip": {"kind": "global", "max": 0.5}},
        "train": {"strategy": "ddp", "steps": STEPS, "batch": BATCH, "validate_every": 0, "validate_crops": 1,
                  "checkpoint_every": 0},
        "deepspeed": {}, "out": str(out),
    }  # fmt: skip
    for change in changes:
        for section, values in change.items():
            found[section] = {**found[section], **values}
    return configuration.validate(found)


def run(store, out, *changes: dict, seed: int = 0, stop_at: int | None = None) -> Objective:
    """Pretrain from scratch, weights drawn from ``seed``, or from what ``out`` holds; the objective at the end."""
    found = config(store, out, *changes)
    objective = configuration.build({**found, "train": {**found["train"], "seed": seed}})
    streams = [Stopping(**found["data"], seed=0, batch=BATCH, split=split) for split in ("train", "holdout")]
    streams[0].stop_at = stop_at
    pretrain(objective, found, *streams)
    return objective


def interrupted(store, out, *changes: dict) -> tuple[Objective, int | str | None]:
    """The same run in two parts: (the objective at the end, exit code of the first part)."""
    code = None
    try:
        run(store, out, *changes, stop_at=3)
    except SystemExit as stop:
        code = stop.code
    return run(store, out, *changes, seed=9), code


def main(store: Path, folder: Path, cases: list[str]) -> None:
    rank = os.environ["RANK"]
    for case in cases:
        if case == "ddp":
            objective = run(store, folder / "ddp", FP64)
        else:
            strategy = zero(int(case[-1]))
            run(store, folder / f"{case}_slow", SLOW, strategy)
            run(store, folder / f"{case}_whole", strategy)
            objective, code = interrupted(store, folder / f"{case}_parts", strategy)
            (folder / f"{case}_exit_{rank}").write_text(str(code))
        (folder / f"{case}_rank_{rank}").write_bytes(tiny_task.everything(objective))


if __name__ == "__main__":
    dist.init_process_group("gloo")  # one for all runs: a launcher's rendezvous serves a process once
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
    dist.barrier()
    dist.destroy_process_group()
