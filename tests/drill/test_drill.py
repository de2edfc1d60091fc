"""The quick injections for real, and the judge that must see through a run that only seems to have come through."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from medfast.__main__ import main
from medfast.drill import command, disk, judge, process, scene, table
from medfast.drill.judge import Expected
from medfast.drill.process import Outcome

ROOT = Path(__file__).parents[2]
NAMED = {  # by the people who run clusters
    "truncated store file", "bit-flipped store file", "full disk", "read-only checkpoint folder", "killed worker",
    "hung worker", "killed rank", "NaN gradient", "Inf voxel", "SIGTERM while saving", "stale lock", "missing rank",
    "slow disk", "clock jump", "damaged newest checkpoint", "wrong recipe",
}  # fmt: skip


@pytest.fixture(scope="module")
def played(tmp_path_factory) -> tuple[subprocess.CompletedProcess, list[dict]]:
    """The quick subset, in a process that has never computed anything, as a shell would start it."""
    out = tmp_path_factory.mktemp("drill")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-m", "medfast", "drill", str(ROOT / "configs" / "demo.yaml"), "--quick", "--out", str(out)],
        env=env, capture_output=True, text=True, timeout=1500, check=False,
    )  # fmt: skip
    return done, [json.loads(line) for line in (out / "drill.jsonl").read_text().splitlines()]


def test_the_quick_injections_go_as_expected(played):
    done, rows = played
    wrong = [row for row in rows if row["ok"] is False]
    assert done.returncode == 0 and not wrong, f"{json.dumps(wrong, indent=1)}\n{done.stderr[-3000:]}"
    assert sum(row["ok"] is True for row in rows) >= 6


def test_every_injection_has_its_line_and_is_told_while_it_runs(played):
    done, rows = played
    assert [set(row) for row in rows] == [{"fault", "injected_at", "expected", "got", "ok"}] * len(rows)
    assert len(rows) == sum(x.quick for x in table.injections())
    for number, row in enumerate(rows, 1):
        assert f"[{number}/{len(rows)}]" in done.stdout and row["fault"] in done.stdout


def test_the_table_has_the_faults_that_were_asked_for_each_in_the_docs():
    faults = [x.fault for x in table.injections()]
    assert set(faults) >= NAMED and len(faults) >= 60
    assert len({(x.fault, x.at) for x in table.injections()}) == len(faults)
    assert all(
        x.expected.words for x in table.injections() if not {0, -9} & {*x.expected.codes}
    )  # a typed exit tells why
    page = (ROOT / "docs" / "drill.md").read_text()
    assert not [fault for fault in {*faults} if f"| {fault} |" not in page]


@pytest.mark.parametrize(
    ("expected", "code", "text", "ok"),
    [
        (Expected((3,), "bytes"), 3, "medfast: volume a has 3 bytes\n", True),
        (Expected((3,), "bytes"), 2, "medfast: volume a has 3 bytes\n", False),
        (Expected((3,), "bytes"), 3, "medfast: something is wrong\n", False),
        (Expected((3,), "bytes"), 3, f"{judge.TRACE}\nmedfast: volume a has 3 bytes\n", False),
        (Expected((3,), "bytes"), 1, f"{judge.TRACE}\nKeyError: 'bytes'\n", False),
        (Expected((3,), "bytes"), None, "", False),
        (Expected((3,), "bytes"), -11, "volume a has 3 bytes", False),
        (Expected((-9,), "", "again"), -9, "", True),
        (Expected((-9,), "", "again"), 0, "", False),
    ],
)
def test_an_end_is_right_with_its_code_its_sentence_and_no_traceback(expected, code, text, ok):
    assert expected.first(Outcome({0: code}, text, 1.0), set())[0] is ok


def test_all_ranks_but_the_one_that_was_struck_are_judged():
    outcome = Outcome({0: 69, 1: -9}, "rank 1 is dead\n", 1.0)
    assert Expected((69,), "rank 1").first(outcome, {1})[0]
    assert not Expected((69,), "rank 1").first(outcome, {0})[0]


def _run_folder(folder: Path, weight: bytes = b"w", rows: int = 6) -> Path:
    last = folder / "ckpt" / "step_00000006"
    last.mkdir(parents=True)
    (last / "student.safetensors").write_bytes(weight)
    (last / "COMPLETE").touch()
    lines = [
        {"step": step, "total": 1.0, "grad_norm": 1.0, "time": {"step_s": time.perf_counter()}} for step in range(rows)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _played(tmp_path: Path, then: str, spoil) -> dict:
    """The line of an injection whose command ends with 0 and leaves what ``spoil`` makes of the fault-free run."""
    (tmp_path / "store").mkdir()
    reference = _run_folder(tmp_path / "reference")
    injection = scene.Injection("a fault", "step 3", Expected((0,), "", then))
    setup = scene.Setup(
        lambda _: 0, Path("x.yaml"), (), tmp_path, tmp_path / "store", {(1, "torch"): (reference, 1.0)}, mounts=False
    )
    stage = scene.Scene(setup, injection, tmp_path / "scene")
    spoil(stage.run)
    return stage.play()


def test_a_run_that_ends_well_with_other_weights_is_a_silent_deviation(tmp_path):
    row = _played(tmp_path, "same", lambda run: _run_folder(run, b"v"))
    assert not row["ok"] and "DEVIATES from the fault-free result in student.safetensors" in row["got"]


def test_a_run_whose_metrics_lack_a_step_deviates(tmp_path):
    row = _played(tmp_path, "same", lambda run: _run_folder(run, rows=5))
    assert not row["ok"] and "metrics.jsonl" in row["got"]


def test_a_run_without_its_last_checkpoint_deviates(tmp_path):
    row = _played(tmp_path, "same", lambda run: (_run_folder(run) / "ckpt" / "step_00000006" / "COMPLETE").unlink())
    assert not row["ok"] and "DEVIATES" in row["got"]


def test_the_same_bits_are_the_same(tmp_path):
    assert _played(tmp_path, "same", _run_folder)["ok"]


def test_a_skipped_step_that_the_metrics_do_not_mention_is_a_silent_deviation(tmp_path):
    row = _played(tmp_path, "skipped", lambda run: _run_folder(run, b"v"))
    assert not row["ok"] and "steps [] were skipped" in row["got"]


def test_a_process_that_hangs_is_ended_and_one_that_is_killed_says_so(tmp_path):
    ways = {"0": lambda: 7, "1": lambda: os.kill(os.getpid(), signal.SIGKILL), "2": lambda: time.sleep(60)}
    found = process.run(lambda _: ways[os.environ["RANK"]](), [], tmp_path / "log", limit=3.0, ranks=3)
    assert found.codes == {0: 7, 1: -9, 2: None} and found.seconds < 20
    spared = process.run(lambda _: ways[os.environ["RANK"]](), [], tmp_path / "log", limit=30.0, ranks=3, victims={2})
    assert spared.codes[0] == 7 and spared.seconds < 20


def test_one_bit_is_one_bit(tmp_path):
    file = tmp_path / "volume"
    file.write_bytes(bytes(9))
    stamp = file.stat().st_mtime_ns
    disk.flip(file, 0.5, 3)
    assert file.read_bytes() == bytes(4) + b"\x08" + bytes(4) and file.stat().st_mtime_ns == stamp


def test_what_the_drill_needs_is_not_overridden_and_unknown_names_are_told(tmp_path, capsys):
    arguments = ["drill", str(ROOT / "configs" / "demo.yaml"), "--out", str(tmp_path)]
    assert main([*arguments, "train.steps=9"]) == 2
    assert "train.steps=9: the drill sets out" in capsys.readouterr().err
    assert main([*arguments, "--only", "earthquake"]) == 2
    assert "clock jump" in capsys.readouterr().err


def test_what_a_machine_lacks_is_not_called_ok(tmp_path):
    needs = replace(next(x for x in table.injections() if x.needs_mounts), verb="prepare")
    setup = scene.Setup(lambda _: 0, Path("x.yaml"), (), tmp_path, tmp_path, {}, mounts=False)
    row = command._play(setup, needs, tmp_path / "scene")
    assert row["ok"] is None and "not tried" in row["got"]
