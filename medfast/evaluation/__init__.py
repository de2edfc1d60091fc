"""What a run learned: comparison with predictors that learn nothing, collapse gauges, the report page."""

from .report import report

__all__ = ["report"]
