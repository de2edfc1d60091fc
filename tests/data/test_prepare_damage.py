"""Preparing that is killed, over a damaged store, on a disk that fails: nothing is lost, the next run repairs."""

import os
import signal
import subprocess
import sys
import time

import pytest
from scans import ct, nifti

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


def test_a_failing_disk_stops_the_run(tmp_path, monkeypatch):
    good(tmp_path / "input", "a.nii.gz")

    def full(file, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("medfast.data.prepare.write_durably", full)
    with pytest.raises(OSError, match="No space"):
        prepare(tmp_path / "input", tmp_path / "store", max_bad=1, progress=False)
