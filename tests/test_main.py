"""The command line, end to end: volumes to store to run to report, exit codes, and no source name in between."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medfast import __main__ as cli
from medfast.__main__ import main
from medfast.data.phantom import write_phantoms

DEMO = str(Path(__file__).parents[1] / "configs" / "demo.yaml")
ROOT = Path(__file__).parents[1]
SECRETS = (b"ZYXWPATIENT", b"DOEJOHNSECRET", b"AUXSECRET")


def medfast(*arguments):
    """The command in a process of its own: DeepSpeed keeps the process group of the first run of a process."""
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "medfast", *arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two phantoms with planted names, prepared, trained on for three steps through DeepSpeed, reported on."""
    root = tmp_path_factory.mktemp("job")
    write_phantoms(root / "in", 2, seed=3)
    for number, path in enumerate(sorted((root / "in").iterdir())):
        image = nibabel.load(path)
        image.header["descrip"], image.header["aux_file"] = b"DOEJOHNSECRET", b"AUXSECRET"
        named = root / "in" / f"ZYXWPATIENT{number}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(np.asanyarray(image.dataobj), image.affine, image.header), named)
        path.unlink()
    (root / "in" / "broken.nii.gz").write_text("no image")
    assert main(["data", "prepare", str(root / "in"), "--store", str(root / "store"), "--max-bad", "1"]) == 0
    command = ["pretrain", DEMO, "--tiny", "--steps", "3", f"data.store={root / 'store'}", f"out={root / 'run'}"]
    done = medfast(*command, "train.checkpoint_every=2")
    assert done.returncode == 0, done.stderr
    assert main(["report", str(root / "run")]) == 0
    return root


def test_a_run_leaves_what_the_manual_promises(run):
    folder = run / "run"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert set(rows[0]["loss"]) == {"amip", "ampd", "aitd", "gitd"}
    assert "validation" in rows[-1] and "rank_student" in rows[-1]["gauge"]
    assert (folder / "ckpt" / "latest").read_text().strip() == "step_00000003"
    for name in ("config.resolved.yaml", "env.json", "train.log", "report/index.html"):
        assert (folder / name).exists(), name


def test_a_step_is_replayed_bit_for_bit_from_the_run_folder(run):
    done = medfast("replay", str(run / "run"), "--step", "2")
    assert done.returncode == 0 and "the same as the run wrote down, bit for bit" in done.stdout, done.stderr
    assert (run / "run" / "replay" / "step_00000002_rank_00000.safetensors").exists()
    assert main(["replay", str(run / "run"), "--step", "3"]) == 2


def test_no_name_and_no_header_text_leaves_private(run):
    files = [p for p in run.rglob("*") if p.is_file() and "in" not in p.parts[-2:] and "private" not in p.parts]
    assert len(files) > 12
    leaks = [(str(p), s) for p in files for s in SECRETS if s in p.read_bytes() or s.decode() in str(p)]
    assert not leaks
    assert b"ZYXWPATIENT0" in (run / "store" / "private" / "sources.jsonl").read_bytes()


def test_a_finished_run_resumes_to_nothing_and_other_settings_are_refused(run):
    before = (run / "run" / "metrics.jsonl").read_text()
    command = [
        "pretrain",
        DEMO,
        "--tiny",
        "--steps",
        "3",
        f"data.store={run / 'store'}",
        f"out={run / 'run'}",
        "train.strategy=ddp",
    ]  # the checkpoint is DeepSpeed's run's: it belongs to no strategy
    done = medfast(*command)
    assert done.returncode == 0, done.stderr
    assert (run / "run" / "metrics.jsonl").read_text() == before
    done = medfast(*command, "optim.lr=1e-2")
    assert done.returncode == 2 and "optim.lr" in done.stderr


def test_verify_finds_a_flipped_bit(run, capsys, tmp_path):
    assert main(["data", "verify", str(run / "store")]) == 0
    assert "2 volumes" in capsys.readouterr().out
    volume = next((run / "store" / "volumes").glob("*.npy"))
    whole = volume.read_bytes()
    try:
        volume.write_bytes(whole[:5000] + bytes([whole[5000] ^ 4]) + whole[5001:])
        assert main(["data", "verify", str(run / "store")]) == 3
        assert volume.stem in capsys.readouterr().err
    finally:
        volume.write_bytes(whole)


def test_no_usable_volume_exits_3_with_a_sentence(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.nii.gz").write_text("no image")
    assert main(["data", "prepare", str(tmp_path / "in"), "--store", str(tmp_path / "s"), "--max-bad", "1"]) == 3
    assert "no usable volume" in capsys.readouterr().err


def test_usage_errors_are_sentences(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "is no run folder" in capsys.readouterr().err
    assert main(["pretrain", DEMO, f"data.store={tmp_path}", f"out={tmp_path / 'r'}"]) in (2, 3)
    assert str(tmp_path) in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", DEMO, "--tinny"])
    assert stop.value.code == 2


def test_doctor_prints(capsys):
    assert main(["doctor"]) == 0
    assert "window_attention" in capsys.readouterr().out


def test_bench_runs_scripts_that_exist_and_stops_at_the_first_that_fails(monkeypatch):
    calls = []

    class Done:
        returncode = 0

    def run(command, check):
        calls.append(Path(command[1]))
        done = Done()
        done.returncode = 7 if len(calls) == 3 else 0
        return done

    for what in cli.BENCHMARKS:
        calls += [Path(cli.__file__).parents[1] / "benchmarks" / f"{name}.py" for name in cli.BENCHMARKS[what]]
    assert all(path.is_file() for path in calls)
    calls.clear()
    monkeypatch.setattr(cli.subprocess, "run", run)
    assert cli.main(["bench", "kernels"]) == 7
    assert [path.stem for path in calls] == list(cli.BENCHMARKS["kernels"][:3])
