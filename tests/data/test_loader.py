"""The stream: what is cut is what the boxes say, whatever the order, the rank, the executor or the resume."""

import threading
import time

import numpy as np
import pytest
import torch
from stores import write_store, write_volume

from medfast.data.loader import Stream, open_stream
from medfast.data.store import DataError, Store
from medfast.objectives.held_out import crops
from medfast.runs import _open_holdout

SHAPES = [(20, 33, 40), (36, 30, 28), (40, 40, 18), (33, 34, 35), (50, 20, 30)]
WINDOW = (-21000.0, 29000.0)  # wide: every voxel of a small volume has a value of its own
AUTHOR = {
    "parent": [1.4, 1.8], "zoom": [0.8, 1.2],
    "intensity": {"noise": {"p": [0.8, 0.5]}, "blur": {"p": [1.0, 0.5]}, "gain": {"p": 0.8}, "shift": {"p": 0.5},
                  "contrast": {"p": 0.8}, "gamma": {"p": 1.0}},
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("data") / "store", SHAPES)


def stream(store, *, split="train", seed=11, batch=6, views=2, **data):
    section = {"store": str(store), "size": 24, "window": WINDOW, "workers": 0, "holdout": 0.2, **data}
    return open_stream(section, seed=seed, batch=batch, views=views, split=split)


def equal(a, b):
    pairs = [*zip(a.views, b.views, strict=True), (a.boxes, b.boxes), (a.key.sample, b.key.sample)]
    pairs += [(a.params[name], b.params[name]) for name in a.params | b.params]
    for x, y in zip(a.valid, b.valid, strict=True):
        assert (x is None) == (y is None)
        pairs += [] if x is None else [(x, y)]
    return a.key[:2] == b.key[:2] and all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("executor", ["torch", "dali"])
def test_boxes_say_where_every_voxel_comes_from(store, executor):
    if executor == "dali":
        pytest.importorskip("nvidia.dali")
    s = stream(store, executor=executor)
    floor = np.float32((-1024 - WINDOW[0]) / (WINDOW[1] - WINDOW[0]))
    padded = 0
    for step in range(4):
        batch = s.batch(step, range(6))
        for v, view in enumerate(batch.views):
            assert view.shape == (6, 1, 24, 24, 24) and view.dtype == torch.float32 and view.is_contiguous()
            for row in range(6):
                voxels = Store(store).volume(int(batch.params["volume"][row]))
                start, stop = batch.boxes[row, v].numpy().astype(int).reshape(2, 3)
                inside = np.indices((24,) * 3) + start[:, None, None, None]
                mark = np.all((inside >= 0) & (inside < np.reshape(voxels.shape, (3, 1, 1, 1))), axis=0)
                hu = voxels[tuple(np.where(mark, inside, 0))].astype(float)
                expected = (hu - WINDOW[0]) / (WINDOW[1] - WINDOW[0])
                assert (stop - start == 24).all()
                np.testing.assert_allclose(view[row, 0].numpy(), np.where(mark, expected, floor), atol=2e-6)
                if batch.valid[v] is not None:
                    np.testing.assert_array_equal(batch.valid[v][row].numpy(), mark)
                else:
                    assert mark.all()
                padded += not mark.all()
    assert padded > 5, "the test needs volumes shorter than the view"


def test_valid_is_none_only_where_nothing_is_padded(store):
    assert stream(store, size=16).batch(0, range(6)).valid == (None, None)
    s = stream(write_store_of(store, [(12, 40, 40)]), size=24, split="train")
    mark = s.batch(0, [0]).valid[0]
    assert mark.dtype == torch.bool and mark.float().mean() == 0.5


def write_store_of(store, shapes):
    folder = store.parent / f"store-{len(list(store.parent.iterdir()))}"
    return write_store(folder, shapes)


def test_padding_stays_at_the_floor_through_every_change(store):
    s = stream(store, **AUTHOR, window=(-500.0, 500.0))
    padded = 0
    for step in range(5):
        batch = s.batch(step, range(6))
        for view, mark in zip(batch.views, batch.valid, strict=True):
            assert view.min() >= 0 and view.max() <= 1
            if mark is not None:
                padded += int((~mark).sum())
                assert (view[:, 0][~mark] == 0).all()
    assert padded > 0


