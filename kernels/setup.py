"""medfast_kernels as a distribution of its own, with the C++ operators of ../csrc; its source archive carries them."""

import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist

HERE = Path(__file__).resolve().parent
CSRC = next(folder for folder in (HERE / "csrc", HERE.parent / "csrc") if folder.is_dir())
sys.path.insert(0, str(CSRC))
from build_csrc import extension  # noqa: E402

options = extension()


class Archive(sdist):
    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        shutil.copytree(CSRC, Path(base_dir, "csrc"), ignore=shutil.ignore_patterns("__pycache__", "*.o", "*.so"))


options["cmdclass"] = {**options.get("cmdclass", {}), "sdist": Archive}
setup(
    packages=find_packages(".", include=["medfast_kernels", "medfast_kernels.*"]),
    package_data={"medfast_kernels": ["_triton/*.json", "_verdicts/*.json"]},
    **options,
)
