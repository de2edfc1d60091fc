"""A run, from the first step to the last checkpoint."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from medfast.training import checkpoint, deepspeed_engine, start
from medfast.training.distributed import World, world
from medfast.training.log import Log, environment, versions
from medfast.training.settings import Optim, Train
from medfast.training.step import train_step
from medfast.training.strategies import AllReduce, Strategy
from medfast.training.validate import validate
from medfast.types import Batch, Objective

__all__ = ["PREEMPTED", "pretrain"]

PREEMPTED = 75  # exit code: stopped by a signal, after a checkpoint was saved


@dataclass(frozen=True)
class Job:
    """What the parts of a run need to know; nothing in it is replaced while it runs."""

    objective: Objective
    train: Train
    optim: Optim
    here: World
    log: Log
    folder: Path
    facts: Mapping[str, Any]
    stop: threading.Event


def pretrain(objective: Objective, config: Mapping[str, Any], stream, holdout) -> None:
    """Run ``config`` in its folder ``config["out"]``, from the start or from the newest checkpoint there.

    objective: freshly built, on the CPU. stream, holdout: ``medfast.data.loader.Stream`` of the two splits. Raises
    ValueError for settings that cannot run, ``Diverged`` at a loss that is not finite, SystemExit(75) when SIGTERM or
    SIGUSR1 came and a checkpoint was saved. Under torchrun these reach the log only: it exits with 1, whatever the exit
    code of the rank that failed, so a script that tells 75 from 2, 3 and 4 must read the "exitcode" that torchrun logs.
    """
    resolved, train, optim = start.resolve(config)
    section = resolved.get("deepspeed")
    deepspeed_engine.check(section, optim, train)
    folder = Path(resolved["out"])
    with world() as here, _signals() as stop, closing(stream), closing(holdout):
        share, micro = train.shares(here.size)
        _group(objective, micro, here)
        if here.first:
            folder.mkdir(parents=True, exist_ok=True)
        with closing(Log(folder, quiet=not here.first)) as log:
            job = Job(objective, train, optim, here, log, folder, start.fingerprint(resolved, stream.volumes), stop)
            first, moments = _restore(job, resolved.get("init"))
            _tell(job, resolved, first, share // micro, (stream, holdout))
            strategy = _strategy(job, share // micro, section)
            if moments:
                strategy.load_moments(moments)
            if train.compile:
                objective.compile()
            preempted = _run(job, strategy, first, stream, holdout)
    if preempted:
        raise SystemExit(PREEMPTED)


def _group(objective: Objective, micro: int, here: World) -> None:
    """Let groups of samples reach over ranks; ValueError where the ranks' micro-batches are no whole groups."""
    together = here.size * micro
    if together % objective.group:
        raise ValueError(
            f"objective.group={objective.group} consecutive samples are taken together, but {here.size} rank(s) x "
            f"micro-batches of {micro} are {together} at a time, which is no multiple of it: change objective.group, "
            "train.batch or train.micro"
        )
    objective.gather = here.gather


def _strategy(job: Job, accumulate: int, section: Mapping[str, Any] | None) -> Strategy:
    arguments = (job.objective, job.optim, job.train, job.here, accumulate)
    return AllReduce(*arguments) if job.train.strategy == "ddp" else deepspeed_engine.Engine(*arguments, section)


def _restore(job: Job, init: Mapping[str, Any] | None) -> tuple[int, Mapping[str, torch.Tensor]]:
    """Weights to begin with, on the rank's device, equal on all ranks: (first step, moments, {} at a fresh start)."""
    objective, train, here = job.objective, job.train, job.here
    dtype = torch.float64 if train.precision == "fp64" else torch.float32
    objective.to(here.device, dtype).train()
    if objective.teacher is not None:
        objective.teacher.to(here.device, dtype)
    found = checkpoint.latest(job.folder, job.log.say) if here.first else None
    name = here.share(found.name if found else "")
    newest = job.folder / "ckpt" / name if name else None
    if newest is not None and train.resume == "never":
        raise ValueError(f"train.resume=never, but {job.folder} holds {newest.name}: give another out=FOLDER")
    if newest is None and train.resume == "must":
        raise ValueError(f"train.resume=must, but {job.folder} holds no whole checkpoint")
    first, moments = 0, {}
    if newest is not None:
        parts, meta = checkpoint.load(newest)
        start.check_same(meta["settings"], job.facts, train.resume_changed, job.log.say)
        checkpoint.restore(objective, parts)
        first, moments = meta["step"], parts["optimizer"]
        if init:
            job.log.say(f"init is not read: the run folder holds {newest.name}, and the run goes on from there")
    else:
        if init:
            start.initialise(objective, init, job.log.say)
        if objective.teacher is not None:
            objective.teacher.copy_({**dict(objective.named_parameters()), **dict(objective.named_buffers())})
    here.agree("its parameters at the start", _digest(objective))
    return first, moments


