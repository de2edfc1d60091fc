"""Views of stored boxes: the definition against NumPy, C++ against it, the same bits for any batch and thread count."""

import numpy as np
import pytest
import torch
from operator_checks import assert_runs_its_own, cpp_only, on_cpp, on_threads

import medfast_kernels as mk

SIZE = (21, 34, 34)
KEY = mk.Key(7, 3, torch.tensor([5, 2, 9])).at(mk.Role.NOISE, layer=1)
EVERYTHING = {
    "window": (-500, 500), "turn": torch.tensor([5, 10, 12]), "blur": torch.tensor([0.0, 1.4, 2.0]),
    "extent": torch.tensor([[21, 34, 34], [24, 30, 37], [17, 39, 40]]), "gain": torch.tensor([1.0, 1.2, 0.8]),
    "shift": 0.1, "contrast": torch.tensor([1.0, 0.8, 1.2]), "gamma": torch.tensor([1.3, 1.0, 0.7]),
    "noise": torch.tensor([0.1, 0.0, 0.05]), "key": KEY,
}  # fmt: skip


def boxes(count=3, shape=(24, 39, 40)):
    return torch.randint(-1200, 1300, (count, *shape), generator=torch.Generator().manual_seed(0)).to(torch.int16)


def one(given, i):
    """The arguments of view ``i`` alone."""
    alone = {name: value[i : i + 1] if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    return {**alone, "key": KEY._replace(sample=KEY.sample[i : i + 1])}


def test_the_definition_turns_as_numpy_does():
    box = boxes(1, (5, 7, 7))
    for bits in range(16):
        expected = box[0].numpy()
        expected = expected.swapaxes(1, 2) if bits & 1 else expected
        expected = np.flip(expected, [axis for axis in range(3) if bits & (2, 4, 8)[axis]])
        made = mk.reference.augment(box, (5, 7, 7), window=(-2000, 2000), turn=torch.tensor([bits]))
        np.testing.assert_allclose(made[0].numpy(), (expected.astype(float) + 2000) / 4000, atol=1e-6)


@cpp_only
def test_cpp_is_the_definition():
    expected = mk.reference.augment(boxes(), SIZE, **EVERYTHING)
    got = on_cpp(mk.augment)(boxes(), SIZE, **EVERYTHING)
    assert got.dtype == torch.float32 and got.min() >= 0 and got.max() <= 1
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)  # gamma 0.7 is steep at 0
    assert (got - expected).abs().mean() < 1e-6


@cpp_only
@pytest.mark.parametrize("shape, size", [((1, 30, 17), (1, 20, 33)), ((3, 2, 5), (7, 3, 2)), ((40, 8, 8), (9, 8, 8))])
def test_short_axes(shape, size):
    """An axis of one voxel, and a blur that reaches round more than once."""
    given = {"window": (-1000, 1000), "blur": 1.7, "contrast": 1.1}
    expected = mk.reference.augment(boxes(2, shape), size, **given)
    torch.testing.assert_close(on_cpp(mk.augment)(boxes(2, shape), size, **given), expected, rtol=0, atol=1e-5)


@cpp_only
def test_bits_depend_on_no_batch_no_threads_and_no_strides():
    x = boxes()
    whole, again = on_threads(lambda: on_cpp(mk.augment)(x, SIZE, **EVERYTHING), 1, 3)
    assert torch.equal(whole, again)
    alone = torch.cat([on_cpp(mk.augment)(x[i : i + 1], SIZE, **one(EVERYTHING, i)) for i in range(3)])
    assert torch.equal(whole, alone)
    wide = torch.zeros(3, 24, 45, 80, dtype=torch.int16)
    wide[:, :, 3:42, ::2] = x
    out = torch.full((3, *SIZE), float("nan"))
    assert on_cpp(mk.augment)(wide[:, :, 3:42, ::2], SIZE, **EVERYTHING, out=out) is out and torch.equal(out, whole)


@cpp_only
def test_nothing_of_torch_runs_in_its_place():
    assert_runs_its_own(lambda: mk.augment(boxes(), SIZE, **EVERYTHING), "augment")


@pytest.mark.parametrize("name", ["reference", pytest.param("cpp", marks=cpp_only)])
def test_noise_is_that_of_the_draw(name):
    flat = torch.full((3, 6, 9, 9), 0, dtype=torch.int16)
    with mk.backend(name):
        made = mk.augment(flat, (6, 9, 9), window=(-500, 500), noise=0.05, key=KEY)
    expected = (0.5 + 0.05 * mk.random_normal((6, 9, 9), key=KEY)).clamp(0, 1)
    torch.testing.assert_close(made, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("given, words", [
    ({"noise": 0.1}, "noise needs key"), ({"noise": 0.1, "key": mk.Key(0, 0, torch.arange(2))}, "key.sample must be"),
    ({"gain": -1.0}, "gain must be finite and at least 0.0"), ({"gamma": 0.0}, "gamma must be"),
    ({"shift": float("nan")}, "shift must be finite"), ({"blur": torch.ones(2)}, "blur must be one number, or"),
    ({"turn": torch.tensor([0, 16, 0])}, r"bits in \[0, 16\)"), ({"window": (5, 5)}, "low < high"),
    ({"extent": torch.tensor([[1, 1, 1], [25, 1, 1], [1, 1, 1]])}, "within the boxes"),
    ({"out": torch.zeros(3, 2, 2, 2)}, "out must be contiguous"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        mk.augment(boxes(), (4, 4, 4), **{"window": (-500, 500), **given})


def test_kinds_that_do_not_fit_are_refused():
    for given in ({"boxes": boxes().float()}, {"turn": torch.zeros(3)}, {"extent": [[1, 1, 1]] * 3},
                  {"out": torch.zeros(3, 4, 4, 4, dtype=torch.float64)}):  # fmt: skip
        with pytest.raises(TypeError):
            mk.augment(**{"boxes": boxes(), "size": (4, 4, 4), "window": (0, 1), **given})
    with pytest.raises(ValueError, match="exchanges the last two axes"):
        mk.augment(boxes(), (4, 4, 5), window=(0, 1), turn=torch.tensor([1, 0, 0]))
    with pytest.raises(ValueError, match=r"\(m, d, h, w\)"):
        mk.augment(boxes()[0], (4, 4, 4), window=(0, 1))
