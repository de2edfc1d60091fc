"""Build the C++ operators into one library, for setup.py, kernels/setup.py and by hand, into a copy of the package too:

    python csrc/build_csrc.py [yourpackage/kernels --name yourpackage.kernels]

torch is found by path and never imported, so that a build in an isolated environment, which cannot see the target's
packages, still builds against the target's torch. What is absent is fine and gets a sentence; what breaks fails the
build.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)  # whose stable ABI the library uses; every later torch loads it
MODULE = "module.cpp"  # build_module.py
COMMON = [
    "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-psabi",
    f"-DTORCH_TARGET_VERSION=0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000",
]  # fmt: skip
KERNEL = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fno-tree-loop-distribute-patterns"]
INSTRUCTION_SETS = {  # name: bytes of a vector, compiler flags
    "plain": (16, []),
    "avx2": (32, ["-mavx2", "-mfma"]),
    "avx512": (64, ["-mavx512f", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"]),
}

Call = tuple[list[str], Path, list[Path]]  # a command, what it makes, what it reads


def find_torch() -> Path | None:
    """The torch folder of the environment that is installed into, or None.

    pip's isolated build runs the target's interpreter with other folders on its path, so those are not asked.
    """
    found = (Path(folder) / "torch" for folder in _packages())
    return next((torch for torch in found if (torch / "version.py").is_file()), None)


def _packages() -> list[str]:
    """Where the target's packages are; a virtual environment may show those that it was made from."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    config = Path(sys.prefix) / "pyvenv.cfg"
    lines = config.read_text(encoding="utf-8").lower().split("\n") if config.is_file() else []
    if sys.prefix == sys.base_prefix or any(re.fullmatch(r"include-system-site-packages\s*=\s*true", x) for x in lines):
        folders += [site.getusersitepackages(), *site.getsitepackages([sys.base_prefix])]
    return folders


def torch_version(torch: Path) -> tuple[int, ...]:
    found = re.search(r"__version__ = '(\d+)\.(\d+)", (torch / "version.py").read_text(encoding="utf-8"))
    if found is None:
        raise RuntimeError(f"{torch / 'version.py'} names no version")
    return tuple(int(part) for part in found.groups())


def find_compiler() -> str | None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


def find_ninja() -> str | None:
    """On PATH, else beside Python: pip called by its path puts it into an environment that nobody has activated."""
    return shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))


def why_not() -> str | None:
    """Why the C++ operators are left out of this build, None if they are built; an error with MEDFAST_EXT=1."""
    asked = os.environ.get("MEDFAST_EXT", "")
    if asked not in ("", "0", "1"):
        raise ValueError(f"MEDFAST_EXT must be 0 (no C++ operators) or 1 (build them or fail), got {asked!r}")
    if asked == "0":
        return "MEDFAST_EXT=0"
    reason = None
    torch = find_torch()
    if torch is None:
        reason = f"no torch in {sysconfig.get_path('purelib')}"
    elif torch_version(torch) < OLDEST_TORCH:
        reason = f"torch {torch_version(torch)} is older than {OLDEST_TORCH}"
    elif os.name == "nt":
        reason = "they need GCC or Clang"
    elif find_compiler() is None:
        reason = f"no C++ compiler ({os.environ.get('CXX') or 'c++, g++, clang++'})"
    if reason and asked == "1":
        raise RuntimeError(f"MEDFAST_EXT=1 asks for the C++ operators, but {reason}")
    return reason


def steps(folder: Path, namespace: str) -> list[Call]:
    """Compiler calls; the last one makes the library."""
    import build_cuda

    compiler, torch = find_compiler(), find_torch()
    assert compiler is not None and torch is not None
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    headers = sorted(HERE.glob("*.h"))
    calls = []

    def compile(source: str, stem: str, flags: list[str]) -> None:
        made = folder / f"{stem}.o"
        command = [compiler, *COMMON, *flags, "-c", str(HERE / source), "-o", str(made)]
        calls.append((command, made, [HERE / source, *headers]))

    kernels = sorted(HERE.glob("*_kernel.cpp"))
    rest = sorted(set(HERE.glob("*.cpp")) - {*kernels, HERE / MODULE})
    for name, (width, flags) in INSTRUCTION_SETS.items():
        if x86 or name == "plain":
            defines = [f"-DMEDFAST_ISA={name}", f"-DMEDFAST_VECTOR_BYTES={width}"]
            for source in kernels:
                compile(source.name, f"{source.stem}_{name}", [*KERNEL, *defines, *flags])
    cuda = build_cuda.why_no_cuda() is None
    operators = ["-std=c++20", "-O3", f"-isystem{torch / 'include'}", f"-DMEDFAST_NAMESPACE={namespace}"]
    operators += [*(["-DMEDFAST_X86"] if x86 else []), *(["-DMEDFAST_CUDA"] if cuda else [])]
    for source in rest:
        compile(source.name, source.stem, operators)
    if cuda:
        calls += build_cuda.steps(folder, [compiler, *COMMON, *operators])
    objects = [made for _, made, _ in calls]
    library = folder / "linked.so"
    link = [compiler, "-shared", *map(str, objects), "-o", str(library), f"-L{torch / 'lib'}", "-ltorch_cpu"]
    return [*calls, ([*link, *(build_cuda.runtime() if cuda else [])], library, objects)]


