"""Other ways to fill in the thrown patches, which the ablation bench compares with the library's own."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import leanmim.decoder
import leanmim.mim
from leanmim.masking import Grid, take


class Near(nn.Module):
    """From the neighbours: each round fills those with a known one among their eight neighbours, by a depthwise 3 x 3
    convolution over the known ones, weighted by how many there are; then they count as known.
    """

    def __init__(self, width: int, rounds: int) -> None:
        super().__init__()
        self.rounds = rounds
        self.squeeze = nn.Linear(width, width // 4)
        self.gather = nn.Conv2d(width // 4, width // 4, 3, padding=1, groups=width // 4, bias=False)
        self.expand = nn.Linear(width // 4, width)
        nn.init.ones_(self.gather.weight)  # at first the mean of the known neighbours

    def forward(self, tokens: Tensor, ids: Tensor, empty: Tensor, thrown: Tensor, grid: Grid) -> Tensor:
        """Thrown tokens, b t e, from known tokens, b s e, at ``ids``."""
        small = self.squeeze(tokens)[:, : ids.shape[1]]
        b, _, c = small.shape
        x = small.new_zeros(b, grid.n, c).scatter(1, ids[..., None].expand_as(small), small)
        x = x.view(b, *grid, c).permute(0, 3, 1, 2)
        filled = small.new_zeros(b, grid.n).scatter(1, ids, 1.0).view(b, 1, *grid)
        for _ in range(self.rounds):
            neighbours = 9 * nn.functional.avg_pool2d(filled, 3, stride=1, padding=1)
            new = (1 - filled) * (neighbours > 0)
            x = x + self.gather(x) * (new / neighbours.clamp(min=1))
            filled = filled + new
        x = x.permute(0, 2, 3, 1).reshape(b, grid.n, c)
        return empty + self.expand(take(x, thrown))


class Decoder(leanmim.decoder.Decoder):
    """Tells the filling where the patches sit; ``early`` fills in from what goes into the last layer."""

    early = False

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)
        assert self.filling is not None
        if self.early:
            self.layers[-1].register_forward_pre_hook(lambda _, inputs: setattr(self, "before", inputs[0]))
        self.filling.register_forward_pre_hook(self.with_places)

    def forward(self, tokens: Tensor, ids: Tensor, split: object, grid: Grid) -> tuple[Tensor, Tensor]:
        """As the library's."""
        self.places = torch.cat([split.visible, split.kept], dim=1), split.thrown, grid
        return super().forward(tokens, ids, split, grid)

    def with_places(self, _: nn.Module, inputs: tuple[Tensor, Tensor]) -> tuple:
        """The arguments of the filling."""
        tokens, empty = inputs
        ids, thrown, grid = self.places
        return self.before if self.early else tokens, ids, empty, thrown, grid


class Early(Decoder):
    """From what goes into the last layer."""

    early = True


class Light(Near):
    """The filled patches' loss counts a quarter for everything that comes before the shared norm and head."""

    def forward(self, *arguments: object) -> Tensor:
        """As Near."""
        filled = super().forward(*arguments)
        return 0.25 * filled + 0.75 * filled.detach()


class Attending(Near):
    """Attention instead of neighbours: a thrown patch, by its position, asks all known ones, in a quarter of the width,
    with keys of their own.
    """

    def __init__(self, width: int, rounds: int) -> None:
        super().__init__(width, rounds)
        del self.gather
        self.key = nn.Linear(width, width // 4)
        self.query = nn.Linear(width, width // 4)

    def forward(self, tokens: Tensor, ids: Tensor, empty: Tensor, thrown: Tensor, grid: Grid) -> Tensor:
        """As Near."""
        known = tokens[:, : ids.shape[1]]
        mixed = nn.functional.scaled_dot_product_attention(self.query(empty), self.key(known), self.squeeze(known))
        return empty + self.expand(mixed)


class Both(Attending):
    """Neighbours, then attention, added."""

    def __init__(self, width: int, rounds: int) -> None:
        super().__init__(width, rounds)
        self.near = Near(width, rounds)

    def forward(self, tokens: Tensor, ids: Tensor, empty: Tensor, thrown: Tensor, grid: Grid) -> Tensor:
        """As Near."""
        return super().forward(tokens, ids, self.near(tokens, ids, empty, thrown, grid), thrown, grid)


def own_norm(width: int, rounds: int) -> Near:
    """The tokens are normalised before they are gathered."""
    filling = Near(width, rounds)
    filling.norm = nn.LayerNorm(width, eps=1e-6)
    filling.squeeze.register_forward_pre_hook(lambda _, inputs: filling.norm(inputs[0]))
    return filling


class Shared(nn.Module):
    """Attention whose keys are the values; further rounds do not leave the thin width."""

    thinner = 8

    def __init__(self, width: int, rounds: int) -> None:
        super().__init__()
        self.rounds = rounds
        self.ask = nn.Linear(width, width // self.thinner)
        self.squeeze = nn.Linear(width, width // self.thinner)
        self.expand = nn.Linear(width // self.thinner, width)

    def forward(self, tokens: Tensor, empty: Tensor) -> Tensor:
        """Thrown tokens, b t e, from known tokens, b s e."""
        question, known = self.ask(empty), self.squeeze(tokens)
        filled = nn.functional.scaled_dot_product_attention(question, known, known)
        for _ in range(self.rounds - 1):
            everything = torch.cat([known, filled], dim=1)
            filled = nn.functional.scaled_dot_product_attention(question + filled, everything, everything)
        return empty + self.expand(filled)


class SharedQuarter(Shared):
    """The same in a quarter of the width."""

    thinner = 4


class Wide(leanmim.decoder.Filling):
    """The library's own with values of a quarter of the width, queries and keys of a sixteenth."""

    def __init__(self, width: int, rounds: int) -> None:
        super().__init__(width, rounds)
        self.query, self.key = (nn.Linear(width, width // 16) for _ in range(2))
        self.value, self.out = nn.Linear(width, width // 4), nn.Linear(width // 4, width)


FILLINGS: dict[str, tuple[Callable, type]] = {
    "wide": (Wide, leanmim.decoder.Decoder),
    "shared": (Shared, leanmim.decoder.Decoder),
    "shared-quarter": (SharedQuarter, leanmim.decoder.Decoder),
    "near": (Near, Decoder),
    "near-light": (Light, Decoder),
    "near-early": (Near, Early),
    "near-norm": (own_norm, Decoder),
    "near-attend": (Both, Decoder),
    "quarter": (Attending, Decoder),
}


def install(name: str) -> None:
    """Let this process build its decoders so."""
    leanmim.decoder.Filling, leanmim.mim.Decoder = FILLINGS[name]