def test_window_is_applied_once(store, tmp_path):
    folder = write_store(tmp_path / "s", [])
    hu = np.random.default_rng(0).integers(-1024, 1500, (24, 24, 24)).astype(np.int16)
    write_volume(folder, 0, hu)
    view = stream(folder, window=[-500, 500]).batch(0, [0]).views[0][0, 0].numpy()
    np.testing.assert_allclose(view, (np.clip(hu.astype(float), -500, 500) + 500) / 1000, atol=2e-7)
    assert (view == 0).mean() > 0.1 and (view == 1).mean() > 0.1


@pytest.mark.parametrize("data", [{}, {"parent": 4 / 3}, AUTHOR], ids=["smart", "smit", "author"])
def test_samples_do_not_depend_on_split_order_workers_or_resume(store, data):
    whole = [stream(store, **data).batch(step, range(6)) for step in range(3)]
    ranks = [[(step, slots) for step in range(3)] for slots in ([0, 2, 4], [1, 3, 5], [5], [4, 0])]
    for schedule in ranks:
        for (step, slots), got in zip(schedule, stream(store, workers=2, **data).run(schedule), strict=True):
            for v in range(2):
                torch.testing.assert_close(got.views[v], whole[step].views[v][slots], rtol=0, atol=0)
                torch.testing.assert_close(got.boxes[:, v], whole[step].boxes[slots, v], rtol=0, atol=0)
            assert got.key.sample.tolist() == slots and got.key.step == step and got.key.seed == 11
    resumed = list(stream(store, workers=1, **data).run((step, range(6)) for step in range(1, 3)))
    assert all(equal(a, b) for a, b in zip(resumed, whole[1:], strict=True))
    assert not equal(whole[0], whole[1])


@pytest.mark.parametrize("data", [{}, {"parent": 4 / 3}, AUTHOR], ids=["smart", "smit", "author"])
def test_executors_agree(store, data):
    pytest.importorskip("nvidia.dali")
    for window in (WINDOW, (-500, 500)):
        ours, theirs = (stream(store, executor=e, window=window, **data).batch(2, range(6)) for e in ("torch", "dali"))
        assert torch.equal(ours.boxes, theirs.boxes)
        assert max((a - b).abs().max() for a, b in zip(ours.views, theirs.views, strict=True)) < 2e-4


def test_noise_is_there_and_keyed_by_slot_and_view(store):
    only = {"intensity": {"noise": {"p": [1.0, 1.0], "range": [0.1, 0.1]}}}
    folder = write_store(store.parent / "bright", [])
    write_volume(folder, 0, np.full((24, 24, 24), 4000, dtype=np.int16))
    noisy, clean = (stream(folder, **d).batch(0, [0, 1]) for d in (only, {}))
    noise = [(a - b).flatten(1) for a, b in zip(noisy.views, clean.views, strict=True)]
    rows = torch.cat(noise)
    assert (rows.std(dim=1) - 0.1).abs().max() < 0.005
    assert (torch.corrcoef(rows) - torch.eye(4)).abs().max() < 0.1


def test_splits_are_disjoint_by_hash_and_cut_differently(store):
    train, holdout = stream(store), stream(store, split="holdout")
    assert not set(train.volumes) & set(holdout.volumes) and holdout.volumes
    assert sorted(train.volumes + holdout.volumes) == [f"v{n:02d}" for n in range(5)]
    assert train.note is None and holdout.note is None
    for s in (train, holdout):
        seen = torch.cat([s.batch(step, range(6)).params["volume"] for step in range(4)])
        assert {s.store.records[i]["id"] for i in seen} == set(s.volumes)


def test_a_single_volume_is_held_out_too_and_says_so(store):
    folder = write_store_of(store, [(40, 40, 40)])
    train, holdout = stream(folder), stream(folder, split="holdout")
    assert train.volumes == holdout.volumes == ["v00"] and train.note is None
    assert holdout.note and "v00" in holdout.note
    assert not torch.equal(train.batch(0, range(6)).boxes, holdout.batch(0, range(6)).boxes)


