"""Phantoms must be files that prepare accepts, and anatomy that differs."""

import numpy as np
import pytest

from medfast.data import checks
from medfast.data.nifti import parse, read
from medfast.data.phantom import write_phantoms
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
