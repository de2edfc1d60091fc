"""Short trainings on blobs, whole or with a planted failure, and what the gauges say of them step by step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn import functional as F

from medfast.architectures import BACKBONES
from medfast.data.orientation import orient
from medfast.objectives import MASKS, OBJECTIVES
from medfast.objectives.gauges import equal_views, watched
from medfast.objectives.held_out import with_masks
from medfast.types import Batch, Features, Key, Objective

SIZE, SAMPLES = 16, 6


def volumes(count: int, seed: int) -> torch.Tensor:
    """(count, 1, 24, 24, 24): smooth fields with sharp edges, in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    field = F.interpolate(torch.randn(count, 1, 7, 7, 7, generator=generator), size=(24,) * 3, mode="trilinear")
    return (0.5 + 0.25 * field + 0.25 * field.sign()).clamp(0, 1)


def batch(pool: torch.Tensor, step: int, turned: bool, equal: bool = False, count: int = SAMPLES) -> Batch:
    """Two crops of each of some volumes; or one box twice, the first view turned, as SimPROT wants it."""
    generator = torch.Generator().manual_seed(step)
    which = torch.randperm(len(pool), generator=generator)[:count]
    starts = torch.randint(0, 24 - SIZE + 1, (count, 2, 3), generator=generator)
    if turned or equal:
        starts[:, 1] = starts[:, 0]
    turns = torch.randint(0, 4, (count, 2), generator=generator) if turned else torch.zeros(count, 2).long()
    flips = torch.randint(0, 3, (count, 2), generator=generator) if turned else torch.zeros(count, 2).long()
    turns[:, 1] = flips[:, 1] = 0
    views = []
    for view in range(2):
        crops = []
        for i, volume in enumerate(which):
            d, h, w = starts[i, view]
            crop = pool[volume, :, d : d + SIZE, h : h + SIZE, w : w + SIZE]
            crops.append(torch.from_numpy(orient(crop.numpy(), int(turns[i, view]), int(flips[i, view])).copy()))
        views.append(torch.stack(crops))
    params = {"rotation": turns, "flip": flips, "volume": which}
    return Batch(tuple(views), None, Key(0, step, torch.arange(count)), (None, None), params)


def vit(**settings):
    return BACKBONES["vit"](size=SIZE, patch=4, embed=24, depth=2, heads=2, drop_path=0.0, **settings)


def smart(seed: int) -> Objective:
    torch.manual_seed(seed)
    return OBJECTIVES["smart"](
        vit(cls=True), MASKS["attention"](0.6, 0.1), prototypes=32, head_widths=(32, 16), gitd="stage3",
        momentum=(0.9, 1.0), patch_temperature=0.04, centre_momentum=0.5,
    )  # fmt: skip


def simprot(seed: int, **settings) -> Objective:
    torch.manual_seed(seed)
    return OBJECTIVES["simprot"](vit(), MASKS["random"](0.5), cell=4, group=SAMPLES, **settings)


def mst(seed: int) -> Objective:
    torch.manual_seed(seed)
    return OBJECTIVES["mst"](
        vit(cls=True), MASKS["attention"](0.6, 0.0, order="low"), decoder=8, prototypes=32, head_widths=(32, 16),
        centre_momentum=0.5,
    )  # fmt: skip


def one_token(backbone: torch.nn.Module, given: tuple, made: Features) -> Features:
    """A forward hook: all tokens of a crop become their mean."""
    return replace(made, stages=tuple(x.flatten(1, -2).mean(1)[:, None, None, None].expand_as(x) for x in made.stages))


def held_out(crops: int, needs: bool) -> list[Batch]:
    """As validation has them: two at a time, under fixed masks."""
    whole, batches = batch(volumes(crops, 99), 0, needs, count=crops), []
    for i in range(0, crops, 2):
        params = {name: x[i : i + 2] for name, x in whole.params.items()}
        views = tuple(x[i : i + 2] for x in whole.views)
        batches.append(replace(whole, views=views, params=params, key=Key(0, 0, torch.arange(i, i + 2))))
    return batches


def train(
    objective: Objective, steps: int, every: int, lr: float, seed: int = 0, plant: str = "",
    see: Callable[[dict], None] = lambda row: None, crops: int = 6,
) -> list[dict]:  # fmt: skip
    """Rows as metrics.jsonl has them, gauges of the model in every ``every``-th. plant: "no centring", "idle teacher",
    "equal views", "one token" or none. crops: held out for the gauges."""
    pool = volumes(24, seed)
    held = [with_masks(objective, given) for given in held_out(crops, bool(objective.needs))]
    if plant == "one token":
        for side in (objective, objective.teacher):
            side.backbone.register_forward_hook(one_token)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=lr)
    rows = []
    for step in range(steps):
        t = step / steps
        given = batch(pool, step + 1000 * seed, bool(objective.needs), plant == "equal views")
        output = objective.train()(given, torch.tensor(t))
        loss = torch.stack(list(output.losses.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gauges = {name: float(x) for name, x in {**output.gauges, **equal_views(given)}.items()}
        momentum = None
        if plant != "no centring":
            objective.absorb(output.sums)
        if objective.teacher is not None:
            momentum = objective.momentum(t)
            if plant != "idle teacher":
                objective.teacher.update({**dict(objective.named_parameters()), **dict(objective.named_buffers())},
                                         momentum)  # fmt: skip
        if (step + 1) % every == 0:
            gauges |= {name: float(x) for name, x in watched(objective.eval(), held, t).items()}
        rows.append({"step": step, "total": loss.item(), "momentum": momentum, "gauge": gauges})
        see(rows[-1])
    return rows
