"""drop_tokens and restore_tokens against loops over samples, and their backends against the definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_checks import assert_near, assert_runs_its_own, cpp_only, on_cpp, on_threads, results

import medfast_kernels as mk
from medfast_kernels import _dispatch

BACKENDS = ["reference", pytest.param("cpp", marks=cpp_only)]


def drawn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def some_ids(batch, n, count, ascending=False):
    draw = torch.Generator().manual_seed(batch + n + count)
    order = [torch.randperm(n, generator=draw)[:count] for _ in range(batch)]
    ids = torch.stack(order) if order else torch.zeros(0, count, dtype=torch.int64)
    return ids.sort(dim=1).values if ascending else ids


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("ascending", [True, False])
def test_against_loops(name, ascending):
    x, position, fill, ids = drawn(3, 7, 4), drawn(7, 4, seed=1), drawn(4, seed=2), some_ids(3, 7, 3, ascending)
    with mk.backend(name):
        y = mk.drop_tokens(x, ids, position)
        whole = mk.restore_tokens(y, ids, 7, fill)
        plain = mk.drop_tokens(x, ids)
    for b in range(3):
        at = {token: j for j, token in enumerate(ids[b].tolist())}
        for token in range(7):
            if token in at:
                assert torch.equal(y[b, at[token]], x[b, token] + position[token])
                assert torch.equal(plain[b, at[token]], x[b, token])
            assert torch.equal(whole[b, token], y[b, at[token]] if token in at else fill)


@pytest.mark.parametrize("name", BACKENDS)
def test_gradcheck_once_and_twice(name):
    x, position, fill = (t.requires_grad_() for t in (drawn(2, 5, 3), drawn(5, 3, seed=1), drawn(3, seed=2)))
    y, ids = drawn(2, 2, 3, seed=3).requires_grad_(), some_ids(2, 5, 2)
    with mk.backend(name):
        for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            assert check(lambda x: mk.drop_tokens(x, ids), x)
            assert check(lambda x, position: mk.drop_tokens(x, ids, position), (x, position))
            assert check(lambda y, fill: mk.restore_tokens(y, ids, 5, fill), (y, fill))


@cpp_only
@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 3), st.integers(1, 90), st.integers(0, 90), st.integers(1, 40),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_any_shape_in_cpp(batch, n, count, d, dtype, wide, positioned):
    count, beside = min(n, count), torch.float32 if wide and dtype != torch.float64 else dtype
    x, ids = drawn(batch, d, n, dtype=dtype).transpose(1, 2), some_ids(batch, n, count)  # strided
    position, fill = drawn(n, d, dtype=beside, seed=1), drawn(d, dtype=beside, seed=2)
    y = drawn(batch, count, 2 * d, dtype=dtype, seed=3)[..., ::2]
    given = [x, position] if positioned else [x]
    torch.use_deterministic_algorithms(True)  # what nobody writes is NaN
    try:
        for kept, function in (("drop_tokens", given), ("restore_tokens", [y, fill])):
            places = () if kept == "drop_tokens" else (n,)
            call = lambda to, a, *b, kept=kept, places=places: getattr(to, kept)(a, ids, *places, *b)  # noqa: E731
            cotangents = [drawn(batch, n if places else count, d, seed=4)]
            ours = results(on_cpp(lambda *t, call=call: call(mk, *t)), function, cotangents)
            theirs = results(lambda *t, call=call: call(mk.reference, *t), function, cotangents)
            assert [a.dtype for a in ours] == [b.dtype for b in theirs]
            assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
            rounding = torch.finfo(ours[-1].dtype).eps  # of the sums
            assert_near(ours[2:], theirs[2:], 4 * rounding)
    finally:
        torch.use_deterministic_algorithms(False)


def test_gradients_of_16_bits_are_summed_in_fp32():
    """4,000 ones: bf16 would stop counting at 256."""
    fill = torch.zeros(2, requires_grad=True)
    for name in ("reference", "cpp") if _dispatch.WHY_NO_CPP is None else ("reference",):
        with mk.backend(name):
            out = mk.restore_tokens(torch.zeros(4, 3, 2, dtype=torch.bfloat16), some_ids(4, 1003, 3), 1003, fill)
        (grad,) = torch.autograd.grad(out.sum(), fill)
        assert grad.dtype == torch.float32 and grad.tolist() == [4000.0, 4000.0]


@cpp_only
def test_same_bits_on_any_number_of_threads():
    x, position, fill, ids = (drawn(5, 700, 96, dtype=torch.float32), drawn(700, 96, dtype=torch.float32),
                              drawn(96, dtype=torch.float32), some_ids(5, 700, 200))  # fmt: skip

    def run():
        dropped = on_cpp(lambda x, p: mk.drop_tokens(x, ids, p))
        restored = on_cpp(lambda y, f: mk.restore_tokens(y, ids, 700, f))
        return [*results(dropped, (x, position), [x[:, :200]]), *results(restored, (x[:, :200], fill), [x])]

    first, *others = on_threads(run, 1, 2, 3, 1)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_compiles_whole():
    x, position, fill, ids = drawn(2, 9, 3), drawn(9, 3, seed=1), drawn(3, seed=2), some_ids(2, 9, 4)

    def both(x, position, fill):
        return mk.restore_tokens(mk.drop_tokens(x, ids, position), ids, 9, fill)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    tensors, cotangents = (x, position, fill), [drawn(2, 9, 3, seed=5)]
    assert_near(results(compiled, tensors, cotangents), results(both, tensors, cotangents), 1e-12)
    with pytest.raises(ValueError, match=r"ids must be in \[0, n\)"):
        torch.compile(lambda ids: mk.drop_tokens(x, ids), fullgraph=True, backend="aot_eager")(ids + 9)


@cpp_only
def test_rules_of_operators():
    operators, ids = getattr(torch.ops, _dispatch.NAMESPACE), some_ids(2, 5, 2)
    x, y = drawn(2, 5, 3).requires_grad_(), drawn(2, 2, 3).requires_grad_()
    torch.library.opcheck(operators.drop_tokens, (x, ids, drawn(5, 3).requires_grad_()))
    torch.library.opcheck(operators.drop_tokens_backward, (y, ids, 5, True))
    torch.library.opcheck(operators.restore_tokens, (y, ids, 5, drawn(3).requires_grad_()))
    torch.library.opcheck(operators.restore_tokens_backward, (x, ids))
    for wrong, match in ((ids + 4, r"ids must be in \[0, 5\)"), (ids * 0, "distinct")):
        with pytest.raises(RuntimeError, match=match):
            operators.restore_tokens(y.detach(), wrong, 5, drawn(3))


@cpp_only
def test_a_profile_shows_its_own_operators():
    x, position, fill, ids = drawn(2, 9, 3), drawn(9, 3), drawn(3), some_ids(2, 9, 4, ascending=True)
    both = lambda x, p, f: mk.restore_tokens(mk.drop_tokens(x, ids, p), ids, 9, f)  # noqa: E731
    names = [f"{name}{way}" for name in ("drop_tokens", "restore_tokens") for way in ("", "_backward")]
    assert_runs_its_own(lambda: results(both, (x, position, fill), [x]), *names)


X, Y, IDS, FILL = torch.zeros(2, 5, 3), torch.zeros(2, 2, 3), torch.tensor([[0, 3], [4, 1]]), torch.zeros(3)


@pytest.mark.parametrize("operators", [mk, mk.reference])
@pytest.mark.parametrize(
    ("name", "arguments", "error", "match"),
    [
        ("drop_tokens", (X[0], IDS), ValueError, r"x must be \(b, n, d\), got \(5, 3\)"),
        ("drop_tokens", (X.int(), IDS), TypeError, "x must be a floating tensor, got torch.int32"),
        ("drop_tokens", (X, IDS.int()), TypeError, "ids must be an int64 tensor, got torch.int32"),
        ("drop_tokens", (X, [[0]]), TypeError, "ids must be an int64 tensor, got list"),
        ("drop_tokens", (X, IDS[:1]), ValueError, r"ids must be \(b, count\)"),
        ("drop_tokens", (X, IDS + 3), ValueError, r"ids must be in \[0, n\) = \[0, 5\), got 3 to 7"),
        ("drop_tokens", (X, IDS - 1), ValueError, "got -1 to 3"),
        ("drop_tokens", (X, IDS * 0), ValueError, "distinct in every row: 2 are repeated"),
        ("drop_tokens", (X, IDS.to("meta")), ValueError, "on the device of x, cpu, got meta"),
        ("drop_tokens", (X, IDS, X[0, :4]), ValueError, r"position must have shape \(5, 3\), got \(4, 3\)"),
        ("drop_tokens", (X, IDS, X[0].double()), ValueError, "position must be torch.float32"),
        ("drop_tokens", (X, IDS, X[0].int()), TypeError, "position must be a floating tensor"),
        ("restore_tokens", (Y[0], IDS, 5, FILL), ValueError, r"y must be \(b, count, d\)"),
        ("restore_tokens", (Y, IDS, 1, FILL), ValueError, "n must be at least the 2 tokens that are kept, got 1"),
        ("restore_tokens", (Y, IDS, 4, FILL), ValueError, r"\[0, 4\), got 0 to 4"),
        ("restore_tokens", (Y, IDS, 5.0, FILL), TypeError, "n must be an int"),
        ("restore_tokens", (Y, IDS[:, :1], 5, FILL), ValueError, r"ids must be \(b, count\) = \(2, 2\), got \(2, 1\)"),
        ("restore_tokens", (Y, IDS, 5, FILL[:2]), ValueError, r"fill must have shape \(3,\)"),
        ("restore_tokens", (Y, IDS, 5, 0.0), TypeError, "fill must be a tensor, got float"),
    ],
)
def test_refusals(operators, name, arguments, error, match):
    with pytest.raises(error, match=match):
        getattr(operators, name)(*arguments)
