"""How a mask reaches a timm backbone. Only this file knows about stems, windows and class tokens.

b batch, c channels, H W pixels, n patches, v visible, q prefix tokens (class, registers), s tokens read, d width.

The backbone is timm's own module, unmodified, so that exporting it is saving it. A *patch* is one of its output
tokens: 16 px for ViT/16, 32 px for Swin.

| masking | what the backbone sees                          | backbones |
|---------|-------------------------------------------------|-----------|
| drop    | visible tokens only, after positions (MAE)      | plain ViT |
| token   | a learned token in place of masked ones (SimMIM)| ViT, Swin |
| pixel   | a learned colour painted on the image (FastMIM) | any       |
"""

import difflib
from itertools import accumulate
from typing import Any, Literal, Protocol, runtime_checkable

import timm
import torch
from jaxtyping import Float, Int
from timm.layers import PatchEmbed
from timm.models import SwinTransformer, VisionTransformer
from torch import Tensor, nn

from leanmim.decoder import init_linear, sincos
from leanmim.errors import UserError
from leanmim.masking import Grid, Mask, hidden_squares, magnify, take

Masking = Literal["drop", "token", "pixel"]
Backbone = Any  # a timm model: an nn.Module whose attributes differ from family to family


@runtime_checkable
class Encoder(Protocol):
    """A backbone cut into segments, and the way a mask reaches it."""

    backbone: Backbone
    stride: int
    grid: Grid
    widths: tuple[int, ...]  # one per segment
    prefix: int
    full_grid: bool  # `read` returns a token for every patch

    def embed(self, images: Float[Tensor, "b c H W"], mask: Mask) -> Tensor:
        """The masked input of the first segment, in the backbone's own layout."""
        ...

    def segment(self, i: int, x: Tensor) -> Tensor:
        """Run segment ``i``: a run of the backbone's blocks, or a stage."""
        ...

    def read(self, i: int, x: Tensor) -> Float[Tensor, "b s d"]:
        """The tokens after segment ``i``, closed by that segment's own norm."""
        ...

    def positions(self, mask: Mask) -> Int[Tensor, "b s"]:
        """Where the tokens of `read` sit on the grid; prefix tokens sit past its end."""
        ...

    def owner(self, name: str) -> int:
        """The segment that trains the parameter ``name``."""
        ...


def paint(
    images: Float[Tensor, "b c H W"], mask: Mask, grid: Grid, colour: Float[Tensor, " c"]
) -> Float[Tensor, "b c H W"]:
    """The images with a colour over what is masked (FastMIM, section 3.1)."""
    hidden = magnify(hidden_squares(mask, grid), (images.shape[2], images.shape[3]))
    return torch.where(hidden[:, None], colour[:, None, None], images)


def as_tokens(backbone: Backbone, features: Tensor) -> Float[Tensor, "b n d"]:
    """The features of a timm model as one token for each patch, row by row: from tokens, channels first or last."""
    if hasattr(backbone, "reroll"):  # Hiera's tokens lie in the order of its mask units until the last stage
        return backbone.reroll(features, len(backbone.blocks) - 1).flatten(1, 2)
    if features.ndim == 3:
        return features[:, getattr(backbone, "num_prefix_tokens", None) or 0 :]
    if getattr(backbone, "output_fmt", "NCHW") == "NHWC":
        return features.flatten(1, 2)
    return features.flatten(2).transpose(1, 2)


