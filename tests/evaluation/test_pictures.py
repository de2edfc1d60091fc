import base64
import io

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from medfast.evaluation import pictures


def pixels(uri):
    return imread(io.BytesIO(base64.b64decode(uri.partition(",")[2])), format="png")


@pytest.fixture
def patient():
    """Bright towards the head, the front and the right, so that each picture's corner tells its direction."""
    d, h, w = torch.meshgrid(torch.arange(6.0), torch.arange(5.0), torch.arange(4.0), indexing="ij")
    return 100 * d + 10 * h + w


@pytest.mark.parametrize(
    ("name", "left", "top"),
    [
        ("axial", "right of the patient", "front"),
        ("coronal", "right of the patient", "head"),
        ("sagittal", "front", "head"),
    ],
)
def test_planes_follow_radiological_convention(patient, name, left, top):
    step = {"head": 100, "front": 10, "right of the patient": 1}
    plane = next(p for p in pictures.PLANES if p.name == name)
    image = plane.cut(patient, 2)
    assert image[0, 0] - image[0, 1] == step[left]
    assert image[0, 0] - image[1, 0] == step[top]
    letter = {"head": "S", "front": "A", "right of the patient": "R"}
    assert (plane.edges[0], plane.edges[2]) == (letter[left], letter[top])


def test_slices_are_the_richest_of_the_middle_half():
    volume = torch.zeros(16, 16, 16)
    volume[0] = torch.linspace(0, 1, 16)  # rich, but outside the middle half
    volume[9, 6:10, 5] = torch.tensor([0.2, 0.4, 0.6, 0.8])
    assert pictures.slices_of(volume)[0] == 9
    assert pictures.slices_of(volume)[2] == 5
    assert pictures.richness(torch.zeros(4, 4)) == 0
    assert pictures.richness(torch.tensor([0.1, 0.9])) == pytest.approx(0.693, abs=1e-3)


def test_cells_cover_voxels_and_the_last_is_cut():
    cells = torch.arange(6).view(3, 2, 1)
    voxels = pictures.to_voxels(cells, (10, 8, 3))
    assert voxels.shape == (10, 8, 3)
    assert voxels[:, 0, 0].tolist() == [0] * 4 + [2] * 4 + [4] * 2
    assert voxels[0, :, 2].tolist() == [0] * 4 + [1] * 4


def test_pictures_keep_what_they_are_given():
    image = np.array([[0.0, 0.5], [1.0, 2.0]])
    assert pixels(pictures.grey(image))[..., 0] == pytest.approx(np.array([[0, 0.5], [1, 1]]), abs=0.01)
    where = np.array([[True, False]])
    found = pixels(pictures.tint(where, (1.0, 0.5, 0.0)))
    assert found[0, 0] == pytest.approx([1, 0.5, 0, 0.55], abs=0.01) and found[0, 1, 3] == 0
    heat = pixels(pictures.colours(np.array([[0.0, 0.5]]), "inferno", 0.5))
    assert heat[0, 0, :3].sum() < 0.1 and heat[0, 1, :3].sum() > 2.4
