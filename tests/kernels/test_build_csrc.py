"""The build of the C++ operators: where its tools are looked for, and how the library takes its place."""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "csrc"))
build_csrc = pytest.importorskip("build_csrc")


def program(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_ninja_is_found_beside_python(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "bin" / "python"))
    assert build_csrc.find_ninja() is None
    beside = program(tmp_path / "venv" / "bin" / "ninja")
    assert build_csrc.find_ninja() == str(beside)
    monkeypatch.setenv("PATH", str(program(tmp_path / "system" / "ninja").parent))
    assert build_csrc.find_ninja() == str(tmp_path / "system" / "ninja")


@pytest.mark.parametrize("ninja", [True, False])
def test_the_library_is_replaced_whole_and_only_by_a_good_one(monkeypatch, tmp_path, ninja):
    if ninja and build_csrc.find_ninja() is None:
        pytest.skip("no ninja")
    if not ninja:
        monkeypatch.setattr(build_csrc, "find_ninja", lambda: None)
    source, made, library = tmp_path / "new", tmp_path / "build" / "linked.so", tmp_path / "package" / "_csrc.so"
    source.write_text("new")
    library.parent.mkdir()
    library.write_text("old")
    monkeypatch.setattr(build_csrc, "steps", lambda *_: [(["cp", str(source), str(made)], made, [source])])
    with library.open() as loaded:
        build_csrc.build(tmp_path / "build", library)
        assert loaded.read() == "old" and library.read_text() == "new"
    monkeypatch.setattr(build_csrc, "steps", lambda *_: [(["false"], made, [source])])
    with pytest.raises(subprocess.CalledProcessError):
        build_csrc.build(tmp_path / "build", library)
    assert library.read_text() == "new" and [p.name for p in library.parent.iterdir()] == ["_csrc.so"]


@pytest.mark.slow
def test_it_compiles_for_arm64(monkeypatch, tmp_path):
    """Plain vectors alone; Debian's g++-aarch64-linux-gnu, and the headers of the torch that is here."""
    cross = "aarch64-linux-gnu-g++"
    if shutil.which(cross) is None or build_csrc.find_torch() is None:
        pytest.skip(f"it needs {cross} and torch")
    monkeypatch.setenv("CXX", cross)
    monkeypatch.setenv("MEDFAST_CUDA", "0")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    *compiles, _ = build_csrc.steps(tmp_path, "arm")
    build_csrc._run(tmp_path, compiles)
    objects = [made for _, made, _ in compiles]
    assert objects and all(made.read_bytes()[18] == 183 for made in objects)  # ELF's number of this machine
    assert not any(name in made.stem for made in objects for name in ("avx2", "avx512"))
