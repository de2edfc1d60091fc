"""Held-out crops through the model, as strips of pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

import numpy as np
import torch
from torch import Tensor

from medfast.objectives.held_out import AT_ONCE, crops
from medfast.types import Batch, Objective

from . import page, pictures
from .pictures import PLANES, Plane

__all__ = ["gallery"]

HIDDEN, DROPPED = (0.95, 0.45, 0.10), (0.20, 0.55, 0.95)
CANDIDATES = 16  # crops that are looked at to find some with anatomy on them

Shown = dict[str, Tensor]  # of one crop and view: "view", "other", "mask" ... each (d, h, w)


def gallery(objective: Objective, stream, count: int = 3) -> str:
    """HTML of ``count`` held-out crops; "" where the objective draws no pictures or the crops are no volumes."""
    objective.eval()
    device = next(objective.parameters()).device
    drawn = []
    for number, (batch, row) in enumerate(_choose(stream, count)):
        if batch.views[0].dim() != 5:
            return ""
        shown = objective.picture(batch.to(device))
        if not shown:
            return ""
        drawn.append(_crop(number + 1, _one(batch, shown, row), _caption(stream, batch, row)))
    return "".join(drawn)


def _choose(stream, count: int) -> Iterator[tuple[Batch, int]]:
    """The richest crops, one per volume while there are enough: chosen by the truth, never by the result."""
    found = []
    for batch in crops(stream, CANDIDATES, AT_ONCE):
        volumes = batch.params.get("volume", torch.zeros(len(batch.views[0]), dtype=torch.int64))
        for row, volume in enumerate(volumes.tolist()):
            found.append((pictures.richness(batch.views[0][row]), volume, batch, row))
    found.sort(key=lambda entry: -entry[0])
    firsts = [entry for i, entry in enumerate(found) if entry[1] not in {e[1] for e in found[:i]}]
    others = [entry for entry in found if not any(entry is first for first in firsts)]
    return ((batch, row) for _, _, batch, row in (firsts + others)[:count])


def _one(batch: Batch, picture: dict[str, tuple[Tensor, ...]], row: int) -> Shown:
    """The first view of a crop with everything that belongs to it, and the second view where there is one."""
    view = batch.views[0][row, 0].float().cpu()
    shown = {"view": view}
    if len(batch.views) > 1:
        shown["other"] = batch.views[1][row, 0].float().cpu()
    for name, per_view in picture.items():
        one = per_view[0][row].cpu()
        one = one[0] if one.dim() == 4 else one
        shown[name] = pictures.to_voxels(one, tuple(view.shape)) if name == "attention" else one
    return shown


def _caption(stream, batch: Batch, row: int) -> str:
    parts = []
    if "volume" in batch.params:
        record = stream.store.records[int(batch.params["volume"][row])]
        parts.append(f"volume {record['id']}")
    if batch.boxes is not None:
        start = batch.boxes[row, 0, : batch.boxes.shape[-1] // 2].tolist()
        parts.append("first view cut at voxel " + ", ".join(f"{x:.0f}" for x in start) + " (up, front, right)")
    return escape("; ".join(parts))


def _crop(number: int, shown: Shown, caption: str) -> str:
    cuts = [dict(plane=p, index=i) for p, i in zip(PLANES, pictures.slices_of(shown["view"]), strict=True)]
    sees = _strip(_sees(shown), shown, cuts)
    fills = _strip(_fills(shown), shown, cuts) if "reconstruction" in shown else ""
    title = f"<h3>Crop {number}</h3><p><small>{caption}</small></p>"
    return f'<div class="crop">{title}{sees}{fills}</div>'


def _sees(shown: Shown) -> list[tuple[str, str, str]]:
    """Columns (what to draw, heading, sentence) of what teacher and student see."""
    columns = [
        ("view", "First view", "the crop that all other pictures show"),
        ("other", "Second view", "another crop of the same volume"),
        ("drop", "Teacher's drop", "blue: cells the noisy teacher does not see"),
        ("attention", "Teacher's attention", "bright: cells it finds telling"),
        ("mask", "Student's mask", "orange: cells the student has to fill in"),
    ]
    return [column for column in columns if column[0] in shown]


def _fills(shown: Shown) -> list[tuple[str, str, str]]:
    return [
        ("input", "Masked input", "what the student is given"),
        ("pasted", "Filled in", "reconstruction where hidden, the scan elsewhere"),
        ("view", "Truth", "the same slice of the scan"),
        ("reconstruction", "Raw output", "the whole output; only hidden cells are trained"),
        ("error", "Error", f"black: none or not hidden; white: {pictures.ERROR_TOP:g} of the window"),
    ]


def _strip(columns: Sequence[tuple[str, str, str]], shown: Shown, cuts: Sequence[dict]) -> str:
    """A grid with a row per plane and a column per kind of picture."""
    cells = ["<span></span>"]
    cells += [f'<div class="head"><b>{escape(head)}</b>{escape(text)}</div>' for _, head, text in columns]
    for cut in cuts:
        cells.append(f'<div class="side">{cut["plane"].name}</div>')
        cells += [_draw(kind, head, shown, **cut) for kind, head, _ in columns]
    grid = f"grid-template-columns:18px repeat({len(columns)},minmax(0,1fr))"
    return f'<div class="strip" style="{grid}">{"".join(cells)}</div>'


def _draw(kind: str, head: str, shown: Shown, plane: Plane, index: int) -> str:
    def cut(name: str) -> np.ndarray:
        return plane.cut(shown[name], index)

    alt, edges = f"{head}, {plane.name} slice", plane.edges
    if kind in ("view", "reconstruction"):
        return page.picture(alt, pictures.grey(cut(kind)), edges=edges)
    if kind == "other":
        other = shown["other"]
        return page.picture(alt, pictures.grey(plane.cut(other, pictures.slices_of(other)[plane.axis])), edges=edges)
    truth = cut("view")
    if kind == "attention":
        low, high = (float(x) for x in shown["attention"].aminmax())
        overlay = pictures.colours(cut("attention") - low, "inferno", (high - low) or 1.0, 0.6)
        return page.picture(alt, pictures.grey(truth), overlay, edges)
    if kind in ("mask", "drop"):
        overlay = pictures.tint(cut(kind), HIDDEN if kind == "mask" else DROPPED)
        return page.picture(alt, pictures.grey(truth), overlay, edges)
    hidden = cut("mask")
    if kind == "input":
        return page.picture(alt, pictures.grey(np.where(hidden, 0.5, truth)), edges=edges)
    made = cut("reconstruction")
    if kind == "pasted":
        return page.picture(alt, pictures.grey(np.where(hidden, made, truth)), edges=edges)
    return page.picture(alt, pictures.colours(np.where(hidden, np.abs(made - truth), 0), "inferno", pictures.ERROR_TOP))
