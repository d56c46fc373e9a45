"""Attention of the last block, as heat over the photos.

b images, c channels, H W pixels, a heads, t tokens, h w patches.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from leanmim.config import Show
from leanmim.encoders.backbone import Backbone, as_tokens
from leanmim.errors import UserError
from leanmim.evaluators.features import grid_of, has_class_token, uncovered
from leanmim.pictures.figures import draw, overlay, pairs_of
from leanmim.pictures.images import drawable
from leanmim.pictures.shown import AT_ONCE, open_shown, read_shown


class Attention(NamedTuple):
    """How much of their attention some tokens give to each patch."""

    maps: Float[Tensor, "b h w"]
    """Shares; what is missing to 1 falls on prefix tokens."""
    of: str
    """Which tokens."""


@torch.inference_mode()
def last_attention(backbone: Backbone, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b a t t"]:
    """Of the last block of a ViT: how each token, prefix tokens first, shares its attention among all.

    Raises:
        UserError: the backbone's last block does not attend from all tokens to all, or does not show it.
    """
    inner = uncovered(backbone)
    found: list[Tensor] = []
    attention: Any = getattr(inner.blocks[-1], "attn", None) if hasattr(inner, "blocks") else None
    tokens = 0
    if hasattr(attention, "fused_attn") and hasattr(attention, "attn_drop"):
        # timm's modules hand their weights to the dropout, unless one kernel computes all
        hook = attention.attn_drop.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
        fused, attention.fused_attn = attention.fused_attn, False
        try:
            patches = as_tokens(inner, inner.forward_features(images)).shape[1]
        finally:
            attention.fused_attn = fused
            hook.remove()
        tokens = prefix_of(inner) + patches
    if not tokens or not found or found[0].ndim != 4 or found[0].shape[2:] != (tokens, tokens):
        raise UserError(
            f"--picture attention is for a ViT, whose last block attends to the whole image; timm's {type(inner).__name__} does "
            "not, or does not show it; --picture features draws any backbone"
        )
    return found[0].float().cpu()


def prefix_of(backbone: Backbone) -> int:
    """How many prefix tokens there are."""
    return getattr(backbone, "num_prefix_tokens", None) or 0


def attention_maps(backbone: Backbone, images: Float[Tensor, "b c H W"]) -> Attention:
    """The attention to each patch in the last block, the mean over the heads: the class token's where the encoder pools by it,
    otherwise the mean of all patches'. Errors as for `last_attention`.
    """
    inner = uncovered(backbone)
    prefix = prefix_of(inner)
    weights = torch.cat([last_attention(backbone, some).mean(1) for some in images.split(AT_ONCE)])
    if has_class_token(inner) and getattr(inner, "global_pool", "token") == "token":
        rows, of = weights[:, 0, prefix:], "the class token's attention"
    else:
        rows, of = weights[:, prefix:, prefix:].mean(1), "the mean of the patches' attention"
    return Attention(rows.unflatten(1, grid_of(rows.shape[1], (images.shape[2], images.shape[3]))), of)


def attention(config: Show) -> Figure:
    """Each photo beside the attention to its patches in the encoder's last block.

    Raises:
        UserError: the encoder or the images cannot be read, or the encoder has no such attention.
    """
    shown = open_shown(config)
    names, pictures = read_shown(config, shown)
    found = attention_maps(shown.backbone, shown.normalise(pictures))
    size = shown.start.model.size
    pairs = pairs_of(names, size, ("photo", "attention"))
    for (photo, beside), original, heat in zip(pairs.axes, drawable(pictures), found.maps, strict=True):
        draw(photo, original, size)
        draw(beside, original.mean(0, keepdim=True), size)
        overlay(beside, heat.numpy(), size, cmap="inferno", alpha=0.65, vmin=0, interpolation="bicubic")
        beside.set_xlabel(f"at most {heat.max():.1%} to a patch", loc="left", fontsize=7, labelpad=2)
    n = found.maps[0].numel()
    rest = 1 - found.maps.sum((1, 2)).mean().item()
    elsewhere = f"; not drawn: {rest:.0%} to the prefix tokens" if rest > 0.005 else ""
    pairs.figure.supxlabel(
        f"{shown.caption}\n{found.of} in the last block, mean over its heads; if it were even, {1 / n:.2%} to each of {n} patches"
        f"\ndark: little; bright: the most of the image{elsewhere}",
        fontsize=8,
    )
    return pairs.figure
