import math

import pytest
import torch

from medfast.architectures import BACKBONES
from medfast.evaluation.gauges import gauges_of, recentre, shuffled, uniform_losses
from medfast.objectives import MASKS, OBJECTIVES
from medfast.objectives.attention import head_entropies
from medfast.objectives.gauges import (
    ROWS,
    collapse_gauges,
    effective_rank,
    gathered,
    information_within,
    position_similarity,
    prototype_entropy,
    variance_within,
    watched,
)
from medfast.types import Batch, Objective, Output, Teacher
from medfast_kernels import Key


def test_rank_of_an_orthogonal_matrix_is_full_and_of_one_direction_is_one():
    assert effective_rank(torch.eye(12)).item() == pytest.approx(12)
    assert effective_rank(3.0 * torch.eye(12)[:, :7]).item() == pytest.approx(7)
    assert effective_rank(torch.outer(torch.rand(50) + 0.1, torch.rand(8))).item() == pytest.approx(1, abs=1e-5)
    assert effective_rank(torch.ones(40, 16)).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("shape", [(40, 9), (9, 40)])
def test_rank_is_the_exponential_of_the_entropy_of_normalised_singular_values(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    p = torch.linalg.svdvals(x)
    p = p / p.sum()
    assert effective_rank(x).item() == pytest.approx(math.exp(-sum(v * math.log(v) for v in p.tolist())), rel=1e-9)


def test_rank_of_two_unequal_directions_has_a_closed_form():
    x = torch.diag(torch.tensor([3.0, 1.0]))
    assert effective_rank(x).item() == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))


def test_rank_survives_zeros_and_reports_what_is_not_finite():
    assert effective_rank(torch.zeros(5, 3)).item() == 1
    assert math.isnan(effective_rank(torch.full((5, 3), float("inf"))).item())
    with pytest.raises(ValueError, match="matrix"):
        effective_rank(torch.zeros(2, 3, 4))


def test_entropies_of_the_three_states_a_teacher_can_be_in():
    k = 32
    uniform = torch.full((10, k), 1 / k)
    one = torch.eye(k)[torch.zeros(10, dtype=torch.int64)]
    spread = torch.eye(k)
    assert [x.item() for x in prototype_entropy(uniform)] == pytest.approx([math.log(k), math.log(k)])
    assert [x.item() for x in prototype_entropy(one)] == pytest.approx([0, 0])
    assert [x.item() for x in prototype_entropy(spread)] == pytest.approx([math.log(k), 0])


class Tokens(Objective):
    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Linear(6, 6, bias=False)
        with torch.no_grad():
            self.backbone.weight.copy_(torch.ones(6, 6) + 5 * torch.eye(6))
        self.teacher = Teacher(self, "backbone")

    def forward(self, batch, t):
        return Output({})

    def tokens(self, batch, t=0.0):
        student, teacher = (side.backbone(batch.views[0]) for side in (self, self.teacher))
        return {"student": student, "teacher": teacher, "prototypes": teacher.softmax(1)}


def test_references_stand_beside_the_value():
    rows = torch.cat([torch.eye(6), 2 * torch.eye(6)])
    batch = Batch((rows,), None, Key(0, 0))
    found = gauges_of(Tokens(), [batch], 0.5)
    assert set(found) == {"rank_student", "rank_teacher", "entropy_used", "entropy_each", "information"}
    rank = found["rank_student"]
    assert (rank.collapsed, rank.ceiling) == (1, 6)
    assert rank.value == pytest.approx(effective_rank(Tokens().backbone(rows)).item())
    assert rank.random != pytest.approx(rank.value, rel=1e-3)
    assert found["entropy_used"].ceiling == pytest.approx(math.log(6))
    assert found["entropy_used"].collapsed == found["information"].collapsed == 0
    assert found["information"].value == pytest.approx(found["entropy_used"].value - found["entropy_each"].value)
    assert gauges_of(Objective(), [batch], 0.5) == {}


def test_shuffling_keeps_each_tensors_numbers_and_leaves_the_model_alone():
    model = Tokens()
    before = model.backbone.weight.clone()
    twin = shuffled(model)
    assert torch.equal(model.backbone.weight, before)
    for mine, other in ((model.backbone, twin.backbone), (model.teacher.backbone, twin.teacher.backbone)):
        assert not torch.equal(mine.weight, other.weight)
        assert torch.equal(mine.weight.flatten().sort().values, other.weight.flatten().sort().values)


