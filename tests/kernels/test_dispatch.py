"""Who runs what: the choice, what overrules it, and what it says."""

import os
import shutil
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

import medfast_kernels as mk
from medfast_kernels import _checks, _dispatch
from medfast_kernels.__main__ import main
from medfast_kernels._examples import examples

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
cpp_only = pytest.mark.skipif(_dispatch.WHY_NO_CPP is not None, reason=str(_dispatch.WHY_NO_CPP))


@pytest.fixture(autouse=True)
def _nobody_asks(monkeypatch):
    monkeypatch.delenv("MEDFAST_BACKEND", raising=False)
    monkeypatch.setattr(_dispatch, "_said", set())


def test_every_public_name_is_there_and_has_a_reference():
    assert all(hasattr(mk, name) for name in mk.__all__)
    assert set(_dispatch.OPERATORS) <= set(mk.reference.__all__)
    assert all(hasattr(mk.reference, name) for name in mk.reference.__all__)


@cpp_only
def test_the_choice_and_what_overrules_it(monkeypatch):
    assert _dispatch.choose("window_attention", CPU) == "cpp"
    assert _dispatch.choose("window_attention", torch.device("meta")) == "reference"
    monkeypatch.setenv("MEDFAST_BACKEND", "reference")
    assert _dispatch.choose("window_attention", CPU) == "reference"
    with mk.backend("cpp"):
        assert _dispatch.choose("window_attention", CPU) == "cpp"
        with mk.backend("reference"):
            assert _dispatch.choose("window_attention", CPU) == "reference"
        assert _dispatch.choose("window_attention", CPU) == "cpp"
    monkeypatch.setenv("MEDFAST_BACKEND", "fast")
    with pytest.raises(ValueError, match="MEDFAST_BACKEND must be one of 'reference', 'cpp', 'triton', 'cuda', got"):
        _dispatch.choose("window_attention", CPU)


@cpp_only
def test_a_backend_that_cannot_run_says_why(monkeypatch):
    with mk.backend("cpp"), pytest.raises(RuntimeError, match="on CPU, the tensors are on meta"):
        mk.window_attention(torch.zeros(1, 2, 2, 3, 1, 4, device="meta"), window=2)
    with pytest.raises(ValueError, match="'cuda', got 'numpy'"), mk.backend("numpy"):
        pass
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with mk.backend("triton"), pytest.raises(RuntimeError, match="triton.*and cannot"):
        mk.random_keep(0.5, key=mk.Key(1, sample=torch.arange(2)))


def test_an_operator_without_a_kernel_refuses_the_backend_that_is_asked_for(monkeypatch):
    monkeypatch.setitem(_dispatch.KERNELS, "attention_mask", ())
    attention = torch.rand(2, 9)
    monkeypatch.setenv("MEDFAST_BACKEND", "cpp")
    with pytest.raises(RuntimeError, match="attention_mask.*no cpp kernel; with no backend asked for"):
        mk.attention_mask(attention, 0.5)
    whatever = mk.reference.attention_mask(attention, 0.5)[0]  # the definition runs whatever is asked for
    monkeypatch.delenv("MEDFAST_BACKEND")
    assert torch.equal(mk.attention_mask(attention, 0.5)[0], whatever)


@cpp_only
def test_a_call_that_a_backend_has_no_kernel_for(monkeypatch):
    unfit = {"cpp": "head dim 13 is odd"}
    with pytest.warns(UserWarning, match="window_attention does not run on cpp here: head dim 13"):
        assert _dispatch.choose("window_attention", CPU, unfit) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once per reason
        assert _dispatch.choose("window_attention", CPU, unfit) == "reference"
        assert _dispatch.choose("window_attention", CPU, {"triton": "another's affair"}) == "cpp"
    with pytest.warns(UserWarning, match="even"):
        assert _dispatch.choose("window_attention", CPU, {"cpp": "even"}) == "reference"
    with mk.backend("cpp"), pytest.raises(RuntimeError, match="asked to run on backend 'cpp' and cannot: head dim 13"):
        _dispatch.choose("window_attention", CPU, unfit)


