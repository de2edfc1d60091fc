import math

import pytest
import torch

from medfast.objectives.schedules import cosine, piecewise, points

STEP = points([[0.0, 0.04], [0.0375, 0.04], [0.0375, 0.07]])
RAMP = points([[0.06, 0.04], [0.12, 0.07]])


@pytest.mark.parametrize(
    "schedule, t, value",
    [
        (points(0.04), 0.9, 0.04),
        (STEP, 0.0, 0.04), (STEP, 0.0374, 0.04), (STEP, 0.0375, 0.07), (STEP, 0.9, 0.07),
        (RAMP, 0.0, 0.04), (RAMP, 0.06, 0.04), (RAMP, 0.09, 0.055), (RAMP, 0.12, 0.07), (RAMP, 0.99, 0.07),
    ],
)  # fmt: skip
def test_temperatures_at_their_corners(schedule, t, value):
    for dtype in (torch.float32, torch.float64):
        found = piecewise(schedule, torch.tensor(t, dtype=dtype))
        assert found.dtype == dtype and found.shape == ()
        assert found.item() == pytest.approx(value, rel=1e-6)


def test_a_schedule_of_many_points_passes_through_all_of_them():
    many = points([(0.0, 1.0), (0.25, 3.0), (0.5, 2.0), (0.5, 5.0), (1.0, 4.0)])
    found = [piecewise(many, torch.tensor(t)).item() for t in (0.0, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0)]
    assert found == pytest.approx([1.0, 2.0, 3.0, 2.5, 5.0, 4.5, 4.0])


@pytest.mark.parametrize(
    "wrong", ["0.04", [], [[0.5, 1.0], [0.2, 1.0]], [[0.0, 1.0], [1.5, 1.0]], [0.1, 0.2], None, 0.0, [[0.0, -1.0]]]
)
def test_wrong_schedules_are_refused(wrong):
    with pytest.raises(ValueError, match="schedule"):
        points(wrong)


def test_momentum_is_half_a_cosine():
    assert cosine(0.996, 1.0, 0.0) == 0.996
    assert cosine(0.996, 1.0, 1.0) == 1.0
    assert cosine(0.996, 1.0, 0.5) == pytest.approx(0.998)
    assert cosine(0.996, 1.0, 0.25) == pytest.approx(1 - 0.004 * (1 + math.cos(math.pi / 4)) / 2)
