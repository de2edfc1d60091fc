"""Prepares one CT of (d, h, w) voxels in memory and prints [voxels, file bytes, bytes that the process grew by].

Run as a program: python memory.py D H W [SLAB]. 1500 512 512 is the case of docs/data.md.
"""

import gzip
import json
import resource
import sys

import numpy as np
from scans import ct, nifti

from medfast.data import resample, units
from medfast.data.make import make
from medfast.data.recipe import recipe
from medfast.data.threads import one_thread


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def packed(shape) -> bytes:
    """A small body repeated along d, so that making the file takes less memory than reading it."""
    import io

    head = nifti(np.zeros((2, 2, 2), np.int16), np.diag([0.78, 0.78, 1.0, 1]), dim=[3, *shape[::-1], 1, 1, 1, 1])[:352]
    slices, stream = ct(0, (8, *shape[1:])), io.BytesIO()
    with gzip.GzipFile(fileobj=stream, mode="wb", compresslevel=1) as file:
        file.write(head)
        for z in range(shape[0]):
            file.write(slices[z * 8 // shape[0]].tobytes())
    return stream.getvalue()


if __name__ == "__main__":
    shape = tuple(int(n) for n in sys.argv[1:4])
    if len(sys.argv) > 4:
        resample.SLAB = units.SLAB = int(sys.argv[4])
    with one_thread():
        small = packed((40, 60, 60))
        make([small], recipe())
        blobs = [packed(shape)]
        size, before = len(blobs[0]), peak()
        volume, _, _ = make(blobs, recipe())
    print(json.dumps([int(np.prod(shape)), size, peak() - before, list(volume.shape)]))
