"""Tests here share helpers that lie beside them: tests are no packages, so the folder itself goes on the path.

They see no verdict and no tuned configuration of the user.
"""

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ["MEDFAST_CACHE"] = tempfile.mkdtemp(prefix="medfast-tests-")
