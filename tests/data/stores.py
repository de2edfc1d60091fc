"""Small stores whose voxels tell where they are."""

import numpy as np

from medfast.data.layouts import SUFFIXES, encode
from medfast.data.store import Header, append, digest


def write_store(folder, shapes, layout="npy", **recipe):
    """A store whose voxels tell where they are: raster index - 20000 + 7 * volume."""
    (folder / "volumes").mkdir(parents=True)
    (folder / "STORE.json").write_bytes(Header(recipe, layout).content())
    for n, shape in enumerate(shapes):
        voxels = (np.arange(np.prod(shape)).reshape(shape) - 20000 + 7 * n).astype(np.int16)
        write_volume(folder, n, voxels, layout, dims=recipe.get("dimensions", 3))
    return folder


def write_volume(folder, n, voxels, layout="npy", dims=3, **more):
    file = folder / "volumes" / f"v{n:02d}{SUFFIXES[layout]}"
    file.write_bytes(encode(layout, voxels))
    body = [*range(2, 2 + dims), *(x - 2 for x in voxels.shape[-dims:])]
    row = {"id": f"v{n:02d}", "shape": list(voxels.shape), "body": body, **more}
    append(folder / "index.jsonl", {**row, "bytes": file.stat().st_size, "hash": digest(file)})
