"""Views of stored boxes in Triton's interpreter against the definition."""

import pytest
import torch
from interpreter import poisoned_memory, run_cases

import medfast_kernels as mk

pytest.importorskip("triton")
KEY = mk.Key(2**63 + 1, 2, torch.tensor([4, 2**31 + 1])).at(mk.Role.NOISE, layer=1)
MODES = {
    "window alone": {},
    "turned": {"extent": torch.tensor([[9, 12, 12]] * 2), "turn": torch.tensor([5, 10])},
    "resized": {"extent": torch.tensor([[11, 17, 9], [8, 12, 18]]), "turn": torch.tensor([1, 14])},
    "blurred": {"blur": torch.tensor([0.0, 1.6]), "gain": 1.2, "shift": torch.tensor([0.1, -0.2])},
    "finished": {"contrast": torch.tensor([1.0, 0.8]), "gamma": torch.tensor([1.3, 1.0]), "noise": 0.1, "key": KEY},
}


def test_in_the_interpreter():
    run_cases(__file__)


@pytest.mark.parametrize("mode", MODES)
def case_values(mode):
    """Boxes with strides; a view of no whole number of blocks; the same bits again; every voxel is written."""
    draw = torch.Generator().manual_seed(0)
    boxes = torch.randint(-1200, 1300, (2, 11, 17, 36), generator=draw).to(torch.int16)[..., ::2]
    given = {"window": (-500, 500), **MODES[mode]}
    with mk.backend("triton"), poisoned_memory():
        got, again = (mk.augment(boxes, (9, 12, 12), **given) for _ in range(2))
    expected = mk.reference.augment(boxes, (9, 12, 12), **given)
    assert got.shape == expected.shape and torch.equal(got, again)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
