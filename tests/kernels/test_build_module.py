"""What the pybind11 module shows: facts of the build, and a plan of windows that is the geometry of ``_window.py``."""

import hashlib
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from window_cases import problems

from medfast_kernels import _dispatch, _window

_facts = pytest.importorskip("medfast_kernels._facts", reason="built without pybind11, or for another Python")


def problem_of(case):
    qkv = torch.zeros(2, *case["grid"], 3, 1, 1)
    chosen = {name: case[name] for name in ("window", "shift", "clip", "pad", "bias_index")}
    return _window.check(
        qkv, None, scale=None, cosine=False, pad_value=None, dropout=0.0, keep=None, key=None, **chosen
    )


def expected(problem):
    """(source, region) of every place of every window, from what the definition says of an axis."""
    axes = list(zip(problem.grid, problem.window, problem.padded, problem.shift, strict=True))
    for corner in itertools.product(*[range(0, padded, window) for _, window, padded, _ in axes]):
        for index, within in enumerate(itertools.product(*[range(window) for window in problem.window])):
            places = [c + i for c, i in zip(corner, within, strict=True)]
            at = [(p + shift) % padded for p, (_, _, padded, shift) in zip(places, axes, strict=True)]
            wrapped = [p + shift >= padded for p, (_, _, padded, shift) in zip(places, axes, strict=True)]
            inside = all(a < grid for a, grid in zip(at, problem.grid, strict=True))
            token = -1
            if inside:
                token = sum(a * math.prod(problem.grid[i + 1 :]) for i, a in enumerate(at))
            region = sum(w << (len(at) - 1 - i) for i, w in enumerate(wrapped))
            yield token, region if inside or problem.pad == "bias" else 8 + index


@settings(max_examples=60, deadline=None)
@given(problems())
def test_the_plan_is_the_geometry_of_the_definition(case):
    problem = problem_of(case)
    plan = _facts.window_plan(
        problem.grid, problem.window, problem.shift, live_pads=problem.pad == "bias", batch=2, heads=3
    )
    assert tuple(plan["padded"]) == problem.padded and tuple(plan["counts"]) == problem.counts
    assert plan["windows"] == math.prod(problem.counts) and plan["tokens"] == problem.tokens
    assert plan["pads"] == math.prod(problem.padded) - math.prod(problem.grid)
    assert list(zip(plan["source"], plan["region"], strict=True)) == list(expected(problem))
    regions = torch.tensor(plan["region"]).view(plan["windows"], plan["tokens"])
    assert plan["masked"] == (regions != regions[:, :1]).any(1).tolist()
    chunks, heads = plan["launch"]
    assert heads == 3 and 1 <= chunks <= 2 * plan["windows"]


@pytest.mark.parametrize(
    "bad", [([4], [2], [0]), ([4, 4], [2], [0]), ([4, 4], [2, 2], [2, 0]), ([4, 0], [2, 2], [0, 0])]
)
def test_a_plan_of_nothing_is_refused(bad):
    with pytest.raises(ValueError, match="axes|axis"):
        _facts.window_plan(*bad)


def test_clipped_axes_are_those_of_the_public_function():
    case = {"grid": (9, 3, 4), "window": (4, 4, 4), "shift": (2, 1, 2)}
    problem = problem_of({**case, "clip": True, "pad": "bias", "bias_index": "geometric"})
    plan = _facts.window_plan(*case.values(), clip=True)
    assert plan["clips"] == [False, True, True] and tuple(plan["counts"]) == problem.counts
    assert plan["tokens"] == problem.tokens and tuple(plan["padded"]) == problem.padded
    told = _dispatch.facts()["plan of windows"]
    assert "512 windows of 64 tokens" in told and "axes clipped: none" in told and "4 heads" in told


def test_the_facts_are_those_of_the_library():
    facts = _dispatch.build_facts()
    assert facts["namespace"] == _dispatch.NAMESPACE and "plain" in facts["instruction sets"]
    assert facts["torch ABI"] == ".".join(map(str, _dispatch._OLDEST_TORCH))
    assert bool(facts["CUDA architectures"]) == _dispatch.built_with_cuda()
    if _dispatch.WHY_NO_CPP is None:
        assert _dispatch.facts()["instruction set"] in facts["instruction sets"]
        assert _dispatch.facts()["compiler"] == facts["compiler"]


def test_the_facts_that_the_build_writes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "csrc"))
    build = pytest.importorskip("build_module")
    made = build.facts(tmp_path, "medfast_kernels")
    assert set(made) == set(_facts.facts()) and len(made["sources"]) == len(hashlib.sha256().hexdigest()[:16])
    assert all(sys.modules[name].__file__.endswith(f"{name}.py") for name in ("build_csrc", "build_module"))
