"""kernels/ as a distribution of its own: installed by pip as it is, from its source archive, and as a wheel."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from medfast_kernels import _dispatch

ROOT = Path(__file__).parents[2]
ALONE = ("torch", "torchgen", "functorch", "sympy", "networkx", "jinja2", "mpmath", "filelock", "fsspec", "markupsafe",
         "typing_extensions")  # fmt: skip
cpp_only = pytest.mark.skipif(_dispatch.WHY_NO_CPP is not None, reason=str(_dispatch.WHY_NO_CPP))
CODE = "import torch, medfast_kernels as mk; print(mk._dispatch.WHY_NO_CPP, mk._dispatch.facts().get('namespace'))"


@pytest.fixture
def csrc(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "csrc"))
    return pytest.importorskip("build_csrc")


def torch_in(folder):
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "version.py").touch()
    return folder / "torch"


def test_torch_is_found_where_the_target_would_find_it(csrc, monkeypatch, tmp_path):
    """In a virtual environment, and in what it was made from only if it shows that."""
    own, base = tmp_path / "venv", tmp_path / "base"
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(own / "site-packages"))
    monkeypatch.setattr(sys, "prefix", str(own))
    monkeypatch.setattr(sys, "base_prefix", str(base))
    monkeypatch.setattr(csrc.site, "getsitepackages", lambda prefixes: [f"{prefix}/packages" for prefix in prefixes])
    monkeypatch.setattr(csrc.site, "getusersitepackages", lambda: str(tmp_path / "user"))
    shared = torch_in(base / "packages")
    assert csrc.find_torch() is None
    own.mkdir()
    (own / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = true\n")
    assert csrc.find_torch() == shared
    assert csrc.find_torch() != torch_in(tmp_path / "user") == csrc.find_torch()  # the user's goes before the machine's
    (own / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n")
    assert csrc.find_torch() is None
    assert torch_in(own / "site-packages") == csrc.find_torch()


def test_the_minimum_of_torch_is_said_once_and_kept(csrc):
    said = (ROOT / "kernels" / "pyproject.toml").read_text()
    manual = (ROOT / "kernels" / "README.md").read_text()
    assert csrc.OLDEST_TORCH == _dispatch._OLDEST_TORCH == (2, 11)
    assert 'dependencies = ["torch>=1.13"]' in said and "the C++ operators: 2.11" in said
    assert "1.13" in manual and "2.11" in manual
    assert "torch==1.13.0" in (ROOT / "Makefile").read_text()


def environment(folder):
    """A virtual environment with torch alone: links to the one that runs this."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    packages = next((folder / "lib").glob("python*")) / "site-packages"
    for path in Path(torch.__file__).parents[1].iterdir():
        stem = path.name.lower().removesuffix(".py")
        if stem in ALONE or (stem.endswith(".dist-info") and stem.split("-")[0] in ALONE):
            (packages / path.name).symlink_to(path)
    return folder / "bin" / "python"


def run(*command, cwd=None, **variables):
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MEDFAST_BACKEND")}
    command = [str(part) for part in command]
    done = subprocess.run(command, env={**env, "MEDFAST_CUDA": "0", **variables}, capture_output=True, text=True,
                          check=False, cwd=cwd)  # fmt: skip
    if "No matching distribution found for setuptools" in done.stdout + done.stderr:
        pytest.skip("no package index to take setuptools from")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def source(tmp_path):
    """kernels/ and csrc/ as they lie in the repository, without what a build has left there."""
    for name in ("kernels", "csrc"):
        leave = shutil.ignore_patterns("__pycache__", "build", "*.egg-info", "*.so")
        shutil.copytree(ROOT / name, tmp_path / "source" / name, ignore=leave)
    return tmp_path / "source" / "kernels"


@pytest.mark.slow
@cpp_only
def test_pip_install_gives_the_kernels(tmp_path, source):
    """Build isolation on, as anybody would: the isolated environment has no torch, the target's is found by path."""
    python = environment(tmp_path / "venv")
    run(python, "-m", "pip", "install", source)
    assert run(python, "-c", CODE) == "None medfast_kernels\n"
    table = run(python, "-m", "medfast_kernels").splitlines()
    assert any(line.split() == ["window_attention", "cpp", "chosen"] for line in table)


@pytest.mark.slow
@cpp_only
def test_a_wheel_of_the_source_archive_needs_no_compiler(tmp_path, source):
    builder, user = environment(tmp_path / "builder"), environment(tmp_path / "user")
    run(builder, "-m", "pip", "install", "setuptools>=77")
    run(builder, "setup.py", "-q", "sdist", "--dist-dir", tmp_path, cwd=source, MEDFAST_EXT="0")
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    assert {"setup.py", "LICENSE", "medfast_kernels/_dispatch.py"} <= names
    csrc = source.parent / "csrc"
    assert {f"csrc/{path.relative_to(csrc)}" for path in csrc.rglob("*.*") if path.is_file()} <= names
    run(builder, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, archive, MEDFAST_EXT="1")
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-" in wheel.name and "-any" not in wheel.name
    with zipfile.ZipFile(wheel) as files:
        assert {"medfast_kernels/_csrc.so", "medfast_kernels/reference/window.py"} <= set(files.namelist())
    run(user, "-m", "pip", "install", "--no-deps", "--no-index", wheel, PATH=str(tmp_path))
    assert run(user, "-c", CODE, PATH=str(tmp_path)) == "None medfast_kernels\n"