@pytest.fixture
def smart():
    """SMART as it is initialised, its centres where they settle on the batch, and that batch."""
    torch.manual_seed(0)
    backbone = BACKBONES["swin"](embed=12, depths=(1, 2), heads=(2, 2), window=4, patch=4, semantic_attention=2,
                                 sa_heads=4)  # fmt: skip
    objective = OBJECTIVES["smart"](backbone, MASKS["attention"](0.7, 0.1), prototypes=64, head_widths=(32, 32, 16))
    batch = Batch(tuple(torch.rand(2, 1, 32, 32, 32) for _ in range(2)), None, Key(0, 0, torch.arange(2)))
    recentre(objective, [batch], 0.5)
    return objective, batch


def test_an_untrained_model_reads_about_what_random_reads(smart):
    objective, batch = smart
    centres = [x.clone() for x in objective.centres.buffers()]
    found = gauges_of(objective, [batch], 0.5)
    # with another model's centres both are at least 1.3 too low; two drawings of this small model differ by less
    assert found["entropy_used"].random == pytest.approx(found["entropy_used"].value, abs=0.6)
    assert found["entropy_each"].random == pytest.approx(found["entropy_each"].value, abs=1.0)
    assert all(torch.equal(a, b) for a, b in zip(centres, objective.centres.buffers(), strict=True))


def test_gauges_are_taken_at_the_time_given(smart):
    objective, batch = smart  # the teacher is sharper before t = 0.0375
    early, late = (gauges_of(objective, [batch], t)["entropy_each"] for t in (0.0, 0.9))
    assert early.value < late.value and early.random < late.random


def test_information_is_no_more_than_which_row_it_is(smart):
    objective, batch = smart
    found, rows = gauges_of(objective, [batch], 0.5), len(objective.tokens(batch, 0.5)["prototypes"])
    assert found["information"].ceiling == pytest.approx(math.log(min(rows, 64))) and rows < 64


def test_uniform_losses_are_what_a_uniform_student_costs(smart):
    objective, batch = smart
    expected = uniform_losses(objective)
    assert set(expected) == {"ampd", "aitd", "gitd"}
    objective.student_temperature = 1e9
    losses = objective(batch, torch.tensor(0.5)).losses
    assert {name: losses[name].item() for name in expected} == pytest.approx(expected, rel=1e-4)
    assert uniform_losses(Objective()) == {}


def test_names_follow_what_tokens_offer():
    assert set(collapse_gauges({"student": torch.eye(3)})) == {"rank_student", "rows"}
    assert collapse_gauges({}) == {}


