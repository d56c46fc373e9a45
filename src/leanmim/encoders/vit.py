"""Plain ViT, and the three ways in which a mask can reach it.

b batch, c channels, H W pixels, n patches, s tokens read, z tokens of the next segment, d width.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from leanmim.decoder import init_linear, sincos
from leanmim.encoders.backbone import Backbone, check_stride
from leanmim.encoders.paint import paint
from leanmim.encoders.segments import BorderTokens, Setting, cuts, fresh_norm, newly_hidden
from leanmim.errors import UserError
from leanmim.masking import Grid, Mask, hidden_squares, take
from leanmim.recompute import run


class ViTEncoder(nn.Module):
    """A plain timm ViT.

    Positions are fixed: 2-D sine-cosine (MAE, appendix A.1), or those of the checkpoint it starts from.

    Args:
        backbone: a timm VisionTransformer, built for the input size.
        setting: masking (``drop`` MAE, ``token`` SimMIM, ``pixel`` FastMIM), and how the blocks are cut.

    Raises:
        UserError: patches are not square, or do not divide the input size; or the width is no multiple of 4.
    """

    recompute = False

    def __init__(self, backbone: Backbone, setting: Setting) -> None:
        super().__init__()
        self.backbone = backbone
        self.prefix_tokens: int = backbone.num_prefix_tokens
        self.grid = Grid(*backbone.patch_embed.grid_size)
        self.stride = backbone.patch_embed.patch_size[0]
        check_stride(setting.input_size, self.stride)
        if self.stride != backbone.patch_embed.patch_size[1]:
            raise UserError(f"patches must be square, not {backbone.patch_embed.patch_size}; choose another patch_size")
        if backbone.embed_dim % 4:
            raise UserError(
                f"--model-kwargs embed_dim {backbone.embed_dim} must be a multiple of 4: positions are sines and cosines"
            )
        self.depths = cuts(setting.segments, len(backbone.blocks))
        self.widths = (backbone.embed_dim,) * len(self.depths)
        self.full_grid = setting.masking != "drop"
        self.mask_token = nn.Parameter(torch.zeros(1, 1, backbone.embed_dim)) if setting.masking == "token" else None
        channels = backbone.patch_embed.proj.in_channels
        self.colour = (
            nn.Parameter(torch.empty(channels).normal_(std=0.02)) if setting.masking == "pixel" else None
        )  # as published
        self.norms = nn.ModuleList(fresh_norm(self.final_norm, backbone.embed_dim) for _ in self.depths[1:])
        # without the dropped tokens there is nothing to put a token in the place of
        self.tokens = BorderTokens(self.widths[1:], setting.narrows if self.full_grid else ())

        self.apply(init_linear)
        stem = backbone.patch_embed.proj
        nn.init.xavier_uniform_(stem.weight.view(len(stem.weight), -1))  # the stem is a linear layer on patches
        for token in (self.mask_token, backbone.cls_token, backbone.reg_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)
        if backbone.pos_embed is not None:
            positions = sincos(self.grid, backbone.embed_dim)
            without = backbone.pos_embed.shape[1] - self.grid.n  # prefix tokens have no position
            backbone.pos_embed.data.copy_(nn.functional.pad(positions, (0, 0, without, 0)))
            backbone.pos_embed.requires_grad_(False)
        if backbone.attn_pool is not None:
            backbone.attn_pool.requires_grad_(False)  # pooling is downstream of what is trained here

    def has_sincos(self) -> bool:
        """Whether positions are the sine-cosine ones, computed and not taken from a checkpoint."""
        if self.backbone.pos_embed is None:
            return False
        own = self.backbone.pos_embed[0, -self.grid.n :]
        return torch.equal(own, sincos(self.grid, own.shape[1]).to(own.device))

    @property
    def final_norm(self) -> nn.Module:
        """The backbone's own last norm; under average pooling timm keeps it after the pool, as ``fc_norm``."""
        norm = self.backbone.norm
        return self.backbone.fc_norm if isinstance(norm, nn.Identity) else norm

    def embed(self, images: Float[Tensor, "b c H W"], mask: Mask) -> Float[Tensor, "b s d"]:
        """Patches and positions; masked ones dropped or replaced; class and register tokens in front."""
        vit = self.backbone
        if self.colour is not None:
            images = paint(images, mask, self.grid, self.colour)
        x = self.patches(images) if self.full_grid else self.visible_patches(images, mask.visible)
        if self.mask_token is not None:
            hidden = hidden_squares(mask, self.grid).flatten(1)
            x = torch.where(hidden[..., None], self.mask_token.to(x.dtype), x)
        positions = x.new_zeros(1, self.grid.n, 1) if vit.pos_embed is None else vit.pos_embed
        split = positions.shape[1] - self.grid.n
        places = positions[:, split:]
        x = x + (places if self.full_grid else take(places.expand(len(x), -1, -1), mask.visible))
        tokens: list[Tensor] = [token for token in (vit.cls_token, vit.reg_token) if token is not None]
        if tokens:
            prefix = torch.cat(tokens, dim=1)
            prefix = prefix + positions[:, :split] if split else prefix
            x = torch.cat([prefix.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        return vit.norm_pre(vit.pos_drop(x))

    def patches(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b n d"]:
        """The embedding of every patch."""
        x = self.backbone.patch_embed(images)
        return x.flatten(1, -2)  # models with a dynamic image size keep the grid's two axes

    def visible_patches(self, images: Float[Tensor, "b c H W"], ids: Int[Tensor, "b v"]) -> Float[Tensor, "b v d"]:
        """The embedding of the patches ``ids`` alone: their pixels are gathered first, and the stem's convolution is a linear
        layer on them (ours; the same but for rounding).
        """
        (b, c), (height, width), side = images.shape[:2], self.grid, self.stride
        squares = images.view(b, c, height, side, width, side).permute(0, 2, 4, 1, 3, 5)
        each = torch.arange(b, device=ids.device)[:, None]
        pixels = squares[each, ids // width, ids % width].flatten(2)
        stem = self.backbone.patch_embed
        return stem.norm(nn.functional.linear(pixels, stem.proj.weight.flatten(1), stem.proj.bias))

    def segment(self, i: int, x: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
        """Run the blocks of segment ``i``."""
        start = self.depths[i - 1] if i else 0
        return run(self.backbone.blocks[start : self.depths[i]], x, self.recompute)

    def narrow(self, i: int, x: Float[Tensor, "b s d"], before: Mask, after: Mask) -> Float[Tensor, "b z d"]:
        """The first visible ones (nested masks keep their order), or a token in place of those newly masked."""
        if not self.full_grid:
            return x[:, : self.prefix_tokens + after.visible.shape[1]]
        for token in self.tokens.before(i):
            new = newly_hidden(before, after, self.grid, self.grid).flatten(1)
            new = nn.functional.pad(new, (self.prefix_tokens, 0))
            x = torch.where(new[..., None], token.to(x.dtype), x)
        return x

    def read(self, i: int, x: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
        """Close segment ``i`` with its norm."""
        return self.closing_norm(i)(x)

    def closing_norm(self, i: int) -> nn.Module:
        """The backbone's own for the last segment."""
        return self.final_norm if i == len(self.norms) else self.norms[i]

    def positions(self, mask: Mask) -> Int[Tensor, "b s"]:
        """Prefix tokens first, then the visible patches, or all of them."""
        b, device = len(mask.visible), mask.visible.device
        prefix = torch.arange(self.grid.n, self.grid.n + self.prefix_tokens, device=device).expand(b, -1)
        patches = torch.arange(self.grid.n, device=device).expand(b, -1) if self.full_grid else mask.visible
        return torch.cat([prefix, patches], dim=1)

    def parts(self, i: int) -> list[nn.Module | nn.Parameter]:
        """Blocks, closing norm, the token that the segment begins with; of the first one also what makes the tokens."""
        vit = self.backbone
        blocks = vit.blocks[self.depths[i - 1] if i else 0 : self.depths[i]]
        parts = [*blocks, self.closing_norm(i), *self.tokens.before(i)]
        if i:
            return parts
        stem = (
            vit.patch_embed,
            vit.cls_token,
            vit.reg_token,
            vit.pos_embed,
            vit.norm_pre,
            self.mask_token,
            self.colour,
        )
        return parts + [part for part in stem if part is not None]
