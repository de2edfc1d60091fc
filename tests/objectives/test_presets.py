"""Every preset, as --tiny makes it, on what the data pipeline hands over: a step is taken and something moves."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from medfast import config
from medfast.types import Batch, Key

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = ["mae", "simmim", "ibot", "ibot_smart", "attmask", "attmask_smart", "mst", "rcr"]
LOSSES = {
    "mae": ["recon"], "simmim": ["recon"], "ibot": ["patch", "image"], "ibot_smart": ["patch", "image"],
    "attmask": ["patch", "image"], "attmask_smart": ["patch", "image"], "mst": ["image", "recon"],
    "rcr": ["recon", "rotation", "contrast"],
}  # fmt: skip


def batch(o, size, b=2) -> Batch:
    torch.manual_seed(1)
    views = tuple(torch.rand(b, 1, *(size,) * 3) for _ in range(o.views))
    key = Key(3, 7, torch.arange(b))
    targets = {name: make(key.stack(o.views)).chunk(o.views) for name, make in o.ahead((size,) * 3).items()}
    if "uncut" in o.needs:
        targets["uncut"] = tuple(torch.rand_like(view) for view in views)
    turns = torch.tensor([[0, 1], [3, 2]])[:b]
    return Batch(views, None, key, params={"rotation": turns}, targets=targets)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_takes_a_step(name):
    o = config.build(config.load(CONFIGS / f"{name}.yaml", tiny=True))
    given = batch(o, 64 if name == "rcr" else 32)
    out = o(given, torch.tensor(0.1))
    assert list(out.losses) == LOSSES[name] and all(x.dtype == torch.float32 for x in out.losses.values())
    sum(out.losses.values()).backward()
    idle = [n for n, p in o.named_parameters() if p.grad is None]
    assert idle == []  # ranks wait for each other's gradients
    before = [p.detach().clone() for p in o.parameters()]
    torch.optim.AdamW(o.parameters(), lr=1e-3).step()
    assert all(p.isfinite().all() for p in o.parameters()) and not all(map(torch.equal, before, o.parameters()))
    if o.teacher is not None:
        state = {k: v.clone() for k, v in o.teacher.state().items()}
        o.teacher.update({**dict(o.named_parameters()), **dict(o.named_buffers())}, o.momentum(0.0))
        assert not all(torch.equal(state[k], v) for k, v in o.teacher.state().items())
    o.absorb(out.sums)
    assert out.gauges.keys() and not any(x.requires_grad for x in out.gauges.values())


@pytest.mark.parametrize("name", ["mae", "simmim", "ibot", "attmask", "mst", "rcr"])
def test_one_graph_without_waiting_for_the_device(name, tiny):
    """A mask's counts, were they asked for, would break the graph."""
    section = config.load(CONFIGS / f"{name}.yaml", tiny=True)["objective"]
    if name == "mae":
        o = config.build({"objective": section})
    else:  # the same objective and masker, on a backbone that is quicker to trace
        section["backbone"] = {
            "name": "quick:Backbone",
            "semantic_attention": 1 if name in ("attmask", "mst") else None,
        }
        section |= {"stage": 1} if name in ("ibot", "simmim") else {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "quick", SimpleNamespace(Backbone=tiny.Backbone))
            o = config.build({"objective": section})
    given, clock = batch(o, 32), torch.tensor(0.1)
    compiled = torch.compile(o, fullgraph=True, backend="eager")(given, clock).losses
    for loss, value in o(given, clock).losses.items():
        torch.testing.assert_close(compiled[loss], value, rtol=1e-4, atol=1e-6)
