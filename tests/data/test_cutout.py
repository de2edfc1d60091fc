"""Quarter turns, flips and RCR's cut-out: as planned, in any batch, and the same from every executor."""

import numpy as np
import pytest
import torch
from stores import write_store

from medfast.data import cutout as cutting
from medfast.data import orientation
from medfast.data.cutout import Cutout
from medfast.data.loader import Stream
from medfast_kernels import Key

SHAPES = [(20, 33, 40), (36, 30, 28), (40, 40, 26)]
WINDOW = (-21000.0, 29000.0)  # wide: every voxel of a small volume has a value of its own


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("cutout") / "store", SHAPES)


def stream(store, batch=6, size=24, window=WINDOW, **data):
    return Stream(store, size=size, window=window, workers=0, holdout=0.2, seed=11, batch=batch, **data)


@pytest.mark.parametrize("rotation", range(4))
@pytest.mark.parametrize("flip", range(3))
def test_all_twelve_orientations_are_what_their_numbers_say(rotation, flip):
    box = np.arange(2 * 3 * 3).reshape(2, 3, 3)
    expected = box
    for _ in range(rotation):  # from the last axis but one towards the last: row i, column j takes (j, n - 1 - i)
        expected = np.array([[[plane[j, 2 - i] for j in range(3)] for i in range(3)] for plane in expected])
    if flip:
        expected = expected[:, ::-1] if flip == 1 else expected[:, :, ::-1]
    got = orientation.orient(box, rotation, flip)
    assert np.array_equal(got, expected) and got.flags["C_CONTIGUOUS"]


def test_the_twelve_give_eight_different_volumes():
    """Half a turn and two flips are not all different: a quarter turn and a flip are a group of eight."""
    box = np.arange(27).reshape(3, 3, 3)
    assert len({orientation.orient(box, k, f).tobytes() for k in range(4) for f in range(3)}) == 8


@pytest.mark.parametrize("executor", ["torch", "dali"])
def test_views_are_turned_as_the_numbers_say(store, executor):
    if executor == "dali":
        pytest.importorskip("nvidia.dali")
    data = {"foreground": True, "executor": executor, "intensity": {"noise": {"p": 0.0}, "gamma": {"p": 1.0}}}
    plain, turned = stream(store, **data).batch(2, range(6)), stream(store, rotate=True, flip=[True, False], **data)
    got = turned.batch(2, range(6))
    assert turned.gives == {"rotation", "flip"} and stream(store).gives == frozenset()
    assert len(set(got.params["rotation"].flatten().tolist())) > 2 and not got.params["flip"][:, 1].any()
    assert torch.equal(got.boxes, plain.boxes)
    for v in (0, 1):
        for row in range(6):
            k, f = (int(got.params[name][row, v]) for name in ("rotation", "flip"))
            expected = torch.rot90(plain.views[v][row, 0], k, (1, 2))
            expected = expected.flip(f) if f else expected
            assert (got.views[v][row, 0] - expected).abs().max() < 2e-4


def test_padding_turns_with_the_view(store):
    data = {"size": 32, "window": (-500.0, 500.0)}
    plain, got = stream(store, **data).batch(0, range(6)), stream(store, rotate=True, **data).batch(0, range(6))
    turned = 0
    for v in (0, 1):
        for row in range(6):
            k = int(got.params["rotation"][row, v])
            turned += k
            assert torch.equal(got.valid[v][row], torch.rot90(plain.valid[v][row], k, (1, 2)))
    assert turned


def test_a_plane_of_two_lengths_is_turned_by_halves(store):
    got = stream(store, size=[16, 16, 24], rotate=True).batch(0, range(6))
    assert set(got.params["rotation"].flatten().tolist()) == {0, 2} and got.views[0].shape == (6, 1, 16, 16, 24)


def test_turns_are_uniform_and_differ_between_views():
    key = Key(0, 0, torch.arange(4000))
    found = orientation.draw((True, True), (True, True), (8, 8, 8), key, 2, 0)
    for name, kinds in (("rotation", 4), ("flip", 3)):
        for v in (0, 1):
            share = np.bincount(found[name][:, v], minlength=kinds) / 4000
            assert np.abs(share - 1 / kinds).max() < 0.04
        assert (found[name][:, 0] != found[name][:, 1]).mean() > 0.6
    assert (found["rotation"][:, 0] != found["flip"][:, 0]).mean() > 0.6


