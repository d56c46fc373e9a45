"""timm's models: made for a size, cut after some blocks or stages, their features as tokens."""

import difflib
from typing import Any

import timm
from jaxtyping import Float
from timm.models import SwinTransformer, SwinTransformerV2, VisionTransformer
from torch import Tensor, nn

from leanmim.config.base import Model, check_model
from leanmim.errors import UserError
from leanmim.names import sides

SWIN = (SwinTransformer, SwinTransformerV2)
Backbone = Any  # a timm model: an nn.Module whose attributes differ from family to family


OPTIONAL = ("img_size", "drop_path_rate")  # arguments that not every timm model takes


def backbone_arguments(config: Model) -> dict[str, Any]:
    """What `backbone_of` gives to timm.create_model, as far as the model takes it."""
    check_model(config.model, config.model_kwargs)
    return _create(config.model, config.size, config.channels, config.model_kwargs | {"device": "meta"})[1]


def backbone_of(config: Model, keep: int | None = None, /, **arguments: Any) -> Backbone:
    """The backbone of a configuration; ``arguments`` go before its own. Errors as for `create_backbone` and `check_model`."""
    check_model(config.model, config.model_kwargs)
    return create_backbone(config.model, config.size, config.channels, keep, **{**config.model_kwargs, **arguments})