@cpp_only
@pytest.mark.skipif(not hasattr(torch, "compiler"), reason="this torch compiles nothing")
def test_the_choice_is_traced_and_a_warning_too():
    def double(x):
        name = _dispatch.choose("window_attention", x.device, {"cpp": "it is too small"} if len(x) == 1 else {})
        return 2 * x if name == "cpp" else -x

    compiled = torch.compile(double, fullgraph=True, backend="aot_eager", dynamic=False)
    assert compiled(torch.ones(3)).sum() == 6
    with pytest.warns(UserWarning, match="does not run on cpp here: it is too small"):
        assert compiled(torch.ones(1)).sum() == -1
    with mk.backend("reference"):
        assert compiled(torch.ones(3)).sum() == -3


@pytest.fixture
def gpu(monkeypatch):
    """As if there were one, with kernels of two backends."""
    monkeypatch.setitem(_dispatch.KERNELS, "window_attention", ("cpp", "triton", "cuda"))
    monkeypatch.setattr(_dispatch, "why_not", lambda _, name, device: None if name != "cpp" else "on CPU only")
    monkeypatch.setattr(_dispatch, "device_name", lambda device: "GPU 9000")
    _dispatch._found.cache_clear()
    yield
    _dispatch._found.cache_clear()


def test_on_a_gpu_the_reference_runs_until_there_is_evidence(monkeypatch, gpu):
    monkeypatch.setattr(_dispatch, "evidence", lambda device: ())
    with pytest.warns(UserWarning, match="GPU 9000: no kernel .* `python -m medfast_kernels qualify`") as said:
        assert _dispatch.choose("window_attention", GPU) == "reference"
        assert _dispatch.choose("window_attention", GPU) == "reference"
    assert len(said) == 1
    with mk.backend("triton"):
        assert _dispatch.choose("window_attention", GPU) == "triton"


def test_the_definitions_never_ask(monkeypatch):
    def refuse(*_):
        raise AssertionError("a definition asked for a backend")

    for module in (_dispatch, mk.window, mk.random, mk.masking, mk.tokens, mk.contrast, mk.class_token):
        monkeypatch.setattr(module, "choose", refuse)
    key = mk.Key(1, sample=torch.arange(2))
    mk.reference.random_normal(3, key=key)
    ids = mk.reference.random_ids(4, 2, key=key)
    mk.reference.random_keep(0.5, key=key)
    mk.reference.attention_mask(torch.rand(2, 9), 0.5, hint=0.2)
    mk.reference.class_attention(torch.zeros(1, 1, 4), *torch.zeros(2, 1, 3, 1, 4))
    mk.reference.restore_tokens(mk.reference.drop_tokens(torch.zeros(2, 4, 3), ids), ids, 4, torch.zeros(3))
    mk.reference.token_contrast(torch.zeros(2, 2, 1, 3))
    mk.reference.window_attention(torch.zeros(2, 2, 2, 3, 1, 4), window=2, dropout=0.5, key=key)


