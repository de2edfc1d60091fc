"""``tiny_task`` with things that go wrong at given steps."""

from __future__ import annotations

from pathlib import Path

import tiny_task as task
import torch

from medfast.training import pretrain
from medfast.training.replay import replay
from medfast.types import Batch, Output

SPIKE = {"wrong": {40: "high", 41: "high", 42: "high"}, "train__steps": 48, "train__checkpoint_every": 10,
         "train__validate_crops": 0, "optim__lr": 1e-3}  # fmt: skip


class Troubled(task.Tiny):
    """wrong: {step: "loss" | "gradient" | "high"}; also shows its masks."""

    def __init__(self, wrong: dict[int, str] | None = None):
        super().__init__()
        self.wrong = wrong or {}

    def forward(self, batch: Batch, t) -> Output:
        found = super().forward(batch, t)
        fault = self.wrong.get(int(batch.key.step))
        losses = dict(found.losses)
        if fault == "loss":
            losses["distil"] = losses["distil"] * float("nan")
        elif fault == "gradient":  # the root of 0 is 0, its slope is not finite
            losses["distil"] = losses["distil"] + (0 * self.fill).abs().sqrt().sum()
        elif fault == "high":
            losses["distil"] = losses["distil"] * 40
        return Output(losses, found.gauges, found.sums)

    def picture(self, batch: Batch) -> dict[str, tuple[torch.Tensor, ...]]:
        key = batch.key.stack(2)
        return {"mask": task.mk.random_ids(8, 5, key=key.at(task.mk.Role.MASK)).chunk(2)}


class Grouped(Troubled):
    """Samples of a group of four see each other, over ranks, twice in a forward pass."""

    group = 4

    def forward(self, batch: Batch, t) -> Output:
        found = super().forward(batch, t)
        own = self.backbone(batch.views[0].flatten(1).unflatten(1, (8, task.WIDTH))).mean(1)
        others, begin = self.gather(own)
        like = torch.softmax(own @ others.T, dim=1)
        spread, _ = self.gather(like.var(dim=1, keepdim=True))
        contrast = -like.diagonal(begin).log().mean() + spread.mean()
        return Output({**found.losses, "contrast": contrast}, found.gauges, found.sums)


class Bad(task.Memory):
    """A voxel of slot 0 is infinite at step ``at``."""

    at: int | None = None

    def batch(self, step, slots) -> Batch:
        found = super().batch(step, slots)
        if step == self.at and 0 in list(slots):
            found.views[0].view(-1)[3] = float("inf")
        return found


def build(wrong: dict[int, str] | None = None, kind: type[Troubled] = Troubled) -> Troubled:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(wrong)


def run(
    out: Path, wrong: dict[int, str] | None = None, inf_at: int | None = None, kind: type[Troubled] = Troubled,
    stop_at: int | None = None, **changes,
) -> Troubled:  # fmt: skip
    objective, stream = build(wrong, kind), Bad(stop_at=stop_at)
    stream.at = inf_at
    pretrain(objective, task.config(out, **changes), stream, task.Memory(split=1))
    return objective


def again(
    out: Path, step: int, wrong: dict[int, str] | None = None, inf_at: int | None = None, rank: int = 0,
    kind: type[Troubled] = Troubled, **changes,
) -> bool | None:  # fmt: skip
    """``replay`` of a run that was made by ``run`` with the same words."""
    stream = Bad()
    stream.at = inf_at
    return replay(build(wrong, kind), task.config(out, **changes), stream, Path(out), step, rank)
