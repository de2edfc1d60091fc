"""Copies of the package under other names, side by side in one process, each with its own operators."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from medfast_kernels import _dispatch

HOME, ROOT = _dispatch._LIBRARY.parent, Path(__file__).parents[2]
cpp_only = pytest.mark.skipif(_dispatch.WHY_NO_CPP is not None, reason=str(_dispatch.WHY_NO_CPP))
USE = """
import sys, warnings
import torch
import medfast_kernels as home
{imports}
x = torch.randn(2, 5, 4, 3, 2, 8, generator=torch.Generator().manual_seed(0))
table = torch.randn(25, 2, generator=torch.Generator().manual_seed(1))

def run(package):
    qkv, bias = x.clone().requires_grad_(), table.clone().requires_grad_()
    out = package.window_attention(qkv, bias, window=3, shift=1)
    ids = package.random_ids(9, 4, key=package.Key(1, sample=torch.arange(2)))
    where = package.attention_mask(torch.arange(18.0).view(2, 9), 0.5)[0]
    lost = package.token_contrast(torch.nn.functional.normalize(x[0, :2, :, 0], dim=-1))
    return [out, *torch.autograd.grad(out.square().sum(), (qkv, bias)), ids, where, lost]

for package in ({copies}):
    assert all(torch.equal(a, b) for a, b in zip(run(home), run(package), strict=True)), package
    print(package.__name__, package._dispatch.NAMESPACE, package._dispatch.WHY_NO_CPP)
"""


def python(code, folder, **variables):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(HOME.parent)]), **variables}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def vendor(folder, library=True):
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(HOME, folder, ignore=shutil.ignore_patterns("__pycache__", *([] if library else ["*.so"])))
    return folder


def test_two_plain_copies_in_one_process(tmp_path):
    vendor(tmp_path / "host" / "kernels", library=False)
    vendor(tmp_path / "other", library=False)
    code = USE.format(imports="import host.kernels, other", copies="host.kernels, other")
    first, second = python(code, tmp_path, MEDFAST_BACKEND="reference")
    assert first.startswith("host.kernels host_kernels _csrc.so is not built")
    assert second.startswith("other other _csrc.so is not built")


@cpp_only
def test_copies_with_a_library_in_one_process(tmp_path):
    """The first has a library of its own name (here by exchanging as many letters), the second still that of ours."""
    theirs = vendor(tmp_path / "another_kernels") / "_csrc.so"
    theirs.write_bytes(theirs.read_bytes().replace(b"medfast_kernels", b"another_kernels"))
    vendor(tmp_path / "host" / "kernels")
    code = USE.format(imports="import another_kernels", copies="another_kernels,") + (
        "import host.kernels\nprint(host.kernels._dispatch.WHY_NO_CPP)\n"
        "assert home._dispatch.choose('window_attention', x.device) == 'cpp'\n"
        "assert host.kernels._dispatch.choose('window_attention', x.device) == 'reference'\n"
    )
    first, second = python(code, tmp_path)
    assert first == "another_kernels another_kernels None"
    assert second.endswith("or of another package than host_kernels: build it again")


@pytest.mark.slow
@cpp_only
def test_a_library_is_built_for_a_copy(tmp_path):
    """As the manual says; the build's folder is this test's own."""
    package = vendor(tmp_path / "host" / "kernels", library=False)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, str(tmp_path / "csrc" / "build_csrc.py"), str(package), "--name", "host.kernels"]
    subprocess.run(command, check=True, env={**os.environ, "MEDFAST_CUDA": "0"})
    code = USE.format(imports="import host.kernels", copies="host.kernels,")
    facts = "facts = host.kernels._dispatch.build_facts()\nassert not facts or facts['namespace'] == 'host_kernels'"
    assert python(code + facts, tmp_path) == ["host.kernels host_kernels None"]


def test_a_library_is_built_into_copies_of_the_package_only(tmp_path):
    command = [sys.executable, str(ROOT / "csrc" / "build_csrc.py"), str(tmp_path), "--name", "host.kernels"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and ("is no copy of medfast_kernels" in done.stderr or "cannot be built" in done.stderr)
