"""Reading PNG radiographs through Pillow."""

from __future__ import annotations

import io

import numpy as np

from medfast.data.image import Bad, Image

__all__ = ["parse"]


def parse(data: bytes | bytearray) -> Image:
    """One grey picture (h, w) of 8 or 16 bits; a PNG does not say how large a pixel is. Raises Bad."""
    try:
        from PIL import Image as Picture
    except ModuleNotFoundError:
        raise ModuleNotFoundError("reading PNG needs Pillow: pip install 'medfast[png]'") from None
    try:
        picture = Picture.open(io.BytesIO(data))
        picture.load()  # checks the CRC of every chunk
    except (OSError, SyntaxError, ValueError) as error:
        raise Bad("png", f"the picture is damaged or incomplete ({error})") from None
    plane = np.asarray(picture)
    if picture.mode not in ("L", "I", "F") and not picture.mode.startswith("I;16"):
        raise Bad("voxel-type", f"pixels are {picture.mode}, not one number each; convert the picture to grey")
    return Image(plane, 1.0, 0.0, np.eye(4), np.full(2, np.nan), "picture", 0.0)
