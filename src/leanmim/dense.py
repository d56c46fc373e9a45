"""Dense features: four maps of an image, as detectors and segmentation models take them.

b batch, c image channels, H W pixels.
"""

import os
from collections import OrderedDict
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, pad
from torchvision.ops import FeaturePyramidNetwork

from leanmim.encoders.backbone import Backbone, backbone_of
from leanmim.errors import UserError
from leanmim.start import Start, open_start
from leanmim.weights import fit_backbone

STRIDES = (4, 8, 16, 32)
"""Pixels of the image from one place of a map to the next, map by map."""


def pyramid(
    start: str | Path,
    out_channels: int = 256,
    pool: bool = False,
    input_size: int | Sequence[int] = (),
    model: str | None = None,
    model_kwargs: dict[str, Any] | None = None,
) -> "Pyramid":
    """A backbone with a feature pyramid on top, to train a detector or a segmentation model from.

    The backbone has the weights of the start, each of them or the call fails; the pyramid's own are random.

    Args:
        start: a run folder, an export folder, timm's name of published weights, a checkpoint file (with ``model``), or
            ``scratch`` (with ``model``): what `leanmim finetune` starts from.
        out_channels: of each map.
        pool: a fifth map, ``pool``, of stride 64, as the default anchors of torchvision's detectors want it.
        input_size: px, one number or height and width; empty is the start's own. Only a backbone that is built for
            one size needs it (Hiera). The others take any; their positions and windows are the start's.
        model: timm's name of the architecture.
        model_kwargs: its further arguments.

    Returns:
        An ``nn.Module`` in training mode.

    Raises:
        UserError: as for every start; or the backbone has no maps of these strides.
    """
    size = (input_size,) if isinstance(input_size, int) else tuple(input_size)
    found = open_start(os.fspath(start), model, model_kwargs, size)
    return Pyramid(found, out_channels, pool).train()


