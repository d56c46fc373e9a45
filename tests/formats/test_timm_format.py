"""What comes out is a timm model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from leanmim.config import Export, Pretrain
from leanmim.data.crops import kept_share
from leanmim.formats import export, timm_lines
from leanmim.recipes import FASTMIM, SIMMIM
from leanmim.weights import digest, load_backbone, restore
from tests.helpers import fake_run

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


def described(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(params=[*VITS, "swin", *OTHERS])
def run(request: pytest.FixtureRequest, tiny: Pretrain) -> Pretrain:
    out = Path(tiny.out)
    if request.param in OTHERS:
        size, cell = ((56,), 7) if "patch14" in request.param else ((64,), 8)
        other = dict(model=request.param, model_kwargs=OTHERS[request.param], input_size=size, hog_cell=cell)
        return fake_run(replace(FASTMIM, data=tiny.data, **other), out)
    if request.param == "swin":
        swin = dict(model="swin_tiny_patch4_window7_224", model_kwargs={"embed_dim": 24}, input_size=(64,))
        return fake_run(replace(SIMMIM, data=tiny.data, **swin), out)
    return fake_run(replace(tiny, **VITS[request.param]), out)


@pytest.mark.parametrize(("size", "crop"), [(64, 1.0), (96, 1.0), (128, 0.875)])
def test_the_crop_is_the_one_that_measures_and_embeds(tiny: Pretrain, size: int, crop: float) -> None:
    own = fake_run(replace(tiny, input_size=(size,)), Path(tiny.out))
    known = described(export(Export(run=own.out)))["pretrained_cfg"]
    assert known["crop_pct"] == crop == kept_share((size, size), None)


def test_timm_loads_the_export_strictly_and_computes_the_same(run: Pretrain) -> None:
    folder = export(Export(run=run.out))
    _, ours, _ = restore(run.out)
    images = torch.randn(2, run.channels, *run.size)
    expected = ours.eval().encoder.backbone(images)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "leanmim_digest": digest(load_file(folder / "model.safetensors"))}

    scope: dict = {}
    exec(timm_lines(folder / "model.safetensors", described(folder)), scope)
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
    run = fake_run(tiny, Path(tiny.out))
    file = export(Export(run=run.out)) / "model.safetensors"
    model = timm.create_model(
        run.model, pretrained=True, pretrained_cfg_overlay=dict(file=str(file), num_classes=0), num_classes=10,
        img_size=48, in_chans=channels, **run.model_kwargs,
    )  # fmt: skip
    assert model(torch.randn(2, channels, 48, 48)).shape == (2, 10)
    weights = load_file(file)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, weights["blocks.1.mlp.fc1.weight"])
    assert model.pos_embed.shape[1] == 1 + 36


def test_layers_left_out_of_pretraining_are_fresh_and_named(tiny: Pretrain) -> None:
    run = fake_run(replace(tiny, depth=2), Path(tiny.out))  # of 4 blocks
    folder = export(Export(run=run.out))
    description = described(folder)
    named = description["leanmim"]["not_pretrained"]
    assert description["leanmim"]["depth"] == 2
    assert named and all(name.startswith(("blocks.2.", "blocks.3.")) for name in named)
    _, ours, _ = restore(run.out)
    scope: dict = {}
    exec(timm_lines(folder / "model.safetensors", description), scope)
    loaded = scope["model"].state_dict()
    own = ours.encoder.backbone.state_dict()
    assert loaded.keys() - own.keys() == set(named)
    assert all(torch.equal(loaded[name], value) for name, value in own.items())


SIZES = {  # model, its arguments, size of pre-training, another size, and what timm is told about that one
    "vit": ({}, 32, 48, {"img_size": 48}),
    "swin": (
        {"model": "swin_tiny_patch4_window7_224", "model_kwargs": {"embed_dim": 24}},
        64, 128, {"img_size": 128, "window_size": 4},
    ),
    "pvt": ({"model": "pvt_v2_b0", "model_kwargs": {}}, 64, 96, {}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")  # timm's own, while it resizes Swin's tables
@pytest.mark.parametrize("name", SIZES)
def test_at_another_size_timms_features_are_ours(name: str, tiny: Pretrain) -> None:
    """Positions and window tables are interpolated by both."""
    changes, before, after, arguments = SIZES[name]
    recipe = tiny if name == "vit" else replace(FASTMIM, data=tiny.data)
    run = fake_run(replace(recipe, **changes, input_size=(before,)), Path(tiny.out))
    folder = export(Export(run=run.out))
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0, **arguments).eval()
    ours, _, _ = load_backbone(run.out, (after, after))
    images = torch.randn(2, 3, after, after)
    with torch.inference_mode():
        assert torch.equal(theirs.forward_features(images), ours.forward_features(images))
        assert torch.equal(theirs(images), ours(images))
