"""Checkpoints written while the run goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

__all__ = ["SaveFailed", "Writer"]


class SaveFailed(OSError):
    """A checkpoint could not be written (disk full, folder read-only); those written before are whole."""


class Writer:
    """One thread that writes one checkpoint at a time; what it is given must not change any more."""

    def __init__(self):
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.wait()
        except Exception:
            if error is None:  # else the run ends with that error, which came first
                raise

    @property
    def failed(self) -> bool:
        return self._error is not None

    def start(self, write: Callable[[], Path]) -> None:
        """Let ``write`` run; waits for the one before, and raises what it raised."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(write,), name="medfast-checkpoint")
        self._thread.start()

    def _run(self, write: Callable[[], Path]) -> None:
        try:
            write()
        except Exception as error:  # noqa: BLE001 - it is raised where the run waits for the checkpoint
            self._error = error

    def wait(self) -> None:
        """Until nothing is written any more. Raises SaveFailed, once, for a disk that did not take it."""
        if self._thread is not None:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if isinstance(error, OSError):
            raise SaveFailed(
                f"the checkpoint could not be written: {error}. The ones before it are whole; make room or give write "
                "permission, then the same command goes on from the newest"
            ) from error
        if error is not None:
            raise error
