"""Model cards: what exported weights are, where they came from, and code that loads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from medfast.architectures.interop import Match, arguments, layout

_READ = 'from safetensors.torch import load_file\n\nweights = load_file("model.safetensors")'


def card(kind: str, about: Mapping[str, Any], match: Match) -> str:
    """README.md of an export. about: what its config.json says."""
    section = about["architecture"]
    settings = "\n".join(f"| {name} | {value} |" for name, value in section.items() if name != "name")
    lines = [
        f"# {section['name']}, {about['parameters']:,} parameters",
        f"Weights in the format `{kind}`, exported by medfast {about['medfast']}.",
        "| setting | value |\n|---|---|\n" + settings,
        "The settings that are not listed are the defaults of the constructor.",
        "Source: " + ", ".join(f"{name} {value}" for name, value in about["source"].items()) + ".",
        "## Load",
        f"```python\n{loader(kind, section)}\n```",
        *_notes(kind, section, match),
    ]
    return "\n\n".join(lines) + "\n"


def loader(kind: str, section: Mapping[str, Any]) -> str:
    """Python that builds the network, ``net``, and loads model.safetensors into it, run in the folder of an export."""
    return f"{_READ}\n{_LOADERS[kind](arguments(section))}"


def _medfast(given: Mapping[str, Any]) -> str:
    return (
        "import json\n\nfrom medfast.config import build_backbone\n\n"
        'net = build_backbone(json.load(open("config.json"))["architecture"])\n'
        "net.load_state_dict(weights, strict=True)"
    )


def _swin_unetr(given: Mapping[str, Any]) -> str:
    whole = given.get("classes") is not None
    return f"{_build_swin_unetr(given)}\nnet.load_state_dict(weights, strict={whole})" + (
        "" if whole else "  # the weights hold no head" if "classes" in given else "  # the weights hold the encoder"
    )


def _swinvit(given: Mapping[str, Any]) -> str:
    return f'{_build_swin_unetr(given)}\nnet.load_from({{"state_dict": weights}})'


def _build_swin_unetr(given: Mapping[str, Any]) -> str:
    return "from monai.networks.nets import SwinUNETR\n\n" + _call(
        "SwinUNETR", in_channels=given["in_channels"], out_channels=given.get("classes") or 1,
        feature_size=given["embed"], window_size=given["window"], norm_name=given.get("norm", "instance"),
        **_swin_settings(given),
    )  # fmt: skip


def _swin(given: Mapping[str, Any]) -> str:
    call = _call(
        "SwinTransformer", in_chans=given["in_channels"], embed_dim=given["embed"],
        window_size=(given["window"],) * 3, patch_size=(given["patch"],) * 3, spatial_dims=3, **_swin_settings(given),
    )  # fmt: skip
    build = f"from monai.networks.nets.swin_unetr import SwinTransformer\n\n{call}"
    return f"{build}\nnet.load_state_dict(weights, strict=True)"


def _swin_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "depths": tuple(given["depths"]), "num_heads": tuple(given["heads"]), "mlp_ratio": given["mlp_ratio"],
        "qkv_bias": given["qkv_bias"], "patch_norm": given["patch_norm"], "use_v2": given["residual_convs"],
        "downsample": "mergingv2" if given["merge"] == "monai_v2" else "merging",
    }  # fmt: skip


def _vit(given: Mapping[str, Any]) -> str:
    positions = {"learned": "learnable"}.get(given["positions"], given["positions"])
    call = _call(
        "ViT", in_channels=given["in_channels"], img_size=_axes(given["size"]), patch_size=_axes(given["patch"]),
        hidden_size=given["embed"], mlp_dim=int(given["mlp_ratio"] * given["embed"]), num_layers=given["depth"],
        num_heads=given["heads"], pos_embed_type=positions, classification=given["cls"], qkv_bias=given["qkv_bias"],
    )  # fmt: skip
    after = f"net.load_state_dict(weights, strict={not given['cls']})"
    note = "  # the weights hold no classification head" if given["cls"] else ""
    return f"from monai.networks.nets import ViT\n\n{call}\n{after}{note}"


def _unetr(given: Mapping[str, Any]) -> str:
    whole = given.get("classes") is not None
    call = _call(
        "UNETR", in_channels=given["in_channels"], out_channels=given.get("classes") or 1,
        img_size=_axes(given["size"]), feature_size=given.get("width", 16), hidden_size=given["embed"],
        mlp_dim=int(given["mlp_ratio"] * given["embed"]), num_heads=given["heads"],
        norm_name=given.get("norm", "instance"), qkv_bias=given["qkv_bias"],
    )  # fmt: skip
    note = "" if whole else "  # the weights hold no head" if "classes" in given else "  # the weights hold the encoder"
    return f"from monai.networks.nets import UNETR\n\n{call}\nnet.load_state_dict(weights, strict={whole}){note}"


def _public(network: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda given: f"# net = {network}\nnet.load_state_dict(weights, strict=False)"


def _call(name: str, **keywords: Any) -> str:
    return f"net = {name}(\n" + "".join(f"    {key}={value!r},\n" for key, value in keywords.items()) + ")"


def _axes(value: Any) -> Any:
    return value if isinstance(value, int) else tuple(value)


_LOADERS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "medfast": _medfast,
    "monai_swin_unetr": _swin_unetr,
    "monai_swin": _swin,
    "monai_swinvit": _swinvit,
    "monai_vit": _vit,
    "monai_unetr": _unetr,
    "smit": _public("Trans_Unetr(config, ...) of the public SMIT code, with the sizes above"),
    "nnformer": _public("nnFormer(...) of the public nnFormer code, with the sizes above"),
    "swinfuse": _public("SwinTransformerCoAttn(...) of the public SwinFUSE code, with the sizes above"),
    "dae_former": _public("DAEFormer(...) of the public DAE-Former code, with the sizes above"),
    "med3d": _public("resnet50(...) of the public MedicalNet code"),
}


def _notes(kind: str, section: Mapping[str, Any], match: Match) -> list[str]:
    """What the reader of the weights should not find out alone."""
    given, how, notes = arguments(section), layout(kind, section["name"]), []
    if match.unread:
        notes.append(f"Left out, because the format has no place for them: {len(match.unread)} tensors, "
                     f"{1 - match.share:.1%} of the numbers.")  # fmt: skip
    odd = [name for name in ("clip", "bias_index") if name in how.settings and given.get(name) != how.settings[name]]
    if odd:
        notes.append(
            f"This network was trained with {', '.join(f'{name}={given[name]}' for name in odd)}. The networks that "
            "the format is of treat windows that reach over the map, or are larger than it, differently: outputs are "
            "equal where every map is a multiple of the window and no smaller than it."
        )
    if kind == "smit" and given["window_order"] != "smit_code":
        notes.append("The public code puts windows back where they were not, so it computes something else with these.")
    if not kind.startswith(("medfast", "monai")):
        notes.append("Names and shapes follow the public code; outputs were not compared, since it is on no index.")
    return notes
