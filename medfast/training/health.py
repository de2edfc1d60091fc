"""How a run copes with numerical trouble: which steps were skipped or passed over, and what is to be done next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medfast.training.alarms import Alarms, Verdict
from medfast.training.settings import Train

__all__ = ["Diverged", "Health"]

BUDGET_STEPS = 100  # train.skip_budget counts among so many


class Diverged(RuntimeError):
    """Stopped by an alarm: too many steps were not finite, or an alarm that may stop the run did."""


class Health:
    """The same on all ranks, as the rows are that it reads; in every checkpoint's meta as ``state``.

    passed: steps that a rollback leaves out. rollbacks: how many there were.
    """

    def __init__(self, train: Train):
        self.train, self.alarms = train, Alarms(train.alarms)
        self.skipped: list[int] = []
        self.passed: set[int] = set()
        self.rollbacks = 0

    def state(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "passed": sorted(self.passed), "rollbacks": self.rollbacks,
                "alarms": self.alarms.state()}  # fmt: skip

    def load(self, state: Mapping[str, Any], again: bool = False) -> None:
        """What a checkpoint holds, {} of one that knew nothing of this. again: after a rollback, whose steps stay left
        out, though the checkpoint is older than it."""
        self.skipped = list(state.get("skipped", []))
        if not again:
            self.passed, self.rollbacks = set(state.get("passed", [])), state.get("rollbacks", 0)
        self.alarms = Alarms(self.train.alarms)
        self.alarms.load(state.get("alarms", {}))

    def skip(self, row: Mapping[str, Any]) -> None:
        """Count a skipped step. Raises Diverged where the budget is spent."""
        step, budget = row["step"], self.train.skip_budget
        self.skipped = [*(old for old in self.skipped if old > step - BUDGET_STEPS), step]
        if len(self.skipped) > budget:
            raise Diverged(
                f"step {step}: {row['skipped']}. {len(self.skipped)} of the last {BUDGET_STEPS} steps could not be "
                f"used, train.skip_budget={budget} allows no more. medfast replay shows a step again; lower optim.lr, "
                "or set optim.clip"
            )

    def rollback(self, verdict: Verdict, step: int) -> None:
        """Leave out the steps of the trouble from now on. Raises Diverged where there were too many rollbacks."""
        self.rollbacks += 1
        if self.rollbacks > self.train.rollbacks:
            raise Diverged(f"{verdict.words}; train.rollbacks={self.train.rollbacks} allows no further rollback")
        self.passed |= set(range(verdict.since, step + 1))
