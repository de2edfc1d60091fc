"""What a run writes beside its checkpoints: metrics.jsonl, tb/, train.log, env.json, and a line on the console."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

__all__ = ["Log", "environment", "finite", "versions"]

_EVERY_S = 10.0  # between two progress lines where there is no terminal
_PACKAGES = ("medfast", "torch", "triton", "deepspeed", "numpy", "safetensors")


def versions() -> dict[str, str]:
    """Versions of the packages that a result may depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def environment(ranks: int) -> dict[str, Any]:
    """Versions and hardware; no paths, no host names."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": versions(), "system": platform.system(), "machine": platform.machine(), "ranks": ranks,
        "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpus": gpus, "cuda": torch.version.cuda,
    }  # fmt: skip


def finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with None for numbers that are not finite, which JSON has not."""
    kept = {name: finite(x) if isinstance(x, Mapping) else x for name, x in row.items()}
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in kept.items()}


class Log:
    """Writes rows and lines into a run folder; ``quiet`` (all ranks but the first) writes nothing."""

    def __init__(self, run: Path, quiet: bool):
        self._run, self.quiet = run, quiet
        self._files: list[Any] = []
        self._terminal = sys.stderr.isatty()
        self._shown = 0.0
        self._pace: float | None = None
        if not quiet:
            self._text = self._kept((run / "train.log").open("a", buffering=1))

    def begin(self, start: int, steps: int, batch: int) -> None:
        """Open the metrics at step ``start``, again after a rollback. Rows at or beyond it, of a run that went on after
        its last checkpoint, are cut, so that each step is there once. steps, batch: of the whole run, for the progress
        line."""
        self._steps, self._batch = steps, batch
        if self.quiet:
            return
        for file in self._files[1:]:  # of before a rollback
            file.close()
        del self._files[1:]
        _cut(self._run / "metrics.jsonl", start)
        self._rows = self._kept((self._run / "metrics.jsonl").open("a", buffering=1))
        self._board = self._kept(_Board(self._run / "tb", start))

    def _kept(self, file: Any) -> Any:
        self._files.append(file)
        return file

    def say(self, line: str) -> None:
        """A sentence to the console and train.log."""
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)
            self._text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def row(self, row: dict[str, Any]) -> None:
        """One optimizer step."""
        if self.quiet:
            return
        self._rows.write(json.dumps(finite(row), allow_nan=False) + "\n")
        self._board.write(row["step"], {name: value for name, value in _flat(row) if name != "step"})
        step_s = row["time"]["step_s"]
        self._pace = step_s if self._pace is None else 0.9 * self._pace + 0.1 * step_s
        self._show(row)

    def _show(self, row: dict[str, Any]) -> None:
        last, now = row["step"] + 1 == self._steps, time.monotonic()
        if not (self._terminal or last or "validation" in row or now - self._shown >= _EVERY_S):
            return
        self._shown = now
        line = self._line(row)
        if self._terminal:
            print(f"\r\x1b[K{line}", end="\n" if last else "", file=sys.stderr, flush=True)
            self._text.write(line + "\n")
        else:
            self.say(line)

    def _line(self, row: dict[str, Any]) -> str:
        done, pace = row["step"] + 1, self._pace or 1e-9
        if "skipped" in row:
            return f"step {done}/{self._steps}  {row['skipped']}"
        terms = " ".join(f"{name} {value:.3g}" for name, value in row["loss"].items())
        held = f"  held-out {row['validation']['total']:.4g}" if "validation" in row else ""
        momentum = f"  m {row['momentum']:.5g}" if row["momentum"] is not None else ""
        return (
            f"step {done}/{self._steps}  {self._batch / pace:.2f} draws/s  {pace:.2f} s  "
            f"{_waited(row['time'])}  loss {row['total']:.4g} ({terms}){held}  "
            f"lr {row['lr']:.2g}{momentum}  grad {row['grad_norm']:.3g}  eta {_duration((self._steps - done) * pace)}"
        )

    def close(self) -> None:
        for file in self._files:
            file.close()


class _Board:
    """Scalars for TensorBoard, in a file of its format. Its own writer would put the host's name into the file's."""

    def __init__(self, folder: Path, start: int):
        """start: TensorBoard forgets what older files say of this step and those after it."""
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._events: Any = event_pb2
        self._summaries: Any = summary_pb2
        folder.mkdir(exist_ok=True)
        now = time.time()
        self._records = RecordWriter((folder / f"events.out.tfevents.{now:017.6f}.{start}").open("wb"))
        session = self._events.SessionLog
        self._record(now, file_version="brain.Event:2")
        self._record(now, step=start, session_log=session(status=session.START))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        summary = self._summaries.Summary
        values = [summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._record(time.time(), step=step, summary=summary(value=values))

    def _record(self, now: float, **fields: Any) -> None:
        self._records.write(self._events.Event(wall_time=now, **fields).SerializeToString())
        self._records.flush()

    def close(self) -> None:
        self._records.close()


def _flat(row: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    pairs = []
    for name, value in row.items():
        if isinstance(value, dict):
            pairs += _flat(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            pairs.append((prefix + name, value))
    return pairs


def _cut(path: Path, start: int) -> None:
    """Drop rows of steps at or beyond ``start``, and a last line that was cut off while it was written."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["step"] < start:
            kept.append(line + "\n")
    unfinished = path.with_name(".metrics.unfinished")
    unfinished.write_text("".join(kept))
    unfinished.replace(path)


def _waited(time: Mapping[str, Any]) -> str:
    """Share of a step that was waited for data, and of it what each stage of its workers took; small ones not."""
    step_s = max(time["step_s"], 1e-9)
    stages = sorted(time.get("wait", {}).items(), key=lambda stage: -stage[1])
    told = ", ".join(f"{name} {100 * seconds / step_s:.1f}" for name, seconds in stages if seconds >= 1e-3 * step_s)
    return f"wait {100 * time['wait_s'] / step_s:.1f}%{f' ({told})' if told else ''}"


def _duration(seconds: float) -> str:
    minutes, hours = int(seconds // 60) % 60, int(seconds // 3600)
    if hours >= 24:
        return f"{hours // 24}d{hours % 24:02d}h"
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{int(seconds % 60):02d}s"
