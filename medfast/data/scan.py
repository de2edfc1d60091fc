"""``medfast data scan`` and ``prepare --dry-run``: what is there and what it will cost, before anything is written.

Every header is read and judged; a few volumes, evenly spread, are prepared in memory for what no header says (HU,
pictures, seconds, refusals by content). Nothing is left out silently: what cannot be read is a row with its class.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medfast.data import checks
from medfast.data.formats import HEAD, fetch, peek
from medfast.data.image import Bad
from medfast.data.inputs import Case
from medfast.data.layouts import encode
from medfast.data.make import make
from medfast.data.progress import Progress
from medfast.data.recipe import DICOM
from medfast.data.resample import grid, new_affine
from medfast.data.straighten import straight_grid
from medfast.data.threads import one_thread

__all__ = ["Forecast", "Sample", "forecast", "samples", "survey"]

NPY_HEADER, INDEX_LINE = 128, 900  # bytes
LABEL_BYTES = {"npy": 1.0, "blosc2": 0.05}  # of a voxel


@dataclass
class Sample:
    """A volume prepared in memory. voxels: of its source. bad: the class of its refusal, or None."""

    row: int
    voxels: int
    seconds: float
    bad: str | None = None
    record: dict[str, Any] = field(default_factory=dict)
    volume: np.ndarray | None = None


@dataclass
class Forecast:
    """volumes, bytes: of the store. seconds: of preparing. bad: expected classes of refusal and their counts."""

    volumes: int
    bytes: int
    seconds: float
    bad: Counter[str]

    def __str__(self) -> str:
        refused = ", ".join(f"{count} {kind}" for kind, count in sorted(self.bad.items())) or "none"
        hours, rest = divmod(round(self.seconds), 3600)
        return (f"{self.volumes} volumes, {self.bytes / 1e9:.3f} GB, about {hours}:{rest // 60:02d}:{rest % 60:02d}; "
                f"refused by header: {refused}")  # fmt: skip


def survey(cases: Sequence[Case], settled: dict[str, Any], jobs: int, progress: bool = True) -> list[dict[str, Any]]:
    """One row a case: path, files, bytes, and shape, spacing, orientation, angle, notes, stored (its shape in a store
    of these settings), or kind and message of what is wrong. twin: the number of an earlier row of the same bytes."""
    with ThreadPoolExecutor(jobs) as pool, Progress(len(cases), progress, "headers") as shown:
        rows = []
        for row in pool.map(lambda case: _row(case, settled), cases):
            rows.append(row)
            shown.step()
    first: dict[str, int] = {}
    for number, row in enumerate(rows):
        mark = row.pop("mark", None)
        if mark is not None and first.setdefault(mark, number) != number:
            row["twin"] = first[mark]
    return rows


def _row(case: Case, settled: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"path": str(case.path), "files": len(case.files), "label": case.label is not None}
    try:
        row["bytes"] = sum(file.stat().st_size for file in case.files)
        row["mark"] = _mark(case)
        image = peek(case, settled["channels"], settled.get("straighten", False))
        row |= {"shape": list(image.shape), "spacing": np.round(image.spacing, 5).tolist(), "angle": image.angle,
                "orientation": image.orientation, "modality": image.modality, "notes": image.notes}  # fmt: skip
        checks.check_geometry(image)
        if image.modality and image.modality not in DICOM[settled["modality"]]:
            raise Bad("modality", f"the file says its modality is {image.modality}")
        stored = grid(image.shape, image.spacing, settled["spacing"])
        if image.lean:
            leaning = new_affine(image.affine, image.spacing, settled["spacing"])
            _, stored = straight_grid(leaning, stored, settled["spacing"])
        checks.check_stored(stored)
        row["stored"] = [*([settled["channels"]] if settled["channels"] else []), *stored]
    except Bad as bad:
        row |= {"kind": bad.kind, "message": str(bad)}
    except ModuleNotFoundError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever one file does to a reader, the others go on; it is named
        row |= {"kind": "unreadable", "message": f"{type(error).__name__}: {error}"}
    return row


def _mark(case: Case) -> str:
    """Equal for copies: sizes and the first and last bytes of the files. A recompressed copy is found by prepare."""
    marks = []
    for file in case.files:
        with file.open("rb") as stream:
            head, size = stream.read(HEAD), file.stat().st_size
            stream.seek(max(0, size - HEAD))
            marks.append(hashlib.sha256(b"%d " % size + head + stream.read(HEAD)).hexdigest())
    return " ".join(sorted(marks))


def samples(cases: Sequence[Case], rows: Sequence[dict[str, Any]], settled: dict[str, Any], count: int) -> list[Sample]:
    """Prepare ``count`` of the cases that their headers allow, evenly spread, one after another, in memory."""
    usable = [number for number, row in enumerate(rows) if "stored" in row and "twin" not in row]
    chosen = usable if len(usable) <= count else [usable[i * len(usable) // count] for i in range(count)]
    with one_thread():
        return [_sample(number, cases[number], rows[number], settled) for number in chosen]


def _sample(number: int, case: Case, row: dict[str, Any], settled: dict[str, Any]) -> Sample:
    started, voxels = time.perf_counter(), int(np.prod(row["shape"]))
    try:
        volume, record, _ = make(fetch(case)[1], settled)
    except Bad as bad:
        return Sample(number, voxels, time.perf_counter() - started, bad.kind)
    return Sample(number, voxels, time.perf_counter() - started, None, record, volume)


def forecast(rows: Sequence[dict[str, Any]], taken: Sequence[Sample], jobs: int, layout: str = "npy") -> Forecast:
    """What preparing these will give. Sizes come from every header; the share that a body box leaves, that a layout
    compresses to and that is refused by content, and the seconds a voxel, come from the samples."""
    usable = [row for row in rows if "stored" in row and "twin" not in row]
    bad = Counter(row["kind"] for row in rows if "kind" in row)
    bad.update(["duplicate"] * sum("twin" in row and "kind" not in row for row in rows))
    good = [sample for sample in taken if sample.bad is None]
    kept = len(good) / len(taken) if taken else 1.0
    whole = sum(int(np.prod(rows[sample.row]["stored"])) for sample in good)
    volumes = [sample.volume for sample in good if sample.volume is not None]
    cut = sum(volume.size for volume in volumes) / whole if whole else 1.0
    each = _bytes_a_voxel(volumes, layout)
    size = sum(NPY_HEADER + INDEX_LINE + each * cut * int(np.prod(row["stored"])) for row in usable)
    size += sum(NPY_HEADER + LABEL_BYTES[layout] * cut * int(np.prod(row["stored"][-3:]))
                for row in usable if row["label"])  # fmt: skip
    voxels = sum(sample.voxels for sample in taken)
    rate = sum(sample.seconds for sample in taken) / voxels if voxels else 0.0
    seconds = rate * sum(int(np.prod(row["shape"])) for row in usable) / jobs
    return Forecast(round(kept * len(usable)), round(kept * size), seconds, bad)


def _bytes_a_voxel(volumes: Sequence[np.ndarray], layout: str) -> float:
    if layout == "npy" or not volumes:
        return 2.0
    return sum(len(encode(layout, volume)) for volume in volumes) / sum(volume.size for volume in volumes)
