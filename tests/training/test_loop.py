"""Whole runs on one rank: resume, teacher, accumulation, refusals."""

import pytest
import tiny_task as task
import torch

from medfast.training import Diverged, Train, checkpoint, feed
from medfast.training.distributed import World
from medfast.types import Batch

STAGES = {
    "ddp": {},
    "zero0": {"train__strategy": "deepspeed", "deepspeed": {"zero_optimization": {"stage": 0}}},
    **{
        f"zero{stage}": {"train__strategy": "deepspeed", "deepspeed": {"zero_optimization": {"stage": stage}}}
        for stage in (1, 2, 3)
    },
}


@pytest.mark.parametrize("case", STAGES)
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(case, tmp_path):
    task.run(tmp_path / "whole", **STAGES[case])
    with pytest.raises(SystemExit) as stop:
        task.run(tmp_path / "parts", stop_at=2, **STAGES[case])
    assert stop.value.code == 75
    task.run(tmp_path / "parts", seed=9, **STAGES[case])
    assert task.rows(tmp_path / "parts") == task.rows(tmp_path / "whole")
    assert [row["step"] for row in task.rows(tmp_path / "parts")] == list(range(8))
    assert task.same(task.tensors(tmp_path / "parts"), task.tensors(tmp_path / "whole"))


def test_teacher_starts_as_the_student_and_follows_the_closed_form(tmp_path):
    task.run(tmp_path, train__checkpoint_every=1, train__keep_last=9, train__micro=2, optim__warmup=0)
    name = "backbone.0.weight"
    teacher = task.build().state_dict()[name].double()
    for step in range(8):
        saved = task.tensors(tmp_path, step + 1)
        momentum = 0.9 + 0.1 * step / 8
        teacher = momentum * teacher + (1 - momentum) * saved[f"student/{name}"].double()
        assert torch.allclose(saved[f"teacher/{name}"].double(), teacher, atol=1e-6, rtol=0)
    assert [row["momentum"] for row in task.rows(tmp_path)] == [0.9 + 0.1 * (step / 8) for step in range(8)]


def test_two_micro_batches_are_one_batch(tmp_path):
    task.run(tmp_path / "one", train__precision="fp64")
    task.run(tmp_path / "two", train__precision="fp64", train__micro=2)
    assert task.drift(task.rows(tmp_path / "two"), task.rows(tmp_path / "one")) < 1e-12
    one, two = (task.tensors(tmp_path / name) for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], rtol=1e-9, atol=1e-12) for name in one)


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_matrices_are_multiplied_as_asked_while_it_runs(precision, tmp_path, monkeypatch):
    seen, forward = set(), task.Tiny.forward

    def watched(*arguments):
        seen.add(torch.get_float32_matmul_precision())
        return forward(*arguments)

    monkeypatch.setattr(task.Tiny, "forward", watched)
    before = torch.get_float32_matmul_precision()
    task.run(tmp_path, train__matmul=precision, train__steps=2)
    assert seen == {precision}
    assert torch.get_float32_matmul_precision() == before
    with pytest.raises(ValueError, match="train.matmul is one of highest, high, medium"):
        Train(matmul="low")


def test_changed_settings_are_named_and_refused(tmp_path):
    task.run(tmp_path)
    with pytest.raises(ValueError, match=r"train\.steps: 8 in the checkpoint, 9 now"):
        task.run(tmp_path, train__steps=9)
    with pytest.raises(ValueError, match=r"optim\.lr"):
        task.run(tmp_path, optim__lr=2e-2)
    task.run(tmp_path, train__steps=9, train__resume_changed=True)
    assert len(task.rows(tmp_path)) == 9


def test_init_beside_a_checkpoint_is_said_to_be_unread(tmp_path, capsys):
    task.run(tmp_path / "a")
    capsys.readouterr()
    task.run(tmp_path / "a", init={"from": str(tmp_path / "a")})
    assert "init is not read: the run folder holds step_00000008" in capsys.readouterr().err


def test_deepspeed_settings_belong_to_the_run_but_for_the_stage(tmp_path):
    zero1, other = STAGES["zero1"], {"zero_optimization": {"stage": 1}, "prescale_gradients": True}
    task.run(tmp_path, **STAGES["zero0"])
    task.run(tmp_path, **zero1)
    with pytest.raises(ValueError, match=r"deepspeed\.prescale_gradients: None in the checkpoint, True now"):
        task.run(tmp_path, **{**zero1, "deepspeed": other})


def test_a_gpu_gets_pinned_views_and_the_step_as_a_tensor(monkeypatch):
    """No draw may copy a number to the device. The device itself is not needed to see what it would be given."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x.shape) or x)
    monkeypatch.setattr(Batch, "to", lambda batch, device, dtype: batch)
    real = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda value, device=None, **rest: real(value, **rest))
    here = World(0, 1, torch.device("cuda", 0))
    (moved,) = feed.moved(iter([task.Memory().batch(3, range(2))]), Train(), here)
    assert torch.is_tensor(moved.key.step) and moved.key.step.ndim == 0 and int(moved.key.step) == 3
    assert len(pinned) == 2


def test_resume_modes(tmp_path):
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        task.run(tmp_path, train__resume="must")
    task.run(tmp_path)
    with pytest.raises(ValueError, match="give another out"):
        task.run(tmp_path, train__resume="never")


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path):
    with pytest.raises(Diverged, match=r"step 5: not finite: distil of rank 0, micro-batch 0"):
        task.run(tmp_path, broken_at=5, train__skip_budget=0)
    assert checkpoint.latest(tmp_path).name == "step_00000004"


def test_init_takes_other_weights_and_refuses_strange_ones(tmp_path, capsys):
    trained = task.run(tmp_path / "a")
    task.run(tmp_path / "b", seed=4, init={"from": str(tmp_path / "a")}, optim__lr=0.0, optim__min_lr=0.0)
    assert "0 missing" in capsys.readouterr().err
    assert torch.equal(task.tensors(tmp_path / "b")["student/last.weight"], trained.last.weight)
    from safetensors.torch import save_file

    save_file({"recon.bias": torch.zeros(6)}, tmp_path / "few.safetensors")
    with pytest.raises(ValueError, match="under 95% is refused"):
        task.run(tmp_path / "c", init={"from": str(tmp_path / "few.safetensors")})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train__micro": 0}, "train.micro must be at least 1"),
        ({"train__precision": "fp64", "train__strategy": "deepspeed"}, "no fp64"),
        (
            {"train__strategy": "deepspeed", "deepspeed": {"zero_optimization": {"stage": 4}}},
            "one of 0, 1, 2, 3, got 4",
        ),
        ({"train__strategy": "deepspeed", "deepspeed": {"bf16": {"enabled": True}}}, "train.precision=bf16"),
        ({"train__strategy": "deepspeed", "deepspeed": {"gradient_clipping": 1.0}}, "optim.clip"),
        ({**STAGES["zero3"], "train__compile": True}, "stage 3 fetches weights"),
        ({"optim__frozen": {"*nothing*": 0.5}}, "matches no parameter"),
        ({"optim__lr_scale": {"*nothing*": 0.5}}, "lr_scale.*matches no parameter"),
        ({"optim__lr_scale": {"last*": 0}}, "belongs into optim.frozen"),
    ],
)
def test_what_cannot_run_is_refused_in_words(changes, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        task.run(tmp_path, **changes)
