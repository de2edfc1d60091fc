"""Pictures of volumes and counts for pages that need nothing beside them: PNG bytes and SVG text.

Planes are turned as a radiologist looks at them: the patient's right on the left, front and head up.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence

import numpy as np

__all__ = ["bars", "box", "embed", "grey", "page", "plane", "png", "table"]

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse}td,th{padding:.15em .8em;text-align:left;border-bottom:1px solid #ddd}
img{image-rendering:pixelated;height:14em;margin:.2em;background:#000}svg{background:#fafafa;margin:.2em}"""


def grey(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """uint8 (rows, columns, 3)."""
    scaled = np.clip((values.astype(np.float32) - low) * (255 / (high - low)), 0, 255).astype(np.uint8)
    return np.repeat(scaled[..., None], 3, axis=-1)


def plane(volume: np.ndarray, axis: int, index: int) -> np.ndarray:
    """(rows, columns) of a (d, h, w) array: axis 0 axial, 1 coronal, 2 sagittal."""
    return np.take(volume, index, axis)[::-1, ::-1]


def box(picture: np.ndarray, axis: int, shape: Sequence[int], start: np.ndarray, stop: np.ndarray, colour) -> None:
    """Draw where a box [start, stop) of a (d, h, w) volume of ``shape`` meets the picture of a plane, in place."""
    rows, columns = [other for other in range(3) if other != axis]
    first = [max(0, shape[a] - int(stop[a])) for a in (rows, columns)]
    last = [min(shape[a], shape[a] - int(start[a])) - 1 for a in (rows, columns)]
    picture[first[0] : last[0] + 1, [first[1], last[1]]] = colour
    picture[[first[0], last[0]], first[1] : last[1] + 1] = colour


def png(picture: np.ndarray) -> bytes:
    """PNG of uint8 (rows, columns, 3). No time, no text inside."""
    rows, columns, _ = picture.shape
    lines = np.concatenate([np.zeros((rows, 1), np.uint8), picture.reshape(rows, -1)], axis=1)
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)),
              (b"IDAT", zlib.compress(lines.tobytes(), 6)), (b"IEND", b""))  # fmt: skip
    body = (struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
            for name, data in chunks)  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def embed(picture: np.ndarray, text: str) -> str:
    return f'<img alt="{text}" title="{text}" src="data:image/png;base64,{base64.b64encode(png(picture)).decode()}">'


def bars(title: str, counts: Sequence[float], edges: Sequence[float]) -> str:
    """SVG histogram; edges: one more than counts."""
    width, height = 280, 120
    top, step = max(1e-12, *counts), width / len(counts)
    drawn = "".join(
        f'<rect x="{i * step:.1f}" y="{20 + height * (1 - n / top):.1f}" width="{max(step - 0.5, 0.5):.1f}" '
        f'height="{height * n / top:.1f}" fill="#37c"/>' for i, n in enumerate(counts))  # fmt: skip
    return (f'<svg width="{width}" height="{height + 40}" font-size="11"><text x="2" y="13">{title}</text>{drawn}'
            f'<text x="2" y="{height + 34}">{edges[0]:g}</text>'
            f'<text x="{width - 2}" y="{height + 34}" text-anchor="end">{edges[-1]:g}</text></svg>')  # fmt: skip


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Cells are our own words and numbers, never a file's."""
    lines = ["".join(f"<th>{name}</th>" for name in head)]
    lines += ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def page(title: str, body: Sequence[str]) -> str:
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
            f"<h1>{title}</h1>{''.join(body)}</html>\n")  # fmt: skip
