"""Recipes of fine-tuning are values: the published ones (224 px, ImageNet-1K), and one for few images.

A field that a user leaves at ``auto`` takes the recipe's number; one that is given stays.
"""

import math
from dataclasses import fields, replace

from timm.models import VisionTransformer

from leanmim.config import Finetune
from leanmim.encoders.backbone import backbone_of
from leanmim.errors import UserError
from leanmim.recipes import nearest
from leanmim.start import Start

MAE = Finetune(
    start="",
    data="",
    out="",
    recipe="mae",
    epochs=100,
    effective_batch=1024,
    blr=5e-4,
    warmup_share=5 / 100,
    min_lr=1e-6,
    layer_decay=0.65,
    weight_decay=0.05,
    clip_grad=0.0,
    drop_path=0.1,
    mixup=0.8,
    cutmix=1.0,
    smoothing=0.1,
    randaugment="rand-m9-mstd0.5-inc1",
    erase=0.25,
    crop_scale=(0.08, 1.0),
    ema=0.0,
)
"""MAE's ViT-B (arXiv 2111.06377, table 9): published 83.7 % on ImageNet-1K, not measured here.

    leanmim finetune run --data labelled --recipe mae --out tuned
"""

SIMMIM_SWIN = replace(
    MAE,
    recipe="simmim-swin",
    effective_batch=2048,
    blr=1.25e-3 / 2,  # its divisor is 512
    warmup_share=20 / 100,
    min_lr=1e-6,  # 2.5e-7 for 512 images
    layer_decay=0.8,
    clip_grad=5.0,
)
"""SimMIM's Swin-B (arXiv 2111.09886) after 800 epochs of pre-training: published 84.0 % on ImageNet-1K, not measured here."""

FASTMIM = replace(MAE, recipe="fastmim", blr=6e-4, layer_decay=0.7)
"""FastMIM's ViT-B (arXiv 2212.06593): published 83.8 % on ImageNet-1K, not measured here."""

FASTMIM_SWIN = replace(MAE, recipe="fastmim-swin", blr=1e-3, layer_decay=0.8)
"""FastMIM's Swin-B, and hierarchical backbones in general: published 84.1 % on ImageNet-1K, not measured here."""

SMALL = replace(
    MAE,
    recipe="small",
    epochs="auto",
    effective_batch="auto",
    blr="auto",
    warmup_share=0.1,
    layer_decay=0.75,
    mixup=0.0,
    cutmix=0.0,
    erase=0.0,
    crop_scale=(0.35, 1.0),
)
"""For hundreds to thousands of images (ours). Its learning rate is screened on photos (benchmarks/README.md), its augmentations and
its layer decay are not yet.

    leanmim finetune run --data labelled --labels-per-class 50 --out tuned
"""

RECIPES = {recipe.recipe: recipe for recipe in (MAE, SIMMIM_SWIN, FASTMIM, FASTMIM_SWIN, SMALL)}
SMALL_BELOW = 20_000  # training images


def small_epochs(images: int) -> int:
    """Epochs of the small recipe: 100,000 images are seen, in 30 to 200 epochs."""
    return min(200, max(30, round(100_000 / images)))


def small_batch(images: int) -> int:
    """Images of a step of the small recipe: the largest power of two that leaves 20 steps an epoch, from 16 to 256."""
    return min(images, 256, max(16, 2 ** math.floor(math.log2(max(1, images / 20)))))


def small_rate(batch: int, scratch: bool) -> float:
    """Learning rate of the small recipe for 256 images a step, by the square root of the batch: 4e-3 for the last of pre-trained layers,
    1e-3 for all from scratch (ours: each the best of three, benchmarks/README.md, "Fine-tuning")."""
    return (1e-3 if scratch else 4e-3) * math.sqrt(batch / 256)


def choose(config: Finetune, start: Start, images: int) -> Finetune:
    """The recipe that a configuration names, or the one for this start and number of training images.

    Raises:
        UserError: there is no such recipe.
    """
    if config.recipe != "auto":
        if config.recipe not in RECIPES:
            raise UserError(f"there is no recipe {config.recipe!r} of fine-tuning; {nearest(config.recipe, RECIPES)}")
        return RECIPES[config.recipe]
    if images < SMALL_BELOW:
        return SMALL
    flat = isinstance(backbone_of(start.model, device="meta"), VisionTransformer)
    before = start.pretrained.recipe if start.pretrained else ""
    if before.startswith("fastmim"):
        return FASTMIM if flat else FASTMIM_SWIN
    if flat:
        return MAE
    return SIMMIM_SWIN if before == "simmim" else FASTMIM_SWIN


def filled(config: Finetune, recipe: Finetune) -> Finetune:
    """The configuration with the recipe's numbers where it has ``auto``; some of the recipe's may still be ``auto``."""
    own = {field.name: getattr(recipe, field.name) for field in fields(config) if getattr(config, field.name) == "auto"}
    if config.lr is not None:
        own.pop("blr", None)
    kept = {"batch_size", "class_weights", "pool", "device", "precision", "memory", "eval_every"}
    return replace(
        config, **{name: value for name, value in own.items() if name not in kept} | {"recipe": recipe.recipe}
    )
