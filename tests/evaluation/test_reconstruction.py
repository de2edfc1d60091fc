import pytest
import torch

from medfast.evaluation.reconstruction import Score, measure, score


def test_a_perfect_model_passes_and_a_constant_does_not(stream, fills):
    perfect = {s.mask: s for s in measure(fills(lambda view, _: view), stream, 6)}
    assert set(perfect) == {"fixed", "own"}
    assert perfect["fixed"].l1["model"] == 0 and perfect["fixed"].passes
    assert perfect["fixed"].crops == 12 and perfect["fixed"].hidden == pytest.approx(45 / 64)
    assert perfect["own"].hidden == pytest.approx(0.5)
    constant = measure(fills(), stream, 6)[0]
    assert not constant.passes and constant.l1["model"] == pytest.approx(0.3, abs=1e-5)
    assert measure(fills(), stream, 6) == measure(fills(), stream, 6)


def test_the_model_is_shown_the_fixed_masks(stream, fills):
    seen = []

    class Watched(fills):
        def picture(self, batch):
            seen.append("mask" in batch.targets)
            return super().picture(batch)

    measure(Watched(), stream, 2)
    assert sorted(set(seen)) == [False, True]


def test_only_hidden_and_valid_voxels_count():
    truth = torch.rand(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    hidden, valid = torch.zeros(1, 8, 8, 8, dtype=torch.bool), torch.ones(1, 8, 8, 8, dtype=torch.bool)
    hidden[:, :4] = True
    valid[:, 0] = False
    made = truth + 0.25 * (hidden & valid)[:, None] + 7.0 * (~hidden | ~valid)[:, None]
    values = score(truth, made, hidden, valid)
    assert values["model"].item() == pytest.approx(0.25, abs=1e-6)
    judged = truth[0, 0][(hidden & valid)[0]]
    for name, known in (("median_crop", valid), ("median_visible", valid & ~hidden)):
        middle = truth[0, 0][known[0]].median()
        assert values[name].item() == pytest.approx((judged - middle).abs().mean().item(), abs=1e-6)
    assert values["nearest"].item() == pytest.approx((truth[0, 0, 1:4] - truth[0, 0, 4]).abs().mean().item(), abs=1e-6)
    assert torch.isfinite(torch.stack(list(values.values()))).all()


def test_blurring_keeps_a_constant_up_to_the_border():
    truth = torch.full((1, 1, 12, 12, 12), 0.7)
    hidden = torch.zeros(1, 12, 12, 12, dtype=torch.bool)
    hidden[:, :3] = True
    values = score(truth, truth, hidden, torch.ones_like(hidden))
    assert all(value.item() < 1e-5 for value in values.values())


def test_the_gate_takes_the_harder_predictor_of_each_kind():
    l1 = {"model": 0.07, "median_crop": 0.1, "median_visible": 0.2, "nearest": 0.09, "smoothed_1": 0.08}
    assert Score("fixed", 1, 1, 0.5, l1).median_ratio == pytest.approx(0.7)
    assert Score("fixed", 1, 1, 0.5, l1).passes
    assert not Score("fixed", 1, 1, 0.5, {**l1, "median_crop": 0.09}).passes
    assert not Score("fixed", 1, 1, 0.5, {**l1, "nearest_smoothed_2": 0.06}).passes


def test_crops_with_nothing_to_go_by_are_left_out(stream, fills):
    class Blind(fills):
        def picture(self, batch):
            shown = super().picture(batch)
            for mask in shown["mask"]:
                mask[0] = True
            return shown

    found = measure(Blind(), stream, 2)
    assert all(entry.crops == 2 for entry in found)


def test_an_objective_that_reconstructs_nothing_has_no_score(stream, fills):
    class Distils(fills):
        def picture(self, batch):
            return {"mask": super().picture(batch)["mask"]}

    assert measure(Distils(), stream, 2) == ()


def test_an_objective_without_cells_has_no_score(stream, fills):
    class Whole(fills):
        def cells(self, size):
            return None

    assert measure(Whole(), stream, 2) == ()
