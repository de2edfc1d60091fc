"""What two ranks do, in one launch: ``torchrun --nproc_per_node 2 two_ranks.py FOLDER CASE...``, for test_two_ranks."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import tiny_task as task
import torch.distributed as dist

CLIP = {"kind": "global", "max": 0.05}
SMALL = {"optim__lr": 1e-6, "optim__min_lr": 1e-7, "optim__clip": CLIP, "train__steps": 10}
STAGES = {name: {"train__strategy": "deepspeed", "deepspeed": {"zero_optimization": {"stage": stage}}}
          for stage, name in enumerate(("zero0", "zero1", "zero2", "zero3"))}  # fmt: skip


def main(folder: Path, cases: list[str]) -> None:
    for case in cases:
        if case == "ddp":
            objective = task.run(folder / "ddp", train__precision="fp64", train__steps=10, optim__clip=CLIP)
        else:
            if case == "zero0":
                task.run(folder / f"{case}_small", **SMALL, **STAGES[case])
            task.run(folder / f"{case}_whole", **STAGES[case])
            try:
                task.run(folder / f"{case}_parts", stop_at=2, **STAGES[case])
            except SystemExit as stop:
                (folder / f"{case}_exit_{os.environ['RANK']}").write_text(str(stop.code))
            objective = task.run(folder / f"{case}_parts", seed=7, **STAGES[case])
        (folder / f"{case}_rank_{os.environ['RANK']}").write_bytes(task.everything(objective))


if __name__ == "__main__":
    dist.init_process_group("gloo")  # one for all runs: a launcher's rendezvous serves a process once
    main(Path(sys.argv[1]), sys.argv[2:])
    dist.barrier()
    dist.destroy_process_group()
