"""Swin with a learned token in masked squares (SimMIM).

b batch, c channels, H W pixels, h w and y x tokens of a stage, d e their widths, n patches.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from leanmim.encoders.backbone import Backbone, check_stride
from leanmim.encoders.segments import Borders, Setting, cuts
from leanmim.errors import UserError
from leanmim.masking import Grid, Mask, hidden_squares, magnify


class SwinEncoder(nn.Module):
    """A timm Swin transformer; masked stem tokens are replaced by a learned token (SimMIM, section 3.1).

    A patch is a token of the last stage, 32 px.

    Args:
        backbone: a timm SwinTransformer, built for the input size.
        setting: how the stages are cut.

    Raises:
        UserError: the patches do not divide the input size, or stages were left out.
    """

    full_grid = True
    prefix_tokens = 0

    def __init__(self, backbone: Backbone, setting: Setting) -> None:
        super().__init__()
        self.backbone = backbone
        self.stride = backbone.feature_info[-1]["reduction"]
        check_stride(setting.input_size, self.stride)
        if setting.depth is not None:
            raise UserError("--depth with Swin needs --masking pixel, for example `leanmim pretrain fastmim`")
        self.depths = cuts(setting.segments, len(backbone.layers), "stages")
        stem = Grid(*backbone.patch_embed.grid_size)
        self.zoom = self.stride // backbone.patch_embed.patch_size[0]  # stem tokens along a patch's side
        self.grid = Grid(stem.height // self.zoom, stem.width // self.zoom)
        inner = [backbone.feature_info[end - 1] for end in self.depths[:-1]]
        widths = tuple(info["num_chs"] for info in inner)
        zooms = tuple(self.stride // info["reduction"] for info in inner)
        self.widths = (*(w * k**2 for w, k in zip(widths, zooms, strict=True)), backbone.num_features)
        self.mask_token = nn.Parameter(torch.zeros(backbone.embed_dim))
        nn.init.normal_(self.mask_token, std=0.02)
        self.borders = Borders(
            self.grid, widths, zooms, setting.narrows, ("channels last",) * len(widths), backbone.norm.eps
        )

    def embed(self, images: Float[Tensor, "b c H W"], mask: Mask) -> Float[Tensor, "b h w d"]:
        """Stem tokens, those under a masked patch replaced."""
        x = self.backbone.patch_embed(images)
        hidden = magnify(hidden_squares(mask, self.grid), (x.shape[1], x.shape[2]))
        return torch.where(hidden[..., None], self.mask_token.to(x.dtype), x)

    def segment(self, i: int, x: Float[Tensor, "b h w d"]) -> Float[Tensor, "b y x e"]:
        """Run the stages of segment ``i``."""
        start = self.depths[i - 1] if i else 0
        return self.backbone.layers[start : self.depths[i]](x)

    def narrow(self, i: int, x: Float[Tensor, "b h w d"], before: Mask, after: Mask) -> Float[Tensor, "b h w d"]:
        """A token at what is newly masked."""
        return self.borders.narrow(i, x, before, after)

    def read(self, i: int, x: Float[Tensor, "b y x e"]) -> Float[Tensor, "b n d"]:
        """The last stage's tokens after the backbone's norm; of an earlier stage those of a patch side by side."""
        if i < len(self.depths) - 1:
            return self.borders.read(i, x.flatten(1, 2))
        return self.backbone.norm(x).flatten(1, 2)

    def positions(self, mask: Mask) -> Int[Tensor, "b n"]:
        """Every patch, row by row."""
        return torch.arange(self.grid.n, device=mask.visible.device).expand(len(mask.visible), -1)

    def closing_norm(self, i: int) -> nn.Module:
        """The backbone's own for the last segment."""
        return self.backbone.norm if i == len(self.depths) - 1 else self.borders.norms[i]

    def parts(self, i: int) -> list[nn.Module | nn.Parameter]:
        """Stages and what its borders train; of the last one also the final norm, of the first one also stem and token."""
        parts = [*self.backbone.layers[self.depths[i - 1] if i else 0 : self.depths[i]], *self.borders.parts(i)]
        if i == len(self.depths) - 1:
            parts.append(self.backbone.norm)
        return parts if i else [*parts, self.backbone.patch_embed, self.mask_token]
