"""Measurements in a process of their own, with the allocator as it comes or told to keep its pages ("tuned").

Under glibc's defaults what allocates much spends half its time in page faults, so CPU rows are measured both ways.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from rows import ROOT

ALLOCATORS = {
    "default": {},
    "tuned": {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592",
              "MALLOC_TOP_PAD_": "268435456"},
}  # fmt: skip


def apart(script: str, *arguments: object, allocator: str = "default") -> Any:
    """What ``script`` prints, which is JSON, called with these arguments and this package on its path."""
    path = os.pathsep.join(filter(None, (str(ROOT / "kernels"), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path, **ALLOCATORS[allocator]}
    done = subprocess.run([sys.executable, script, *map(str, arguments)], env=env, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)
