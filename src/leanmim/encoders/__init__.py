"""How a mask reaches a timm backbone. Only this folder knows about stems, windows and class tokens.

b batch, c channels, H W pixels, n patches, v visible, s tokens read, d width.

The backbone is timm's own module, unmodified, so that exporting it is saving it. A *patch* is one of its output
tokens: 16 px for ViT/16, 32 px for Swin.

| masking | what the backbone sees                          | backbones |
|---------|-------------------------------------------------|-----------|
| drop    | visible tokens only, after positions (MAE)      | plain ViT |
| token   | a learned token in place of masked ones (SimMIM)| ViT, Swin |
| pixel   | a learned colour painted on the image (FastMIM) | any       |

`MASKINGS` holds these three; a further one is a class like `AnyTimmEncoder` and a line in that table.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from jaxtyping import Float, Int
from timm.layers import PatchEmbed
from timm.models import SwinTransformer, VisionTransformer
from torch import Tensor, nn

from leanmim.config import Pretrain
from leanmim.config.base import Segments
from leanmim.decoder import init_linear
from leanmim.encoders.anytimm import AnyTimmEncoder
from leanmim.encoders.backbone import Backbone, backbone_of
from leanmim.encoders.segments import Setting
from leanmim.encoders.swin import SwinEncoder
from leanmim.encoders.vit import ViTEncoder
from leanmim.errors import UserError
from leanmim.masking import Grid, Mask


@runtime_checkable
class Encoder(Protocol):
    """A backbone cut into segments, and the way a mask reaches it."""

    if TYPE_CHECKING:  # a submodule, which isinstance does not find since Python 3.12
        backbone: Backbone
    stride: int
    grid: Grid
    widths: tuple[int, ...]  # one per segment
    depths: tuple[int, ...]  # blocks or stages up to the end of each segment
    prefix_tokens: int  # class and registers
    full_grid: bool  # `read` returns a token for every patch

    def embed(self, images: Float[Tensor, "b c H W"], mask: Mask) -> Tensor:
        """The masked input of the first segment, in the backbone's own layout."""
        ...

    def segment(self, i: int, x: Tensor) -> Tensor:
        """The output of segment ``i``: some of the backbone's blocks or stages."""
        ...

    def narrow(self, i: int, x: Tensor, before: Mask, after: Mask) -> Tensor:
        """The input of segment ``i``, whose mask hides more than that of the segment before (BIM)."""
        ...

    def read(self, i: int, x: Tensor) -> Float[Tensor, "b s d"]:
        """The tokens after segment ``i``, closed by that segment's own norm."""
        ...

    def positions(self, mask: Mask) -> Int[Tensor, "b s"]:
        """Where the tokens of `read` sit on the grid; prefix tokens sit past its end."""
        ...

    def closing_norm(self, i: int) -> nn.Module:
        """The norm at the end of segment ``i``."""
        ...

    def parts(self, i: int) -> list[nn.Module | nn.Parameter]:
        """What segment ``i`` trains: modules as a whole, and parameters that stand alone."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As of any module."""
        ...


Maker = Callable[[Backbone, Setting], Any]  # an encoder's class


def is_plain(backbone: Backbone) -> bool:
    """Whether it is a ViT as `ViTEncoder` runs it: one convolution as stem, and nothing added by a subclass."""
    plain = type(backbone) is VisionTransformer and type(backbone.patch_embed) is PatchEmbed
    return plain and isinstance(backbone.patch_embed.proj, nn.Conv2d)


def dropping(backbone: Backbone) -> Maker | None:
    """Encoders that drop masked tokens."""
    return ViTEncoder if is_plain(backbone) else None


def replacing(backbone: Backbone) -> Maker | None:
    """Encoders that put a token in the place of masked ones."""
    return SwinEncoder if type(backbone) is SwinTransformer else dropping(backbone)


def painting(backbone: Backbone) -> Maker:
    """Encoders that paint masked squares of the image."""
    return dropping(backbone) or AnyTimmEncoder


MASKINGS: dict[str, Callable[[Backbone], Maker | None]] = {"drop": dropping, "token": replacing, "pixel": painting}
"""For each masking, the encoder class for a backbone, or None where it cannot do it. Third parties may add to it."""


def make_encoder(
    backbone: Backbone,
    masking: str,
    input_size: tuple[int, int],
    channels: int = 3,
    segments: Segments = 1,
    depth: int | None = None,
    narrows: tuple[bool, ...] = (),
) -> Encoder:
    """The encoder for a backbone and a masking.

    Args:
        backbone: a timm model for the input size.
        masking: a name in `MASKINGS`.
        input_size: height and width, px.
        channels: of the images.
        segments: how the backbone is cut.
        depth: blocks or stages that are left of the backbone, if some were left out.
        narrows: for each border between segments, whether the mask grows there; empty is nowhere.

    Raises:
        UserError: there is no such masking, the backbone cannot do it, or its patches do not divide the input size.
    """
    if masking not in MASKINGS:
        raise UserError(f"there is no --masking {masking!r}; there are: {', '.join(MASKINGS)}")
    encoder = MASKINGS[masking](backbone)
    if encoder is None:
        able = [name for name, choose in MASKINGS.items() if choose(backbone)]
        raise UserError(
            f"--masking {masking} does not work with {type(backbone).__name__}, whose tokens are tied to the grid; "
            f"it can do: {', '.join(able)} (for example `leanmim pretrain {'simmim' if 'token' in able else 'fastmim'}`)"
        )
    return encoder(backbone, Setting(masking, input_size, channels, segments, depth, narrows))


def encoder_of(config: Pretrain, backbone: Backbone | None = None) -> Encoder:
    """The encoder of a configuration, on a new backbone or on a given one. Errors as for `make_encoder`."""
    if backbone is None:
        backbone = backbone_of(config, config.depth)
    if config.linear_init == "xavier" and not is_plain(backbone):  # a plain ViT has it anyway
        backbone.apply(init_linear)
    ratios = config.segment_ratios
    narrows = tuple(before < after for before, after in pairwise(ratios))
    return make_encoder(backbone, config.masking, config.size, config.channels, config.segments, config.depth, narrows)
