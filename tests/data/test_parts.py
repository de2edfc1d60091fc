"""Several runs on one store: each its part, then one run that joins them."""

import threading

import pytest
from scans import ct, nifti

from medfast.data.ledger import Ledger
from medfast.data.prepare import parse_part, prepare
from medfast.data.recipe import recipe
from medfast.data.store import DataError, Store, verify


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for n in range(5):
        (folder / f"{n}.nii").write_bytes(nifti(ct(n).transpose(2, 1, 0)))
    (folder / "5.nii").write_bytes(nifti(ct(0).transpose(2, 1, 0), descrip=b"same voxels in another part"))
    (folder / "6.nii").write_text("bad")
    return folder


def test_parts_at_the_same_time_make_the_store_of_one_run(folder, tmp_path):
    store = tmp_path / "store"
    threads = [threading.Thread(target=prepare, args=(folder, store),
                                kwargs={"part": f"{k}/3", "max_bad": 1, "jobs": 1, "progress": False})
               for k in (1, 2, 3)]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with pytest.raises(DataError, match="without --part"):
        Store(store)
    joined = prepare(folder, store, max_bad=1, progress=False)
    alone = prepare(folder, tmp_path / "alone", max_bad=1, progress=False)
    assert sorted(joined.good) == sorted(alone.good) and joined.new == 0
    assert [row["kind"] for row in joined.bad] == [row["kind"] for row in alone.bad] == ["duplicate", "not-nifti"]
    assert verify(Store(store)) == 5
    names = lambda where: sorted(str(p.relative_to(where)) for p in where.rglob("*.npy"))  # noqa: E731
    assert names(store) == names(tmp_path / "alone")
    assert [p.name for p in store.glob("index*")] == ["index.jsonl"] and len(list(store.glob("private/*"))) == 2


def test_a_part_holds_its_lock_and_a_whole_run_waits_for_none(tmp_path):
    settings = recipe()
    with Ledger(tmp_path / "s", settings, "1/2"):
        for part in ("1/2", None):
            with pytest.raises(DataError, match="another run"), Ledger(tmp_path / "s", settings, part):
                pass
        with Ledger(tmp_path / "s", settings, "2/2"):
            pass
    with Ledger(tmp_path / "s", settings):
        pass
    with pytest.raises(ValueError, match="spacing"), Ledger(tmp_path / "s", recipe(spacing=1.5), "1/2"):
        pass


def test_every_case_is_in_one_part():
    cases = list(range(23))
    parts = [cases[s.start :: s.step] for s in (parse_part(f"{k}/8") for k in range(1, 9))]
    assert sorted(sum(parts, [])) == cases and parse_part(None) == slice(0, None, 1)
    for wrong in ("0/8", "9/8", "3", "a/b", "1/0", "-1/2"):
        with pytest.raises(ValueError, match="K/N"):
            parse_part(wrong)


def test_parts_share_one_salt(tmp_path):
    with Ledger(tmp_path / "s", recipe(), "1/2") as one, Ledger(tmp_path / "s", recipe(), "2/2") as two:
        assert one.pseudonym("Mustermann") == two.pseudonym("Mustermann") != one.pseudonym("Musterfrau")
    with Ledger(tmp_path / "other", recipe()) as other:
        assert other.pseudonym("Mustermann") != one.pseudonym("Mustermann")
