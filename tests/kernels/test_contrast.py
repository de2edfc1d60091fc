"""The token-wise contrast: the equation, NT-Xent, shares of a batch, compilation, refusals. For every backend here."""

import pytest
import torch
from contrast_cases import NAMED, arguments, by_equation, problems, value_and_gradient
from hypothesis import given, settings

import medfast_kernels as mk

OPERATORS = pytest.mark.parametrize("operator", [mk.token_contrast, mk.reference.token_contrast])


def compare(operator, case):
    z, options = arguments(case)
    got, expected = value_and_gradient(operator, z, options), value_and_gradient(by_equation, z, options)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@OPERATORS
@pytest.mark.parametrize("name", NAMED)
def test_named_cases(operator, name):
    compare(operator, NAMED[name])


@settings(max_examples=25, deadline=None)
@given(problems())
def test_any_problem(case):
    compare(mk.token_contrast, case)
    compare(mk.reference.token_contrast, case)


def nt_xent(one, other, temperature):
    """SimCLR's loss as its authors compute it: cross entropies of the two blocks that each view sees."""
    batch = len(one)
    itself = torch.full((batch,), torch.inf, dtype=one.dtype).diag().nan_to_num(nan=0.0, posinf=torch.inf)
    total = 0.0
    for a, b in ((one, other), (other, one)):
        logits = torch.cat((a @ b.T / temperature, a @ a.T / temperature - itself), dim=1)
        total = total + torch.nn.functional.cross_entropy(logits, torch.arange(batch))
    return total / 2


@OPERATORS
@pytest.mark.parametrize("options", [{"weight": 1.0}, {"weight": 0.0, "weight_mode": "logit"}])
def test_one_position_is_nt_xent(operator, options):
    z, _ = arguments({"shape": (2, 140, 1, 32)})
    loss = operator(z, temperature=0.1, **options)
    expected = nt_xent(z[0, :, 0], z[1, :, 0], 0.1)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    got, grad = (torch.autograd.grad(x, z)[0] for x in (loss, expected))
    torch.testing.assert_close(got, grad, rtol=0, atol=1e-14)


@OPERATORS
@pytest.mark.parametrize("mode", ["exp", "logit"])
def test_shares_add_up_to_the_whole(operator, mode):
    z, options = arguments({"shape": (2, 6, 17, 9), "weight": 4.0, "weight_mode": mode, "volume": (0, 0, 1, 2, 2, 3)})
    whole = value_and_gradient(operator, z, options)
    shares = [(0, 1), (1, 3), (4, 2)]
    parts = [value_and_gradient(operator, z, {**options, "anchors": share}) for share in shares]
    for index, expected in enumerate(whole):
        total = sum(share[1] / 6 * part[index] for share, part in zip(shares, parts, strict=True))
        torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-13)


@OPERATORS
def test_crops_of_one_volume_do_not_weight_each_other(operator):
    z, _ = arguments({"shape": (2, 3, 5, 4)})
    unweighted = operator(z)
    same = operator(z, weight=7.0, volume=torch.tensor([4, 4, 4], dtype=torch.int32))
    torch.testing.assert_close(same, unweighted, rtol=1e-14, atol=0)
    assert operator(z, weight=7.0, volume=torch.tensor([4, 4, 5])) > unweighted + 0.1


