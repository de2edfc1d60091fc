"""Accelerated models under DDP, FSDP2, activation checkpointing, ``torch.compile`` and ``torch.export``."""

import copy

import pytest
import torch
import torch.distributed as dist
from swin_layouts import SMIT, SwinTransformerBlock3D, VideoSwin
from swin_parity import assert_close, cotangents, outputs_and_gradients, randomise, tensors
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrapping
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import medfast_kernels as mk


@pytest.fixture
def one_process():
    """A group of one; other tests of this process may have made it for themselves."""
    made = not dist.is_initialized()
    if made:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if made:
        dist.destroy_process_group()


def accelerated(model):
    model = randomise(model)
    assert all(row.new for row in mk.swin.accelerate(model))
    return model


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def backward(model, inputs):
    """From the same cotangents as ``outputs_and_gradients``."""
    outs = tensors(model(*inputs))
    torch.autograd.backward(outs, cotangents(outs))


MODELS = {"Video-Swin": (lambda: accelerated(VideoSwin()), (2, 8, 4, 7, 9)),
          "SMIT": (lambda: accelerated(SMIT()), (2, 8, 4, 4, 8))}  # fmt: skip


@pytest.fixture(params=MODELS)
def case(request):
    build, shape = MODELS[request.param]
    return build(), (draw(*shape),)


def test_ddp(case, one_process):
    """Every parameter gets its gradient: DDP would raise on the second step if one were missing."""
    model, inputs = case
    expected = outputs_and_gradients(model, inputs)
    wrapped = DistributedDataParallel(copy.deepcopy(model), find_unused_parameters=False)
    for _ in range(2):
        wrapped.zero_grad()
        backward(wrapped, inputs)
    got = {name: parameter.grad for name, parameter in wrapped.module.named_parameters()}
    assert_close(got, {name: expected[name] for name in got}, 1e-12)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_fsdp2(case, one_process):
    model, inputs = case
    expected = outputs_and_gradients(model, inputs)
    mesh = init_device_mesh("cpu", (1,))
    for module in list(model.modules()):
        if hasattr(module, "attn"):  # shards of their own for a block and for the attention inside it
            fully_shard(module.attn, mesh=mesh)
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    backward(model, inputs)
    got = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    assert_close(got, {name: expected[name] for name in got}, 1e-12)
    with pytest.raises(RuntimeError, match="before it is wrapped"):
        mk.swin.restore(model)
    assert not any(row.new for row in mk.swin.accelerate(model))


def test_activation_checkpointing():
    model, inputs = accelerated(VideoSwin()), (draw(2, 8, 4, 7, 9),)
    expected = outputs_and_gradients(model, inputs)
    wrapping.apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, SwinTransformerBlock3D))
    got = outputs_and_gradients(model, inputs)
    assert any("_checkpoint_wrapped" in name for name, _ in model.named_modules())
    got = {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in got.items()}
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_export(case):
    model, inputs = case
    program = torch.export.export(model, inputs)
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("window_attention" in name for name in operators) and not any("softmax" in name for name in operators)
    for out, expected in zip(tensors(program.module()(*inputs)), tensors(model(*inputs)), strict=True):
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_compile():
    model, inputs = accelerated(VideoSwin()[0]), (draw(2, 8, 4, 7, 9),)
    expected = outputs_and_gradients(model, inputs)
    torch._dynamo.reset()
    got = outputs_and_gradients(torch.compile(model, backend="aot_eager", fullgraph=True), inputs)
    assert_close({name.replace("_orig_mod.", ""): value for name, value in got.items()}, expected, 1e-12)
