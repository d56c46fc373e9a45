"""How a backbone is cut into segments, and what lies between them (BIM).

b batch, n patches, N tokens at a border, c channels there, d width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from leanmim.config.base import Segments, uncut
from leanmim.errors import UserError
from leanmim.masking import Grid, Mask, cover, hidden_squares


class Setting(NamedTuple):
    """What an encoder needs to know beside its backbone: see `make_encoder`."""

    masking: str
    input_size: tuple[int, int]  # height, width, px
    channels: int = 3
    segments: Segments = 1
    depth: int | None = None  # blocks or stages that are left, if some were left out
    narrows: tuple[bool, ...] = ()  # for each border, whether the mask grows there


def cuts(segments: Segments, count: int, what: str = "blocks", before: int = 0) -> tuple[int, ...]:
    """The depth at which each segment ends; ``before`` stages come first and are not cut.

    Args:
        segments: so many equal ones, or the depths themselves.
        count: blocks or stages that can be cut.
        what: how they are called.
        before: stages that belong to the first segment whatever the cut.

    Raises:
        UserError: the blocks do not divide, or the numbers do not rise to the last block.
    """
    if uncut(segments):
        return (before + count,)
    if isinstance(segments, int):
        if not 0 < segments <= count or count % segments:
            good = [s for s in range(1, count + 1) if count % s == 0]
            raise UserError(
                f"--segments: {count} {what} do not divide into {segments} equal segments; possible: {good}"
            )
        return tuple(range(before + count // segments, before + count + 1, count // segments))
    rising = all(low < high for low, high in zip((before, *segments), segments, strict=False))
    if not segments or not rising or segments[-1] != before + count:
        numbers = f", {before + 1} to {before + count}" if before else ""
        raise UserError(
            f"--segments {' '.join(map(str, segments))} does not cut the model's {count} {what}{numbers}: give rising "
            f"numbers of which the last is {before + count}, or one number of equal segments"
        )
    return segments


def fresh_norm(norm: nn.Module, width: int) -> nn.Module:
    """A new norm of the same kind. It closes a segment, and takes the place of the last norm in the export."""
    if isinstance(norm, nn.Identity):
        return nn.Identity()  # the model has none
    return type(norm)(width, eps=norm.eps) if hasattr(norm, "eps") else nn.LayerNorm(width, eps=1e-6)


class BorderTokens(nn.ParameterDict):
    """For each border where the mask grows, the token that hides what is newly masked.

    Args:
        widths: of the features at each border.
        narrows: for each border, whether the mask grows there; empty is nowhere.
    """

    def __init__(self, widths: tuple[int, ...] = (), narrows: tuple[bool, ...] = ()) -> None:
        growing = [str(i) for i, grows in enumerate(narrows) if grows]
        super().__init__({i: nn.Parameter(torch.empty(widths[int(i)]).normal_(std=0.02)) for i in growing})

    def before(self, i: int) -> list[nn.Parameter]:
        """The token at the beginning of segment ``i``, if there is one."""
        return [self[str(i - 1)]] if str(i - 1) in self else []


class Borders(nn.Module):
    """What lies between the segments of a hierarchical backbone: the norm that closes each segment but the last, and a
    token to hide what is newly masked, where the mask of the next segment hides more.

    Args:
        grid: of the backbone's output.
        widths: channels at the end of each segment but the last.
        zooms: tokens there along the side of an output patch.
        narrows: for each border, whether the mask grows there; empty is nowhere.
        layouts: of the features at each border: tokens (b N c), channels last (b y x c) or first (b c y x).
        eps: of the norms.
    """

    def __init__(
        self,
        grid: Grid,
        widths: tuple[int, ...],
        zooms: tuple[int, ...],
        narrows: tuple[bool, ...] = (),
        layouts: tuple[str, ...] = (),
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.grid, self.zooms = grid, zooms
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=eps) for width in widths)
        self.tokens = BorderTokens(widths, narrows)
        self.shaped = [LAYOUTS[layout] for layout in layouts]

    def read(self, i: int, tokens: Float[Tensor, "b N c"]) -> Float[Tensor, "b n d"]:
        """The tokens of segment ``i``, normalised, those of each patch side by side."""
        k = self.zooms[i]
        x = self.norms[i](tokens).unflatten(1, (self.grid.height, k, self.grid.width, k))
        return x.transpose(2, 3).flatten(3, 5).flatten(1, 2)

    def narrow(self, i: int, x: Tensor, before: Mask, after: Mask) -> Tensor:
        """The input of segment ``i``, with a token at what is newly masked."""
        for token in self.tokens.before(i):
            zoom = self.zooms[i - 1]
            new = newly_hidden(before, after, self.grid, (self.grid.height * zoom, self.grid.width * zoom))
            x = torch.where(*self.shaped[i - 1](new, token.to(x.dtype)), x)
        return x

    def parts(self, i: int) -> list[nn.Module | nn.Parameter]:
        """What segment ``i`` trains here: the norm that closes it, the token that it begins with."""
        return [*self.norms[i : i + 1], *self.tokens.before(i)]


# What is hidden (b y x) and the token (c), shaped to go with the features
LAYOUTS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "tokens": lambda hidden, token: (hidden.flatten(1)[..., None], token),
    "channels last": lambda hidden, token: (hidden[..., None], token),
    "channels first": lambda hidden, token: (hidden[:, None], token[:, None, None]),
}


def newly_hidden(before: Mask, after: Mask, grid: Grid, size: tuple[int, int]) -> Bool[Tensor, "b y x"]:
    """What the mask ``after`` hides as a whole and the mask ``before`` did not, on a grid of ``size``."""
    return cover(hidden_squares(after, grid), size) & ~cover(hidden_squares(before, grid), size)