@OPERATORS
def test_sixteen_bits_are_computed_in_fp32(operator):
    z, options = arguments(NAMED["heavier negatives"], torch.bfloat16)
    expected = value_and_gradient(by_equation, z.detach().float().requires_grad_(), options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = operator(z, **options)
    (grad,) = torch.autograd.grad(3.0 * loss, z)
    assert loss.dtype == torch.float32 and grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(grad, expected[1].bfloat16(), rtol=1e-2, atol=1e-6)


@OPERATORS
def test_any_strides(operator):
    z, options = arguments(NAMED["heavier negatives"])
    expected = value_and_gradient(operator, z, options)
    strided = z.detach().permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0).requires_grad_()
    assert not strided.is_contiguous()
    for a, b in zip(value_and_gradient(operator, strided, options), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@OPERATORS
@pytest.mark.parametrize("name", ["two crops of a volume", "a share, in the exponent"])
def test_compiles_whole(operator, name):
    z, options = arguments(NAMED[name], torch.float32)
    torch._dynamo.reset()  # else the second shape is compiled for all shapes, which takes long
    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
    for a, b in zip(value_and_gradient(compiled, z, options), value_and_gradient(operator, z, options), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@OPERATORS
@pytest.mark.parametrize("options", [{"weight": 3.0}, {"weight": 3.0, "weight_mode": "logit"}])
def test_gradcheck(operator, options):
    z, _ = arguments({"shape": (2, 3, 2, 3)})
    options = {**options, "volume": torch.tensor([0, 1, 1]), "anchors": (1, 2)}
    assert torch.autograd.gradcheck(lambda z: operator(z, **options), z)


GOOD = torch.nn.functional.normalize(torch.ones(2, 3, 4, 5), dim=-1)


@pytest.mark.parametrize(
    ("z", "options", "error", "match"),
    [
        ([1.0], {}, TypeError, "z must be a tensor, got list"),
        (GOOD.long(), {}, TypeError, "floating tensor, got torch.int64"),
        (GOOD[0], {}, ValueError, r"\(2 views, volumes, positions, dim\), got \(3, 4, 5\).*unsqueeze"),
        (GOOD[:1], {}, ValueError, r"\(2 views, volumes, positions, dim\), got \(1, 3, 4, 5\)"),
        (GOOD[:, :, :0], {}, ValueError, r"at least one volume, position and channel, got \(2, 3, 0, 5\)"),
        (GOOD, {"temperature": 0.0}, ValueError, "temperature must be finite and above 0, got 0.0"),
        (GOOD, {"temperature": torch.tensor(0.5)}, TypeError, "temperature must be a number, got Tensor"),
        (GOOD, {"weight": -1.0}, ValueError, "weight must be finite and at least 0, got -1.0"),
        (GOOD, {"weight": float("nan")}, ValueError, "weight must be finite"),
        (GOOD, {"weight": "5"}, TypeError, "weight must be a number, got str"),
        (GOOD, {"weight_mode": "sum"}, ValueError, "weight_mode must be one of 'exp', 'logit', got 'sum'"),
        (GOOD, {"volume": [0, 0, 1]}, TypeError, r"volume must be None or a \(volumes,\) tensor .* got list"),
        (GOOD, {"volume": torch.zeros(3)}, TypeError, "got torch.float32"),
        (GOOD, {"volume": torch.zeros(4).long()}, ValueError, r"volume must be \(volumes,\) = \(3,\), got \(4,\)"),
        (
            GOOD,
            {"volume": torch.zeros(3, device="meta").long()},
            ValueError,
            "volume must be on the device of z, cpu, got meta",
        ),
        (GOOD, {"anchors": 2}, TypeError, r"anchors must be None or two ints, \(first volume, count\), got 2"),
        (GOOD, {"anchors": (0, 1.0)}, TypeError, "two ints"),
        (GOOD, {"anchors": (2, 2)}, ValueError, r"within the 3 volumes, got \(2, 2\)"),
        (GOOD, {"anchors": (0, 0)}, ValueError, "within the 3 volumes"),
        (GOOD, {"anchors": (-1, 2)}, ValueError, "within the 3 volumes"),
    ],
)
@OPERATORS
def test_refusals_are_the_same_for_every_backend(operator, z, options, error, match):
    with pytest.raises(error, match=match):
        operator(z, **options)


@OPERATORS
def test_lengths_are_checked_where_asked_for(operator, monkeypatch):
    long = GOOD.clone()
    long[1, 2, 3] *= 1.01
    operator(long)
    monkeypatch.setenv("MEDFAST_CHECK", "1")
    with pytest.raises(ValueError, match=r"z\[1, 2, 3\] has length 1\.01; torch\.nn\.functional\.normalize"):
        operator(long)
    with pytest.raises(ValueError, match="L2-normalised"):
        operator(GOOD * torch.nan)
    z = GOOD.bfloat16().requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
    for a, b in zip(value_and_gradient(compiled, z, {}), value_and_gradient(operator, z, {}), strict=True):
        torch.testing.assert_close(a, b)