def _run(job: Job, strategy: Strategy, first: int, stream, holdout) -> bool:
    """All steps from ``first`` on; True if a signal ended them early."""
    train, here = job.train, job.here
    share, micro = train.shares(here.size)
    batches = _on(stream.run(_schedule(first, train, here)), train, here)
    for step in range(first, train.steps):
        begin, waited = time.perf_counter(), stream.waited
        stopping = job.stop.is_set()
        row, stop = train_step(job.objective, strategy, batches, step, train, job.optim, here, share // micro, stopping)
        done, last = step + 1, step + 1 == train.steps
        row["time"] = {"step_s": time.perf_counter() - begin, "wait_s": stream.waited - waited}
        if train.validate_crops and (last or train.validate_every and done % train.validate_every == 0):
            begin = time.perf_counter()
            row["validation"], gauges = validate(job.objective, holdout, train, step / train.steps, here)
            row["gauge"] |= gauges
            row["time"]["validation_s"] = time.perf_counter() - begin
        job.log.row(row)
        if stop or last or train.checkpoint_every and done % train.checkpoint_every == 0:
            _save(job, strategy, done)
        if stop and not last:
            job.log.say(f"stopped by a signal after {done} steps; the same command goes on from here")
            return True
    return False


def _schedule(first: int, train: Train, here: World) -> Iterator[tuple[int, list[int]]]:
    """(step, global slots) of this rank's micro-batches: those of all ranks at a time are consecutive slots, in order
    of rank, so that groups of consecutive slots meet whatever the number of ranks and of micro-batches."""
    _, micro = train.shares(here.size)
    for step in range(first, train.steps):
        for begin in range(here.rank * micro, train.batch, here.size * micro):
            yield step, list(range(begin, begin + micro))


def _on(batches: Iterator[Batch], train: Train, here: World) -> Iterator[Batch]:
    """Batches on the rank's device, in the run's precision."""
    cuda = here.device.type == "cuda"
    dtype = torch.float64 if train.precision == "fp64" else None
    for batch in batches:
        moved = (_pinned(batch) if cuda else batch).to(here.device, dtype)
        # a number of Python's would be copied to the device by every draw, and compiled in as a constant
        if cuda or train.compile:
            moved = replace(moved, key=moved.key._replace(step=torch.tensor(moved.key.step, device=here.device)))
        yield moved


def _pinned(batch: Batch) -> Batch:
    """The batch with its large tensors in page-locked memory, from which a copy to the device does not wait."""
    return replace(
        batch,
        views=tuple(x.pin_memory() for x in batch.views),
        valid=tuple(None if x is None else x.pin_memory() for x in batch.valid),
        targets={name: tuple(x.pin_memory() for x in per_view) for name, per_view in batch.targets.items()},
    )


def _save(job: Job, strategy: Strategy, done: int) -> None:
    parts = {**checkpoint.describe(job.objective), "optimizer": strategy.moments()}
    if job.here.first:
        meta = {
            "seed": job.train.seed,
            "cursor": {"step": done, "slot": 0},
            "ranks": job.here.size,
            "settings": job.facts,
            "settings_hash": hashlib.sha256(json.dumps(job.facts, sort_keys=True).encode()).hexdigest(),
            "versions": versions(),
        }
        checkpoint.save(job.folder, done, parts, meta, job.train.keep_last, job.log.say)
    job.here.barrier()


def _tell(job: Job, resolved: Mapping[str, Any], first: int, accumulate: int, streams: tuple) -> None:
    """Write down what is run, and say what a reader should know before it starts."""
    job.log.begin(first, job.train.steps, job.train.batch)
    if job.here.first:
        import yaml

        (job.folder / "config.resolved.yaml").write_text(yaml.safe_dump(_plain(resolved), sort_keys=False))
        (job.folder / "env.json").write_text(json.dumps(environment(job.here.size), indent=1))
    trained = sum(p.numel() for p in job.objective.parameters() if p.requires_grad)
    begun = f"resuming after {first} steps" if first else "starting"
    job.log.say(
        f"{begun}: {job.train.steps} steps of {job.train.batch} samples on {job.here.size} rank(s) x {accumulate} "
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


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """An event that SIGTERM or SIGUSR1 sets; the old handlers come back at the end."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    old = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
