"""Masking in pixel space."""

import torch
from jaxtyping import Float
from torch import Tensor

from leanmim.masking import Grid, Mask, hidden_squares, magnify


def paint(
    images: Float[Tensor, "b c H W"], mask: Mask, grid: Grid, colour: Float[Tensor, " c"]
) -> Float[Tensor, "b c H W"]:
    """The images with a colour over what is masked (FastMIM, section 3.1)."""
    hidden = magnify(hidden_squares(mask, grid), (images.shape[2], images.shape[3]))
    return torch.where(hidden[:, None], colour[:, None, None], images)
