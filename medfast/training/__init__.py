"""Runs an objective: steps, teacher, checkpoints, logs. Knows no architecture and no paper."""

from medfast.training.loop import pretrain
from medfast.training.settings import Optim, Train
from medfast.training.step import Diverged

__all__ = ["Diverged", "Optim", "Train", "pretrain"]
