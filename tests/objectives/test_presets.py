"""Every preset, as --tiny makes it, on what the data pipeline hands over: a step is taken and something moves."""

from pathlib import Path

import pytest
import torch

from medfast import config
from medfast.objectives import OBJECTIVES

CONFIGS = Path(__file__).parents[2] / "configs"
SMART, DISTILLED, TURNED = ["amip", "ampd", "aitd", "gitd"], ["patch", "image"], ["recon", "rotation", "contrast"]
LOSSES = {
    "smart": SMART, "smart_author": SMART, "dagman": SMART, "smit": ["recon", *DISTILLED], "ibot": DISTILLED,
    "ibot_smart": DISTILLED, "attmask": DISTILLED, "attmask_smart": DISTILLED, "mst": ["image", "recon"], "rcr": TURNED,
    "swinfuse": [*TURNED, "divergence"], "sdda_mae": ["recon", "distil"], "mae": ["recon"], "simmim": ["recon"],
    "simclr": ["contrast"], "moco_v3": ["contrast"], "simprot": ["contrast"], "simprot_w": ["contrast"],
    "byol": ["cosine"], "btrot": ["cosine"],
}  # fmt: skip
SIZES = {"rcr": (64,) * 3, "swinfuse": (64,) * 3, "sdda_mae": (1, 64, 64)}  # two tokens per axis in the last stage
# voxels of a cell of the mask: one token of the third stage of a Swin with patches of 2, the patch of a ViT
CELLS = {
    **dict.fromkeys(("smart", "smart_author", "dagman", "smit", "ibot", "ibot_smart", "simmim"), 16),
    **dict.fromkeys(("attmask", "attmask_smart", "mst", "mae"), 16),
}


@pytest.mark.parametrize("name", sorted({*OBJECTIVES, *LOSSES}))
def test_a_preset_takes_a_step(name, tiny):
    o = config.build(config.load(CONFIGS / f"{name}.yaml", tiny=True))
    own = {**dict(o.named_parameters()), **dict(o.named_buffers())}
    if o.teacher is not None:  # a copy of the student, the mask token that it reads included
        assert all(torch.equal(x, own[part]) for part, x in o.teacher.state().items())
        assert not any(x.requires_grad for x in o.teacher.state().values())
        assert ("fill" in o.teacher.state()) == bool(getattr(o, "teacher_drop", 0.0))
    out = o(tiny.planned(o, SIZES.get(name, (32,) * 3)), torch.tensor(0.1))
    assert sorted(out.losses) == sorted(LOSSES.get(name, out.losses))
    assert all(x.dtype == torch.float32 for x in out.losses.values())
    sum(out.losses.values()).backward()
    trained = {part: p for part, p in o.named_parameters() if p.requires_grad}
    assert [part for part, p in trained.items() if p.grad is None] == []  # ranks wait for each other's gradients
    before = [p.detach().clone() for p in trained.values()]
    torch.optim.AdamW(trained.values(), lr=1e-3).step()
    assert all(p.isfinite().all() for p in trained.values()) and not all(map(torch.equal, before, trained.values()))
    if o.teacher is not None:
        state = {k: v.clone() for k, v in o.teacher.state().items()}
        o.teacher.update({**dict(o.named_parameters()), **dict(o.named_buffers())}, o.momentum(0.0))
        assert not all(torch.equal(state[k], v) for k, v in o.teacher.state().items())
    o.absorb(out.sums)
    assert not any(x.requires_grad for x in out.gauges.values())


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_of_the_mask_is_as_large_as_the_papers(name):
    o = config.build(config.load(CONFIGS / f"{name}.yaml", tiny=True))
    assert o.cells((96, 128, 160)) == tuple(length // CELLS[name] for length in (96, 128, 160))
