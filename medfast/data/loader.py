"""From a store to micro-batches: plans samples, cuts boxes, lets an executor make views of them, ahead of the consumer.

Threads do the work: reading, PyTorch and DALI all release the interpreter, errors arrive where the batch is asked for,
and nothing survives the process.
"""

from __future__ import annotations

import hashlib
import inspect
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import medfast_kernels as mk
from medfast.types import Batch
from medfast_kernels import Key, Role

from . import cutout as cutting
from . import plan as planning
from .executor_dali import DaliExecutor
from .executor_torch import TorchExecutor, gibbs
from .store import DataError, Store
from .threads import one_thread

__all__ = ["Stream", "open_stream"]

Ahead = Callable[[tuple[int, ...]], Mapping[str, Callable[[Key], Tensor]]]

AIR = -1024  # HU outside a volume
_SPLITS = ("train", "holdout")
_EXECUTORS = ("torch", "dali")


def split_volumes(ids: Sequence[str], holdout: float) -> tuple[list[int], list[int]]:
    """Indices of the training and held-out volumes, by the hash of their ids: a volume keeps its side as a store grows.

    At least one volume on each side; a single volume is on both.
    """
    if len(ids) == 1:
        return [0], [0]
    share = [int.from_bytes(hashlib.sha256(i.encode()).digest()[:8], "big") / 2.0**64 for i in ids]
    order = sorted(range(len(ids)), key=share.__getitem__)
    count = min(max(sum(s < holdout for s in share), 1), len(ids) - 1)
    return sorted(order[count:]), sorted(order[:count])


