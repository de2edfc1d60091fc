"""Runs an objective: steps, teacher, checkpoints, logs. Knows no architecture and no paper."""

from medfast.training.health import Diverged
from medfast.training.loop import PREEMPTED, pretrain
from medfast.training.rendezvous import LOST, RankLost
from medfast.training.replay import replay
from medfast.training.settings import Optim, Train
from medfast.training.writer import SaveFailed

__all__ = ["LOST", "PREEMPTED", "Diverged", "Optim", "RankLost", "SaveFailed", "Train", "pretrain", "replay"]
