"""A backbone of a few thousand parameters that keeps the protocol, and batches for it: the quick path here."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import medfast_kernels as mk
from medfast.objectives.masking import AttentionMask
from medfast.objectives.smart import SMART
from medfast.objectives.smit import SMIT
from medfast.types import Batch, Features, Key

SIZE, CELLS = (32, 32, 32), (4, 4, 4)  # 64 cells of 8 voxels


class Tiny(nn.Module):
    """Patches of 4 voxels; stages of stride 8 and 16; [CLS] attends to the first one, if anything does."""

    channels, strides, in_channels, embed = (8, 12), (8, 16), 1, 6

    def __init__(self, semantic_attention: int | None = 1, drop_path: float = 0.0):
        super().__init__()
        self.semantic_attention, self.drop_path = semantic_attention, drop_path
        self.patch = nn.Conv3d(1, 6, 4, 4)
        self.first, self.second = nn.Linear(48, 8), nn.Linear(64, 12)
        if semantic_attention:
            self.query, self.value = nn.Linear(8, 1, bias=False), nn.Linear(8, 8)

    def forward(self, volume, mask=None, fill=None, key=None):
        x = self.patch(volume).movedim(1, -1)
        if mask is not None:
            where = mask.where
            for axis in (1, 2, 3):
                where = where.repeat_interleave(x.shape[axis] // mask.where.shape[axis], axis)
            x = torch.where(where.unsqueeze(-1), fill.to(x.dtype), x)
        one = torch.tanh(self.first(_merge(x)))
        if key is not None and self.drop_path:
            keep = mk.random_keep(self.drop_path, key=key.at(mk.Role.DROP_PATH))
            one = one * keep.view(-1, 1, 1, 1, 1)
        two = torch.tanh(self.second(_merge(one)))
        if not self.semantic_attention:
            return Features((one, two), two.flatten(1, -2).mean(1))
        tokens = one.flatten(1, -2)
        attention = self.query(tokens).squeeze(-1).softmax(-1)
        return Features((one, two), self.value((attention.unsqueeze(-1) * tokens).sum(1)), attention)


def _merge(x):
    b, d, h, w, c = x.shape
    return (
        x.reshape(b, d // 2, 2, h // 2, 2, w // 2, 2, c)
        .permute(0, 1, 3, 5, 2, 4, 6, 7)
        .reshape(b, d // 2, h // 2, w // 2, 8 * c)
    )


def smart(seed=0, dtype=torch.float64, semantic_attention=1, drop_path=0.0, mask=None, **settings) -> SMART:
    torch.manual_seed(seed)
    settings = {"prototypes": 10, "head_widths": (9, 7), "patch_temperature": 0.05, **settings}
    objective = SMART(Tiny(semantic_attention, drop_path), mask or AttentionMask(0.7, hint=0.1), **settings)
    return _ready(objective, dtype)


def smit(mask, seed=0, dtype=torch.float64, drop_path=0.0, **settings) -> SMIT:
    torch.manual_seed(seed)
    settings = {"prototypes": 10, "head_widths": (9, 7), "stage": 1, **settings}
    return _ready(SMIT(Tiny(None, drop_path), mask, **settings), dtype)


def _ready(objective, dtype):
    """In ``dtype``, with a fill that shows and centres that matter."""
    objective.to(dtype)
    with torch.no_grad():
        for name, tensor in (*objective.named_parameters(), *objective.named_buffers()):
            if name == "fill" or name.startswith("centres."):
                tensor.normal_(0.0, 0.3)
    if objective.teacher is not None:
        objective.teacher.to(dtype)
        # apart from the student, or nobody sees whose parameters are used
        objective.teacher.copy_({name: x + 0.1 * torch.randn_like(x) for name, x in objective.teacher.state().items()})
    return objective


def batch(b=3, seed=1, dtype=torch.float64, slots=None, step=4, **extra) -> Batch:
    torch.manual_seed(seed)
    views = tuple(torch.rand(b, 1, *SIZE, dtype=dtype) for _ in range(2))
    slots = torch.arange(b) if slots is None else torch.as_tensor(slots)
    return Batch(views=views, boxes=None, key=Key(11, step, slots), **extra)


def planned(o, size, b=2) -> Batch:
    """Views for any objective, with everything that the data pipeline may say of them. size: per axis."""
    torch.manual_seed(1)
    views, key = tuple(torch.rand(b, 1, *size) for _ in range(o.views)), Key(3, 7, torch.arange(b))
    targets = {name: make(key.stack(o.views)).chunk(o.views) for name, make in o.ahead(size).items()}
    targets["uncut"] = tuple(torch.rand_like(view) for view in views)
    turns = torch.tensor([[0, 1], [3, 2]])
    params = {"rotation": turns, "flip": turns.clamp(max=2), "volume": torch.arange(b)}
    return Batch(views, None, key, params=params, targets=targets)


def split(whole: Batch, rows: slice) -> Batch:
    """These samples of a batch, as another rank would get them."""
    return Batch(
        views=tuple(view[rows] for view in whole.views),
        boxes=None,
        key=whole.key._replace(sample=whole.key.sample[rows]),
        valid=tuple(valid[rows] for valid in whole.valid),
        targets={name: tuple(x[rows] for x in value) for name, value in whole.targets.items()},
    )


@pytest.fixture
def tiny() -> SimpleNamespace:
    return SimpleNamespace(
        smart=smart, smit=smit, ready=_ready, batch=batch, planned=planned, split=split, Backbone=Tiny, cells=CELLS,
        size=SIZE,
    )  # fmt: skip