def test_boxes_add_up_to_the_budget_overlaps_counted_twice():
    settings, budgets = Cutout(), []
    for slot in range(40):
        found = cutting.boxes((40, 60, 20), settings, Key(3, 0, torch.tensor([slot])))
        volumes = [int(np.prod([s.stop - s.start for s in box])) for box in found]
        budgets.append(sum(volumes) / 48000)
        for box in found:
            for s, n in zip(box, (40, 60, 20), strict=True):
                assert 0 <= s.start < s.stop <= n and s.stop - s.start < 0.25 * n
                assert s.stop - s.start >= 0.05 * n or s.stop == n
    assert max(budgets) < 0.32 and 0.1 < np.mean(budgets) < 0.2


def test_boxes_go_on_where_a_shorter_draw_ended(monkeypatch):
    key = Key(3, 0, torch.tensor([5]))
    before = cutting.boxes((40, 40, 40), Cutout(), key)
    monkeypatch.setattr(cutting, "_AT_ONCE", 1)
    assert cutting.boxes((40, 40, 40), Cutout(), key) == before and len(before) > 1


def test_what_is_not_cut_out_is_untouched_and_what_is_comes_from_noise_or_the_partner(store):
    got = stream(store, parent=1.0, rotate=True, cutout=True).batch(1, range(6))
    wanted = cutting.partners(Key(11, 1, torch.arange(6)), 6)
    swapped = 0
    for v in (0, 1):
        whole, view = got.targets["uncut"][v], got.views[v]
        for row in range(6):
            changed = (whole[row] != view[row])[0]
            assert 0.0 < changed.double().mean() < 0.5
            other = whole[wanted[row]][0]
            copied = changed & (view[row, 0] == other)
            swapped += int(copied.sum()) if wanted[row] != row else 0
            key, noise = Key(11, 1, torch.tensor([row])), changed & ~copied
            expected = cutting.cut(whole[row], None if wanted[row] == row else whole[wanted[row]], Cutout(), key, v)
            assert torch.equal(view[row], expected)
            assert view[row][0][noise].min() >= 0.0 and view[row][0][noise].max() <= 1.0
    assert swapped > 1000 and (wanted != np.arange(6)).any()


def test_a_pass_of_noise_alone_spans_0_to_1_in_each_box():
    view = torch.full((1, 40, 40, 40), 0.5)
    cut = cutting.cut(view, None, Cutout(share=0.02), Key(1, 0, torch.tensor([3])), 0)
    changed = cut[cut != 0.5]
    assert changed.min() == 0.0 and changed.max() == 1.0 and (view == 0.5).all()


def test_cut_outs_do_not_depend_on_the_batch_split(store):
    made = stream(store, rotate=True, cutout=True, intensity={"noise": {"p": 0.7}, "gamma": {"p": 1.0}})
    whole = made.batch(3, range(6))
    parts = [made.batch(3, slots) for slots in ([0, 1], [4, 5, 2, 3])]
    for v in (0, 1):
        for name, of in (("views", lambda b, v=v: b.views[v]), ("uncut", lambda b, v=v: b.targets["uncut"][v])):
            assert torch.equal(of(whole)[[0, 1, 4, 5, 2, 3]], torch.cat([of(part) for part in parts])), name


def test_without_a_partner_nothing_is_copied(store):
    got = stream(store, cutout={"swap": False, "share": 0.1}).batch(1, range(6))
    for v in (0, 1):
        for row in range(6):
            alone = cutting.cut(
                got.targets["uncut"][v][row], None, Cutout(share=0.1), Key(11, 1, torch.tensor([row])), v
            )
            assert torch.equal(got.views[v][row], alone)


def test_block_masks_arrive_ahead_in_slots_and_views(store):
    asked = []

    def ahead(size):
        asked.append(size)
        return {"mask": lambda key: torch.stack([key.sample * 10 + (key.stream >> 16 & 255)], dim=1)}

    got = stream(store, ahead=ahead).batch(0, [4, 1])
    assert asked == [(24, 24, 24)]
    assert [x.flatten().tolist() for x in got.targets["mask"]] == [[40, 10], [41, 11]]


def test_wrong_settings_are_refused(store):
    for wrong in ({"rotate": [True]}, {"flip": 1}, {"cutout": {"budget": 0.3}}, {"cutout": {"share": 1.5}},
                  {"cutout": {"side": [0.3, 0.1]}}, {"cutout": {"swap": "no"}}):  # fmt: skip
        with pytest.raises(ValueError, match="data\\."):
            stream(store, **wrong)