class Stream:
    """Batches of one split of a store; batch (step, slots) is a pure function of the seed and the data section.

    store: folder written by ``medfast data prepare``. size: voxels of a view, one number or three. window: HU of 0 and
    of 1, applied once. parent: views are cut inside a common box of this many times the size, a number or [low, high]
    drawn per axis. zoom: views cover [low, high] times the size, drawn per axis, and are resized (trilinear).
    intensity: {name: {p, range}}, see ``intensity``. foreground: keep views inside the body box, or around it where
    they are larger. rotate, flip: quarter turns and flips in the plane of the last two axes, in all views or as one
    says for each. cutout: RCR's, true or {share, side, swap}, see ``cutout``. executor: "torch" or "dali"; same views
    within 2e-4. workers: threads that work ahead, 0 for none. holdout: share of volumes kept from training. The rest
    comes from training: seed, batch (global, samples a step), views, split ("train" or "holdout"), ahead (of a view's
    size: target name -> function of the stacked key, see ``Objective.ahead``).

    waited: seconds the consumer of ``run`` has waited. note: a sentence about the split that the user should read, or
    None. volumes: ids of this split. Volumes shorter than a view are padded with -1024 HU and marked in
    ``Batch.valid``. Errors: ValueError for bad arguments, ``DataError`` with the volume's id for damaged data.
    """

    def __init__(
        self, store: str | Path, *, size: int | Sequence[int], window: Sequence[float] = (-500.0, 500.0),
        parent: float | Sequence[float] | None = None, zoom: Sequence[float] | None = None,
        intensity: dict | None = None, foreground: bool = False, rotate: bool | Sequence[bool] = False,
        flip: bool | Sequence[bool] = False, cutout: dict | bool | None = None, executor: str = "torch",
        workers: int = 1, holdout: float = 0.05, seed: int = 0, batch: int = 1, views: int = 2, split: str = "train",
        ahead: Ahead | None = None,
    ):  # fmt: skip
        self.recipe = planning.recipe(
            size=size, views=views, parent=parent, zoom=zoom, intensity=intensity, foreground=foreground,
            rotate=rotate, flip=flip, cutout=cutout,
        )  # fmt: skip
        _check(window=window, executor=executor, workers=workers, holdout=holdout, batch=batch, split=split)
        self.store = Store(store)
        if not len(self.store):
            raise DataError(f"the store {store} has no volumes; fill it with: medfast data prepare INPUT --store STORE")
        if self.store.recipe.get("dimensions", 3) != 3 or self.store.recipe.get("channels"):
            raise ValueError(f"the store {store} holds pictures or channels; the loader cuts volumes of one channel")
        self.seed, self.batch_size, self.workers = seed, batch, workers
        self.window = (float(window[0]), float(window[1]))
        self._stream, self._executor = _SPLITS.index(split), executor
        records = self.store.records
        self._members = np.array(split_volumes([r["id"] for r in records], holdout)[self._stream])
        self.volumes = [records[i]["id"] for i in self._members]
        self.note = None
        if len(records) == 1 and split == "holdout":
            self.note = f"the store has one volume, {self.volumes[0]}: held-out crops show what is trained on"
        self._shapes = np.array([records[i]["shape"] for i in self._members], dtype=np.int64)
        self._bodies = np.array([records[i]["body"] for i in self._members], dtype=np.int64)
        self.waited = 0.0
        self._local, self._pools = threading.local(), []
        self._ahead = {} if ahead is None else ahead(self.recipe.size)
        self._make()  # a missing DALI is reported now, not by the first batch

    def batch(self, step: int, slots: Sequence[int] | Tensor) -> Batch:
        """Samples ``slots`` (b,) of the global batch of ``step``, in that order: fp32 views (b, 1, *size) on the CPU.

        ``params``: "volume" (b,), index into ``store.records``, and each intensity number (b, views).
        """
        rows = torch.as_tensor(slots, dtype=torch.int64).reshape(-1)
        if not len(rows) or int(rows.min()) < 0 or int(rows.max()) >= self.batch_size:
            raise ValueError(f"slots must be in [0, batch) = [0, {self.batch_size}), at least one, got {rows.tolist()}")
        views, plan = self._views(step, rows)
        params = {name: torch.from_numpy(value) for name, value in {**plan.params, **plan.turns}.items()}
        params["volume"] = torch.from_numpy(self._members[plan.volume])
        boxes = torch.from_numpy(plan.boxes.astype(np.float32))
        key, marks, targets = Key(self.seed, step, rows), self._mark(views, plan), {}
        with one_thread():
            for name, make in self._ahead.items():
                targets[name] = make(key.stack(len(views))).chunk(len(views))
            if self.recipe.cutout is not None:
                targets["uncut"], views = views, self._cut_out(views, step, rows)
        return Batch(views, boxes, key, marks, params, targets)

    @property
    def gives(self) -> frozenset[str]:
        """Names in ``params`` and ``targets`` of its batches that an objective may need."""
        turns = {name for name, on in (("rotation", self.recipe.rotate), ("flip", self.recipe.flip)) if any(on)}
        return frozenset({*turns, *self._ahead, *(["uncut"] if self.recipe.cutout else [])})

    def _views(self, step: int, rows: Tensor) -> tuple[tuple[Tensor, ...], planning.Plan]:
        """Views of these slots as the plan has them, before any cut-out, and the plan."""
        plan = planning.plan(self.recipe, self._shapes, self._bodies, seed=self.seed, batch=self.batch_size, step=step,
                             slots=rows, stream=self._stream)  # fmt: skip
        places = [(i, v) for v in range(self.recipe.views) for i in range(len(rows))]
        numbers = {name: value.T.ravel() for name, value in plan.params.items()}
        with one_thread():
            made = self._make()([
                plan.oriented(self._cut(int(plan.volume[i]), plan.start[i, v], plan.extent[i, v]), i, v)
                for i, v in places
            ], numbers)  # fmt: skip
            for place in np.flatnonzero(numbers.get("gibbs", 0)):
                made[place, 0] = gibbs(made[place, 0], float(numbers["gibbs"][place]))
        views = tuple(made.reshape(self.recipe.views, len(rows), 1, *self.recipe.size).unbind(0))
        if "noise" in plan.params:
            self._add_noise(views, rows, step, torch.from_numpy(plan.params["noise"]))
        return views, plan

    def _cut_out(self, views: Sequence[Tensor], step: int, rows: Tensor) -> tuple[Tensor, ...]:
        """The views with RCR's boxes in them. A partner may be any slot, so a rank makes its views again."""
        settings = self.recipe.cutout
        assert settings is not None
        wanted = cutting.partners(Key(self.seed, step, rows), self.batch_size, self._stream)
        swaps = [i for i in range(len(rows)) if settings.swap and wanted[i] != int(rows[i])]
        others: tuple[Tensor, ...] = ()
        if swaps:
            others, plan = self._views(step, torch.from_numpy(wanted[swaps]))
            self._mark(others, plan)
        return tuple(
            torch.stack([
                cutting.cut(view[i], others[v][swaps.index(i)] if i in swaps else None, settings,
                            Key(self.seed, step, rows[i : i + 1]), v, self._stream)
                for i in range(len(rows))
            ])
            for v, view in enumerate(views)
        )  # fmt: skip

    def run(self, schedule: Iterable[tuple[int, Sequence[int] | Tensor]]) -> Iterator[Batch]:
        """The batches of ``schedule``, pairs (step, slots), in its order, made up to workers + 1 batches ahead."""
        if self.workers == 0:
            for step, slots in schedule:
                begin = time.perf_counter()
                batch = self.batch(step, slots)
                self.waited += time.perf_counter() - begin
                yield batch
            return
        torch.get_num_threads()  # settles this thread's count before workers change theirs
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="medfast-data")
        self._pools.append(pool)
        todo, ahead = iter(schedule), deque()
        try:
            while True:
                while len(ahead) <= self.workers and (item := next(todo, None)) is not None:
                    ahead.append(pool.submit(self.batch, *item))
                if not ahead:
                    return
                yield self._wait(ahead.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            self._pools.remove(pool)

    def close(self) -> None:
        """Stop all work ahead. An iterator of ``run`` that is still in use cannot go on afterwards."""
        for pool in list(self._pools):
            pool.shutdown(wait=True, cancel_futures=True)

    def _wait(self, future: Future[Batch]) -> Batch:
        begin = time.perf_counter()
        try:
            return future.result()
        finally:
            self.waited += time.perf_counter() - begin

    def _make(self) -> TorchExecutor | DaliExecutor:
        """This thread's executor: a DALI pipeline must not be shared."""
        if not hasattr(self._local, "executor"):
            recipe = self.recipe
            self._local.executor = (
                TorchExecutor(recipe.size, self.window) if self._executor == "torch"
                else DaliExecutor(recipe.size, self.window, zoom=recipe.zoom is not None,
                                  names=[c.name for c in recipe.changes], most=self.batch_size * recipe.views)
            )  # fmt: skip
        return self._local.executor

    def _volume(self, member: int) -> np.ndarray:
        """Memory map of a volume of this split; not kept, as a large store has more volumes than a process can map."""
        index = int(self._members[member])
        try:
            return self.store.volume(index)
        except (OSError, ValueError) as error:  # damaged after the store's own check at first touch
            raise DataError(f"volume {self.store.records[index]['id']} cannot be read any more: {error}") from error

    def _cut(self, member: int, start: np.ndarray, extent: np.ndarray) -> np.ndarray:
        """The voxels of a box, int16, contiguous; what lies outside the volume is air."""
        voxels = self._volume(member)
        low, high = np.maximum(start, 0), np.minimum(start + extent, voxels.shape)
        inside = voxels[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
        if (high - low == extent).all():
            return np.array(inside)
        box = np.full(extent, AIR, dtype=np.int16)
        box[tuple(slice(a, b) for a, b in zip(low - start, high - start, strict=True))] = inside
        return box

    def _add_noise(self, views: Sequence[Tensor], slots: Tensor, step: int, sigma: Tensor) -> None:
        for index, view in enumerate(views):
            for row in torch.nonzero(sigma[:, index]).flatten().tolist():
                key = Key(self.seed, step, slots[row : row + 1]).at(Role.NOISE, view=index, layer=self._stream)
                noise = mk.random_normal(self.recipe.size, key=key)
                view[row, 0].add_(noise[0], alpha=float(sigma[row, index])).clamp_(0.0, 1.0)

    def _mark(self, views: Sequence[Tensor], plan: planning.Plan) -> tuple[Tensor | None, ...]:
        """``Batch.valid``; sets padding to the window's floor, which resizing and intensity changes may have moved."""
        low, high = self.window
        floor, full, marks = max(0.0, min(1.0, (AIR - low) / (high - low))), torch.ones(self.recipe.size).bool(), []
        for v, view in enumerate(views):
            found = [planning.valid(plan.start[i, v], plan.extent[i, v], self._shapes[m], self.recipe.size)
                     for i, m in enumerate(plan.volume)]  # fmt: skip
            found = [None if mark is None else torch.from_numpy(plan.oriented(mark.numpy(), i, v))
                     for i, mark in enumerate(found)]  # fmt: skip
            for row, mark in enumerate(found):
                if mark is not None:
                    view[row, 0].masked_fill_(~mark, floor)
            padded = any(mark is not None for mark in found)
            marks.append(torch.stack([full if mark is None else mark for mark in found]) if padded else None)
        return tuple(marks)


def _check(*, window, executor, workers, holdout, batch, split) -> None:
    if len(window) != 2 or not window[0] < window[1]:
        raise ValueError(f"data.window is [low, high] in HU with low < high, got {window!r}")
    if executor not in _EXECUTORS:
        raise ValueError(f"data.executor is one of {list(_EXECUTORS)}, got {executor!r}")
    if not isinstance(workers, int) or workers < 0:
        raise ValueError(f"data.workers is a number of threads, 0 for none, got {workers!r}")
    if not 0.0 < holdout < 1.0:
        raise ValueError(f"data.holdout is a share of the volumes between 0 and 1, both excluded, got {holdout!r}")
    if not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch is the number of samples of a step, at least 1, got {batch!r}")
    if split not in _SPLITS:
        raise ValueError(f"split is one of {list(_SPLITS)}, got {split!r}")


def open_stream(data: dict, *, seed: int, batch: int, views: int, split: str, ahead: Ahead | None = None) -> Stream:
    """The stream of a configuration's data section, whose keys are ``Stream``'s. ValueError names an unknown key."""
    given = {"seed", "batch", "views", "split", "ahead"}
    known = set(inspect.signature(Stream).parameters) - given
    unknown, missing = sorted(set(data) - known), sorted({"store", "size"} - set(data))
    if unknown or missing:
        raise ValueError(f"data: unknown {unknown}, missing {missing}; it takes {sorted(known)}")
    return Stream(**data, seed=seed, batch=batch, views=views, split=split, ahead=ahead)
