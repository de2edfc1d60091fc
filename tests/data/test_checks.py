"""Which volumes are CT in Hounsfield units, and where their body is."""

from pathlib import Path

import numpy as np
import pytest

from medfast.data import checks
from medfast.data.image import Bad, Image
from medfast.data.nifti import parse, read
from medfast.data.units import Reading, Unit

SHARED = Path(__file__).parents[3] / "shared" / "data"
RNG = np.random.default_rng(0)


def ct():
    """Air, a body of fat with muscle, a bone; noise."""
    volume = np.full((24, 48, 48), -1000.0)
    volume[:, 8:40, 6:42] = -100
    volume[:, 12:36, 10:38] = 50
    volume[:, 20:26, 20:26] = 600
    return volume + 15 * RNG.standard_normal(volume.shape)


def judged(volume, slope=1.0, inter=0.0, spacing=(2.0, 2.0, 2.0)):
    spacing = np.array(spacing)
    image = Image(np.asarray(volume), slope, inter, np.diag([*spacing, 1.0]), spacing, "RAS", 0.0)
    checks.check_geometry(image)
    reading = Reading(image, Unit("HU"))
    out = np.concatenate(list(reading.slabs()))
    checks.check_hounsfield(reading.histogram)
    return out, image.notes


def refused(*args, **kwargs):
    with pytest.raises(Bad) as caught:
        judged(*args, **kwargs)
    return caught.value.kind


def test_hounsfield_units_pass():
    volume = ct()
    out, notes = judged(volume)
    assert out.dtype == np.int16 and notes == []
    np.testing.assert_array_equal(out, np.rint(volume.clip(-1024)))
    judged(np.rint(volume + 1024).astype(np.uint16), inter=-1024.0)
    padded = np.rint(volume).astype(np.int16)
    padded[:, :, :4] = -3024
    assert judged(padded)[0].min() == -1024


def test_a_tight_crop_and_contrast_pass():
    crop = ct()[:, 13:35, 11:37]
    crop[4:8, 4:8, 4:8] = -990  # a little gas
    judged(crop)
    bright = ct()
    bright[(bright > 0) & (bright < 90)] += 40
    judged(bright)


@pytest.mark.parametrize("case", ["offset", "twice", "window", "negated", "airless", "unit"])
def test_what_is_not_in_hounsfield_units(case):
    volume = ct()
    wrong = {"offset": volume + 1000, "twice": volume - 1000, "window": np.clip(volume, -160, 240),
             "negated": -volume, "airless": volume[:, 13:35, 11:37], "unit": (volume + 1000) / 16}  # fmt: skip
    assert refused(wrong[case]) == "not-hu"


def test_values_that_are_no_image():
    assert refused(np.full((20, 20, 20), 7, np.int16)) == "constant"
    assert refused(np.where(RNG.random((20, 20, 20)) > 0.5, -3000, -2000)) == "constant"
    for value in (np.nan, np.inf):
        volume = ct()
        volume[:2, 0] = value
        assert refused(volume) == "non-finite"


def test_geometry_limits():
    assert refused(ct(), spacing=(0.0008, 0.0008, 0.0008)) == "spacing"
    assert refused(ct(), spacing=(11, 1, 1)) == "spacing"
    assert refused(ct(), spacing=(8, 1, 1)) == "thick"
    assert judged(ct(), spacing=(6, 1, 1))[1] == ["thick"]
    assert judged(ct(), spacing=(5.0, 1, 1))[1] == []
    assert refused(np.broadcast_to(ct()[:1], (600, 48, 48)), spacing=(5.0, 1, 1)) == "extent"
    checks.check_stored((16, 16, 16))
    with pytest.raises(Bad, match="15"):
        checks.check_stored((40, 15, 40))


def test_body_box_takes_the_largest_body_to_the_voxel():
    volume = np.full((30, 41, 50), -1000, np.int16)
    volume[3:27, 9:31, 11:40] = 40
    volume[10:20, 12:28, 16:24] = -850  # a lung is inside the box
    volume[:, 37, :] = 0  # a table, thin
    volume[0:8, 0:4, 44:50] = 40  # an arm
    box, share = checks.body_box(volume)
    assert box == [3, 9, 11, 27, 31, 40]
    assert share == pytest.approx((volume > -500).mean(), abs=1e-4)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real volumes of ../shared/data are not here")
@pytest.mark.parametrize("name, kind", [
    ("ct/sts_002.nii.gz", None), ("ct/totalseg_example_ct.nii.gz", None), ("ct/crlm_1004.nii.gz", None),
    ("ct/scct.nii", "not-hu"), ("mr/sts_002_t1.nii.gz", "not-hu"), ("mr/totalseg_example_mr_sm.nii.gz", "not-hu"),
])  # fmt: skip
def test_real_volumes(name, kind):
    image = parse(read(SHARED / name)[1])
    checks.check_geometry(image)
    reading = Reading(image, Unit("HU"))
    list(reading.slabs())
    if kind is None:
        checks.check_hounsfield(reading.histogram)
    else:
        with pytest.raises(Bad) as caught:
            checks.check_hounsfield(reading.histogram)
        assert caught.value.kind == kind
