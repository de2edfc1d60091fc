"""From a store to micro-batches: plans samples, cuts boxes, lets an executor make views of them, ahead of the consumer.

Threads do the work, or processes under DALI: errors arrive where the batch is asked for, and so does word of a worker
that was killed or that no longer gets on.
"""

from __future__ import annotations

import inspect
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medfast.types import Batch
from medfast_kernels import Key, Role

from . import plan as planning
from .cutter import Cutter
from .executor_dali import DaliAhead, DaliExecutor, Source, require
from .executor_device import DeviceExecutor, beside, device_of, hand_over
from .executor_torch import TorchExecutor
from .finish import Finish
from .section import check, window_of
from .stage import staged
from .store import DataError, Store
from .threads import one_thread
from .watch import memory
from .workers import Workers

__all__ = ["Stream", "open_stream"]

Ahead = Callable[[tuple[int, ...]], Mapping[str, Callable[[Key], Tensor]]]

_GRACE = 5.0  # seconds in which DALI itself may say that one of its processes died


class Stream:
    """Batches of one split of a store; batch (step, slots) is a pure function of the seed and the data section.

    store: folder written by ``medfast data prepare`` or ``pack``. stage: a folder of this machine's own disk to copy it
    to first, shared by the ranks of a node. size: voxels of a view, one number, three, or two, [h, w], for pictures and
    axial slices, whose views have two axes. window: stored values, HU for CT, of 0 and of 1, applied once; None is the
    unit's own, (-500, 500) HU, 0 to 1000 per mille, or three deviations. parent: views are cut inside a common box of
    this many times the size, a number or [low, high] drawn per axis. zoom: views cover [low, high] times the size,
    drawn per axis, and are resized (trilinear). intensity: {name: {p, range}}, see ``intensity``. foreground: keep
    views inside the body box, or around it where they are larger. rotate, flip: quarter turns and flips in the plane of
    the last two axes, in all views or as one says for each. plain_holdout: neither these nor zoom in held-out views.
    cutout: RCR's, true or {share, side, swap}, see ``cutout``. executor: "torch" or "dali"; same views within 2e-4.
    device: where they are made, "cpu", or "cuda", the caller's GPU, which gets int16 boxes. workers: threads, or
    processes under DALI, that work ahead, or 0. holdout: share of patients kept from training. shuffle: false takes the
    volumes in turn. weights: how often each dataset comes, null, "equal" or {dataset: share}, see ``split.chances``.
    skip: damaged volumes that are left out, named and counted, before the run stops. patience: seconds without a batch
    after which a run stops and says where its workers are. The rest comes from training: seed, batch (global, samples a
    step), views, split ("train" or "holdout"), ahead (of a view's size: target name -> function of the stacked key,
    ``Objective.ahead``).

    waited: seconds the consumer has waited for ``run``. seconds(): what workers spent, by stage. damaged: id -> reason
    of the volumes left out. note: a sentence about the split that the user should read, or None. volumes: ids of this
    split. channels: of its views. Where a view reaches beyond its volume it is padded with what the store's unit has
    for nothing (-1024 HU for CT, 0 for MR), marked in ``Batch.valid``. Errors: ValueError for bad arguments,
    ``DataError`` with the volume's id and file for damaged data.
    """

    def __init__(
        self, store: str | Path, *, size: int | Sequence[int], window: Sequence[float] | None = None,
        parent: float | Sequence[float] | None = None, zoom: Sequence[float] | None = None,
        intensity: dict | None = None, foreground: bool = False, rotate: bool | Sequence[bool] = False,
        flip: bool | Sequence[bool] = False, plain_holdout: bool = False, cutout: dict | bool | None = None,
        executor: str = "torch", workers: int = 1, holdout: float = 0.05, shuffle: bool = True,
        weights: dict | str | None = None, device: str = "cpu", stage: str | None = None, skip: int = 0,
        patience: float = 600.0, seed: int = 0, batch: int = 1, views: int = 2, split: str = "train",
        ahead: Ahead | None = None,
    ):  # fmt: skip
        check(executor=executor, workers=workers, holdout=holdout, batch=batch, split=split, skip=skip,
              patience=patience)  # fmt: skip
        self.store = Store(store)
        if not len(self.store):
            raise DataError(f"the store {store} has no volumes; fill it with: medfast data prepare INPUT --store STORE")
        if split == "holdout" and plain_holdout:
            zoom, rotate, flip = None, False, False
        self.recipe = planning.recipe(
            size=size, views=views, parent=parent, zoom=zoom, intensity=intensity, foreground=foreground,
            rotate=rotate, flip=flip, cutout=cutout, dimensions=self.store.dimensions,
        )  # fmt: skip
        self.window = window_of(window, self.store.recipe)
        if stage is not None:
            self.store = staged(self.store, Path(stage), patience)
        self.cutter = Cutter(self.store, self.recipe, seed=seed, batch=batch, split=split, holdout=holdout,
                             weights=weights, shuffle=shuffle, skip=skip)  # fmt: skip
        self.batch_size, self.workers, self.channels = batch, workers, self.store.channels
        self.volumes = [self.store.records[i]["id"] for i in self.cutter.members]
        self.note = None
        if split == "holdout" and self.cutter.everything:
            self.note = (f"the store has one patient's volumes, {', '.join(self.volumes[:3])}: held-out crops show "
                         "what is trained on")  # fmt: skip
        self.waited = 0.0
        self._patience, self._executor, self._local = patience, executor, threading.local()
        self._device = device_of(device)
        self._finish = Finish(self.cutter, self.window, {} if ahead is None else ahead(self.recipe.size))
        self._pool = Workers(1 if executor == "dali" else max(1, workers), "medfast-data")
        self._ahead: DaliAhead | None = None
        if executor == "dali":
            require()  # a missing DALI is reported now, not by the first batch

    def batch(self, step: int, slots: Sequence[int] | Tensor) -> Batch:
        """Samples ``slots`` (b,) of the global batch of ``step``, in that order: fp32 views (b, c, *size) on the CPU.

        ``params``: "volume" (b,), index into ``store.records``, and each intensity number (b, views). Boxes are in
        stored voxels: 4 numbers for pictures, 6 for volumes.
        """
        self._device = device_of(self._device.type)
        return self._wait(self._pool.submit(self._batch, step, self._slots(slots)))

    @property
    def gives(self) -> frozenset[str]:
        """Names in ``params`` and ``targets`` of its batches that an objective may need."""
        turns = {name for name, on in (("rotation", self.recipe.rotate), ("flip", self.recipe.flip)) if any(on)}
        return frozenset({*turns, *self._finish.ahead, *(["uncut"] if self.recipe.cutout else [])})

    @property
    def damaged(self) -> dict[str, str]:
        return {self.volumes[member]: reason for member, reason in list(self.cutter.damaged.items())}

    def leave_out(self, volume: str, reason: str) -> None:
        """Do without a volume from here on, if it is of this split: another rank met its damage. DataError where it is
        one too many."""
        if volume in self.volumes:
            self.cutter.leave_out(self.volumes.index(volume), reason)

    def judge(self, volumes: Iterable[str]) -> None:
        """Leave out those of these volumes that are damaged, if they are of this split. DataError: as ``leave_out``."""
        for volume in volumes:
            if volume in self.volumes:
                self.cutter.judge(self.volumes.index(volume))

    @property
    def _processes(self) -> list[Any]:
        return [] if self._ahead is None else self._ahead.processes

    def seconds(self) -> dict[str, float]:
        """Stage of ``watch.STAGES`` -> seconds that all workers together have spent in it."""
        return self.cutter.watch.seconds()

    def run(self, schedule: Iterable[tuple[int, Sequence[int] | Tensor]]) -> Iterator[Batch]:
        """The batches of ``schedule``, pairs (step, slots), in its order, made up to workers + 1 batches ahead."""
        self._device = device_of(self._device.type)
        if self._executor == "dali" and self.workers:
            todo = [(step, self._slots(slots).tolist()) for step, slots in schedule]
            jobs = iter([(self._next, n, todo) for n in range(len(todo))])
        else:
            jobs = ((self._batch, step, self._slots(slots)) for step, slots in schedule)
        made: deque[Future[Batch]] = deque()
        try:
            while True:
                while len(made) < (self.workers + 1 if self.workers else 1) and (job := next(jobs, None)):
                    made.append(self._pool.submit(*job))
                if not made:
                    return
                begin = time.perf_counter()
                try:
                    batch = self._wait(made.popleft())
                finally:
                    self.waited += time.perf_counter() - begin
                yield batch
        finally:
            for future in made:
                future.cancel()

    def close(self) -> None:
        """Stop all work ahead. An iterator of ``run`` that is still in use cannot go on afterwards."""
        if self._ahead is not None:
            self._ahead.close()
        self._pool.close()
        self.cutter.watch.close()

    def _slots(self, slots: Sequence[int] | Tensor) -> Tensor:
        rows = torch.as_tensor(slots, dtype=torch.int64).reshape(-1)
        if not len(rows) or int(rows.min()) < 0 or int(rows.max()) >= self.batch_size:
            raise ValueError(f"slots must be in [0, batch) = [0, {self.batch_size}), at least one, got {rows.tolist()}")
        return rows

    def _wait(self, future: Future[Batch]) -> Batch:
        """The batch, or DataError where a worker process died or none gets on."""
        begin, gone = time.monotonic(), None
        while True:
            try:
                return hand_over(future.result(timeout=min(1.0, self._patience / 2)))
            except Late:
                if future.done():
                    raise
            now = time.monotonic()
            dead = [p for p in self._processes if p.exitcode is not None]
            gone = (gone or now) if dead else None
            if gone is not None and now - gone > _GRACE:
                raise self._died()
            if now - begin > self._patience:
                stuck = self.cutter.watch.stuck(self.store.file)
                for process in self._processes:
                    process.kill()
                raise DataError(f"no batch came for {now - begin:.0f} s (data.patience): {stuck}; {memory()}. Look at "
                                "the disk or the network file system that holds the store")  # fmt: skip

    def _died(self) -> DataError:
        dead = [process for process in self._processes if process.exitcode is not None]
        first = min(dead, key=lambda process: process.exitcode in (0, -signal.SIGTERM))  # DALI's word to the others
        return DataError(f"{self.cutter.watch.died(first.pid, first.exitcode, self.store.file)} Now {memory()}")

    def _batch(self, step: int, rows: Tensor) -> Batch:
        """Everything in this thread."""
        with one_thread(), beside(self._device):
            together, partners = self.cutter.together(step, rows)
            plan, boxes = self.cutter.cut(step, together)
            with self.cutter.watch.stage("make"):
                made = self._make()(boxes, plan.numbers, self._noise(step, together), plan.turned)
            return self._finish(step, together, partners, plan, made)

    def _next(self, number: int, schedule: Sequence[tuple[int, list[int]]]) -> Batch:
        """Batch ``number`` of a schedule, whose boxes processes have cut."""
        if number == 0:
            self._ahead = self._start(schedule)
        step, slots = schedule[number]
        with one_thread(), beside(self._device):
            together, partners = self.cutter.together(step, torch.tensor(slots))
            plan = self.cutter.plan(step, together)
            with self.cutter.watch.stage("make"):
                made, damaged = self._made(plan, self._noise(step, together))
            for member, reason in damaged.items():
                self.cutter.leave_out(member, reason)
            return self._finish(step, together, partners, self.cutter.plan(step, together, damaged), made)

    def _noise(self, step: int, slots: Tensor) -> Key:
        """The key of the noise of each view of each slot."""
        return Key(self.cutter.seed, step, slots).at(Role.NOISE, layer=self.cutter.stream).stack(self.recipe.views)

    def _made(self, plan: planning.Plan, noise: Key) -> tuple[Tensor, dict[int, str]]:
        assert self._ahead is not None
        try:
            return self._ahead.next(plan.numbers, noise)
        except DataError:
            raise
        except Exception as error:
            if any(process.exitcode is not None for process in self._processes):
                raise self._died() from error
            raise

    def _start(self, schedule: Sequence[tuple[int, list[int]]]) -> DaliAhead:
        if self._ahead is not None:  # of an earlier run
            self._ahead.close()
        return DaliAhead(Source(self.cutter, schedule), self.recipe.size, self.window, processes=self.workers,
                         depth=self.workers + 1, **self._graph())  # fmt: skip

    def _graph(self) -> dict[str, Any]:
        together = 2 if self.recipe.cutout else 1  # partners of the cut-out come with their samples
        return {"zoom": self.recipe.zoom is not None, "names": [change.name for change in self.recipe.changes],
                "most": together * self.batch_size * self.recipe.views, "device": self._device}  # fmt: skip

    def _make(self) -> TorchExecutor | DeviceExecutor | DaliExecutor:
        """This thread's executor: a pipeline and a buffer must not be shared."""
        if not hasattr(self._local, "executor"):
            recipe, graph = self.recipe, self._graph()
            if self._executor == "dali":
                made = DaliExecutor(recipe.size, self.window, **graph)
            elif self._device.type == "cpu":
                made = TorchExecutor(recipe.size, self.window)
            else:
                made = DeviceExecutor(recipe.size, self.window, self._device, most=graph["most"],
                                      extent=planning.largest(recipe), channels=self.channels)  # fmt: skip
            self._local.executor = made
        return self._local.executor


def open_stream(data: dict, *, seed: int, batch: int, views: int, split: str, ahead: Ahead | None = None) -> Stream:
    """The stream of a configuration's data section, whose keys are ``Stream``'s. ValueError names an unknown key."""
    given = {"seed", "batch", "views", "split", "ahead"}
    known = set(inspect.signature(Stream).parameters) - given
    unknown, missing = sorted(set(data) - known), sorted({"store", "size"} - set(data))
    if unknown or missing:
        raise ValueError(f"data: unknown {unknown}, missing {missing}; it takes {sorted(known)}")
    return Stream(**data, seed=seed, batch=batch, views=views, split=split, ahead=ahead)