def test_views_differ_and_their_number_is_free(store):
    batch = stream(store, size=16, views=3).batch(0, range(6))
    assert len(batch.views) == 3 and batch.boxes.shape == (6, 3, 6) and batch.boxes.dtype == torch.float32
    assert not any(torch.equal(batch.views[a], batch.views[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_run_keeps_the_order_works_ahead_and_counts_the_wait(store, workers, monkeypatch):
    s, make, second = stream(store, workers=workers), Stream._batch, threading.Event()

    def uneven(self, step, rows):
        time.sleep(0.2 if step == 0 else 0.0)
        batch = make(self, step, rows)
        if step == 1:
            second.set()
        return batch

    monkeypatch.setattr(Stream, "_batch", uneven)
    batches = s.run((step, [0]) for step in range(9))
    assert next(batches).key.step == 0
    assert 0.05 < s.waited < 60
    assert second.wait(20 if workers else 0) == (workers > 0), "the next batch is made without being asked for"
    assert [b.key.step for b in batches] == list(range(1, 9))


def test_work_ahead_is_bounded_and_stops(store):
    s, asked = stream(store, workers=2), []

    def schedule():
        for step in range(1000):
            asked.append(step)
            yield step, [0]

    batches = s.run(schedule())
    next(batches)
    assert len(asked) <= 4
    batches.close()
    other = s.run(schedule())
    next(other)
    s.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("medfast-data")]


def test_batches_do_not_depend_on_the_number_of_threads(store):
    before, batches = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            batches.append(stream(store, **{**AUTHOR, "size": 40}).batch(1, range(6)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert equal(*batches)


def test_workers_leave_the_threads_of_the_consumer_alone(store):
    before = torch.get_num_threads()
    for _ in stream(store, workers=1).run([(0, [0])]):
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("early", "damage"), [(True, "cut"), (False, "cut"), (True, "bit"), (True, "gone")])
def test_damage_is_an_error_that_names_the_volume(tmp_path, workers, early, damage):
    """A bit that flips after the volume's first touch is for ``medfast data verify`` to find."""
    folder = write_store(tmp_path / "s", [(30, 30, 30)])
    path, s = folder / "volumes" / "v00.npy", stream(folder, workers=workers)
    if not early:
        s.batch(0, [0])
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data[:-1000] if damage == "cut" else data)
    if damage == "gone":
        path.unlink()
    with pytest.raises(DataError, match="v00"):
        list(s.run((step, [0]) for step in range(3)))


def test_held_out_crops_are_the_same_for_every_run(store):
    """Whatever its seed, batch and intensity changes: two runs are judged by the same voxels."""
    data = {"store": str(store), "size": 24, "window": WINDOW, "workers": 0, "holdout": 0.4}
    runs = [_open_holdout({"data": {**data, "intensity": intensity}, "train": {"seed": seed, "batch": batch}}, 2)
            for intensity, seed, batch in ((None, 0, 4), (AUTHOR["intensity"], 9, 32))]  # fmt: skip
    for one, other in zip(*(crops(run, 12, 2) for run in runs), strict=True):
        assert equal(one, other) and "noise" not in one.params


def test_plain_held_out_crops_are_neither_turned_nor_zoomed(store):
    changes = {"rotate": True, "flip": True, "zoom": [0.8, 1.3]}
    changed, plain = (stream(store, plain_holdout=plain, **changes) for plain in (False, True))
    assert equal(changed.batch(1, range(6)), plain.batch(1, range(6))), "training is as it was"
    held = stream(store, split="holdout", plain_holdout=True, **changes)
    assert not held.gives and equal(held.batch(1, range(6)), stream(store, split="holdout").batch(1, range(6)))
    assert stream(store, split="holdout", **changes).gives == {"rotation", "flip"}


def test_an_empty_store_is_refused(tmp_path):
    with pytest.raises(DataError, match="no volumes"):
        stream(write_store(tmp_path / "s", []))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (dict(window=[500, -500]), "window"), (dict(executor="tf"), "executor"), (dict(workers=-1), "workers"),
        (dict(holdout=0), "holdout"), (dict(batch=0), "batch"), (dict(split="test"), "split"), (dict(sise=3), "sise"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_in_words(store, data, says):
    with pytest.raises(ValueError, match=says):
        stream(store, **data)


@pytest.mark.parametrize("slots", [[], [-1], [6]])
def test_slots_outside_the_batch_are_refused(store, slots):
    with pytest.raises(ValueError, match="slots"):
        stream(store).batch(0, slots)
