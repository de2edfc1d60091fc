"""Pretext tasks and maskers by name. A new one is one file and one line here.

DAGMaN states SMART's pretraining with the same settings (docs/papers/dagman.md), so both names build one objective.
"""

from collections.abc import Callable

from medfast.objectives.masking import AttentionMask, RandomMask
from medfast.objectives.smart import SMART
from medfast.objectives.smit import SMIT
from medfast.types import Masker, Objective

__all__ = ["MASKS", "OBJECTIVES"]

OBJECTIVES: dict[str, Callable[..., Objective]] = {"smart": SMART, "dagman": SMART, "smit": SMIT}
MASKS: dict[str, Callable[..., Masker]] = {"random": RandomMask, "attention": AttentionMask}
