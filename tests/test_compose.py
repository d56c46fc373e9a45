"""Every recipe x encoder masking x size trains two steps."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from leanmim.config import Pretrain
from leanmim.mim import build
from leanmim.recipes import RECIPES
from leanmim.step import parameter_groups

BACKBONES = {
    "vit": ("vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}),
    "swin": ("swin_tiny_patch4_window7_224", {"embed_dim": 24}),
    "convnext": ("convnext_atto", {}),
}
SIZES = {"square": (64,), "wide": (64, 96), "tall": (128, 64)}


def small(recipe: Pretrain, masking: str, backbone: str, size: str) -> Pretrain:
    model, arguments = BACKBONES[backbone]
    return replace(
        recipe,
        model=model,
        model_kwargs=arguments,
        masking=masking,
        input_size=SIZES[size],
        mask_unit=32 if recipe.mask_unit else 0,
        mask_ratio=(0.25, 0.5, 0.5, 0.75) if isinstance(recipe.mask_ratio, tuple) else recipe.mask_ratio,
        decoder_depth=max(recipe.decoder_depth and 1, int(masking == "drop")),
        decoder_width=32,
        decoder_heads=2,
    )


COMBINATIONS = [
    (name, masking, backbone, size)
    for name, masking, backbone, size in product(RECIPES, ("drop", "token", "pixel"), BACKBONES, SIZES)
    if masking == "pixel" or backbone == "vit" or (masking, backbone) == ("token", "swin")
]


@pytest.mark.parametrize(("name", "masking", "backbone", "size"), COMBINATIONS)
def test_two_steps(name: str, masking: str, backbone: str, size: str) -> None:
    config = small(RECIPES[name], masking, backbone, size)
    torch.manual_seed(0)
    model = build(config)
    optimizers = [torch.optim.AdamW(groups, lr=1e-3) for groups in parameter_groups(model)]
    before = {name: p.clone() for name, p in model.named_parameters()}
    images = torch.randn(4, 3, *config.size)
    losses = []
    for _ in range(2):
        for i, loss in enumerate(model.losses(images)):
            loss.backward()
            optimizers[i].step()
            optimizers[i].zero_grad()
            losses.append(loss.item())
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert still == {name for name, p in model.named_parameters() if not p.requires_grad}
