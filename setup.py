"""Packages and C++ operators; everything else is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import find_packages, setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))
from build_csrc import extension

setup(
    packages=[*find_packages(include=["medfast", "medfast.*"]), *find_packages("kernels")],
    package_dir={"medfast_kernels": "kernels/medfast_kernels"},
    package_data={"medfast_kernels": ["_triton/*.json", "_verdicts/*.json"]},
    **extension(),
)
