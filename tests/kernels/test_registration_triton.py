"""Operators of Triton kernels run on the device of what they are given."""

import contextlib

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from medfast_kernels._triton import registration


def test_a_launch_is_on_the_device_of_its_tensors(monkeypatch):
    """Triton takes the current device, which need not be that of the tensors."""
    current = []

    @contextlib.contextmanager
    def device(where):
        current.append(where)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    run = registration.on_its_device(lambda scale, x: list(current))
    with FakeTensorMode():
        assert run(0.5, torch.empty(2, device="cuda:1")) == [torch.device("cuda:1")]
    assert run(0.5, torch.empty(2)) == [] == current
