"""Weights in and out: equal outputs against MONAI's own networks through files, partial loads, refusals, init."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from medfast import config
from medfast.__main__ import main
from medfast.cards import loader
from medfast.interchange import export_weights, import_weights, read_weights

TINY = {"embed": 12, "depths": [1, 1, 1, 1], "heads": [1, 2, 3, 4]}
SWIN = {"name": "swin", **TINY, "window": 3, "patch_norm": True, "merge": "monai_v2", "taps": "monai"}
NETS = {  # format -> (section of ours without what the format sets, size of a volume MONAI takes)
    "monai_swin_unetr": ({"name": "swin_unetr", "in_channels": 2, "classes": 3, **TINY}, (64, 32, 32)),
    "monai_swin": (SWIN, (40, 32, 21)),
    "monai_vit": ({"name": "vit", "size": 16, "patch": 8, "embed": 12, "depth": 2, "heads": 2, "taps": [0]}, (16,) * 3),
    "monai_unetr": ({"name": "unetr", "size": 32, "embed": 12, "heads": 2, "width": 4, "classes": 3}, (32,) * 3),
}
MADE_FOR = {**NETS, "monai_swinvit": ({**NETS["monai_swin_unetr"][0], "merge": "monai"}, (64, 32, 32))}


def random_weights(net):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return net.eval()


def theirs(kind, section, folder=None):
    """MONAI's network as the code of a model card builds it, with random weights where there are none to load."""
    code = loader(kind, section)
    if folder is None:
        code = code[code.index("from monai") :]
        code = "\n".join(line for line in code.splitlines() if "load_" not in line)
    else:
        code = code.replace('"model.safetensors"', repr(str(folder / "model.safetensors")))
    scope = {}
    exec(code, scope)
    return scope["net"].eval() if folder else random_weights(scope["net"])


def outputs(net, volume):
    """What a network of either side gives, as a list of channels-first tensors."""
    if hasattr(net, "strides"):
        taps = net(volume).extra["taps"]
        return [x.movedim(-1, 1) for x in taps] if len(taps) > 2 else [x.flatten(1, 3) for x in taps]
    made = net(volume)
    return [made[1][0], made[0]] if isinstance(made, tuple) else made if isinstance(made, list) else [made]


def assert_equal_outputs(a, b, size, channels=1):
    volume = torch.randn(1, channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        pairs = list(zip(outputs(a.double(), volume), outputs(b.double(), volume), strict=True))
    for x, y in pairs:
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9 * y.abs().max().item())


def imported(folder):
    section = json.loads((folder / "config.json").read_text())["architecture"]
    net = config.build_backbone(section)
    net.load_state_dict(load_file(next(folder.glob("*.safetensors"))), strict=True)
    return net.eval(), section


@pytest.mark.parametrize("kind", NETS)
def test_imported_weights_compute_what_monai_computes(kind, tmp_path):
    pytest.importorskip("monai")
    section, size = NETS[kind]
    net = theirs(
        kind, section if "merge" in section or "swin" not in section["name"] else {**section, "merge": "monai"}
    )
    torch.save(
        {"state_dict": {f"module.{n}": x for n, x in net.state_dict().items()}, "epoch": 3}, tmp_path / "theirs.pt"
    )
    match = import_weights(
        tmp_path / "theirs.pt", kind, section, tmp_path / "in" / "ours.safetensors", say=lambda _: None
    )
    assert match.share == 1.0 and not match.unread and not match.missing
    ours, written = imported(tmp_path / "in")
    if "swin" in kind:
        assert written["bias_index"] == "sliced" and written.get("clip", True) is True
    assert_equal_outputs(ours, net, size, section.get("in_channels", 1))


@pytest.mark.parametrize("kind", MADE_FOR)
def test_exported_weights_load_into_monais_network_by_the_code_of_the_card(kind, tmp_path):
    pytest.importorskip("monai")
    section, size = MADE_FOR[kind]
    if "swin" in kind:
        section = {**section, "bias_index": "sliced", **({"clip": True} if section["name"] == "swin" else {})}
    ours = random_weights(config.build_backbone(section))
    save(tmp_path / "one.safetensors", ours.state_dict(), section)
    export_weights(tmp_path / "one.safetensors", kind, tmp_path / "out", say=lambda _: None)
    card = (tmp_path / "out" / "README.md").read_text()
    assert loader(kind, section) in card and str(tmp_path) not in card
    net = theirs(kind, section, tmp_path / "out")
    if kind == "monai_swinvit":
        ours, net = ours.encoder, net.swinViT
    assert_equal_outputs(ours, net, size, section.get("in_channels", 1))


def save(path, state, section):
    about = {"format": "medfast", "architecture": section, "parameters": 0, "source": {}}
    save_file({n: x.clone() for n, x in state.items()}, path, metadata={"medfast": json.dumps(about)})
    return path


