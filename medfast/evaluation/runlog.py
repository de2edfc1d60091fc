"""What a run wrote about itself: metrics.jsonl and env.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["names", "read_environment", "read_metrics", "series"]

Row = Mapping[str, Any]


def read_metrics(run: Path) -> list[Row]:
    """Rows of metrics.jsonl by step; of a step that a resumed run did again, the last. A torn last line is left out.

    ValueError where there is no row at all.
    """
    file = run / "metrics.jsonl"
    if not file.is_file():
        raise ValueError(
            f"{run} has no metrics.jsonl, so there is nothing to report: give the folder of a training run"
        )
    rows: dict[int, Row] = {}
    for line in file.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # a killed run leaves half a line
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows[row["step"]] = row
    if not rows:
        raise ValueError(f"{file} has no complete row yet: the run has not finished its first step")
    return [rows[step] for step in sorted(rows)]


def read_environment(run: Path) -> dict[str, Any]:
    """env.json, {} where it is missing."""
    file = run / "env.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def names(rows: Sequence[Row], *path: str) -> list[str]:
    """Names of the numbers under ``path`` in any row, in order of appearance."""
    found: dict[str, None] = {}
    for row in rows:
        part = _at(row, path)
        if isinstance(part, Mapping):
            found |= {name: None for name, value in part.items() if _is_number(value)}
    return list(found)


def series(rows: Sequence[Row], *path: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the rows that have a number at ``path``."""
    pairs = [(row["step"], float(value)) for row in rows if _is_number(value := _at(row, path))]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _at(row: Row, path: Sequence[str]) -> Any:
    value: Any = row
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
