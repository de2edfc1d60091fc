"""Weights of public code under our names and back, and the settings under which ours computes what theirs does.

Here is what a format is and how a state dict is turned round; files are ``medfast.interchange``'s. Maps of networks
that are on the package index (MONAI's, that of model_swinvit.pt by MONAI's own ``load_from``) are proven by equal
outputs. The others are names, shapes and counts read from public code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import ARCHITECTURES
from .blocks import MERGE_ORDERS
from .names import (
    DAE_FORMER,
    MONAI_SWIN,
    MONAI_SWIN_UNETR,
    MONAI_SWINVIT,
    MONAI_UNETR,
    MONAI_VIT,
    NNFORMER,
    RESNET,
    SMIT,
    SWINFUSE,
    Names,
    rename,
)  # fmt: skip

ENOUGH = 0.95  # share of the numbers of a network that other weights must hold
_WRAPPERS = ("module.", "backbone.", "model.")  # what DataParallel and trainers put before every name
_HARMLESS = {  # settings that leave what the shared weights compute as it is, or that shapes give away
    "name", "drop_path", "checkpoint", "taps", "classes", "semantic_attention", "sa_heads", "sa_type", "size",
    "deep_supervision", "unread_norms",
}  # fmt: skip
_OURS_ALONE = ("semantic", "tap_norms")  # parts of a Swin that not every public one has


class Layout(NamedTuple):
    """How one architecture of ours lies in a format.

    names: the map. within: ours is that part of the network the names are of ("encoder": the backbone of a U-Net).
    settings: constructor arguments under which ours computes what theirs does. merges: orders of ``MERGE_ORDERS`` that
    theirs can be built with; weights trained in another one are permuted. index: bias rows (n, n) of a window, a buffer
    that theirs has. idle_norms: theirs holds LayerNorms that nothing reads. keeps: parts that only some Swins have, and
    theirs has. fixed: arguments of ours that theirs cannot be given, and their values there.
    """

    names: Names
    within: str = ""
    settings: Mapping[str, Any] = {}
    merges: tuple[str, ...] = ()
    index: Callable[[int], Tensor] | None = None
    idle_norms: bool = False
    keeps: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = {}


class Match(NamedTuple):
    """Names of ours that were found, those that were not (missing or of another shape), what of theirs nothing reads,
    and the share of our numbers that was found."""

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unread: tuple[str, ...]
    share: float

    def __str__(self) -> str:
        missing, unread = _some(self.missing), _some(self.unread)
        return (
            f"{len(self.matched)} tensors matched, {len(self.missing)} missing or of another shape{missing}, "
            f"{len(self.unread)} of the file not read{unread}: {self.share:.1%} of the numbers wanted"
        )


def bias_index(window: int) -> Tensor:
    """Row of the bias table of a cubic window for every pair of its tokens, (window**3, window**3) int64."""
    at = torch.cartesian_prod(*[torch.arange(window)] * 3)
    side = 2 * window - 1
    return ((at[:, None] - at[None] + window - 1) * torch.tensor([side**2, side, 1])).sum(-1)


def _nnformer_index(window: int) -> Tensor:
    """nnFormer's, whose first axis counts 3 * window - 1 rows where (2 * window - 1)**2 would be right."""
    at = torch.cartesian_prod(*[torch.arange(window)] * 3)
    return ((at[:, None] - at[None] + window - 1) * torch.tensor([3 * window - 1, 2 * window - 1, 1])).sum(-1)


_CLIPS = {"clip": True, "bias_index": "sliced"}  # of a bare Swin; swin_unetr always clips
_SMIT_CODE = {"window_order": "smit_code"}
_PLAIN = {"merge": "monai", "patch_norm": False}
_MERGES = ("monai", "monai_v2")
_ALL_MERGES = (*_MERGES, "monai_legacy")  # load_from does not look
_UNETR = {"depth": 12, "patch": 16, "taps": (3, 6, 9), "positions": "learned"}

