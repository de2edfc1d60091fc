"""MR, channels, labels, pictures, the body box, patients: what the store keeps of each."""

import numpy as np
import pytest
from scans import SHAPE, ct, dicom_slice, nifti

from medfast.data.image import Bad, Image
from medfast.data.loader import open_stream
from medfast.data.make import label, make
from medfast.data.prepare import prepare
from medfast.data.recipe import recipe
from medfast.data.store import Store, read_lines, verify
from medfast.data.units import Unit, fit

SPACED = np.diag([1.0, 1.0, 2.0, 1.0])


def mr(seed=0):
    """(w, h, d): background 0, tissue of some hundred, a bright spot."""
    volume = (ct(seed) + 1100.0).clip(0) ** 1.1
    volume[ct(seed) < -900] = 0
    return volume.transpose(2, 1, 0).astype(np.float32)


@pytest.mark.parametrize("unit", ["percentile", "zscore"])
def test_mr_is_normalised_as_declared_and_can_be_undone(unit):
    volume, record, _ = make([nifti(mr(), SPACED)], recipe(modality="mr", unit=unit, spacing=2.0))
    again, other, _ = make([nifti(mr() * 7 + 100, SPACED)], recipe(modality="mr", unit=unit, spacing=2.0))
    np.testing.assert_allclose(volume, again, atol=1)
    sample = mr().transpose(2, 1, 0)[..., ::2, ::2]
    sample = sample[sample > 0]
    expected = (np.percentile(sample, 0.5), 1000 / np.ptp(np.percentile(sample, (0.5, 99.5))))
    if unit == "zscore":
        expected = (sample.mean(), 1000 / sample.std())
    np.testing.assert_allclose([record["offset"][0], record["scale"][0]], expected, rtol=1e-5)
    assert other["scale"][0] == pytest.approx(record["scale"][0] / 7, rel=1e-4)
    assert 0 < record["foreground"] < 1 and record["body"] != [0, 0, 0, *volume.shape]


def test_a_flat_mr_is_constant():
    for flat in (np.zeros((20, 20, 20)), np.pad(np.ones((4, 4, 4)), 8)):
        image = Image(flat, 1, 0, np.eye(4), np.ones(3), "RAS", 0.0)
        with pytest.raises(Bad) as caught:
            fit(image, "percentile")
        assert caught.value.kind == "constant"


def test_channels_are_stored_first_and_normalised_alone():
    two = np.stack([mr(), 50 * mr(1)], -1)
    settings = recipe(modality="mr", channels=2)
    volume, record, _ = make([nifti(two, SPACED)], settings)
    assert volume.shape == (2, 20, 22, 20) == tuple(record["shape"]) and len(record["scale"]) == 2
    for channel, alone in enumerate((mr(), 50 * mr(1))):
        one, single, _ = make([nifti(alone, SPACED)], recipe(modality="mr"))
        np.testing.assert_array_equal(volume[channel], one)
        assert single["scale"] == record["scale"][channel : channel + 1]
    assert len(record["body"]) == 6


def test_the_body_box_cuts_and_keeps_the_place():
    whole, plain, _ = make([nifti(np.pad(ct(2).transpose(2, 1, 0), 16, constant_values=-1000), SPACED)], recipe())
    cut, record, _ = make([nifti(np.pad(ct(2).transpose(2, 1, 0), 16, constant_values=-1000), SPACED)],
                          recipe(body=True))  # fmt: skip
    assert min(np.array(whole.shape) - cut.shape) > 0
    low = np.linalg.solve(plain["affine"], np.array(record["affine"]) @ [0, 0, 0, 1])[:3].round().astype(int)
    assert (low + record["body"][:3] == plain["body"][:3]).all() and (low == np.array(plain["body"][:3]) - 5).all()
    np.testing.assert_array_equal(cut, whole[tuple(slice(a, a + n) for a, n in zip(low, cut.shape, strict=True))])


def test_a_body_smaller_than_the_least_axis_keeps_that_many():
    air = np.full((60, 60, 60), -1000, np.int16)
    air[0:6, 30:36, 30:36] = 40
    air += np.random.default_rng(0).integers(-20, 20, air.shape).astype(np.int16)
    cut, record, _ = make([nifti(air, np.diag([2.0, 2, 2, 1]))], recipe(body=True))
    assert cut.shape == (16, 16, 16) and record["body"][3:] > record["body"][:3]


def labelled(seed=3):
    """A ball of class 7 in the middle of 20 x 44 x 40, (w, h, d)."""
    grid = np.indices(SHAPE[::-1]).reshape(3, -1).T - (np.array(SHAPE[::-1]) - 1) / 2
    return (7 * (np.linalg.norm(grid * [1, 1, 2], axis=1) < 12)).reshape(SHAPE[::-1]).astype(np.uint8)


