"""Preparing that is killed, over a damaged store, on a disk that fails: nothing is lost, the next run repairs."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from scans import ct, nifti

from medfast.__main__ import main
from medfast.data.files import WriteFailed, append, write_durably
from medfast.data.prepare import prepare
from medfast.data.store import DataError, Store, verify


def good(folder, name, seed=0):
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(nifti(ct(seed, (40, 44, 50)), compress=True))


def test_killed_and_resumed(tmp_path):
    folder, store = tmp_path / "input", tmp_path / "store"
    for number in range(6):
        good(folder, f"{number}.nii.gz", seed=number)
    # The writer sleeps between a volume and its line, the worst moment there is.
    program = f"""
import time
from medfast.data import ledger, prepare
append, seen = ledger.append, []
def slow(file, row):
    seen.append(file)
    time.sleep(60 if len(seen) == 5 else 0)
    append(file, row)
ledger.append = slow
prepare.prepare({str(folder)!r}, {str(store)!r})
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen([sys.executable, "-c", program], env=environment)
    end = time.monotonic() + 120
    while len(list(store.glob("volumes/*.npy"))) < 3 and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.2)
    with pytest.raises(DataError, match="another run"):
        prepare(folder, store, progress=False)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert len(list(store.glob("volumes/*.npy"))) == 3 and len(Store(store)) == 2
    with (store / "index.jsonl").open("ab") as stream:
        stream.write(b'{"id": "to')
    with pytest.raises(DataError, match="(?s)1 problems.*is of no line of the index.*medfast data prepare"):
        verify(Store(store))
    summary = prepare(folder, store, progress=False)
    assert len(summary.good) == 6 and summary.new == 4 and verify(Store(store)) == 6
    assert not (store / ".tmp").exists()


def test_damage_is_repaired_by_the_next_run(tmp_path):
    folder, store = tmp_path / "input", tmp_path / "store"
    good(folder, "a.nii.gz")
    prepare(folder, store, progress=False)
    Store(store).file(0).unlink()
    (store / "volumes" / "orphan.npy").write_bytes(b"no line")
    assert prepare(folder, store, progress=False).new == 1
    assert verify(Store(store)) == 1 and not (store / "volumes" / "orphan.npy").exists()


@pytest.mark.parametrize("way", ["cut", "bit", "line"])
def test_what_the_message_says_repairs_the_store(tmp_path, way):
    folder, store = tmp_path / "input", tmp_path / "store"
    for number in range(2):
        good(folder, f"{number}.nii.gz", seed=number)
    prepare(folder, store, progress=False)
    whole, file = (store / "index.jsonl").read_bytes(), Store(store).file(1)
    if way == "line":
        (store / "index.jsonl").write_bytes(whole.replace(b'"id"', b'"iq"', 1))
    else:
        data = bytearray(file.read_bytes())
        data[-9] ^= 8
        file.write_bytes(data if way == "bit" else data[:-50])
    with pytest.raises(DataError, match="medfast data prepare") as caught:
        verify(Store(store))
    if "Delete" in str(caught.value):
        file.unlink()
    assert prepare(folder, store, progress=False).new == 1 and verify(Store(store)) == 2
    assert sorted((store / "index.jsonl").read_bytes().splitlines()) == sorted(whole.splitlines())


def test_a_damaged_description_stops_the_writer(tmp_path):
    folder, store = tmp_path / "input", tmp_path / "store"
    good(folder, "a.nii.gz")
    prepare(folder, store, progress=False)
    (store / "STORE.json").write_text("{")
    with pytest.raises(DataError, match=r"STORE\.json is damaged"):
        prepare(folder, store, progress=False)


@contextmanager
def largest_file(size):
    """Real failures of writing, as on a full disk, of files larger than ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def names(store):
    return sorted(str(file.relative_to(store)) for file in store.rglob("*") if file.is_file())


def test_a_full_disk_stops_the_run_by_name_and_leaves_nothing_half_written(tmp_path, capsys):
    folder, store = tmp_path / "input", tmp_path / "store"
    good(folder, "a.nii.gz")
    with largest_file(4096):
        code = main(["data", "prepare", str(folder), "--store", str(store), "--max-bad", "1", "--jobs", "1"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert code == 74 and re.search(r"store/\.tmp/0\.volumes could not be written: File too large; it takes "
                                    r"0\.\d MB, \d+\.\d MB are free there", said)  # fmt: skip
    assert names(store) == [".lock", "STORE.json"]
    assert prepare(folder, store, progress=False).new == 1 and verify(Store(store)) == 1


def test_no_half_of_a_file_is_left(tmp_path):
    with largest_file(100), pytest.raises(WriteFailed, match="half could not be written: File too large"):
        write_durably(tmp_path / "half", bytes(1000))
    assert not list(tmp_path.iterdir())


def test_a_volume_whose_line_finds_no_room_is_not_left_behind(tmp_path, monkeypatch):
    folder, store = tmp_path / "input", tmp_path / "store"
    good(folder, "a.nii.gz")
    prepare(folder, store, progress=False)
    before = names(store)
    good(folder, "b.nii.gz", seed=1)

    def full(file, row):
        with largest_file(file.stat().st_size + 20):
            append(file, row)

    monkeypatch.setattr("medfast.data.ledger.append", full)
    index = (store / "index.jsonl").read_bytes()
    with pytest.raises(WriteFailed, match=r"index\.jsonl could not be written: File too large"):
        prepare(folder, store, progress=False)
    assert (store / "index.jsonl").read_bytes() == index and names(store) == before and verify(Store(store)) == 1
    monkeypatch.undo()
    assert prepare(folder, store, progress=False).new == 1 and verify(Store(store)) == 2
