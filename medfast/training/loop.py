"""A run, from the first step to the last checkpoint."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from medfast.training import begin, deepspeed_engine, feed, saving, start
from medfast.training.alarms import Verdict
from medfast.training.capture import capture
from medfast.training.distributed import world
from medfast.training.health import Diverged, Health
from medfast.training.job import Job
from medfast.training.left_out import LeftOut
from medfast.training.log import Log
from medfast.training.step import train_step
from medfast.training.strategies import AllReduce, Strategy, products
from medfast.training.validate import validate
from medfast.training.waiting import Waiting
from medfast.training.watchdog import Watchdog
from medfast.training.writer import Writer
from medfast.types import Objective

__all__ = ["PASSED", "PREEMPTED", "pretrain", "strategy_of"]

PREEMPTED = 75  # exit code: stopped by a signal, after a checkpoint was saved
PASSED = "passed over after a rollback"


def pretrain(objective: Objective, config: Mapping[str, Any], stream, holdout) -> None:
    """Run ``config`` in its folder ``config["out"]``, from the start or from the newest checkpoint there.

    objective: freshly built, on the CPU. stream, holdout: ``medfast.data.loader.Stream`` of the two splits. Raises
    ValueError for settings that cannot run, ``Diverged`` where an alarm stops it, ``RankLost`` for a rank that is
    hung or missing, ``SaveFailed`` for a disk that takes no checkpoint, SystemExit(75) when SIGTERM or SIGUSR1 came and
    a checkpoint was saved. Under torchrun these reach the log only: it exits with 1, whatever the exit code of the rank
    that failed, so a script that tells 75 from 2, 3 and 4 must read the "exitcode" that torchrun logs.
    """
    resolved, train, optim = start.resolve(config)
    deepspeed_engine.check(resolved.get("deepspeed"), optim, train)
    folder = Path(resolved["out"])
    with ExitStack() as stack:
        here = stack.enter_context(world(train.watchdog_s))
        stack.enter_context(products(train.matmul))
        stop = stack.enter_context(_signals())
        for open_stream in (stream, holdout):
            stack.enter_context(closing(open_stream))
        _, micro = train.shares(here.size, objective.group)
        train, objective.gather = replace(train, micro=micro), here.gather
        if here.first:
            folder.mkdir(parents=True, exist_ok=True)
        log = stack.enter_context(closing(Log(folder, quiet=not here.first)))
        watch = stack.enter_context(Watchdog(here, train.watchdog_s))
        writer = stack.enter_context(Writer())
        job = Job(objective, train, optim, here, log, folder, start.fingerprint(resolved, stream.volumes), stop, watch,
                  writer, Health(train), deque(maxlen=train.batch // here.size // micro))  # fmt: skip
        try:
            preempted = _attempts(job, resolved, stream, holdout)
        except RuntimeError as error:
            if (lost := watch.lost(error)) is None:
                raise
            raise lost from error
    if preempted:
        raise SystemExit(PREEMPTED)


def _attempts(job: Job, resolved: Mapping[str, Any], stream, holdout) -> bool:
    """The run from where its folder left off, and again from an older checkpoint after each rollback; True if a signal
    ended it early."""
    trouble: Verdict | None = None
    while True:
        first, moments = begin.restore(job, resolved.get("init"), again=trouble is not None)
        begin.tell(job, resolved, first, (stream, holdout))
        LeftOut(job, stream, holdout).recall()
        strategy = strategy_of(job, resolved.get("deepspeed"))
        if moments:
            strategy.load_moments(moments)
        if job.train.compile:
            job.objective.compile()
        outcome = _run(job, strategy, first, stream, holdout)
        if isinstance(outcome, bool):
            return outcome
        trouble = outcome
        saving.roll_back(job, trouble)
        strategy.close()


def strategy_of(job: Job, section: Mapping[str, Any] | None) -> Strategy:
    """What trains the job's objective."""
    arguments = (job.objective, job.optim, job.train, job.here, job.accumulate)
    return AllReduce(*arguments) if job.train.strategy == "ddp" else deepspeed_engine.Engine(*arguments, section)


def _run(job: Job, strategy: Strategy, first: int, stream, holdout) -> bool | Verdict:
    """All steps from ``first`` on: True if a signal ended them early, the verdict that asks to roll back if one did."""
    train, health, stalled = job.train, job.health, 0.0
    waiting, left_out = Waiting(stream), LeftOut(job, stream, holdout)
    with closing(stream.run(feed.schedule(first, train, job.here, health.passed))) as made:
        batches = feed.moved(made, train, job.here, job.seen)
        for step in range(first, train.steps):
            clock, asked = time.perf_counter(), (job.stop.is_set(), job.writer.failed)
            row, wishes = {"step": step, "skipped": PASSED, "loss": {}, "gauge": {}, "total": None}, (False,) * 3
            if step not in health.passed:
                row, wishes = train_step(job, strategy, batches, step, lambda asked=asked: (*asked, left_out.news))
            (stop, failed, damaged), done, last = wishes, step + 1, step + 1 == train.steps
            row["time"] = {"step_s": time.perf_counter() - clock, **waiting.taken(), "save_s": stalled}
            if train.validate_crops and (last or train.validate_every and done % train.validate_every == 0):
                _validate(job, strategy, holdout, row)
                damaged = True  # or may be, of those held out
            if damaged:
                left_out.unite()
            row |= {"damaged": len(job.damaged)} if job.damaged else {}
            job.log.row(row)
            if failed:
                saving.settle(job)
            verdict = _judge(job, strategy, row)
            if verdict is not None and verdict.action == "rollback":
                return verdict
            wanted = verdict is not None and verdict.action == "checkpoint"
            stalled = 0.0
            if stop or last or wanted or train.checkpoint_every and done % train.checkpoint_every == 0:
                stalled = saving.save(job, strategy, done)
            if stop and not last:
                saving.settle(job)
                left_out.say()
                job.log.say(f"stopped by a signal after {done} steps; the same command goes on from here")
                return True
    saving.settle(job)
    left_out.say()
    return False


def _validate(job: Job, strategy: Strategy, holdout, row: dict[str, Any]) -> None:
    """Put held-out losses and gauges into the row: rank 0's, so that all ranks judge the same row."""
    clock, step = time.perf_counter(), row["step"]
    job.watch.at(step, "validation")
    with strategy.whole() as objective:
        found = validate(objective, holdout, job.train, step / job.train.steps, job.here)
    row["validation"], gauges = json.loads(job.here.share(json.dumps(found)))
    row["gauge"] |= gauges
    row["time"]["validation_s"] = time.perf_counter() - clock


def _judge(job: Job, strategy: Strategy, row: dict[str, Any]) -> Verdict | None:
    """The one place where trouble is acted upon: the most severe verdict about this row, if there is any.

    Raises Diverged where a verdict is to stop, or too many steps were skipped.
    """
    if row.get("skipped") == PASSED:
        return None
    if "skipped" in row:
        capture(job, strategy, row)
        job.health.skip(row)
        return None
    verdicts = job.health.alarms.judge(row)
    for verdict in verdicts:
        job.log.say(f"alarm {verdict.alarm} ({verdict.action}): {verdict.words}")
    if not verdicts:
        return None
    if verdicts[0].action == "stop":
        raise Diverged(verdicts[0].words)
    if verdicts[0].action == "rollback":
        job.health.rollback(verdicts[0], row["step"])
    return verdicts[0]


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
