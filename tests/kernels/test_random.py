"""Philox against its published vectors, and what the draws promise."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from operator_checks import assert_runs_its_own, cpp_only, on_cpp, on_threads
from torch.overrides import TorchFunctionMode

import medfast_kernels as mk
from medfast_kernels import _dispatch
from medfast_kernels.key import philox_words

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "seed", "expected"),
    [  # Random123, kat_vectors, philox4x32 10
        ((0, 0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((ONES, ONES, ONES, ONES), (1 << 64) - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(monkeypatch, counter, seed, expected):
    block, sample, step, stream = counter
    arange = torch.arange
    monkeypatch.setattr(torch, "arange", lambda *a, **k: arange(*a, **k) + block)  # the block is not an argument
    words = philox_words(mk.Key(seed, step, torch.tensor([sample]), stream), 4)
    assert [f"{int(word):08x}" for word in words[0]] == expected.split()


WORD = st.integers(-(2**63), 2**63 - 1)


@cpp_only
@settings(max_examples=40, deadline=None)
@example(0xFEDCBA9876543210, 2**31 + 7, 8 << 24 | 3 << 16 | 5, [2**32 - 1, 9], 9, True)
@given(st.integers(-1, 2**64 - 1), WORD, WORD, st.lists(WORD, max_size=3), st.integers(0, 9), st.booleans())
def test_words_in_cpp_are_the_same_bits(seed, step, stream, samples, count, tensors):
    sample = torch.tensor(samples, dtype=torch.int64)
    key = mk.Key(seed, step, sample, stream)
    if tensors:
        key = key._replace(step=torch.tensor(step), stream=torch.full_like(sample, stream))
    with mk.backend("cpp"):
        got = mk.philox_words(key, count)
    assert got.dtype == torch.int64 and torch.equal(got, mk.reference.philox_words(key, count))


@cpp_only
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**64 - 1), st.lists(WORD, max_size=4), st.integers(0, 300), st.integers(0, 300), st.floats(0, 1))
def test_draws_in_cpp_are_the_same_bits(seed, samples, n, count, rate):
    key = mk.Key(seed, 2**31 + 5, torch.tensor(samples, dtype=torch.int64)).at(mk.Role.NOISE, view=1)
    n, count = max(n, count), min(n, count)
    torch.use_deterministic_algorithms(True)  # what nobody writes is NaN, or no id
    try:
        for name, *arguments in (("random_uniform", (count, 2)), ("random_ids", n, count), ("random_keep", rate)):
            got, expected = (getattr(op, name)(*arguments, key=key) for op in (Cpp, mk.reference))
            assert got.dtype == expected.dtype and torch.equal(got, expected), name
        got, expected = (op.random_normal((count,), key=key) for op in (Cpp, mk.reference))
        assert got.dtype == expected.dtype and torch.allclose(got, expected, rtol=0, atol=1e-6)
    finally:
        torch.use_deterministic_algorithms(False)


class Cpp:
    random_uniform, random_normal = on_cpp(mk.random_uniform), on_cpp(mk.random_normal)
    random_ids, random_keep = on_cpp(mk.random_ids), on_cpp(mk.random_keep)


@cpp_only
def test_the_rate_of_keep_is_met_exactly():
    """A number that equals the rate is kept; both are fp32."""
    key = mk.Key(4, sample=torch.arange(50))
    for rate in mk.reference.random_uniform(1, key=key)[:, 0].tolist():
        assert torch.equal(Cpp.random_keep(rate, key=key), mk.reference.random_keep(rate, key=key))


@cpp_only
@pytest.mark.parametrize("draw", ["random_uniform", "random_normal", "random_ids"])
def test_long_draws_in_cpp_on_any_number_of_threads(draw):
    key = mk.Key(5, 2, torch.tensor([3, 1, 8])).at(mk.Role.NOISE, view=1)
    arguments = (50_003, 20_000) if draw == "random_ids" else (50_003,)
    expected = getattr(mk.reference, draw)(*arguments, key=key)
    first, *others = on_threads(lambda: getattr(Cpp, draw)(*arguments, key=key), 1, 2, 3)
    assert all(torch.equal(first, other) for other in others)
    assert torch.allclose(first, expected, rtol=0, atol=1e-6 if draw == "random_normal" else 0)


@cpp_only
def test_normal_numbers_of_cpp_are_as_exact_as_the_definition():
    """Against Box-Muller in fp64 on the same fp32 angles, tails included."""
    key = mk.Key(9, sample=torch.arange(4))
    unit = (mk.reference.philox_words(key, 200_000) >> 8).float() * 2.0**-24
    radius = (-2 * (unit[:, 0::2].double() + 2.0**-24).log()).sqrt()
    angle = (2.0 * math.pi * unit[:, 1::2]).double()
    exact = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(1)
    assert (Cpp.random_normal(200_000, key=key) - exact).abs().max() < 7e-7
    assert exact.abs().max() > 4


@cpp_only
def test_draws_in_cpp_keep_the_rules_of_operators():
    operators, address = getattr(torch.ops, _dispatch.NAMESPACE), torch.tensor([[1, 2, 3], [4, 5, 6]])
    for name, arguments in (("philox_words", (7,)), ("random_uniform", (7,)), ("random_normal", (7,)),
                            ("random_ids", (9, 4)), ("random_keep", (0.5,))):  # fmt: skip
        torch.library.opcheck(getattr(operators, name), (address, *arguments, -3))
        with pytest.raises(RuntimeError, match=r"\(b, 3\) int64"):
            getattr(operators, name)(address[:, :2], *arguments, 0)


@cpp_only
def test_a_profile_shows_its_own_operators():
    key = mk.Key(5, 2, torch.tensor([3, 1, 8]))
    for name, arguments in (("philox_words", None), ("random_uniform", (7,)), ("random_normal", (7,)),
                            ("random_ids", (9, 4)), ("random_keep", (0.5,))):  # fmt: skip
        draw = getattr(mk, name)
        assert_runs_its_own(lambda d=draw, a=arguments: d(key, 7) if a is None else d(*a, key=key), name)


@pytest.mark.parametrize("operators", [mk, mk.reference])
def test_draws_compile_whole(operators):
    def draw(step, sample):
        key = mk.Key(3, step, sample).stack(2).at(mk.Role.NOISE)
        ids = operators.random_ids(9, 4, key=key)
        exact = ids, operators.philox_words(key, 5), operators.random_uniform(3, key=key)
        return operators.random_normal((2, 3), key=key), *exact, operators.random_keep(0.5, key=key)

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    arguments = torch.tensor(5), torch.tensor([3, 8])
    for got, expected in zip(compiled(*arguments), draw(*arguments), strict=True):
        exact = 1e-6 if got.is_floating_point() else 0  # log and cos of a compiled graph may round otherwise
        assert torch.allclose(got.double(), expected.double(), rtol=0, atol=exact)


class Transfers(TorchFunctionMode):
    """Lists what would make the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        from_host = any(isinstance(x, torch.Tensor) and x.device.type == "cpu" for x in args)
        if from_host or function in (torch.as_tensor, torch.tensor, torch.Tensor.item, torch.Tensor.tolist):
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_draws_copy_nothing_to_the_device():
    sample = torch.zeros(2, dtype=torch.int64, device="meta")  # stands for a GPU
    key = mk.Key(3, 12, sample)
    with Transfers() as transfers:
        for one in (key.at(mk.Role.NOISE, layer=1), key.stack(2).at(mk.Role.MASK)):
            mk.random_normal((2, 3), key=one)
            mk.random_ids(9, 4, key=one)
            mk.random_keep(0.5, key=one)
    assert transfers.seen == []
    with Transfers() as transfers:
        torch.as_tensor(3, device="meta")
    assert transfers.seen  # the list does notice


