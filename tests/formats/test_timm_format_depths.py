"""Several depths from one run (BIM), exported."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from leanmim.config import Export, Pretrain
from leanmim.encoders.backbone import as_tokens
from leanmim.errors import UserError
from leanmim.formats import export
from leanmim.weights import load_backbone, restore
from tests.helpers import BACKBONES, equal, fake_run, first_blocks, images_of, in_segments


def loaded(folder: Path, config: Pretrain) -> tuple[Any, dict[str, Any]]:
    """What timm makes of an export, strictly, and what is written about it."""
    description = json.loads((folder / "config.json").read_text())
    model = timm.create_model(
        config.model, num_classes=0, **description["model_args"], checkpoint_path=str(folder / "model.safetensors")
    )
    return model.eval(), description


@pytest.mark.parametrize("name", [name for name in BACKBONES if "vit" in name])
def test_exported_depths_of_a_vit_are_its_first_blocks_and_the_segments_norm(name: str, tmp_path: Path) -> None:
    config = fake_run(in_segments(name, segments=(1, 2, 4), mask_ratio=0.5), tmp_path / "run")
    folder = export(Export(run=config.out, all_depths=True, out=str(tmp_path / "all")))
    assert {path.name for path in folder.iterdir()} == {"depth1", "depth2", "depth4"}
    _, trained, _ = restore(config.out)
    trained.eval()
    vit, images = trained.encoder.backbone, images_of(config)
    average = name == "vit, registers, average"
    norms = [*trained.encoder.norms, vit.fc_norm if average else vit.norm]
    for depth, norm in zip((1, 2, 4), norms, strict=True):
        model, description = loaded(folder / f"depth{depth}", config)
        assert len(model.blocks) == depth
        assert [block.attn.num_heads for block in model.blocks] == [2] * depth
        assert "not_pretrained" not in description["leanmim"]
        tokens = first_blocks(vit, images, depth)
        if average:
            assert torch.allclose(model(images), norm(tokens[:, 4:].mean(1)), atol=1e-6)
        else:
            assert torch.allclose(model(images), norm(tokens)[:, 0], atol=1e-6)
            assert torch.allclose(model.forward_features(images), norm(tokens), atol=1e-6)
        last = model.fc_norm if average else model.norm
        assert last.eps == norm.eps
        one, _, _ = load_backbone(config.out, depth=depth)
        assert equal(one.state_dict(), model.state_dict())
    one = export(Export(run=config.out, depth=2))
    assert one == tmp_path / "run" / "export" / "timm-depth2"
    local = timm.create_model(f"local-dir:{one}", pretrained=True)
    assert equal(local.state_dict(), loaded(folder / "depth2", config)[0].state_dict())


def test_all_depths_go_into_the_run_folder_by_default(tmp_path: Path) -> None:
    config = fake_run(in_segments(segments=2, mask_ratio=0.5), tmp_path / "run")
    assert export(Export(run=config.out, all_depths=True)) == tmp_path / "run" / "export"
    assert {path.name for path in (tmp_path / "run" / "export").iterdir()} == {"timm-depth2", "timm-depth4"}
    export(Export(run=config.out, all_depths=True))  # again: what leanmim wrote there it may write anew
    taken = tmp_path / "all" / "depth4"
    taken.mkdir(parents=True)
    (taken / "mine").touch()
    with pytest.raises(UserError, match="depth4' is not empty; choose another --out, or --overwrite"):
        export(Export(run=config.out, all_depths=True, out=str(tmp_path / "all")))
    assert not (tmp_path / "all" / "depth2").exists()  # it said so before it wrote anything
    export(Export(run=config.out, all_depths=True, out=str(tmp_path / "all"), overwrite=True))
    with pytest.raises(UserError, match=r"--all-depths: --format transformers.*use --format timm"):
        export(Export(run=config.out, all_depths=True, format="transformers"))
    with pytest.raises(UserError, match="--depth and --all-depths: give one"):
        export(Export(run=config.out, all_depths=True, depth=2))
    with pytest.raises(UserError, match=r"--depth: --format transformers.*use --format timm"):
        export(Export(run=config.out, format="transformers", depth=2))


@pytest.mark.parametrize(
    ("backbone", "masking", "ends"),
    [("swin", "token", (1, 3, 4)), ("swin", "pixel", (2, 4)), ("swin v2", "pixel", (1, 2, 4))],
)
def test_exported_depths_of_a_swin_are_its_first_stages_and_the_borders_norm(
    backbone: str, masking: str, ends: tuple[int, ...], tmp_path: Path
) -> None:
    config = fake_run(in_segments(backbone, masking, segments=ends, mask_ratio=0.5), tmp_path / "run")
    folder = export(Export(run=config.out, all_depths=True, out=str(tmp_path / "all")))
    assert {path.name for path in folder.iterdir()} == {f"depth{end}" for end in ends}
    _, trained, _ = restore(config.out)
    swin, images = trained.eval().encoder.backbone, images_of(config)
    for depth, norm in zip(ends, [*trained.encoder.borders.norms, swin.norm], strict=True):
        model, description = loaded(folder / f"depth{depth}", config)
        assert [len(stage.blocks) for stage in model.layers] == [2, 2, 6, 2][:depth]
        heads = [[block.attn.num_heads for block in stage.blocks] for stage in swin.layers[:depth]]
        assert [[block.attn.num_heads for block in stage.blocks] for stage in model.layers] == heads
        expected = norm(swin.layers[:depth](swin.patch_embed(images)))
        assert torch.allclose(model.forward_features(images), expected, atol=1e-6)
        assert model.norm.eps == norm.eps
        assert "not_pretrained" not in description["leanmim"]


def test_exported_depths_of_a_convnext_are_whole_and_say_what_is_fresh(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = fake_run(in_segments("convnext", "pixel", segments=(2, 4), mask_ratio=0.5), tmp_path / "run")
    folder = export(Export(run=config.out, all_depths=True, out=str(tmp_path / "all")))
    _, trained, _ = restore(config.out)
    convnext, images = trained.eval().encoder.backbone, images_of(config)
    own = convnext.state_dict()

    model, description = loaded(folder / "depth4", config)
    assert "not_pretrained" not in description["leanmim"] and equal(model.state_dict(), own)

    model, description = loaded(folder / "depth2", config)
    fresh = description["leanmim"]["not_pretrained"]
    assert description["leanmim"]["depth"] == 2
    assert "does not build convnext_atto shorter" in capsys.readouterr().err
    later = {key for key in own if key.startswith(("stages.2.", "stages.3."))}
    assert later <= set(fresh) <= later | {"head.norm.weight", "head.norm.bias"}
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in own.items() if key not in fresh)
    assert not any(torch.equal(state[key], own[key]) for key in later)

    ours, _, _ = load_backbone(config.out, depth=2)  # leanmim knows the norm, for which timm's model has no place
    tokens = convnext.stages[:2](convnext.stem(images)).flatten(2).transpose(1, 2)
    expected = trained.encoder.borders.norms[0](tokens)
    assert torch.allclose(ours.forward_features(images), expected, atol=1e-6)
    assert torch.allclose(ours(images), expected.mean(1), atol=1e-6)


PARTS = {"vit": "blocks", "swin": "layers", "convnext": "stages"}


@pytest.mark.parametrize(("backbone", "masking"), [("vit", "drop"), ("swin", "pixel"), ("convnext", "pixel")])
def test_depths_of_a_run_of_the_first_layers(backbone: str, masking: str, tmp_path: Path) -> None:
    """--depth in pre-training, and again in the export."""
    config = fake_run(in_segments(backbone, masking, depth=3, segments=3, mask_ratio=0.5), tmp_path / "run")
    _, trained, _ = restore(config.out)
    own = trained.encoder.backbone.state_dict()
    for depth in (2, 3):
        model, description = loaded(export(Export(run=config.out, depth=depth)), config)
        fresh = description["leanmim"].get("not_pretrained", [])
        whole = depth == 3 or backbone == "convnext"  # those that timm builds shorter are shorter
        assert len(getattr(model, PARTS[backbone])) == (4 if whole else 2)
        assert description["leanmim"].get("depth") == (depth if whole else None)
        later = tuple(f"{PARTS[backbone]}.{i}." for i in range(depth, 4))
        assert {key for key in fresh if "norm" not in key.split(".")[:2]} == {
            key for key in model.state_dict() if key.startswith(later)
        }
        norms = ("norm.", "head.norm.") if depth == 2 else ()  # the segment's own
        for key, value in model.state_dict().items():
            assert key in fresh or key.startswith(norms) or torch.equal(value, own[key]), key


def test_the_first_stages_alone_are_closed_by_their_norm_too(tmp_path: Path) -> None:
    """A model pre-trained with --depth: what is evaluated is what the decoder read."""
    config = fake_run(in_segments("convnext", "pixel", depth=2, segments=1, mask_ratio=0.5), tmp_path / "run")
    _, model, _ = restore(config.out)
    backbone, _, _ = load_backbone(config.out)
    images = images_of(config)
    raw = as_tokens(model.encoder.backbone, model.encoder.backbone.eval().forward_features(images))
    assert torch.equal(backbone.forward_features(images), model.encoder.norm(raw))
    export(Export(run=config.out, out=str(tmp_path / "timm")))
    whole, description = loaded(tmp_path / "timm", config)
    own = model.encoder.backbone.state_dict()
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in own.items())
    assert set(description["leanmim"]["not_pretrained"]) == whole.state_dict().keys() - own.keys() != set()
