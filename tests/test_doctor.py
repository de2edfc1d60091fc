import importlib.util
import os
import sys
from pathlib import Path

import pytest

from medfast import doctor as module
from medfast.doctor import PARTS, doctor

REAL_FIND = importlib.util.find_spec


@pytest.fixture
def hide(monkeypatch):
    """Make packages look as if they were not installed."""

    def hidden(*names):
        def find(name, package=None):
            return None if name.split(".")[0] in names else REAL_FIND(name, package)

        monkeypatch.setattr(importlib.util, "find_spec", find)

    return hidden


def line_with(text, name):
    return next(line for line in text.splitlines() if name in line.split())


def test_all_sections_are_there_and_none_failed():
    text = doctor()
    assert all(f"{title}\n" in text for title in ("Machine", "Packages", "Kernels", "Advice"))
    assert "could not be looked at" not in text
    for name in ("python", "cores", "device", "memory"):
        assert line_with(text, name)


def test_installed_packages_show_their_version():
    import numpy

    assert numpy.__version__ in line_with(doctor(), "numpy") and line_with(doctor(), "numpy").split()[0] == "ok"


@pytest.mark.parametrize("part", [p for p in PARTS if p.module not in ("torch", "numpy")], ids=lambda p: p.module)
def test_a_missing_package_is_named_with_what_it_would_add_and_how_to_get_it(hide, part):
    hide(part.module.split(".")[0])
    line = line_with(doctor(), part.module)
    assert line.split()[0] == "missing" and part.adds in line and part.pip in line


def test_a_part_said_to_build_the_operators_is_one_that_their_build_uses():
    script = (Path(__file__).parents[1] / "csrc" / "build_csrc.py").read_text()
    assert all(part.module in script for part in PARTS if "csrc" in part.adds)


def test_without_anything_it_still_speaks(hide, monkeypatch):
    hide(*(part.module.split(".")[0] for part in PARTS))
    monkeypatch.setitem(sys.modules, "medfast_kernels._dispatch", None)
    text = doctor()
    assert "unknown: torch is not installed" in text and "could not be looked at" in text
    assert 'pip install "medfast[train]"' in text.split("Advice")[1]


def test_each_operator_has_a_backend_and_a_reason():
    from medfast_kernels import _dispatch

    text = doctor().split("Kernels")[1]
    for operator in _dispatch.OPERATORS:
        assert any(name in line_with(text, operator).split() for name in _dispatch.BACKENDS)
    assert "C++ kernels: " in text


def test_a_backend_that_cannot_run_is_reported_not_raised(monkeypatch):
    monkeypatch.setenv("MEDFAST_BACKEND", "nonsense")
    text = doctor()
    assert "MEDFAST_BACKEND=nonsense" in text and "could not be looked at" not in text
    assert "none" in line_with(text, "window_attention").split()


def test_missing_kernels_say_why(monkeypatch):
    from medfast_kernels import _dispatch

    monkeypatch.setattr(_dispatch, "WHY_NO_CPP", "nobody built it")
    monkeypatch.setattr(_dispatch, "facts", dict)
    text = doctor()
    assert "C++ kernels: not there: nobody built it" in text
    assert "reference" in line_with(text, "window_attention").split()


def test_allocator_advice_is_given_only_where_it_is_not_followed(monkeypatch):
    monkeypatch.setattr(module.sys, "platform", "linux")
    monkeypatch.setattr(module.platform, "libc_ver", lambda: ("glibc", "2.36"))
    for name in module.MALLOC:
        monkeypatch.delenv(name, raising=False)
    assert "MALLOC_MMAP_THRESHOLD_=1073741824" in doctor()
    for name, value in module.MALLOC.items():
        monkeypatch.setenv(name, value)
    assert "MALLOC_" not in doctor()
    assert os.environ["MALLOC_TRIM_THRESHOLD_"] == "1073741824"
