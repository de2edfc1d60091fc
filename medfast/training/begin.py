"""What a run does before its first step: weights, and what it writes down about itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from medfast.training import checkpoint, start
from medfast.training.job import Job
from medfast.training.log import environment
from medfast.types import Objective

__all__ = ["place", "restore", "tell"]


def restore(job: Job, init: Mapping[str, Any] | None, again: bool) -> tuple[int, Mapping[str, torch.Tensor]]:
    """Weights to begin with, on the rank's device, equal on all ranks: (first step, moments, {} at a fresh start).

    again: after a rollback, which goes on from the newest checkpoint whatever train.resume says.
    """
    objective, train, here = job.objective, job.train, job.here
    place(job)
    found = checkpoint.latest(job.folder, job.log.say) if here.first else None
    name = here.share(found.name if found else "")
    newest = job.folder / "ckpt" / name if name else None
    if newest is not None and train.resume == "never" and not again:
        raise ValueError(f"train.resume=never, but {job.folder} holds {newest.name}: give another out=FOLDER")
    if newest is None and train.resume == "must":
        raise ValueError(f"train.resume=must, but {job.folder} holds no whole checkpoint")
    first, moments = 0, {}
    if newest is not None:
        parts, meta = checkpoint.load(newest)
        start.check_same(meta["settings"], job.facts, train.resume_changed, job.log.say)
        checkpoint.restore(objective, parts)
        job.health.load(meta.get("health", {}), again)
        job.damaged.update(meta.get("damaged", []))
        first, moments = meta["step"], parts["optimizer"]
        if init and not again:
            job.log.say(f"init is not read: the run folder holds {newest.name}, and the run goes on from there")
    else:
        fresh(job, init)
    here.agree("its parameters at the start", _digest(objective))
    return first, moments


def place(job: Job) -> None:
    """Objective and teacher onto the rank's device, in the precision of the run's parameters."""
    dtype = torch.float64 if job.train.precision == "fp64" else torch.float32
    job.objective.to(job.here.device, dtype).train()
    if job.objective.teacher is not None:
        job.objective.teacher.to(job.here.device, dtype)


def fresh(job: Job, init: Mapping[str, Any] | None) -> None:
    """The weights of step 0: as built, or other ones; the teacher becomes the student."""
    objective = job.objective
    if init:
        start.initialise(objective, init, job.log.say)
    if objective.teacher is not None:
        objective.teacher.copy_({**dict(objective.named_parameters()), **dict(objective.named_buffers())})


def tell(job: Job, resolved: Mapping[str, Any], first: int, streams: tuple) -> None:
    """Write down what is run, and say what a reader should know before it starts."""
    job.log.begin(first, job.train.steps, job.train.batch)
    if job.here.first:
        import yaml

        (job.folder / "config.resolved.yaml").write_text(yaml.safe_dump(_plain(resolved), sort_keys=False))
        (job.folder / "env.json").write_text(json.dumps(environment(job.here.size), indent=1))
    trained = sum(p.numel() for p in job.objective.parameters() if p.requires_grad)
    begun = f"resuming after {first} steps" if first else "starting"
    job.log.say(
        f"{begun}: {job.train.steps} steps of {job.train.batch} samples on {job.here.size} rank(s) x {job.accumulate} "
        f"micro-batch(es), {job.train.strategy}, {job.train.precision}, {job.here.device.type}; {trained:,} parameters"
    )
    for stream in streams:
        if getattr(stream, "note", None):
            job.log.say(stream.note)


def _plain(value: Any) -> Any:
    """Only what YAML knows: tuples as lists, paths as text."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def _digest(objective: Objective) -> str:
    digest = hashlib.sha256()
    for part in checkpoint.describe(objective).values():
        for tensor in part.values():
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
