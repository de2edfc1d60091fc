"""Names of weights in public code and ours: what is called what, as data, and ``rename`` both ways.

A pair is (ours, theirs), two runs of whole dotted segments that stand for each other; pairs are applied in their order,
each to the first place where it fits. Tensors have the same shapes on both sides, so a name is all that changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Names(NamedTuple):
    """pairs: (ours, theirs). unread: segments of what is left over when theirs are renamed and holds nothing for us."""

    pairs: tuple[tuple[str, str], ...]
    unread: tuple[str, ...] = ()


_CONVS = tuple((f"conv{i}", f"conv{i}.conv") for i in (1, 2, 3))
_MLP = (("mlp.fc1", "mlp.linear1"), ("mlp.fc2", "mlp.linear2"))

MONAI_SWIN = Names(
    (
        *((f"stages.{i}.conv", f"layers{i + 1}c.0.layer") for i in range(4)),
        *((f"stages.{i}", f"layers{i + 1}.0") for i in range(4)),
        ("merge", "downsample"),
        *_MLP,
        *_CONVS,
    ),
    unread=("relative_position_index",),  # a buffer, computed from the window
)

_UNET = (
    ("decoder.image", "encoder1.layer"),
    *((f"decoder.skips.{i}", f"encoder{i + 2}.layer") for i in range(3)),
    ("decoder.bottleneck", "encoder10.layer"),
    *((f"decoder.ups.{i}.up", f"decoder{5 - i}.transp_conv.conv") for i in range(5)),
    *((f"decoder.ups.{i}.block", f"decoder{5 - i}.conv_block") for i in range(5)),
    ("head", "out.conv.conv"),
)

MONAI_SWIN_UNETR = Names((("encoder", "swinViT"), *_UNET, *MONAI_SWIN.pairs), unread=MONAI_SWIN.unread)

# model_swinvit.pt, the encoder that MONAI's SwinUNETR.load_from reads: pretrained under DataParallel, MLPs as in timm
MONAI_SWINVIT = Names(
    (("encoder", "module"), *(pair for pair in MONAI_SWIN.pairs if pair not in _MLP)),
    unread=(*MONAI_SWIN.unread, "rotation_head", "rotation_pre", "contrastive_head", "contrastive_pre", "convTrans3d"),
)

# SMIT's Trans_Unetr, and the "transformer" of its pretraining networks
SMIT = Names(
    (
        *((f"encoder.tap_norms.{i}", f"transformer.norm{i}") for i in range(4)),
        *((f"encoder.stages.{i}", f"transformer.layers.{i}") for i in range(4)),
        ("encoder", "transformer"),
        ("merge", "downsample"),
        *_UNET,
        *_CONVS,
    ),
    unread=("relative_position_index", "mask_token"),  # the mask token is the objective's
)

# 282857341/nnFormer nnformer/network_architecture/nnFormer_synapse.py and nnFormer_tumor.py, class nnFormer
NNFORMER = Names(
    (
        ("encoder.patch_embed.first", "model_down.patch_embed.proj1"),
        ("encoder.patch_embed.second", "model_down.patch_embed.proj2"),
        *((f"encoder.norms.{i}", f"model_down.norm{i}") for i in range(4)),
        *((f"encoder.stages.{i}", f"model_down.layers.{i}") for i in range(4)),
        ("encoder", "model_down"),
        ("down", "downsample"),
        *((f"decoder.{i}", f"decoder.layers.{i}") for i in range(3)),
        ("expand", "Upsample"),
        *((f"heads.{i}", f"final.{i}.up") for i in range(3)),
    ),
    unread=("relative_position_index",),
)

MONAI_VIT = Names(
    (
        ("patch_embed.proj", "patch_embedding.patch_embeddings"),
        ("position", "patch_embedding.position_embeddings"),
        ("cls", "cls_token"),
        ("attn.proj", "attn.out_proj"),
        ("unread_norm", "norm_cross_attn"),
        *_MLP,
    ),
    unread=("unread_norm", "classification_head"),  # the norm never has a gradient there
)

MONAI_UNETR = Names(
    (
        ("encoder", "vit"),
        ("image", "encoder1.layer"),
        *((f"ladders.{i}.first", f"encoder{i + 2}.transp_conv_init.conv") for i in range(3)),
        *((f"ladders.{i}.ups.{j}", f"encoder{i + 2}.blocks.{j}.0.conv") for i in range(3) for j in range(2 - i)),
        *((f"ladders.{i}.blocks.{j}", f"encoder{i + 2}.blocks.{j}.1") for i in range(3) for j in range(2 - i)),
        *((f"ups.{i}.up", f"decoder{5 - i}.transp_conv.conv") for i in range(4)),
        *((f"ups.{i}.block", f"decoder{5 - i}.conv_block") for i in range(4)),
        ("head", "out.conv.conv"),
        *MONAI_VIT.pairs,
        *_CONVS,
    ),
    unread=MONAI_VIT.unread,
)

# Tencent/MedicalNet models/resnet.py; Project-MONAI/MONAI monai/networks/nets/resnet.py (without bias in the shortcuts)
RESNET = Names(
    (
        *((f"stages.{i}", f"layer{i + 1}") for i in range(4)),
        ("shortcut_norm", "downsample.1"),
        ("shortcut", "downsample.0"),
        *((f"norm{i}", f"bn{i}") for i in (1, 2, 3)),
    ),
    unread=("conv_seg", "fc"),  # heads
)

# devalab/SwinFUSE swin_unetr.py, SwinTransformerCoAttn: our dim="code"
SWINFUSE = Names(
    (
        *((f"dim.branches.{i}.0", f"mh{i + 1}") for i in range(2)),
        ("in_proj.weight", "in_proj_weight"),
        ("in_proj.bias", "in_proj_bias"),
        *((f"encoder.{ours}", theirs) for ours, theirs in MONAI_SWIN.pairs[:8]),
        ("encoder.patch_embed", "patch_embed"),
        *MONAI_SWIN.pairs[8:],
    ),
    unread=MONAI_SWIN.unread,
)

_SKIP = (
    ("widen", "x1_linear"),
    ("cross.reprojection", "cross_attn.attn.reprojection"),
    ("cross.norm", "cross_attn.attn.norm"),
    ("cross", "cross_attn"),
    ("narrow", "concat_linear"),
)

# mindflow-institue/DAEFormer networks/DAEFormer.py and networks/segformer.py, class DAEFormer
DAE_FORMER = Names(
    (
        *((f"encoder.embeds.{i}", f"backbone.patch_embed{i + 1}") for i in range(3)),
        *((f"encoder.stages.{i}", f"backbone.block{i + 1}") for i in range(3)),
        *((f"encoder.norms.{i}", f"backbone.norm{i + 1}") for i in range(3)),
        *((f"mlp{i}.unread.{j}", f"mlp{i}.norm{j + 2}") for i in ("", 1, 2) for j in range(2)),
        ("dwconv", "dwconv.dwconv"),
        *((f"unread.{ours}", f"decoder_2.{theirs}") for ours, theirs in _SKIP),
        ("head.expand", "decoder_0.layer_up"),
        ("head.conv", "decoder_0.last_layer"),
        *((f"ups.{i}", f"decoder_{2 - i}.layer_up") for i in range(2)),
        *((f"decoder.{i}.blocks.{j}", f"decoder_{2 - i}.layer_former_{j + 1}") for i in range(3) for j in range(2)),
        *((f"decoder.{i}.{ours}", f"decoder_{2 - i}.{theirs}") for i in (1, 2) for ours, theirs in _SKIP),
    ),
    unread=("unread",),
)


def rename(state: Mapping[str, T], names: Names, *, export: bool = False) -> dict[str, T]:
    """Their state dict under our names; with ``export`` ours under theirs. Values are handed on untouched.

    Names that no pair touches stay as they are. ValueError where two of them become the same.
    """
    renamed: dict[str, T] = {}
    for name, value in state.items():
        new = _name(name, names, export)
        if new in renamed:
            raise ValueError(f"two weights would be called {new!r}, one of them {name!r} now: this is another network")
        renamed[new] = value
    return renamed


def _name(name: str, names: Names, export: bool) -> str:
    dotted = f".{name}."
    for ours, theirs in names.pairs:
        old, new = (ours, theirs) if export else (theirs, ours)
        dotted = dotted.replace(f".{old}.", f".{new}.", 1)
    return dotted.strip(".")
