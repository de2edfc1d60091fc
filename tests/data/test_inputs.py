"""Folders, globs and lists become the same cases."""

import json

import pytest

from medfast.data.inputs import Case, find
from medfast.data.store import DataError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("a.nii.gz", "b.NII", "c.nrrd", "deep/d.mha", "text.txt", "e.png", "list.csv"):
        (tmp_path / name).write_text("x")
    return tmp_path


def names(cases):
    return [case.path.name for case in cases]


def test_a_folder_a_file_a_glob(folder):
    assert names(find(folder)) == ["a.nii.gz", "b.NII", "c.nrrd", "d.mha"]
    assert names(find(folder, axes=2)) == ["e.png"]
    assert find(folder / "c.nrrd") == [Case((folder / "c.nrrd",))]
    assert names(find(f"{folder}/**/*.[nNm]*")) == ["a.nii.gz", "b.NII", "c.nrrd", "d.mha"]
    assert names(find(f"{folder}/*.gz")) == ["a.nii.gz"]


def test_a_link_to_the_same_file_is_one_case(folder):
    (folder / "z.nii.gz").symlink_to(folder / "a.nii.gz")
    assert names(find(folder)).count("a.nii.gz") == 1


EXPECTED = [("a.nii.gz", "d.mha", "p1"), ("b.NII", None, "p2"), ("c.nrrd", None, None)]
NNSSL = {"collection_index": 1, "datasets": {"x": {"subjects": {
    "s1": {"subject_id": "p1", "sessions": {"0": {"images": [
        {"name": "a.nii.gz", "modality": "CT", "image_path": "a.nii.gz", "label": "deep/d.mha"}]}}},
    "s2": {"subject_id": "p2", "sessions": {"0": {"images": [{"image_path": "$WHERE/b.NII"}]}}}}},
    "y": {"subjects": {"s3": {"sessions": {"0": {"images": [{"image_path": "c.nrrd"}]}}}}}}}  # fmt: skip
ROWS = [{"image": "a.nii.gz", "label": "deep/d.mha", "patient": "p1"}, {"image": "b.NII", "patient": "p2"},
        {"image": "c.nrrd"}]  # fmt: skip


@pytest.mark.parametrize("name, text", [
    ("list.csv", "\ufeffimage,label,patient\na.nii.gz,deep/d.mha,p1\nb.NII,,p2\n./c.nrrd,,\n"),
    ("list.jsonl", "\n".join(map(json.dumps, ROWS)) + "\n\n"),
    ("dataset.json", json.dumps({"name": "T", "labels": {"1": "x"}, "training": ROWS[:2], "test": ["c.nrrd"]})),
    ("pretrain_data.json", json.dumps(NNSSL)),
    ("plain.json", json.dumps(ROWS + ROWS)),
])  # fmt: skip
def test_lists(folder, name, text, monkeypatch):
    monkeypatch.setenv("WHERE", str(folder))
    (folder / name).write_text(text, encoding="utf-8")
    cases = find(folder / name)
    found = [(case.path.name, case.label.name if case.label else None, case.group) for case in cases]
    assert found == EXPECTED and all(case.path.is_absolute() for case in cases)


def test_lists_that_are_none(folder):
    for name, text, says in (("list.csv", "file\na.nii.gz\n", "row 1.*no 'image'.*file"),
                             ("list.jsonl", '{"image": "a"}\n{"imag', "no list of images"),
                             ("x.json", "{", "no list of images"), ("y.jsonl", "[1]\n", "row 1.*list")):  # fmt: skip
        (folder / name).write_text(text)
        with pytest.raises(ValueError, match=says):
            find(folder / name)
    (folder / "list.csv").write_text("image,label\ndeep,c.nrrd\n")
    (folder / "deep" / "second.nii").write_text("x")
    with pytest.raises(ValueError, match="one label.*2 images"):
        find(folder / "list.csv")


def test_nothing_there(folder):
    with pytest.raises(ValueError, match="there is no"):
        find(folder / "missing")
    (folder / "x.json").write_text("{}")
    for where in (folder / "x.json", f"{folder}/*.mgz"):
        with pytest.raises(DataError, match="no usable"):
            find(where)
