"""``medfast data prepare``: files in, store out. Resumable, atomic; no bad file is replaced or passed over in silence.

Work is keyed by the hash of a file's bytes and of the recipe, so renaming or moving sources changes nothing. Threads do
the work (inflating, hashing and filtering all release the interpreter); one writer commits their results in the order
of the sorted file names, so which of two copies is kept does not depend on timing.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medfast.data import layouts
from medfast.data.files import DataError, write_durably
from medfast.data.formats import fetch
from medfast.data.image import Bad, Blobs
from medfast.data.inputs import Case, find
from medfast.data.ledger import Ledger, Made, volume_id
from medfast.data.make import label, make
from medfast.data.progress import Progress
from medfast.data.recipe import recipe
from medfast.data.threads import one_thread

__all__ = ["Summary", "default_jobs", "parse_part", "prepare"]


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
        """Bad files over all files; repeats of a kept volume and objects without pixels count as neither."""
        bad = sum(row["kind"] not in ("duplicate", "no-image") for row in self.bad)
        return bad / max(1, bad + len(self.good))

    def __str__(self) -> str:
        if not self.new:
            return f"nothing to do: {len(self.good)} volumes are there already, {len(self.bad)} files are quarantined"
        return (f"{len(self.good)} volumes, {self.new} of them new, {len(self.bad)} files quarantined, "
                f"in {self.seconds:.1f} s")  # fmt: skip


def prepare(
    input: str | Path, store: str | Path, *, max_bad: float = 0.02, jobs: int | None = None, part: str | None = None,
    layout: str = "npy", progress: bool = True, **settings: Any,
) -> Summary:  # fmt: skip
    """Bring every image of ``input`` (see ``inputs.find``) into ``store``. settings: those of ``recipe.recipe``.

    max_bad: share of bad files above which DataError is raised, after all good ones are stored; 1 takes what is usable.
    No usable volume is always a DataError. jobs: threads, ``default_jobs()`` if None. part: "3/8" does every eighth
    case, from the third on, beside others; a run without part then joins all. layout: how arrays lie on the disk
    (``layouts``). Raises ValueError for bad arguments and where the store was made with another recipe or layout.
    """
    started = time.monotonic()
    if not 0 <= max_bad <= 1:
        raise ValueError(f"max_bad is {max_bad}; it is a share, from 0 (no bad file) to 1 (take whatever is usable)")
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs is {jobs}; it is a number of threads, at least 1")
    settled = recipe(**settings)
    layouts.check(layout)
    share = parse_part(part)
    cases = find(input, settled["dimensions"])[share.start :: share.step]
    summary = Summary()
    with Ledger(Path(store), settled, part, layout) as ledger, Progress(len(cases), progress) as shown, one_thread():
        before = len(ledger.index)
        for case, result in _results(cases, ledger, jobs or default_jobs()):
            verdict = ledger.commit(case, result)
            if isinstance(verdict, str):
                summary.good.append(verdict)
                shown.step()
            else:
                summary.bad.append(verdict)
                shown.step(f"{verdict['kind']}: {case.path}: {verdict['message']}")
        summary.new = len(ledger.index) - before
        summary.seconds = time.monotonic() - started
        shown.say(f"{store}: {summary}")
    if not summary.good and (cases or part is None):
        raise DataError(f"no usable volume among the {len(cases)} images of {input}: {_reasons(summary)}")
    if summary.share_bad > max_bad:
        raise DataError(
            f"{summary.share_bad:.1%} of the files are bad ({_reasons(summary)}), {max_bad:.1%} are allowed. The good "
            "ones are stored. Repair or remove the others, or allow more with --max-bad (1 takes whatever is usable)."
        )
    return summary


def parse_part(part: str | None) -> slice:
    """Which cases "3/8" stands for: the third, the eleventh and so on; all where None. ValueError for other text."""
    first, _, count = (part or "1/1").partition("/")
    if not (first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
        raise ValueError(f"part is {part!r}; it is K/N, e.g. 3/8 for the third of eight runs")
    return slice(int(first) - 1, None, int(count))


def default_jobs() -> int:
    """Cores that this process may run on; where the system does not say, all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _reasons(summary: Summary) -> str:
    kinds = [row["kind"] for row in summary.bad]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds))) or "none bad"


def _results(cases: list[Case], ledger: Ledger, jobs: int) -> Iterator[tuple[Case, Any]]:
    """(case, what ``Ledger.commit`` takes) in the order of ``cases``; at most two results a job wait for that."""
    pending: deque[tuple[Case, Future]] = deque()
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for number, case in enumerate(cases):
                pending.append((case, pool.submit(_one, case, number, ledger)))
                if len(pending) >= 2 * jobs:
                    first, future = pending.popleft()
                    yield first, future.result()
            while pending:
                first, future = pending.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _one(case: Case, number: int, ledger: Ledger) -> Any:
    """Judge and prepare one case: an earlier verdict, Made, or Bad. What it writes lies in the temporary folder."""
    if earlier := ledger.earlier(case):
        return earlier
    try:
        source, blobs = fetch(case)
        found = volume_id(source, ledger.recipe)
        if found in ledger.index:
            return Made(found, None, None)
        products, record = _products(case, blobs, ledger.recipe)
    except Bad as bad:
        return bad
    except ModuleNotFoundError:  # a missing extra is no fault of the file
        raise
    except Exception as error:  # noqa: BLE001 - whatever one file does to a reader, the others go on; it is named
        return Bad("unreadable", f"{type(error).__name__}: {error}")
    if case.group:
        record["group"] = ledger.pseudonym(case.group)
    if case.dataset:
        record["dataset"] = ledger.pseudonym(f"dataset {case.dataset}")
    for name, array in products.items():
        content = layouts.encode(ledger.layout, array)
        part = record if name == "volumes" else record["label"]
        part |= {"hash": write_durably(ledger.temporary / f"{number}.{name}", content), "bytes": len(content)}
    return Made(found, {"id": found, **record}, {name: ledger.temporary / f"{number}.{name}" for name in products})


def _products(case: Case, blobs: Blobs, settled: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(folder of the store -> array, index line)."""
    misnamed = case.path.suffix.lower() == ".gz" and blobs[0][:2] != b"\x1f\x8b"
    volume, record, image = make(blobs, settled)
    record["notes"] += ["misnamed"] * misnamed
    products = {"volumes": volume}
    if case.label is not None:
        products["labels"], record["label"] = label(case.label.read_bytes(), image, record, settled)
    return products, record