def build(folder: Path, library: Path, namespace: str = "medfast_kernels") -> None:
    """Compile and link in ``folder``, through ninja (parallel, incremental) where there is one, then put ``library``.

    It takes its place by renaming: a process that has the old one loaded keeps it whole.
    """
    make(folder.resolve(), steps(folder.resolve(), namespace), library.resolve())


def make(folder: Path, calls: list[Call], target: Path) -> None:
    """Run the calls in ``folder`` and put what the last one makes in the place of ``target``."""
    folder.mkdir(parents=True, exist_ok=True)
    _run(folder, calls)
    target.parent.mkdir(parents=True, exist_ok=True)
    arriving = target.with_suffix(f".{os.getpid()}.tmp")
    shutil.copy2(calls[-1][1], arriving)
    arriving.replace(target)


def _run(folder: Path, calls: list[Call]) -> None:
    ninja = find_ninja()
    if ninja is None:
        for command, _, _ in calls:
            subprocess.run(command, check=True)
        return
    lines = ["rule run", "  command = $call", "  description = $out"]
    for command, made, reads in calls:
        lines += [f"build {_escape(made)}: run {' '.join(map(_escape, reads))}", f"  call = {_shell(command)}"]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n", encoding="utf-8")
    subprocess.run([ninja, "-C", str(folder)], check=True)


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _shell(command: list[str]) -> str:
    return shlex.join(command).replace("$", "$$")


def extension(package: str = "medfast_kernels") -> dict:
    """What setup() needs to carry the operators: extensions and their commands, or nothing and a line that says why."""
    from build_cuda import why_no_cuda
    from build_module import build_module, module_name, why_no_module
    from setuptools import Extension
    from setuptools.command.bdist_wheel import bdist_wheel
    from setuptools.command.build_ext import build_ext

    reason, no_module = why_not(), why_no_module()
    if reason:
        print(f"medfast: the C++ operators are left out, plain PyTorch runs in their place: {reason}", file=sys.stderr)
        return {}
    if no_cuda := why_no_cuda():
        print(f"medfast: the CUDA kernels are left out: {no_cuda}", file=sys.stderr)
    if no_module:
        print(f"medfast: the operators are built, what tells of their build is left out: {no_module}", file=sys.stderr)
    sources = [str(p.relative_to(HERE)) for p in sorted(HERE.rglob("*.c*"))]
    extensions = [Extension(f"{package}._csrc", sources)]
    extensions += [] if no_module else [Extension(f"{package}._facts", [MODULE])]

    class Build(build_ext):
        def get_ext_filename(self, fullname: str) -> str:
            folder, _, stem = fullname.rpartition(".")
            name = "_csrc.so" if stem == "_csrc" else module_name()  # torch loads it by path, of any Python version
            return str(Path(*folder.split("."), name))

        def build_extension(self, ext: Extension) -> None:
            make = build if ext.name.endswith("._csrc") else build_module
            make(Path(self.build_temp), Path(self.get_ext_fullpath(ext.name)))

    class Wheel(bdist_wheel):
        def get_tag(self) -> tuple[str, str, str]:
            return "py3", "none", super().get_tag()[2]

    return {"ext_modules": extensions, "cmdclass": {"build_ext": Build, "bdist_wheel": Wheel}}


def main() -> None:
    from build_cuda import why_no_cuda
    from build_module import build_module, module_name, why_no_module

    parser = argparse.ArgumentParser(description="Build the C++ operators into a copy of the package, in place.")
    home = HERE.parent / "kernels" / "medfast_kernels"
    parser.add_argument("package", type=Path, nargs="?", default=home, help="its folder")
    parser.add_argument("--name", default="medfast_kernels", help="what it is imported as, e.g. yourpackage.kernels")
    options = parser.parse_args()
    namespace = options.name.replace(".", "_")
    if missing := why_not():
        sys.exit(f"the C++ operators cannot be built: {missing}")
    if not (options.package / "_dispatch.py").is_file():
        sys.exit(f"{options.package} is no copy of medfast_kernels: it has no _dispatch.py")
    own = options.package.resolve() == home.resolve()
    folder = HERE.parent / "build" / ("csrc" if own else namespace)
    build(folder, options.package / "_csrc.so", namespace)
    if reason := why_no_cuda():
        print(f"the CUDA kernels are left out: {reason}")
    if reason := why_no_module():
        print(f"what tells of the build is left out: {reason}")
    else:
        build_module(folder, options.package / module_name(), namespace)


if __name__ == "__main__":
    main()
