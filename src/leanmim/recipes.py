"""Recipes are values: a published method with its published numbers, or a change of one.

`data` and `out` are the user's; fill them in with ``dataclasses.replace(MAE, data="photos", out="run")``. Costs are of
ViT-B/16 and one image; kNN and linear probe are those of a small ViT after 8 epochs on 10,000 images of CIFAR-10, mean
and spread of three seeds (benchmarks/README.md). Untrained it has 29.8 ± 1.0 and 42.1 ± 1.3 %.
"""

import difflib
from dataclasses import fields, replace
from typing import Any

from leanmim.config import Pretrain
from leanmim.errors import UserError

MAE = Pretrain(data="", out="", recipe="mae")
"""Masked autoencoder (arXiv 2111.06377): 75 % of the patches dropped, 8 x 512 decoder, normalised pixels.

    leanmim pretrain mae --data photos --model vit_small_patch16_224 --out run

58.7 training GFLOP, 80 MiB saved for backward; kNN 40.7 ± 1.1 %, linear probe 49.4 ± 0.7 %.
"""

SIMMIM = replace(
    MAE,
    recipe="simmim",
    input_size=(192,),
    masking="token",
    mask_ratio=0.6,
    mask_unit=32,
    target="raw-pixels",
    loss="l1",
    decoder_depth=0,
    blr=5e-5,  # the paper's 1e-4 x batch / 512
    schedule="step",
    warmup_share=10 / 800,
    betas=(0.9, 0.999),
    clip_grad=5.0,
    crop_scale=(0.67, 1.0),
    interpolation="bilinear",
)
"""SimMIM (arXiv 2111.09886): a learned token in squares of 32 px, one linear layer, raw pixels, ViT and Swin.

    leanmim pretrain simmim --data photos --model swin_tiny_patch4_window7_224 --out run

77.3 training GFLOP; kNN 28.6 ± 0.9 %, linear probe 41.0 ± 0.7 % (batch 128): too few epochs for it.
"""

FASTMIM = replace(
    MAE,
    recipe="fastmim",
    input_size=(128,),
    linear_init="xavier",
    masking="pixel",
    target="hog",
    decoder_depth="auto",
    decoder_width=256,
    decoder_heads=8,
    warmup_share=20 / 800,
)
"""FastMIM (arXiv 2212.06593): low resolution, a colour painted on masked squares of one patch, HOG, any backbone.

    leanmim pretrain fastmim --data photos --model pvt_v2_b2 --out run

0.44 of SimMIM's training FLOPs, 0.49 of its bytes saved; kNN 33.5 %, linear probe 44.4 % (one seed).
"""

FASTMIM_P = replace(FASTMIM, recipe="fastmim-p", stage_scales=(1.0, 1.25, 1.5), stage_starts=(0.0, 0.5, 0.8))
"""FastMIM-P: the resolution grows during training, 128, 160 and 192 px from 0, 50 and 80 % of the epochs on (the
paper names no stages; these are ours).

    leanmim pretrain fastmim-p --data photos --model swin_tiny_patch4_window7_224 --out run

0.63 of SimMIM's training FLOPs; its accuracy is not yet measured, that of a growing MAE with HOG is.
"""

PR_MIM = replace(MAE, recipe="pr-mim", throw=0.5)
"""PR-MIM (arXiv 2411.15746): MAE whose decoder sees the visible and a furthest-sampled third of the masked patches;
half of all patches are thrown, and filled in from the others by one thin attention layer (ours).

    leanmim pretrain pr-mim --data photos --model vit_base_patch16_224 --out run

0.72 of MAE's training FLOPs, 0.70 of its bytes saved; kNN 39.4 ± 0.1 %, linear probe 49.3 ± 0.9 %.
"""

BIM = replace(MAE, recipe="bim", segments=4, mask_ratio=(0.72, 0.78), decoder_depth=1)
"""BIM (arXiv 2311.17218): MAE in four segments, each with its own 1 x 512 decoder and loss; no gradient crosses a
border, and later segments see fewer patches (the paper names no ratios; these are ours).

    leanmim pretrain bim --data photos --model vit_base_patch16_224 --out run

0.75 of MAE's training FLOPs, 0.21 of its bytes saved, 0.23 of its gradients, 0.37 of its peak memory with batch 64.
A ViT of twelve thin blocks on 5,000 images: kNN 35.1 ± 0.2 %, linear probe 44.8 ± 0.3 %, MAE 32.3 ± 1.3 and 43.6 ± 0.4 %.
"""

RECIPES = {recipe.recipe: recipe for recipe in (MAE, SIMMIM, FASTMIM, FASTMIM_P, PR_MIM, BIM)}


def variant(name: str, changes: Any) -> Pretrain:
    """The recipe called ``name``, with those fields of another configuration that are given (not None, not empty).

    Raises:
        UserError: there is no such recipe.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=3)
        raise UserError(
            f"there is no recipe {name!r}; {'nearest: ' + ', '.join(near) if near else 'there are: ' + ', '.join(RECIPES)}"
        )
    own = {field.name for field in fields(Pretrain)}
    given = {field.name: getattr(changes, field.name) for field in fields(changes) if field.name in own}
    return replace(RECIPES[name], **{key: value for key, value in given.items() if value not in (None, (), {})})
