"""The method, one page: embed, segment, read, decode, compare.

b batch, c channels, H W pixels, n patches, k kept, p target width.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from leanmim.config import Pretrain
from leanmim.decoder import Decoder
from leanmim.encoders import Backbone, Encoder, create_backbone, make_encoder
from leanmim.errors import UserError
from leanmim.masking import Mask, keep_all, mask_units, random_mask, take
from leanmim.targets import Pixels, Target

Loss = Literal["l1", "l2"]


class MIM(nn.Module):
    """Masked image modelling: any encoder, any target, one decoder for each segment of the encoder.

    Args:
        encoder: a backbone and the way a mask reaches it.
        decoders: one per segment of the encoder.
        target: what is predicted.
        mask_ratio: share of the mask units that is masked.
        mask_unit: side of a mask unit in patches.
        loss: ``l2`` (MAE) or ``l1`` (SimMIM), averaged over the masked patches.
        autocast: dtype of the forward pass; None is float32. Targets and losses are float32 always.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoders: list[Decoder],
        target: Target,
        mask_ratio: float,
        mask_unit: int = 1,
        loss: Loss = "l2",
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoders = nn.ModuleList(decoders)
        self.target = target
        self.mask_ratio = mask_ratio
        self.mask_unit = mask_unit
        self.compare = {"l1": nn.functional.l1_loss, "l2": nn.functional.mse_loss}[loss]
        self.autocast = autocast

    def draw_mask(self, images: Float[Tensor, "b c H W"]) -> Mask:
        """A random mask for each image, from torch's global generator of the images' device."""
        units = len(mask_units(self.encoder.grid, self.mask_unit))
        noise = torch.rand(len(images), units, device=images.device)
        return random_mask(noise, self.encoder.grid, self.mask_ratio, self.mask_unit)

    def predictions(
        self, images: Float[Tensor, "b c H W"], mask: Mask | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """For each segment in order, the places of its predictions (b k) and the predictions (b k p).

        A segment runs when its predictions are asked for, on the detached output of the one before:
        no gradient crosses a segment's border, and only one segment's graph is alive at a time.
        """
        encoder, grid = self.encoder, self.encoder.grid
        mask = self.draw_mask(images) if mask is None else mask
        split = keep_all(mask)
        x = None
        for i, decoder in enumerate(self.decoders):
            # Closed before each yield: an open autocast would leak into the caller's backward.
            with torch.autocast(images.device.type, self.autocast, enabled=self.autocast is not None):
                x = encoder.embed(images, mask) if x is None else x.detach()
                x = encoder.segment(i, x)
                ids, prediction = decoder(encoder.read(i, x), encoder.positions(mask), split, grid)
            yield ids, prediction.float()

    def losses(self, images: Float[Tensor, "b c H W"], mask: Mask | None = None) -> Iterator[Float[Tensor, ""]]:
        """One loss per segment, in order; call backward on each before asking for the next.

        Args:
            images: normalised images.
            mask: which patches are seen; drawn at random when None.
        """
        target = self.target(images)
        for ids, prediction in self.predictions(images, mask):
            yield self.compare(prediction, take(target, ids))

    forward = losses  # so that DistributedDataParallel can wrap it

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
        backbone = create_backbone(config.model, config.size, config.channels, **config.model_kwargs)
    encoder = make_encoder(backbone, config.masking, config.size)
    if config.mask_unit % encoder.stride:
        raise UserError(
            f"--mask-unit {config.mask_unit} is not a multiple of the model's patch of {encoder.stride} px; "
            f"try {-(-config.mask_unit // encoder.stride) * encoder.stride}, or 0 for one patch"
        )
    target = Pixels(encoder.stride, config.channels, per_patch=config.target == "pixels")
    decoders = [
        Decoder(
            width,
            target.width,
            prefix=encoder.prefix,
            full_grid=encoder.full_grid,
            depth=config.decoder_depth,
            width=config.decoder_width,
            heads=config.decoder_heads,
        )
        for width in encoder.widths
    ]
    unit = max(1, config.mask_unit // encoder.stride)
    units = len(mask_units(encoder.grid, unit))
    random_mask(torch.zeros(1, units), encoder.grid, config.mask_ratio, unit)  # speaks up now, not in the first step
    return MIM(encoder, decoders, target, config.mask_ratio, unit, config.loss)
