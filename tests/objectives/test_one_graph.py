"""Every objective of the table traces to one graph: nothing in forward asks the device for a number.

From its preset as --tiny makes it, on a backbone that is quick to trace where any will do.
"""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from medfast import config
from medfast.objectives import OBJECTIVES

CONFIGS = Path(__file__).parents[2] / "configs"
OWN = {"mae", "swinfuse", "sdda_mae"}  # need what only some architectures have
SMALL = {
    "mae": {"depth": 1}, "swinfuse": {"embed": 6, "depths": [1, 1], "heads": [1, 2], "dim_width": 6, "dim_heads": [1]},
    "sdda_mae": {},
}  # fmt: skip
SIZES = {"sdda_mae": (1, 64, 64), "swinfuse": (16,) * 3}


def built(name, quick):
    section = config.load(CONFIGS / f"{name}.yaml", tiny=True)["objective"]
    if name in OWN:
        section["backbone"] |= SMALL[name]
        return config.build({"objective": section})
    attended = section["backbone"].get("semantic_attention") or section["backbone"].get("cls")
    section["backbone"] = {"name": "quick:Backbone", "semantic_attention": 1 if attended else None}
    section |= {"stage": 1} if "stage" in section or name in ("smit", "ibot", "simmim") else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "quick", SimpleNamespace(Backbone=quick))
        return config.build({"objective": section})


def traced(o, given, clock):
    """(output of o, traced to one graph; what in that graph is known only once the device has computed it)."""
    waits = []

    def backend(graph, inputs):
        waits.extend(node for node in graph.graph.nodes if free_unbacked_symbols(node.meta.get("example_value")))
        return graph

    return torch.compile(o, fullgraph=True, dynamic=False, backend=backend)(given, clock), waits


@pytest.mark.parametrize("name", OBJECTIVES)
def test_forward_is_one_graph_that_waits_for_nothing(name, tiny):
    o = built(name, tiny.Backbone)
    given, clock = tiny.planned(o, SIZES.get(name, (32,) * 3)), torch.tensor(0.1)
    plain, (found, waits) = o(given, clock).losses, traced(o, given, clock)
    assert waits == []
    for loss, value in plain.items():
        torch.testing.assert_close(found.losses[loss], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ask", [lambda x: x.sum().item(), lambda x: x[x > 0.5].sum(), lambda x: x.nonzero().sum()])
def test_a_wait_for_the_device_is_seen(ask, tiny):
    """What the test above would say, were a loss to ask for a number or for a length."""
    o = built("simclr", tiny.Backbone)
    forward = o.forward
    o.forward = lambda given, t: forward(replace(given, views=tuple(x * ask(x) for x in given.views)), t)
    try:
        waits = traced(o, tiny.planned(o, (32,) * 3), torch.tensor(0.1))[1]
    except torch._dynamo.exc.Unsupported:  # what some versions say of it
        return
    assert waits
