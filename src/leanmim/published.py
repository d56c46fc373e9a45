"""Published weights, by the names that timm has for them."""

import difflib
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import nn

from leanmim.errors import UserError


def published(name: str, channels: int) -> tuple[dict[str, torch.Tensor], str]:
    """Published weights, from timm's cache or the network.

    Args:
        name: of timm, with a tag (``vit_tiny_patch16_224.augreg_in21k_ft_in1k``) or without; or ``hf-hub:OWNER/NAME``,
            ``local-dir:FOLDER``.
        channels: of the images; timm sums or repeats the weights of the first layer for another number than theirs.

    Returns:
        The weights, at their own input size, and their full name.

    Raises:
        UserError: timm knows no such weights, or cannot load them.
    """
    backbone, name = published_model(name, channels)
    return backbone.state_dict(), name


def published_model(name: str, channels: int, option: str = "--init ") -> tuple[nn.Module, str]:
    """timm's model without head, with published weights; and their full name. As `published`.

    Args:
        name: of the weights.
        channels: of the images.
        option: that gave the name, for messages.
    """
    where = name.partition(":")[2]
    if not name.startswith(("hf-hub:", "local-dir:")):
        if not timm.is_model_pretrained(name):
            tags = timm.list_pretrained(f"{name.partition('.')[0]}.*")  # of the same architecture
            near = tags or difflib.get_close_matches(name, timm.list_pretrained(), n=3)
            nearest = f"; nearest: {', '.join(near)}" if near else ""
            raise UserError(
                f"{option}{name!r}: there is no such file or run folder, and timm has no weights of this name{nearest}"
            )
        own: Any = get_pretrained_cfg(name)
        where, name = own.hf_hub_id or own.url, f"{own.architecture}.{own.tag}"
    try:
        with torch.random.fork_rng(devices=[]):
            backbone = timm.create_model(name, pretrained=True, num_classes=0, in_chans=channels)
    except Exception as error:  # of the network, of the hub, of a damaged file
        raise UserError(
            f"{option}{name!r}: timm cannot load these weights ({type(error).__name__}: {error}). Without a network, get "
            f"the file of {where} by other means and give its path: {option}model.safetensors"
        ) from error
    return backbone, name
