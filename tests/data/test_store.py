"""Reading a store: hashes, torn lines, refusals."""

import json
import pickle

import numpy as np
import pytest

from medfast.data.store import DataError, Store, append, digest, read_lines, recipe_hash, verify, write_durably


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "volumes").mkdir()
    about = {"format": "medfast store", "version": 1, "recipe": {"spacing": 2.0}}
    (tmp_path / "STORE.json").write_text(json.dumps(about))
    for name in ("bb", "aa"):
        file = tmp_path / "volumes" / f"{name}.npy"
        np.save(file, np.arange(16**3, dtype=np.int16).reshape(16, 16, 16) + ord(name[0]))
        row = {"id": name, "shape": [16] * 3, "hash": digest(file), "bytes": file.stat().st_size, "body": [0] * 6}
        append(tmp_path / "index.jsonl", row)
    return tmp_path


def test_reads_what_is_there(folder):
    store = Store(folder)
    assert len(store) == 2 and [r["id"] for r in store.records] == ["aa", "bb"] and store.recipe == {"spacing": 2.0}
    volume = store.volume(1)
    assert isinstance(volume, np.memmap) and volume.dtype == np.int16 and volume[0, 0, 0] == ord("b")
    assert not volume.flags.writeable
    assert pickle.loads(pickle.dumps(store)).volume(0)[0, 0, 1] == ord("a") + 1
    assert verify(store) == 2


def test_a_flipped_bit_is_found(folder):
    file = folder / "volumes" / "bb.npy"
    data = bytearray(file.read_bytes())
    data[-100] ^= 4
    file.write_bytes(data)
    store = Store(folder)
    assert store.volume(0) is not None
    with pytest.raises(DataError, match="bb is not what was written"):
        store.volume(1)
    with pytest.raises(DataError, match="(?s)1 problems among 2.*bb.*Delete.*medfast data prepare"):
        verify(store)


def test_missing_and_cut_volumes(folder):
    (folder / "volumes" / "aa.npy").unlink()
    file = folder / "volumes" / "bb.npy"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(DataError, match="(?s)2 problems among 2.*missing.*bytes"):
        verify(Store(folder))


def test_refuses_what_is_no_store(tmp_path, folder):
    with pytest.raises(DataError, match="medfast data prepare"):
        Store(tmp_path / "nothing")
    (folder / "STORE.json").write_text('{"format": "medfast store", "version": 99}')
    with pytest.raises(DataError, match="99"):
        Store(folder)


def test_a_torn_line_is_no_line_and_is_cut_off_by_the_next(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert read_lines(file) == []
    append(file, {"a": 1})
    with file.open("ab") as stream:
        stream.write(b'{"a": 2, "tor')
    assert read_lines(file) == [{"a": 1}]
    append(file, {"a": 3})
    assert read_lines(file) == [{"a": 1}, {"a": 3}]
    file.write_bytes(b'{"only": "torn"')
    append(file, {"a": 4})
    assert read_lines(file) == [{"a": 4}]
    file.write_bytes(b"{broken}\n")
    with pytest.raises(DataError, match="line 1 of .*rows.jsonl is damaged"):
        read_lines(file)


@pytest.mark.parametrize("damage", [b"{", b"[]", b"\xff{}", b"{}", b'{"format": "medfast store", "version": 1}'])
def test_a_damaged_description_names_the_file_and_the_way_out(folder, damage):
    (folder / "STORE.json").write_bytes(damage)
    with pytest.raises(DataError, match=r"STORE\.json is damaged.*Delete.*medfast data prepare"):
        Store(folder)


@pytest.mark.parametrize("damage", [b"{", b"[]", b"\xff{}", b'{"id": "cc"}'])
def test_a_damaged_line_names_the_file_and_the_way_out(folder, damage):
    with (folder / "index.jsonl").open("ab") as stream:
        stream.write(damage + b"\n")
    with pytest.raises(DataError, match=r"line 3 of .*index\.jsonl is damaged.*medfast data prepare"):
        Store(folder)


def test_write_reports_what_the_disk_holds(tmp_path, monkeypatch):
    assert write_durably(tmp_path / "a", b"abc") == digest(tmp_path / "a")
    monkeypatch.setattr("medfast.data.files.digest", lambda _: "0" * 64)
    with pytest.raises(DataError, match="check the disk"):
        write_durably(tmp_path / "b", b"abc")


def test_recipe_hash_ignores_order_and_sees_values():
    assert recipe_hash({"a": 1, "b": 2}) == recipe_hash({"b": 2, "a": 1}) != recipe_hash({"a": 1, "b": 3})
