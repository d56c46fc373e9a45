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
from collections.abc import Iterator
from itertools import accumulate
from typing import Any, Literal, Protocol, runtime_checkable

import timm
import torch
from jaxtyping import Bool, Float, Int
from timm.layers import PatchEmbed
from timm.models import SwinTransformer, SwinTransformerV2, VisionTransformer
from torch import Tensor, nn

from leanmim.decoder import init_linear, sincos
from leanmim.errors import UserError
from leanmim.masking import Grid, Mask, cover, hidden_squares, magnify, take

SWIN = (SwinTransformer, SwinTransformerV2)
Masking = Literal["drop", "token", "pixel"]
Segments = int | tuple[int, ...]  # so many equal ones, or the block after which each ends
Backbone = Any  # a timm model: an nn.Module whose attributes differ from family to family


@runtime_checkable
class Encoder(Protocol):
    """A backbone cut into segments, and the way a mask reaches it."""

    backbone: Backbone
    stride: int
    grid: Grid
    widths: tuple[int, ...]  # one per segment
    depths: tuple[int, ...]  # blocks or stages up to the end of each segment
    prefix: int
    full_grid: bool  # `read` returns a token for every patch

    def embed(self, images: Float[Tensor, "b c H W"], mask: Mask) -> Tensor:
        """The masked input of the first segment, in the backbone's own layout."""
        ...

    def segment(self, i: int, x: Tensor) -> Tensor:
        """Run segment ``i``: a run of the backbone's blocks, or a stage."""
        ...

    def narrow(self, i: int, x: Tensor, before: Mask, after: Mask) -> Tensor:
        """The input of segment ``i``, whose mask hides more than that of the segment before (BIM)."""
        ...

    def read(self, i: int, x: Tensor) -> Float[Tensor, "b s d"]:
        """The tokens after segment ``i``, closed by that segment's own norm."""
        ...

    def positions(self, mask: Mask) -> Int[Tensor, "b s"]:
        """Where the tokens of `read` sit on the grid; prefix tokens sit past its end."""
        ...

    def closing_norm(self, i: int) -> nn.Module:
        """The norm at the end of segment ``i``."""
        ...

    def owner(self, name: str) -> int:
        """The segment that trains the parameter ``name``."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As of any module."""
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


