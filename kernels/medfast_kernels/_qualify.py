"""Is a backend right, and faster than the reference, on this machine? ``python -m medfast_kernels qualify`` asks.

Right: values and gradients are held to the definition in fp64 on CPU. Root-mean-square errors may be BUDGET times those
of the reference in the same precision on the same device and one rounding more, the largest error twice as much: a
maximum over a few numbers is a matter of luck. What has exact bits must have them.
"""

from __future__ import annotations

import datetime
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._dispatch import KERNELS, Refused, backend, forget, why_not
from ._evidence import build_hash, device_name, evidence, family, store, verdict_path
from ._examples import Example, examples

BUDGET = {"value": 2.0, "gradient": 3.0}
EXACT64 = 1e-11  # in fp64, where the reference is the definition itself
TYPES = {"cpu": (torch.float64, torch.float32), "cuda": (torch.float32, torch.bfloat16, torch.float16)}
NORMAL = 1e-6  # devices may differ by that in random_normal


class Check(NamedTuple):
    """share: the largest part of its budget that an error takes; why: what is wrong, None if it is right."""

    share: float
    why: str | None


def results(example: Example, name: str, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Values and the gradient of a random projection of them, of one example on one backend, on CPU in fp64."""
    given = {}
    for argument, tensor in example.tensors.items():
        moved = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
        given[argument] = moved.requires_grad_(moved.is_floating_point() and not example.exact)
    with backend(name):
        made = example.call(**given)
    values = {f"value {i}": x for i, x in enumerate(made if isinstance(made, tuple) else (made,)) if x is not None}
    inputs = {argument: x for argument, x in given.items() if x.requires_grad}
    outputs = [x for x in values.values() if x.requires_grad]
    if outputs and inputs:
        seed = torch.Generator().manual_seed(1)
        weights = [torch.randn(x.shape, generator=seed, dtype=torch.float64).to(x) for x in outputs]
        grads = torch.autograd.grad(outputs, list(inputs.values()), weights, allow_unused=True)
        values |= {f"gradient of {n}": g for (n, x), g in zip(inputs.items(), grads, strict=True) if g is not None}
    return {name: x.detach().cpu().double() for name, x in values.items()}


def check(example: Example, name: str, dtype: torch.dtype, device: torch.device) -> Check:
    """One example on one backend against the definition."""
    rounded = {n: x.to(dtype).double() if x.is_floating_point() else x for n, x in example.tensors.items()}
    truth = results(example._replace(tensors=rounded), "reference", torch.float64, torch.device("cpu"))
    eager = results(example, "reference", dtype, device)
    got = results(example, name, dtype, device)
    worst = Check(0.0, None)
    for what, exact in truth.items():
        if what not in got or got[what].shape != exact.shape:
            return Check(math.inf, f"{example.name}: {what} is missing or has another shape")
        share, why = _share(example, what, got[what], exact, eager[what], dtype)
        if not share <= 1:
            return Check(share, f"{example.name}, {str(dtype)[6:]}: {what}: {why}")
        worst = max(worst, Check(share, None), key=lambda one: one.share)
    return worst


def _share(
    example: Example, what: str, got: Tensor, exact: Tensor, eager: Tensor, dtype: torch.dtype
) -> tuple[float, str]:
    """How much of its budget the error takes, and in words."""
    budget = BUDGET[what.split()[0]]
    shares = {}
    for name, size, factor in (("root mean square", _rms, budget), ("largest", _largest, 2 * budget)):
        if example.exact:
            allowed = 0.0
        elif "sample" in example.tensors:
            allowed = NORMAL * 8  # numbers up to 8
        elif dtype == torch.float64:
            allowed = EXACT64 * max(1.0, size(exact))
        else:
            allowed = factor * size(eager - exact) + torch.finfo(dtype).eps * size(exact)
        error = size(got - exact)
        share = 0.0 if error == 0 else error / allowed if allowed else math.inf
        shares[f"{name} error {error:.1e}, allowed {allowed:.1e}"] = share if share == share else math.inf
    why = max(shares, key=lambda said: shares[said])
    return shares[why], why


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def milliseconds(runs: dict[str, Callable[[], Any]], device: torch.device, seconds: float = 0.3) -> dict[str, float]:
    """Median time of each run; their rounds are interleaved, at least three and for about ``seconds`` each."""

    def once(run: Callable[[], Any], repeats: int) -> float:
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - begin) / repeats

    for run in runs.values():
        once(run, 1)
    first = {name: once(run, 1) for name, run in runs.items()}
    repeats = {name: max(1, int(0.02 / took)) for name, took in first.items()}  # a round is 20 ms at least
    rounds = max(3, int(seconds / max(0.02, *first.values())))
    times = [{name: once(run, repeats[name]) for name, run in runs.items()} for _ in range(rounds)]
    return {name: 1e3 * statistics.median(took[name] for took in times) for name in runs}


def timed(operator: str, names: list[str], device: torch.device, seconds: float) -> dict[str, float]:
    """Milliseconds of forward and backward of the large example, of the reference and of each backend."""
    dtype = TYPES[device.type][1]
    example = examples(operator, large=True)[0]
    given = {n: x.to(device=device, dtype=dtype if x.is_floating_point() else None) for n, x in example.tensors.items()}
    inputs = [x.requires_grad_() for x in given.values() if x.is_floating_point() and not example.exact]

    def run(name: str) -> None:
        with backend(name):
            made = example.call(**given)
        made = [x for x in (made if isinstance(made, tuple) else (made,)) if x is not None and x.requires_grad]
        if made:
            torch.autograd.grad(made, inputs, [torch.ones_like(x) for x in made])

    return milliseconds({name: lambda name=name: run(name) for name in ("reference", *names)}, device, seconds)


def qualify(device: torch.device, operators: tuple[str, ...], seconds: float = 0.3) -> Iterator[tuple[str, str, dict]]:
    """Check and time every backend that there is: (operator, backend, row); stored operator by operator."""
    for operator in operators:
        names = [name for name in KERNELS[operator] if why_not(operator, name, device) is None]
        checks = {name: _checked(operator, name, device) for name in names}
        right = [name for name in names if checks[name].why is None]
        took = timed(operator, right, device, seconds) if right else {}
        rows: dict[str, dict] = {}
        for name in names:
            row: dict[str, Any] = {"correct": name in right, "share of budget": round(checks[name].share, 3)}
            row |= {"why": checks[name].why} if name not in right else {
                "ms": round(took[name], 4), "reference_ms": round(took["reference"], 4)}  # fmt: skip
            rows[name] = row
        store_verdict(device, {operator: rows})
        yield from ((operator, name, row) for name, row in rows.items())


def _checked(operator: str, name: str, device: torch.device) -> Check:
    """The worst of all examples in all types; what a backend has no kernel for does not count."""
    worst, ran = Check(0.0, None), False
    for example in examples(operator):
        for dtype in TYPES[device.type][-1:] if example.exact else TYPES[device.type]:
            try:
                found = check(example, name, dtype, device)
            except Refused:
                continue
            except Exception as error:  # noqa: BLE001 - a kernel that breaks, in whatever way, is what we are here to find
                found = Check(math.inf, f"{example.name}, {str(dtype)[6:]}: {type(error).__name__}: {error}")
            if found.why is not None:
                return found
            worst, ran = max(worst, found, key=lambda one: one.share), True
    return worst if ran else Check(math.inf, "it has no kernel for any of the examples")


def store_verdict(device: torch.device, operators: dict[str, dict[str, dict]]) -> None:
    """Add to what is stored for this device, torch and build."""
    path = verdict_path(device)
    own = [found for found in evidence(device) if found.source == path]
    about = {"device": device_name(device), "family": family(device), "torch": torch.__version__, "build": build_hash()}
    about["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    store(path, {**about, "operators": {**(own[0].verdict if own else {}), **operators}})
    forget()
