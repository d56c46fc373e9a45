"""Other ways to fill in the thrown patches, which the ablation bench compares with the library's own."""

from collections.abc import Callable

from torch import Tensor, nn

import leanmim.decoder
import leanmim.mim
from leanmim.decoder import Filling


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """The same values; ``factor`` of the gradient."""
    return factor * x + (1 - factor) * x.detach()


class Light(Filling):
    """The filled patches' loss counts a quarter for everything that comes before the shared norm and head."""

    def forward(self, *arguments: object) -> Tensor:
        """As Filling."""
        return scale_gradient(super().forward(*arguments), 0.25)


class Attending(Filling):
    """Attention instead of neighbours: a thrown patch, by its position, asks all known ones, in a quarter of the width."""

    def __init__(self, width: int, rounds: int) -> None:
        super().__init__(width, rounds)
        del self.gather
        self.key = nn.Linear(width, width // 4)
        self.query = nn.Linear(width, width // 4)

    def forward(self, tokens: Tensor, ids: Tensor, empty: Tensor, thrown: Tensor, grid: object) -> Tensor:
        """As Filling."""
        known = tokens[:, : ids.shape[1]]
        mixed = nn.functional.scaled_dot_product_attention(self.query(empty), self.key(known), self.squeeze(known))
        return empty + self.expand(mixed)


class Both(Attending):
    """Neighbours, then attention, added."""

    def __init__(self, width: int, rounds: int) -> None:
        super().__init__(width, rounds)
        self.near = Filling(width, rounds)

    def forward(self, tokens: Tensor, ids: Tensor, empty: Tensor, thrown: Tensor, grid: object) -> Tensor:
        """As Filling."""
        return super().forward(tokens, ids, self.near(tokens, ids, empty, thrown, grid), thrown, grid)


class Decoder(leanmim.decoder.Decoder):
    """Fills in from what goes into the last layer, not from what comes out of it."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)
        assert self.filling is not None
        self.layers[-1].register_forward_pre_hook(lambda _, inputs: setattr(self, "before", inputs[0]))
        self.filling.register_forward_pre_hook(lambda _, inputs: (self.before, *inputs[1:]))


def own_norm(width: int, rounds: int) -> Filling:
    """The tokens are normalised before they are gathered."""
    filling = Filling(width, rounds)
    filling.norm = nn.LayerNorm(width, eps=1e-6)
    filling.register_forward_pre_hook(lambda _, inputs: (filling.norm(inputs[0]), *inputs[1:]))
    return filling


FILLINGS: dict[str, dict[str, Callable]] = {
    "light": {"Filling": Light},
    "attend": {"Filling": Attending},
    "both": {"Filling": Both},
    "norm": {"Filling": own_norm},
    "early": {"Decoder": Decoder},
}


def install(name: str) -> None:
    """Let this process build its decoders so."""
    for part, replacement in FILLINGS[name].items():
        setattr(leanmim.decoder, part, replacement)
    leanmim.mim.Decoder = leanmim.decoder.Decoder
