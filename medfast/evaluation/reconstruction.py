"""Is what the model fills in better than what anybody could fill in without learning? Masked L1 against predictors.

Held-out crops without intensity changes, and masks that depend on nothing but the crop's number, so runs on one store
can be compared.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medfast.objectives.held_out import AT_ONCE, with_masks
from medfast.objectives.held_out import crops as held_out
from medfast.types import Batch, Objective

from . import baselines

__all__ = ["GATE", "Score", "measure", "score", "summary"]

GATE = 0.75  # share of the median predictor's L1 that a model has to reach before "it learned" may be said
SIGMAS = (1.0, 2.0, 4.0, 8.0)  # voxels

Picture = dict[str, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Score:
    """Masked L1 in window units (0 to 1), the mean over ``crops`` crops, where each view counts as a crop.

    mask: "fixed" or "own". views: of the objective. hidden: share of voxels. l1: "model", "median_crop",
    "median_visible", "nearest", and for each sigma "smoothed_1", "nearest_smoothed_1" ...
    """

    mask: str
    crops: int
    views: int
    hidden: float
    l1: dict[str, float]

    def best(self, *prefixes: str) -> tuple[str, float]:
        """Name and value of the lowest L1 among predictors whose name starts with one of ``prefixes``."""
        return min(((n, v) for n, v in self.l1.items() if n.startswith(prefixes)), key=lambda pair: pair[1])

    @property
    def median_ratio(self) -> float:
        """Model over the better of the two medians; ``GATE`` or less passes."""
        return self.l1["model"] / max(self.best("median")[1], 1e-12)

    @property
    def interpolation_ratio(self) -> float:
        """Model over the best interpolation from the visible voxels; below 1 passes."""
        return self.l1["model"] / max(self.best("nearest", "smoothed")[1], 1e-12)

    @property
    def passes(self) -> bool:
        return self.median_ratio <= GATE and self.interpolation_ratio < 1.0

    def to_json(self) -> dict:
        return {
            "mask": self.mask,
            "crops": self.crops,
            "views": self.views,
            "hidden": self.hidden,
            "l1": self.l1,
            "model_over_median": self.median_ratio,
            "best_interpolation": self.best("nearest", "smoothed")[0],
            "model_over_interpolation": self.interpolation_ratio,
            "passes": self.passes,
        }


def summary(scores: Sequence[Score]) -> str:
    """Every number, for the console: a line per predictor, a column per kind of mask."""
    if not scores:
        return "this objective reconstructs nothing"
    titles = {"fixed": "random masks", "own": "its own masks"}
    lines = ["masked L1 on held-out crops".ljust(30) + "".join(f"{titles[score.mask]:>15}" for score in scores)]
    lines += [name.ljust(30) + "".join(f"{score.l1[name]:15.4f}" for score in scores) for name in scores[0].l1]
    ratios = (("model / best median", "median_ratio"), ("model / best interpolation", "interpolation_ratio"))
    lines += [name.ljust(30) + "".join(f"{getattr(score, ratio):15.0%}" for score in scores) for name, ratio in ratios]
    return "\n".join(lines)


def measure(objective: Objective, stream, crops: int = 16) -> tuple[Score, ...]:
    """Scores under fixed random masks ("fixed") and the objective's own ("own"); () where it reconstructs nothing.

    The fixed masks are those of the validation loss (``objectives.held_out``).

    Crops in which nothing is hidden, or nothing is left to interpolate from, are left out.
    """
    objective.eval()
    device = next(objective.parameters()).device
    tallies = {"fixed": _Tally(), "own": _Tally()}
    for batch in held_out(stream, crops, AT_ONCE):
        batch = batch.to(device)
        masked = with_masks(objective, batch)
        if "mask" not in masked.targets:
            return ()
        for kind, shown in (("fixed", masked), ("own", batch)):
            picture = objective.picture(shown)
            if "reconstruction" not in picture:
                return ()
            tallies[kind].add(shown, picture)
    return tuple(tally.score(kind, objective.views) for kind, tally in tallies.items() if tally.count)


class _Tally:
    """Sums over crops and views."""

    def __init__(self):
        self.count, self.hidden, self.l1 = 0, 0.0, defaultdict(float)

    def add(self, batch: Batch, picture: Picture) -> None:
        for view, (truth, hidden) in enumerate(zip(batch.views, picture["mask"], strict=True)):
            valid = batch.valid[view] if batch.valid else None
            real = torch.ones_like(hidden) if valid is None else valid
            usable = (real & hidden).flatten(1).any(1) & (real & ~hidden).flatten(1).any(1)
            if not usable.any():
                continue
            parts = (x[usable] for x in (truth, picture["reconstruction"][view], hidden, real))
            for name, value in score(*parts).items():
                self.l1[name] += float(value.sum())
            self.hidden += float(hidden[usable].float().flatten(1).mean(1).sum())
            self.count += int(usable.sum())

    def score(self, kind: str, views: int) -> Score:
        l1 = {name: total / self.count for name, total in self.l1.items()}
        return Score(kind, self.count, views, self.hidden / self.count, l1)


def score(truth: Tensor, reconstruction: Tensor, hidden: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """Masked L1 (b,) of the model and of every baseline on each crop's hidden, valid voxels; names as in ``Score``.

    truth, reconstruction: (b, c, *size); hidden, valid: (b, *size) bool. Each crop needs a hidden and a visible voxel.
    """
    truth = truth.float()
    visible, judged = valid & ~hidden, (valid & hidden).unsqueeze(1)

    def l1(prediction: Tensor) -> Tensor:
        wrong = ((prediction.float() - truth).abs() * judged).flatten(1).sum(1)
        return wrong / judged.expand_as(truth).flatten(1).sum(1)

    filled = baselines.nearest(truth, visible)
    out = {
        "model": l1(reconstruction),
        "median_crop": l1(baselines.median(truth, valid)),
        "median_visible": l1(baselines.median(truth, visible)),
        "nearest": l1(filled),
    }
    for sigma in SIGMAS:
        edge = baselines.gaussian(torch.ones_like(filled), sigma)  # the blur counts the outside as 0; this undoes it
        out[f"smoothed_{sigma:g}"] = l1(baselines.smoothed(truth, visible, sigma, filled))
        out[f"nearest_smoothed_{sigma:g}"] = l1(baselines.gaussian(filled, sigma) / edge)
    return out
