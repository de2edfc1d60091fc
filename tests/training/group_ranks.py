"""What each of two ranks does for test_groups: losses and gradients of group objectives on its share of a batch."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from medfast.objectives.byol import BYOL
from medfast.objectives.moco_v3 import MoCoV3
from medfast.objectives.simclr import SimCLR
from medfast.training.distributed import World, world
from medfast.training.loop import _schedule
from medfast.training.settings import Train
from medfast.types import Batch, Features, Key

BATCH, GROUP = 12, 6
BUILDERS = {
    "simclr": lambda backbone: SimCLR(backbone, group=GROUP),
    "byol": lambda backbone: BYOL(backbone, group=GROUP, hidden=7, width=5),
    "moco_v3": lambda backbone: MoCoV3(backbone, group=GROUP, hidden=7, width=5),
}


class Flat(nn.Module):
    """Volumes of 8 voxels to one token."""

    channels, strides, in_channels, embed, semantic_attention = (4,), (2,), 1, 0, None

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, volume, mask=None, fill=None, key=None):
        x = torch.tanh(self.linear(volume.flatten(1)))
        return Features((x.view(-1, 1, 1, 1, 4),), x)


def batch(slots) -> Batch:
    views = torch.randn(2, BATCH, 1, 2, 2, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    slots = torch.as_tensor(slots)
    return Batch((views[0, slots], views[1, slots]), None, Key(0, 0, slots))


def losses_and_gradients(here: World, micro: int) -> dict[str, torch.Tensor]:
    """One step of each objective as training takes it: mean over micro-batches and ranks."""
    train, found = Train(steps=1, batch=BATCH, micro=micro), {}
    runs = [slots for _, slots in _schedule(0, train, here)]
    for name, build in BUILDERS.items():
        torch.manual_seed(0)
        objective = build(Flat()).double()
        objective.gather = here.gather
        if objective.teacher is not None:
            objective.teacher.to(torch.float64)
        mean = torch.zeros((), dtype=torch.float64)
        for slots in runs:
            loss = sum(objective(batch(slots), torch.tensor(0.0)).losses.values()) / len(runs)
            loss.backward()
            mean += loss.detach()
        found[name] = here.total(mean) / here.size
        for key, parameter in objective.named_parameters():
            found[f"{name}.{key}"] = here.total(parameter.grad.clone()) / here.size
    return found


if __name__ == "__main__":
    with world() as here:
        made = {micro: losses_and_gradients(here, micro) for micro in (3, 6)}
        torch.save(made, Path(sys.argv[1]) / f"rank_{os.environ['RANK']}.pt")
        dist.barrier()
