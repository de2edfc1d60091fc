"""Progress of a countable job: a live bar on a terminal that has rich, plain lines now and then everywhere else."""

from __future__ import annotations

import importlib.util
import sys
import time

__all__ = ["Progress"]

EVERY = 5.0  # seconds between plain lines


class Progress:
    """``with Progress(total) as shown``: ``step(note)`` counts one and prints the note, ``say`` prints a line."""

    def __init__(self, total: int, shown: bool = True, noun: str = "files"):
        self.total, self.shown, self.noun, self.done = total, shown, noun, 0
        self._bar = None

    def __enter__(self) -> Progress:
        self._started = self._last = time.monotonic()
        if self.shown and sys.stdout.isatty() and importlib.util.find_spec("rich"):
            from rich.progress import Progress as Bar

            self._bar = Bar()
            self._task = self._bar.add_task(self.noun, total=self.total)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, note: str | None = None) -> None:
        self.done += 1
        if note:
            self.say(note)
        if self._bar is not None:
            self._bar.update(self._task, advance=1, description=self._rate())
        elif (now := time.monotonic()) - self._last >= EVERY:
            self._last = now
            self.say(self._rate())

    def say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        elif self.shown:
            print(line, flush=True)

    def _rate(self) -> str:
        rate = self.done / max(1e-9, time.monotonic() - self._started)
        left = int((self.total - self.done) / rate)
        return f"{self.done}/{self.total} {self.noun}, {rate:.2f}/s, {left // 60}:{left % 60:02d} to go"