FORMATS: dict[str, dict[str, Layout]] = {
    "medfast": {name: Layout(Names(()), keeps=_OURS_ALONE) for name in ARCHITECTURES},
    "monai_swin_unetr": {
        "swin_unetr": Layout(
            MONAI_SWIN_UNETR, "", {"merge": "monai", "bias_index": "sliced"}, _MERGES, index=bias_index
        ),
        "swin": Layout(MONAI_SWIN_UNETR, "encoder", {**_PLAIN, **_CLIPS}, _MERGES, index=bias_index),
    },
    "monai_swin": {"swin": Layout(MONAI_SWIN, "", {**_PLAIN, **_CLIPS}, _MERGES, index=bias_index)},
    "monai_swinvit": {
        "swin_unetr": Layout(
            MONAI_SWINVIT, "", {"merge": "monai_legacy", "bias_index": "sliced"}, _ALL_MERGES, index=bias_index
        ),
        "swin": Layout(
            MONAI_SWINVIT, "encoder", {**_PLAIN, **_CLIPS, "merge": "monai_legacy"}, _ALL_MERGES, index=bias_index
        ),
    },
    "monai_vit": {"vit": Layout(MONAI_VIT, idle_norms=True)},
    "monai_unetr": {
        "unetr": Layout(MONAI_UNETR, idle_norms=True, fixed=_UNETR),
        "vit": Layout(
            MONAI_UNETR, "encoder", idle_norms=True, fixed={"depth": 12, "patch": 16, "positions": "learned"}
        ),
    },
    "smit": {
        "smit_unet": Layout(SMIT, "", _SMIT_CODE, ("smit",), index=bias_index, keeps=("tap_norms",)),
        "swin": Layout(
            SMIT, "encoder", {**_SMIT_CODE, "merge": "smit"}, ("smit",), index=bias_index, keeps=("tap_norms",)
        ),
    },
    "nnformer": {
        "nnformer": Layout(NNFORMER, "", {"bias_index": "legacy"}, index=_nnformer_index),
        "nnformer_encoder": Layout(NNFORMER, "encoder", {"bias_index": "legacy"}, index=_nnformer_index),
    },
    "swinfuse": {
        "swinfuse": Layout(
            SWINFUSE, "", {"dim": "code", "merge": "monai_legacy"}, ("monai_legacy",), bias_index, fixed={"dim": "code"}
        )
    },
    "dae_former": {"dae_former": Layout(DAE_FORMER), "dae_former_encoder": Layout(DAE_FORMER, "encoder")},
    "med3d": {"resnet50": Layout(RESNET, fixed={"dilated": True})},
}


def layout(kind: str, architecture: str) -> Layout:
    """ValueError for a format that is not there, or that does not hold this architecture."""
    if kind not in FORMATS:
        raise ValueError(f"there is no format {kind!r}; there are: {', '.join(FORMATS)}")
    if architecture not in FORMATS[kind]:
        able = [name for name, layouts in FORMATS.items() if architecture in layouts]
        raise ValueError(
            f"format {kind!r} holds {' or '.join(FORMATS[kind])}, not {architecture!r}, which these hold: "
            f"{', '.join(able) or 'none'}"
        )
    return FORMATS[kind][architecture]