def test_views_are_joined_bit_by_bit():
    key = mk.Key(0, sample=torch.arange(2))
    assert key.at(mk.Role.MASK, view=2).at(mk.Role.MASK, view=1) == key.at(mk.Role.MASK, view=3)
    stacked = key.stack(2).at(mk.Role.NOISE, layer=7)
    assert stacked.sample.tolist() == [0, 1, 0, 1]
    assert stacked.stream.tolist() == [4 << 24 | view << 16 | 7 for view in (0, 0, 1, 1)]
    for wrong in ({"view": 256}, {"layer": 65536}, {"layer": -1}):
        with pytest.raises(ValueError, match="layer must be in"):
            key.at(mk.Role.NOISE, **wrong)


def test_numbers_depend_on_their_address_alone():
    key = mk.Key(7, step=3, sample=torch.tensor([5, 9, 2])).at(mk.Role.NOISE, layer=4)
    whole = mk.random_uniform((2, 5), key=key)
    alone = mk.random_uniform((2, 5), key=key._replace(sample=torch.tensor([9]), step=torch.tensor(3)))
    assert torch.equal(whole[1:2], alone)
    assert torch.equal(mk.random_uniform(3, key=key), whole.flatten(1)[:, :3])
    for other in (key._replace(seed=8), key._replace(step=4), key.at(mk.Role.MASK, layer=4), key.at(mk.Role.NOISE)):
        assert not torch.equal(mk.random_uniform((2, 5), key=other), whole)


