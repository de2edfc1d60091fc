"""``medfast data prepare``: files in, store out. Resumable, atomic; no bad file is replaced or passed over in silence.

Work is keyed by the hash of a file's bytes and of the recipe, so renaming or moving sources changes nothing. Threads do
the work (inflating, hashing and filtering all release the interpreter); one writer commits their results in the order
of the sorted file names, so which of two copies is kept does not depend on timing.
"""

from __future__ import annotations

import io
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medfast.data import checks, nifti
from medfast.data.image import Bad
from medfast.data.ledger import Ledger, Made, volume_id
from medfast.data.progress import Progress
from medfast.data.resample import AIR, EXECUTORS, KERNELS, TOP, new_affine
from medfast.data.store import DataError, write_durably
from medfast.data.threads import one_thread

__all__ = ["Summary", "default_jobs", "prepare"]

QUANTILES = (0.5, 5, 25, 50, 75, 95, 99.5)


@dataclass
class Summary:
    """What a run did.

    good: ids in the store that these files make up. new: how many of them this run made. bad: rows of the quarantine
    ledger for these files (path, kind, message), repeats of a kept volume included. seconds: wall time.
    """

    good: list[str] = field(default_factory=list)
    new: int = 0
    bad: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def share_bad(self) -> float:
        """Bad files over all files; repeats of a kept volume count as neither."""
        bad = sum(row["kind"] != "duplicate" for row in self.bad)
        return bad / max(1, bad + len(self.good))

    def __str__(self) -> str:
        if not self.new:
            return f"nothing to do: {len(self.good)} volumes are there already, {len(self.bad)} files are quarantined"
        return (f"{len(self.good)} volumes, {self.new} of them new, {len(self.bad)} files quarantined, "
                f"in {self.seconds:.1f} s")  # fmt: skip


def prepare(
    input: str | Path, store: str | Path, *, spacing: float = 2.0, kernel: str = "triangle", max_bad: float = 0.02,
    jobs: int | None = None, executor: str = "torch", progress: bool = True,
) -> Summary:  # fmt: skip
    """Bring every .nii and .nii.gz under ``input`` (a folder or one file) into ``store``, int16 HU at ``spacing`` mm.

    max_bad: share of bad files above which DataError is raised, after all good ones are stored; 1 takes what is usable.
    No usable volume is always a DataError. jobs: threads, ``default_jobs()`` if None. Raises ValueError for bad
    arguments and where the store was made with another recipe.
    """
    started = time.monotonic()
    if not 0 <= max_bad <= 1:
        raise ValueError(f"max_bad is {max_bad}; it is a share, from 0 (no bad file) to 1 (take whatever is usable)")
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs is {jobs}; it is a number of threads, at least 1")
    recipe, files = _recipe(spacing, kernel, executor), _find(Path(input))
    summary = Summary()
    with Ledger(Path(store), recipe) as ledger, Progress(len(files), progress) as shown, one_thread():
        before = len(ledger.index)
        for file, result in _results(files, ledger, jobs or default_jobs()):
            verdict = ledger.commit(file, result)
            if isinstance(verdict, str):
                summary.good.append(verdict)
                shown.step()
            else:
                summary.bad.append(verdict)
                shown.step(f"{verdict['kind']}: {file}: {verdict['message']}")
        summary.new = len(ledger.index) - before
        summary.seconds = time.monotonic() - started
        shown.say(f"{store}: {summary}")
    if not summary.good:
        raise DataError(f"no usable CT volume among the {len(files)} files of {input}: {_reasons(summary)}")
    if summary.share_bad > max_bad:
        raise DataError(
            f"{summary.share_bad:.1%} of the files are bad ({_reasons(summary)}), {max_bad:.1%} are allowed. The good "
            "ones are stored. Repair or remove the others, or allow more with --max-bad (1 takes whatever is usable)."
        )
    return summary


