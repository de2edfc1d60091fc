"""Philox against its published vectors, and what the draws promise."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

import medfast_kernels as mk
from medfast_kernels import _dispatch
from medfast_kernels.key import philox_words

cpp_only = pytest.mark.skipif(_dispatch.WHY_NO_CPP is not None, reason=str(_dispatch.WHY_NO_CPP))

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
@pytest.mark.parametrize("draw", ["random_uniform", "random_normal"])
def test_long_draws_in_cpp_are_the_same_bits_on_any_number_of_threads(draw):
    key, threads = mk.Key(5, 2, torch.tensor([3, 1, 8])).at(mk.Role.NOISE, view=1), torch.get_num_threads()
    expected = getattr(mk.reference, draw)(50_003, key=key)
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            with mk.backend("cpp"):
                assert torch.equal(getattr(mk, draw)(50_003, key=key), expected)
    finally:
        torch.set_num_threads(threads)


@cpp_only
def test_words_in_cpp_keep_the_rules_of_operators():
    operator = getattr(torch.ops, _dispatch.NAMESPACE).philox_words
    torch.library.opcheck(operator, (torch.tensor([[1, 2, 3], [4, 5, 6]]), 7, -3))
    with pytest.raises(RuntimeError, match=r"\(b, 3\) int64"):
        operator(torch.zeros(2, 2, dtype=torch.int64), 4, 0)


@pytest.mark.parametrize("operators", [mk, mk.reference])
def test_draws_compile_whole(operators):
    def draw(step, sample):
        key = mk.Key(3, step, sample).stack(2).at(mk.Role.NOISE)
        ids = operators.random_ids(9, 4, key=key)
        return operators.random_normal((2, 3), key=key), ids, operators.random_keep(0.5, key=key)

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    arguments = torch.tensor(5), torch.tensor([3, 8])
    for got, expected in zip(compiled(*arguments), draw(*arguments), strict=True):
        assert torch.equal(got, expected)


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


@pytest.mark.parametrize("draw", [mk.random_uniform, mk.random_normal])
def test_a_draw_without_samples_is_refused(draw):
    with pytest.raises(ValueError, match="key.sample"):
        draw((2,), key=mk.Key(0))


def test_bad_counts_and_rates_are_refused():
    key = mk.Key(0, sample=torch.arange(2))
    with pytest.raises(ValueError, match="count"):
        mk.random_ids(4, 5, key=key)
    with pytest.raises(ValueError, match="rate"):
        mk.random_keep(1.5, key=key)
