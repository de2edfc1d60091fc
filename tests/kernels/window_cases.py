"""Cases of window attention that several test files run."""

import math

import torch
from hypothesis import strategies as st

import medfast_kernels as mk

NAMED = {
    "unshifted": {"grid": (8, 4, 8), "window": 4},
    "stage one": {"grid": (8, 8, 4), "window": 4, "shift": 2, "heads": 4, "dim": 12},
    "stage two": {"grid": (8, 4, 4), "window": 4, "shift": 2, "heads": 2, "dim": 24},
    "padded, live": {"grid": (5, 7, 3), "window": (3, 4, 2), "shift": (1, 2, 0), "pad_value": True},
    "padded, zeros": {"grid": (5, 7, 3), "window": (3, 4, 2), "shift": (2, 3, 1)},
    "padded, masked": {"grid": (5, 7, 3), "window": (3, 4, 2), "shift": (1, 2, 1), "pad": "mask"},
    "clipped": {"grid": (9, 2, 3), "window": 4, "shift": 2},
    "clipped, sliced": {"grid": (9, 2, 3), "window": 4, "shift": 2, "bias_index": "sliced"},
    "not clipped": {"grid": (9, 2, 4), "window": 4, "shift": 2, "clip": False, "pad_value": True},
    "flat": {"grid": (9, 10), "window": 7, "shift": 3, "heads": 3, "dim": 33},
    "window 7": {"grid": (8, 9, 7), "window": 7, "shift": 3, "dim": 6},
    "cosine": {"grid": (6, 5, 4), "window": 4, "shift": 1, "cosine": True, "scale": "heads", "pad_value": True},
    "dense bias": {"grid": (6, 5, 3), "window": 4, "shift": 1, "bias": "dense"},
    "no bias": {"grid": (6, 5, 4), "window": 4, "shift": 1, "bias": None, "scale": 0.3},
    "scale per head": {"grid": (6, 5, 4), "window": 3, "scale": "heads"},
    "dropout": {"grid": (6, 5, 4), "window": 3, "shift": 1, "dropout": 0.4},
    "one token": {"grid": (1, 1, 1), "window": 1, "heads": 1, "dim": 1},
    "empty batch": {"grid": (4, 4, 4), "window": 2, "shift": 1, "batch": 0},
}


def arguments(case, dtype=torch.float64, seed=0):
    """(qkv, bias, options) of a case; every floating tensor requires a gradient."""
    case = dict(case)
    grid, heads, dim = case.pop("grid"), case.pop("heads", 2), case.pop("dim", 5)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    window = case["window"] if isinstance(case["window"], tuple) else (case["window"],) * len(grid)
    tokens = math.prod(min(g, w) if case.get("clip", True) else w for g, w in zip(grid, window, strict=True))
    qkv = draw(case.pop("batch", 2), *grid, 3, heads, dim)
    kind = case.pop("bias", "table")
    shape = {"table": (math.prod(2 * w - 1 for w in window), heads), "dense": (heads, tokens, tokens), None: None}[kind]
    if case.get("pad_value"):
        case["pad_value"] = draw(3, heads, dim)
    if case.get("scale") == "heads":
        case["scale"] = draw(heads)
    if case.get("dropout"):
        case["key"] = mk.Key(2**63 + 11, step=3, sample=torch.tensor([7, 2**31])).at(mk.Role.DROPOUT, layer=2)
    return qkv, None if shape is None else draw(*shape), case


def values_and_gradients(operator, qkv, bias, options):
    """Output, then the gradient of a random projection of it in every tensor that has one, float64."""
    inputs = [x for x in (qkv, bias, options.get("pad_value"), options.get("scale")) if isinstance(x, torch.Tensor)]
    out = operator(qkv, bias, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    grads = torch.autograd.grad(out, inputs, weight, allow_unused=True)
    grads = [torch.zeros_like(x) if grad is None else grad for x, grad in zip(inputs, grads, strict=True)]
    return [x.detach().double() for x in (out, *grads)]


@st.composite
def problems(draw):
    """Any small problem."""
    axes = draw(st.sampled_from([2, 3]))
    window = tuple(draw(st.integers(1, 4)) for _ in range(axes))
    case = {
        "window": window,
        "grid": tuple(draw(st.integers(1, 3 * w + 1)) for w in window),
        "shift": tuple(draw(st.integers(0, w - 1)) for w in window),
        "heads": draw(st.integers(1, 3)),
        "dim": draw(st.sampled_from([1, 3, 12, 17, 24, 40])),
        "batch": draw(st.integers(1, 3)),
        "clip": draw(st.booleans()),
        "pad": draw(st.sampled_from(["bias", "mask"])),
        "pad_value": draw(st.booleans()) or None,
        "bias": draw(st.sampled_from(["table", "dense", None])),
        "bias_index": draw(st.sampled_from(["geometric", "sliced"])),
        "cosine": draw(st.booleans()),
        "scale": draw(st.sampled_from([None, 0.7, "heads"])),
    }
    return case
