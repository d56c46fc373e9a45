"""The method, one page: embed, segment, read, decode, compare.

b batch, c channels, H W pixels, n patches, r predicted, p target width.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from leanmim.config.base import Loss, Select, Start
from leanmim.decoder import Decoder
from leanmim.encoders import Encoder
from leanmim.errors import UserError
from leanmim.masking import (
    Mask,
    Split,
    keep_all,
    magnify,
    mask_units,
    narrower,
    random_fine_mask,
    random_mask,
    select_all_furthest,
    select_random,
    take,
)
from leanmim.targets import Target, patchify


class Part(NamedTuple):
    """Consecutive segments, where other processes run the others: see `leanmim.pipeline`."""

    segments: range
    enter: Callable[[Tensor], Tensor]
    """From the images to what the first of them runs on: images, or the output of the segment before."""
    leave: Callable[[Tensor], None]
    """Is given the output of the last of them."""


class MIM(nn.Module):
    """Masked image modelling: any encoder, any target, one decoder for each segment of the encoder.

    Args:
        encoder: a backbone and the way a mask reaches it.
        decoders: one per segment of the encoder.
        target: what is predicted.
        mask_ratios: share of the mask units that is masked, for each segment, not falling (BIM).
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
        mask_ratios: tuple[float, ...],
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
        assert len(mask_ratios) == len(decoders)
        self.mask_ratios = mask_ratios
        self.mask_unit = mask_unit
        self.finer = finer
        self.throw = throw
        self.select = select
        self.start: Start = start
        self.compare = {"l1": torch.abs, "l2": torch.square}[loss]
        self.autocast = autocast

    def draw_masks(self, images: Float[Tensor, "b c H W"]) -> list[Mask]:
        """Random masks of each segment, from torch's global generator of the images' device; see `nest`."""
        return self.nest(self.draw_mask(images))

    def draw_mask(self, images: Float[Tensor, "b c H W"]) -> Mask:
        """A random mask of the first segment, for each image its own."""
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

    def draw_splits(self, masks: list[Mask]) -> list[Split]:
        """Of each segment's masked patches those that are decoded; at random where that is asked for, or patches are equally far.

        Raises:
            UserError: so many are thrown that nothing is left to decode.
        """
        if not self.throw:
            return [keep_all(mask) for mask in masks]
        grid, kept = self.encoder.grid, [self.count_kept(mask) for mask in masks]
        noises = [torch.rand(len(mask.masked), grid.n, device=mask.masked.device) for mask in masks]
        if self.select == "random":
            return [select_random(*own) for own in zip(masks, kept, noises, strict=True)]
        return select_all_furthest(masks, grid, kept, noises, self.start)

    def count_kept(self, mask: Mask) -> int:
        """How many of the masked patches are decoded. Raises UserError where that is none or all, though some are thrown."""
        n, masked = self.encoder.grid.n, mask.masked.shape[1]
        thrown = int(n * self.throw + 1e-9)
        if not 0 < thrown < masked:
            low, high = math.ceil(1e4 / n) / 1e4, math.floor(1e4 * (masked - 1) / n) / 1e4
            remedy = f"choose it between {low:g} and {high:g}, or 0 to decode all" if masked > 1 else "choose 0"
            raise UserError(f"--throw {self.throw} is {thrown} of all {n} patches, and {masked} are masked; {remedy}")
        return masked - thrown

    def predictions(
        self,
        images: Float[Tensor, "b c H W"],
        masks: list[Mask] | None = None,
        splits: list[Split] | None = None,
        part: Part | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """For each segment in order, the places of its predictions (b r) and the predictions (b r p).

        A segment runs when its predictions are asked for, on the detached output of the one before:
        no gradient crosses a segment's border, and only one segment's graph is alive at a time.

        Args:
            images: normalised images.
            masks: one for each segment; drawn at random when None.
            splits: which masked patches are decoded, for each segment; drawn at random when None.
            part: the segments to run; None is all. What is drawn is drawn for all.
        """
        encoder, grid = self.encoder, self.encoder.grid
        masks = self.draw_masks(images) if masks is None else masks
        splits = self.draw_splits(masks) if splits is None else splits
        device = images.device.type
        x, segments = (part.enter(images), part.segments) if part else (images, range(len(self.decoders)))
        del images  # nobody but ``x`` holds them, and the first segment only
        for i in segments:
            decoder, mask, split = self.decoders[i], masks[i], splits[i]
            # Closed before each yield: an open autocast would leak into the caller's backward.
            with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
                x = encoder.embed(x, mask) if i == 0 else encoder.narrow(i, x.detach(), masks[i - 1], mask)
                x = encoder.segment(i, x)
                ids, *prediction = decoder(encoder.read(i, x), encoder.positions(mask), split, grid)
            if part and i == segments[-1]:
                part.leave(x.detach())
            yield ids, prediction.pop().float()  # no longer held here while others work, the next segment among them

    def losses(
        self, images: Float[Tensor, "b c H W"], masks: list[Mask] | None = None, part: Part | None = None
    ) -> Iterator[Float[Tensor, ""]]:
        """One loss per segment, in order; call backward on each before asking for the next.

        Args:
            images: normalised images.
            masks: one for each segment; drawn at random when None.
            part: the segments whose losses are asked for; None is all.
        """
        target = self.target(images)
        masks = self.draw_masks(images) if masks is None else masks
        predictions = self.predictions(images, masks, part=part)
        del images
        for mask in masks[part.segments.start : part.segments.stop] if part else masks:
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

    def parts(self, i: int) -> list[nn.Module | nn.Parameter]:
        """What segment ``i`` trains: its part of the encoder, and its decoder."""
        return [*self.encoder.parts(i), self.decoders[i]]

    def parameters_of(self, i: int) -> list[nn.Parameter]:
        """The parameters that segment ``i`` trains, in the order of the model's own."""
        parts = self.parts(i)
        own = {p for part in parts for p in ([part] if isinstance(part, nn.Parameter) else part.parameters())}
        return [p for p in self.parameters() if p in own and p.requires_grad]
