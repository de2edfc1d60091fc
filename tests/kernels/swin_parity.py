"""A model before and after ``swin.accelerate``: what every family's test asks of it."""

import contextlib
from unittest import mock

import torch

import medfast_kernels as mk


def randomise(model, seed=0):
    """Random weights in fp64, large enough that biases, tables and scales matter; no drop path, no dropout."""
    generator = torch.Generator().manual_seed(seed)
    model.double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name.endswith("logit_scale"):
                parameter.copy_(2 + 0.2 * noise)  # near its cap, log(100), the -100 of their masks hides less than all
            elif parameter.dim() > 1 and "table" not in name:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(noise + ("norm" in name and name.endswith("weight")))
    return model


def tensors(out):
    """All floating tensors in a (nested) output."""
    if isinstance(out, torch.Tensor):
        return [out]
    return [x for part in out for x in tensors(part)]


def cotangents(outs):
    """The same random numbers for the same shapes."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out) for out in outs]


def outputs_and_gradients(model, inputs, **options):
    """Outputs, then the gradients of a random cotangent in the input and every parameter, zero where there is none."""
    x, *rest = inputs
    x = x.clone().requires_grad_()
    outs = tensors(model(x, *rest, **options))
    wanted = {"input": x, **dict(model.named_parameters())}
    grads = torch.autograd.grad(outs, list(wanted.values()), cotangents(outs), allow_unused=True)
    results = {f"output {i}": out.detach() for i, out in enumerate(outs)}
    for (name, tensor), grad in zip(wanted.items(), grads, strict=True):
        results[name] = torch.zeros_like(tensor) if grad is None else grad
    return results


@contextlib.contextmanager
def forbidden(classes):
    """The forward of these classes raises."""
    with contextlib.ExitStack() as stack:
        for cls in classes:
            called = AssertionError(f"the forward of {cls.__name__} was called")
            stack.enter_context(mock.patch.object(cls, "forward", side_effect=called))
        yield


def assert_close(got, expected, tolerance):
    for name, value in expected.items():
        error = (got[name] - value).abs().max() / value.abs().max().clamp_min(1e-3)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def assert_same(model, inputs, attentions, tolerance=1e-9, **options):
    """Accelerating changes nothing but the time it takes, and restoring leaves not even that. Returns the report."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    before = outputs_and_gradients(model, inputs, **options)
    report = mk.swin.accelerate(model)
    assert len(report) == attentions
    assert all(row.new is not None and row.reason == "" and issubclass(row.new, row.old) for row in report), report
    assert all(type(model.get_submodule(row.name)) is row.new for row in report)
    with forbidden({row.old for row in report}):
        after = outputs_and_gradients(model, inputs, **options)
    assert_close(after, before, tolerance)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    mk.swin.restore(model)
    assert [type(module) for module in model.modules()] == classes
    again = outputs_and_gradients(model, inputs, **options)
    assert all(torch.equal(again[name], value) for name, value in before.items())
    return report