class SimplePyramid(nn.Module):
    """Maps of four strides from one: ViTDet's simple feature pyramid (arXiv 2203.16527, section 3).

    The map is enlarged by transposed convolutions, left as it is, or pooled. To each a 1 x 1 and a 3 x 3 convolution
    are applied, with a layer norm after both.

    Args:
        channels: of the map.
        stride: of the map, px, one of `STRIDES`.
        out_channels: of the four.
    """

    def __init__(self, channels: int, stride: int, out_channels: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(level(channels, stride, target, out_channels) for target in STRIDES)

    def forward(self, maps: OrderedDict[str, Tensor]) -> OrderedDict[str, Tensor]:
        """Of the last map those of four strides, the finest first."""
        last = next(reversed(maps.values()))
        return OrderedDict((str(i), level(last)) for i, level in enumerate(self.levels))


def level(channels: int, stride: int, target: int, out_channels: int) -> nn.Sequential:
    """From a map of one stride to one of another; each doubling of the size halves the channels."""
    layers: list[nn.Module] = []
    while stride > target:
        if layers:
            layers += [LayerNorm2d(channels), nn.GELU()]
        layers.append(nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2))
        stride, channels = stride // 2, channels // 2
    while stride < target:
        layers.append(nn.MaxPool2d(2))
        stride *= 2
    for inputs, kernel in ((channels, 1), (out_channels, 3)):  # a norm follows, so that a bias would do nothing new
        layers += [nn.Conv2d(inputs, out_channels, kernel, padding=kernel // 2, bias=False), LayerNorm2d(out_channels)]
    return nn.Sequential(*layers)


class Pyramid(nn.Module):
    """A timm backbone with a feature pyramid.

    A plain backbone, whose blocks all have one stride, gets `SimplePyramid`; a hierarchical one torchvision's
    ``FeaturePyramidNetwork`` over the last map of each stride. Maps are taken before the backbone's last norm.

    Args:
        start: the backbone.
        out_channels: of each map.
        pool: a fifth map of stride 64.

    Raises:
        UserError: the backbone has no maps of these strides.

    Attributes:
        backbone: timm's, with its own names of the weights, without head and last norm.
        neck: what makes the maps of the backbone's.
        out_channels: of each map, as torchvision's detectors ask.
        mean: of the images that the backbone knows, in the units of `leanmim stats`.
        std: likewise.
    """

    def __init__(self, start: Start, out_channels: int = 256, pool: bool = False) -> None:
        super().__init__()
        whole, self.fixed = at_any_size(start)
        self.out_channels, self.pool, self.mean, self.std = out_channels, pool, start.mean, start.std
        if not hasattr(whole, "forward_intermediates"):
            raise UserError(f"{start.origin}: timm gives no maps of {start.model.model}; choose another backbone")
        strides = [info["reduction"] for info in whole.feature_info]
        plain = len({*strides}) == 1
        if not (plain and strides[0] in STRIDES) and not {*strides} >= {*STRIDES}:
            raise UserError(
                f"{start.origin}: {start.model.model} has maps of stride {', '.join(map(str, sorted({*strides})))}; a pyramid "
                "takes those of 4, 8, 16 and 32 px, or one of these: choose another backbone, or patches of 16 px"
            )
        last = {stride: i for i, stride in enumerate(strides)}
        self.taken = [last[stride] for stride in (strides[:1] if plain else STRIDES)]
        channels = [whole.feature_info[i]["num_chs"] for i in self.taken]
        whole.prune_intermediate_layers(
            self.taken, prune_norm=True
        )  # what comes after them would never have a gradient
        self.backbone = whole
        self.neck: nn.Module = (
            SimplePyramid(channels[0], strides[0], out_channels)
            if plain
            else FeaturePyramidNetwork(channels, out_channels)
        )

    def forward(self, images: Float[Tensor, "b c H W"]) -> OrderedDict[str, Tensor]:
        """Maps of normalised images, called "0" to "3": strides 4, 8, 16, 32.

        Images are padded with zeros, which is the mean, on the right and below, to multiples of 32 px; a map of stride s has
        the height and width of these, divided by s.

        Raises:
            UserError: the backbone takes images of one size only, and these have another.
        """
        height, width = images.shape[2:]
        if self.fixed and (height, width) != self.fixed:
            raise UserError(
                f"the backbone takes images of {self.fixed[0]} x {self.fixed[1]} px only, not {height} x {width}; resize them, or "
                f"give leanmim.pyramid input_size=({height}, {width})"
            )
        images = pad(images, (0, -width % STRIDES[-1], 0, -height % STRIDES[-1]))
        own = self.backbone.forward_intermediates(images, indices=self.taken, intermediates_only=True)
        maps = self.neck(OrderedDict((str(i), x) for i, x in enumerate(own)))
        if self.pool:  # every second place, as torchvision's LastLevelMaxPool has it
            maps["pool"] = max_pool2d(maps["3"], kernel_size=1, stride=2)
        return maps


def at_any_size(start: Start) -> tuple[Backbone, tuple[int, int] | None]:
    """The backbone of a start, with its weights, for images of any size.

    Layers that pre-training left out (``--depth``) are there, initialised afresh, as `leanmim export` writes them.

    Returns:
        The backbone; and height and width, px, if it cannot be had but for one size.
    """
    own = start.model
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(start.pretrained.seed if start.pretrained else 0)
        taken = signature(type(backbone_of(own, device="meta"))).parameters
        flexible = "dynamic_img_size" in taken
        backbone = backbone_of(own, **({"dynamic_img_size": True} if flexible else {}))
    if start.weights is not None:
        left_out = start.pretrained is not None and start.pretrained.depth is not None
        fresh = backbone.state_dict().keys() - start.weights.keys() if left_out else ()
        fit_backbone(backbone, start.weights, start.origin, fresh)
    fixed = not flexible and bool({"img_size", "input_size"} & taken.keys())
    return backbone, own.size if fixed else None
