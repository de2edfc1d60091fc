"""What the parts of a run need to know of it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medfast.training.distributed import World
from medfast.training.health import Health
from medfast.training.log import Log
from medfast.training.settings import Optim, Train
from medfast.training.watchdog import Watchdog
from medfast.training.writer import Writer
from medfast.types import Batch, Objective

__all__ = ["Job"]


@dataclass(frozen=True)
class Job:
    """Nothing in it is replaced while a run lasts. train.micro is the micro-batch that the ranks really have.

    facts: settings that decide results. stop: set by a signal. seen: the batches of the present step, on the host.
    damaged: ids of volumes that were left out, on any rank (``left_out``).
    """

    objective: Objective
    train: Train
    optim: Optim
    here: World
    log: Log
    folder: Path
    facts: Mapping[str, Any]
    stop: threading.Event
    watch: Watchdog
    writer: Writer
    health: Health
    seen: deque[Batch]
    damaged: set[str] = field(default_factory=set)

    @property
    def micro(self) -> int:
        """Samples of a micro-batch."""
        return self.train.micro or self.train.batch // self.here.size

    @property
    def accumulate(self) -> int:
        """Micro-batches of a rank in a step."""
        return self.train.batch // self.here.size // self.micro
