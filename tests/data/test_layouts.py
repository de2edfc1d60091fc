"""Layouts: the same voxels from every one of them, read where they are touched."""

import sys

import numpy as np
import pytest
from stores import write_store

from medfast.data import layouts
from medfast.data.layouts import Place
from medfast.data.loader import open_stream
from medfast.data.pack import pack
from medfast.data.store import DataError, Store, verify

SHAPES = [(40, 33, 70), (36, 30, 28), (70, 40, 18)]


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """One store in four forms, by name."""
    pytest.importorskip("blosc2")
    folder = tmp_path_factory.mktemp("layouts")
    npy = write_store(folder / "npy", SHAPES)
    quiet = {"progress": False}
    pack(npy, folder / "blosc2", layout="blosc2", plain=True, **quiet)
    pack(npy, folder / "packed", shard_gb=2e-4, **quiet)
    pack(folder / "blosc2", folder / "packed_blosc2", **quiet)
    return {name: folder / name for name in ("npy", "blosc2", "packed", "packed_blosc2")}


@pytest.mark.parametrize("name", ["blosc2", "packed", "packed_blosc2"])
def test_crops_are_the_same_bits_from_every_layout(stores, name):
    section = {"size": [24, 24, 20], "window": [-21000, 29000], "workers": 0, "holdout": 0.3, "zoom": [0.7, 1.2]}
    ours, theirs = (open_stream({**section, "store": str(stores[n])}, seed=3, batch=4, views=2, split="train")
                    for n in ("npy", name))  # fmt: skip
    for step in range(3):
        a, b = ours.batch(step, range(4)), theirs.batch(step, range(4))
        assert all((x == y).all() for x, y in zip(a.views, b.views, strict=True)) and (a.boxes == b.boxes).all()
    store = Store(stores[name])
    assert verify(store) == 3 and store.layout == ("npy" if name == "packed" else "blosc2")
    assert len(list(stores["packed"].glob("shards/*"))) == 2


@pytest.mark.parametrize("shape", [(20, 30), (3, 20, 30, 25), (70, 65, 66), (1, 1, 1)])
@pytest.mark.parametrize("layout", layouts.SUFFIXES)
def test_arrays_of_any_shape_come_back_from_any_offset(tmp_path, layout, shape):
    if layout == "blosc2":
        pytest.importorskip("blosc2")
    array = np.random.default_rng(0).integers(-1000, 3000, shape).astype(np.int16)
    content = layouts.encode(layout, array)
    (tmp_path / "f").write_bytes(b"\0" * 4096 + bytes(content) + b"\0" * 100)
    found = layouts.open_voxels(layout, Place(tmp_path / "f", 4096, len(content)))
    assert (np.asarray(found[...]) == array).all() and found.shape == shape and found.dtype == np.int16
    part = tuple(slice(n // 3, n // 3 + max(1, n // 2)) for n in shape)
    assert (np.asarray(found[part]) == array[part]).all()


def test_a_crop_of_blosc2_decodes_the_blocks_that_it_touches(tmp_path):
    pytest.importorskip("blosc2")
    array = np.random.default_rng(0).integers(-30000, 30000, (128, 64, 64)).astype(np.int16)
    content = bytearray(layouts.encode("blosc2", array))
    begin, end = len(content) * 2 // 3, len(content) - 2000
    content[begin:end] = bytes(end - begin)  # inside the second of two chunks
    (tmp_path / "f").write_bytes(content)
    found = layouts.open_voxels("blosc2", Place(tmp_path / "f", 0, len(content)))
    assert (found[:64, 3:60, 5:50] == array[:64, 3:60, 5:50]).all()
    assert not (found[64:] == array[64:]).all(), "blosc2 notices nothing; the hash of the store does"


def test_what_cannot_be_read_says_so(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="npy, blosc2"):
        layouts.check("zarr")
    (tmp_path / "f").write_bytes(bytes(layouts.encode("npy", np.zeros((9, 9), np.int16)))[:-1])
    with pytest.raises(ValueError):
        layouts.open_voxels("npy", Place(tmp_path / "f", 0, 100))
    monkeypatch.setitem(sys.modules, "blosc2", None)
    with pytest.raises(ModuleNotFoundError, match=r"medfast\[blosc2\]"):
        layouts.check("blosc2")


def test_every_flipped_bit_of_a_packed_store_is_found(tmp_path):
    """In arrays, between them, and in the lines that say what they are."""
    packed = pack(write_store(tmp_path / "s", [(16, 16, 17), (16, 17, 16)]), tmp_path / "p", progress=False)
    files = [file for file in packed.path.rglob("*") if file.is_file()]
    sizes = np.array([file.stat().st_size for file in files])
    rng = np.random.default_rng(0)
    for n in range(60):
        file = files[n % len(files)] if n < 30 else files[rng.choice(len(files), p=sizes / sizes.sum())]
        content = file.read_bytes()
        at = rng.integers(len(content))
        file.write_bytes(content[:at] + bytes([content[at] ^ 1 << rng.integers(8)]) + content[at + 1 :])
        with pytest.raises(DataError):
            verify(Store(packed.path))
            pytest.fail(f"byte {at} of {file.name} was not found")
        file.write_bytes(content)
    assert verify(Store(packed.path)) == 2
