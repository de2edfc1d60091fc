"""The rules of CONTRIBUTING.md that a machine can check: sizes, floors' secrets, no pickle, no second dispatch."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(p for folder in ("medfast", "kernels", "benchmarks") for p in (ROOT / folder).rglob("*.py"))
MAX_FILE, MAX_FUNCTION, MAX_DEPTH = 300, 60, 2
TOP_LEVEL = {
    "csrc", "medfast", "kernels", "configs", "benchmarks", "tests", "docs", "requirements", "setup.py", "README.md",
    "pyproject.toml", "Makefile", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", ".ci", ".gitignore", "MANIFEST.in",
}  # fmt: skip


def code_lines(node: ast.AST) -> int:
    docstring = ast.get_docstring(node, clean=False)
    return node.end_lineno - node.lineno + 1 - (len(docstring.splitlines()) if docstring else 0)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE, f"{path.name} is longer than {MAX_FILE} lines: split it by subject"
    long = [
        f"{node.name} ({code_lines(node)} lines)"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and code_lines(node) > MAX_FUNCTION
    ]
    assert not long, f"functions longer than {MAX_FUNCTION} lines: {long}"


def test_depth_and_top_level():
    tracked = {p.name for p in ROOT.iterdir()} - {"runs", "build", "dist"}
    strangers = {
        n for n in tracked if not n.startswith(".") and not n.endswith((".egg-info", "__pycache__"))
    } - TOP_LEVEL
    assert not strangers, f"the top level is fixed; these do not belong there: {sorted(strangers)}"
    assert not (ROOT / "kernels" / "__init__.py").exists(), "kernels/ must not be a package (it shadows another one)"
    assert not list((ROOT / "tests").rglob("__init__.py"))
    deep = [
        p
        for p in SOURCES
        if len(p.relative_to(ROOT / "kernels" if "kernels" in p.parts else ROOT).parts) > MAX_DEPTH + 1
    ]
    assert not deep, f"deeper than two folders: {deep}"


def test_nothing_loads_pickle():
    forbidden = re.compile(
        r"\bimport pickle\b|\btorch\.load\((?![^()]*weights_only=True)|allow_pickle\s*=\s*True|\bjoblib\b|\bdill\b"
    )
    guilty = [str(p.relative_to(ROOT)) for p in SOURCES if forbidden.search(p.read_text())]
    assert not guilty, f"no pickle is loaded anywhere: {guilty}"


def test_numpy_files_are_read_without_pickle():
    for path in SOURCES:
        for call in re.findall(r"np\.load\([^)]*\)", path.read_text()):
            assert "allow_pickle=False" in call, f"{path.name}: {call} needs allow_pickle=False said aloud"


def test_only_the_dispatcher_asks_about_devices():
    asks = re.compile(r"cuda\.is_available\(|environ.*MEDFAST_BACKEND|is_cuda\b")
    guilty = [
        p.name for p in (ROOT / "kernels").rglob("*.py") if p.name != "_dispatch.py" and asks.search(p.read_text())
    ]
    assert not guilty, f"only _dispatch.py may ask about devices: {guilty}"


def test_no_bare_except():
    guilty = [str(p.relative_to(ROOT)) for p in SOURCES if re.search(r"^\s*except\s*:", p.read_text(), re.M)]
    assert not guilty
