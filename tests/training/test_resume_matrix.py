"""A few pairs of benchmarks/resume_matrix.py, which tries all of them: a checkpoint of SMART loaded elsewhere."""

import json
import os
import subprocess
import sys

from ranks import ROOT


def test_a_run_is_the_same_run_on_other_ranks_at_another_stage(tmp_path):
    path = os.pathsep.join(map(str, (ROOT / "kernels", ROOT)))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MEDFAST_COMMIT": "tested", "PYTHONPATH": path}
    command = [sys.executable, str(ROOT / "benchmarks/resume_matrix.py"), "--quick", "--out", str(tmp_path / "m.md")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rows = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    kept = ("student", "teacher", "optimizer", "state", "samples", "masks")
    assert len(rows) == 5 and all(row[what] for row in rows for what in kept)
    assert sum(row.get("bits", False) for row in rows) == 2 and max(row["loss"] for row in rows) <= 1e-6
    assert "| 2 ranks, stage 3 |" in (tmp_path / "m.md").read_text()
