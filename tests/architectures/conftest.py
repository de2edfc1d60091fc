"""Tests here share ``weights``: tests are no packages, so the folder itself goes on the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
