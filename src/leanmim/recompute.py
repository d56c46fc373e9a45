"""Activation checkpointing: what is inside a block is not kept for the backward pass but computed again there (arXiv 1604.06174).

Of each block of encoder and decoder only the input is kept. Losses and gradients stay the same, bit for bit on a CPU; a block's
forward pass is run twice.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from leanmim.errors import UserError


def run(blocks: Iterable[nn.Module], x: Tensor, recompute: bool) -> Tensor:
    """The output of blocks one after the other; with ``recompute`` each keeps only its input.

    A block that does so inside itself, as timm's stages do, is left to it.
    """
    for block in blocks:
        inside = getattr(block, "grad_checkpointing", False)
        x = checkpoint(block, x, use_reentrant=False) if recompute and not inside else block(x)
    return x


class Layers(nn.Sequential):
    """Layers one after the other, whose insides may be computed again in the backward pass."""

    recompute = False

    def forward(self, x: Tensor) -> Tensor:
        """The output of the last one."""
        return run(self, x, self.recompute)


def checkpoint_blocks(encoder: Any, decoders: Iterable[Any]) -> None:
    """Compute the blocks of a model again in the backward pass from now on.

    Args:
        encoder: of a `MIM`; timm's own code does it for a backbone as a whole and for stages.
        decoders: of the same.

    Raises:
        UserError: the backbone has batch norms, or timm cannot do it.
    """
    backbone = encoder.backbone
    name, remedy = type(backbone).__name__, "leave --checkpointing out, or choose another --model"
    if any(isinstance(module, nn.modules.batchnorm._NormBase) for module in backbone.modules()):
        raise UserError(
            f"--checkpointing runs blocks twice, and the running statistics of {name}'s batch norms would be updated twice; "
            f"{remedy}"
        )
    try:
        backbone.set_grad_checkpointing(True)
    except (AssertionError, AttributeError) as error:  # as timm's models refuse it, or lack it
        raise UserError(f"timm's {name} has no activation checkpointing ({error}); {remedy}") from error
    for part in (encoder, *(decoder.layers for decoder in decoders)):
        part.recompute = True
