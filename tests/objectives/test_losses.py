"""Each term against plain loops in fp64: values and gradients."""

import math

import pytest
import torch

from medfast.objectives import distillation
from medfast.objectives.distillation import Sides, distil_image, distil_patches
from medfast.objectives.losses import Centres, cross_entropy, entropy, hidden_l1, hidden_mse, masked_l1, mean_of_means
from medfast.objectives.masking import random_cells
from medfast.types import Key, Mask

K, WIDTH = 5, 3


def softmax(row):
    top = max(row)
    exps = [math.exp(x - top) for x in row]
    return [x / sum(exps) for x in exps]


def plain_cross_entropy(student, teacher, centre, student_temperature, teacher_temperature):
    """SMART eqs. 2 and 3 of one token, in Python floats: sum over prototypes."""
    p_s = softmax([x / student_temperature for x in student])
    p_t = softmax([(x - c) / teacher_temperature for x, c in zip(teacher, centre, strict=True)])
    return -sum(t * math.log(s) for t, s in zip(p_t, p_s, strict=True))


def random(*shape, seed=0, grad=False):
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.requires_grad_(grad)


def sides(centre, student_temperature=0.5, teacher_temperature=0.3):
    """Last layers as plain matrices, and their centring."""
    w_s, w_t = random(K, WIDTH, seed=8, grad=True), random(K, WIDTH, seed=9)
    centres = Centres(("x",), K).double()
    centres.x.copy_(centre)
    made = Sides(
        lambda z: z @ w_s.T, lambda z: z @ w_t.T, student_temperature, lambda h: centres("x", h, teacher_temperature)
    )
    return made, w_s, w_t


def numeric_gradient(f, x, eps=1e-6):
    """Central differences of a float-valued f at x."""
    out = torch.zeros_like(x)
    for i in range(x.numel()):
        for sign in (1, -1):
            y = x.detach().clone()
            y.view(-1)[i] += sign * eps
            out.view(-1)[i] += sign * f(y) / (2 * eps)
    return out


def test_image_distillation_crosses_the_views():
    b, centre = 2, random(K, seed=3)
    made, w_s, w_t = sides(centre)
    student, teacher = random(2 * b, WIDTH, seed=1, grad=True), random(2 * b, WIDTH, seed=2)

    def plain(z):
        total = 0.0
        for i in range(b):
            for mine, other in ((i, b + i), (b + i, i)):
                h_s, h_t = (w_s @ z[mine]).tolist(), (w_t @ teacher[other]).tolist()
                total += plain_cross_entropy(h_s, h_t, centre.tolist(), 0.5, 0.3) / (2 * b)
        return total

    term = distil_image(student, teacher, made)
    assert term.loss.item() == pytest.approx(plain(student.detach()), rel=1e-12)
    (gradient,) = torch.autograd.grad(term.loss, student)
    torch.testing.assert_close(gradient, numeric_gradient(plain, student), rtol=1e-6, atol=1e-8)
    total, rows = term.sums
    torch.testing.assert_close(total, sum(w_t @ z for z in teacher))
    assert rows == 2 * b


@pytest.mark.parametrize("gathered", [True, False])
def test_patch_distillation_sees_hidden_tokens_only_and_means_per_sample(gathered):
    b, n, centre = 2, 8, random(K, seed=3)
    made, w_s, w_t = sides(centre)
    mask = random_cells((2, 2, 2), 3, Key(1, 0, torch.arange(2 * b)))
    if not gathered:  # counts that differ between samples
        where = mask.where.clone()
        where[1, 0] = True
        where[2] = False
        mask = Mask(where)
    student, teacher = random(2 * b, n, WIDTH, seed=1, grad=True), random(2 * b, n, WIDTH, seed=2)
    where = mask.where.flatten(1)

    def plain(z):
        total = 0.0
        for i in range(2 * b):
            values = [
                plain_cross_entropy((w_s @ z[i, j]).tolist(), (w_t @ teacher[i, j]).tolist(), centre.tolist(), 0.5, 0.3)
                for j in range(n)
                if where[i, j]
            ]
            total += sum(values) / max(len(values), 1) / (2 * b)
        return total

    picked = student.gather(1, mask.hidden.unsqueeze(-1).expand(-1, -1, WIDTH)) if gathered else student
    term = distil_patches(picked, teacher, mask, made)
    assert term.loss.item() == pytest.approx(plain(student.detach()), rel=1e-12)
    (gradient,) = torch.autograd.grad(term.loss, student)
    torch.testing.assert_close(gradient, numeric_gradient(plain, student), rtol=1e-6, atol=1e-8)
    total, rows = term.sums
    torch.testing.assert_close(total, sum(w_t @ z for z in teacher.flatten(0, 1)))
    assert rows == 2 * b * n


def test_masked_l1_counts_hidden_voxels_alone():
    prediction, target = random(2, 1, 2, 3, 2, seed=1, grad=True), random(2, 1, 2, 3, 2, seed=2)
    where = random(2, 2, 3, 2, seed=3) > 0.2

    def plain(x):
        total = 0.0
        for i in range(2):
            picked = [abs(a - b) for a, b, m in zip(x[i].flatten().tolist(), target[i].flatten().tolist(),
                                                    where[i].flatten().tolist(), strict=True) if m]  # fmt: skip
            total += sum(picked) / (len(picked) + 1e-5) / 2
        return total

    loss = masked_l1(prediction, target, where)
    assert loss.item() == pytest.approx(plain(prediction.detach()), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, prediction)
    torch.testing.assert_close(gradient, numeric_gradient(plain, prediction), rtol=1e-6, atol=1e-9)
    assert masked_l1(prediction, target, torch.zeros_like(where)) == 0.0


