"""Prepares one CT of (d, h, w) voxels from a file; prints [voxels, bytes the process grew by, shape stored, its peak].

Run as a program: python memory.py D H W [SLAB]. 1500 512 512 is the case of docs/data.md.
"""

import gzip
import json
import os
import resource
import sys
import tempfile
from pathlib import Path

import numpy as np
from scans import ct, nifti

from medfast.data import resample, units
from medfast.data.formats import fetch
from medfast.data.inputs import Case
from medfast.data.make import make
from medfast.data.recipe import recipe
from medfast.data.threads import one_thread


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def pack(file, shape):
    """A body whose slices repeat, written by another process so that this one's peak is that of reading."""
    if child := os.fork():
        return os.waitpid(child, 0)
    head = nifti(np.zeros((2, 2, 2), np.int16), np.diag([0.78, 0.78, 1.0, 1]), dim=[3, *shape[::-1], 1, 1, 1, 1])[:352]
    slices = ct(0, (8, *shape[1:]))
    with gzip.open(file, "wb", compresslevel=1) as stream:
        stream.write(head)
        for z in range(shape[0]):
            stream.write(slices[z * 8 // shape[0]].tobytes())
    os._exit(0)


def prepared(file):
    return make(fetch(Case((file,)))[1], recipe())[0].shape


if __name__ == "__main__":
    shape = tuple(int(n) for n in sys.argv[1:4])
    if len(sys.argv) > 4:
        resample.SLAB = units.SLAB = int(sys.argv[4])
    with tempfile.TemporaryDirectory() as folder, one_thread():
        file = Path(folder) / "x.nii.gz"
        pack(file, (40, 60, 60))
        prepared(file)
        before = peak()
        pack(file, shape)
        stored = prepared(file)
    print(json.dumps([int(np.prod(shape)), peak() - before, list(stored), peak()]))
