import sys
from pathlib import Path

import pytest
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))  # tiny_task and two_ranks are no tests, and tests/ is no package


@pytest.fixture(scope="session", autouse=True)
def one_process_group():
    """Around all runs of the session, see ``medfast.training.distributed.world``."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
