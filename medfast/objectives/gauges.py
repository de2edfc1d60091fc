"""Collapse gauges: numbers that are watched, never trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain

import torch
from torch import Tensor

from medfast.objectives.attention import head_entropies
from medfast.types import Batch, Features, Objective

__all__ = [
    "ROWS", "agreement", "collapse_gauges", "effective_rank", "equal_views", "gathered", "information_within",
    "position_similarity", "prototype_entropy", "same_position", "teacher_norm", "variance_within", "watched",
]  # fmt: skip

ROWS = 64  # of what ``Objective.tokens`` gives, that gauges ask for; crop after crop where one crop is one row
PLACES = 8  # tokens of a crop, fewer say nothing of where in the crop they are


@torch.no_grad()
def effective_rank(tokens: Tensor) -> Tensor:
    """How many directions a (tokens, dim) matrix uses: exp of the entropy of its normalised singular values, fp64.

    1 where all tokens are the same up to a factor, min(tokens, dim) where all directions are used evenly, nan where a
    token is not finite. Not centred, so a constant output reads as rank 1 and not as the rank of its rounding noise.
    Source: Roy and Vetterli, EUSIPCO 2007; as a gauge of pretraining: RankMe, Garrido et al., ICML 2023.
    """
    if tokens.dim() != 2:
        raise ValueError(f"effective_rank takes a (tokens, dim) matrix, got shape {tuple(tokens.shape)}")
    x = tokens.detach().double()
    if not torch.isfinite(x).all():
        return x.new_tensor(float("nan"))
    gram = x.T @ x if x.shape[1] <= x.shape[0] else x @ x.T
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    total = singular.sum()
    if total == 0:
        return x.new_ones(())
    return torch.special.entr(singular / total).sum().exp()


@torch.no_grad()
def prototype_entropy(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """(entropy of the mean distribution, mean entropy) of (rows, K) probabilities, in nats, fp64.

    The first is 0 where every row picks the same prototype and ln K where all prototypes are used evenly; the second is
    0 where every row is certain and ln K where no row says anything. Their difference is the information that a row's
    prototype carries about the row, 0 for both ways to collapse.
    """
    if probabilities.dim() != 2:
        raise ValueError(f"prototype_entropy takes (rows, K) probabilities, got shape {tuple(probabilities.shape)}")
    p = probabilities.detach().double()
    return torch.special.entr(p.mean(0)).sum(), torch.special.entr(p).sum(1).mean()


@torch.no_grad()
def information_within(probabilities: Tensor, crops: Tensor) -> Tensor:
    """What a row's prototype tells about the row once its crop is known, in nats, fp64.

    probabilities: (rows, K). crops: (rows,) from 0 on. The mean over rows of the entropy of their crop's mean
    distribution, less their own: by the chain rule, the information of ``prototype_entropy`` less what prototypes tell
    about the crop. 0 where all rows of a crop have one distribution, however much crops differ.
    """
    p = probabilities.detach().double()
    rows = torch.bincount(crops).clamp_min(1).to(p.dtype)
    mean = p.new_zeros(len(rows), p.shape[1]).index_add_(0, crops, p) / rows.unsqueeze(1)
    return (torch.special.entr(mean).sum(1)[crops] - torch.special.entr(p).sum(1)).mean()


@torch.no_grad()
def agreement(z: Tensor) -> Tensor:
    """Mean cosine of what is the same in both views. z: (2 * b, ..., dim) L2-normalised, view after view."""
    one, other = z.chunk(2)
    return (one * other).sum(dim=-1).mean()


@torch.no_grad()
def same_position(z: Tensor) -> Tensor:
    """Mean cosine of the tokens at one position of different samples of a view, 1 where a token tells its place alone.

    z: (2 * b, positions, dim) L2-normalised, view after view; nan for b = 1, which has no other sample.
    """
    x = z.unflatten(0, (2, -1))
    b = x.shape[1]
    if b == 1:
        return x.new_full((), float("nan"))
    pairs = x.sum(dim=1).square().sum(dim=-1) - x.square().sum(dim=(1, 3))
    return (pairs / (b * (b - 1))).mean()


@torch.no_grad()
def position_similarity(maps: Tensor) -> Tensor:
    """Mean cosine of the tokens at one position of different samples of a view, less what all tokens of it share.

    maps: (views, b, positions, dim), not normalised. 1 where a token tells its place and nothing else, about 0 where it
    tells what is there; nan for one sample or one position. Fp64. The mean token is taken off because tokens behind a
    LayerNorm have a large common part, which makes all of them look alike.
    """
    b, positions = maps.shape[1:3]
    if b < 2 or positions < 2:
        return maps.new_full((), float("nan"), dtype=torch.float64)
    x = maps.detach().double()
    x = x - x.mean(dim=(1, 2), keepdim=True)
    x = x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return ((x.sum(dim=1).square().sum(dim=-1) - x.square().sum(dim=(1, 3))) / (b * (b - 1))).mean()


@torch.no_grad()
def variance_within(maps: Tensor) -> Tensor:
    """Share of the tokens' variance that is among tokens of one crop, the rest being between crops, fp64.

    maps: (views, b, positions, dim). 0 where all tokens of a crop are the same and crops are not, 1 where crops have
    the same mean token; nan for one sample or one position, and where all tokens are the same.
    """
    b, positions = maps.shape[1:3]
    if b < 2 or positions < 2:
        return maps.new_full((), float("nan"), dtype=torch.float64)
    x = maps.detach().double()
    inside = (x - x.mean(dim=2, keepdim=True)).square().sum()
    return inside / (x - x.mean(dim=(1, 2), keepdim=True)).square().sum()


@torch.no_grad()
def equal_views(batch: Batch) -> dict[str, Tensor]:
    """Share of samples, "equal_views", of which all views are the same, voxel by voxel; {} for one view."""
    first, *others = batch.views
    if not others or any(view.shape != first.shape for view in others):
        return {}
    same = torch.stack([(view == first).flatten(1).all(dim=1) for view in others])
    return {"equal_views": same.all(dim=0).to(torch.float32).mean()}


@torch.no_grad()
def teacher_norm(objective: Objective) -> dict[str, Tensor]:
    """L2 norm, "teacher_norm", of all numbers that the teacher averages, fp64; {} without. A teacher that is updated
    never has the same twice."""
    if objective.teacher is None:
        return {}
    norms = torch._foreach_norm([x.double() for x in objective.teacher.state().values() if x.is_floating_point()])
    return {"teacher_norm": torch.stack(norms).norm()}


@torch.no_grad()
def gathered(objective: Objective, batches: Iterable[Batch], t: float) -> tuple[dict[str, Tensor], int]:
    """(what ``Objective.tokens`` gives on one batch after another until each entry has ``ROWS`` rows, batches read).

    An entry that has them takes no more. Batches are taken one by one; there may be fewer than would be needed.
    """
    found: dict[str, Tensor] = {}
    used = 0
    for batch in batches:
        used += 1
        for name, rows in objective.tokens(batch, t).items():
            before = found.get(name)
            if before is None:
                found[name] = rows
            elif len(before) < ROWS:
                found[name] = torch.cat((before, rows + before.max() + 1 if name == "crops" else rows))
        if all(len(rows) >= ROWS for rows in found.values()):
            break
    return found, used


def watched(objective: Objective, batches: Iterable[Batch], t: float) -> dict[str, Tensor]:
    """All gauges of a model at time t: ``collapse_gauges`` of what is ``gathered``, and, of the first batch alone, what
    its encoder shows; and ``teacher_norm``.

    Of the encoder on whole views: "position_similarity" and "variance_within" of its coarsest stage of at least 8
    tokens, and "head_entropy" and "head_entropy_spread", mean and standard deviation over all heads; each where there
    is such a thing.
    """
    with torch.no_grad():
        looks: list[Features] = []
        batches = iter(batches)
        first = next(batches)
        heads = head_entropies(objective, lambda: looks.extend(objective.encode(first)))
        gauges = collapse_gauges(gathered(objective, chain([first], batches), t)[0]) | _positions(looks)
        if heads:
            entropies = torch.cat([entropy.double() for _, entropy in heads])
            gauges |= {"head_entropy": entropies.mean(), "head_entropy_spread": entropies.std(correction=0)}
        return gauges | teacher_norm(objective)


def _positions(looks: list[Features]) -> dict[str, Tensor]:
    """The gauges of what the encoder made of each view, {} where there is nothing to compare."""
    stages = zip(*(look.stages for look in looks), strict=True)
    coarse = [maps for maps in stages if maps[0][0, ..., 0].numel() >= PLACES]
    if not coarse or len(coarse[-1][0]) < 2:
        return {}
    maps = torch.stack([x.flatten(1, -2) for x in coarse[-1]])
    return {"position_similarity": position_similarity(maps), "variance_within": variance_within(maps)}


def collapse_gauges(tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gauges of what ``Objective.tokens`` gives: "rank_student", "rank_teacher", and of the prototypes "entropy_used",
    "entropy_each", their difference, "information", and, where crops have at least 8 rows, "information_within" crops.
    "rows": the fewest rows that one of these was read of. {} where it gives nothing.
    """
    if not tokens:
        return {}
    gauges = {f"rank_{part}": effective_rank(tokens[part]) for part in ("student", "teacher") if part in tokens}
    if "prototypes" in tokens:
        used, each = prototype_entropy(tokens["prototypes"])
        gauges |= {"entropy_used": used, "entropy_each": each, "information": used - each}
        crops = tokens.get("crops")
        if crops is not None and len(crops) >= PLACES * (crops.max() + 1):
            gauges["information_within"] = information_within(tokens["prototypes"], crops)
    return gauges | {"rows": torch.tensor(float(min(map(len, tokens.values()))))}