@pytest.mark.parametrize("options", [{}, {"body": True}, {"spacing": 1.3}])
def test_labels_lie_on_the_volume(options):
    """Resampled with the nearest neighbour, a class stays where an image of it lies."""
    settings = recipe(**options)
    image = (labelled().astype(np.int16) // 7 * 40 + (labelled() == 0) * -1000).astype(np.int16)
    turned = np.diag([-1.0, 1, 2, 1])
    volume, record, source = make([nifti(image, turned)], settings)
    classes, about = label(nifti(labelled(), turned), source, record, settings)
    assert classes.dtype == np.uint8 and classes.shape == volume.shape and about["classes"] == [0, 7]
    inside = volume > -480
    assert (inside != (classes > 0)).mean() < 0.02
    where = [np.argwhere(at).mean(0) for at in (inside, classes > 0)]
    np.testing.assert_allclose(*where, atol=0.3)  # a new centre half way between two old ones takes either


def test_labels_that_are_none():
    settings = recipe()
    volume, record, source = make([nifti(ct().transpose(2, 1, 0), SPACED)], settings)
    moved = SPACED.copy()
    moved[0, 3] = 1
    for data, says in ((nifti(labelled()[:-1], SPACED), "voxels"), (nifti(labelled(), moved), "elsewhere"),
                       (nifti(ct().transpose(2, 1, 0), SPACED), "whole numbers"), (b"", "not-nifti"),
                       (nifti(labelled().astype(np.int32) * 9000, SPACED), "above")):  # fmt: skip
        with pytest.raises(Bad, match=says) as caught:
            label(data, source, record, settings)
        assert caught.value.kind == "label"
    big, _ = label(nifti(labelled().astype(np.int16) * 100, SPACED), source, record, settings)
    assert big.dtype == np.int16 and big.max() == 700


def test_pictures_keep_their_pixels(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    plane = (np.abs(ct(5)[10]) + 1).astype(np.int16)
    dicom_slice(folder / "x.dcm", plane, [0, 0, 0], modality="DX", inter=0)
    Picture = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    Picture.fromarray(np.tile(np.arange(200, dtype=np.uint8), (40, 1))).save(folder / "y.png")
    summary = prepare(folder, tmp_path / "store", modality="xr", progress=False)
    store = Store(tmp_path / "store")
    assert len(summary.good) == 2 == verify(store) and {len(r["shape"]) for r in store.records} == {2}
    shapes = {tuple(r["shape"]): (r["body"], r["source"]["spacing"]) for r in store.records}
    assert shapes == {(44, 40): ([0, 0, 44, 40], [0.8, 1.1]), (40, 200): ([0, 0, 40, 200], [None, None])}
    assert store.recipe["unit"] == "percentile" and store.recipe["fill"] == 0
    section = {"store": str(tmp_path / "store"), "size": 32, "workers": 0}
    batch = open_stream(section, seed=0, batch=2, views=1, split="train").batch(0, [0, 1])
    assert batch.views[0].shape == (2, 1, 32, 32)


def test_labels_and_patients_reach_the_store(tmp_path):
    (tmp_path / "in").mkdir()
    rows = ["image,label,patient"]
    for n in range(3):
        (tmp_path / "in" / f"{n}.nii").write_bytes(nifti(ct(n).transpose(2, 1, 0), SPACED))
        (tmp_path / "in" / f"{n}_label.nii").write_bytes(nifti(labelled() + n, SPACED))
        rows.append(f"{n}.nii,{f'{n}_label.nii' if n else ''},{'Mustermann' if n else 'Musterfrau'}")
    (tmp_path / "in" / "list.csv").write_text("\n".join(rows))
    prepare(tmp_path / "in" / "list.csv", tmp_path / "store", progress=False)
    store = Store(tmp_path / "store")
    assert verify(store) == 3 and sum("label" in record for record in store.records) == 2
    names = {row["id"]: row["path"][-5] for row in read_lines(tmp_path / "store" / "private" / "sources.jsonl")}
    groups = {names[record["id"]]: record["group"] for record in store.records}
    assert groups["1"] == groups["2"] != groups["0"]
    index = next(i for i, record in enumerate(store.records) if "label" in record)
    found = store.label(index)
    assert found is not None and found.shape == tuple(store.records[index]["shape"])
    file = tmp_path / "store" / "labels" / f"{store.records[index]['id']}.npy"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    problem = store.problem(index)
    assert problem is not None and "label of volume" in problem
    file.unlink()
    assert prepare(tmp_path / "in" / "list.csv", tmp_path / "store", progress=False).new == 1
    assert verify(Store(tmp_path / "store")) == 3


def test_settings_that_do_not_go_together():
    for wrong, says in (({"modality": "pet"}, "ct, mr, xr"), ({"unit": "HU", "modality": "mr"}, "HU"),
                        ({"unit": "zscore"}, "zscore"), ({"channels": 1}, "channels is 1"),
                        ({"modality": "xr", "body": True}, "pictures")):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            recipe(**wrong)
    assert Unit("HU").range == (-1024, 3071, -1024)
