"""Pictures: planes as they are looked at, boxes where crops lie, a share of cells masked, labels tinted."""

import io

import numpy as np
import pytest
from scans import ct, nifti

from medfast.data import drawing
from medfast.data.prepare import prepare
from medfast.data.show import show
from medfast.data.store import DataError, Store

Picture = pytest.importorskip("PIL.Image", reason="Pillow is not installed")


def opened(data):
    return np.asarray(Picture.open(io.BytesIO(data)))


def test_png_is_what_it_was_made_of():
    picture = np.random.default_rng(0).integers(0, 256, (13, 7, 3)).astype(np.uint8)
    np.testing.assert_array_equal(opened(drawing.png(picture)), picture)


def test_planes_have_head_and_front_up_and_right_on_the_left():
    volume = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    assert drawing.plane(volume, 0, 1)[0, 0] == volume[1, 2, 3]  # front, right
    assert drawing.plane(volume, 1, 0)[0, 0] == volume[1, 0, 3]  # head, right
    assert drawing.plane(volume, 2, 0)[0, 0] == volume[1, 2, 0]  # head, front


def test_boxes_lie_where_the_voxels_are():
    volume = np.zeros((10, 12, 14))
    start, stop = np.array([2, 3, 4]), np.array([5, 9, 20])
    volume[2:5, 3:9, 4:20] = 1
    for axis, index in enumerate((3, 5, 6)):
        where = drawing.plane(volume, axis, index) > 0
        picture = np.zeros((*where.shape, 3), np.uint8)
        drawing.box(picture, axis, volume.shape, start, stop, (9, 9, 9))
        rows, columns = np.nonzero(where)
        drawn = np.argwhere(picture[..., 0] > 0)
        assert drawn.min(0).tolist() == [rows.min(), columns.min()]
        assert drawn.max(0).tolist() == [rows.max(), columns.max()]


def test_show_draws_crops_masks_and_labels(tmp_path):
    (tmp_path / "in").mkdir()
    voxels = ct(1, (40, 80, 72)).transpose(2, 1, 0)
    (tmp_path / "in" / "a.nii").write_bytes(nifti(voxels))
    (tmp_path / "in" / "l.nii").write_bytes(nifti((voxels > -50).astype(np.uint8)))
    (tmp_path / "in" / "list.csv").write_text("image,label\na.nii,l.nii\n")
    prepare(tmp_path / "in" / "list.csv", tmp_path / "store", progress=False)
    (record,) = Store(tmp_path / "store").records
    sheets = {}
    for mask in (0.0, 0.5):
        file = show(tmp_path / "store", record["id"], tmp_path / "x.png", size=32, crops=2, cell=8, mask=mask)
        sheets[mask] = opened(file.read_bytes()).astype(int)
        assert b"a.nii" not in file.read_bytes()
    d, h, w = record["shape"]
    assert sheets[0.5].shape[0] == max(h, d) + 2 * 32 + 3 * 4 and sheets[0.5].shape[1] == max(2 * w + h, 96) + 12
    colourful = lambda sheet: (np.ptp(sheet, axis=-1) > 30).mean()  # noqa: E731
    assert colourful(sheets[0.0]) > 0.1, "labels are tinted"
    crops = slice(max(h, d) + 4, None)
    changed = (sheets[0.5][crops, :104] != sheets[0.0][crops, :104]).any(-1).mean()
    assert 0.25 < changed < 0.7 and (sheets[0.5][: h + 4] == sheets[0.0][: h + 4]).all()
    with pytest.raises(DataError, match="no volume 'zz'"):
        show(tmp_path / "store", "zz", tmp_path / "x.png")
    with pytest.raises(ValueError, match="multiple of cell"):
        show(tmp_path / "store", record["id"], tmp_path / "x.png", size=30)
