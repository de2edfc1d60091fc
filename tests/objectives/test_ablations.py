"""The papers' ablations, typed as a user would: overrides of a preset, built, and one step taken."""

from pathlib import Path

import pytest
import torch

from medfast import config
from medfast.types import Batch, Key

CONFIGS = Path(__file__).parents[2] / "configs"
RANDOM = "objective.mask={name: random, ratio: 0.7}"
# what goes -> the overrides, as docs/papers/smart.md has them
ABLATIONS = {
    "noise": ["objective.teacher_drop=0"],
    "guided masks": [RANDOM],
    "semantic attention": [RANDOM, "objective.backbone.semantic_attention=null", "objective.weights.aitd=0"],
    "amip": ["objective.weights.amip=0"],
    "ampd": ["objective.weights.ampd=0"],
    "aitd": ["objective.weights.aitd=0"],
    "gitd": ["objective.weights.gitd=0"],
}
SMIT = {name: [f"objective.weights.{name}=0"] for name in ("recon", "patch", "image")}
CASES = [
    *((preset, gone) for preset in ("smart", "smart_author") for gone in ABLATIONS),
    ("dagman", "semantic attention"), ("dagman", "noise"), ("demo", "semantic attention"),
    *(("smit", gone) for gone in SMIT),
]  # fmt: skip


@pytest.mark.parametrize("preset, gone", CASES)
def test_each_part_can_be_left_out_alone(preset, gone):
    overrides = {**ABLATIONS, **SMIT}[gone]
    if (preset, gone) == ("demo", "semantic attention"):
        overrides = [*overrides, "objective.stage=2"]  # a backbone without [CLS] distils stage 3; the demo has two
    loaded = config.load(CONFIGS / f"{preset}.yaml", *overrides, tiny=True)
    objective = config.build(loaded)
    torch.manual_seed(0)
    batch = Batch(views=tuple(torch.rand(1, 1, 32, 32, 32) for _ in range(2)), boxes=None, key=Key(0, 0))
    out = objective(batch, torch.tensor(0.0))
    sum(out.losses.values()).backward()
    trained = [p for p in objective.parameters() if p.grad is not None]
    before = [p.detach().clone() for p in trained]
    torch.optim.AdamW(trained, lr=1e-3).step()
    assert all(p.isfinite().all() for p in trained) and not all(map(torch.equal, before, trained))
    objective.teacher.update(dict(objective.named_parameters()), objective.momentum(0.0))
    objective.absorb(out.sums)

    assert gone not in out.losses and len(out.losses) == len(loaded["objective"]["weights"]) - any(
        weight == 0 for weight in loaded["objective"]["weights"].values()
    )
    assert ("drop" in objective.picture(batch)) == (preset != "smit" and gone != "noise")
    if preset != "smit":
        assert objective.mask.guided == (gone not in ("guided masks", "semantic attention"))
        assert (objective.backbone.semantic is None) == (gone == "semantic attention")


def test_the_page_has_these_lines():
    page = (CONFIGS.parent / "docs" / "papers" / "smart.md").read_text()
    for overrides in ABLATIONS.values():
        for override in overrides:
            assert override in page, override
