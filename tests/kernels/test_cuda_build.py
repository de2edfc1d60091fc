"""The library with its CUDA kernels: nvcc compiles it, torch without CUDA loads it, and what ptxas says of registers
and spills stays within budgets_cuda.json (``python tests/kernels/test_cuda_build.py`` records it)."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "csrc"))
build_csrc = pytest.importorskip("build_csrc")
build_cuda = pytest.importorskip("build_cuda")
BUDGETS = Path(__file__).with_name("budgets_cuda.json")
SLACK = 8  # registers that another nvcc may take
NAMESPACE = "medfast_cuda_test"
FOLDER = ROOT / "build" / NAMESPACE
KERNEL = re.compile(
    r"entry function '\w*?\d(?P<kernel>forward|backward|order_bias|fold|mask)"
    r"(?:I(?P<type>4Half|8Bfloat16)Li(?P<wide>\d+))?E\w*' for '(?P<arch>sm_\w+)'"
    r".*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers",
    re.S,
)


def nvcc_or_skip():
    if build_cuda.find_nvcc() is None:
        pytest.skip("no nvcc")
    if build_csrc.find_compiler() is None or build_csrc.find_torch() is None:
        pytest.skip("it needs a C++ compiler and torch")


@pytest.fixture(scope="module")
def library():
    nvcc_or_skip()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDFAST_CUDA", "1")
        build_csrc.build(FOLDER, FOLDER / "_csrc.so", NAMESPACE)
    return FOLDER / "_csrc.so"


def costs():
    """{"sm_80 backward Half 96": registers} of the last build; spilled bytes are an error."""
    found = {}
    for path in sorted(FOLDER.glob("*.ptxas.txt")):
        for kernel in KERNEL.finditer(path.read_text()):
            words = (kernel["arch"], kernel["kernel"], (kernel["type"] or "")[1:], kernel["wide"] or "")
            name = " ".join(filter(None, words))
            assert kernel["stores"] == kernel["loads"] == "0", f"{name} spills registers: {kernel[0]}"
            found[name] = int(kernel["registers"])
    return found


@pytest.mark.slow
def test_registers_and_spills(library):
    budgets, found = json.loads(BUDGETS.read_text()), costs()
    assert found.keys() == budgets.keys()
    over = {name: (n, budgets[name]) for name, n in found.items() if n > budgets[name] + SLACK}
    assert not over, f"more registers than recorded (found, recorded): {over}"


@pytest.mark.slow
def test_it_loads_in_a_torch_without_cuda_and_says_what_it_is(library):
    code = f"""
import torch
torch.ops.load_library({str(library)!r})
operators = torch.ops.{NAMESPACE}
assert operators.built_with_cuda()
for name in ("window_attention_cuda", "window_attention_cuda_backward", "attention_mask_cuda"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key("{NAMESPACE}::" + name, "CUDA"), name
print(operators.instruction_set())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip() in build_csrc.INSTRUCTION_SETS, done.stderr


@pytest.mark.slow
def test_the_machine_code_is_of_both_architectures(library):
    assert {name.split()[0] for name in costs()} == {"sm_80", "sm_90a"}


def test_the_choice(monkeypatch):
    monkeypatch.setattr(build_cuda, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(build_cuda, "nvcc_version", lambda nvcc: (13, 0))
    monkeypatch.setattr(build_cuda, "gpu_is_here", lambda: False)
    monkeypatch.delenv("MEDFAST_CUDA", raising=False)
    assert "no NVIDIA GPU is here; MEDFAST_CUDA=1" in build_cuda.why_no_cuda()
    monkeypatch.setattr(build_cuda, "gpu_is_here", lambda: True)
    assert build_cuda.why_no_cuda() is None
    monkeypatch.setenv("MEDFAST_CUDA", "0")
    assert build_cuda.why_no_cuda() == "MEDFAST_CUDA=0"
    monkeypatch.setenv("MEDFAST_CUDA", "1")
    monkeypatch.setattr(build_cuda, "gpu_is_here", lambda: False)
    assert build_cuda.why_no_cuda() is None
    monkeypatch.setattr(build_cuda, "nvcc_version", lambda nvcc: (11, 8))
    with pytest.raises(RuntimeError, match=r"asks for the CUDA kernels, but nvcc \(11, 8\) is older than \(12, 0\)"):
        build_cuda.why_no_cuda()
    monkeypatch.setenv("MEDFAST_CUDA", "yes")
    with pytest.raises(ValueError, match="0 .* or 1 .*, got 'yes'"):
        build_cuda.why_no_cuda()


def test_no_nvcc_leaves_the_cuda_kernels_out(monkeypatch, tmp_path):
    if build_csrc.find_compiler() is None or build_csrc.find_torch() is None:
        pytest.skip("it needs a C++ compiler and torch")
    monkeypatch.delenv("MEDFAST_CUDA", raising=False)
    monkeypatch.setattr(build_cuda, "find_nvcc", lambda: None)
    monkeypatch.setattr(build_cuda, "gpu_is_here", lambda: True)
    assert build_cuda.why_no_cuda() == "no nvcc on PATH or in CUDA_HOME"
    words = " ".join(word for command, _, _ in build_csrc.steps(tmp_path, "x") for word in command)
    assert "MEDFAST_CUDA" not in words and ".cu " not in words


def test_nvcc_is_found_in_cuda_home(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build_cuda.find_nvcc() is None
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.131'\n")
    nvcc.chmod(0o755)
    assert build_cuda.find_nvcc() == str(nvcc)
    monkeypatch.setenv("PATH", os.defpath)
    assert build_cuda.nvcc_version(str(nvcc)) == (12, 4)


if __name__ == "__main__":
    os.environ["MEDFAST_CUDA"] = "1"
    build_csrc.build(FOLDER, FOLDER / "_csrc.so", NAMESPACE)
    BUDGETS.write_text(json.dumps(costs(), indent=1) + "\n")