def arguments(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section {name: ..., settings} with every default of its constructor written out."""
    signature = inspect.signature(ARCHITECTURES[section["name"]])
    defaults = {name: p.default for name, p in signature.parameters.items() if p.default is not p.empty}
    return {**defaults, **section}


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings of two sections of the same name under which the same weights compute different things."""
    a, b = arguments(one), arguments(other)
    return {n: (a[n], b[n]) for n in a if n not in _HARMLESS and _plain(a[n]) != _plain(b[n])}


def to_ours(state: Mapping[str, Tensor], kind: str, architecture: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Their weights under our names, and the names of theirs that are no part of this architecture.

    ValueError where the format does not hold it, and where two weights would get one name.
    """
    how = layout(kind, architecture)
    renamed = rename(_unwrap(state, how.names), how.names)
    inside = f"{how.within}." if how.within else ""
    ours = {name.removeprefix(inside): x for name, x in renamed.items() if name.startswith(inside)}
    return ours, tuple(name for name in renamed if not name.startswith(inside))


def to_theirs(state: Mapping[str, Tensor], kind: str, section: Mapping[str, Any]) -> tuple[dict[str, Tensor], Match]:
    """Our weights under their names, the buffers theirs has among them, and what they do not hold.

    section: {name: ..., settings} of the network the weights are of. ValueError where the format does not hold it.
    """
    how = layout(kind, section["name"])
    left = [name for name in state if set(name.split(".")[:2]) & set(_OURS_ALONE) - set(how.keeps)]
    held = {name: x for name, x in state.items() if name not in left}
    given = arguments(section)
    odd = [name for name, value in how.fixed.items() if _plain(given[name]) != _plain(value)]
    if odd:
        told = ", ".join(f"{name}={how.fixed[name]!r}, not {given[name]!r}" for name in odd)
        raise ValueError(f"format {kind!r} holds networks with {told}: write this one as 'medfast'")
    order = given.get("merge")
    if how.merges and order is not None and order not in how.merges:
        held = reorder_merges(held, order, how.merges[0])
    match = Match(tuple(held), (), tuple(left), _numbers(held.values()) / max(_numbers(state.values()), 1))
    if how.idle_norms:
        held = {**_idle_norms(held), **held}
    if how.index is not None:
        held |= _indices(held, how.index)
    inside = f"{how.within}." if how.within else ""
    return rename({inside + name: x for name, x in held.items()}, how.names, export=True), match


def match(
    wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], outside: Sequence[str] = (), idle: Sequence[str] = ()
) -> Match:
    """Which of ``wanted`` are in ``given`` with the same shape.

    outside: further names that nothing reads. idle: segments of names that hold nothing, of which nobody is told.
    """
    found = tuple(name for name, x in wanted.items() if name in given and given[name].shape == x.shape)
    missing = tuple(sorted(set(wanted) - set(found)))
    share = _numbers(wanted[name] for name in found) / max(_numbers(wanted.values()), 1)
    unread = (*sorted(set(given) - set(found)), *outside)
    return Match(found, missing, tuple(name for name in unread if not set(name.split(".")) & set(idle)), share)


@torch.no_grad()
def fill(
    module: nn.Module, given: Mapping[str, Tensor], outside: Sequence[str] = (), idle: Sequence[str] = (),
    *, partial: bool = False,
) -> Match:  # fmt: skip
    """Copy into ``module`` what fits. ValueError, and nothing copied, under 95 % of its numbers unless ``partial``."""
    wanted = module.state_dict()
    found = match(wanted, given, outside, idle)
    if found.share < ENOUGH and not partial:
        raise ValueError(f"{found}; under {ENOUGH:.0%} is refused unless you ask for a partial load")
    for name in found.matched:
        wanted[name].copy_(given[name])
    return found


def reorder_merges(state: Mapping[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    """Weights of patch merging for neighbours in another order, of the same outputs. ValueError for orders that read a
    neighbour twice."""
    if any(len(set(MERGE_ORDERS[order])) < len(MERGE_ORDERS[order]) for order in (old, new)):
        raise ValueError(
            f"merge={old!r} reads some neighbours twice and others never, which no weights do in the order {new!r}: "
            "this network cannot be written in that format"
        )
    places = torch.tensor([MERGE_ORDERS[old].index(neighbour) for neighbour in MERGE_ORDERS[new]])
    return {
        name: x.unflatten(-1, (len(places), -1))[..., places.to(x.device), :].flatten(-2) if ".merge." in name else x
        for name, x in state.items()
    }


def _unwrap(state: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Without what trainers put before every name."""
    bare = dict(state)
    wrappers = [w for w in _WRAPPERS if not any(f"{name}.".startswith(w) for _, name in names.pairs)]
    while bare and (found := [w for w in wrappers if all(name.startswith(w) for name in bare)]):
        bare = {name.removeprefix(found[0]): x for name, x in bare.items()}
    return bare


def _indices(state: Mapping[str, Tensor], index: Callable[[int], Tensor]) -> dict[str, Tensor]:
    """The buffer beside every bias table, whose (2 * window - 1)**3 rows tell the window."""
    ending = "relative_position_bias_table"
    return {
        name.removesuffix(ending) + "relative_position_index": index((round(len(x) ** (1 / 3)) + 1) // 2)
        for name, x in state.items()
        if name.endswith(ending)
    }


def _idle_norms(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The norms of MONAI's ViT that nothing reads, as they are when it is built."""
    ending = ".norm2.weight"
    stems = [(name.removesuffix(ending), x) for name, x in state.items() if name.endswith(ending) and "blocks." in name]
    made = {}
    for stem, x in stems:
        if f"{stem}.mlp.fc1.weight" in state:  # a block of the ViT, not of a U-Net
            made |= {f"{stem}.unread_norm.weight": torch.ones_like(x), f"{stem}.unread_norm.bias": torch.zeros_like(x)}
    return made


def _plain(value: Any) -> Any:
    """Lists for tuples, one number for three equal ones: the ways to write one setting."""
    if isinstance(value, list | tuple):
        return value[0] if len(value) == 3 and len(set(value)) == 1 else list(value)
    return value


def _numbers(tensors) -> int:
    return sum(x.numel() for x in tensors)


def _some(names: Sequence[str], most: int = 5) -> str:
    return f" ({', '.join(names[:most])}{', ...' if len(names) > most else ''})" if names else ""
