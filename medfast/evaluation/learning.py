"""Tables of ``medfast check``: rows of single runs in, verdicts over seeds out. Knows no model and runs nothing.

A row: {"case", "seed", "steps", "cpu_seconds", "random", "trained": balanced accuracies of the probe before and after
training, "measures": name -> number after training}.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

__all__ = ["Difference", "Direction", "ablations_table", "learning_table"]

ERRORS = 2.0  # standard errors that a difference must exceed
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Difference:
    """Of pairs, one a seed: their mean and its standard error (nan for one seed)."""

    mean: float
    error: float

    @classmethod
    def of(cls, pairs: Sequence[tuple[float, float]]) -> Difference:
        found = [after - before for before, after in pairs]
        return cls(mean(found), stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.nan)

    @property
    def sign(self) -> int:
        """1 or -1 where it exceeds ``ERRORS`` standard errors, else 0; 0 for one seed and for no difference at all."""
        return int(math.copysign(1, self.mean)) if abs(self.mean) > ERRORS * self.error else 0

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.error:.3f}" if self.error == self.error else f"{self.mean:+.3f}"


@dataclass(frozen=True)
class Direction:
    """A claim of a paper: ``measure`` of the case ``more`` is above that of ``less``, or above the number ``less``.

    measure: a name in a row's "measures", or "trained".
    """

    claim: str
    measure: str
    more: str
    less: str | float


def learning_table(rows: Iterable[Row], cases: Mapping[str, str], seeds: Sequence[int]) -> str:
    """Markdown: a line per case. cases: name -> what it ran on. Seeds that are not there yet are said to be missing."""
    found = _by_case(rows)
    lines = ["| objective | trained on | steps | CPU s a seed | random | trained | difference | verdict |",
             "|---|---|--:|--:|--:|--:|--:|---|"]  # fmt: skip
    for name, note in cases.items():
        runs = [found[name, seed] for seed in seeds if (name, seed) in found]
        if not runs:
            lines.append(f"| `{name}` | {note} | | | | | | not run |")
            continue
        gain = Difference.of([(run["random"], run["trained"]) for run in runs])
        cells = (f"`{name}`", note, runs[0]["steps"], f"{mean(run['cpu_seconds'] for run in runs):.0f}",
                 f"{mean(run['random'] for run in runs):.3f}", f"{mean(run['trained'] for run in runs):.3f}", gain,
                 _verdict(gain, len(runs), len(seeds)))  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _verdict(gain: Difference, runs: int, wanted: int) -> str:
    told = {1: "**learns**", 0: "not above random", -1: "**below random**"}[gain.sign]
    if runs == 1:
        told = "one seed says nothing"
    return told if runs == wanted else f"{told} ({runs} of {wanted} seeds)"


def ablations_table(rows: Iterable[Row], directions: Iterable[Direction], seeds: Sequence[int]) -> str:
    """Markdown: a line per direction, and whether it is seen here."""
    found = _by_case(rows)
    lines = ["| claim | measure | should be higher | should be lower | difference | seen here |",
             "|---|---|--:|--:|--:|---|"]  # fmt: skip
    for direction in directions:
        pairs = [pair for seed in seeds if (pair := _pair(found, direction, seed)) is not None]
        if not pairs:
            lines.append(f"| {direction.claim} | `{direction.measure}` | | | | not run |")
            continue
        gap = Difference.of(pairs)
        told = {1: "yes", 0: "not told apart", -1: "**no, the opposite**"}[gap.sign]
        told = told if len(pairs) == len(seeds) else f"{told} ({len(pairs)} of {len(seeds)} seeds)"
        low, high = (f"{mean(side):.3f}" for side in zip(*pairs, strict=True))
        less = f"{low} (`{direction.less}`)" if isinstance(direction.less, str) else f"{direction.less:g}"
        cells = (direction.claim, f"`{direction.measure}`", f"{high} (`{direction.more}`)", less, gap, told)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _pair(found: Mapping[tuple[str, int], Row], direction: Direction, seed: int) -> tuple[float, float] | None:
    """(the lower one, the higher one), as the claim has it; None where a run is missing."""
    sides: list[float | None] = []
    for side in (direction.less, direction.more):
        row: Mapping[str, Any] = found.get((side, seed), {}) if isinstance(side, str) else {direction.measure: side}
        sides.append(row.get(direction.measure, row.get("measures", {}).get(direction.measure)))
    low, high = sides
    return None if low is None or high is None else (low, high)


def _by_case(rows: Iterable[Row]) -> dict[tuple[str, int], Row]:
    return {(row["case"], row["seed"]): row for row in rows}
