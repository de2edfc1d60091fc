"""Who runs what: the choice, what overrules it, and what it says."""

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
