"""MONAI's way to the crops of ``crops``: the same files, and the changes of its light recipe."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from monai.data import DataLoader, Dataset, PersistentDataset
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    Orientationd,
    RandFlipd,
    RandRotate90d,
    RandScaleIntensityd,
    RandShiftIntensityd,
    RandSpatialCropd,
    ScaleIntensityRanged,
    Spacingd,
)


def transforms(size: int, window: tuple[float, float]) -> Compose:
    """What does not change from epoch to epoch comes first: PersistentDataset keeps what is before the first draw.

    Turns are uniform over four, mirrors over none and two axes; MONAI draws each mirror by itself.
    """
    return Compose([
        LoadImaged("image"), EnsureChannelFirstd("image"), Orientationd("image", "RAS"),
        Spacingd("image", (2.0, 2.0, 2.0)), ScaleIntensityRanged("image", *window, 0.0, 1.0, clip=True),
        RandSpatialCropd("image", (size,) * 3, random_size=False),
        RandRotate90d("image", prob=0.75, spatial_axes=(0, 1)),
        RandFlipd("image", prob=1 / 3, spatial_axis=0), RandFlipd("image", prob=1 / 3, spatial_axis=1),
        RandScaleIntensityd("image", 0.25, prob=1.0), RandShiftIntensityd("image", 0.1, prob=1.0),
    ])  # fmt: skip


def batches(
    files: Path, cache: Path | None, config: Mapping[str, Any], batch: int, workers: int
) -> Generator[int, None, None]:
    """Batches without end, in ``workers`` processes; gives the crops in each. cache: of PersistentDataset, None to read
    the files each time."""
    rows = [{"image": str(file)} for file in sorted(files.glob("*.nii.gz"))]
    chain = transforms(config["size"], config["window"])
    data = Dataset(rows, chain) if cache is None else PersistentDataset(rows, chain, cache_dir=cache)
    loader = DataLoader(data, batch_size=batch, num_workers=workers, shuffle=True, persistent_workers=workers > 0)
    while True:
        for made in loader:
            yield len(made["image"])