def default_jobs() -> int:
    """Cores that this process may run on; where the system does not say, all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _reasons(summary: Summary) -> str:
    kinds = [row["kind"] for row in summary.bad]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds))) or "none bad"


def _recipe(spacing: float, kernel: str, executor: str) -> dict[str, Any]:
    low, high = checks.LIMITS["voxel_mm"]
    if not low <= spacing <= high:
        raise ValueError(f"spacing is {spacing} mm; accepted are {low} to {high} mm")
    if kernel not in KERNELS:
        raise ValueError(f"kernel is {kernel!r}; accepted are {', '.join(KERNELS)}")
    if executor not in EXECUTORS:
        raise ValueError(f"executor is {executor!r}; accepted are {', '.join(EXECUTORS)}")
    if executor == "dali" and kernel != "triangle":
        raise ValueError(f"the dali executor has the triangle kernel only, not {kernel!r}; use executor torch")
    return {"version": 1, "spacing": float(spacing), "kernel": kernel, "executor": executor, "clamp": [AIR, TOP],
            "dtype": "int16", "unit": "HU", "axes": "inferior-superior, posterior-anterior, left-right",
            "grid": "edge", "limits": checks.LIMITS}  # fmt: skip


def _find(where: Path) -> list[Path]:
    """Sorted absolute paths of the NIfTI files."""
    if not where.exists():
        raise ValueError(f"there is no {where}; INPUT is a folder with .nii or .nii.gz files, or one such file")
    if where.is_file():
        return [where.resolve()]
    files = sorted(file.resolve() for file in where.rglob("*")
                   if file.name.lower().endswith((".nii", ".nii.gz")) and not file.is_dir())  # fmt: skip
    if not files:
        raise DataError(f"no usable CT volume in {where}: it holds no file named .nii or .nii.gz")
    return list(dict.fromkeys(files))


def _results(files: list[Path], ledger: Ledger, jobs: int) -> Iterator[tuple[Path, Any]]:
    """(file, what ``Ledger.commit`` takes) in the order of ``files``; at most two results a job wait for that."""
    pending: deque[tuple[Path, Future]] = deque()
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for number, file in enumerate(files):
                pending.append((file, pool.submit(_one, file, number, ledger)))
                if len(pending) >= 2 * jobs:
                    first, future = pending.popleft()
                    yield first, future.result()
            while pending:
                first, future = pending.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _one(file: Path, number: int, ledger: Ledger) -> Any:
    """Judge and prepare one file: an earlier verdict, Made, or Bad. What it writes lies in the temporary folder."""
    if earlier := ledger.earlier(file):
        return earlier
    try:
        source, data = nifti.read(file)
        found = volume_id(source, ledger.recipe)
        if found in ledger.index:
            return Made(found, None, None)
        volume, record = _make(data, ledger.recipe)
    except Bad as bad:
        return bad
    except Exception as error:  # noqa: BLE001 - whatever one file does to a reader, the others go on; it is named
        return Bad("unreadable", f"{type(error).__name__}: {error}")
    stream = io.BytesIO()
    np.save(stream, volume, allow_pickle=False)
    temporary = ledger.temporary / f"{number}.npy"
    content = stream.getbuffer()
    written = {"id": found, "hash": write_durably(temporary, content), "bytes": len(content)}
    return Made(found, {**written, **record}, temporary)


def _make(data: bytes, recipe: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    """int16 (d, h, w) volume on the new grid and its part of the index line. Raises Bad."""
    image = nifti.parse(data)
    checks.check_geometry(image)
    full, histogram = checks.hounsfield(image)
    checks.check_hounsfield(histogram)
    new = recipe["spacing"]
    resize: Callable[..., np.ndarray] = EXECUTORS[recipe["executor"]]
    volume = resize(full, image.spacing, new, recipe["kernel"])
    checks.check_stored(volume.shape)
    box, foreground = checks.body_box(volume)
    return volume, {
        "shape": list(volume.shape),
        "voxels": checks.fingerprint(full),
        "spacing": [new] * 3,
        "affine": np.round(new_affine(image.affine, image.spacing, new), 6).tolist(),
        "percentiles": dict(zip(map(str, QUANTILES), np.percentile(volume, QUANTILES).round(1).tolist(), strict=True)),
        "body": box,
        "foreground": foreground,
        "source": {"shape": list(full.shape), "spacing": np.round(image.spacing, 5).tolist(),
                   "orientation": image.orientation, "angle": image.angle},
        "notes": image.notes,
    }  # fmt: skip
