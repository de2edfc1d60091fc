"""The plan of a sample: pure, covering, inside its bounds."""

import dataclasses

import numpy as np
import pytest
import torch

from medfast.data.plan import plan, recipe, valid

SHAPES = np.array([(60, 200, 180), (150, 150, 150), (64, 90, 300), (128, 40, 128), (96, 97, 98)])
BODIES = np.concatenate([np.array([10, 12, 14]) + 0 * SHAPES, SHAPES - 11], axis=1)
CHANGES = {
    "noise": {"p": 0.8}, "blur": {"p": [1.0, 0.5]}, "gain": {"p": 0.8}, "shift": {"p": 0.5}, "contrast": {"p": 0.7},
    "gamma": {"p": 1.0},
}  # fmt: skip
RECIPES = {
    "smart": dict(size=64),
    "author": dict(size=64, parent=[1.4, 1.8], zoom=[0.8, 1.2], intensity=CHANGES),
    "smit": dict(size=[96, 96, 96], parent=128 / 96),
    "foreground": dict(size=64, parent=[1.4, 1.8], zoom=[0.8, 1.2], foreground=True),
}


def make(name="smart", slots=range(8), *, step=5, batch=64, seed=3, stream=0, views=2, **changed):
    made = recipe(views=views, **{**RECIPES[name], **changed})
    slots = torch.as_tensor(list(slots))
    return plan(made, SHAPES, BODIES, seed=seed, batch=batch, step=step, slots=slots, stream=stream)


def flat(p):
    return np.concatenate([p.volume[:, None], p.boxes.reshape(len(p.volume), -1), *p.params.values()], axis=1)


@pytest.mark.parametrize("name", RECIPES)
def test_plan_does_not_depend_on_how_slots_are_split_or_ordered(name):
    whole = flat(make(name, range(24)))
    order = np.random.default_rng(0).permutation(24)
    for parts in ([range(24)], [range(0, 24, 2), range(1, 24, 2)], [[i] for i in order], [order[:5], order[5:]]):
        for part in parts:
            np.testing.assert_array_equal(flat(make(name, part)), whole[list(part)])
    assert len(np.unique(whole, axis=0)) == 24
    for other in (make(name, range(24), step=6), make(name, range(24), seed=4), make(name, range(24), stream=1)):
        assert not np.array_equal(flat(other)[:, 1:], whole[:, 1:])
    assert not np.array_equal(make(name, range(24), stream=1).volume, make(name, range(24)).volume)


