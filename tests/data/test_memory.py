"""Memory of a worker follows the formula of docs/data.md; measured on a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

from medfast.data.nifti import FREED


def test_a_worker_holds_the_volume_once():
    shape, slab = (300, 256, 256), 2**19
    program = [sys.executable, str(Path(__file__).parent / "memory.py"), *map(str, shape), str(slab)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    voxels, grown, stored, _ = json.loads(done.stdout)
    held, new = 2 * voxels, stored[0] * stored[1] * stored[2]
    assert voxels == 300 * 256 * 256 and stored == [150, 100, 100]
    assert grown < held + 6 * new + FREED + 20e6
