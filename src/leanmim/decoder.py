"""The decoder: places the encoder's tokens on the grid, decodes visible and kept patches, fills in thrown ones.

b batch, n patches, v visible, k kept, t thrown, r predicted, s tokens of the encoder, q prefix tokens (class,
registers), d encoder width, e decoder width, p target width.
"""

import math

import torch
from jaxtyping import Float, Int
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from leanmim.caches import cached
from leanmim.masking import Grid, Split, take
from leanmim.recompute import Layers


@torch.compiler.assume_constant_result  # compiled, they are a constant of the graph
def sincos(grid: Grid, width: int, device: torch.device | None = None) -> Float[Tensor, "n e"]:
    """Fixed 2-D sine-cosine positions (MAE, appendix A.1): half the width for the column, half for the row."""
    return cached_sincos(grid, width, device)


@cached
def cached_sincos(grid: Grid, width: int, device: torch.device | None) -> Float[Tensor, "n e"]:
    """The table of `sincos`, computed once for each grid, width and device."""
    omega = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = torch.meshgrid(torch.arange(grid.height), torch.arange(grid.width), indexing="ij")
    angles = [axis.flatten()[:, None] * omega for axis in (columns, rows)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1).float().to(device)


def init_linear(module: nn.Module) -> None:
    """MAE's initialisation of linear layers: Xavier-uniform weights, zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Filling(nn.Module):
    """Reconstructs the thrown patches from the others (PR-MIM's progressive reconstruction; in detail ours).

    Cross-attention from thrown to known patches, in an eighth of the decoder's width. The queries are mask token plus
    position; the output is added to them. The cost is four narrow linear layers. From the second round on, the queries are
    the results of the round before, which are keys and values as well.

    Args:
        width: e.
        rounds: how often attention is applied, at least 1.
    """

    def __init__(self, width: int, rounds: int) -> None:
        super().__init__()
        thin = max(1, width // 8)
        self.rounds = rounds
        self.heads = math.gcd(thin, max(1, thin // 32))  # of 32 channels, where that divides
        self.query, self.key, self.value = (nn.Linear(width, thin) for _ in range(3))
        self.out = nn.Linear(thin, width)

    def forward(self, tokens: Float[Tensor, "b s e"], empty: Float[Tensor, "b t e"]) -> Float[Tensor, "b t e"]:
        """Reconstruct the thrown tokens.

        Args:
            tokens: visible and decoded patches, and prefix tokens, after the decoder's layers.
            empty: mask token plus position of each thrown patch.
        """
        known, filled = tokens, empty
        for _ in range(self.rounds):
            projected = self.query(filled), self.key(known), self.value(known)
            q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in projected)
            attended = nn.functional.scaled_dot_product_attention(q, k, v)
            filled = empty + self.out(attended.transpose(1, 2).flatten(2))
            known = torch.cat([tokens, filled], dim=1)
        return filled


class Decoder(nn.Module):
    """Reconstructs masked patches from the encoder's tokens.

    ``depth`` transformer layers of ``width``, as in MAE (section 3). Depth 0 is SimMIM's head: one linear layer applied to
    the encoder's output at the masked patches, so the encoder must return the full grid.

    Args:
        encoder_width: d.
        target_width: p.
        prefix_tokens: q, tokens of the encoder without a position on the grid (class, registers); the layers attend to them.
        full_grid: the encoder returns a token for every patch, so the decoder adds neither mask tokens nor positions.
        depth: transformer layers.
        width: e, a multiple of 4 and of ``heads``; not used at depth 0.
        heads: attention heads.
        fill: rounds of `Filling`; with 0, thrown patches are not predicted.
    """

    def __init__(
        self,
        encoder_width: int,
        target_width: int,
        *,
        prefix_tokens: int,
        full_grid: bool,
        depth: int,
        width: int,
        heads: int,
        fill: int = 0,
    ) -> None:
        super().__init__()
        width = width if depth else encoder_width
        self.prefix_tokens = prefix_tokens
        self.embed = nn.Linear(encoder_width, width) if depth else nn.Identity()
        self.mask_token = None if full_grid else nn.Parameter(torch.zeros(1, 1, width))
        self.layers = Layers(*(Block(width, heads, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6) if depth else nn.Identity()
        self.filling = Filling(width, fill) if fill else None
        self.head = nn.Linear(width, target_width)
        self.apply(init_linear)
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self, tokens: Float[Tensor, "b s d"], ids: Int[Tensor, "b s"], split: Split, grid: Grid
    ) -> tuple[Int[Tensor, "b r"], Float[Tensor, "b r p"]]:
        """Predict the targets of the kept patches, and of the thrown ones if they are filled in.

        Args:
            tokens: the encoder's output.
            ids: index of each token on the grid, row by row; prefix tokens have n, n + 1, ...
            split: which patches are visible, kept, thrown.
            grid: the patch grid.

        Returns:
            The grid indices of the predicted patches, and the predictions.
        """
        x = self.embed(tokens)
        b, _, e = x.shape
        places = grid.n + self.prefix_tokens
        if self.mask_token is None:
            canvas = x.new_zeros(b, places, e)
        else:
            canvas = self.mask_token.to(x.dtype).expand(b, places, e)
        canvas = canvas.scatter(1, ids[..., None].expand_as(x), x)
        if self.mask_token is not None:
            canvas = canvas + nn.functional.pad(sincos(grid, e, x.device), (0, 0, 0, self.prefix_tokens)).to(x.dtype)

        prefix = torch.arange(grid.n, places, device=x.device).expand(b, -1)
        seen = torch.cat([split.visible, split.kept], dim=1)
        v, r = split.visible.shape[1], seen.shape[1]
        x = self.layers(take(canvas, torch.cat([seen, prefix], dim=1)))
        prediction = self.head(self.norm(x[:, v:r]))
        if self.filling is None:
            return split.kept, prediction
        filled = self.filling(x, take(canvas, split.thrown))
        ids, filled = torch.cat([split.kept, split.thrown], dim=1), self.head(self.norm(filled))
        return ids, torch.cat([prediction, filled], dim=1)
