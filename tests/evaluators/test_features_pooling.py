"""Features of any backbone are pooled over positions."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import leanmim
from leanmim.evaluators.features import embedding
from leanmim.factory import build
from leanmim.mim import MIM
from leanmim.recipes import FASTMIM
from leanmim.run import Run, save, write_json
from tests.families import FAMILIES, backbone_of, fast_families


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@fast_families
def test_an_embedding_is_the_mean_over_positions(name: str) -> None:
    size = FAMILIES[name].size
    backbone = backbone_of(name).eval()
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        features = backbone.forward_features(images)
        pooled = embedding(backbone, "avg")(images)
    rows, columns = size[0] // FAMILIES[name].stride, size[1] // FAMILIES[name].stride
    total = torch.zeros_like(pooled)
    for y in range(rows):
        for x in range(columns):
            match FAMILIES[name].layout:
                case "NCHW":
                    total += features[:, :, y, x]
                case "NHWC":
                    total += features[:, y, x]
                case "NLC":  # patches come last
                    total += features[:, features.shape[1] - rows * columns + y * columns + x]
    last = getattr(backbone, "fc_norm", nn.Identity())  # some ViTs' own norm comes after pooling
    assert pooled.shape == (2, backbone.num_features)
    assert torch.allclose(pooled, last(total / (rows * columns)), atol=1e-5)


def test_an_embedding_ends_with_the_models_norm_after_pooling() -> None:
    backbone = backbone_of("eva02_tiny_patch14_224").eval()
    nn.init.normal_(backbone.fc_norm.weight)
    images = torch.randn(2, 3, 56, 84)
    expected = backbone.fc_norm(backbone.forward_features(images)[:, 1:].mean(1))
    assert torch.equal(embedding(backbone, "avg")(images), expected)
    assert torch.allclose(embedding(backbone, "timm")(images), expected, atol=1e-6)


def run_of(folder: Path, **changes: Any) -> tuple[MIM, Path]:
    """An untrained FastMIM and its run folder."""
    config = replace(
        FASTMIM,
        out=str(folder),
        input_size=(64,),
        epochs=1,
        decoder_depth=1,
        decoder_width=32,
        decoder_heads=2,
        **changes,
    )
    model = build(config)
    run = Run(folder)
    write_json(run.config, config.to_json())
    state = dict(config=config.to_json(), step=0, mean=[0.5] * 3, std=[0.25] * 3, model=model.state_dict())
    save(run.last, {**state, "phase": 0, "optimizers": []})
    return model, run.folder


@pytest.mark.parametrize(
    ("changes", "layout"),
    [
        ({"model": "test_efficientnet"}, "NCHW"),
        ({"model": "convnext_atto", "depth": 2}, "NLC"),  # with the norm that closed it
        ({"model": "swin_tiny_patch4_window7_224", "model_kwargs": {"embed_dim": 24}}, "NHWC"),
        ({"model": "swin_tiny_patch4_window7_224", "model_kwargs": {"embed_dim": 24}, "depth": 2}, "NLC"),
        ({"model": "hiera_tiny_224", "model_kwargs": {"embed_dim": 16}}, "NLC"),
    ],
)
@pytest.mark.parametrize("size", [None, (96, 64)])
def test_a_loaded_backbone_pools_its_features(
    tmp_path: Path, changes: dict[str, Any], layout: str, size: tuple[int, int] | None
) -> None:
    if "hiera" in changes["model"] and size == (96, 64):
        pytest.skip("Hiera's positions have one size")
    model, folder = run_of(tmp_path / "run", **changes)
    backbone, config, _ = leanmim.load_backbone(folder, size)
    assert not backbone.training
    images = torch.randn(2, 3, *(size or config.size))
    with torch.no_grad():
        features = backbone.forward_features(images)
        if size is None:
            own = model.encoder.eval().backbone.forward_features(images)
            assert torch.equal(features, model.encoder.read(0, own) if "depth" in changes else own)
        over = {"NCHW": (2, 3), "NHWC": (1, 2), "NLC": 1}[layout]
        assert torch.allclose(embedding(backbone, "avg")(images), features.mean(over), atol=1e-6)
    assert json.loads((folder / "config.json").read_text())["masking"] == "pixel"
