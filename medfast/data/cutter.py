"""The part of the loader that knows plan and store, and may run in a process of its own: boxes of voxels, on demand.

The boxes of (step, slots) are a pure function of the seed and the data section, whoever cuts them.
"""

from __future__ import annotations

import sys
from collections.abc import Container
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medfast_kernels import Key

from . import plan as planning
from .cutout import partners
from .layouts import Voxels
from .split import chances, split_volumes
from .store import DataError, Store
from .watch import Watch

__all__ = ["SPLITS", "Cutter"]

SPLITS = ("train", "holdout")
AIR = -1024  # HU outside a volume, for stores whose recipe does not say what lies there


class Cutter:
    """Plans the samples of one split and cuts their boxes. Picklable.

    batch: samples of a step over all ranks. holdout: share of patients kept from training. weights, shuffle: see
    ``split.chances`` and ``order.volumes``. skip: damaged volumes that may be left out before there is a DataError.

    members: indices of the split's volumes; everything: these are all there are; shapes (n, 3) and bodies (n, 6) of
    them, (1, h, w) for pictures. fill: what is stored where no scan was. damaged: member -> what is wrong with it,
    found as volumes are touched; the next sound volume comes in its place. tells: print a sentence about each.
    """

    def __init__(
        self, store: Store, recipe: planning.Recipe, *, seed: int, batch: int, split: str, holdout: float,
        weights: Any = None, shuffle: bool = True, skip: int = 0,
    ):  # fmt: skip
        if not shuffle and weights is not None:
            raise ValueError("data.shuffle=false goes through the volumes in turn, data.weights draws them: choose one")
        self.store, self.recipe, self.watch = store, recipe, Watch()
        self.seed, self.batch, self.stream = seed, batch, SPLITS.index(split)
        records = store.records
        self.members = np.array(split_volumes(records, holdout)[self.stream])
        self.everything = len(self.members) == len(records)
        self.fill = int(store.recipe.get("fill", AIR))
        self.damaged: dict[int, str] = {}
        self.tells = True
        self._skip, self._shuffle = skip, shuffle
        self._chances = chances(weights, [r.get("dataset") for r in records], self.members.tolist(), store.path)
        mine = [records[i] for i in self.members]
        self.shapes, self.bodies = (
            np.array([_with_depth(record, name) for record in mine], dtype=np.int64) for name in ("shape", "body")
        )

    def plan(self, step: int, slots: Tensor, damaged: Container[int] | None = None) -> planning.Plan:
        """The plan of these slots of a step's batch, around the members in ``damaged``; None: all that are known."""
        return planning.plan(
            self.recipe, self.shapes, self.bodies, seed=self.seed, batch=self.batch, step=step, slots=slots,
            stream=self.stream, chances=self._chances, shuffle=self._shuffle,
            damaged=self.damaged if damaged is None else damaged,
        )  # fmt: skip

    def together(self, step: int, slots: Tensor) -> tuple[Tensor, list[int]]:
        """``slots`` (b,) and after them those that RCR's cut-out copies from; for each of the b, the place of its
        partner in them, or -1 where it copies from nobody."""
        cutout = self.recipe.cutout
        if cutout is None or not cutout.swap:
            return slots, [-1] * len(slots)
        wanted = partners(Key(self.seed, step, slots), self.batch, self.stream)
        swaps = [row for row, slot in enumerate(slots.tolist()) if wanted[row] != slot]
        places = {row: len(slots) + n for n, row in enumerate(swaps)}
        return torch.cat([slots, torch.from_numpy(wanted[swaps])]), [places.get(row, -1) for row in range(len(slots))]

    def cut(self, step: int, slots: Tensor) -> tuple[planning.Plan, list[np.ndarray]]:
        """The plan, and its boxes, int16 (c, *extent), not turned yet: those of all slots' first views, and so on.

        Raises DataError for a damaged volume when no more may be left out.
        """
        while True:
            with self.watch.stage("plan"):
                plan = self.plan(step, slots)
            bad = next((m for m in np.unique(plan.volume).tolist() if not self.judge(m)), None)
            if bad is None:
                with self.watch.stage("read"):
                    boxes = self._boxes(plan)
                if boxes is not None:
                    return plan, boxes

    def leave_out(self, member: int, reason: str) -> None:
        """Count a volume as damaged, or raise DataError where that is one too many."""
        if member in self.damaged:
            return
        if len(self.damaged) >= self._skip or len(self.damaged) + 1 >= len(self.members):
            allowed = f" {self._skip} damaged volumes may be left out (data.skip)." if self._skip else ""
            raise DataError(f"{reason}.{allowed} {self.store.remedy}.")
        self.damaged[member] = reason
        if self.tells:  # here, as each rank touches volumes of its own
            told = f"medfast: {reason}. It is left out, {len(self.damaged)} of {self._skip} that may be (data.skip)"
            print(told, file=sys.stderr, flush=True)

    def judge(self, member: int) -> bool:
        """Whether a volume is what was written; if not, it is left out, or one too many (DataError)."""
        index = int(self.members[member])
        with self.watch.stage("check"), self.watch.reading(index):
            problem = self.store.touched(index)
        if problem:
            self.leave_out(member, problem)
        return problem is None

    def _boxes(self, plan: planning.Plan) -> list[np.ndarray] | None:
        """None where a volume turned out to be damaged after its first touch, and was left out."""
        boxes = []
        for view in range(self.recipe.views):
            for row, member in enumerate(plan.volume.tolist()):
                index = int(self.members[member])
                try:
                    with self.watch.reading(index):
                        box = self._box(self.store.open(index), plan.start[row, view], plan.extent[row, view])
                except (OSError, ValueError, RuntimeError) as error:
                    name = self.store.records[index]["id"]
                    self.leave_out(member, f"volume {name} cannot be read any more: {error}")
                    return None
                boxes.append(box)
        return boxes

    def _box(self, voxels: Voxels, start: np.ndarray, extent: np.ndarray) -> np.ndarray:
        """The voxels of a box, int16 (c, *extent), contiguous; outside the volume there is ``fill``."""
        dims = self.store.dimensions
        shape = np.array((1, *voxels.shape[-2:]) if dims == 2 else voxels.shape[-3:])
        low, high = np.maximum(start, 0), np.minimum(start + extent, shape)
        place = [slice(int(a), int(b)) for a, b in zip(low, high, strict=True)][-dims:]
        inside = voxels[(*[slice(None)] * (voxels.ndim - dims), *place)]
        mapped = isinstance(inside, np.memmap)
        inside = np.asarray(inside).reshape(-1, *(high - low))
        if (high - low == extent).all():
            return np.array(inside) if mapped else inside
        box = np.full((len(inside), *extent), self.fill, dtype=np.int16)
        box[(slice(None), *(slice(a, b) for a, b in zip(low - start, high - start, strict=True)))] = inside
        return box


def _with_depth(record: dict[str, Any], name: str) -> list[int]:
    """What an index line has as "shape" (d, h, w) or "body" (d0, h0, w0, d1, h1, w1); a picture has a depth of one."""
    dims = len(record["body"]) // 2
    if name == "shape":
        return [1] * (3 - dims) + record["shape"][-dims:]
    return [0] * (3 - dims) + record["body"][:dims] + [1] * (3 - dims) + record["body"][dims:]
