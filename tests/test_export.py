"""What comes out is a timm model; and starting from one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import leanmim
from leanmim.checkpoint import initialise, load_backbone, restore, save
from leanmim.config import Export, Pretrain
from leanmim.errors import UserError
from leanmim.export import export, timm_lines
from leanmim.mim import build
from leanmim.recipes import FASTMIM, SIMMIM


def fake_run(config: Pretrain) -> Pretrain:
    """A run folder with random weights, as if it had been trained."""
    torch.manual_seed(3)
    model = build(config)
    state = {"config": config.to_json(), "step": 7, "mean": [0.4] * config.channels, "std": [0.2] * config.channels}
    folder = Path(config.out)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_json()))
    save(folder / "checkpoints" / "last.pt", {**state, "model": model.state_dict()})
    return config


VITS = {
    "vit": {},
    "registers, average pooling": {
        "model": "vit_medium_patch16_reg4_gap_256", "model_kwargs": {"depth": 1}, "input_size": (256,),
    },
    "grey, wide": {"channels": 1, "input_size": (32, 48)},
}  # fmt: skip


OTHERS = {  # what a backbone calls its pooling, and where it keeps it, differs from family to family
    "convnext_atto": {}, "resnet18": {}, "test_efficientnet": {}, "regnety_002": {}, "mobilevit_xxs": {}, "pvt_v2_b0": {},
    "edgenext_xx_small": {}, "hiera_tiny_224": {"embed_dim": 32, "stages": [1, 1, 1, 1]},
    "eva02_tiny_patch14_224": {"depth": 1},
}  # fmt: skip


@pytest.fixture(params=[*VITS, "swin", *OTHERS])
def run(request: pytest.FixtureRequest, tiny: Pretrain) -> Pretrain:
    if request.param in OTHERS:
        size, cell = ((56,), 7) if "patch14" in request.param else ((64,), 8)
        other = dict(model=request.param, model_kwargs=OTHERS[request.param], input_size=size, hog_cell=cell)
        return fake_run(replace(FASTMIM, data=tiny.data, out=tiny.out, **other))
    if request.param == "swin":
        swin = dict(model="swin_tiny_patch4_window7_224", model_kwargs={"embed_dim": 24}, input_size=(64,))
        return fake_run(replace(SIMMIM, data=tiny.data, out=tiny.out, **swin))
    return fake_run(replace(tiny, **VITS[request.param]))


def test_timm_loads_the_export_strictly_and_computes_the_same(run: Pretrain) -> None:
    folder = export(Export(run.out))
    config, ours, _ = restore(run.out)
    images = torch.randn(2, run.channels, *run.size)
    expected = ours.eval().encoder.backbone(images)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}

    scope: dict = {}
    exec(timm_lines(folder, config, ours), scope)  # the three lines the demo prints
    assert torch.equal(scope["model"](images), expected)
    assert torch.equal(scope["model"].forward_features(images), ours.encoder.backbone.forward_features(images))

    # timm's own folder format builds the model from config.json alone
    local = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(local(images), expected)
    assert (
        local.pretrained_cfg["mean"] == (0.4,) * run.channels
        or list(local.pretrained_cfg["mean"]) == [0.4] * run.channels
    )


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_timm_adapts_head_size_and_channels(tiny: Pretrain, channels: int) -> None:
    run = fake_run(tiny)
    file = export(Export(run.out)) / "model.safetensors"
    model = timm.create_model(
        run.model, pretrained=True, pretrained_cfg_overlay=dict(file=str(file), num_classes=0), num_classes=10,
        img_size=48, in_chans=channels, **run.model_kwargs,
    )  # fmt: skip
    assert model(torch.randn(2, channels, 48, 48)).shape == (2, 10)
    weights = load_file(file)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, weights["blocks.1.mlp.fc1.weight"])
    assert model.pos_embed.shape[1] == 1 + 36


@pytest.mark.filterwarnings("ignore::UserWarning")  # timm's own, while it resizes the tables
def test_the_readmes_swin_goes_to_another_size(tiny: Pretrain) -> None:
    swin = dict(model="swin_tiny_patch4_window7_224", model_kwargs={"embed_dim": 24}, input_size=(128,))
    run = fake_run(replace(SIMMIM, data=tiny.data, out=tiny.out, **swin))
    small, _, _ = load_backbone(run.out)
    large, _, _ = load_backbone(run.out, (224, 224))
    assert small.layers[0].blocks[0].attn.relative_position_bias_table.shape[0] == 7**2
    assert large.layers[0].blocks[0].attn.relative_position_bias_table.shape[0] == 13**2
    assert large(torch.randn(1, 3, 224, 224)).shape == (1, 192)


def test_an_export_elsewhere_is_not_overwritten_unasked(tiny: Pretrain, tmp_path: Path) -> None:
    run, out = fake_run(tiny), str(tmp_path / "shared")
    folder = export(Export(run.out, out=out))
    with pytest.raises(UserError, match="--overwrite"):
        export(Export(run.out, out=out))
    assert export(Export(run.out, out=out, overwrite=True)) == folder
    assert export(Export(run.out)) == export(Export(run.out))  # the run's own copy may be renewed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masking": "token"}, "masking drop"),
        ({"model_kwargs": {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "reg_tokens": 2}}, "register"),
        ({"input_size": (32, 48)}, "square"),
        ({"loss": "l1"}, "squared error"),
    ],
)
def test_transformers_takes_mae_only(tiny: Pretrain, change: dict, message: str) -> None:
    run = fake_run(replace(tiny, **change))
    with pytest.raises(UserError, match=f"{message}.*--format timm"):
        export(Export(run.out, format="transformers"))


def test_start_from_a_timm_file(tiny: Pretrain, tmp_path: Path) -> None:
    """A classifier's checkpoint of another size: head left, positions resized, everything else taken."""
    other = timm.create_model(tiny.model, num_classes=5, img_size=64, **tiny.model_kwargs)
    save_file(other.state_dict(), tmp_path / "timm.safetensors")
    model = build(tiny)
    assert "encoder from" in initialise(model, str(tmp_path / "timm.safetensors"))
    own = model.encoder.backbone.state_dict()
    for name, value in other.state_dict().items():
        if not name.startswith("head"):
            assert name == "pos_embed" or torch.equal(own[name], value), name
    assert own["pos_embed"].shape[1] == 17

    torch.save({"state_dict": other.state_dict()}, tmp_path / "timm.pth")
    again = build(tiny)
    initialise(again, str(tmp_path / "timm.pth"))
    assert torch.equal(again.encoder.backbone.state_dict()["norm.weight"], own["norm.weight"])


