"""Threads that work ahead. They never keep a process from ending: one that is stuck in a read is left behind."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

__all__ = ["Workers"]

_PATIENCE = 5.0  # seconds that closing waits for a thread


class Workers:
    """``count`` daemon threads that take jobs in the order of ``submit``."""

    def __init__(self, count: int, name: str):
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._threads = [threading.Thread(target=_work, args=(self._jobs,), name=f"{name}-{i}", daemon=True)
                         for i in range(count)]  # fmt: skip
        self._end = weakref.finalize(self, _end, self._jobs, self._threads)
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Future:
        """The result of ``call(*arguments)``, some time. RuntimeError after ``close``."""
        if not self._end.alive:
            raise RuntimeError("the stream was closed")
        future: Future = Future()
        self._jobs.put((future, call, arguments))
        return future

    def close(self) -> None:
        """End the threads; those that are stuck are waited for no longer than a few seconds."""
        self._end()


def _end(jobs: queue.SimpleQueue, threads: list[threading.Thread]) -> None:
    while True:
        try:
            job = jobs.get_nowait()
        except queue.Empty:
            break
        if job is not None:
            job[0].cancel()
    for _ in threads:
        jobs.put(None)
    until = time.monotonic() + _PATIENCE
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(max(0.0, until - time.monotonic()))


def _work(jobs: queue.SimpleQueue) -> None:
    while (job := jobs.get()) is not None:
        future, call, arguments = job
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(call(*arguments))
        except BaseException as error:  # noqa: BLE001 - it is raised again where the result is asked for
            future.set_exception(error)
        del job, future, call, arguments  # or an idle thread would keep the last batch
