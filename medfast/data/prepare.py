"""``medfast data prepare``: files in, store out. Resumable, atomic, and no bad file is replaced or passed over in silence.

Work is keyed by the hash of a file's bytes and of the recipe, so renaming or moving sources changes nothing. Threads do
the work (inflating, hashing and filtering all leave the interpreter); one writer commits their results in the order of
the sorted file names, so which of two copies is kept does not depend on timing.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medfast.data import checks, nifti, store
from medfast.data.progress import Progress
from medfast.data.resample import AIR, EXECUTORS, KERNELS, TOP, new_affine
from medfast.data.store import DataError

__all__ = ["Summary", "prepare"]

QUANTILES = (0.5, 5, 25, 50, 75, 95, 99.5)


@dataclass
class Summary:
    """What a run did. good: ids in the store that these files make up; new: how many were made by this run; bad: rows of
    the quarantine ledger (path, kind, message) of these files, repeats of a kept volume included; seconds: wall time.
    """

    good: list[str] = field(default_factory=list)
    new: int = 0
    bad: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def share_bad(self) -> float:
        """Bad files over all files. Repeats of a kept volume count as neither."""
        bad = sum(row["kind"] != "duplicate" for row in self.bad)
        return bad / max(1, bad + len(self.good))


def prepare(
    input: str | Path, store: str | Path, *, spacing: float = 2.0, kernel: str = "triangle", max_bad: float = 0.02,
    jobs: int | None = None, executor: str = "torch", progress: bool = True,
) -> Summary:  # fmt: skip
    """Bring every .nii and .nii.gz under ``input`` (a folder or one file) into ``store``, int16 HU at ``spacing`` mm.

    max_bad: share of bad files above which DataError is raised, after all good ones are stored; 1 takes what is usable.
    No usable volume is always a DataError. jobs: threads, all cores if None. Raises ValueError for bad arguments, and
    where the store was made with another recipe.
    """
    started = time.monotonic()
    files = _find(Path(input))
    recipe = _recipe(spacing, kernel, executor)
    if not 0 <= max_bad <= 1:
        raise ValueError(f"max_bad is {max_bad}; it is a share, from 0 (no bad file) to 1 (take whatever is usable)")
    jobs = jobs or len(os.sched_getaffinity(0))
    with _opened(Path(store), recipe) as ledger, Progress(len(files), shown=progress) as shown, _one_thread_each():
        summary = Summary()
        for file, result in _work(files, ledger, jobs):
            ledger.commit(file, result, summary)
            bad = summary.bad[-1] if isinstance(result, nifti.Bad) or summary.bad[-1:] and \
                summary.bad[-1]["path"] == str(file) else None  # fmt: skip
            shown.step(f"{file}: {bad['kind']}: {bad['message']}" if bad else None)
    summary.seconds = time.monotonic() - started
    shown.say(_sentence(summary, Path(store)))
    if not summary.good:
        raise DataError(f"no usable CT volume among {len(files)} files in {input}; the reasons are above and in "
                        f"{Path(store) / 'private' / 'quarantine.jsonl'}")  # fmt: skip
    if summary.share_bad > max_bad:
        raise DataError(f"{summary.share_bad:.1%} of the files are bad, {max_bad:.1%} are allowed. The good ones are "
                        "stored; look at the reasons, or allow more with --max-bad (1 takes whatever is usable).")  # fmt: skip
    return summary
