"""What the data pipeline took of a step, for the log."""

from __future__ import annotations

from typing import Any

__all__ = ["Waiting"]


class Waiting:
    """Reads a stream's counters between steps. stream: ``medfast.data.loader.Stream``, or one that counts ``waited``
    alone."""

    def __init__(self, stream):
        self._stream = stream
        self._waited, self._seconds = stream.waited, self._spent()

    def _spent(self) -> dict[str, float]:
        return self._stream.seconds() if hasattr(self._stream, "seconds") else {}

    def taken(self) -> dict[str, Any]:
        """Since the last call: "wait_s", seconds without a batch, and "wait", the same shared out among the stages of
        the workers in proportion to what they spent in each."""
        seconds, waited = self._spent(), self._stream.waited
        spent = {name: seconds[name] - self._seconds.get(name, 0.0) for name in seconds}
        wait_s, total = waited - self._waited, sum(spent.values())
        self._waited, self._seconds = waited, seconds
        shared = {name: wait_s * share / total for name, share in spent.items()} if total > 0 else {}
        return {"wait_s": wait_s, "wait": shared}
