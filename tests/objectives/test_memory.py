"""Losses over many tokens never hold what is as large as all tokens times all prototypes, or all tokens squared."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from medfast.objectives import distillation
from medfast.objectives.contrast import Groups, token_contrast
from medfast.objectives.distillation import Sides, distil_patches
from medfast.objectives.heads import Prototypes
from medfast.objectives.losses import Centres
from medfast.objectives.masking import random_cells
from medfast.types import Key, alone

VIEWS, CELLS, K, WIDTH = 4, (8, 8, 8), 512, 4


class Held(TorchDispatchMode):
    """peak: the most bytes that storages made under this mode held together. largest: of one of them."""

    def __init__(self):
        super().__init__()
        self.alive: dict[StorageWeakRef, int] = {}
        self.peak = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.alive.setdefault(StorageWeakRef(storage), storage.nbytes())
                self.largest = max(self.largest, storage.nbytes())
        self.alive = {ref: size for ref, size in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


@pytest.mark.parametrize("rows, blocked", [(128, True), (10**9, False)])
def test_logits_of_all_tokens_never_coexist(monkeypatch, rows, blocked):
    monkeypatch.setattr(distillation, "ROWS", rows)
    mask = random_cells(CELLS, 384, Key(0, 0, torch.arange(VIEWS)))
    student, teacher = Prototypes(WIDTH, K), Prototypes(WIDTH, K)
    centres = Centres(["patch"], K)
    sides = Sides(student, teacher, 0.1, lambda logits: centres("patch", logits, 0.04))
    seen = torch.nn.functional.normalize(torch.randn(VIEWS, 384, WIDTH), dim=-1).requires_grad_()
    taught = torch.nn.functional.normalize(torch.randn(VIEWS, 512, WIDTH), dim=-1)
    whole = VIEWS * 384 * K * 4
    with Held() as held:
        distil_patches(seen, taught, mask, sides).loss.backward()
    assert seen.grad.abs().sum() > 0
    assert (held.largest < whole / 8 and held.peak < whole) == blocked
    if not blocked:  # what the blocks save: logits of both sides, the target, and what the softmax keeps
        assert held.peak > 3 * whole


def test_similarities_of_all_tokens_never_coexist():
    positions, volumes = 512, 2
    z = torch.nn.functional.normalize(torch.randn(2 * volumes, positions, 16), dim=-1).requires_grad_()
    whole = (2 * volumes * positions) ** 2 * 4
    with Held() as held:
        token_contrast(z, Groups(0, alone), 0.5).backward()
    assert z.grad.abs().sum() > 0 and held.peak < whole / 8