def test_a_swin_trained_in_smits_order_computes_the_same_in_monais():
    nets = pytest.importorskip("monai.networks.nets.swin_unetr")
    from medfast.architectures.interop import to_theirs

    section = {"name": "swin", **TINY, "window": 2, "taps": "monai"}
    ours = random_weights(config.build_backbone(section))
    weights, match = to_theirs(ours.state_dict(), "monai_swin", section)
    net = nets.SwinTransformer(1, 12, (2,) * 3, (2,) * 3, (1,) * 4, (1, 2, 3, 4), patch_norm=True).eval()
    net.load_state_dict(weights, strict=True)
    assert match.share == 1.0
    assert_equal_outputs(ours, net, (32, 32, 32))


@pytest.fixture
def swin_file(tmp_path):
    section = {"name": "swin", "embed": 8, "depths": [1, 1], "heads": [1, 2], "window": 2}
    return save(
        tmp_path / "swin.safetensors", random_weights(config.build_backbone(section)).state_dict(), section
    ), section


def test_a_partial_load_says_what_did_not_match_and_is_refused_unless_asked(swin_file, tmp_path, capsys):
    path, section = swin_file
    wanted = repr({**section, "depths": [1, 2]})
    command = [
        "import",
        str(path),
        "--as",
        "medfast",
        "--backbone",
        wanted,
        "--out",
        str(tmp_path / "in" / "x.safetensors"),
    ]
    assert main(command) == 2
    told = capsys.readouterr().err
    assert "missing or of another shape (stages.1.blocks.1" in told and "under 95% is refused" in told
    assert not (tmp_path / "in").exists()
    assert main([*command, "--partial"]) == 0
    ours, _ = imported(tmp_path / "in")
    assert torch.equal(ours.stages[1].merge.norm.weight, load_file(path)["stages.1.merge.norm.weight"])


def test_names_that_nothing_reads_and_settings_that_are_kept_are_told(swin_file, tmp_path):
    path, section = swin_file
    state = {**load_file(path), "classifier.weight": torch.ones(3)}
    said = []
    torch.save(state, tmp_path / "more.pt")
    import_weights(tmp_path / "more.pt", "medfast", section, tmp_path / "in" / "x.safetensors", say=said.append)
    assert "1 of the file not read (classifier.weight): 100.0%" in said[-1]
    from medfast.architectures.interop import to_theirs

    weights, _ = to_theirs(load_file(path), "monai_swin", {**section, "merge": "monai"})
    torch.save(weights, tmp_path / "monai.pt")
    chosen = {**section, "bias_index": "geometric", "patch_norm": True}
    import_weights(tmp_path / "monai.pt", "monai_swin", chosen, tmp_path / "kept" / "x.safetensors", say=said.append)
    assert any("bias_index='geometric' is kept, though the format's own networks" in line for line in said)


class Surprise:
    def __reduce__(self):
        return (print, ("code in a checkpoint ran",))


def test_a_checkpoint_that_needs_more_than_tensors_is_refused_with_a_sentence(tmp_path, capsys):
    torch.save({"state_dict": {"a": torch.ones(2)}, "args": Surprise()}, tmp_path / "bad.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save({"state_dict": {"a": torch.ones(2)}}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"weights": 3}, tmp_path / "odd.pt")
    for name, message in (
        ("bad.pt", "would run code it names"),
        ("text.pt", "is not read"),
        ("odd.pt", "keys weights"),
    ):
        with pytest.raises(ValueError, match=message):
            read_weights(tmp_path / name)
    assert read_weights(tmp_path / "old.pt").keys() == {"a"}
    assert capsys.readouterr().out == ""


def test_formats_architectures_and_targets_that_do_not_fit_are_refused(swin_file, tmp_path):
    path, section = swin_file
    out = tmp_path / "in" / "x.safetensors"
    for kind, chosen, message in (
        ("timm", section, "no format 'timm'; there are: medfast, monai_swin_unetr"),
        ("monai_unetr", section, "holds unetr or vit, not 'swin', which these hold: medfast, monai_swin_unetr"),
        ("medfast", {**section, "hedas": 3}, "hedas.*did you mean 'heads'"),
    ):
        with pytest.raises(ValueError, match=message):
            import_weights(path, kind, chosen, out, say=lambda _: None)
    import_weights(path, "medfast", section, out, say=lambda _: None)
    other = {**section, "drop_path": 0.3}
    with pytest.raises(ValueError, match="describes another network"):
        import_weights(path, "medfast", other, out.with_name("y.safetensors"), say=lambda _: None)
    with pytest.raises(ValueError, match="reads some neighbours twice"):
        export_weights(
            save(tmp_path / "l.safetensors", load_file(path), {**section, "merge": "monai_legacy"}),
            "monai_swin",
            tmp_path / "o",
        )
    deep = {"name": "unetr", "size": 16, "embed": 12, "heads": 2, "width": 2, "depth": 4, "taps": [0, 1, 2]}
    state = config.build_backbone(deep).state_dict()
    with pytest.raises(ValueError, match="holds networks with depth=12, not 4, taps="):
        export_weights(save(tmp_path / "u.safetensors", state, deep), "monai_unetr", tmp_path / "o")
    assert not (tmp_path / "o").exists()
