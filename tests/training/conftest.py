import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # tiny_task and two_ranks are no tests, and tests/ is no package
