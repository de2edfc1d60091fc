"""What the data pipeline took of a step, and which volumes it had to leave out, for the log and the checkpoint."""

from __future__ import annotations

import sys
from typing import Any

from medfast.training.job import Job

__all__ = ["Waiting"]


class Waiting:
    """Reads a stream's counters between steps. stream: ``medfast.data.loader.Stream``, or one that counts ``waited``
    alone. Volumes that were left out are said on the rank that met them, and noted for the job's checkpoints."""

    def __init__(self, stream, job: Job):
        self._stream, self._job = stream, job
        self._waited, self._seconds, self._told = stream.waited, self._spent(), set()

    @property
    def damaged(self) -> int:
        """Volumes that this rank has left out."""
        return len(self._told)

    def _spent(self) -> dict[str, float]:
        return self._stream.seconds() if hasattr(self._stream, "seconds") else {}

    def taken(self) -> dict[str, Any]:
        """Since the last call: "wait_s", seconds without a batch, and "wait", the same shared out among the stages of
        the workers in proportion to what they spent in each."""
        seconds, waited = self._spent(), self._stream.waited
        spent = {name: seconds[name] - self._seconds.get(name, 0.0) for name in seconds}
        wait_s, total = waited - self._waited, sum(spent.values())
        self._waited, self._seconds = waited, seconds
        for volume, reason in getattr(self._stream, "damaged", {}).items():
            if volume not in self._told:
                self._told.add(volume)
                self._say(f"left out, number {len(self._told)}: {reason}")
                self._job.damaged.add(volume)
        shared = {name: wait_s * share / total for name, share in spent.items()} if total > 0 else {}
        return {"wait_s": wait_s, "wait": shared}

    def _say(self, line: str) -> None:
        if self._job.here.first:
            self._job.log.say(line)
        else:
            print(f"rank {self._job.here.rank}: {line}", file=sys.stderr, flush=True)
