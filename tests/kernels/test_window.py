"""The definition of window attention against loops over pairs of tokens, and against MONAI's modules."""

import itertools
import math
from functools import partial

import pytest
import torch
from window_cases import NAMED, arguments, values_and_gradients

import medfast_kernels as mk


def by_loops(qkv, bias, *, window, shift=0, scale=None, cosine=False, pad="bias", pad_value=None, clip=True,
             bias_index="geometric", dropout=0.0, key=None):  # fmt: skip
    """Window attention, one query at a time, from the sentences of its contract."""
    batch, *grid = qkv.shape[:-3]
    heads, dim = qkv.shape[-2:]
    full = (window,) * len(grid) if isinstance(window, int) else window
    shift = (shift,) * len(grid) if isinstance(shift, int) else shift
    clipped = [clip and g <= w for g, w in zip(grid, full, strict=True)]
    window = [g if c else w for g, w, c in zip(grid, full, clipped, strict=True)]
    shift = [0 if c else s for s, c in zip(shift, clipped, strict=True)]
    counts = [-(-g // w) for g, w in zip(grid, window, strict=True)]
    padded = [n * w for n, w in zip(counts, window, strict=True)]
    places = list(itertools.product(*map(range, window)))
    named = list(itertools.product(*map(range, full))) if bias_index == "sliced" else places
    scale = (1.0 if cosine else dim**-0.5) if scale is None else scale
    scale = scale if isinstance(scale, torch.Tensor) else [scale] * heads
    pad_value = qkv.new_zeros(3, heads, dim) if pad_value is None else pad_value
    out = {}
    for number, corner in enumerate(itertools.product(*map(range, counts))):
        line = [[c * w + p + s for c, w, p, s in zip(corner, window, place, shift, strict=True)] for place in places]
        tokens = [tuple(x % n for x, n in zip(at, padded, strict=True)) for at in line]
        laps = [tuple(x // n for x, n in zip(at, padded, strict=True)) for at in line]
        real = [all(x < g for x, g in zip(at, grid, strict=True)) for at in tokens]
        for b, h in itertools.product(range(batch), range(heads)):
            rows = [qkv[(b, *at)][:, h] if inside else pad_value[:, h] for at, inside in zip(tokens, real, strict=True)]
            q, k, v = torch.stack(rows, dim=1)
            if cosine:
                q, k = (x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12) for x in (q, k))
            for i in (i for i in range(len(places)) if real[i]):
                seen = [j for j in range(len(places)) if laps[j] == laps[i] and (real[j] or pad == "bias")]
                logits = []
                for j in seen:
                    row = 0
                    for axis, w in enumerate(full):
                        row = row * (2 * w - 1) + named[i][axis] - named[j][axis] + w - 1
                    extra = 0.0 if bias is None else bias[row, h] if bias.dim() == 2 else bias[h, i, j]
                    logits.append(scale[h] * (q[i] @ k[j]) + extra)
                weights = torch.softmax(torch.stack(logits), dim=0)
                if dropout:
                    n = len(places)
                    first = ((number * heads + h) * n + i) * n
                    kept = mk.random_uniform(first + n, key=key)[b, first:] >= dropout
                    weights = weights * kept[seen] / (1 - dropout)
                out[(b, *tokens[i], h)] = weights @ v[seen]
    stacked = [out[at] for at in itertools.product(range(batch), *map(range, grid), range(heads))]
    return torch.stack(stacked).reshape(batch, *grid, heads * dim)


LARGE = ("window 7", "stage one", "flat", "unshifted")  # slow in loops


@pytest.mark.parametrize("name", [name for name in NAMED if name not in (*LARGE, "empty batch")])
def test_against_loops(name):
    case = dict(NAMED[name], batch=1 if name != "dropout" else 2, heads=2)
    qkv, bias, options = arguments(case)
    got = values_and_gradients(mk.reference.window_attention, qkv, bias, options)
    for a, b in zip(got, values_and_gradients(by_loops, qkv, bias, options), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("grid", "shift"), [((8, 8, 8), 2), ((9, 6, 5), 2), ((8, 9, 3), 2), ((5, 9), 1)])
def test_against_monai(grid, shift):
    swin = pytest.importorskip("monai.networks.nets.swin_unetr")
    window, shift = (4,) * len(grid), (shift,) * len(grid)
    torch.manual_seed(0)
    block = swin.SwinTransformerBlock(24, 2, window, shift, qkv_bias=True).double()
    torch.nn.init.normal_(block.attn.relative_position_bias_table)
    x = torch.randn(2, *grid, 24, dtype=torch.float64)
    effective, moved = swin.get_window_size(grid, window, shift)
    padded = [-(-g // w) * w for g, w in zip(grid, effective, strict=True)]
    theirs = block.forward_part1(x, swin.compute_mask(padded, effective, moved, x.device).double())
    qkv = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 2, 12))
    ours = mk.window_attention(
        qkv, block.attn.relative_position_bias_table, window=window, shift=shift, bias_index="sliced",
        pad_value=block.attn.qkv.bias.unflatten(0, (3, 2, 12)),
    )  # fmt: skip
    torch.testing.assert_close(block.attn.proj(ours), theirs, rtol=1e-10, atol=1e-10)


def test_weights_make_the_output():
    qkv, bias, options = arguments(NAMED["stage one"])
    weights = mk.reference.window_attention_weights(qkv, bias, **options)
    assert weights.shape == (2, 4, 4, 64, 64)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    constant = torch.ones_like(qkv)
    constant[..., :2, :, :] = qkv[..., :2, :, :]
    out = mk.window_attention(constant, bias, **options)
    torch.testing.assert_close(out, torch.ones_like(out))


@pytest.mark.parametrize("operator", [mk.window_attention, mk.reference.window_attention])
def test_dropped_samples_are_not_read(operator):
    qkv, bias, options = arguments({"grid": (5, 4, 3), "window": 3, "shift": 1, "pad_value": True})
    kept = values_and_gradients(operator, qkv, bias, dict(options, keep=torch.tensor([True, True])))
    poisoned = qkv.detach().clone()
    poisoned[1] = torch.nan
    options["keep"] = torch.tensor([True, False])
    got = values_and_gradients(operator, poisoned.requires_grad_(), bias, options)
    assert all(x.isfinite().all() for x in got)
    assert not got[0][1].any() and not got[1][1].any()
    torch.testing.assert_close(got[0][0], kept[0][0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got[1][0], kept[1][0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["stage one", "padded, live", "cosine", "dropout"])
@pytest.mark.parametrize("backend", ["reference", None])
def test_compiles_whole(name, backend):
    qkv, bias, options = arguments(NAMED[name], dtype=torch.float32)
    operator = mk.reference.window_attention if backend else mk.window_attention
    torch._dynamo.reset()  # else the second shape is compiled for all shapes, which takes long
    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
    got = values_and_gradients(compiled, qkv, bias, options)
    for a, b in zip(got, values_and_gradients(operator, qkv, bias, options), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_sixteen_bits_are_computed_in_fp32():
    qkv, bias, options = arguments(NAMED["stage one"], dtype=torch.float32)
    low = qkv.detach().bfloat16()
    expected = mk.reference.window_attention(low.float(), bias, **options)
    for operator in (mk.window_attention, mk.reference.window_attention):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = operator(low, bias, **options)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out, expected.bfloat16(), rtol=1e-2, atol=1e-3)


GOOD = torch.zeros(1, 4, 4, 4, 3, 2, 6)
META = partial(torch.zeros, device="meta")


@pytest.mark.parametrize(
    ("qkv", "bias", "options", "error", "match"),
    [
        ([1.0], None, {}, TypeError, "qkv must be a tensor, got list"),
        (GOOD.long(), None, {}, TypeError, "floating tensor, got torch.int64"),
        (GOOD[..., :2, :, :], None, {}, ValueError, r"\(b, \*grid, 3, heads, dim\)"),
        (GOOD, None, {"window": (2, 2)}, ValueError, r"one entry per grid axis \(3\), got \(2, 2\)"),
        (GOOD, None, {"window": 0}, ValueError, "window must be at least 1"),
        (GOOD, None, {"window": (2, 2, 2.0)}, TypeError, "window must hold ints"),
        (GOOD, None, {"shift": 2}, ValueError, "shift must be smaller than the window"),
        (GOOD, None, {"pad": "zero"}, ValueError, "pad must be one of 'bias', 'mask', got 'zero'"),
        (GOOD, None, {"bias_index": "full"}, ValueError, "'geometric', 'sliced'"),
        (GOOD, torch.zeros(26, 2), {}, ValueError, r"table \(27, 2\).* or dense \(2, 8, 8\)"),
        (GOOD, torch.zeros(27, 2).long(), {}, TypeError, "bias must be None or a floating tensor"),
        (GOOD, None, {"scale": torch.ones(3)}, ValueError, r"scale must have shape \(2,\)"),
        (GOOD, None, {"scale": "auto"}, TypeError, "scale must be None, a float"),
        (GOOD, None, {"scale": True}, TypeError, "scale must be None, a float"),
        (GOOD, None, {"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
        (GOOD, None, {"shift": True}, TypeError, "shift must be an int, or a sequence .* got True"),
        (GOOD, None, {"window": None}, TypeError, "window must be an int, or a sequence .* got None"),
        (GOOD, None, {"window": (2, 2, True)}, TypeError, "window must hold ints"),
        (GOOD, None, {"cosine": "no"}, TypeError, "cosine must be True or False, got 'no'"),
        (GOOD, None, {"clip": 1}, TypeError, "clip must be True or False, got 1"),
        (GOOD, None, {"pad_value": torch.ones(6)}, ValueError, r"pad_value must have shape \(3, 2, 6\)"),
        (GOOD, None, {"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\)"),
        (GOOD, None, {"dropout": 0.5}, ValueError, "needs key"),
        (GOOD, None, {"dropout": 0.5, "key": 3}, TypeError, "medfast_kernels.Key, got int"),
        (GOOD, None, {"keep": torch.ones(1)}, TypeError, r"keep must be a \(b,\) bool tensor"),
        (GOOD, None, {"keep": torch.ones(2, dtype=torch.bool)}, ValueError, r"keep must be \(b,\) = \(1,\)"),
        (GOOD, META(27, 2), {}, ValueError, "bias must be on the device of qkv, cpu, got meta"),
        (GOOD, None, {"pad_value": META(3, 2, 6)}, ValueError, "pad_value must be on the device of qkv, cpu, got meta"),
        (GOOD, None, {"scale": META(2)}, ValueError, "scale must be on the device of qkv, cpu, got meta"),
        (GOOD, None, {"keep": META(1).bool()}, ValueError, "keep must be on the device of qkv, cpu, got meta"),
        (
            GOOD,
            torch.zeros(27, 2).double(),
            {},
            ValueError,
            "bias must be torch.float32 as qkv is, .* got torch.float64",
        ),
        (GOOD.double(), None, {"scale": torch.ones(2)}, ValueError, "scale must be torch.float64 as qkv is"),
    ],
)
@pytest.mark.parametrize("operator", [mk.window_attention, mk.reference.window_attention])
def test_refusals_are_the_same_for_every_backend(operator, qkv, bias, options, error, match):
    with pytest.raises(error, match=match):
        operator(qkv, bias, **{"window": 2, **options})


def test_any_strides():
    qkv, bias, options = arguments(NAMED["stage one"])
    expected = mk.window_attention(qkv, bias, **options)
    strided = qkv.detach().movedim(-1, 1).contiguous().movedim(1, -1)
    assert not strided.is_contiguous()
    torch.testing.assert_close(mk.window_attention(strided, bias, **options), expected.detach())
    assert math.prod(expected.shape) == qkv.numel() // 3
