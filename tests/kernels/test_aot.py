"""What the Triton kernels of window attention cost, compiled ahead of time for sm_80 and sm_90, without a GPU.

Budgets are in ``budgets.json`` under "window_attention": {case: {kernel: {sm: {"registers", "shared", "hot", "all"}}}}.
hot and all are thread instructions per score, without and with the part that only windows at the grid's edge run.
PYTHONPATH=kernels:tests/kernels python tests/kernels/test_aot.py writes them anew.
"""

import json
from pathlib import Path

import aot
import pytest
import torch

import medfast_kernels as mk
from medfast_kernels import _window
from medfast_kernels._triton import window, window_launch

BUDGETS = Path(__file__).with_name("budgets.json")
GOAL = {"forward": 11.0, "backward": 26.0}  # instructions per score of a window of 4^3, 16 bits
SHIFTED = 1.1  # what address arithmetic and a branch add per score of shifted windows, their mask apart
SLACK = 1.05
HELD = ("forward", "backward", "backward_queries", "backward_keys", "backward_bias")


def attend(dim, dtype=torch.bfloat16, grid=(16, 16, 16), win=4, shift=0, heads=4, **options):
    """Forward and backward as autograd calls them, without it: kernels compile and do not run."""
    qkv = torch.zeros(2, *grid, 3, heads, dim, dtype=dtype)
    bias = torch.zeros((2 * win - 1) ** len(grid), heads)
    options = {"scale": None, "cosine": False, "pad": "bias", "pad_value": None, "clip": True, "dropout": 0.0,
               "bias_index": "geometric", "keep": None, "key": None, **options}  # fmt: skip
    arguments = window.arguments(_window.check(qkv, bias, window=win, shift=shift, **options))
    out, lse = window_launch.forward(*arguments)
    window_launch.backward(out, out, lse, *arguments)


WINDOW4 = {f"dim {dim}, shift {shift}": lambda dim=dim, shift=shift: attend(dim, shift=shift)
           for dim in (12, 16, 24, 32) for shift in (0, 2)}  # fmt: skip
CASES = {
    **WINDOW4,
    "dim 16, window 7": lambda: attend(16, grid=(14, 14, 14), win=7, shift=3, heads=3),
    "dim 32, window 16 x 16": lambda: attend(32, grid=(64, 64), win=16, shift=8, heads=3),
    "dim 12, every mode": lambda: attend(
        12, grid=(15, 16, 17), shift=1, cosine=True, scale=torch.ones(4), pad_value=torch.ones(3, 4, 12),
        keep=torch.ones(2).bool(), dropout=0.1, key=mk.Key(3),
    ),
    "dim 96": lambda: attend(96, shift=2),
    "dim 12, fp32": lambda: attend(12, torch.float32, shift=2),
}  # fmt: skip
QUICK = ("dim 12, shift 2",)


def scores(case):
    """Of one turn of the loop: a tile of 64 x 64."""
    return 64 * 64


def measure(case, arch):
    """{kernel: {...}} as in the budgets; those that spill or have no tensor-core instruction say so."""
    found = {}
    for kernel in aot.compiled(CASES[case], arch):
        if kernel.name not in HELD:
            continue
        cost = aot.cost(kernel)
        whole = aot.per_unit(kernel, cost, scores(case))
        hot = whole * (1 - cost.cold / cost.loop) if cost.loop else whole
        found[kernel.name] = {
            "registers": cost.registers, "shared": cost.shared, "hot": round(hot, 2), "all": round(whole, 2),
            **({"spills": cost.spills} if cost.spills else {}),
            **({} if cost.tensor_core else {"no tensor core": True}),
        }  # fmt: skip
    return found


def hold(case, arch):
    budget, measured = json.loads(BUDGETS.read_text())["window_attention"][case], measure(case, arch)
    assert set(measured) == set(budget)
    for name, values in measured.items():
        held = budget[name][str(arch)]
        assert set(values) == set(held), f"{name}: {values}, budget {held}"
        for key in ("hot", "all", "shared", "registers", "spills"):
            assert values.get(key, 0) <= SLACK * held.get(key, 0), f"{name} on sm_{arch}: {values}, budget {held}"


@pytest.mark.parametrize("arch", aot.ARCHS)
@pytest.mark.parametrize("case", QUICK)
def test_budgets(case, arch):
    hold(case, arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", aot.ARCHS)
@pytest.mark.parametrize("case", [case for case in CASES if case not in QUICK])
def test_other_budgets(case, arch):
    hold(case, arch)


@pytest.mark.parametrize("case", WINDOW4)
def test_the_budgets_are_within_the_goal(case):
    for name, archs in json.loads(BUDGETS.read_text())["window_attention"][case].items():
        for held in archs.values():
            assert held["hot"] <= GOAL[name] + (0 if case.endswith("shift 0") else SHIFTED)
            assert "no tensor core" not in held


def test_no_budget_allows_a_spill():
    for case, kernels in json.loads(BUDGETS.read_text())["window_attention"].items():
        for name, archs in kernels.items():
            assert not any("spills" in held for held in archs.values()), f"{name}, {case}: {archs}"


if __name__ == "__main__":
    table = {}
    for case in CASES:
        for arch in aot.ARCHS:
            for name, values in measure(case, arch).items():
                table.setdefault(case, {}).setdefault(name, {})[str(arch)] = values
                print(case, arch, name, values, flush=True)
    known = json.loads(BUDGETS.read_text()) if BUDGETS.is_file() else {}
    BUDGETS.write_text(json.dumps({**known, "window_attention": table}, indent=1) + "\n")
