"""Families of timm backbones, made small, and FastMIM of each."""

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from leanmim.encoders.backbone import Backbone, create_backbone
from leanmim.factory import build
from leanmim.mim import MIM
from leanmim.recipes import FASTMIM
from leanmim.step import make_optimizers, update
from tests.helpers import nothing_masked


class Family(NamedTuple):
    """A kind of backbone, made small, and what is known about it."""

    stride: int
    kwargs: dict[str, Any] = {}  # noqa: RUF012
    size: tuple[int, int] = (64, 96)
    cell: int = 8
    layout: str = "NCHW"
    untrained: tuple[str, ...] = ()


SMALL = {"depths": (1, 1, 1, 1)}


HEAD_NORM = ("head.norm.weight", "head.norm.bias")


FAMILIES = {
    "vit_tiny_patch16_224": Family(16, {"embed_dim": 32, "depth": 2, "num_heads": 2}, layout="NLC"),
    "eva02_tiny_patch14_224": Family(
        14, {"depth": 2}, (56, 84), cell=7, layout="NLC", untrained=("fc_norm.weight", "fc_norm.bias")
    ),
    "hiera_tiny_224": Family(
        32, {"embed_dim": 32, "stages": (1, 1, 1, 1)}, (64, 96), layout="NLC", untrained=HEAD_NORM
    ),
    "levit_128s": Family(64, size=(128, 192), layout="NLC"),
    "swin_tiny_patch4_window7_224": Family(32, {"embed_dim": 24, **SMALL}, layout="NHWC"),
    "test_mambaout": Family(
        32, layout="NHWC", untrained=(*HEAD_NORM, "head.pre_logits.fc.weight", "head.pre_logits.fc.bias")
    ),
    "pvt_v2_b0": Family(32, SMALL),
    "convnext_atto": Family(32, SMALL, untrained=HEAD_NORM),
    "maxvit_tiny_tf_224": Family(
        32,
        {"embed_dim": (32, 32, 64, 64), **SMALL},
        untrained=(*HEAD_NORM, "head.pre_logits.fc.weight", "head.pre_logits.fc.bias"),
    ),
    "efficientnet_lite0": Family(32),
    "test_efficientnet": Family(32),
    "regnety_002": Family(32),
    "edgenext_xx_small": Family(32, untrained=HEAD_NORM),
    "mobilevit_xxs": Family(32),
}


families = pytest.mark.parametrize("name", FAMILIES)


fast_families = pytest.mark.parametrize("name", [n for n in FAMILIES if n not in ("efficientnet_lite0", "levit_128s")])


HIERARCHICAL = ["swin_tiny_patch4_window7_224", "pvt_v2_b0", "convnext_atto", "hiera_tiny_224"]


def backbone_of(name: str, depth: int | None = None, size: tuple[int, int] | None = None) -> Backbone:
    return create_backbone(name, size or FAMILIES[name].size, 3, depth, **FAMILIES[name].kwargs)


def fastmim(name: str, depth: int | None = None, **changes: Any) -> MIM:
    """FastMIM of a small backbone, with a small decoder."""
    family = FAMILIES[name]
    config = replace(
        FASTMIM,
        **{
            "model": name,
            "depth": depth,
            "input_size": family.size,
            "hog_cell": family.cell,
            "decoder_depth": 1,
            "decoder_width": 32,
            "decoder_heads": 2,
            **changes,
        },
    )
    return build(config, backbone_of(name, depth, config.size))


def two_steps(model: MIM, images: Tensor) -> Tensor:
    """The losses of two steps of AdamW."""
    optimizers = make_optimizers(model, FASTMIM)
    for group in optimizers[0].param_groups:
        group["lr"] = 1e-3
    return torch.cat([update(model, optimizers, [images]) for _ in range(2)])


def tokens_of(encoder: Any, images: Tensor) -> Tensor:
    """The tokens of unmasked images, prefix tokens left out."""
    mask = nothing_masked(encoder.grid.n, len(images))
    return encoder.read(0, encoder.segment(0, encoder.embed(images, mask)))[:, encoder.prefix_tokens :]


def stages_of(backbone: Backbone, index: int, images: Tensor) -> Tensor:
    """The features after a stage, as timm's own code lays them out: b d y x."""
    return backbone.forward_intermediates(images, indices=[index], output_fmt="NCHW", intermediates_only=True)[0]


def heaviest_patch(encoder: Any, size: tuple[int, int]) -> Tensor:
    """For each token, the patch of the image that it depends on most, by its gradient.

    Gradients are balanced first (Sinkhorn): each token's add up to one, and each patch's too. Else those near the
    middle, which many tokens look at, would lead.
    """
    n, (rows, columns), stride = encoder.grid.n, encoder.grid, encoder.stride
    images = torch.randn(1, 3, *size).repeat(n, 1, 1, 1).requires_grad_()  # one for each token
    tokens = tokens_of(encoder.eval(), images)
    every = torch.arange(n)
    (tokens[every, every] @ torch.randn(tokens.shape[-1])).sum().backward()
    energy = images.grad.double().square().sum(1).view(n, rows, stride, columns, stride).sum((2, 4)).flatten(1)
    energy = energy / energy.sum() + 1e-30
    for _ in range(100):
        energy = energy / energy.sum(0)
        energy = energy / energy.sum(1, keepdim=True)
    return energy.argmax(1)