@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("size, stride", [((4, 6, 4), (2, 3, 2)), ((5, 6, 7), 3), ((6, 8), 2)])
def test_errors_on_hidden_cells_are_those_on_their_voxels(ids, padded, size, stride):
    lengths = (stride,) * len(size) if isinstance(stride, int) else stride
    cells = tuple(-(-n // s) for n, s in zip(size, lengths, strict=True))
    mask = random_cells(cells, 5, Key(1, 0, torch.arange(3)))
    prediction, target = random(3, 2, *size, seed=1, grad=True), random(3, 2, *size, seed=2)
    valid = random(3, *size, seed=3) > -0.5 if padded else None
    total = {"l1": 0.0, "mse": 0.0}
    for i in range(3):
        found = []
        for at in torch.ones(size).nonzero().tolist():
            cell = tuple(x // s for x, s in zip(at, lengths, strict=True))
            if mask.where[i][cell] and (valid is None or valid[i][tuple(at)]):
                found.append(prediction[(i, slice(None), *at)] - target[(i, slice(None), *at)])
        total["l1"] = total["l1"] + sum(x.abs().mean() for x in found) / (len(found) + 1e-5) / 3
        total["mse"] = total["mse"] + sum(x.square().mean() for x in found) / len(found) / 3
    for loss, name in ((hidden_l1, "l1"), (hidden_mse, "mse")):
        ours = loss(prediction, target, mask if ids else Mask(mask.where), stride, valid)
        torch.testing.assert_close(ours, total[name], rtol=1e-12, atol=0.0)
        gradients = (torch.autograd.grad(x, prediction, retain_graph=True)[0] for x in (ours, total[name]))
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


def test_samples_that_hide_nothing_cost_nothing():
    x, y, none = random(2, 1, 4, 4, seed=1), random(2, 1, 4, 4, seed=2), Mask(torch.zeros(2, 2, 2, dtype=torch.bool))
    assert hidden_l1(x, y, none, 2) == hidden_mse(x, y, none, 2) == 0.0


def test_centres_absorb_by_hand_and_whatever_the_split():
    logits = random(12, K, seed=4) + 2.0
    whole, parts = Centres(("x",), K).double(), Centres(("x",), K).double()
    expected = torch.zeros(K, dtype=torch.float64)
    for _ in range(3):
        expected = 0.9 * expected + 0.1 * logits.mean(0)
        whole.absorb({"x": (logits.sum(0), torch.tensor(12.0))})
        sums = [(logits[rows].sum(0), len(logits[rows])) for rows in (slice(0, 5), slice(5, 12))]
        parts.absorb({"x": (sums[0][0] + sums[1][0], torch.tensor(float(sums[0][1] + sums[1][1])))})
    torch.testing.assert_close(whole.x, expected)
    torch.testing.assert_close(parts.x, whole.x)


def test_cross_entropy_of_16_bit_logits_is_fp32():
    logits, target = torch.randn(4, K), torch.rand(4, K).softmax(-1)
    low = cross_entropy(logits.bfloat16(), target, 0.1)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, cross_entropy(logits.bfloat16().float(), target, 0.1), rtol=0, atol=0)


def test_entropy_of_the_mean_row_tells_collapse_from_use():
    assert entropy(torch.eye(K)).item() == pytest.approx(math.log(K))
    assert entropy(torch.eye(K)[:1].expand(7, K)).item() == 0.0


def test_mean_of_means_does_not_let_long_samples_weigh_more():
    values = torch.tensor([[1.0, 1.0, 1.0], [4.0, 9.0, 9.0], [5.0, 5.0, 5.0]])
    weight = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert mean_of_means(values, weight).item() == pytest.approx((1.0 + 4.0 + 0.0) / 3)


@pytest.mark.parametrize("gathered", [True, False])
def test_blocks_of_rows_change_nothing_and_bound_the_logits(gathered, monkeypatch):
    b, n = 3, 8
    mask = random_cells((2, 2, 2), 5, Key(1, 0, torch.arange(2 * b)))
    mask = mask if gathered else Mask(mask.where)
    student, teacher = random(2 * b, 5 if gathered else n, WIDTH, seed=1, grad=True), random(2 * b, n, WIDTH, seed=2)
    centre, rows, found = random(K, seed=3), [], []
    for most in (2048, 7):
        monkeypatch.setattr(distillation, "ROWS", most)
        made, w_s, _ = sides(centre)
        watched = made._replace(student=lambda z, made=made: rows.append(len(z)) or made.student(z))
        term = distil_patches(student, teacher, mask, watched)
        gradients = torch.autograd.grad(term.loss, (student, w_s))
        found.append((term.loss.detach(), term.entropy, *gradients))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-14)
    hidden = made.sharpen(made.teacher(teacher[mask.where.flatten(1)]))
    torch.testing.assert_close(found[0][1], entropy(hidden))  # of hidden tokens alone
    whole = 2 * b * (5 if gathered else n)
    assert rows[0] == whole and max(rows[1:]) == 7 and sum(rows[1:]) == 2 * whole  # and again in the backward pass