def test_plan_is_part_of_a_run_and_must_not_change():
    p = make("author", [0, 6, 61], step=12)
    assert p.volume.tolist() == [0, 0, 1]
    assert p.boxes[:, 1].tolist() == [
        [-7, 84, 43, 60, 140, 104], [0, 65, 68, 63, 137, 140], [58, 41, 66, 122, 102, 133],
    ]  # fmt: skip
    np.testing.assert_allclose(p.params["gamma"][:, 0], [1.0295752, 1.0731868, 0.7961820], rtol=1e-6)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_every_volume_once_an_epoch(batch):
    steps = 40
    seen = np.concatenate([make(slots=range(batch), step=s, batch=batch).volume for s in range(steps)])
    epochs = seen[: len(seen) // 5 * 5].reshape(-1, 5)
    assert (np.sort(epochs, axis=1) == np.arange(5)).all()
    assert len({tuple(e) for e in epochs.tolist()}) > 3, "epochs have the same order"


def many(name, **changed):
    return make(name, range(600), batch=600, **changed)


@pytest.mark.parametrize("name", RECIPES)
def test_boxes_lie_in_the_volume_or_hold_it(name):
    p = many(name)
    shape = SHAPES[p.volume][:, None]
    room = shape - p.extent
    assert ((p.start >= np.minimum(0, room)) & (p.start <= np.maximum(0, room))).all()


def test_plain_crops_reach_both_ends_and_are_uniform_and_independent():
    p = many("smart", size=90)
    chosen = p.volume == 1
    start = p.start[chosen]
    assert start.min() == 0 and start.max() == 60
    assert abs(start.mean() - 30) < 2.5 and abs(start.std() - 17.6) < 1.5
    assert abs(np.corrcoef(start[:, 0, 0], start[:, 1, 0])[0, 1]) < 0.3
    assert abs(np.corrcoef(start[:, 0, 0], start[:, 0, 1])[0, 1]) < 0.3


@pytest.mark.parametrize(("name", "low", "high"), [("smit", 128, 128), ("author", 1.4 * 64, 1.8 * 64)])
def test_views_share_a_parent(name, low, high):
    p = many(name)
    span = (p.start + p.extent).max(axis=1) - p.start.min(axis=1)
    roomy = SHAPES[p.volume] > np.ceil(high)
    assert span[roomy].max() <= np.ceil(high)
    plain = many("smart", size=p.extent.max().item())
    apart = (plain.start + plain.extent).max(axis=1) - plain.start.min(axis=1)
    assert apart[roomy].max() > np.ceil(high), "without a parent views lie further apart"
    assert span[roomy].max() > low * 0.9


def test_zoom_covers_its_range_per_axis_and_view():
    extent = many("author").extent
    assert extent.min() == round(0.8 * 64) and extent.max() == round(1.2 * 64)
    assert np.std(extent, axis=(1, 2)).mean() > 3, "axes and views have one factor"
    assert (many("smit").extent == 96).all()


def test_foreground_keeps_boxes_in_the_body_or_around_it():
    p = many("foreground")
    body = BODIES[p.volume][:, None]
    stop, fits = p.start + p.extent, p.extent <= body[..., 3:] - body[..., :3]
    inside = (p.start >= body[..., :3]) & (stop <= body[..., 3:])
    around = (p.start <= body[..., :3]) & (stop >= body[..., 3:])
    assert np.where(fits, inside, around).all()
    padded = (p.start < 0) | (stop > SHAPES[p.volume][:, None])
    assert not padded[p.extent <= SHAPES[p.volume][:, None]].any(), "padded although the volume is large enough"


def test_intensity_numbers_have_their_probabilities_and_ranges():
    params = many("author").params
    bounds = {"blur": (1, 2), "gain": (0.75, 1.25), "contrast": (0.75, 1.25), "gamma": (0.7, 1.5), "noise": (0, 0.1)}
    neutral = {"blur": 0, "gain": 1, "contrast": 1, "gamma": 1, "noise": 0, "shift": 0}
    for name, value in params.items():
        on = value != neutral[name]
        p = np.broadcast_to(CHANGES[name]["p"], 2)
        assert np.abs(on.mean(axis=0) - p).max() < 0.06, name
        if name == "shift":
            assert abs(value[on].std() - 0.4) < 0.04 and abs(value[on].mean()) < 0.05
        else:
            low, high = bounds[name]
            near = 0.05 * (high - low)
            assert low <= value[on].min() < low + near and high >= value[on].max() > high - near


def test_shift_can_be_uniform():
    given = {"p": 0.5, "range": [-0.1, 0.1], "draw": "uniform"}
    value = many("author", intensity={"shift": given}).params["shift"]
    on = value[value != 0]
    assert -0.1 <= on.min() < -0.09 and 0.09 < on.max() <= 0.1 and abs(on.std() - 0.2 / 12**0.5) < 0.005
    for wrong in ({**given, "draw": "gaussian"}, {**given, "range": [0.1, -0.1]}):
        with pytest.raises(ValueError, match="shift"):
            recipe(size=8, views=2, intensity={"shift": wrong})
    with pytest.raises(ValueError, match="gain takes"):
        recipe(size=8, views=2, intensity={"gain": {"p": 1.0, "draw": "uniform"}})


def test_switching_one_change_off_leaves_the_others():
    whole, less = make("author"), make("author", intensity={k: v for k, v in CHANGES.items() if k != "blur"})
    assert set(whole.params) - set(less.params) == {"blur"}
    for name, value in less.params.items():
        np.testing.assert_array_equal(value, whole.params[name])


@pytest.mark.parametrize(
    ("start", "extent"), [((-3, 0, 2), (8, 6, 5)), ((-2, -4, -1), (12, 15, 9)), ((0, 0, 0), (4, 4, 4))]
)
def test_valid_marks_voxels_whose_centre_is_in_the_volume(start, extent):
    size, shape = (8, 6, 5), (6, 7, 7)
    axes = [s + (np.arange(n) + 0.5) * e / n for s, e, n in zip(start, extent, size, strict=True)]
    centre = np.stack(np.meshgrid(*axes, indexing="ij"))
    expected = ((centre > 0) & (centre < np.array(shape)[:, None, None, None])).all(axis=0)
    mark = valid(np.array(start), np.array(extent), np.array(shape), size)
    assert (mark is None) == expected.all()
    if mark is not None:
        np.testing.assert_array_equal(mark.numpy(), expected)


@pytest.mark.parametrize(
    ("section", "says"),
    [
        (dict(size=[64]), "size"), (dict(size=0), "size"), (dict(size=64, views=0), "views"),
        (dict(size=64, parent=[1.8, 1.4]), "parent"), (dict(size=64, zoom=[0.8, 1.2], parent=1.1), "parent"),
        (dict(size=64, zoom="big"), "zoom"), (dict(size=64, foreground="yes"), "foreground"),
        (dict(size=64, intensity={"gama": {"p": 1}}), "gama"), (dict(size=64, intensity={"gamma": 1}), "gamma"),
        (dict(size=64, intensity={"gamma": {"p": 1.5}}), "gamma.p"), (dict(size=64, intensity=True), "mapping"),
        (dict(size=64, intensity={"gamma": {"p": [1, 1, 1]}}), "2 views"),
        (dict(size=64, intensity={"gamma": {"p": 1, "range": [0, 1]}}), "range"),
    ],
)  # fmt: skip
def test_bad_sections_are_refused_in_words(section, says):
    with pytest.raises(ValueError, match=says):
        recipe(**{"views": 2, **section})


def test_recipe_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe(size=8, views=1).size = (9, 9, 9)  # type: ignore[misc]
