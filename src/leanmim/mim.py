"""The method, one page: embed, segment, read, decode, compare.

b batch, c channels, H W pixels, n patches, r predicted, p target width.
"""

import math
from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from leanmim.config import Pretrain
from leanmim.decoder import Decoder
from leanmim.encoders import Backbone, Encoder, ViTEncoder, create_backbone, make_encoder
from leanmim.errors import UserError
from leanmim.masking import (
    Mask,
    Split,
    Start,
    keep_all,
    magnify,
    mask_units,
    narrower,
    random_fine_mask,
    random_mask,
    select_furthest,
    select_random,
    take,
)
from leanmim.targets import Target, make_target, patchify

Loss = Literal["l1", "l2"]
Select = Literal["furthest", "random"]


class MIM(nn.Module):
    """Masked image modelling: any encoder, any target, one decoder for each segment of the encoder.

    Args:
        encoder: a backbone and the way a mask reaches it.
        decoders: one per segment of the encoder.
        target: what is predicted.
        mask_ratio: share of the mask units that is masked; one for all segments, or one for each, not falling (BIM).
        mask_unit: side of a mask unit in patches.
        finer: mask units along a patch's side, where they are finer than patches (pixel masking); else 1.
        throw: share of all patches that the decoder's layers do not see, although they are masked (PR-MIM).
        select: which masked patches are decoded, spread out evenly or at random.
        start: what furthest sampling starts from, the visible patches or a random masked one.
        loss: ``l2`` (MAE) or ``l1`` (SimMIM), averaged over the masked patches.
        autocast: dtype of the forward pass; None is float32. Targets and losses are float32 always.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoders: list[Decoder],
        target: Target,
        mask_ratio: float | tuple[float, ...],
        mask_unit: int = 1,
        finer: int = 1,
        throw: float = 0.0,
        select: Select = "furthest",
        start: Start = "visible",
        loss: Loss = "l2",
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoders = nn.ModuleList(decoders)
        self.target = target
        ratios = mask_ratio if isinstance(mask_ratio, tuple) else (mask_ratio,) * len(decoders)
        assert len(ratios) == len(decoders)
        self.mask_ratios = ratios
        self.mask_unit = mask_unit
        self.finer = finer
        self.throw = throw
        self.select = select
        self.start: Start = start
        self.compare = {"l1": torch.abs, "l2": torch.square}[loss]
        self.autocast = autocast

    def draw_mask(self, images: Float[Tensor, "b c H W"]) -> Mask:
        """A random mask of the first segment for each image, from torch's global generator of the images' device."""
        grid = self.encoder.grid
        units = grid.n * self.finer**2 if self.finer > 1 else len(mask_units(grid, self.mask_unit))
        noise = torch.rand(len(images), units, device=images.device)
        if self.finer > 1:
            return random_fine_mask(noise, grid, self.mask_ratios[0], self.finer)
        return random_mask(noise, grid, self.mask_ratios[0], self.mask_unit)

    def nest(self, mask: Mask) -> list[Mask]:
        """The masks of all segments: each hides what the one before hides, and perhaps more."""
        masks = [mask]
        for last, ratio in zip(self.mask_ratios, self.mask_ratios[1:], strict=False):
            same = ratio == last
            masks.append(masks[-1] if same else narrower(masks[-1], self.encoder.grid, ratio, self.mask_unit))
        return masks

    def draw_split(self, mask: Mask) -> Split:
        """Which of the masked patches are decoded; at random where that is asked for, or patches are equally far.

        Raises:
            UserError: so many are thrown that nothing is left to decode.
        """
        n, masked = self.encoder.grid.n, mask.masked.shape[1]
        if not self.throw:
            return keep_all(mask)
        thrown = int(n * self.throw + 1e-9)
        if not 0 < thrown < masked:
            low, high = math.ceil(1e4 / n) / 1e4, math.floor(1e4 * (masked - 1) / n) / 1e4
            remedy = f"choose it between {low:g} and {high:g}, or 0 to decode all" if masked > 1 else "choose 0"
            raise UserError(f"--throw {self.throw} is {thrown} of all {n} patches, and {masked} are masked; {remedy}")
        noise = torch.rand(len(mask.masked), n, device=mask.masked.device)
        if self.select == "random":
            return select_random(mask, masked - thrown, noise)
        return select_furthest(mask, self.encoder.grid, masked - thrown, noise, self.start)

    def predictions(
        self,
        images: Float[Tensor, "b c H W"],
        masks: Mask | list[Mask] | None = None,
        splits: Split | list[Split] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """For each segment in order, the places of its predictions (b r) and the predictions (b r p).

        A segment runs when its predictions are asked for, on the detached output of the one before:
        no gradient crosses a segment's border, and only one segment's graph is alive at a time.

        Args:
            images: normalised images.
            masks: the first segment's mask, or one for each as `nest` makes them; drawn at random when None.
            splits: which masked patches are decoded, for each segment; drawn at random when None.
        """
        encoder, grid = self.encoder, self.encoder.grid
        masks = self.draw_mask(images) if masks is None else masks
        masks = self.nest(masks) if isinstance(masks, Mask) else masks
        splits = [self.draw_split(mask) for mask in masks] if splits is None else splits
        splits = [splits] if isinstance(splits, Split) else splits
        x = images
        for i, (decoder, mask, split) in enumerate(zip(self.decoders, masks, splits, strict=True)):
            # Closed before each yield: an open autocast would leak into the caller's backward.
            with torch.autocast(images.device.type, self.autocast, enabled=self.autocast is not None):
                x = encoder.embed(images, mask) if i == 0 else encoder.narrow(i, x.detach(), masks[i - 1], mask)
                x = encoder.segment(i, x)
                ids, prediction = decoder(encoder.read(i, x), encoder.positions(mask), split, grid)
            prediction = prediction.float()
            yield ids, prediction
            del prediction  # the next segment must not find this one's memory still held

    def losses(
        self, images: Float[Tensor, "b c H W"], masks: Mask | list[Mask] | None = None
    ) -> Iterator[Float[Tensor, ""]]:
        """One loss per segment, in order; call backward on each before asking for the next.

        Args:
            images: normalised images.
            masks: the first segment's mask, or one for each as `nest` makes them; drawn at random when None.
        """
        target = self.target(images)
        masks = self.draw_mask(images) if masks is None else masks
        masks = self.nest(masks) if isinstance(masks, Mask) else masks
        predictions = self.predictions(images, masks)
        for mask in masks:
            ids, prediction = next(predictions)
            error = self.compare(prediction - take(target, ids))
            if mask.hidden is None:
                loss = error.mean()
            else:
                share = take(self.cell_weights(mask.hidden), ids)
                loss = (error * share).sum() / share.sum().clamp(min=1)
                del share
            del prediction, error
            yield loss

    forward = losses  # so that DistributedDataParallel can wrap it

    def cell_weights(self, hidden: Bool[Tensor, "b y x"]) -> Float[Tensor, "b n p"]:
        """1 for each value of the target that belongs to a masked square, 0 for the others."""
        cells = self.target.patch // self.target.cell  # along a patch's side
        size = (self.encoder.grid.height * cells, self.encoder.grid.width * cells)
        weights = patchify(magnify(hidden, size)[:, None].float(), cells)
        return weights.repeat_interleave(self.target.width // weights.shape[2], dim=2)

    def owner(self, name: str) -> int:
        """The segment that trains the parameter ``name``."""
        part, _, rest = name.partition(".")
        return int(rest.split(".")[0]) if part == "decoders" else self.encoder.owner(rest)


def build(config: Pretrain, backbone: Backbone | None = None) -> MIM:
    """The model of a recipe, freshly initialised from torch's global generator.

    Args:
        config: the recipe.
        backbone: a timm model for the configuration's input size; None creates it by its name.

    Raises:
        UserError: the model is unknown, or model, masking, input size and mask unit do not go together.
    """
    config.check()
    if backbone is None:
        backbone = create_backbone(config.model, config.size, config.channels, config.depth, **config.model_kwargs)
    low, high = config.mask_ratios[0], config.mask_ratios[-1]
    encoder = make_encoder(
        backbone,
        config.masking,
        config.size,
        config.channels,
        config.segments,
        config.depth,
        low < high,
        config.linear_init,
    )
    ratios, segments = config.mask_ratios, len(encoder.widths)
    if len(ratios) == 2 < segments:
        ratios = tuple(round(low + (high - low) * i / (segments - 1), 6) for i in range(segments))
    if len(ratios) not in (1, segments):
        raise UserError(
            f"--mask-ratio gives {len(ratios)} numbers for {segments} segments; give one for all, one for each of "
            "--segments, or the first's and the last's"
        )
    tokens = [p for name, p in encoder.named_parameters() if name.removeprefix("borders.").startswith("tokens.")]
    for token, before, after in zip(tokens, ratios, ratios[1:], strict=False):
        token.requires_grad_(before < after)  # elsewhere nothing new is hidden
    target = make_target(config.target, encoder.stride, config.channels, config.hog_cell)
    unit, finer = units_of(config, encoder.stride, target.cell)
    depth = config.decoder_depth
    if depth == "auto":
        depth = 1 if isinstance(encoder, ViTEncoder) else 4
    decoders = [
        Decoder(
            width,
            target.width,
            prefix=encoder.prefix,
            full_grid=encoder.full_grid,
            depth=depth,
            width=config.decoder_width,
            heads=config.decoder_heads,
            fill=config.fill if config.throw else 0,
        )
        for width in encoder.widths
    ]
    model = MIM(
        encoder,
        decoders,
        target,
        mask_ratio=ratios if len(ratios) > 1 else ratios[0],
        mask_unit=unit,
        finer=finer,
        throw=config.throw,
        select=config.select,
        start=config.select_start,
        loss=config.loss,
    )
    for mask in model.nest(model.draw_mask(torch.zeros(1, config.channels, *config.size))):
        model.draw_split(mask)  # speaks up now, not in the first step
    return model


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
