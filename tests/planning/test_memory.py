"""Predicted memory: hand-countable cases here, the allocator in a quick subset, all twelve in benchmarks/memory.py."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from medfast import config as configuration
from medfast.planning.hardware import cluster
from medfast.planning.memory import _touched, grouped, state
from medfast.planning.plan import make
from medfast.planning.text import advice, describe
from medfast.planning.trace import Trace, trace
from medfast.training import Optim
from medfast.types import Objective, Output, Teacher

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
SMART = ROOT / "configs" / "smart.yaml"


class Counted(Objective):
    """One linear layer on a view of 1,024 voxels, and a teacher: everything it makes can be counted by hand."""

    def __init__(self, checkpoint: bool = False):
        super().__init__()
        self.backbone = nn.Linear(1024, 512, bias=False)
        self.teacher = Teacher(self, "backbone")

    def forward(self, batch, t):
        x = batch.views[0].flatten(1)
        with torch.no_grad():
            self.teacher.backbone(x)
        return Output({"loss": self.backbone(x).square().mean()})


DATA = {"size": [4, 16, 16]}


def test_a_layer_is_counted_to_the_byte():
    seen = trace(Counted, DATA, 64, "fp32")
    weights, view, out = 4 * 1024 * 512, 4 * 64 * 1024, 4 * 64 * 512
    assert (seen.parameters, seen.trained, seen.teacher, seen.buffers) == (weights, weights, weights, 0)
    # the view, the layer's output that square() saves, three of its size on the way back, then the weights' gradient
    assert view + 2 * out < seen.activations <= view + 4 * out + weights + 4096
    assert seen.peak == pytest.approx(view + out + weights, rel=0.1)
    assert seen.flops == 3 * 2 * 64 * 1024 * 512  # student and teacher forward, the weights' gradient; views have none


def test_a_trace_makes_nothing():
    """A network of 4 TB is planned like any other."""

    class Huge(Objective):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Linear(1024, 1 << 30, bias=False)

        def forward(self, batch, t):
            return Output({"loss": self.backbone(batch.views[0].flatten(1)).mean()})

    assert trace(Huge, DATA, 1, "fp32").trained == 4 * 1024 << 30


def test_cuda_s_autocast_saves_norms_in_fp32():
    class Normed(Objective):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(nn.Linear(1024, 1024), nn.LayerNorm(1024), nn.LayerNorm(1024))

        def forward(self, batch, t):
            return Output({"loss": self.backbone(batch.views[0].flatten(1)).float().mean()})

    cpu, cuda = (trace(Normed, DATA, 2048, "bf16", cuda=on).activations for on in (False, True))
    assert cuda - cpu > 2048 * 1024 * 2  # its input, once more


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_a_cut_parameter_s_gradient_is_whole_on_both_sides(ranks):
    groups = ((10, 50, 4), (7,))
    held = [_touched(groups, rank, ranks) for rank in range(ranks)]
    assert held == {1: [71], 3: [67, 57, 61], 4: [67, 57, 57, 61]}[ranks]


def test_what_a_stage_holds():
    seen = Trace(400, 400, 80, 20, 1000, 1200, ())
    plain = state(seen, {}, ((100,),), 4, 0)
    assert (plain.parameters, plain.gradients, plain.optimizer, plain.teacher, plain.buckets) == (420, 400, 800, 80, 0)
    zero = {"deepspeed": {"zero_optimization": {"reduce_bucket_size": 25, "overlap_comm": True}}}
    one = state(seen, zero, ((100,),), 4, 1)
    assert (one.parameters, one.gradients, one.optimizer, one.buckets) == (520, 400, 200, 200)
    three = state(seen, zero, ((100,),), 4, 3)
    assert (three.parameters, three.gradients, three.optimizer, three.teacher) == (620, 100, 200, 100)
    zero["deepspeed"]["zero_optimization"]["stage3_param_persistence_threshold"] = 40
    assert state(seen, zero, ((60, 40),), 4, 3).parameters == 220 + 160
    zero["deepspeed"]["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    assert state(seen, zero, ((60, 40),), 4, 3).parameters == 120 + 160


def test_the_allocator_agrees():
    """A whole preset, stepped by the training code in a process of its own: what other tests left would be counted."""
    import memory

    row = memory.compare(memory.CASES[5], 5)
    assert row["ok"], row


@pytest.fixture(scope="module")
def planned():
    config = configuration.load(SMART, tiny=True)
    names = ("2xA100-80", "1xH100-80")
    return {gpus: make(lambda: configuration.build(config), config, cluster(gpus)) for gpus in names}


def test_a_plan_advises_the_plain_stage_where_everything_fits(planned):
    plan = planned["2xA100-80"]
    assert plan.micro == 1 and plan.micro_batches == 1 and plan.advised.stage == 0
    text = describe(plan, "smart", 100)
    for words in ("stage=0", "ZeRO 3", "epochs of 100 volumes", "assumed:", "no measurement", "days"):
        assert words in text, words
    assert planned["1xH100-80"].rows[0].payload == {} and plan.rows[0].payload == {"all_reduce": plan.seen.trained}


def test_a_plan_takes_smaller_micro_batches_before_it_gives_up(planned):
    config = configuration.load(SMART, "train.batch=8", tiny=True)
    one = planned["2xA100-80"].rows[0]
    tight = cluster("2xA100-80")
    room = 1.08 * (one.peak + 1.5 * planned["2xA100-80"].seen.peak) + 1.5e9
    tight = type(tight)(tight.name, type(tight.gpu)(room, *list(vars(tight.gpu).values())[1:]), 1, 2, tight.network)
    plan = make(lambda: configuration.build(config), config, tight)
    assert plan.micro in (1, 2) and plan.micro_batches == 4 // plan.micro
    small = type(tight)(tight.name, type(tight.gpu)(1.6e9, *list(vars(tight.gpu).values())[1:]), 1, 2, tight.network)
    none = make(lambda: configuration.build(config), config, small)
    assert none.micro is None and "backbone.checkpoint=true" in advice(none)


def test_stage_3_has_room_for_its_gradients_all_the_time():
    config = configuration.load(SMART, "train.batch=4", "train.micro=1", tiny=True)
    plan = make(lambda: configuration.build(config), config, cluster("2xA100-80"))
    last = plan.rows[3]
    assert plan.micro_batches == 2 and last.working == plan.seen.trained + plan.seen.peak
    assert last.peak == last.held.total + last.working


@pytest.mark.parametrize("gpus", ["8", "8xA100", "0xA100-80", "12xA100-80", "0x8xA100-80", "x"])
def test_gpus_that_there_are_not(gpus):
    with pytest.raises(ValueError, match="--gpus"):
        cluster(gpus)


def test_nodes_and_wires():
    many = cluster("16x4xA100-80", 1e9)
    assert (many.nodes, many.per_node, many.ranks, many.wire) == (16, 4, 64, 1e9)
    assert cluster("32xA100-80").nodes == 4 and cluster("8xA100-80").wire == 300e9


def test_groups_are_the_optimizer_s():
    objective = nn.Module()
    objective.a, objective.b = nn.Linear(3, 2), nn.Linear(2, 1)
    assert sorted(map(sorted, grouped(objective, Optim()))) == [[1, 2], [2, 6]]
