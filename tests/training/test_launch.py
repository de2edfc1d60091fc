"""Ranks from the environments of launchers, and the job script's decisions."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import ROOT

from medfast.training import distributed
from medfast.training.launch import first_host, ranks, same_rank

TASK = {
    "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "32", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "2", "SLURM_STEP_NODELIST": "gpu[003-006]", "SLURM_JOB_NODELIST": "gpu[001-008]",
    "SLURM_NTASKS": "64",
}  # fmt: skip


def test_a_task_of_srun_is_a_rank_of_its_step():
    assert ranks(TASK) == {
        "RANK": "5", "WORLD_SIZE": "32", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu003",
        "MASTER_PORT": str(20_000 + (123_456 + 2 * 7919) % 20_000),
    }  # fmt: skip


def test_what_is_set_holds_and_other_launchers_win():
    found = ranks({**TASK, "MASTER_ADDR": "head", "MASTER_PORT": "1234"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("head", "1234")
    assert ranks({**TASK, "RANK": "0", "WORLD_SIZE": "2"}) == {}
    batch_script = {name: x for name, x in TASK.items() if "STEP" not in name}
    assert ranks(batch_script) == ranks({}) == {}


def test_jobs_and_steps_have_ports_of_their_own_below_the_ephemeral_ones():
    ports = {ranks({**TASK, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})["MASTER_PORT"]
             for job in range(500, 520) for step in range(3)}  # fmt: skip
    assert len(ports) == 60 and all(20_000 <= int(port) < 40_000 for port in ports)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("gpu[003-005,9],login", "gpu003"), ("a100-1", "a100-1"), ("n1,n2", "n1"), ("rack[2,4]-ib", "rack2-ib"),
     ("node[07]", "node07"), ("login,gpu[1-2]", "login")],
)  # fmt: skip
def test_the_first_host_of_a_list(hosts, first):
    assert first_host(hosts) == first


@pytest.mark.parametrize("hosts", ["", "gpu[1-2", "a[1]b[2]"])
def test_a_list_that_cannot_be_read_says_what_to_set(hosts):
    with pytest.raises(ValueError, match="MASTER_ADDR"):
        first_host(hosts)


def test_deepspeed_s_local_rank_must_be_the_environment_s():
    same_rank(None, {})
    same_rank(3, {"LOCAL_RANK": "3"})
    with pytest.raises(ValueError, match="--local_rank=3, but LOCAL_RANK=None"):
        same_rank(3, {})


@pytest.mark.parametrize(("local", "count", "task", "device"), [(3, 8, True, 3), (3, 1, True, 0), (0, 1, False, 0)])
def test_a_rank_takes_its_gpu(monkeypatch, local, count, task, device):
    monkeypatch.setenv("LOCAL_RANK", str(local))
    monkeypatch.delenv("SLURM_LOCALID", raising=False)
    if task:
        monkeypatch.setenv("SLURM_LOCALID", str(local))
    assert distributed._gpu(count).index == device and os.environ["LOCAL_RANK"] == str(device)


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.delenv("SLURM_LOCALID", raising=False)
    with pytest.raises(ValueError, match="LOCAL_RANK=2, but this rank sees 2 GPUs"):
        distributed._gpu(2)


def test_two_tasks_of_srun_find_each_other():
    """The variables that srun sets, on this machine; they add up their ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    code = (
        "import torch; from medfast.training.distributed import world\n"
        "with world(200) as here: print(here.rank, here.size, int(here.total(torch.tensor(here.rank + 1))))"
    )
    env = {name: x for name, x in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {**TASK, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'kernels'}{os.pathsep}{ROOT}"}  # fmt: skip
    tasks = [
        subprocess.Popen([sys.executable, "-c", code], env={**env, "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)},
                         stdout=subprocess.PIPE, text=True)
        for n in (0, 1)
    ]  # fmt: skip
    try:
        told = [task.communicate(timeout=240)[0].split() for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert told == [["0", "2", "3"], ["1", "2", "3"]]


def job(folder: Path, code: int, **more: str) -> tuple[int, str]:
    """(exit code, what scontrol was asked) of the job script where srun ends with ``code``."""
    for name, text in (("srun", f"exit {code}"), ("scontrol", 'echo "$@" >> asked'), ("activate", "")):
        path = folder / ("bin" if name == "activate" else "tools") / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    env = {"PATH": f"{folder / 'tools'}:{os.environ['PATH']}", "VENV": str(folder), "SLURM_JOB_ID": "7", **more}
    done = subprocess.run(["bash", str(ROOT / "docs" / "pretrain.sbatch"), "c.yaml"], cwd=folder, env=env, check=False)
    asked = folder / "asked"
    return done.returncode, asked.read_text().strip() if asked.exists() else ""


@pytest.mark.parametrize(
    ("code", "restarts", "asked"),
    [(0, "0", ""), (75, "0", "requeue 7"), (75, "99", "requeue 7"), (69, "0", "requeue 7"), (69, "20", ""),
     (2, "0", ""), (3, "0", ""), (4, "0", ""), (74, "0", "")],
)  # fmt: skip
def test_the_job_script_requeues_what_can_go_on(tmp_path, code, restarts, asked):
    assert job(tmp_path, code, SLURM_RESTART_COUNT=restarts) == (code, asked)