def test_start_from_a_run_takes_the_decoder_where_it_fits(tiny: Pretrain) -> None:
    run = fake_run(tiny)
    _, trained, _ = restore(run.out)
    for source in (run.out, str(Path(run.out) / "checkpoints" / "last.pt")):
        model = build(tiny)
        assert "encoder and decoder" in initialise(model, source)
        for name, value in trained.state_dict().items():
            assert torch.equal(model.state_dict()[name], value)
    smaller = build(replace(tiny, decoder_width=16))
    assert "its decoder has another shape" in initialise(smaller, run.out)
    assert torch.equal(smaller.encoder.backbone.norm.weight, trained.encoder.backbone.norm.weight)


def test_weights_of_another_model_are_refused(tiny: Pretrain, tmp_path: Path) -> None:
    model = build(tiny)
    other = timm.create_model(tiny.model, num_classes=0, img_size=32, **{**tiny.model_kwargs, "depth": 5})
    save_file(other.state_dict(), tmp_path / "deep.safetensors")
    with pytest.raises(UserError, match=r"12 weights that the model has not.*blocks\.4.*--model-kwargs"):
        initialise(model, str(tmp_path / "deep.safetensors"))
    wide = timm.create_model(tiny.model, num_classes=0, img_size=32, **{**tiny.model_kwargs, "embed_dim": 64})
    save_file(wide.state_dict(), tmp_path / "wide.safetensors")
    with pytest.raises(UserError, match="another shape"):
        initialise(model, str(tmp_path / "wide.safetensors"))
    (tmp_path / "broken.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="damaged"):
        initialise(model, str(tmp_path / "broken.safetensors"))
    with pytest.raises(UserError, match="no such file"):
        initialise(model, str(tmp_path / "nowhere.pth"))


def test_python_names_are_there() -> None:
    for name in leanmim.__all__:
        assert getattr(leanmim, name) is not None


def test_layers_left_out_of_pretraining_are_fresh_and_named(tiny: Pretrain) -> None:
    run = fake_run(replace(tiny, depth=2))  # of 4 blocks
    folder = export(Export(run.out))
    description = json.loads((folder / "config.json").read_text())
    named = description["leanmim"]["not_pretrained"]
    assert description["leanmim"]["depth"] == 2
    assert named and all(name.startswith(("blocks.2.", "blocks.3.")) for name in named)
    config, ours, _ = restore(run.out)
    scope: dict = {}
    exec(timm_lines(folder, config, ours), scope)
    loaded = scope["model"].state_dict()
    own = ours.encoder.backbone.state_dict()
    assert loaded.keys() - own.keys() == set(named)
    assert all(torch.equal(loaded[name], value) for name, value in own.items())
