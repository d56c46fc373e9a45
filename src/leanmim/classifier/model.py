"""The classifier: timm's own model with its head, so that exporting it is saving it."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from timm.layers import trunc_normal_
from timm.models import VisionTransformer
from torch import nn

from leanmim.config.base import Model
from leanmim.encoders.backbone import Backbone, backbone_of, full_depth, shallower
from leanmim.errors import UserError
from leanmim.start import Start
from leanmim.weights import fit_backbone


class Made(NamedTuple):
    """A classifier before its first step."""

    model: Backbone
    architecture: Model  # what makes the same one again, without weights
    fresh: list[str]  # parameters that are not from the start


def build_classifier(start: Start) -> nn.Module:
    """The classifier of a fine-tuned run or of an exported one, with its head, in evaluation mode.

    Raises:
        UserError: the start is an encoder without classes.
    """
    if not start.classes:
        raise UserError(f"{start.origin} is an encoder without a head; `leanmim finetune` makes a classifier of it")
    backbone = backbone_of(start.model, num_classes=len(start.classes))
    assert start.weights is not None
    fit_backbone(backbone, start.weights, start.origin)
    return backbone.eval()


def make_classifier(
    start: Start,
    classes: tuple[str, ...],
    pool: str = "auto",
    drop_path: float = 0.0,
    head_init: float = 2e-5,
    seed: int = 0,
) -> Made:
    """A start with a head for these classes.

    A ViT that was pre-trained by masked image modelling, or not at all, takes the mean of the patch tokens and a fresh norm
    (MAE, appendix A.1). Other families and other weights keep what timm's model has. A head that tells the same classes
    apart already is kept.

    Args:
        start: the encoder; a start from nothing is initialised by timm.
        classes: their names.
        pool: ``auto``, ``avg`` or ``token``, of a ViT.
        drop_path: rate of stochastic depth at the last block.
        head_init: standard deviation of the head's weights.
        seed: of all that is fresh.

    Raises:
        UserError: the weights do not fit, the family has another pooling, or the depth is not of a model of timm's.
    """
    check_depth(start)
    arguments = pooling(start, pool)
    architecture = replace(start.model, model_kwargs=start.model.model_kwargs | arguments)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = backbone_of(architecture, num_classes=len(classes), drop_path_rate=drop_path)
        if start.weights is None:
            fresh = [name for name, _ in backbone.named_parameters()]
        else:
            fresh = take_weights(backbone, start, classes)
        for name in heads(backbone):
            layer = backbone.get_submodule(name)
            if isinstance(layer, nn.Linear) and f"{name}.weight" in fresh:
                trunc_normal_(layer.weight, std=head_init)
                nn.init.zeros_(layer.bias)
    return Made(backbone, architecture, fresh)


def check_depth(start: Start) -> None:
    """Raise UserError for the first stages of a run whose family timm does not build shorter."""
    whole = backbone_of(start.model, device="meta")
    if start.pretrained and start.depth and start.depth < full_depth(whole) and not shallower(whole, start.depth):
        raise UserError(
            f"--depth {start.depth}: timm does not build {start.model.model} shorter, so it cannot be a classifier; leave "
            "--depth out to fine-tune the whole model"
        )


def pooling(start: Start, pool: str) -> dict[str, Any]:
    """timm's argument for the pooling of a ViT; empty leaves the model's own.

    Raises:
        UserError: there is no choice for this family.
    """
    backbone = backbone_of(start.model, device="meta")
    if not isinstance(backbone, VisionTransformer):
        if pool == "token":
            raise UserError(f"--pool token: {start.model.model} has no class token; leave --pool out")
        return {}
    if pool == "auto":
        return {"global_pool": "avg"} if start.masked else {}
    if pool == "token" and not backbone.has_class_token:
        raise UserError(f"--pool token: {start.model.model} has no class token; use avg")
    return {"global_pool": pool}


def heads(backbone: Backbone) -> tuple[str, ...]:
    """The names of timm's final layers."""
    names = backbone.pretrained_cfg["classifier"]
    return (names,) if isinstance(names, str) else tuple(names)


def take_weights(backbone: Backbone, start: Start, classes: tuple[str, ...]) -> list[str]:
    """Give a classifier the weights of its start.

    Returns:
        The names of what stays fresh: head, a norm after the pool that the start has not, layers without pre-training.

    Raises:
        UserError: other weights are missing, or have another shape.
    """
    assert start.weights is not None
    own = backbone.state_dict()
    kept = start.classes == classes
    after, before = (
        {norm for norm in ("norm", "fc_norm") if any(key.startswith(f"{norm}.") for key in keys)}
        for keys in (own, start.weights)
    )
    # another norm than the start's, or one that has yet to learn what the mean of the tokens is
    painted = (
        start.pretrained is not None and start.pretrained.masking == "pixel"
    )  # FastMIM: a fresh norm of any backbone
    pooled_otherwise = not after <= before or (start.masked and ("fc_norm" in after or painted))
    dropped = (*(() if kept else heads(backbone)), *(("norm", "fc_norm") if pooled_otherwise else ()))
    prefixes = tuple(f"{name}." for name in dropped)
    weights = (
        {key: value for key, value in start.weights.items() if not key.startswith(prefixes)}
        if prefixes
        else start.weights
    )
    untrained = start.pretrained is not None and start.pretrained.depth is not None  # FastMIM: the last layers left out
    fresh = [key for key in own if key not in weights and (untrained or key.startswith(prefixes))] if prefixes else []
    fit_backbone(backbone, weights, start.origin, fresh)
    return fresh
