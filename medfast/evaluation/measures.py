"""What the papers' ablations claim to change, measured on held-out crops of volumes whose organs are known."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor

from medfast.evaluation.probe import organs_of
from medfast.objectives.gauges import watched
from medfast.objectives.held_out import AT_ONCE, crops
from medfast.types import Batch, Objective

__all__ = ["hidden_organs", "measures"]

T = 0.999  # the end of a run, for temperatures that follow its clock


@torch.no_grad()
def measures(objective: Objective, stream, count: int) -> dict[str, float]:
    """Means over the first ``count`` held-out samples: the gauges of ``objectives.gauges.watched``, those that forward
    tells, and "hidden_organs" where the teacher's attention guides the masks. Those that are not finite are left out.

    stream: of the objective's own views, of a store that knows the organs.
    """
    training, found = objective.training, defaultdict(list)
    objective.eval()
    for batch in crops(stream, count, AT_ONCE):
        told = {**objective(batch, torch.tensor(T, dtype=torch.float64)).gauges, **watched(objective, [batch], T)}
        shown = objective.picture(batch)
        if "attention" in shown and "mask" in shown:
            told["hidden_organs"] = hidden_organs(shown["mask"], stream.store, batch)
        for name, value in told.items():
            found[name].append(float(value))
    objective.train(training)
    means = {name: sum(values) / len(values) for name, values in found.items()}
    return {name: round(value, 6) for name, value in means.items() if math.isfinite(value)}


def hidden_organs(masks: tuple[Tensor, ...], store, batch: Batch) -> Tensor:
    """Share of the organs' voxels that is hidden, over the share of all voxels that is: 1 for masks that know nothing.

    masks: per view (b, *size) bool; the views are cut as ``batch.boxes`` say, neither turned nor resized. nan where
    nothing is hidden or no organ is there.
    """
    hidden = torch.stack(masks)
    organ = torch.stack([organs_of(store, batch, view) for view in range(len(masks))]) > 0
    return hidden[organ].double().mean() / hidden.double().mean()
