"""Objectives trace to one graph: nothing in forward asks the device for a number."""

from dataclasses import replace

import pytest
import torch

from medfast.objectives import OBJECTIVES
from medfast.objectives.masking import RandomMask

HEADS = {"hidden": 8, "width": 6}
MASKED = {"cell": 8}
SETTINGS = {
    "simclr": {}, "byol": HEADS, "moco_v3": {**HEADS, "group": 2}, "simprot_w": MASKED, "btrot": {**HEADS, **MASKED},
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_forward_is_one_graph(name, tiny):
    params = {"rotation": torch.tensor([[1, 0], [3, 0]]), "flip": torch.tensor([[1, 0], [2, 0]])}
    batch = replace(tiny.batch(2, dtype=torch.float32), params={**params, "volume": torch.arange(2)})
    mask = [RandomMask(0.75)] if "cell" in SETTINGS[name] else []
    objective = OBJECTIVES[name](tiny.Backbone(None), *mask, **SETTINGS[name])
    plain = objective(batch, torch.tensor(0.0)).losses
    traced = torch.compile(objective, backend="eager", fullgraph=True)(batch, torch.tensor(0.0)).losses
    for loss, value in plain.items():
        torch.testing.assert_close(traced[loss], value)
