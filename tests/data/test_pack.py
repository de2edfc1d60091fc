"""Packing: resumable, private, refused where it would lie."""

import numpy as np
import pytest
from scans import ct, nifti
from stores import write_store

from medfast.data import pack as packing
from medfast.data.migrate import migrate
from medfast.data.pack import pack
from medfast.data.prepare import prepare
from medfast.data.store import DataError, Header, Store, read_header, read_lines, verify


@pytest.fixture
def store(tmp_path):
    """A prepared store with labels."""
    folder = tmp_path / "in"
    folder.mkdir()
    rows = ["image,label,patient,dataset"]
    for n in range(3):
        (folder / f"{n}.nii").write_bytes(nifti(ct(n).transpose(2, 1, 0)))
        (folder / f"l{n}.nii").write_bytes(nifti((ct(n) > 0).astype(np.uint8).transpose(2, 1, 0)))
        rows.append(f"{n}.nii,l{n}.nii,Mustermann{n // 2},{'LIDC' if n else 'planted'}")
    (folder / "list.csv").write_text("\n".join(rows))
    prepare(folder / "list.csv", tmp_path / "store", progress=False, spacing=1.0)
    return tmp_path / "store"


def test_labels_and_lines_come_along_and_private_does_not(store, tmp_path):
    packed, whole = pack(store, tmp_path / "p", progress=False), Store(store)
    assert [r["id"] for r in packed.records] == [r["id"] for r in whole.records] and packed.recipe == whole.recipe
    for index in range(3):
        assert (packed.volume(index) == whole.volume(index)).all() and (packed.label(index) == whole.label(index)).all()
        new, old = packed.records[index], whole.records[index]
        assert all(new[name] == old[name] for name in ("group", "dataset", "body", "affine", "voxels"))
        assert new["offset"] % 4096 == new["label"]["offset"] % 4096 == 0
    assert len({r["group"] for r in whole.records}) == len({r["dataset"] for r in whole.records}) == 2
    assert not (packed.path / "private").exists()
    for file in (*packed.path.rglob("*"), *store.glob("*"), *store.glob("volumes/*")):
        assert not file.is_file() or not any(word in file.read_bytes() for word in (b"Muster", b"planted", b"LIDC"))
    again = pack(packed.path, tmp_path / "q", plain=True, progress=False)
    assert verify(again) == 3 and again.file(0).read_bytes() == whole.file(0).read_bytes()


@pytest.mark.parametrize("plain", [False, True])
def test_a_killed_run_goes_on(store, tmp_path, monkeypatch, plain):
    options = {"shard_gb": 1e-4, "plain": plain, "progress": False}
    whole = pack(store, tmp_path / "whole", **options)
    real, calls = packing._encoded, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(packing, "_encoded", killed)
    with pytest.raises(KeyboardInterrupt):
        pack(store, tmp_path / "p", **options)
    with pytest.raises(DataError, match="no STORE.json"):
        Store(tmp_path / "p")
    with pytest.raises(ValueError, match="another store or layout"):
        pack(store, tmp_path / "p", plain=not plain, progress=False)
    calls[:] = [0] * 5
    assert verify(pack(store, tmp_path / "p", **options)) == 3 and len(calls) < 8
    contents = lambda folder: {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}  # noqa: E731
    assert contents(tmp_path / "p") == contents(whole.path)


def test_damage_strangers_and_nonsense_are_refused(store, tmp_path):
    with pytest.raises(ValueError, match="not empty"):
        pack(store, tmp_path, progress=False)
    with pytest.raises(ValueError, match="above 0"):
        pack(store, tmp_path / "p", shard_gb=0)
    with pytest.raises(DataError, match="packed.*nobody adds to"):
        prepare(tmp_path / "in", pack(store, tmp_path / "p", progress=False).path, spacing=1.0, progress=False)
    with pytest.raises(ValueError, match="layout npy, now blosc2"):
        pytest.importorskip("blosc2")
        prepare(tmp_path / "in", store, spacing=1.0, layout="blosc2", progress=False)
    file = Store(store).file(1)
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=f"{file.stem} is not what was written"):
        pack(store, tmp_path / "q", progress=False)


def test_prepare_writes_blosc2_of_the_same_voxels(store, tmp_path):
    pytest.importorskip("blosc2")
    prepare(tmp_path / "in" / "list.csv", tmp_path / "b", spacing=1.0, layout="blosc2", progress=False)
    made, whole = Store(tmp_path / "b"), Store(store)
    assert [r["id"] for r in made.records] == [r["id"] for r in whole.records] and verify(made) == 3
    assert all((made.volume(i)[...] == whole.volume(i)).all() for i in range(3))
    assert prepare(tmp_path / "in" / "list.csv", tmp_path / "b", spacing=1.0, layout="blosc2", progress=False).new == 0


def first_version(store):
    """A store as version 1 wrote it."""
    import json

    recipe = Store(store).recipe
    for file in (store / "index.jsonl", store / "private" / "sources.jsonl"):
        file.write_text("".join(json.dumps(row) + "\n" for row in read_lines(file)))
    (store / "STORE.json").write_text(json.dumps({"format": "medfast store", "version": 1, "recipe": recipe}))


def test_a_store_of_the_first_version_is_read_and_migrated(store, tmp_path):
    before = Store(store).records
    first_version(store)
    assert Store(store).records == before and verify(Store(store)) == 3
    with pytest.raises(DataError, match="version 1.*medfast data migrate"):
        prepare(tmp_path / "in" / "list.csv", store, spacing=1.0, progress=False)
    assert "has version 2 now" in migrate(store) and "already" in migrate(store)
    assert read_header(store).version == 2 and Store(store).records == before
    assert prepare(tmp_path / "in" / "list.csv", store, spacing=1.0, progress=False).new == 0
    line = (store / "index.jsonl").read_text()
    (store / "index.jsonl").write_text(line.replace('"notes": []', '"notes": [0]', 1))
    with pytest.raises(DataError, match="line 1 of .*index.jsonl is damaged"):
        Store(store)


def test_a_newer_or_changed_header_is_refused(tmp_path):
    folder = write_store(tmp_path / "s", [(16, 16, 16)], unit="HU")
    content = (folder / "STORE.json").read_text()
    for old, new, says in (('"version": 2', '"version": 3', "newer"), ('"HU"', '"HV"', "damaged")):
        (folder / "STORE.json").write_text(content.replace(old, new))
        with pytest.raises(DataError, match=says):
            Store(folder)
    assert Header({"unit": "HU"}).content().decode() == content
