"""What three ranks do for test_zero: four optimizer steps in many ways. ``python zero_ranks.py FOLDER``

Three divide hardly any tensor of ``Tiny``, so that pieces are of unlike lengths, and some are empty.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny_task as task
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from forked import together

from medfast.training import checkpoint
from medfast.training.deepspeed_engine import Engine
from medfast.training.distributed import World
from medfast.training.feed import slots
from medfast.training.settings import Optim, Train
from medfast.training.strategies import AllReduce, autocast

BATCH, STEPS, BAD, STAGES = 6, 4, 2, (0, 1, 2, 3)
EACH, ALL = {"kind": "per_parameter", "max": 0.02}, {"kind": "global", "max": 0.05}


class Sometimes(task.Tiny):
    """odd: frozen for good, and copied by no teacher. idle: trained, and used in every second step."""

    def __init__(self):
        super().__init__()
        self.odd = torch.nn.Parameter(torch.ones(7), requires_grad=False)
        self.idle = torch.nn.Parameter(torch.ones(5, 3))

    def forward(self, batch, t):
        output = super().forward(batch, t)
        if batch.key.step % 2:
            return output
        return replace(output, losses={**output.losses, "idle": self.idle.square().sum() * batch.views[0].mean()})


def section(stage: int, offload: bool = False) -> dict[str, Any]:
    whole = {"stage": stage, "stage3_param_persistence_threshold": 0}
    return {"zero_optimization": {**whole, **({"offload_optimizer": {"device": "cpu"}} if offload else {})}}


def strategy(objective, here: World, stage: int | None, clip=EACH, offload: bool = False, **train):
    settings = Train(batch=BATCH, micro=1, strategy="ddp" if stage is None else "deepspeed", **train)
    optim = Optim(lr=1e-5, min_lr=0.0, warmup=0.0, clip=clip, frozen={"last*": 0.3})
    arguments = (objective, optim, settings, here, BATCH // here.size)
    return AllReduce(*arguments) if stage is None else Engine(*arguments, section(stage, offload))


def trial(here: World, stage: int | None, loud=1.0, bad=False, missing=False, again=False, **how):
    """Everything after ``STEPS`` steps, and the losses and norms on the way.

    loud: times the loss. bad: the loss of step ``BAD`` is NaN on one rank. missing: that step is not taken at all.
    again: after it the run is closed and opened from what it has saved.
    """
    torch.manual_seed(0)
    objective = Sometimes()
    runs, found = strategy(objective, here, stage, **how), {"norm": [], "loss": []}
    for step in range(STEPS):
        if missing and step == BAD:
            continue
        for which in slots(here.rank, here.size, Train(batch=BATCH, micro=1)):
            output = runs.forward(task.Memory().batch(step, which), torch.tensor(step / STEPS, dtype=torch.float64))
            loss = torch.stack(list(output.losses.values())).sum()
            runs.backward(loss * (math.nan if bad and step == BAD and here.rank == 1 else loud))
            found["loss"].append(loss.detach())
        norm = runs.step(1e-5, 0.1, step / STEPS)
        assert norm.isfinite() == (not (bad and step == BAD)), norm
        if norm.isfinite():
            runs.teach(0.9)
            found["norm"].append(norm)
        if again and step == BAD:
            parts = whole(here, objective, runs, share=True)
            runs.close()
            objective.teacher.to(torch.float32)
            checkpoint.restore(objective, parts)
            runs = strategy(objective, here, stage, **how)
            runs.load_moments(parts["optimizer"])
    parts = whole(here, objective, runs)
    parts["student (evaluated)"] = evaluated(runs, how.get("precision", "fp32"))
    parts["run"] = {kind: torch.stack(values).float() for kind, values in found.items()}
    runs.close()
    return parts


def whole(here: World, objective, runs, share: bool = False) -> dict[str, dict[str, torch.Tensor]]:
    """What a checkpoint holds; share: on every rank, as it is after loading one."""
    held = {**checkpoint.describe(objective), **runs.contents()}
    parts = checkpoint.snapshot(held) if here.first else {}
    if share:
        found = [parts]
        torch.distributed.broadcast_object_list(found)
        parts = found[0]
    return parts


def evaluated(runs, precision: str) -> dict[str, torch.Tensor]:
    with runs.whole() as objective, autocast(precision, torch.device("cpu")):
        output = objective.eval()(task.Memory().batch(0, range(2)), torch.tensor(0.0))
        parameters = {name: p.detach().clone() for name, p in objective.named_parameters()}
    return {**parameters, **{f"loss {name}": x.detach() for name, x in output.losses.items()}}


def trials(here: World) -> None:
    ways: dict[str, dict[str, Any]] = {"ddp": {"stage": None}, "ddp global": {"stage": None, "clip": ALL}}
    ways["ddp loud"] = {"stage": None, "clip": None, "loud": 1e3}
    ways["ddp sharded"] = {"stage": None, "teacher": "sharded"}
    for stage in STAGES:
        for name, how in {
            "": {}, " global": {"clip": ALL}, " loud": {"clip": None, "loud": 1e3}, " sharded": {"teacher": "sharded"},
            " bad": {"bad": True}, " missing": {"missing": True}, " again": {"again": True},
        }.items():  # fmt: skip
            ways[f"{stage}{name}"] = {"stage": stage, **how}
        if stage:
            ways[f"{stage} offload"] = {"stage": stage, "offload": True}
        for teacher in ("replicated", "sharded"):
            ways[f"{stage} bf16 {teacher}"] = {"stage": stage, "precision": "bf16", "teacher": teacher}
    for name, how in ways.items():
        parts = trial(here, **how)
        if here.first:
            torch.save(parts, Path(sys.argv[1]) / f"{name}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    together(3, Path(sys.argv[1]), trials)
