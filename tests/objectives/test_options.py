"""Checks that objectives share."""

import pytest
import torch

from medfast.architectures import BACKBONES
from medfast.objectives import MASKS, OBJECTIVES


@pytest.mark.parametrize(("name", "mask"), [("smit", True), ("simmim", True)])
def test_a_backbone_without_tokens_to_hide_is_refused_when_built(name, mask):
    with torch.device("meta"):
        backbone = BACKBONES["resnet50"]()
        with pytest.raises(ValueError, match="ResNet50 has no token embedding: give it a transformer"):
            OBJECTIVES[name](backbone, *([MASKS["random"](0.7)] if mask else []))
