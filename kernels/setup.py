"""medfast_kernels as a distribution of its own, with the C++ operators of ../csrc."""

import sys
from pathlib import Path

from setuptools import find_packages, setup

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "csrc"))
from build_csrc import extension

setup(packages=find_packages("."), **extension())