@cpp_only
def test_a_library_that_does_not_load_is_named_and_passed_over(tmp_path):
    package = tmp_path / "medfast_kernels"
    shutil.copytree(_dispatch._LIBRARY.parent, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (package / "_csrc.so").write_bytes(_dispatch._LIBRARY.read_bytes()[:-200_000])
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    call = "mk.window_attention(torch.zeros(1, 2, 2, 3, 1, 4), window=2)"
    code = f"import torch, medfast_kernels as mk; {call}\nwith mk.backend('cpp'): {call}"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "backend 'cpp' is not there: _csrc.so does not load: " in done.stderr, done.stderr


def test_without_the_library_the_reference_runs_and_cpp_is_refused(monkeypatch):
    monkeypatch.setattr(_dispatch, "WHY_NO_CPP", "_csrc.so is not built")
    assert _dispatch.choose("window_attention", CPU) == "reference" and not _dispatch.built_with_cuda()
    assert mk.window_attention(torch.zeros(1, 2, 2, 3, 1, 4), window=2).shape == (1, 2, 2, 4)
    with pytest.raises(RuntimeError, match="not built"), mk.backend("cpp"):
        pass


def test_the_table_names_every_operator_and_backend(capsys, monkeypatch):
    monkeypatch.setitem(_dispatch.KERNELS, "attention_mask", ("cpp",))
    assert main([]) == 0
    rows = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    said = {(operator, name): what for operator, name, what in rows}
    for operator in _dispatch.OPERATORS:
        assert sum(said[operator, name] == "chosen" for name in _dispatch.BACKENDS) == 1
    assert said["attention_mask", "triton"] == "it has no triton kernel"
    assert said["class_attention", "cuda"] == "it has no cuda kernel"


@pytest.mark.parametrize(("asked", "said"), [("triton", "cannot: "), ("fastest", "MEDFAST_BACKEND must be one of")])
def test_the_table_tells_of_a_backend_that_is_asked_for_and_cannot_run(monkeypatch, capsys, asked, said):
    monkeypatch.setenv("MEDFAST_BACKEND", asked)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main([]) == 0
    out = capsys.readouterr().out
    assert out.count("ERROR") >= len(_dispatch.OPERATORS) and said in out
    assert all(f"  {operator:<16} reference" in out for operator in _dispatch.OPERATORS)


FIRST = {  # the first tensor of each operator, of ones
    "window_attention": lambda x: mk.window_attention(x(1, 4, 4, 3, 1, 8), window=2),
    "class_attention": lambda x: mk.class_attention(x(1, 2, 8), x(1, 4, 2, 8), x(1, 4, 2, 8)),
    "attention_mask": lambda x: mk.attention_mask(x(2, 8), 0.5),
    "drop_tokens": lambda x: mk.drop_tokens(x(1, 4, 8), torch.zeros(1, 1, dtype=torch.int64)),
    "restore_tokens": lambda x: mk.restore_tokens(x(1, 1, 8), torch.zeros(1, 1, dtype=torch.int64), 4, x(8)),
    "token_contrast": lambda x: mk.token_contrast(x(2, 2, 2, 8)),
}


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=cpp_only)])
def test_numbers_that_nobody_computes_with(name, backend):
    made = [lambda *size: torch.ones(size).to_sparse()]
    if hasattr(torch, "float8_e4m3fn"):
        made.append(lambda *size: torch.ones(size).to(torch.float8_e4m3fn))
    with mk.backend(backend):
        for make in made:
            with pytest.raises(TypeError, match="must be a floating tensor, got torch.float(32, torch.sparse|8)"):
                FIRST[name](make)


@pytest.mark.parametrize("operator", _dispatch.OPERATORS)
def test_shapes_without_numbers(operator):
    """On the meta device, where models are laid out before their weights are there."""
    if not _checks.TRACED:
        pytest.skip("this torch knows too few operators on the meta device")
    for example in examples(operator):
        made = example.call(**{name: x.to("meta") for name, x in example.tensors.items()})
        assert all(x is None or x.is_meta for x in (made if isinstance(made, tuple) else (made,)))


def test_a_triton_that_is_too_old_is_refused_by_its_version(monkeypatch):
    monkeypatch.setattr(_dispatch, "TRACED", True)  # with a torch that would do
    monkeypatch.setattr(_dispatch, "_there", lambda module: True)
    monkeypatch.setattr(_dispatch, "import_module", lambda name: SimpleNamespace(__version__="3.4.0"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    _dispatch._why_triton_is_too_old.cache_clear()
    try:
        why = _dispatch.why_not("window_attention", "triton", torch.device("cpu"))
    finally:
        _dispatch._why_triton_is_too_old.cache_clear()
    assert why is not None and "Triton 3.5 or later, this is 3.4.0" in why
