"""A step of a run once more: the batch, the masks and the losses of one rank, bit for bit.

The weights of the step come from the newest state at or before it: a checkpoint of the run, what was captured of a
skipped step (``capture``), or the start. From the step's own state one process rebuilds any rank, by playing all of
them where ranks see each other's samples. From an older one the steps between are trained again, which takes as many
ranks as the run had: the order in which they add gradients up decides the last bit.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medfast.training import begin, capture, checkpoint, feed, start
from medfast.training.distributed import world
from medfast.training.health import Health
from medfast.training.job import Job
from medfast.training.log import Log, versions
from medfast.training.loop import PASSED, strategy_of
from medfast.training.step import train_step
from medfast.training.strategies import Strategy, products
from medfast.training.watchdog import Watchdog
from medfast.training.writer import Writer
from medfast.types import Batch, Objective

__all__ = ["replay"]


def replay(
    objective: Objective, config: Mapping[str, Any], stream, run: Path, step: int, rank: int,
    say: Callable[[str], None] = print,
) -> bool | None:  # fmt: skip
    """Rebuild what ``rank`` saw and computed in ``step`` of the run in folder ``run``.

    objective: freshly built, on the CPU; config: the run's own, config.resolved.yaml; stream: of its training split.
    Writes ``run``/replay/step_..._rank_....json, and the tensors beside it (.safetensors). Returns whether everything
    equals what the run wrote down, None where it wrote nothing down that can be compared. Raises ValueError for a step
    or rank that the run does not have, and where this launch has not the ranks that the steps before it need.
    """
    resolved, train, optim = start.resolve(config)
    rows = _rows(run)
    env = json.loads((run / "env.json").read_text())
    torch.set_num_threads(env["threads"])
    state = _state(run, step, say)
    meta = checkpoint.load(state)[1] if state is not None else {}
    ranks, begun = meta.get("ranks", env["ranks"]), meta.get("step", 0)
    if not 0 <= step < train.steps or not 0 <= rank < ranks:
        last = train.steps - 1
        raise ValueError(f"the run has steps 0 to {last} and ranks 0 to {ranks - 1}, not step {step}, rank {rank}")
    if rows.get(step, {}).get("skipped") == PASSED:
        raise ValueError(f"step {step} was {PASSED}: the run did not compute it")
    _warn(meta, say)
    with ExitStack() as stack:
        here = stack.enter_context(world(train.watchdog_s))
        if here.size != ranks and (here.size > 1 or begun < step):
            raise ValueError(
                f"the newest state at or before step {step} is that of step {begun}, on {ranks} rank(s); this launch "
                f"has {here.size}. Start it as: torchrun --nproc_per_node {ranks} -m medfast replay ..."
            )
        stack.enter_context(products(train.matmul))
        stack.enter_context(closing(stream))
        train = replace(train, micro=train.shares(ranks, objective.group)[1])
        facts = start.fingerprint(resolved, stream.volumes)
        watch = stack.enter_context(Watchdog(here, train.watchdog_s))
        job = Job(objective, train, optim, here, Log(run, quiet=True), run, facts, threading.Event(), watch, Writer(),
                  Health(train), deque(maxlen=train.batch))  # fmt: skip
        objective.gather = here.gather
        strategy = _weights(job, resolved, state, here.size == ranks, say)
        job.health.passed = {number for number, row in rows.items() if row.get("skipped") == PASSED}
        same = []
        if strategy is not None:
            same += _again(job, strategy, stream, rows, range(begun, step), say)
        own = here.rank if here.size == ranks else rank
        found, tensors = _rebuilt(job, strategy, stream, step, own, ranks)
        if strategy is not None:
            same += _again(job, strategy, stream, rows, range(step, step + 1), say)
        if own == rank:
            same += _recorded(run, step, rank, found)
            _write(run, step, rank, {"state": state.name if state else "the start", "batches": found}, tensors, say)
    return all(same) if same else None


def _rows(run: Path) -> dict[int, dict[str, Any]]:
    """The metrics of the run by step."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return {row["step"]: row for row in map(json.loads, filter(lambda line: line.endswith("}"), lines))}


def _state(run: Path, step: int, say: Callable[[str], None]) -> Path | None:
    """What was captured of ``step``, else the newest whole checkpoint at or before it; None: the start."""
    captured = checkpoint.latest(run / capture.FOLDER, say, until=step)
    if captured is not None and checkpoint.load(captured)[1]["step"] == step:  # it has no moments to train on with
        return captured
    return checkpoint.latest(run, say, until=step)


def _warn(meta: Mapping[str, Any], say: Callable[[str], None]) -> None:
    odd = {name: (then, versions().get(name)) for name, then in meta.get("versions", {}).items()
           if versions().get(name) != then}  # fmt: skip
    if odd:
        told = ", ".join(f"{name} was {then}, is {now}" for name, (then, now) in odd.items())
        say(f"other versions than the run's: {told}; the last bits may differ")


