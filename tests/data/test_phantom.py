"""Phantoms must be files that prepare accepts, and anatomy that differs."""

import numpy as np
import pytest

from medfast.data import checks
from medfast.data.nifti import parse, read
from medfast.data.phantom import ORGANS, write_phantoms
from medfast.data.prepare import prepare
from medfast.data.store import Store
from medfast.data.units import Reading, Unit


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_phantoms(tmp_path_factory.mktemp("phantoms"), 2, seed=3)


def test_accepted_and_made_of_what_a_trunk_is_made_of(files):
    seen = []
    for file in files:
        image = parse(read(file)[1])
        checks.check_geometry(image)
        reading = Reading(image, Unit("HU"))
        volume = np.concatenate(list(reading.slabs()))
        checks.check_hounsfield(reading.histogram)
        seen.append((image.orientation, *image.spacing))
        d, h, w = volume.shape
        # Right is high w, superior high d: the liver lies right and low, the spine behind, air in front of it all.
        assert 20 < np.median(volume[int(d * 0.36), int(h * 0.52), int(w * 0.68) : int(w * 0.72)]) < 160
        assert np.median(volume[int(d * 0.75), int(h * 0.4) : int(h * 0.6), int(w * 0.63) : int(w * 0.73)]) < -700
        assert volume[:, : h // 2].clip(300).mean() > volume[:, h // 2 :].clip(300).mean()
        shares = [((volume >= a) & (volume < b)).mean() for a, b in ((-950, -700), (-160, -40), (0, 120), (300, 1500))]
        assert min(shares) > 0.005
    assert seen[0] != seen[1]


def test_same_seed_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("medfast.data.phantom.SPACINGS", ((8.0, 8.0, 8.0),))
    one, again, other = (write_phantoms(tmp_path / name, 1, seed)[0] for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    assert one.read_bytes() == again.read_bytes() != other.read_bytes()


def test_every_organ_is_where_its_label_says(tmp_path):
    """Through the list that is written beside them into a store; in HU, on the side of the body that it belongs to."""
    write_phantoms(tmp_path / "in", 2, seed=1, spacing=4.0, labels=True)
    prepare(tmp_path / "in" / "phantoms.csv", tmp_path / "store", spacing=4.0, progress=False)
    store = Store(tmp_path / "store")
    assert len(ORGANS) == 11
    for index in range(2):
        hu, organ = store.volume(index), store.label(index)
        assert np.unique(organ).tolist() == list(range(12))
        median = {name: np.median(hu[organ == number]) for number, name in enumerate(ORGANS, 1)}
        middle = {name: np.argwhere(organ == number).mean(0) for number, name in enumerate(ORGANS, 1)}
        assert all(median[name] < -700 for name in ("right lung", "left lung")) and median["vertebrae"] > 100
        assert all(0 < median[name] < 250 for name in ("liver", "spleen", "heart", "aorta", "left kidney"))
        for pair in ("kidney", "lung"):
            assert middle[f"right {pair}"][2] > middle[f"left {pair}"][2] + 10
        assert middle["liver"][2] > middle["spleen"][2] and middle["heart"][0] > middle["liver"][0]
        assert middle["vertebrae"][1] < middle["heart"][1]


def test_labels_change_no_volume(tmp_path):
    one = write_phantoms(tmp_path / "a", 1, seed=1, spacing=8.0)[0]
    other = write_phantoms(tmp_path / "b", 1, seed=1, spacing=8.0, labels=True)[0]
    assert one.read_bytes() == other.read_bytes() and not (tmp_path / "a" / "labels").exists()
