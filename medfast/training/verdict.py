"""What an alarm says, and what an alarm is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["ACTIONS", "Alarm", "Verdict"]

# From mild to severe. warn: a sentence. checkpoint: and a checkpoint now. rollback: back to the newest checkpoint that
# is older than the trouble, its steps then passed over. stop: end with exit code 4, the newest checkpoint stays.
ACTIONS = ("none", "warn", "checkpoint", "rollback", "stop")


@dataclass(frozen=True)
class Verdict:
    """alarm: its name. action: one of ACTIONS. words: a sentence with the numbers. since: first step of the trouble."""

    alarm: str
    action: str
    words: str
    since: int


class Alarm(Protocol):
    """Judges one row after another. state, load: what it remembers, as plain numbers, lists and strings (JSON)."""

    def __call__(self, row: Mapping[str, Any]) -> Verdict | None: ...

    def state(self) -> Any: ...

    def load(self, state: Any) -> None: ...
