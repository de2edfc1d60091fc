import pytest
import torch

from medfast.objectives.patches import from_patches, to_patches, voxels_of_patch


@pytest.mark.parametrize("stride, size", [(2, (4, 6, 2)), (3, (4, 7, 3)), ((2, 4, 3), (4, 8, 6)), (2, (5, 4))])
def test_patches_are_cut_in_raster_order_and_put_back(stride, size):
    volume = torch.randn(2, 3, *size)
    lengths = (stride,) * len(size) if isinstance(stride, int) else stride
    grid = [-(-n // s) for n, s in zip(size, lengths, strict=True)]
    patches = to_patches(volume, stride)
    assert patches.shape == (2, torch.tensor(grid).prod(), 3 * voxels_of_patch(stride, len(size)))
    second = [slice(None), slice(None), *(slice(0, s) for s in lengths[:-1]), slice(lengths[-1], 2 * lengths[-1])]
    block = volume[tuple(second)]
    if block.numel() == patches[:, 1].numel():
        torch.testing.assert_close(patches[:, 1], block.flatten(1))
    assert torch.equal(from_patches(patches.unflatten(1, grid), stride, 3, size), volume)


def test_a_stride_for_other_axes_is_refused():
    with pytest.raises(ValueError, match="axes"):
        to_patches(torch.zeros(1, 1, 4, 4, 4), (2, 2))
