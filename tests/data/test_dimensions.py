"""Pictures, slices, channels, and units that are not HU: one loader cuts them all."""

import importlib.util

import numpy as np
import pytest
import torch
from stores import write_store, write_volume

from medfast.data.loader import open_stream

NO_DALI = importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None
EXECUTORS = ["torch", pytest.param("dali", marks=pytest.mark.skipif(NO_DALI, reason="DALI is not installed"))]
WINDOW = [-21000, 29000]
TOUGH = {
    "zoom": [0.6, 1.0], "flip": True, "cutout": True,
    "intensity": {"noise": {"p": 1.0}, "blur": {"p": 0.7}, "gain": {"p": 0.8}, "contrast": {"p": 1.0},
                  "gibbs": {"p": 0.4}},
}  # fmt: skip


def stream(folder, views=1, **data):
    section = {"store": str(folder), "window": WINDOW, "workers": 0, "holdout": 0.2, **data}
    return open_stream(section, seed=2, batch=4, views=views, split="train")


def values(window, voxels):
    return np.clip((voxels.astype(float) - window[0]) / (window[1] - window[0]), 0, 1)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures") / "s"
    return write_store(folder, [(40, 60), (64, 33), (30, 30)], dimensions=2, unit="percentile", fill=0)


@pytest.fixture(scope="module")
def brain(tmp_path_factory):
    """Four channels of MR."""
    shapes = [(4, 20, 26, 24), (4, 30, 22, 40), (4, 24, 24, 24)]
    return write_store(tmp_path_factory.mktemp("brain") / "s", shapes, channels=4, unit="percentile", fill=0)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(("size", "shape"), [(32, (32, 32)), ([24, 36], (24, 36)), ([1, 24, 36], (1, 24, 36))])
def test_pictures_are_cut_where_the_boxes_say(pictures, executor, size, shape):
    s = stream(pictures, size=size, executor=executor, window=[0, 1000])
    for batch in (s.batch(step, range(4)) for step in range(3)):
        (view,), (mark,) = batch.views, batch.valid
        dims = 2
        assert view.shape == (4, 1, *shape) and batch.boxes.shape == (4, 1, 2 * dims) and view.is_contiguous()
        for row in range(4):
            stored = s.store.volume(int(batch.params["volume"][row]))
            start, stop = batch.boxes[row, 0].numpy().astype(int).reshape(2, dims)
            assert tuple(stop - start) == shape[-2:]
            inside = np.indices(shape[-2:]) + start[:, None, None]
            real = np.all((inside >= 0) & (inside < np.reshape(stored.shape, (2, 1, 1))), axis=0)
            expected = np.where(real, values((0, 1000), stored[tuple(np.where(real, inside, 0))]), 0.0)
            np.testing.assert_allclose(view[row, 0].numpy().reshape(shape[-2:]), expected, atol=2e-6)
            assert real.all() if mark is None else (mark[row].numpy().reshape(shape[-2:]) == real).all()


def test_slices_of_volumes_are_images_where_two_axes_are_asked_for(tmp_path):
    folder = write_store(tmp_path / "s", [(20, 33, 40), (36, 30, 28)])
    flat, deep = (stream(folder, size=size, **TOUGH, views=2).batch(1, range(4)) for size in ([24, 30], [1, 24, 30]))
    for v in range(2):
        assert flat.views[v].shape == (4, 1, 24, 30) and deep.views[v].shape == (4, 1, 1, 24, 30)
        assert torch.equal(flat.views[v][:, :, None], deep.views[v])
        assert torch.equal(flat.targets["uncut"][v][:, :, None], deep.targets["uncut"][v])
        assert (flat.valid[v] is None) == (deep.valid[v] is None)
        assert flat.valid[v] is None or torch.equal(flat.valid[v][:, None], deep.valid[v])
    assert torch.equal(flat.boxes, deep.boxes) and flat.boxes.shape == (4, 2, 6)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_channels_share_a_box_and_keep_apart(brain, executor):
    s = stream(brain, size=20, executor=executor, window=[0, 1000])
    assert s.channels == 4
    for batch in (s.batch(step, range(4)) for step in range(2)):
        assert batch.views[0].shape == (4, 4, 20, 20, 20) and batch.views[0].is_contiguous()
        for row in range(4):
            stored = s.store.volume(int(batch.params["volume"][row]))
            box = tuple(slice(*map(int, pair)) for pair in batch.boxes[row, 0].reshape(2, 3).T)
            expected = values((0, 1000), stored[(slice(None), *box)])
            np.testing.assert_allclose(batch.views[0][row].numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("kind", ["pictures", "brain"])
def test_executors_agree_beyond_one_channel_and_three_axes(kind, request):
    pytest.importorskip("nvidia.dali")
    folder, size = request.getfixturevalue(kind), {"pictures": 24, "brain": 16}[kind]
    settings = {"views": 2, "size": size, "window": [0, 4000], **TOUGH}
    ours, theirs = (stream(folder, executor=e, **settings) for e in ("torch", "dali"))
    for step in range(2):
        a, b = ours.batch(step, range(4)), theirs.batch(step, range(4))
        assert torch.equal(a.boxes, b.boxes) and a.views[0].std() > 0.05
        assert max((x - y).abs().max() for x, y in zip(a.views, b.views, strict=True)) < 2e-4


def test_noise_of_channels_and_contrast_differ_by_channel(brain):
    plain, noisy = (stream(brain, size=20, window=[0, 4000], intensity=i).batch(0, [0]).views[0][0]
                    for i in (None, {"noise": {"p": 1.0, "range": [0.1, 0.1]}}))  # fmt: skip
    added = (noisy - plain).flatten(1)
    assert (torch.corrcoef(added) - torch.eye(4)).abs().max() < 0.1


@pytest.mark.parametrize(("recipe", "fill"), [({}, -1024), ({"unit": "HU", "fill": -1024}, -1024),
                                              ({"unit": "percentile", "fill": 0}, 0)])  # fmt: skip
def test_padding_is_what_the_unit_has_for_nothing(tmp_path, recipe, fill):
    folder = write_store(tmp_path / "s", [], **recipe)
    write_volume(folder, 0, np.full((16, 16, 16), 900, np.int16))
    window = [-2000, 1000] if fill else [0, 1000]
    batch = stream(folder, size=20, window=window).batch(0, range(4))
    (view,), (mark,) = batch.views, batch.valid
    assert mark is not None and torch.allclose(view[:, 0][mark], torch.tensor(values(window, np.array(900.0))).float())
    assert torch.allclose(view[:, 0][~mark], torch.tensor((fill - window[0]) / (window[1] - window[0])))


def test_windows_follow_the_unit(pictures, tmp_path):
    assert stream(pictures, size=16, window=None).window == (0, 1000)
    assert stream(write_store(tmp_path / "s", [(20, 20, 20)]), size=16, window=None).window == (-500, 500)
    with pytest.raises(ValueError, match=r"its unit is percentile, from 0 to 4000. Set data.window=null"):
        stream(pictures, size=16, window=[-500, 500])
    with pytest.raises(ValueError, match="low < high"):
        stream(pictures, size=16, window=[5, 5])


def test_a_picture_has_no_depth(pictures):
    with pytest.raises(ValueError, match=r"pictures.*\[1, h, w\]"):
        stream(pictures, size=[2, 16, 16])
