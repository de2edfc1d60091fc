"""Triton kernels in Triton's interpreter: the ``case_*`` functions of a test file, in a process of their own.

The variable must be set before triton is imported, and a kernel with a bad address ends its process. Cases that are
marked slow are left to ``make check``: the interpreter takes seconds for what a GPU does in microseconds.
"""

import os
import subprocess
import sys
from contextlib import contextmanager

import torch


def run_cases(file: str, which: str = "not slow") -> None:
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*pytest, "-o", "python_functions=case_*", "-m", which, file],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout + done.stderr


@contextmanager
def poisoned_memory():
    """What the allocator gives is NaN, and the largest integer: an element that nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.zeros(2).new_empty(3).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def hold(got, eager, exact, factor: float, condition: float = 4.0) -> None:
    """Every tensor of ``got`` is at most ``factor`` times as far from ``exact``, fp64, as eager code in its dtype.

    Eager is exact by luck at times: ``condition`` roundings of the largest entry are allowed. The weights of a softmax
    have a relative error of as many roundings as the largest logit is large.
    """
    for a, b, truth in zip(got, eager, exact, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape == truth.shape
        if truth.numel():
            least = condition * torch.finfo(a.dtype).eps * truth.abs().max().item()
            allowed = factor * max((b.double() - truth).abs().max().item(), least)
            error = (a.double() - truth).abs().max().item()
            assert error <= allowed, f"off by {error:.1e}, allowed {allowed:.1e}"
