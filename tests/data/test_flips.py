"""One flipped bit anywhere in a store is found, in every layout, alone and packed."""

import numpy as np
import pytest
from stores import write_store, write_volume

from medfast.data.pack import pack
from medfast.data.store import DataError, Store, verify


def files_of(store):
    """All but locks, which are empty."""
    return sorted(file for file in store.rglob("*") if file.is_file() and file.stat().st_size)


def flip(file, bit):
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def found(store):
    try:
        verify(Store(store))
    except DataError:
        return True
    return False


def small_store(folder, layout, packed):
    rng = np.random.default_rng(0)
    write_store(folder / "a", [], layout, fill=-1024)
    for n in range(3):
        voxels = rng.normal(0, 100, (17, 20, 23)).astype(np.int16)
        write_volume(folder / "a", n, voxels, layout, spacing=[2.0] * 3, percentiles={"5": -1000.0})
    if not packed:
        return folder / "a"
    pack(folder / "a", folder / "b", shard_gb=1e-5)
    return folder / "b"


def missed(store, count, seed):
    """Of ``count`` random bits, each file's share by its bytes but two at least, those whose flip nobody saw."""
    rng, unseen, files = np.random.default_rng(seed), [], files_of(store)
    sizes = np.array([file.stat().st_size for file in files])
    for n in range(count):
        which = n % len(files) if n < 2 * len(files) else int(rng.choice(len(files), p=sizes / sizes.sum()))
        bit = int(rng.integers(8 * sizes[which]))
        flip(files[which], bit)
        if not found(store):
            unseen.append((files[which].name, bit))
        flip(files[which], bit)
    assert not found(store), "every bit was flipped back"
    return unseen


@pytest.mark.parametrize(("layout", "packed"), [("npy", False), ("blosc2", False), ("npy", True)])
def test_some_bits(tmp_path, layout, packed):
    if layout == "blosc2":
        pytest.importorskip("blosc2")
    assert missed(small_store(tmp_path, layout, packed), 12, seed=0) == []


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "packed"), [("npy", False), ("blosc2", False), ("npy", True), ("blosc2", True)])
def test_two_hundred_bits(tmp_path, layout, packed):
    if layout == "blosc2":
        pytest.importorskip("blosc2")
    assert missed(small_store(tmp_path, layout, packed), 200, seed=1) == []