def even_cuts(blocks: int, segments: int) -> tuple[int, ...]:
    """The block after which each segment ends, for segments of equal length.

    Raises:
        UserError: the blocks do not divide.
    """
    if not 0 < segments <= blocks or blocks % segments:
        good = [s for s in range(1, blocks + 1) if blocks % s == 0]
        raise UserError(f"{blocks} blocks do not divide into {segments} equal segments; possible: {good}")
    return tuple(accumulate([blocks // segments] * segments))


class ViTEncoder(nn.Module):
    """A plain timm ViT.

    Positions are fixed: 2-D sine-cosine (MAE, appendix A.1), or those of the checkpoint it starts from.

    Args:
        backbone: a timm VisionTransformer, built for the input size.
        masking: ``drop`` (MAE), ``token`` (SimMIM) or ``pixel`` (FastMIM).
        segments: cut the blocks into this many equal runs.
    """

    def __init__(self, backbone: Backbone, masking: Masking, segments: int = 1) -> None:
        super().__init__()
        self.backbone = backbone
        self.prefix = backbone.num_prefix_tokens
        self.grid = Grid(*backbone.patch_embed.grid_size)
        self.stride = backbone.patch_embed.patch_size[0]
        self.ends = even_cuts(len(backbone.blocks), segments)
        self.widths = (backbone.embed_dim,) * segments
        self.full_grid = masking != "drop"
        self.mask_token = nn.Parameter(torch.zeros(1, 1, backbone.embed_dim)) if masking == "token" else None
        self.colour = nn.Parameter(torch.zeros(backbone.patch_embed.proj.in_channels)) if masking == "pixel" else None
        self.norms = nn.ModuleList(nn.LayerNorm(backbone.embed_dim, eps=1e-6) for _ in range(segments - 1))

        self.apply(init_linear)
        stem = backbone.patch_embed.proj
        nn.init.xavier_uniform_(stem.weight.view(len(stem.weight), -1))  # the stem is a linear layer on patches
        for token in (self.mask_token, backbone.cls_token, backbone.reg_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)
        if backbone.pos_embed is not None:
            positions = sincos(self.grid, backbone.embed_dim)
            prefix = backbone.pos_embed.shape[1] - self.grid.n
            backbone.pos_embed.data.copy_(nn.functional.pad(positions, (0, 0, prefix, 0)))
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
        x = vit.patch_embed(images)
        x = x.flatten(1, -2)  # models with a dynamic image size keep the grid's two axes
        if self.mask_token is not None:
            hidden = hidden_squares(mask, self.grid).flatten(1)
            x = torch.where(hidden[..., None], self.mask_token.to(x.dtype), x)
        positions = torch.zeros_like(x[:1]) if vit.pos_embed is None else vit.pos_embed
        split = positions.shape[1] - self.grid.n
        x = x + positions[:, split:]
        if not self.full_grid:
            x = take(x, mask.visible)
        tokens: list[Tensor] = [token for token in (vit.cls_token, vit.reg_token) if token is not None]
        if tokens:
            prefix = torch.cat(tokens, dim=1)
            prefix = prefix + positions[:, :split] if split else prefix
            x = torch.cat([prefix.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        return vit.norm_pre(vit.pos_drop(x))

    def segment(self, i: int, x: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
        """Run the blocks of segment ``i``."""
        start = self.ends[i - 1] if i else 0
        for block in self.backbone.blocks[start : self.ends[i]]:
            x = block(x)
        return x

    def read(self, i: int, x: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
        """Close segment ``i`` with its norm: the backbone's own for the last one."""
        return self.final_norm(x) if i == len(self.norms) else self.norms[i](x)

    def positions(self, mask: Mask) -> Int[Tensor, "b s"]:
        """Prefix tokens first, then the visible patches, or all of them."""
        b, device = len(mask.visible), mask.visible.device
        prefix = torch.arange(self.grid.n, self.grid.n + self.prefix, device=device).expand(b, -1)
        patches = torch.arange(self.grid.n, device=device).expand(b, -1) if self.full_grid else mask.visible
        return torch.cat([prefix, patches], dim=1)

    def owner(self, name: str) -> int:
        """Blocks and norms belong to their segment, the final norm to the last, the stem to the first."""
        part, _, rest = name.removeprefix("backbone.").partition(".")
        if part == "blocks":
            return next(i for i, end in enumerate(self.ends) if int(rest.split(".")[0]) < end)
        if part == "norms":
            return int(rest.split(".")[0])
        return len(self.norms) if part in ("norm", "fc_norm") else 0


class SwinEncoder(nn.Module):
    """A timm Swin transformer; masked stem tokens are replaced by a learned token (SimMIM, section 3.1).

    A patch is a token of the last stage, 32 px.
    """

    full_grid = True
    prefix = 0

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.stride = backbone.feature_info[-1]["reduction"]
        stem = Grid(*backbone.patch_embed.grid_size)
        self.zoom = self.stride // backbone.patch_embed.patch_size[0]  # stem tokens along a patch's side
        self.grid = Grid(stem.height // self.zoom, stem.width // self.zoom)
        self.widths: tuple[int, ...] = (backbone.num_features,)
        self.mask_token = nn.Parameter(torch.zeros(backbone.embed_dim))
        nn.init.normal_(self.mask_token, std=0.02)

    def embed(self, images: Float[Tensor, "b c H W"], mask: Mask) -> Float[Tensor, "b h w d"]:
        """Stem tokens, those under a masked patch replaced."""
        x = self.backbone.patch_embed(images)
        hidden = magnify(hidden_squares(mask, self.grid), (x.shape[1], x.shape[2]))
        return torch.where(hidden[..., None], self.mask_token.to(x.dtype), x)

    def segment(self, i: int, x: Float[Tensor, "b h w d"]) -> Float[Tensor, "b y x e"]:
        """Run all stages."""
        return self.backbone.layers(x)

    def read(self, i: int, x: Float[Tensor, "b y x e"]) -> Float[Tensor, "b n e"]:
        """The last stage's tokens after the backbone's norm."""
        return self.backbone.norm(x).flatten(1, 2)

    def positions(self, mask: Mask) -> Int[Tensor, "b n"]:
        """Every patch, row by row."""
        return torch.arange(self.grid.n, device=mask.visible.device).expand(len(mask.visible), -1)

    def owner(self, name: str) -> int:
        """There is one segment."""
        return 0


class TimmEncoder(nn.Module):
    """Any timm backbone, masked in pixel space (FastMIM, section 3.1).

    Stride and layout of its features are found by running it once on an empty image. What its features do not depend
    on (norms of the head) is not trained.

    Args:
        backbone: a timm model with ``forward_features``.
        input_size: height and width, px.
        channels: of the images.
        cut: its last stages were left out, and its norm with them; a norm of our own takes its place.

    Raises:
        UserError: the features are no grid of patches of the image.
    """

    full_grid = True
    prefix = 0

    def __init__(
        self, backbone: Backbone, input_size: tuple[int, int], channels: int, first_layers: int | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        name, info = type(backbone).__name__, getattr(backbone, "feature_info", [])
        stride = info[(first_layers or len(info)) - 1]["reduction"] if info else 1
        cut = first_layers is not None and first_layers < len(info)
        near = tuple(max(1, side // stride) * stride for side in input_size)
        remedy = (
            f"try --input-size {near[0]} {near[1]}, or another model" if near != input_size else "try another model"
        )
        was_training = backbone.training
        backbone.eval()  # an empty image is none that running statistics should learn from
        with torch.enable_grad():
            try:
                features = backbone.forward_features(torch.zeros(1, channels, *input_size))
            except (RuntimeError, AssertionError, ValueError) as error:
                raise UserError(f"{name} does not run at input size {input_size}: {error}; {remedy}") from error
            if not isinstance(features, Tensor) or features.ndim not in (3, 4):
                raise UserError(f"{name} cannot be masked in pixel space: its features are not one grid of patches")
            features.sum().backward()
        for parameter in backbone.parameters():
            parameter.requires_grad_(parameter.grad is not None)
            parameter.grad = None
        backbone.train(was_training)
        n, width = as_tokens(backbone, features).shape[1:]
        self.stride = stride
        self.grid = Grid(input_size[0] // stride, input_size[1] // stride)
        if self.grid.n != n or near != input_size:
            raise UserError(
                f"{name} turns {input_size[0]} x {input_size[1]} px into {n} tokens, which are no grid of square "
                f"patches of {stride} px; {remedy}"
            )
        self.widths: tuple[int, ...] = (width,)
        self.colour = nn.Parameter(torch.zeros(channels))
        self.norm = nn.LayerNorm(width, eps=1e-6) if cut else nn.Identity()

    def embed(self, images: Float[Tensor, "b c H W"], mask: Mask) -> Float[Tensor, "b c H W"]:
        """The images with the learned colour over what is masked."""
        return paint(images, mask, self.grid, self.colour)

    def segment(self, i: int, x: Float[Tensor, "b c H W"]) -> Tensor:
        """Run the backbone."""
        return self.backbone.forward_features(x)

    def read(self, i: int, x: Tensor) -> Float[Tensor, "b n d"]:
        """One token for each patch."""
        return self.norm(as_tokens(self.backbone, x))

    def positions(self, mask: Mask) -> Int[Tensor, "b n"]:
        """Every patch, row by row."""
        return torch.arange(self.grid.n, device=mask.visible.device).expand(len(mask.visible), -1)

    def owner(self, name: str) -> int:
        """There is one segment."""
        return 0


OPTIONAL = ("img_size", "drop_path_rate")  # arguments that not every timm model takes


def backbone_arguments(name: str, input_size: tuple[int, int], channels: int, **kwargs: Any) -> dict[str, Any]:
    """What `create_backbone` gives to timm: what of it the model takes."""
    return _create(name, _wishes(name, input_size, channels, **kwargs) | {"device": "meta"})[1]


def _wishes(name: str, input_size: tuple[int, int], channels: int, **kwargs: Any) -> dict[str, Any]:
    """Arguments that a model may take or not."""
    arguments: dict[str, Any] = dict(num_classes=0, in_chans=channels, img_size=input_size, drop_path_rate=0.0)
    if name.startswith("swin_"):
        patch = kwargs.get("patch_size", 4)
        arguments["window_size"] = tuple(max(1, size // patch // 8) for size in input_size)
    return {**arguments, **kwargs}


def create_backbone(
    name: str, input_size: tuple[int, int], channels: int, first_layers: int | None = None, **kwargs: Any
) -> Backbone:
    """A timm model without its head, built for ``input_size`` (height, width in px).

    ``first_layers`` keeps only so many: blocks of a ViT, stages of a hierarchical model.

    Swin's window is 1/8 of its stem's grid (7 at 224 px, 6 at 192, 4 at 128) as in SimMIM and FastMIM, so that
    windows tile every size.

    Raises:
        UserError: timm does not know the model, or refuses the size or an argument.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.4)
        raise UserError(
            f"timm has no model {name!r}; nearest: {', '.join(near) or 'none'} (timm.list_models() has all)"
        )
    backbone, _ = _create(name, _wishes(name, input_size, channels, **kwargs))
    if first_layers is None:
        return backbone
    parts = backbone.blocks if isinstance(backbone, VisionTransformer) else backbone.feature_info
    if not 0 < first_layers <= len(parts):
        what = "blocks" if isinstance(backbone, VisionTransformer) else "stages"
        raise UserError(f"--depth {first_layers} is out of range; {name} has {len(parts)} {what}")
    if first_layers < len(parts):
        if not hasattr(backbone, "prune_intermediate_layers"):
            raise UserError(f"timm's {name} cannot be cut at --depth {first_layers}; leave --depth out")
        backbone.prune_intermediate_layers([first_layers - 1], prune_norm=not isinstance(backbone, VisionTransformer))
    return backbone


def _create(name: str, arguments: dict[str, Any]) -> tuple[Backbone, dict[str, Any]]:
    """The model and the arguments that it took."""
    try:
        return timm.create_model(name, **arguments), arguments
    except TypeError as error:
        unknown = [key for key in OPTIONAL if f"'{key}'" in str(error) and key in arguments]
        if not unknown:
            raise UserError(f"timm's {name} does not take these --model-kwargs: {error}") from error
        return _create(name, {key: value for key, value in arguments.items() if key != unknown[0]})
    except (AssertionError, ValueError, RuntimeError) as error:
        raise UserError(f"timm's {name} cannot be built with {arguments}: {error}") from error


def make_encoder(
    backbone: Backbone,
    masking: Masking,
    input_size: tuple[int, int],
    channels: int = 3,
    segments: int = 1,
    first_layers: int | None = None,
) -> Encoder:
    """The encoder for a backbone and a masking.

    Raises:
        UserError: the backbone cannot do this masking, or its patches do not divide the input size.
    """
    family = type(backbone)
    plain = (
        family is VisionTransformer
        and isinstance(backbone.patch_embed.proj, nn.Conv2d)
        and type(backbone.patch_embed) is PatchEmbed
    )
    able = (
        {VisionTransformer: ("drop", "token", "pixel"), SwinTransformer: ("token", "pixel")}.get(family, ("pixel",))
        if plain or family is not VisionTransformer
        else ("pixel",)
    )
    if masking not in able:
        raise UserError(
            f"--masking {masking} does not work with {family.__name__}, whose tokens are tied to the grid; "
            f"it can do: {', '.join(able)} (for example `leanmim pretrain "
            f"{'simmim' if 'token' in able else 'fastmim'}`)"
        )
    if not plain and masking == "pixel":
        return TimmEncoder(backbone, input_size, channels, first_layers)
    if first_layers is not None and family is SwinTransformer:
        raise UserError("--depth with Swin needs --masking pixel, for example `leanmim pretrain fastmim`")
    stride = (
        backbone.patch_embed.patch_size[0] if family is VisionTransformer else backbone.feature_info[-1]["reduction"]
    )
    if any(size % stride for size in input_size):
        lower = tuple(max(1, size // stride) * stride for size in input_size)
        raise UserError(
            f"--input-size {input_size[0]} {input_size[1]} is not divided by the model's patch of {stride} px; "
            f"try {lower[0]} {lower[1]}"
        )
    if family is VisionTransformer:
        if backbone.patch_embed.patch_size[0] != backbone.patch_embed.patch_size[1]:
            raise UserError(f"patches must be square, not {backbone.patch_embed.patch_size}; choose another patch_size")
        return ViTEncoder(backbone, masking, segments)
    return SwinEncoder(backbone)