def _arguments(name: str, input_size: tuple[int, int], channels: int, /, **kwargs: Any) -> dict[str, Any]:
    """Arguments that a model may take or not."""
    arguments: dict[str, Any] = dict(num_classes=0, in_chans=channels, img_size=input_size, drop_path_rate=0.0)
    if name.startswith("swin_") and not name.startswith("swin_s3"):  # whose windows differ from stage to stage
        patch = kwargs.get("patch_size", 4)
        arguments["window_size"] = tuple(max(1, size // patch // 8) for size in input_size)
    return {**arguments, **kwargs}


def create_backbone(
    name: str, input_size: tuple[int, int], channels: int, keep: int | None = None, /, **kwargs: Any
) -> Backbone:
    """A timm model without its head, built for ``input_size`` (height, width in px).

    ``keep`` leaves only so many blocks of a ViT, or stages of a hierarchical model.

    Swin's window is 1/8 of its stem's grid (7 at 224 px, 6 at 192, 4 at 128) as in SimMIM and FastMIM, so that
    windows tile every size.

    Raises:
        UserError: timm does not know the model, refuses the size or an argument, or the name has a tag; or a ViT's patches do not
            divide the size.
    """
    check_name(name)
    backbone, _ = _create(name, input_size, channels, kwargs)
    if isinstance(backbone, VisionTransformer):  # the others pad, or refuse themselves
        check_stride(input_size, backbone.patch_embed.patch_size[0])
    if keep is None:
        return backbone
    most = full_depth(backbone)
    if not 0 < keep <= most:
        what = "blocks" if isinstance(backbone, VisionTransformer) else "stages"
        raise UserError(f"--depth {keep} is out of range; {name} has {most} {what}")
    if keep < most:
        if not hasattr(backbone, "prune_intermediate_layers"):
            raise UserError(f"timm's {name} cannot be cut at --depth {keep}; leave --depth out")
        whole = isinstance(backbone, VisionTransformer)  # a ViT keeps its norm and its pooling
        backbone.prune_intermediate_layers([keep - 1], prune_norm=not whole, prune_head=not whole)
    return backbone


def check_stride(input_size: tuple[int, int], stride: int) -> None:
    """Raise UserError where patches of ``stride`` px do not divide the input size."""
    fitting = [max(1, side // stride) * stride for side in input_size]
    if fitting != list(input_size):
        raise UserError(
            f"--input-size {sides(input_size, ' ')} is not divided by the model's patch of {stride} px; try {sides(fitting, ' ')}"
        )


def check_name(name: str) -> None:
    """Raise UserError if timm does not know the model, or the name has a tag."""
    architecture, _, tag = name.partition(".")
    if tag and timm.is_model(architecture):
        raise UserError(
            f"--model {name!r} names published weights, which are not loaded; give --model {architecture}, and to "
            f"`leanmim pretrain` --init {name} to start from them"
        )
    if not timm.is_model(name):
        near = ", ".join(nearest_models(name)) or "none"
        raise UserError(f"timm has no model {name!r}; nearest: {near} (timm.list_models() has all)")


def nearest_models(name: str) -> list[str]:
    """timm's models of similar names, five at most: first the shortest that begin so."""
    plain = name.rpartition("/")[2].partition(".")[0].lower().replace("-", "_")
    models = timm.list_models()
    longer = sorted((model for model in models if model.startswith(plain)), key=len)
    near = difflib.get_close_matches(plain, models, n=5, cutoff=0.4)
    return list(dict.fromkeys([*longer[:3], *near]))[:5]


def full_depth(backbone: Backbone) -> int:
    """Blocks of a ViT, stages of a hierarchical model."""
    return len(backbone.blocks if isinstance(backbone, VisionTransformer) else backbone.feature_info)


def _create(
    name: str, input_size: tuple[int, int], channels: int, kwargs: dict[str, Any], without: tuple[str, ...] = ()
) -> tuple[Backbone, dict[str, Any]]:
    """The model and the arguments that it took, which are all but those that are named in ``without``."""
    try:
        arguments = _arguments(name, input_size, channels, **kwargs)
        arguments = {key: value for key, value in arguments.items() if key not in without}
        return timm.create_model(name, **arguments), arguments
    except Exception as error:  # timm's models check little: a wrong argument may end in any kind
        for key in OPTIONAL:
            if isinstance(error, TypeError) and f"'{key}'" in str(error) and key not in without:
                return _create(name, input_size, channels, kwargs, (*without, key))
        height, width = input_size
        given = " ".join(f"{key} {value}" for key, value in kwargs.items() if key != "device")
        wanted = f"--model-kwargs {given}" if given else f"--input-size {height} {width}, --channels {channels}"
        raise UserError(f"timm cannot build {name} with {wanted}: {error or type(error).__name__}") from error


def shallower(backbone: Backbone, depth: int) -> dict[str, Any]:
    """timm's arguments for the same model with only the first ``depth`` blocks (ViT) or stages (Swin); empty where timm
    has none.
    """
    if isinstance(backbone, VisionTransformer):
        return {"depth": depth}
    if isinstance(backbone, SWIN):
        stages: list[Any] = [stage.blocks for stage in backbone.layers[:depth]]
        return {"depths": [len(s) for s in stages], "num_heads": [s[0].attn.num_heads for s in stages]}
    return {}


def as_tokens(backbone: Backbone, features: Tensor) -> Float[Tensor, "b n d"]:
    """The features of a timm model as one token for each patch, row by row: from tokens, channels first or last."""
    if hasattr(backbone, "reroll"):  # Hiera's tokens lie in the order of its mask units until the last stage
        return backbone.reroll(features, len(backbone.blocks) - 1).flatten(1, 2)
    if features.ndim == 3:
        return features[:, getattr(backbone, "num_prefix_tokens", None) or 0 :]
    if getattr(backbone, "output_fmt", "NCHW") == "NHWC":
        return features.flatten(1, 2)
    return features.flatten(2).transpose(1, 2)


class Truncated(nn.Module):
    """The first stages of a hierarchical backbone, closed by a norm. For families that timm cannot build shallower.

    Args:
        backbone: a timm model cut after a stage.
        norm: of its channels.
    """

    def __init__(self, backbone: Backbone, norm: nn.Module) -> None:
        super().__init__()
        self.backbone, self.norm = backbone, norm

    def forward_features(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b n d"]:
        """Normalised tokens, row by row."""
        return self.norm(as_tokens(self.backbone, self.backbone.forward_features(images)))

    def forward(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b d"]:
        """Their mean."""
        return self.forward_features(images).mean(1)
