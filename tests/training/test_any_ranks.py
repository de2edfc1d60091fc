"""1, 2, 3 and 4 ranks train the same run, with and without accumulation, whatever an objective takes over the batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from any_ranks import BUILD, CASES

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(ranks, micro-batch) -> what each rank has after the step, by objective and number."""
    folder = tmp_path_factory.mktemp("ranks")
    path = os.pathsep.join([str(HERE.parents[1] / "kernels"), str(HERE.parents[1])])
    command = [sys.executable, str(HERE / "any_ranks.py"), str(folder)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=240)  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return {
        (ranks, micro): [torch.load(folder / f"{ranks}x{micro}_{rank}.pt", weights_only=True) for rank in range(ranks)]
        for ranks, cases in CASES.items()
        for micro in cases
    }


@pytest.mark.parametrize("name", BUILD)
def test_any_ranks_take_the_same_step(found, name):
    expected = {key: x for key, x in found[1, 12][0].items() if key.startswith(f"{name}, ")}
    assert any("groups of 12" in key for key in expected) and any("exp_avg" in key for key in expected)
    for case, ranks in found.items():
        for rank, made in enumerate(ranks):
            own = {key: x for key, x in made.items() if key.startswith(f"{name}, ")}
            group = "12" if case[0] * case[1] == 12 else "2"
            assert len(own) == sum(f"groups of {group}:" in key for key in expected) or case == (1, 12)
            for key, value in own.items():
                torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-13, msg=f"{case}, {rank}, {key}")


def test_groups_change_what_is_trained(found):
    """Else the test above would show nothing of groups."""
    for name in ("simclr", "byol", "moco_v3", "simprot", "simprot_w", "btrot", "rcr", "swinfuse"):
        whole = found[1, 12][0]
        keys = [key for key in whole if key.startswith(f"{name}, groups of 2: loss/")]
        assert any(whole[key] != whole[key.replace("groups of 2", "groups of 12")] for key in keys), name
