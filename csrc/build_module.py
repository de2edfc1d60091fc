"""Build module.cpp, which tells how the library was built: for this Python, with pybind11, where that is there."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import build_csrc
from build_csrc import HERE, MODULE, Call

SOURCES = (".cpp", ".h", ".cu", ".cuh")


def why_no_module() -> str | None:
    """Why module.cpp is left out of this build, or None."""
    if find_spec("pybind11") is None:
        return "pybind11 is not installed"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return None if header.is_file() else f"no {header}"


def module_name() -> str:
    """Its file: other versions of Python do not look for that name."""
    return "_facts" + sysconfig.get_config_var("EXT_SUFFIX")


def build_module(folder: Path, module: Path, namespace: str = "medfast_kernels") -> None:
    """Compile module.cpp in ``folder`` and put ``module``. namespace: what the library beside it was built for."""
    import pybind11

    folder = folder.resolve() / "module"
    made, compiler = folder / "module.so", build_csrc.find_compiler()
    assert compiler is not None
    command = [compiler, "-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-o", str(made)]
    command += [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    command += [f"-DMEDFAST_FACTS={json.dumps(json.dumps(facts(folder, namespace)))}", str(HERE / MODULE)]
    build_csrc.make(folder, [(command, made, [HERE / MODULE, *sorted(HERE.glob("*.h"))])], module.resolve())


def facts(folder: Path, namespace: str) -> dict[str, object]:
    """What the module tells of the library."""
    torch, compiler = build_csrc.find_torch(), build_csrc.find_compiler()
    assert torch is not None and compiler is not None
    calls: list[Call] = build_csrc.steps(folder, namespace)
    words = [word for command, _, _ in calls for word in command]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256()
    for path in sorted(path for path in HERE.rglob("*") if path.suffix in SOURCES):
        digest.update(path.name.encode() + path.read_bytes())
    return {
        "compiler": version.splitlines()[0],
        "flags": " ".join([*build_csrc.COMMON, *build_csrc.KERNEL]),
        "instruction sets": [name for name in build_csrc.INSTRUCTION_SETS if f"-DMEDFAST_ISA={name}" in words],
        "CUDA architectures": sorted(set(re.findall(r"code=(sm_\w+)", " ".join(words)))),
        "torch ABI": ".".join(map(str, build_csrc.OLDEST_TORCH)),
        "built against torch": ".".join(map(str, build_csrc.torch_version(torch))),
        "namespace": namespace,
        "sources": digest.hexdigest()[:16],
    }