def test_uniform_and_normal_are_distributed_as_they_say():
    key = mk.Key(1, sample=torch.arange(4))
    uniform, normal = mk.random_uniform(20_001, key=key), mk.random_normal(20_001, key=key)
    assert uniform.dtype == normal.dtype == torch.float32
    assert uniform.min() >= 0 and uniform.max() < 1 and normal.isfinite().all()
    assert abs(uniform.mean() - 0.5) < 5e-3 and abs(uniform.var() - 1 / 12) < 2e-3
    assert abs(normal.mean()) < 1e-2 and abs(normal.var() - 1) < 2e-2 and abs((normal**4).mean() - 3) < 0.1


def test_ids_are_distinct_ascending_and_fair():
    ids = mk.random_ids(10, 4, key=mk.Key(2, sample=torch.arange(4000)))
    assert (ids.diff(dim=1) > 0).all() and ids.min() == 0 and ids.max() == 9
    assert (torch.bincount(ids.flatten(), minlength=10) / 4000 - 0.4).abs().max() < 0.03
    assert mk.random_ids(5, 0, key=mk.Key(2, sample=torch.arange(3))).shape == (3, 0)


def test_keep_drops_at_its_rate():
    key = mk.Key(3, sample=torch.arange(4000))
    assert abs(mk.random_keep(0.3, key=key).float().mean() - 0.7) < 0.03
    assert mk.random_keep(0.0, key=key).all() and not mk.random_keep(1.0, key=key).any()


KEY = mk.Key(0, sample=torch.arange(2))


@pytest.mark.parametrize("operators", [mk, mk.reference])
@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda op: op.random_ids(4, 5, key=KEY), ValueError, r"count must be in \[0, n\] = \[0, 4\], got 5"),
        (lambda op: op.random_ids(4, -1, key=KEY), ValueError, "count must be at least 0, got -1"),
        (lambda op: op.random_ids(4.0, 1, key=KEY), TypeError, "n must be an int, got float"),
        (lambda op: op.random_keep(1.5, key=KEY), ValueError, r"rate is the probability of dropping, in \[0, 1\]"),
        (lambda op: op.random_keep("1", key=KEY), TypeError, "rate must be a float, got str"),
        (lambda op: op.random_uniform((2, -1), key=KEY), ValueError, "every entry of shape must be at least 0"),
        (lambda op: op.random_uniform((2.0,), key=KEY), TypeError, "every entry of shape must be an int"),
        (lambda op: op.philox_words(KEY, -1), ValueError, "count must be at least 0, got -1"),
    ],
)
def test_refusals(operators, call, error, match):
    with pytest.raises(error, match=match):
        call(operators)


@pytest.mark.parametrize("operators", [mk, mk.reference])
@pytest.mark.parametrize(
    ("key", "error", "match"),
    [
        (mk.Key(0), ValueError, "key.sample, a .b,. int64 tensor of global slots; it is None"),
        (7, TypeError, "key must be a medfast_kernels.Key, got int"),
        (mk.Key(0, sample=torch.zeros(2)), ValueError, r"key.sample must be .* got torch.float32 \(2,\)"),
        (mk.Key(0, sample=[1, 2]), ValueError, r"key.sample must be .* got \[1, 2\]"),  # type: ignore[arg-type]
        (mk.Key(0, sample=torch.arange(2), stream=torch.arange(3)), ValueError, "key.stream must hold one entry or 2"),
        (mk.Key(0, 1.5, torch.arange(2)), TypeError, "key.step must be an int or a tensor of integers, got 1.5"),
        (mk.Key(0, torch.tensor(1.5), torch.arange(2)), TypeError, "key.step must be an int or a tensor of integers"),
    ],
)
def test_keys_that_address_nothing_are_refused(operators, key, error, match):
    for draw, *arguments in (("random_uniform", 2), ("random_normal", 2), ("random_ids", 3, 1), ("random_keep", 0.5)):
        with pytest.raises(error, match=match):
            getattr(operators, draw)(*arguments, key=key)
    with pytest.raises(error, match=match):
        operators.philox_words(key, 4)
    if not isinstance(key, mk.Key) or key.sample is not None:  # these two fill samples in
        with pytest.raises(error, match=match):
            operators.attention_mask(torch.rand(2, 9), 0.5, hint=0.5, key=key)
        with pytest.raises(error, match=match):
            operators.window_attention(torch.zeros(2, 4, 4, 3, 1, 2), window=2, dropout=0.5, key=key)