def test_information_is_what_tells_the_crop_and_what_tells_the_place_in_it():
    crops = torch.arange(3).repeat_interleave(torch.tensor([8, 9, 10]))
    told = torch.eye(3)[crops]  # one prototype per crop
    used, each = prototype_entropy(told)
    assert used - each > 1.0 and information_within(told, crops).item() == pytest.approx(0)
    turn = torch.eye(2)[torch.arange(27) % 2]
    assert information_within(turn[:16], torch.arange(16) // 8).item() == pytest.approx(math.log(2))  # places alone
    p = torch.randn(27, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul(2).softmax(1)
    between = prototype_entropy(torch.stack([p[crops == i].mean(0) for i in crops]))  # crops by their mean distribution
    used, each = prototype_entropy(p)
    assert information_within(p, crops).item() == pytest.approx((used - each - (between[0] - between[1])).item())
    assert "information_within" in collapse_gauges({"prototypes": p, "crops": crops})
    assert "information_within" not in collapse_gauges({"prototypes": p[:23], "crops": torch.arange(23) // 8})


def test_variance_is_among_tokens_of_a_crop_and_between_crops():
    generator = torch.Generator().manual_seed(0)
    token, crop = (torch.randn(shape, generator=generator) for shape in ((2, 5, 400, 30), (2, 5, 1, 30)))
    shared = 100 * torch.randn(1, 1, 1, 30, generator=generator)
    assert variance_within(shared + crop.expand(2, 5, 400, 30)).item() == pytest.approx(0, abs=1e-9)
    assert variance_within(shared + token - token.mean(2, keepdim=True)).item() == pytest.approx(1)
    assert variance_within(shared + token + crop).item() == pytest.approx(1 / (1 + 4 / 5), abs=0.05)  # 5 crops, 4 free
    assert all(math.isnan(variance_within(x).item()) for x in (token[:, :1], token[:, :, :1], torch.ones(1, 2, 3, 4)))


def test_rows_are_gathered_crop_after_crop_until_there_are_enough():
    class Images(Objective):
        def tokens(self, batch, t=0.0):
            return {"prototypes": batch.views[0], "crops": torch.tensor([0, 0, 1]), "student": torch.ones(ROWS, 2)}

    read = []
    batches = (read.append(i) or Batch((torch.full((3, 5), float(i)),), None, Key(0, i)) for i in range(99))
    found, used = gathered(Images(), batches, 0.0)
    assert len(read) == used == -(-ROWS // 3) and len(found["student"]) == ROWS
    assert torch.equal(found["prototypes"][:, 0], torch.arange(used).repeat_interleave(3))
    assert found["crops"][:6].tolist() == [0, 0, 1, 2, 2, 3] and found["crops"].max() == 2 * used - 1
    assert collapse_gauges(found)["rows"] == ROWS
    few, used = gathered(Images(), [Batch((torch.ones(3, 5),), None, Key(0, 0))], 0.0)
    assert used == 1 and collapse_gauges(few)["rows"] == 3


def test_position_similarity_is_1_for_places_and_0_for_contents():
    generator = torch.Generator().manual_seed(0)
    place, content = torch.randn(1, 1, 30, 40, generator=generator), torch.randn(2, 5, 30, 40, generator=generator)
    shared = 100 * torch.randn(1, 1, 1, 40, generator=generator)
    assert position_similarity(shared + place.expand(2, 5, 30, 40)).item() == pytest.approx(1)
    assert abs(position_similarity(shared + content).item()) < 0.02
    assert position_similarity(shared + place + content).item() == pytest.approx(0.5, abs=0.02)
    assert math.isnan(position_similarity(content[:, :1]).item())


def test_head_entropies_are_those_of_the_weights_that_forward_uses():
    torch.manual_seed(0)
    net = BACKBONES["vit"](size=16, patch=8, embed=12, depth=2, heads=3, cls=True).double()
    for block in net.blocks:
        torch.nn.init.normal_(block.attn.qkv.weight)
    volume, seen = torch.rand(1, 1, 16, 16, 16, dtype=torch.float64), []
    hook = net.blocks[0].attn.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    found = head_entropies(net, lambda: net(volume))
    hook.remove()
    assert [name for name, _ in found] == ["blocks.0.attn", "blocks.1.attn"]
    q, k, _ = net.blocks[0].attn.qkv(seen[0]).unflatten(-1, (3, 3, 4)).unbind(2)
    weights = (torch.einsum("bihd,bjhd->bhij", q, k) / 2).softmax(-1)[0]
    expected = -(weights * weights.log()).sum(-1).mean(-1) / math.log(9)
    torch.testing.assert_close(found[0][1], expected)
    assert not net.blocks[0].attn._forward_pre_hooks


def test_every_kind_of_windowed_attention_tells_its_heads():
    torch.manual_seed(0)
    volume = torch.rand(1, 1, 32, 32, 32)
    small = {"embed": 12, "depths": [2, 1], "heads": [2, 4], "window": 2}
    swin = BACKBONES["swin"](**small)
    found = head_entropies(swin, lambda: swin(volume))
    assert [len(entropy) for _, entropy in found] == [2, 2, 4]
    assert all(0.5 < x <= 1.0 for _, entropy in found for x in entropy)  # as they are drawn, heads look everywhere
    fuse = BACKBONES["swinfuse"](**small, dim_width=12, dim_heads=[1, 1])
    assert len(head_entropies(fuse, lambda: fuse.encode_pair(volume, volume))) == 4 + 3
    with torch.no_grad():
        swin.stages[0].blocks[0].attn.qkv.weight.mul_(1e4)  # each query sees one key
    assert head_entropies(swin, lambda: swin(volume))[0][1].max() < 0.2


def test_a_model_is_watched_where_it_has_something_to_show(smart):
    objective, batch = smart
    found = watched(objective, [batch], 0.5)
    assert {"rank_student", "information", "head_entropy", "head_entropy_spread", "teacher_norm"} <= set(found)
    assert 0.0 < found["variance_within"] < 1.0 and found["rows"] == len(objective.tokens(batch, 0.5)["student"])
    assert -1.0 <= found["position_similarity"] <= 1.0
    norm = sum(x.double().square().sum() for x in objective.teacher.state().values()).sqrt()
    assert found["teacher_norm"].item() == pytest.approx(norm.item())
    assert watched(Objective(), [batch], 0.5) == {}
