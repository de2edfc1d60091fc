"""Who runs what: the choice, what overrules it, and what it says."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

import medfast_kernels as mk
from medfast_kernels import _dispatch

CPU = torch.device("cpu")
cpp_only = pytest.mark.skipif(_dispatch.WHY_NO_CPP is not None, reason=str(_dispatch.WHY_NO_CPP))


def test_every_public_name_is_there_and_has_a_reference():
    assert all(hasattr(mk, name) for name in mk.__all__)
    assert set(_dispatch.OPERATORS) <= set(mk.reference.__all__)
    assert all(hasattr(mk.reference, name) for name in mk.reference.__all__)


@cpp_only
def test_the_choice_and_what_overrules_it(monkeypatch):
    assert _dispatch.choose("window_attention", CPU) == "cpp"
    assert _dispatch.choose("window_attention", torch.device("cuda")) == "reference"
    monkeypatch.setenv("MEDFAST_BACKEND", "reference")
    assert _dispatch.choose("window_attention", CPU) == "reference"
    with mk.backend("cpp"):
        assert _dispatch.choose("window_attention", CPU) == "cpp"
        with mk.backend("reference"):
            assert _dispatch.choose("window_attention", CPU) == "reference"
        assert _dispatch.choose("window_attention", CPU) == "cpp"
    monkeypatch.setenv("MEDFAST_BACKEND", "fast")
    with pytest.raises(ValueError, match="MEDFAST_BACKEND must be one of 'reference', 'cpp', got 'fast'"):
        _dispatch.choose("window_attention", CPU)


@cpp_only
def test_a_backend_that_cannot_run_says_why():
    with mk.backend("cpp"), pytest.raises(RuntimeError, match="on CPU, the tensors are on meta"):
        mk.window_attention(torch.zeros(1, 2, 2, 3, 1, 4, device="meta"), window=2)
    with pytest.raises(ValueError, match="'reference', 'cpp', got 'triton'"), mk.backend("triton"):
        pass


@cpp_only
def test_an_operator_without_a_kernel_refuses_the_backend_that_is_asked_for(monkeypatch):
    attention = torch.rand(2, 9)
    monkeypatch.setenv("MEDFAST_BACKEND", "cpp")
    with pytest.raises(RuntimeError, match="attention_mask.*no C\\+\\+ kernel; with no backend asked for"):
        mk.attention_mask(attention, 0.5)
    with pytest.raises(RuntimeError, match="class_attention.*no C\\+\\+ kernel"):
        mk.class_attention(torch.zeros(1, 1, 4), *torch.zeros(2, 1, 3, 1, 4))
    whatever = mk.reference.attention_mask(attention, 0.5)[0]  # the definition runs whatever is asked for
    monkeypatch.delenv("MEDFAST_BACKEND")
    assert torch.equal(mk.attention_mask(attention, 0.5)[0], whatever)


@cpp_only
def test_the_definitions_never_ask(monkeypatch):
    def refuse(*_):
        raise AssertionError("a definition asked for a backend")

    for module in (_dispatch, mk.window, mk.random):
        monkeypatch.setattr(module, "choose", refuse)
    key = mk.Key(1, sample=torch.arange(2))
    mk.reference.random_normal(3, key=key)
    mk.reference.random_ids(4, 2, key=key)
    mk.reference.random_keep(0.5, key=key)
    mk.reference.attention_mask(torch.rand(2, 9), 0.5, hint=0.2)
    mk.reference.window_attention(torch.zeros(2, 2, 2, 3, 1, 4), window=2, dropout=0.5, key=key)


def test_a_library_that_does_not_load_is_named_and_passed_over(tmp_path):
    package = tmp_path / "medfast_kernels"
    shutil.copytree(_dispatch._LIBRARY.parent, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (package / "_csrc.so").write_bytes(b"cut short")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    env.pop("MEDFAST_BACKEND", None)

    def python(*arguments):
        return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, check=False)

    table = python("-m", "medfast_kernels")
    assert table.returncode == 0 and "_csrc.so does not load: " in table.stdout, table.stderr
    call = "mk.window_attention(torch.zeros(1, 2, 2, 3, 1, 4), window=2)"
    done = python("-c", f"import torch, medfast_kernels as mk; {call}\nwith mk.backend('cpp'): {call}")
    assert done.returncode == 1 and "RuntimeError: backend 'cpp' is not there: _csrc.so does not load" in done.stderr


def test_without_the_library_the_reference_runs_and_cpp_is_refused(monkeypatch):
    monkeypatch.setattr(_dispatch, "WHY_NO_CPP", "_csrc.so is not built")
    assert _dispatch.choose("window_attention", CPU) == "reference"
    assert mk.window_attention(torch.zeros(1, 2, 2, 3, 1, 4), window=2).shape == (1, 2, 2, 4)
    with pytest.raises(RuntimeError, match="not built"), mk.backend("cpp"):
        pass


def test_the_table_names_every_operator(capsys):
    from medfast_kernels.__main__ import main

    main()
    printed = capsys.readouterr().out
    assert all(name in printed for name in _dispatch.OPERATORS) and "no C++ kernel" in printed


def test_a_copy_under_another_name_loads_beside(tmp_path):
    """Vendored: the same folder inside another package, in one process."""
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / "__init__.py").touch()
    (tmp_path / "host" / "kernels").symlink_to(_dispatch._LIBRARY.parent)
    code = f"""
import sys
sys.path[:0] = {[str(tmp_path), str(_dispatch._LIBRARY.parents[1])]}
import torch, medfast_kernels, host.kernels
print(host.kernels.attention_mask(torch.rand(1, 9), 0.5)[0].sum())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "tensor(4)" in done.stdout, done.stderr
