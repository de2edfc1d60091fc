"""Everything that decides the voxels of a store. One store has one recipe."""

from __future__ import annotations

from typing import Any

from medfast.data import checks
from medfast.data.resample import EXECUTORS, KERNELS
from medfast.data.units import UNITS

__all__ = ["MODALITIES", "recipe"]

MODALITIES = {"ct": "HU", "mr": "percentile", "xr": "percentile"}  # the unit where none is asked for
DICOM = {"ct": {"CT"}, "mr": {"MR"}, "xr": {"CR", "DX", "MG", "RG", "IO", "PX", "OT"}}


def recipe(
    *, modality: str = "ct", spacing: float = 2.0, kernel: str = "triangle", executor: str = "torch",
    unit: str | None = None, channels: int | None = None, body: bool = False, straighten: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Checked settings; ValueError names what is accepted. Pictures (xr) keep their pixels: spacing and kernel None.
    ``straighten`` is a setting of stores that were made with it alone."""
    for name, value, accepted in (("modality", modality, MODALITIES), ("kernel", kernel, KERNELS),
                                  ("executor", executor, EXECUTORS),
                                  ("unit", unit or MODALITIES.get(modality), UNITS)):  # fmt: skip
        if value not in accepted:
            raise ValueError(f"{name} is {value!r}; accepted are {', '.join(accepted)}")
    unit = unit or MODALITIES[modality]
    low, high = checks.LIMITS["voxel_mm"]
    if not low <= spacing <= high:
        raise ValueError(f"spacing is {spacing} mm; accepted are {low} to {high} mm")
    if executor == "dali" and kernel != "triangle":
        raise ValueError(f"the dali executor has the triangle kernel only, not {kernel!r}; use executor torch")
    if (modality == "ct") != (unit == "HU"):
        raise ValueError(f"modality {modality} does not go with unit {unit!r}: CT is stored in HU, what else there is "
                         "in 'percentile' or 'zscore'")  # fmt: skip
    if channels is not None and channels < 2:
        raise ValueError(f"channels is {channels}; it is the length of the fourth axis, 2 or more, or is left out")
    picture = modality == "xr"
    if picture and (channels or body or straighten):
        raise ValueError("pictures (modality xr) have one channel, no body box and nothing to straighten")
    low, high, fill = UNITS[unit]
    return {"version": 2, "modality": modality, "dimensions": 2 if picture else 3, "channels": channels,
            "spacing": None if picture else float(spacing), "kernel": None if picture else kernel,
            "executor": executor, "unit": unit, "clamp": [low, high], "fill": fill, "dtype": "int16", "body": body,
            "axes": "inferior-superior, posterior-anterior, left-right", "grid": "edge",
            "limits": checks.LIMITS, **({"straighten": True} if straighten else {})}  # fmt: skip