def cuts(segments: Segments, parts: int, what: str = "blocks", before: int = 0) -> tuple[int, ...]:
    """The block (or stage) after which each segment ends; ``before`` others come first and are not cut.

    Raises:
        UserError: the blocks do not divide, or the numbers do not rise to the last block.
    """
    if isinstance(segments, int):
        if not 0 < segments <= parts or parts % segments:
            good = [s for s in range(1, parts + 1) if parts % s == 0]
            raise UserError(
                f"--segments: {parts} {what} do not divide into {segments} equal segments; possible: {good}"
            )
        return tuple(accumulate([before + parts // segments] + [parts // segments] * (segments - 1)))
    rising = all(low < high for low, high in zip((before, *segments), segments, strict=False))
    if not segments or not rising or segments[-1] != before + parts:
        own = f"{parts} {what}" + f", {before + 1} to {before + parts}" * (before > 0)
        raise UserError(
            f"--segments {' '.join(map(str, segments))} does not cut the model's {own}: give rising numbers of "
            f"which the last is {before + parts}, or one number of equal segments"
        )
    return segments


def like(norm: nn.Module, width: int) -> nn.Module:
    """A fresh norm of the same kind: it closes a segment, and takes the place of the last one in the export."""
    if isinstance(norm, nn.Identity):
        return nn.Identity()  # the model has none
    return type(norm)(width, eps=norm.eps) if hasattr(norm, "eps") else nn.LayerNorm(width, eps=1e-6)


class Borders(nn.Module):
    """What lies between the segments of a hierarchical backbone: a norm that closes each but the last, and (for masks
    that hide more at every border) a token to hide with.

    Args:
        grid: of the backbone's output.
        widths: channels at the end of each segment but the last.
        zooms: tokens there along the side of an output patch.
        narrows: masks hide more at the borders.
        eps: of the norms.
    """

    def __init__(
        self, grid: Grid, widths: tuple[int, ...], zooms: tuple[int, ...], narrows: bool, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.grid, self.zooms = grid, zooms
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=eps) for width in widths)
        self.tokens = nn.ParameterList(nn.Parameter(torch.zeros(width)) for width in widths if narrows)
        for token in self.tokens:
            nn.init.normal_(token, std=0.02)

    def read(self, i: int, tokens: Float[Tensor, "b N c"]) -> Float[Tensor, "b n d"]:
        """The fine tokens of each patch side by side, normalised."""
        k = self.zooms[i]
        x = self.norms[i](tokens).unflatten(1, (self.grid.height, k, self.grid.width, k))
        return x.transpose(2, 3).flatten(3, 5).flatten(1, 2)

    def narrow(self, i: int, x: Tensor, before: Mask, after: Mask, channels_last: bool) -> Tensor:
        """A token at what is newly masked before segment ``i``."""
        if not len(self.tokens):
            return x
        size = (self.grid.height * self.zooms[i - 1], self.grid.width * self.zooms[i - 1])
        new = newly_hidden(before, after, self.grid, size)
        token = self.tokens[i - 1].to(x.dtype)
        if x.ndim == 3:
            return torch.where(new.flatten(1)[..., None], token, x)
        if channels_last:
            return torch.where(new[..., None], token, x)
        return torch.where(new[:, None], token[:, None, None], x)


def newly_hidden(before: Mask, after: Mask, grid: Grid, size: tuple[int, int]) -> Bool[Tensor, "b y x"]:
    """What is hidden as a whole now and was not before, on a grid of ``size``."""
    return cover(hidden_squares(after, grid), size) & ~cover(hidden_squares(before, grid), size)


class ViTEncoder(nn.Module):
    """A plain timm ViT.

    Positions are fixed: 2-D sine-cosine (MAE, appendix A.1), or those of the checkpoint it starts from.

    Args:
        backbone: a timm VisionTransformer, built for the input size.
        masking: ``drop`` (MAE), ``token`` (SimMIM) or ``pixel`` (FastMIM).
        segments: how the blocks are cut.
        narrows: masks hide more at every border.
    """

    def __init__(self, backbone: Backbone, masking: Masking, segments: Segments = 1, narrows: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        self.prefix = backbone.num_prefix_tokens
        self.grid = Grid(*backbone.patch_embed.grid_size)
        self.stride = backbone.patch_embed.patch_size[0]
        self.ends = cuts(segments, len(backbone.blocks))
        self.depths = self.ends
        self.widths = (backbone.embed_dim,) * len(self.ends)
        self.full_grid = masking != "drop"
        self.mask_token = nn.Parameter(torch.zeros(1, 1, backbone.embed_dim)) if masking == "token" else None
        channels = backbone.patch_embed.proj.in_channels
        self.colour = (
            nn.Parameter(torch.empty(channels).normal_(std=0.02)) if masking == "pixel" else None
        )  # as published
        self.norms = nn.ModuleList(like(self.final_norm, backbone.embed_dim) for _ in self.ends[1:])
        tokens = len(self.norms) if narrows and self.full_grid else 0
        self.tokens = nn.ParameterList(nn.Parameter(torch.zeros(1, 1, backbone.embed_dim)) for _ in range(tokens))

        self.apply(init_linear)
        stem = backbone.patch_embed.proj
        nn.init.xavier_uniform_(stem.weight.view(len(stem.weight), -1))  # the stem is a linear layer on patches
        for token in (self.mask_token, backbone.cls_token, backbone.reg_token, *self.tokens):
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

    def narrow(self, i: int, x: Float[Tensor, "b s d"], before: Mask, after: Mask) -> Float[Tensor, "b z d"]:
        """The first visible ones (nested masks keep their order), or a token in place of those newly masked."""
        if not self.full_grid:
            return x[:, : self.prefix + after.visible.shape[1]]
        if not len(self.tokens):
            return x
        new = newly_hidden(before, after, self.grid, self.grid).flatten(1)
        new = nn.functional.pad(new, (self.prefix, 0))
        return torch.where(new[..., None], self.tokens[i - 1].to(x.dtype), x)

    def read(self, i: int, x: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
        """Close segment ``i`` with its norm."""
        return self.closing_norm(i)(x)

    def closing_norm(self, i: int) -> nn.Module:
        """The backbone's own for the last segment."""
        return self.final_norm if i == len(self.norms) else self.norms[i]

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
        if part in ("norms", "tokens"):
            return int(rest.split(".")[0]) + (part == "tokens")
        return len(self.norms) if part in ("norm", "fc_norm") else 0


class SwinEncoder(nn.Module):
    """A timm Swin transformer; masked stem tokens are replaced by a learned token (SimMIM, section 3.1).

    A patch is a token of the last stage, 32 px.
    """

    full_grid = True
    prefix = 0

    def __init__(self, backbone: Backbone, segments: Segments = 1, narrows: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        self.stride = backbone.feature_info[-1]["reduction"]
        self.ends = self.depths = cuts(segments, len(backbone.layers), "stages")
        stem = Grid(*backbone.patch_embed.grid_size)
        self.zoom = self.stride // backbone.patch_embed.patch_size[0]  # stem tokens along a patch's side
        self.grid = Grid(stem.height // self.zoom, stem.width // self.zoom)
        inner = [backbone.feature_info[end - 1] for end in self.ends[:-1]]
        widths = tuple(info["num_chs"] for info in inner)
        zooms = tuple(self.stride // info["reduction"] for info in inner)
        self.widths = (*(w * k**2 for w, k in zip(widths, zooms, strict=True)), backbone.num_features)
        self.mask_token = nn.Parameter(torch.zeros(backbone.embed_dim))
        nn.init.normal_(self.mask_token, std=0.02)
        self.borders = Borders(self.grid, widths, zooms, narrows, backbone.norm.eps)

    def embed(self, images: Float[Tensor, "b c H W"], mask: Mask) -> Float[Tensor, "b h w d"]:
        """Stem tokens, those under a masked patch replaced."""
        x = self.backbone.patch_embed(images)
        hidden = magnify(hidden_squares(mask, self.grid), (x.shape[1], x.shape[2]))
        return torch.where(hidden[..., None], self.mask_token.to(x.dtype), x)

    def segment(self, i: int, x: Float[Tensor, "b h w d"]) -> Float[Tensor, "b y x e"]:
        """Run the stages of segment ``i``."""
        start = self.ends[i - 1] if i else 0
        return self.backbone.layers[start : self.ends[i]](x)

    def narrow(self, i: int, x: Float[Tensor, "b h w d"], before: Mask, after: Mask) -> Float[Tensor, "b h w d"]:
        """A token at what is newly masked."""
        return self.borders.narrow(i, x, before, after, channels_last=True)

    def read(self, i: int, x: Float[Tensor, "b y x e"]) -> Float[Tensor, "b n d"]:
        """The last stage's tokens after the backbone's norm; of an earlier stage those of a patch side by side."""
        if i < len(self.ends) - 1:
            return self.borders.read(i, x.flatten(1, 2))
        return self.backbone.norm(x).flatten(1, 2)

    def positions(self, mask: Mask) -> Int[Tensor, "b n"]:
        """Every patch, row by row."""
        return torch.arange(self.grid.n, device=mask.visible.device).expand(len(mask.visible), -1)

    def closing_norm(self, i: int) -> nn.Module:
        """The backbone's own for the last segment."""
        return self.backbone.norm if i == len(self.ends) - 1 else self.borders.norms[i]

    def owner(self, name: str) -> int:
        """Stages belong to their segment, the final norm to the last, stem and mask token to the first."""
        if name.startswith("backbone.layers."):
            stage = int(name.split(".")[2])
            return next(i for i, end in enumerate(self.ends) if stage < end)
        if name.startswith("borders."):
            return owner_of_border(name)
        return len(self.ends) - 1 if name.startswith("backbone.norm.") else 0


def owner_of_border(name: str) -> int:
    """The segment that a norm of `Borders` closes, or before which its token is put."""
    _, part, number = name.split(".")[:3]
    return int(number) + (part == "tokens")


class TimmEncoder(nn.Module):
    """Any timm backbone, masked in pixel space (FastMIM, section 3.1).

    Stride and layout of its features are found by running it once on an empty image. What its features do not depend
    on (norms of the head) is not trained.

    Args:
        backbone: a timm model with ``forward_features``.
        input_size: height and width, px.
        channels: of the images.
        first_layers: so many stages are left of it, if some were left out; then a norm of our own closes them.
        segments: how its last four stages are cut (or the blocks of a model that has no stages); what comes before them
            belongs to the first.
        narrows: masks hide more at every border.

    Raises:
        UserError: the features are no grid of patches of the image, or the stages do not follow each other.
    """

    full_grid = True
    prefix = 0

    def __init__(
        self,
        backbone: Backbone,
        input_size: tuple[int, int],
        channels: int,
        first_layers: int | None = None,
        segments: Segments = 1,
        narrows: bool = False,
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
        features, units = run_once(backbone, input_size, channels, remedy)
        n, width = as_tokens(backbone, features).shape[1:]
        self.stride = stride
        self.grid = Grid(input_size[0] // stride, input_size[1] // stride)
        if self.grid.n != n or near != input_size:
            raise UserError(
                f"{name} turns {input_size[0]} x {input_size[1]} px into {n} tokens, which are no grid of square "
                f"patches of {stride} px; {remedy}"
            )
        self.colour = nn.Parameter(torch.empty(channels).normal_(std=0.02))  # as published
        self.norm = nn.LayerNorm(width, eps=1e-6) if cut else nn.Identity()
        parts = info[:first_layers]
        if len({part["reduction"] for part in parts}) > 1:  # else all have the same size, as the blocks of a ViT
            parts = parts[-4:]
        layers = first_layers or len(info)
        uncut = layers - len(parts)
        self.depths = (layers,) if segments in (1, (1,)) else cuts(segments, len(parts), "stages", uncut)
        inner = [info[depth - 1] for depth in self.depths[:-1]]
        zooms = tuple(stride // part["reduction"] for part in inner)
        widths = tuple(part["num_chs"] for part in inner)
        self.widths = (*(w * k**2 for w, k in zip(widths, zooms, strict=True)), width)
        self.units = units if inner else []
        places = [self.units.index(part["module"]) + 1 if part["module"] in self.units else 0 for part in inner]
        if inner and not all(places):
            raise UserError(
                f"{name} cannot be cut into segments: its stages do not simply follow each other; use --segments 1"
            )
        self.ends = (*places, len(self.units))
        swin = isinstance(backbone, SWIN)  # the norm of a border is exported as its own
        eps = backbone.layers[0].blocks[0].norm1.eps if swin else 1e-6
        self.borders = Borders(self.grid, widths, zooms, narrows, eps)

    def embed(self, images: Float[Tensor, "b c H W"], mask: Mask) -> Float[Tensor, "b c H W"]:
        """The images with the learned colour over what is masked."""
        return paint(images, mask, self.grid, self.colour)

    def segment(self, i: int, x: Float[Tensor, "b c H W"]) -> Tensor:
        """Run the backbone, or the modules of segment ``i``."""
        if not self.units:
            return self.backbone.forward_features(x)
        for name in self.units[self.ends[i - 1] if i else 0 : self.ends[i]]:
            x = self.backbone.get_submodule(name)(x)
        return x

    def narrow(self, i: int, x: Tensor, before: Mask, after: Mask) -> Tensor:
        """A token at what is newly masked."""
        channels_last = getattr(self.backbone, "output_fmt", "NCHW") == "NHWC"
        return self.borders.narrow(i, x, before, after, channels_last)

    def read(self, i: int, x: Tensor) -> Float[Tensor, "b n d"]:
        """One token for each patch; of an earlier stage those of a patch side by side."""
        tokens = as_tokens(self.backbone, x)
        return self.borders.read(i, tokens) if i < len(self.ends) - 1 else self.norm(tokens)

    def positions(self, mask: Mask) -> Int[Tensor, "b n"]:
        """Every patch, row by row."""
        return torch.arange(self.grid.n, device=mask.visible.device).expand(len(mask.visible), -1)

    def closing_norm(self, i: int) -> nn.Module:
        """That of the border; the backbone's features are what its own norm gives."""
        return self.norm if i == len(self.ends) - 1 else self.borders.norms[i]

    def owner(self, name: str) -> int:
        """Modules belong to their segment, the colour to the first, a norm of our own to the last."""
        if name.startswith("borders."):
            return owner_of_border(name)
        inside = name.removeprefix("backbone.")
        place = next((k for k, unit in enumerate(self.units) if inside.startswith(unit + ".")), 0)
        return len(self.ends) - 1 if name.startswith("norm.") else sum(end <= place for end in self.ends[:-1])


def run_once(backbone: Backbone, input_size: tuple[int, int], channels: int, remedy: str) -> tuple[Tensor, list[str]]:
    """The features of an empty image, and the modules that made them (`Flow.units`).

    From then on only those parameters are trained on which the features depend.

    Raises:
        UserError: the backbone does not take the size (with the ``remedy``), or its features are not one grid.
    """
    name, was_training = type(backbone).__name__, backbone.training
    backbone.eval()  # an empty image is none that running statistics should learn from
    with torch.enable_grad(), Flow(backbone) as flow:
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
    return features, flow.units(features)


class Flow:
    """Watches which modules a backbone runs, one after the other: its children, and those of the stages' container.

    Args:
        backbone: a timm model.
    """

    def __init__(self, backbone: Backbone) -> None:
        stages = [part["module"] for part in getattr(backbone, "feature_info", [])]
        inside = {name for name, _ in backbone.named_modules()}  # not all that timm names there is
        parents = {name.rpartition(".")[0] for name in stages if name in inside} - {""}
        children = [name for name, _ in backbone.named_children() if name not in parents]
        children += [f"{parent}.{name}" for parent in parents for name, _ in
                     backbone.get_submodule(parent).named_children()]  # fmt: skip
        self.modules = {name: backbone.get_submodule(name) for name in children}
        self.calls: list[tuple[str, Any, Any]] = []  # name, input, output

    def __enter__(self) -> "Flow":
        """Begin to watch."""
        self.hooks = [
            module.register_forward_hook(lambda _, x, y, name=name: self.calls.append((name, x[0] if x else None, y)))
            for name, module in self.modules.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        """Watch no longer."""
        for hook in self.hooks:
            hook.remove()

    def units(self, result: Tensor) -> list[str]:
        """The modules in their order, if each one's input is the output of the one before, and the last one's output
        is ``result``; else none.
        """
        chained = all(y is x for (_, _, y), (_, x, _) in zip(self.calls, self.calls[1:], strict=False))
        return [name for name, _, _ in self.calls] if chained and self.calls and self.calls[-1][2] is result else []


class Prefix(nn.Module):
    """The first stages of a hierarchical backbone, closed by a norm: for families that timm cannot build shorter.

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


def shorter(backbone: Backbone, depth: int) -> dict[str, Any]:
    """timm's arguments for the same model with the first ``depth`` blocks (ViT) or stages (Swin) only; empty where timm
    takes none.
    """
    if isinstance(backbone, VisionTransformer):
        return {"depth": depth}
    if isinstance(backbone, SWIN):
        stages: list[Any] = [stage.blocks for stage in backbone.layers[:depth]]
        return {"depths": [len(s) for s in stages], "num_heads": [s[0].attn.num_heads for s in stages]}
    return {}


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
    layers = count_layers(backbone)
    if not 0 < first_layers <= layers:
        what = "blocks" if isinstance(backbone, VisionTransformer) else "stages"
        raise UserError(f"--depth {first_layers} is out of range; {name} has {layers} {what}")
    if first_layers < layers:
        if not hasattr(backbone, "prune_intermediate_layers"):
            raise UserError(f"timm's {name} cannot be cut at --depth {first_layers}; leave --depth out")
        backbone.prune_intermediate_layers([first_layers - 1], prune_norm=not isinstance(backbone, VisionTransformer))
    return backbone


def count_layers(backbone: Backbone) -> int:
    """Blocks of a ViT, stages of a hierarchical model."""
    return len(backbone.blocks if isinstance(backbone, VisionTransformer) else backbone.feature_info)


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
    segments: Segments = 1,
    first_layers: int | None = None,
    narrows: bool = False,
    linear_init: str = "timm",
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
    if linear_init == "xavier":
        backbone.apply(init_linear)
    if masking not in able:
        raise UserError(
            f"--masking {masking} does not work with {family.__name__}, whose tokens are tied to the grid; "
            f"it can do: {', '.join(able)} (for example `leanmim pretrain "
            f"{'simmim' if 'token' in able else 'fastmim'}`)"
        )
    if not plain and masking == "pixel":
        return TimmEncoder(backbone, input_size, channels, first_layers, segments, narrows)
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
        return ViTEncoder(backbone, masking, segments, narrows)
    return SwinEncoder(backbone, segments, narrows)
