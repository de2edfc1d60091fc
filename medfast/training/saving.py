"""When checkpoints are taken, waited for, and left behind. Everything here is done by all ranks together."""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

from medfast.training import checkpoint
from medfast.training.alarms import Verdict
from medfast.training.health import Diverged
from medfast.training.job import Job
from medfast.training.log import versions
from medfast.training.strategies import Strategy
from medfast.training.writer import SaveFailed

__all__ = ["meta", "roll_back", "save", "settle"]


def save(job: Job, strategy: Strategy, done: int) -> float:
    """Take a snapshot after ``done`` steps and let it be written; returns the seconds that the run stood still."""
    begin = time.perf_counter()
    job.watch.at(done - 1, "checkpoint")
    settle(job)
    parts = {**checkpoint.describe(job.objective), **strategy.contents()}
    if job.here.first:
        frozen, about, train = checkpoint.snapshot(parts), meta(job, done), job.train
        job.writer.start(lambda: checkpoint.save(job.folder, done, frozen, about, train.keep_last, job.log.say,
                                                 train.keep_every))  # fmt: skip
    return time.perf_counter() - begin


def meta(job: Job, done: int) -> dict[str, Any]:
    """What a checkpoint says of itself."""
    return {
        "seed": job.train.seed,
        "cursor": {"step": done, "slot": 0},
        "ranks": job.here.size,
        "settings": job.facts,
        "settings_hash": hashlib.sha256(json.dumps(job.facts, sort_keys=True).encode()).hexdigest(),
        "versions": versions(),
        "health": job.health.state(),
        "damaged": sorted(job.damaged),
    }


def settle(job: Job) -> None:
    """Wait until the last checkpoint is on the disk. Raises SaveFailed, on every rank, where it cannot be."""
    words = ""
    try:
        job.writer.wait()
    except SaveFailed as error:
        words = str(error)
    if words := job.here.share(words):
        raise SaveFailed(words)


def roll_back(job: Job, verdict: Verdict) -> None:
    """Leave no checkpoint that has seen the trouble. Raises Diverged where that is none."""
    settle(job)
    kept = ""
    if job.here.first:
        checkpoint.drop_after(job.folder, verdict.since)
        found = checkpoint.latest(job.folder, job.log.say)
        kept = found.name if found else ""
    if not (kept := job.here.share(kept)):
        raise Diverged(f"{verdict.words}; there is no checkpoint from before step {verdict.since} to roll back to")
    job.log.say(f"rolling back to {kept}; the steps from {verdict.since} to where the alarm was heard are passed over")
