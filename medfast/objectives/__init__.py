"""Pretext tasks and maskers by name. A new one is one file and one line here.

DAGMaN states SMART's pretraining with the same settings (docs/papers/dagman.md), so both names build one objective.
"""

from collections.abc import Callable

from medfast.objectives.block_mask import BlockMask
from medfast.objectives.btrot import BTROT
from medfast.objectives.byol import BYOL
from medfast.objectives.ibot import IBOT, attmask, ibot_smart
from medfast.objectives.mae import MAE
from medfast.objectives.masking import AttentionMask, RandomMask
from medfast.objectives.moco_v3 import MoCoV3
from medfast.objectives.mst import MST
from medfast.objectives.options import setting
from medfast.objectives.rcr import RCR
from medfast.objectives.sdda_mae import SDDAMAE
from medfast.objectives.simclr import SimCLR
from medfast.objectives.simmim import SimMIM
from medfast.objectives.simprot import SimPROT
from medfast.objectives.smart import SMART
from medfast.objectives.smit import SMIT
from medfast.objectives.swinfuse import SwinFUSE
from medfast.types import Masker, Objective

__all__ = ["MASKS", "OBJECTIVES"]

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "smart": SMART,
    "dagman": SMART,
    "smit": SMIT,
    "ibot": IBOT,
    "ibot_smart": ibot_smart,
    "attmask": attmask,
    "mst": MST,
    "rcr": RCR,
    "mae": MAE,
    "simmim": SimMIM,
    "simclr": SimCLR,
    "byol": BYOL,
    "moco_v3": MoCoV3,
    "simprot": SimPROT,
    "simprot_w": setting(SimPROT, weight=5.0),
    "btrot": BTROT,
    "sdda_mae": SDDAMAE,
    "swinfuse": SwinFUSE,
}
MASKS: dict[str, Callable[..., Masker]] = {"random": RandomMask, "block": BlockMask, "attention": AttentionMask}