def _weights(
    job: Job, resolved: Mapping[str, Any], state: Path | None, alike: bool, say: Callable[[str], None]
) -> Strategy | None:
    """Fill the objective; a strategy to train it with where this launch is like the run's."""
    begin.place(job)
    moments: Mapping[str, Tensor] = {}
    if state is None:
        begin.fresh(job, resolved.get("init"))
    else:
        parts, meta = checkpoint.load(state)
        start.check_same(meta["settings"], job.facts, False, say)
        checkpoint.restore(job.objective, parts)
        moments = parts["optimizer"]
    if not alike:
        return None
    strategy = strategy_of(job, resolved.get("deepspeed"))
    if moments:
        strategy.load_moments(moments)
    return strategy


def _again(
    job: Job, strategy: Strategy, stream, rows: Mapping[int, Mapping], steps: range, say: Callable[[str], None]
) -> list[bool]:
    """Train ``steps`` once more; for each step whether its row is the run's."""
    same = []
    plan = (item for item in feed.schedule(steps.start, job.train, job.here, job.health.passed) if item[0] in steps)
    batches = feed.moved((stream.batch(*item) for item in plan), job.train, job.here)
    for step in steps:
        if step in job.health.passed:
            continue
        row, _ = train_step(job, strategy, batches, step, lambda: ())
        if step in rows:
            same.append(all(row.get(key) == rows[step].get(key) for key in ("loss", "total", "grad_norm", "skipped")))
            if not same[-1]:
                say(f"step {step} differs from the run's: loss {row['loss']} now, {rows[step]['loss']} then")
    return same


def _rebuilt(
    job: Job, strategy: Strategy | None, stream, step: int, rank: int, ranks: int
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """(what ``capture.examine`` says of each micro-batch of a rank, their tensors)."""
    found, tensors = [], {}
    with strategy.whole() if strategy is not None else nullcontext(job.objective) as objective:
        for number, slots in enumerate(feed.slots(rank, ranks, job.train)):
            batch = stream.batch(step, slots)
            if job.here.size != ranks and objective.group > 1:
                others = [stream.batch(step, feed.slots(other, ranks, job.train)[number]) for other in range(ranks)]
                objective.gather = _Played(_rows_of_all(job, objective, others, step), rank)
            about, masks = capture.examine(job, objective, batch, step)
            found.append(about)
            tensors |= {f"micro_{number}/view_{v}": x for v, x in enumerate(batch.views)}
            tensors |= {f"micro_{number}/mask_{v}": x for v, x in enumerate(masks)}
            tensors |= {f"micro_{number}/{name}_{v}": x for name, per_view in batch.targets.items()
                        for v, x in enumerate(per_view)}  # fmt: skip
    return found, tensors


class _Wanted(Exception):
    """Rows that a forward pass wants gathered, and cannot go on without."""

    def __init__(self, rows: Tensor):
        self.rows = rows


class _Played:
    """``World.gather`` of one rank for a process that plays all ranks in turn. known: rows of all, call after call."""

    def __init__(self, known: list[Tensor], rank: int):
        self.known, self.rank = known, rank
        self._calls: Iterator[Tensor] = iter(known)

    def __call__(self, rows: Tensor) -> tuple[Tensor, int]:
        whole = next(self._calls, None)
        if whole is None:
            raise _Wanted(rows.detach())
        return whole, self.rank * len(rows)


def _rows_of_all(job: Job, objective: Objective, batches: list[Batch], step: int) -> list[Tensor]:
    """Rows of all ranks in every gathering of a forward pass: a pass gets as far as is known, and tells one more."""
    known: list[Tensor] = []
    while True:
        wanted = []
        for rank, batch in enumerate(batches):
            objective.gather = _Played(known, rank)
            try:
                capture.examine(job, objective, batch, step)
            except _Wanted as want:
                wanted.append(want.rows)
        if not wanted:
            return known
        known.append(torch.cat(wanted))


def _recorded(run: Path, step: int, rank: int, found: list[dict[str, Any]]) -> list[bool]:
    """Whether each micro-batch is what was captured of it, [] where nothing was."""
    file = capture.record(run, step, rank)
    if not file.exists():
        return []
    then = json.loads(file.read_text())["batches"]
    return [len(then) == len(found), *(a == b for a, b in zip(then, json.loads(json.dumps(found)), strict=False))]


def _write(
    run: Path, step: int, rank: int, about: Mapping[str, Any], tensors: Mapping[str, Tensor], say: Callable[[str], None]
) -> None:
    from safetensors.torch import save_file

    file = run / "replay" / f"step_{step:08d}_rank_{rank:05d}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(about, indent=1))
    alone = {name: x.detach().cpu().clone().contiguous() for name, x in tensors.items()}
    save_file(alone, file.with_suffix(".safetensors"))
    for number, batch in enumerate(about["batches"]):
        told = ", ".join(f"{name} = {value}" for name, value in batch["losses"].items())
        say(f"step {step}, rank {rank}, micro-batch {number}, slots {batch['slots']}: {told}")
    say(f"batch and masks are in {file.with_suffix('.safetensors')}, plan and digests in {file.name}")
