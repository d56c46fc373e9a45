"""A recipe becomes a model."""

import math

import torch

from leanmim.config import Pretrain
from leanmim.decoder import Decoder
from leanmim.encoders import Backbone, Encoder, ViTEncoder, encoder_of
from leanmim.errors import UserError
from leanmim.mim import MIM
from leanmim.targets import make_target


def build(config: Pretrain, backbone: Backbone | None = None) -> MIM:
    """The model of a recipe, freshly initialised from torch's global generator.

    Args:
        config: the recipe.
        backbone: a timm model for the configuration's input size; None creates it by its name.

    Raises:
        UserError: the model is unknown, or model, masking, input size and mask unit do not go together.
    """
    config.check()
    encoder = encoder_of(config, backbone)
    target = make_target(config.target, encoder.stride, config.channels, config.hog_cell)
    unit, finer = units_of(config, encoder.stride, target.cell)
    depth, width, heads = decoder_shape(config, encoder)
    decoders = [
        Decoder(
            encoder_width,
            target.width,
            prefix_tokens=encoder.prefix_tokens,
            full_grid=encoder.full_grid,
            depth=depth,
            width=width,
            heads=heads,
            fill=config.fill if config.throw else 0,
        )
        for encoder_width in encoder.widths
    ]
    model = MIM(
        encoder,
        decoders,
        target,
        mask_ratios=config.segment_ratios,
        mask_unit=unit,
        finer=finer,
        throw=config.throw,
        select=config.select,
        start=config.select_start,
        loss=config.loss,
    )
    # an impossible ratio is an error now, not in the first step
    model.draw_splits(model.draw_masks(torch.zeros(1, config.channels, *config.size)))
    return model


def decoder_shape(config: Pretrain, encoder: Encoder) -> tuple[int, int, int]:
    """Depth, width and heads of the decoder; where ``auto``, those published for ViT-B, and smaller ones below it.

    Published: 8 x 512 (MAE), 1 x 512 for each segment (BIM), 1 x 256, or 4 x 256 on a hierarchical backbone (FastMIM), 32
    channels a head. FastMIM finds that the decoder must match the backbone. So it is not wider than the encoder, and MAE's
    8 layers fall with the square of the encoder's width below 768: 2 x 384 for ViT-S, 1 x 192 for ViT-Ti (ours).

    Raises:
        UserError: the width is not divided by the heads.
    """
    encoder_width, painted = encoder.widths[-1], config.masking == "pixel"
    if painted:
        light = 1 if isinstance(encoder, ViTEncoder) else 4
    else:
        light = 1 if config.cut else max(1, round(8 * min(1.0, encoder_width / 768) ** 2))
    narrow = max(32, min(256 if painted else 512, encoder_width // 32 * 32))
    depth = light if config.decoder_depth == "auto" else int(config.decoder_depth)
    width = narrow if config.decoder_width == "auto" else int(config.decoder_width)
    heads = math.gcd(width, max(1, width // 32)) if config.decoder_heads == "auto" else int(config.decoder_heads)
    if depth and width % heads:
        raise UserError(f"--decoder-width {width} is not a multiple of --decoder-heads {heads}")
    return depth, width, heads


def units_of(config: Pretrain, stride: int, cell: int) -> tuple[int, int]:
    """Side of a mask unit in patches, and mask units along a patch's side: one of them is 1.

    Raises:
        UserError: the unit is no whole number of patches, or of parts of a patch that can be masked.
    """
    side = config.mask_unit or stride
    if side < stride and config.masking == "pixel":
        if stride % side or side % cell:
            raise UserError(
                f"--mask-unit {side} must divide the model's patch of {stride} px and be a multiple of the target's "
                f"cells of {cell} px; possible: {[size for size in range(cell, stride + 1, cell) if stride % size == 0]}"
            )
        return 1, stride // side
    if side % stride:
        raise UserError(
            f"--mask-unit {side} is not a multiple of the model's patch of {stride} px; "
            f"try {-(-side // stride) * stride}, or 0 for one patch"
        )
    return side // stride, 1
