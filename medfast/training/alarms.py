"""Alarms: what a row of metrics says about the health of a run, and how severe that is.

An alarm reads rows and nothing else; rows are the same on all ranks, so all ranks judge alike with no word exchanged.
What it remembers is small, goes into every checkpoint's meta.json and comes back with it: a resumed run judges as the
uninterrupted one. ``loop`` is the only place where a verdict is acted upon.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from medfast.training.collapse import collapse, crop_collapse, equal_views, idle_teacher, position_collapse
from medfast.training.verdict import ACTIONS, Alarm, Verdict

__all__ = ["ACTIONS", "ALARMS", "Alarm", "Alarms", "LossSpike", "Verdict"]


class LossSpike:
    """The total loss is far above its recent median for several steps on end.

    Far: by more than ``far`` robust standard deviations (1.4826 x median absolute deviation) and by more than ``least``
    of the median. Steps in a spike do not enter the median, so a spike does not become the new normal; after ``window``
    of them it is no spike any more but where the loss is, and the history starts anew.
    """

    name = "loss_spike"

    def __init__(self, window: int = 64, patience: int = 3, far: float = 8.0, least: float = 0.1):
        self.window, self.patience, self.far, self.least = window, patience, far, least
        self.calm: list[float] = []
        self.high: list[int] = []

    def __call__(self, row: Mapping[str, Any]) -> Verdict | None:
        total = row.get("total")
        if total is None or not math.isfinite(total):  # a skipped step: its loss says nothing about the next ones
            return None
        if len(self.calm) < self.window // 2 or total <= (limit := self._limit()):
            self.calm, self.high = [*self.calm, total][-self.window :], []
            return None
        self.high.append(row["step"])
        if len(self.high) > self.window:
            self.calm, self.high = [total], []
            return None
        if len(self.high) != self.patience:
            return None
        words = (f"the loss is {total:.6g} at step {row['step']}, above {limit:.6g} for {self.patience} steps on end; "
                 f"the median of the {len(self.calm)} before is {median(self.calm):.6g}")  # fmt: skip
        return Verdict(self.name, "rollback", words, self.high[0])

    def _limit(self) -> float:
        middle = median(self.calm)
        spread = 1.4826 * median(abs(x - middle) for x in self.calm)
        return middle + max(self.far * spread, self.least * abs(middle))

    def state(self) -> list:
        return [self.calm, self.high]

    def load(self, state: Any) -> None:
        self.calm, self.high = list(state[0]), list(state[1])


ALARMS: dict[str, Callable[[], Alarm]] = {  # name -> what makes it; a new alarm is one line here
    LossSpike.name: LossSpike,
    "collapse": collapse,
    "crop_collapse": crop_collapse,
    "position_collapse": position_collapse,
    "equal_views": equal_views,
    "idle_teacher": idle_teacher,
}


class Alarms:
    """All alarms of a run. most: alarm name -> the most severe action it may ask for; those not named may only warn.

    Raises ValueError for a name or an action that there is not.
    """

    def __init__(self, most: Mapping[str, str] | None = None):
        self.most = dict(most or {})
        for name, action in self.most.items():
            if name not in ALARMS:
                raise ValueError(f"train.alarms: there is no alarm {name!r}, only {', '.join(ALARMS)}")
            if action not in ACTIONS:
                raise ValueError(f"train.alarms.{name} is one of {', '.join(ACTIONS)}, got {action!r}")
        self.alarms = {name: make() for name, make in ALARMS.items() if self.most.get(name) != "none"}

    def judge(self, row: Mapping[str, Any]) -> list[Verdict]:
        """What the alarms say of this row, the most severe first; every alarm sees every row."""
        found = [verdict for alarm in self.alarms.values() if (verdict := alarm(row)) is not None]
        return sorted(map(self._allowed, found), key=lambda verdict: ACTIONS.index(verdict.action), reverse=True)

    def _allowed(self, verdict: Verdict) -> Verdict:
        action = min(verdict.action, self.most.get(verdict.alarm, "warn"), key=ACTIONS.index)
        return Verdict(verdict.alarm, action, verdict.words, verdict.since)

    def state(self) -> dict[str, Any]:
        return {name: alarm.state() for name, alarm in self.alarms.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what a checkpoint holds; an alarm that it does not know starts with no history."""
        for name, alarm in self.alarms.items():
            if name in state:
                alarm.load(state[name])
