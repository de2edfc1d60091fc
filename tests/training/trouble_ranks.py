"""What two ranks do: ``torchrun --nproc_per_node 2 trouble_ranks.py FOLDER``, for test_trouble_ranks."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch.distributed as dist
import troubled_task as troubled

WRONG = {"wrong": {5: "loss"}, "kind": troubled.Grouped}
PLAIN = {"inf_at": 5, "train__micro": 1}
ZERO = {
    stage: {"train__strategy": "deepspeed",
            "deepspeed": {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}}
    for stage in (2, 3)
}  # fmt: skip


def main(folder: Path) -> None:
    troubled.run(folder / "grouped", **WRONG)
    troubled.run(folder / "plain", **PLAIN)
    for stage, how in ZERO.items():
        troubled.run(
            folder / f"zero{stage}", wrong={5: "gradient"}, train__checkpoint_every=1, train__keep_last=9, **how
        )
        spiked = {**troubled.SPIKE, "train__validate_crops": 3, "train__validate_every": 6}
        troubled.run(folder / f"rolled{stage}", **spiked, train__alarms={"loss_spike": "rollback"}, **how)
    rank = int(os.environ["RANK"])
    same = troubled.again(folder / "grouped", 7, rank=rank, **WRONG)
    (folder / f"again_{rank}").write_text(str(same))


if __name__ == "__main__":
    dist.init_process_group("gloo")  # one for all runs: a launcher's rendezvous serves a process once
    main(Path(sys.argv[1]))
    dist.barrier()
    dist.destroy_process_group()
