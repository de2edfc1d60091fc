"""Who is held out, and how often each volume comes."""

import numpy as np
import pytest
import torch
from stores import write_store, write_volume

from medfast.data.inputs import find
from medfast.data.loader import open_stream
from medfast.data.order import volumes
from medfast.data.split import chances, pseudonym, split_volumes

SECTION = {"size": 16, "window": [-21000, 29000], "workers": 0, "holdout": 0.3}


def records(groups):
    return [{"id": f"id{n}", **({"group": group} if group else {})} for n, group in enumerate(groups)]


def test_a_patient_is_on_one_side_and_keeps_it():
    groups = [f"p{n // 3}" if n % 2 else None for n in range(400)]
    kept, out = split_volumes(records(groups), 0.1)
    assert 15 < len(out) < 80 and set(kept).isdisjoint(out) and len(kept) + len(out) == 400
    sides = {i: i in set(out) for i in range(400)}
    for group in {g for g in groups if g}:
        assert len({sides[i] for i, g in enumerate(groups) if g == group}) == 1
    assert set(split_volumes(records(groups[:300]), 0.1)[1]) == {i for i in out if i < 300}, "a patient changed sides"
    assert all(len(part) == 1 for part in split_volumes(records([None, None]), 1e-9))
    assert len(split_volumes(records([None] * 3), 1 - 1e-9)[0]) == 1
    assert split_volumes(records(["p", "p"]), 0.5) == ([0, 1], [0, 1])


def test_one_patient_only_is_said(tmp_path):
    folder = write_store(tmp_path / "s", [])
    for n in range(3):
        write_volume(folder, n, np.zeros((16, 16, 16), np.int16), group="p")
    held = open_stream({**SECTION, "store": str(folder)}, seed=0, batch=2, views=1, split="holdout")
    assert len(held.volumes) == 3 and "trained on" in held.note


@pytest.mark.parametrize("shares", [[0.5, 0.25, 0.125, 0.125], [0.7, 0.3, 0.0, 0.0], [0.25] * 4])
def test_draws_follow_their_chances_exactly(shares):
    parts = [volumes(5, np.arange(start, start + 7), 4, 0, shares) for start in range(0, 4000, 7)]
    drawn = np.concatenate(parts)[:4000]
    np.testing.assert_array_equal(drawn, volumes(5, np.arange(4000), 4, 0, shares))
    counts = np.stack([(drawn.reshape(-1, 4) == v).sum(1) for v in range(4)], 1)
    expected = 4 * np.array(shares)
    assert (counts >= np.floor(expected)).all() and (counts <= np.ceil(expected)).all()
    np.testing.assert_allclose(counts.mean(0), expected, atol=0.1)
    assert len(np.unique(drawn.reshape(-1, 4), axis=0)) > 3, "the order of an epoch never changes"


def test_without_shuffle_volumes_come_in_turn(tmp_path):
    assert volumes(5, np.arange(3, 9), 4, 0, None, shuffle=False).tolist() == [3, 0, 1, 2, 3, 0]
    section = {**SECTION, "store": str(write_store(tmp_path / "s", [(16, 16, 16)] * 5)), "shuffle": False}
    train = open_stream(section, seed=1, batch=3, views=1, split="train")
    seen = torch.cat([train.batch(step, range(3)).params["volume"] for step in range(4)])
    assert [train.store.records[i]["id"] for i in seen] == (train.volumes * 12)[:12]
    with pytest.raises(ValueError, match="choose one"):
        open_stream({**section, "weights": "equal"}, seed=1, batch=3, views=1, split="train")


def test_datasets_are_weighed_by_name_or_pseudonym(tmp_path):
    salt, names = b"salt", ["a", "a", "a", "b", None]
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "salt").write_bytes(salt)
    known = [name and pseudonym(salt, f"dataset {name}") for name in names]
    everyone = list(range(5))
    assert chances(None, known, everyone, tmp_path) is None
    assert chances("equal", known, everyone, tmp_path) == pytest.approx([1 / 9] * 3 + [1 / 3] * 2)
    for a in ("a", known[0]):
        found = chances({a: 2, "b": 6, "none": 0}, known, everyone, tmp_path)
        assert found == pytest.approx([1 / 12] * 3 + [3 / 4, 0])
    assert chances({"a": 2, "b": 6, "none": 0}, known, [0, 1], tmp_path) == pytest.approx([0.5, 0.5])
    for weights, says in (({"c": 1}, f"no volume is of a dataset 'c'. There are {known[0]}|{known[3]}"),
                          ({"a": 1}, "says nothing of"), ({"a": -1}, "share of the draws"), ([1], "share of the draws"),
                          ({"a": 0, "b": 0, "none": 1}, None)):  # fmt: skip
        with pytest.raises(ValueError, match=says or "gives 0 to all"):
            chances(weights, known, everyone if says else [0, 3], tmp_path)
    (tmp_path / "private" / "salt").unlink()
    with pytest.raises(ValueError, match="private/salt is not there"):
        chances({"a": 1, "b": 1, "none": 1}, known, everyone, tmp_path)


def test_a_stream_draws_by_weight(tmp_path):
    folder = write_store(tmp_path / "s", [])
    for n in range(6):
        write_volume(folder, n, np.zeros((16, 16, 16), np.int16), dataset="few" if n == 0 else "many")
    section = {**SECTION, "store": str(folder), "holdout": 0.05, "weights": {"few": 1, "many": 1}}
    train = open_stream(section, seed=1, batch=10, views=1, split="train")
    assert "v00" in train.volumes
    drawn = np.concatenate([train.batch(step, range(10)).params["volume"].numpy() for step in range(10)])
    assert abs((drawn == 0).mean() - 0.5) < 0.1


def test_lists_name_datasets(tmp_path):
    for name in ("a.nii", "b.nii"):
        (tmp_path / name).touch()
    (tmp_path / "l.csv").write_text("image,patient,dataset\na.nii,p,LIDC\nb.nii,,\n")
    assert [(c.group, c.dataset) for c in find(tmp_path / "l.csv")] == [("p", "LIDC"), (None, None)]
    (tmp_path / "n.json").write_text(
        '{"collection_name": "x", "datasets": {"Dataset001_A": {"dataset_index": "001", "subjects": {"s1": '
        '{"subject_id": "s1", "sessions": {"1": {"images": [{"image_path": "a.nii"}]}}}}}, "Dataset002_B": '
        '{"subjects": {"s2": {"sessions": {"1": {"images": [{"image_path": "b.nii"}]}}}}}}}'
    )
    assert [(c.group, c.dataset) for c in find(tmp_path / "n.json")] == [("s1", "Dataset001_A"), (None, "Dataset002_B")]
