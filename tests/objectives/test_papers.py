"""The conformance pages name code and files that exist."""

import importlib
import re
from pathlib import Path

import pytest

from medfast.objectives import OBJECTIVES

PAGES = Path(__file__).parents[2] / "docs" / "papers"
NAMES = sorted(path.stem for path in PAGES.glob("*.md"))


def resolve(dotted):
    """The object of a dotted name; AttributeError or ModuleNotFoundError where there is none."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(dotted)


@pytest.mark.parametrize("page", NAMES)
def test_every_function_that_a_page_names_exists(page):
    names = re.findall(r"`(medfast(?:_kernels)?\.[\w.]+)`", (PAGES / f"{page}.md").read_text())
    assert len(names) >= 5
    for name in names:
        assert callable(resolve(name)), name


@pytest.mark.parametrize("page", NAMES)
def test_every_file_that_a_page_names_exists(page):
    text = (PAGES / f"{page}.md").read_text()
    for name in re.findall(r"`((?:configs|tests)/[\w./]+)`", text):
        assert (PAGES.parents[1] / name).exists(), name
    for name in re.findall(r"\]\(([\w.]+\.md)\)", text):
        assert (PAGES / name).exists(), name


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_a_page_and_a_preset(name):
    assert name in NAMES
    assert (PAGES.parents[1] / "configs" / f"{name}.yaml").exists()
    assert f"`configs/{name}.yaml`" in (PAGES / f"{name}.md").read_text()
