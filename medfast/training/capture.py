"""What is kept of a step that could not be used, so that it can be looked at months later.

    trouble/step_00000012/rank_00000.json      plan, seeds, losses, digests and norms of a rank's micro-batches
    trouble/ckpt/step_00000012/                a checkpoint without moments: the weights that the step was computed with

Such a step updates nothing, so the weights after it are the weights before it, and replaying it needs no other step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medfast.training import checkpoint, feed, saving
from medfast.training.job import Job
from medfast.training.step import steady, usable
from medfast.training.strategies import Strategy, autocast
from medfast.types import Batch, Objective

__all__ = ["FOLDER", "capture", "examine", "record"]

FOLDER = "trouble"
KEPT = 3  # states, the newest; what ranks wrote down stays


def record(run: Path, step: int, rank: int) -> Path:
    """The file of a rank about a skipped step."""
    return run / FOLDER / f"step_{step:08d}" / f"rank_{rank:05d}.json"


def capture(job: Job, strategy: Strategy, row: Mapping[str, Any]) -> None:
    """Write down a skipped step: each rank its part, rank 0 the weights as well. Collective."""
    step = row["step"]
    saving.settle(job)
    parts = {**checkpoint.describe(job.objective), **strategy.contents(), "optimizer": {}}
    if job.here.first:
        frozen, about = checkpoint.snapshot(parts), saving.meta(job, step)
        root = job.folder / FOLDER
        job.writer.start(lambda: checkpoint.save(root, step, frozen, about, KEPT, job.log.say))
    with strategy.whole() as objective:
        found = {"step": step, "rank": job.here.rank, "ranks": job.here.size, "row": row,
                 "batches": [examine(job, objective, batch, step)[0] for batch in job.seen],
                 "norms": _norms(objective)}  # fmt: skip
    file = record(job.folder, step, job.here.rank)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1))
    job.log.say(f"step {step} is skipped, {row['skipped']}. To look at it: medfast replay {job.folder} --step {step}")


def examine(
    job: Job, objective: Objective, batch: Batch, step: int
) -> tuple[dict[str, Any], tuple[Tensor, ...]]:  # fmt: skip
    """(everything that decides a micro-batch and what the objective makes of it, its masks); changes nothing.

    batch: on the host. Losses as repr, which gives every bit back and has words for what is not finite; tensors by
    SHA-256 of dtype, shape and bytes. Collective where the objective gathers.
    """
    key = batch.key
    (there,) = feed.moved([batch], job.train, job.here)
    clean, _ = usable(there)
    clock = torch.tensor(step / job.train.steps, dtype=torch.float64, device=job.here.device)
    with steady(objective), autocast(job.train.precision, job.here.device):
        output = objective(clean, clock)
        masks = objective.picture(clean).get("mask", ())
    return {
        "seed": int(key.seed), "step": int(key.step), "slots": [] if key.sample is None else key.sample.tolist(),
        "boxes": None if batch.boxes is None else batch.boxes.tolist(),
        "params": {name: value.tolist() for name, value in batch.params.items()},
        "not_finite": [int((~x.isfinite()).sum()) for x in batch.views],
        "views": _digest(batch.views),
        "targets": {name: _digest(per_view) for name, per_view in batch.targets.items()},
        "masks": _digest(masks),
        "losses": {name: repr(x.item()) for name, x in output.losses.items()},
    }, masks  # fmt: skip


def _norms(objective: Objective) -> dict[str, str]:
    """L2 norm of every trained parameter: the one that is out of order is seen at once."""
    return {name: repr(float(p.detach().double().norm())) for name, p in objective.named_parameters()}


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for x in tensors:
        digest.update(f"{x.dtype}{tuple(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
