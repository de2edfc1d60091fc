"""``medfast data show``: three planes of a stored volume, where crops would be cut, masked cells, labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import medfast_kernels as mk
from medfast.data import drawing, plan
from medfast.data.scan_page import WINDOWS
from medfast.data.store import DataError, Store
from medfast_kernels import Key

__all__ = ["show"]

COLOURS = ((230, 60, 60), (70, 200, 90), (80, 140, 255), (240, 200, 50))
MASKED = (40, 60, 160)
LABELS = np.array([[0, 0, 0], *COLOURS, (220, 90, 220), (80, 220, 220), (250, 150, 60)], np.float32)


def show(
    store: str | Path, volume: str, out: str | Path, *, size: int = 128, crops: int = 2, cell: int = 16,
    mask: float = 0.7, seed: int = 0,
) -> Path:  # fmt: skip
    """Write a PNG: a row of axial, coronal and sagittal planes with ``crops`` boxes of ``size`` voxels, then a row for
    each crop with a share ``mask`` of its cells of ``cell`` voxels blue; labels are tinted where the store has them.

    Raises DataError for an unknown id or damaged files, ValueError for bad sizes. Returns ``out``.
    """
    opened = Store(store)
    names = [record["id"] for record in opened.records]
    if volume not in names:
        raise DataError(f"{store} has no volume {volume!r}; it has {len(names)}, e.g. {', '.join(names[:3])}")
    if not 0 <= mask < 1 or cell < 1 or size % cell:
        raise ValueError(f"size {size} must be a multiple of cell {cell}, and mask {mask} a share below 1")
    index = names.index(volume)
    record, stored, label = opened.records[index], opened.volume(index)[...], opened.label(index)
    label = None if label is None else label[...]
    window = WINDOWS[opened.recipe.get("unit", "HU")]
    if stored.ndim == 2:
        return _write(out, [[drawing.grey(stored, *window)]])
    stored = stored if stored.ndim == 3 else stored[0]
    settled = plan.recipe(size=size, views=max(1, crops))
    drawn = plan.plan(settled, np.array([stored.shape]), np.array([record["body"]]), seed=seed, batch=1, step=0,
                      slots=torch.zeros(1, dtype=torch.int64))  # fmt: skip
    boxes = [(start, start + size) for start in drawn.start[0][:crops]]
    whole = [_plane(stored, label, axis, n // 2, window) for axis, n in enumerate(stored.shape)]
    for axis, picture in enumerate(whole):
        for number, (start, stop) in enumerate(boxes):
            drawing.box(picture, axis, stored.shape, start, stop, COLOURS[number % len(COLOURS)])
    rows = [whole]
    for number, (start, _) in enumerate(boxes):
        crop, cut = (None if array is None else _crop(array, start, size, fill)
                     for array, fill in ((stored, opened.recipe.get("fill", -1024)), (label, 0)))  # fmt: skip
        assert crop is not None
        hidden = _cells(size // cell, mask, Key(seed, 0, torch.tensor([number]))).repeat(cell, 0).repeat(cell, 1)
        hidden = hidden.repeat(cell, 2)
        rows.append([_tint(_plane(crop, cut, axis, size // 2, window), drawing.plane(hidden, axis, size // 2))
                     for axis in range(3)])  # fmt: skip
    return _write(out, rows)


def _plane(volume: np.ndarray, label: np.ndarray | None, axis: int, at: int, window: tuple[int, int]) -> np.ndarray:
    picture = drawing.grey(drawing.plane(volume, axis, at), *window)
    if label is not None:
        classes = drawing.plane(label, axis, at).astype(np.int64)
        colour = LABELS[np.where(classes > 0, (classes - 1) % (len(LABELS) - 1) + 1, 0)]
        picture[classes > 0] = (0.55 * picture + 0.45 * colour)[classes > 0].astype(np.uint8)
    return picture


def _crop(volume: np.ndarray, start: np.ndarray, size: int, fill: int) -> np.ndarray:
    low, high = np.maximum(start, 0), np.minimum(start + size, volume.shape)
    out = np.full((size,) * 3, fill, volume.dtype)
    inside = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    out[tuple(slice(a, b) for a, b in zip(low - start, high - start, strict=True))] = volume[inside]
    return out


def _cells(side: int, share: float, key: Key) -> np.ndarray:
    """(side, side, side) bool, a share of True, drawn by key."""
    where = np.zeros(side**3, bool)
    where[mk.random_ids(side**3, int(share * side**3), key=key)[0].numpy()] = True
    return where.reshape(side, side, side)


def _tint(picture: np.ndarray, where: np.ndarray) -> np.ndarray:
    picture[where] = (0.35 * picture + 0.65 * np.array(MASKED))[where].astype(np.uint8)
    return picture


def _write(out: str | Path, rows: list[list[np.ndarray]]) -> Path:
    gap, width = 4, max(sum(picture.shape[1] + 4 for picture in row) for row in rows)
    height = sum(max(picture.shape[0] for picture in row) + gap for row in rows)
    sheet, top = np.full((height, width, 3), 255, np.uint8), 0
    for row in rows:
        left = 0
        for picture in row:
            sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
            left += picture.shape[1] + gap
        top += max(picture.shape[0] for picture in row) + gap
    Path(out).write_bytes(drawing.png(sheet))
    return Path(out)
