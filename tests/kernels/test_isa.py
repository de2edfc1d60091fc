"""Every operator in C++ on every instruction set of this processor, each in a process of its own: it is chosen once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from operator_checks import cpp_only

from medfast_kernels import _dispatch

pytestmark = cpp_only
CHECK = """
import torch
from medfast_kernels import _dispatch, _qualify
print(getattr(torch.ops, _dispatch.NAMESPACE).instruction_set())
for operator, who in _dispatch.KERNELS.items():
    found = _qualify._checked(operator, "cpp", torch.device("cpu"))
    print(operator, found.why)
"""
CHOOSE = "import sys, torch; torch.ops.load_library(sys.argv[1]); getattr(torch.ops, sys.argv[2]).instruction_set()"


def run(code, isa, *arguments):
    path = os.pathsep.join(filter(None, (str(_dispatch._LIBRARY.parents[1]), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "MEDFAST_ISA": isa, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("isa", ["avx2", "plain"])
def test_older_instruction_sets(isa):
    if isa == "avx2" and getattr(torch.ops, _dispatch.NAMESPACE).instruction_set() == "plain":
        pytest.skip("this processor has no AVX2")
    done = run(CHECK, isa)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [isa, *(f"{operator} None" for operator in _dispatch.OPERATORS)]


@pytest.mark.parametrize("isa", ["avx2", "plain"])
def test_window_attention_on_older_instruction_sets(isa):
    """Whose vectors are shorter, so that other tokens and channels are the last of one."""
    if isa == "avx2" and getattr(torch.ops, _dispatch.NAMESPACE).instruction_set() == "plain":
        pytest.skip("this processor has no AVX2")
    tests = Path(__file__).with_name("test_window_cpp.py")
    flags = ["-q", "-x", "-p", "no:cacheprovider", "--hypothesis-profile=repeatable"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *flags, str(tests)], env={**os.environ, "MEDFAST_ISA": isa},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout + done.stderr


def test_an_unknown_instruction_set_is_refused():
    done = run(CHOOSE, "sse9", str(_dispatch._LIBRARY), _dispatch.NAMESPACE)
    assert done.returncode != 0 and "MEDFAST_ISA must be one of those that this processor runs: plain" in done.stderr
    assert "got sse9" in done.stderr
