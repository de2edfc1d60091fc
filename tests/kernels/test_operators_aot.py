"""What the Triton kernels of the operators other than window attention cost, compiled ahead of time, without a GPU.

Budgets are in ``budgets.json`` under "operators": registers, bytes of shared memory and instructions of each kernel of
a case, as compiled by one version of Triton; this file, run with PYTHONPATH=kernels:tests/kernels, writes them anew.
"""

import json
from pathlib import Path

import aot
import pytest
import torch

import medfast_kernels as mk
from medfast_kernels import _augmentation, _class_token, _contrast, _masking
from medfast_kernels._triton import augmentation, class_token, contrast, masking, random, tokens

BUDGETS = Path(__file__).with_name("budgets.json")
KEY = mk.Key(5, 3, torch.arange(8))
SLACK = 1.1  # of instructions


def contrast_of(dtype, dim, **options):
    options = {"temperature": 0.5, "weight": 5.0, "weight_mode": "exp", "volume": None, "anchors": None, **options}
    z = torch.zeros(2, 16, 512, dim, dtype=dtype)
    p = _contrast.check(z, **options)
    rest = (p.temperature, p.factor, p.offset, p.first, p.count)
    loss, lse = contrast.token_contrast(z, p.volume, *rest)
    contrast.token_contrast_backward(loss, z, p.volume, lse, *rest)


def class_attention():
    q, kv = torch.zeros(8, 12, 64, dtype=torch.bfloat16), torch.zeros(8, 4097, 2, 12, 64, dtype=torch.bfloat16)
    p = _class_token.check(q, *kv.unbind(2), scale=None)
    out, attention, logits, lse = class_token.class_attention(q, p.k, p.v, p.scale)
    class_token.class_attention_backward(out, attention, q, p.k, p.v, out, logits, lse, p.scale)


def mask(n):
    masking.mask(_masking.check(torch.zeros(8, n), 0.7, hint=0.1, key=KEY))


def drop_and_restore():
    x, ids, y = torch.zeros(8, 4096, 384).bfloat16(), torch.zeros(8, 1232).long(), torch.zeros(8, 1232, 384).bfloat16()
    inverse = tokens.invert(ids, 4096)
    tokens.take(x, ids, torch.zeros(4096, 384))
    tokens.put(y, ids, inverse, torch.zeros(384))
    tokens.sum_samples(y, ids, inverse)
    tokens.sum_missing(x, ids, inverse)


def draws():
    random.random_uniform((4096,), key=KEY)
    random.random_ids(4096, 1228, key=KEY)
    random.random_keep(0.1, key=KEY)


def views():
    """All of SMART's public recipe."""
    boxes = torch.zeros(8, 154, 154, 154, dtype=torch.int16)
    numbers = {"blur": 1.5, "gain": 1.1, "shift": 0.1, "contrast": 0.9, "gamma": 1.2, "noise": 0.1}
    extent = torch.full((8, 3), 140)
    augmentation.augment(_augmentation.check(boxes, (128,) * 3, (-500, 500), extent, None, numbers, KEY, None))


CASES = {
    "contrast, bf16": lambda: contrast_of(torch.bfloat16, 128),
    "contrast, bf16, wide": lambda: contrast_of(torch.bfloat16, 256),
    "contrast, bf16, logit": lambda: contrast_of(torch.bfloat16, 128, weight_mode="logit"),
    "contrast, fp32": lambda: contrast_of(torch.float32, 128),
    "class attention, bf16": class_attention,
    "mask of 4096": lambda: mask(4096),
    "drop and restore, bf16": drop_and_restore,
    "draws": draws,
    "views": views,
}
QUICK = ("contrast, bf16",)


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    as_on_a_gpu(monkeypatch.setattr)


def as_on_a_gpu(put):
    """On a CPU bf16 is widened for the interpreter."""
    put(contrast, "_rows", lambda z: z.flatten(0, 2))


def costs(name, arch):
    """{kernel: cost}; of variants of one kernel that which has the most instructions."""
    made = sorted(((k.name, aot.cost(k)) for k in aot.compiled(CASES[name], arch)), key=lambda one: one[1].instructions)
    return dict(made)


@pytest.mark.parametrize("arch", aot.ARCHS)
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_within_budget(name, arch):
    budgets = json.loads(BUDGETS.read_text())["operators"][name]
    found = costs(name, arch)
    assert found.keys() == budgets.keys()
    for kernel, cost in found.items():
        registers, shared, instructions = budgets[kernel][str(arch)]
        assert cost.spills == 0, kernel
        assert cost.registers <= registers and cost.shared <= shared, (kernel, cost)
        assert cost.instructions <= SLACK * instructions, (kernel, cost)
        if kernel in ("sum_part", "gradient_part"):
            assert cost.tensor_core == ("bf16" in name), kernel


if __name__ == "__main__":
    as_on_a_gpu(setattr)
    table: dict[str, dict[str, dict[str, list[int]]]] = {}
    for case in CASES:
        for arch in aot.ARCHS:
            for kernel, cost in costs(case, arch).items():
                row = table.setdefault(case, {}).setdefault(kernel, {})
                row[str(arch)] = [cost.registers, cost.shared, cost.instructions]
                print(case, arch, kernel, cost, flush=True)
    known = json.loads(BUDGETS.read_text()) if BUDGETS.is_file() else {}
    BUDGETS.write_text(json.dumps({**known, "operators": table}, indent=1) + "\n")
