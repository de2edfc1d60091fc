"""How the arrays of a store lie on the disk: a kind of file, alone or at some offset of a shard.

"npy": NumPy's own format, mapped into memory; a crop reads the pages that it touches. "blosc2": one compressed frame
(LZ4, bits shuffled, blocks of 32 voxels in chunks of 64), about half the size for CT; a crop decodes the blocks that it
touches. Neither format notices a flipped bit by itself, which is why the index holds a hash of every array.
"""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

__all__ = ["SUFFIXES", "Place", "Voxels", "check", "encode", "open_voxels"]

_PARSING = threading.Lock()  # NumPy parses headers with ast, which Python 3.11 may not do in two threads (SystemError)
SUFFIXES = {"npy": ".npy", "blosc2": ".b2nd"}


class Voxels(Protocol):
    """What opening gives: shape, dtype, ndim; slices of it are arrays in memory."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    @property
    def ndim(self) -> int: ...

    def __getitem__(self, box: Any, /) -> Any: ...


@dataclass(frozen=True)
class Place:
    """Where the bytes of one array lie."""

    file: Path
    offset: int
    bytes: int


def check(layout: str) -> str:
    """The layout, if this machine can read and write it. ValueError for one that there is not, ModuleNotFoundError."""
    if layout not in SUFFIXES:
        raise ValueError(f"layout is {layout!r}; accepted are {', '.join(SUFFIXES)}")
    if layout == "blosc2":
        _blosc2()
    return layout


def encode(layout: str, array: np.ndarray) -> bytes | memoryview:
    """The array as bytes of a file of this layout."""
    if layout == "npy":
        stream = io.BytesIO()
        np.save(stream, array, allow_pickle=False)
        return stream.getbuffer()
    blosc2 = _blosc2()
    packing = {"codec": blosc2.Codec.LZ4, "clevel": 5, "filters": [blosc2.Filter.BITSHUFFLE], "nthreads": 1}
    sides = [min(64, n) if axis >= array.ndim - 3 else 1 for axis, n in enumerate(array.shape)]
    frame = blosc2.asarray(np.ascontiguousarray(array), chunks=tuple(sides), cparams=packing,
                           blocks=tuple(min(32, n) for n in sides))  # fmt: skip
    return frame.to_cframe()


def open_voxels(layout: str, place: Place, shape: Sequence[int] | None = None) -> Voxels:
    """The array at ``place``, read-only; nothing is read yet but its header. OSError or ValueError where it is cut.

    shape: of int16 voxels whose header was read before, and need not be again.
    """
    if layout == "npy":
        return _mapped(place) if shape is None else _known(place, tuple(shape))
    blosc2 = _blosc2()
    try:
        return blosc2.open(str(place.file), mode="r", mmap_mode="r", offset=place.offset, dparams={"nthreads": 1})
    except (RuntimeError, SystemError) as error:
        raise OSError(f"{place.file} holds no whole blosc2 frame at byte {place.offset}: {error}") from None


def _known(place: Place, shape: tuple[int, ...]) -> np.ndarray:
    count = 2 * math.prod(shape)
    return np.memmap(place.file, np.int16, "r", place.offset + place.bytes - count, shape)


def _mapped(place: Place) -> np.ndarray:
    with _PARSING, place.file.open("rb") as stream:
        stream.seek(place.offset)
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise ValueError(f"{place.file} is .npy version {version}, a store has (1, 0)")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        begin = stream.tell()
    if fortran or dtype.hasobject:
        raise ValueError(f"{place.file} at byte {place.offset} is no plain array in C order")
    return np.memmap(place.file, dtype, "r", begin, shape)


def _blosc2() -> Any:
    try:
        import blosc2
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "this store's layout is blosc2, which needs the package: pip install 'medfast[blosc2]'. "
            "'medfast data pack STORE --out OTHER --layout npy' makes a store without it where it is installed."
        ) from None
    return blosc2
