"""What ranks do for test_any_ranks: one optimizer step of every objective with state over the batch, on 1 to 4 ranks.

    python any_ranks.py FOLDER        # writes FOLDER/<ranks>x<micro>_<rank>.pt

Ranks are forks of one process that has imported everything, because four imports take longer than all the steps.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from medfast.architectures import BACKBONES
from medfast.objectives import MASKS, OBJECTIVES
from medfast.training.distributed import World
from medfast.training.feed import slots
from medfast.training.settings import Optim, Train
from medfast.training.strategies import AllReduce
from medfast.types import Batch, Key, Objective

# by file, because several folders of tests have a module called conftest
_spec = importlib.util.spec_from_file_location("tiny_backbone", Path(__file__).parents[1] / "objectives/conftest.py")
tiny_backbone = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny_backbone)
Tiny, SIZE = tiny_backbone.Tiny, tiny_backbone.SIZE

BATCH, T = 12, 0.25
CASES = {1: (12, 6), 2: (6, 3), 3: (4, 2), 4: (3, 1)}  # ranks -> micro-batches: the rank's whole share, and accumulated
HEADS, NORMED = {"prototypes": 10, "head_widths": (9, 7)}, {"hidden": 7, "width": 5}


def _attention():
    return MASKS["attention"](0.7, 0.1)


def _places(name: str, group: int, **settings) -> Objective:
    return OBJECTIVES[name](Tiny(None), MASKS["random"](0.75), cell=8, group=group, **settings)


BUILD = {  # name -> builder from the size of a group
    "simclr": lambda group: OBJECTIVES["simclr"](Tiny(None), group=group),
    "byol": lambda group: OBJECTIVES["byol"](Tiny(None), group=group, **NORMED),
    "moco_v3": lambda group: OBJECTIVES["moco_v3"](Tiny(None), group=group, **NORMED),
    "simprot": lambda group: _places("simprot", group),
    "simprot_w": lambda group: _places("simprot_w", group),
    "btrot": lambda group: _places("btrot", group, **NORMED),
    "rcr": lambda group: OBJECTIVES["rcr"](Tiny(None), group=group, contrast_width=5),
    "swinfuse": lambda group: OBJECTIVES["swinfuse"](
        BACKBONES["swinfuse"](embed=6, depths=[1, 1], heads=[1, 2], window=2, dim_width=6, dim_heads=[1, 1]),
        group=group, contrast_width=5, rows=4,
    ),
    "smart": lambda group: OBJECTIVES["smart"](Tiny(), _attention(), **HEADS),
    "smit": lambda group: OBJECTIVES["smit"](Tiny(None), MASKS["random"](0.7), stage=1, **HEADS),
    "ibot": lambda group: OBJECTIVES["ibot"](Tiny(), _attention(), **HEADS),
    "mst": lambda group: OBJECTIVES["mst"](Tiny(), MASKS["attention"](0.7, 0.0, order="low"), decoder=6, **HEADS),
}  # fmt: skip


def batch(which: list[int]) -> Batch:
    generator = torch.Generator().manual_seed(5)
    views, uncut = torch.rand(2, 2, BATCH, 1, *SIZE, generator=generator, dtype=torch.float64)[:, :, which].unbind(0)
    turns, flips = (torch.randint(0, 3, (BATCH, 2), generator=generator)[which] for _ in range(2))
    params = {"rotation": turns, "flip": flips, "volume": torch.arange(BATCH)[which] // 2}
    return Batch(tuple(views), None, Key(0, 3, torch.as_tensor(which)), (None, None), params, {"uncut": tuple(uncut)})


def step(objective: Objective, here: World, micro: int) -> dict[str, torch.Tensor]:
    """Losses, gradients (in AdamW's first moments), centres and teacher after one step, as training takes it."""
    mine = slots(here.rank, here.size, Train(batch=BATCH, micro=micro))
    objective.double().train().gather = here.gather
    if objective.teacher is not None:
        objective.teacher.to(torch.float64)
    run = Train(strategy="ddp", batch=BATCH, micro=micro, precision="fp64")
    strategy = AllReduce(objective, Optim(warmup=0.0), run, here, len(mine))
    sums, found = {}, {}
    for which in mine:
        output = strategy.forward(batch(which), torch.tensor(T, dtype=torch.float64))
        strategy.backward(torch.stack(list(output.losses.values())).sum())
        for name, loss in output.losses.items():
            found[name] = found.get(name, 0.0) + loss.detach() / (here.size * len(mine))
        for name, pair in output.sums.items():
            sums[name] = [a + b for a, b in zip(sums.get(name, (0.0, 0.0)), pair, strict=True)]
    found = {f"loss/{name}": here.total(loss) for name, loss in found.items()}
    strategy.step(1e-3, 0.0, T)
    objective.absorb({name: tuple(here.total(x.double().clone()) for x in pair) for name, pair in sums.items()})
    if objective.teacher is not None:
        strategy.teach(objective.momentum(T))
        found |= {f"teacher/{name}": x.clone() for name, x in objective.teacher.state().items()}
    moments = {name: x for name, x in strategy.contents()["optimizer"].items() if name.startswith("exp_avg/")}
    return found | moments | {f"buffer/{name}": x.clone() for name, x in objective.named_buffers()}


def steps(here: World) -> None:
    folder = Path(sys.argv[1])
    for micro in CASES[here.size]:
        # one rank says what is right, of both; groups of 12 reach over all ranks, those of 2 over the borders of some
        groups = (2, 12) if micro == BATCH else (12,) if here.size * micro == BATCH else (2,)
        found = {}
        for name, build in BUILD.items():
            for group in groups:
                torch.manual_seed(0)
                made = step(build(group), here, micro)
                found |= {f"{name}, groups of {group}: {key}": x for key, x in made.items()}
        torch.save(found, folder / f"{here.size}x{micro}_{here.rank}.pt")


def fork(size: int) -> list[int]:
    """Process ids of ``size`` ranks that take their steps."""
    ids = []
    for rank in range(size):
        if (pid := os.fork()) == 0:
            code = 1
            try:
                store = dist.FileStore(f"{sys.argv[1]}/store_{size}", size)
                dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
                steps(World(rank, size, torch.device("cpu")))
                dist.barrier()
                dist.destroy_process_group()
                code = 0
            finally:
                os._exit(code)
        ids.append(pid)
    return ids


if __name__ == "__main__":
    torch.set_num_threads(1)
    for size in CASES:
        failed = [pid for pid in fork(size) if os.waitpid(pid, 0)[1]]
        if failed:
            sys.exit(f"{len(failed)} of {size} ranks failed")
