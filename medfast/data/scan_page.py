"""The page of ``medfast data scan``. Volumes are known by their row number: no name, path, date or header text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medfast.data import drawing
from medfast.data.inputs import find
from medfast.data.prepare import default_jobs
from medfast.data.recipe import recipe
from medfast.data.scan import Forecast, Sample, forecast, samples, survey

__all__ = ["WINDOWS", "scan"]

WINDOWS = {"HU": (-500, 500), "percentile": (0, 1000), "zscore": (-2000, 3000)}
AXES = ("between slices (feet to head)", "back to front", "left to right")


def scan(
    input: str | Path, out: str | Path, *, jobs: int | None = None, count: int = 6, progress: bool = True,
    **settings: Any,
) -> Forecast:  # fmt: skip
    """Judge all headers of ``input``, prepare ``count`` volumes in memory, write OUT/index.html and
    OUT/private/scan.jsonl (a row a case, with paths: keep it private). settings: those of ``recipe.recipe``; pictures
    are not scanned. Returns the forecast of preparing with them. Raises as ``inputs.find`` does."""
    settled = recipe(**settings)
    if settled["dimensions"] == 2:
        raise ValueError("pictures (modality xr) have no geometry to scan; prepare takes them as they are")
    cases, jobs = find(input), jobs or default_jobs()
    rows = survey(cases, settled, jobs, progress)
    taken = samples(cases, rows, settled, count)
    expected = forecast(rows, taken, jobs)
    private = Path(out) / "private"
    private.mkdir(parents=True, exist_ok=True)
    for sample in taken:
        rows[sample.row]["sample"] = sample.bad or "good"
    (private / "scan.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (Path(out) / "index.html").write_text(_page(rows, taken, expected, settled), encoding="utf-8")
    if progress:
        print(f"{len(cases)} cases. Prepared with these settings: {expected}. {Path(out) / 'index.html'}")
    return expected


def _page(rows: Sequence[dict], taken: Sequence[Sample], expected: Forecast, settled: dict[str, Any]) -> str:
    shaped = [row for row in rows if "shape" in row]
    body = [f"<p>{len(rows)} cases, {sum(row.get('bytes', 0) for row in rows) / 1e9:.3f} GB. Prepared at "
            f"{settled['spacing']:g} mm: {expected}.</p>", _faults(rows)]  # fmt: skip
    if shaped:
        spacing, shape = (np.array([row[name] for row in shaped], float) for name in ("spacing", "shape"))
        body.append("<h2>Voxel size, mm</h2>" + "".join(_histogram(AXES[a], spacing[:, a]) for a in range(3)))
        body.append("<h2>Voxels along each axis</h2>" + "".join(_histogram(AXES[a], shape[:, a]) for a in range(3)))
        counts = Counter(row["orientation"] for row in shaped).most_common()
        notes = Counter(note for row in shaped for note in row["notes"]).most_common()
        slices = sum(row["files"] > 1 for row in rows)
        body.append("<h2>Orientation, notes, series</h2>" + drawing.table(("axes of the file", "cases"), counts)
                    + drawing.table(("note", "cases"), notes)
                    + f"<p>{slices} cases are DICOM series of several files.</p>")  # fmt: skip
    return drawing.page("Scan of volumes", body + _samples(taken, settled["unit"]))


def _faults(rows: Sequence[dict]) -> str:
    kinds = Counter(row["kind"] for row in rows if "kind" in row).most_common()
    twins = [(f"#{number}", f"#{row['twin']}") for number, row in enumerate(rows) if "twin" in row]
    refused = drawing.table(("refused by header", "cases"), kinds) if kinds else "<p>No header is refused.</p>"
    return "<h2>Refused and repeated</h2>" + refused + (drawing.table(("case", "copy of"), twins) if twins else "")


def _histogram(title: str, values: np.ndarray) -> str:
    counts, edges = np.histogram(values, bins=min(24, max(4, len(values))))
    return drawing.bars(title, counts.tolist(), edges.tolist())


def _samples(taken: Sequence[Sample], unit: str) -> list[str]:
    out, (low, high) = ["<h2>Volumes that were prepared to look at them</h2>"], WINDOWS[unit]
    for sample in taken:
        if sample.bad is not None or sample.volume is None:
            out.append(f"<h3>#{sample.row}: refused, {sample.bad}</h3>")
            continue
        volume = sample.volume if sample.volume.ndim == 3 else sample.volume[0]
        counts, edges = np.histogram(volume, np.linspace(*{"HU": (-1200, 1600)}.get(unit, (low, high)), 57))
        pictures = [drawing.embed(drawing.grey(drawing.plane(volume, axis, n // 2), low, high), f"#{sample.row}")
                    for axis, n in enumerate(volume.shape)]  # fmt: skip
        out.append(f"<h3>#{sample.row}: {' x '.join(map(str, volume.shape))}</h3>" + "".join(pictures)
                   + drawing.bars(unit, np.sqrt(counts).tolist(), edges.tolist()))  # fmt: skip
    return out
