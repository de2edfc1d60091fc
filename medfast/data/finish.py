"""What is left to do when an executor has made the views: marks of padding, cut-out, targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from medfast.types import Batch
from medfast_kernels import Key

from . import cutout as cutting
from . import plan as planning
from .cutter import Cutter

__all__ = ["Finish"]


class Finish:
    """Views of an executor into a ``Batch``; one piece of code for all executors.

    window: stored values of 0 and of 1. ahead: target name -> function of the stacked key.
    """

    def __init__(self, cutter: Cutter, window: tuple[float, float], ahead: Mapping[str, Callable[[Key], Tensor]]):
        low, high = window
        self.cutter, self.ahead = cutter, ahead
        self.floor = max(0.0, min(1.0, (cutter.fill - low) / (high - low)))  # what padding becomes

    def __call__(
        self, step: int, together: Tensor, partners: Sequence[int], plan: planning.Plan, made: Tensor
    ) -> Batch:  # fmt: skip
        """The batch of the first slots of ``together``, one for each of ``partners``: places in ``together`` of whom
        each copies from, or -1. made: (views * len(together), c, *size), changed in place."""
        with self.cutter.watch.stage("finish"):
            cutter, recipe, count = self.cutter, self.cutter.recipe, len(partners)
            views = made.reshape(recipe.views, len(together), *made.shape[1:]).unbind(0)
            marks = self._mark(views, plan, count)
            rows = together[:count]
            targets, own = {}, tuple(view[:count] for view in views)
            key = Key(cutter.seed, step, rows)
            for name, make in self.ahead.items():
                targets[name] = make(key.stack(recipe.views)).chunk(recipe.views)
            if recipe.cutout is not None:
                targets["uncut"], own = own, self._cut_out(views, rows, step, partners)
            params = {name: torch.from_numpy(value[:count]) for name, value in {**plan.params, **plan.turns}.items()}
            params["volume"] = torch.from_numpy(cutter.members[plan.volume[:count]])
            batch = Batch(own, self._boxes(plan, count), key, marks, params, targets)
            return _without_depth(batch) if recipe.flat else batch

    def _boxes(self, plan: planning.Plan, count: int) -> Tensor:
        boxes = torch.from_numpy(plan.boxes[:count].astype(np.float32))
        return boxes if self.cutter.store.dimensions == 3 else boxes[..., [1, 2, 4, 5]]

    def _mark(self, views: Sequence[Tensor], plan: planning.Plan, count: int) -> tuple[Tensor | None, ...]:
        """``Batch.valid`` of the first ``count``; sets padding to the floor, from which resizing and intensity changes
        may have moved it, in all views."""
        size, full, marks = self.cutter.recipe.size, torch.ones(self.cutter.recipe.size).bool(), []
        for v, view in enumerate(views):
            found = [planning.valid(plan.start[i, v], plan.extent[i, v], self.cutter.shapes[m], size)
                     for i, m in enumerate(plan.volume)]  # fmt: skip
            found = [None if mark is None else torch.from_numpy(plan.oriented(mark.numpy(), i, v))
                     for i, mark in enumerate(found)]  # fmt: skip
            for row, mark in enumerate(found):
                if mark is not None:
                    view[row].masked_fill_(~mark.to(view.device), self.floor)
            own = found[:count]
            padded = any(mark is not None for mark in own)
            marks.append(torch.stack([full if mark is None else mark for mark in own]) if padded else None)
        return tuple(marks)

    def _cut_out(
        self, views: Sequence[Tensor], rows: Tensor, step: int, partners: Sequence[int]
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """The views with RCR's boxes in them. A partner may be any slot of the step, of another rank too."""
        settings = self.cutter.recipe.cutout
        assert settings is not None
        made = tuple(torch.empty_like(view[: len(partners)]) for view in views)
        for v, view in enumerate(views):
            for i, place in enumerate(partners):
                key, other = Key(self.cutter.seed, step, rows[i : i + 1]), view[place] if place >= 0 else None
                cutting.cut(view[i], other, settings, key, v, self.cutter.stream, out=made[v][i])
        return made


def _without_depth(batch: Batch) -> Batch:
    """Views of one slice, (b, c, 1, h, w), as images, and so what goes with them."""

    def flat(views: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(view.squeeze(-3) for view in views)

    valid = tuple(None if mark is None else mark.squeeze(-3) for mark in batch.valid)
    uncut = {"uncut": flat(batch.targets["uncut"])} if "uncut" in batch.targets else {}
    return Batch(flat(batch.views), batch.boxes, batch.key, valid, batch.params, {**batch.targets, **uncut})
