"""Any timm backbone, masked in pixel space.

b batch, c channels, H W pixels, n patches, d width.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from leanmim.encoders.backbone import SWIN, Backbone, as_tokens
from leanmim.encoders.chain import run_once
from leanmim.encoders.paint import paint
from leanmim.encoders.segments import Borders, Setting, cuts
from leanmim.errors import UserError
from leanmim.masking import Grid, Mask
from leanmim.recompute import run


class AnyTimmEncoder(nn.Module):
    """Any timm backbone, masked in pixel space (FastMIM, section 3.1).

    Stride and layout of its features are found by running it once on an empty image. What its features do not depend
    on (norms of the head) is not trained.

    Args:
        backbone: a timm model with ``forward_features``.
        setting: its last four stages are cut (or the blocks of a model that has no stages); what comes before them belongs
            to the first segment. If stages were left out, a norm of our own closes the last one that is left.

    Raises:
        UserError: the features are no grid of patches of the image, or the stages do not follow each other.
    """

    full_grid = True
    prefix_tokens = 0
    recompute = False

    def __init__(self, backbone: Backbone, setting: Setting) -> None:
        super().__init__()
        self.backbone = backbone
        input_size, channels = setting.input_size, setting.channels
        name, info = type(backbone).__name__, getattr(backbone, "feature_info", [])
        last = setting.depth or len(info)
        stride = info[last - 1]["reduction"] if info else 1
        nearest = tuple(max(1, side // stride) * stride for side in input_size)
        remedy = "try another model"
        if nearest != input_size:
            remedy = f"try --input-size {nearest[0]} {nearest[1]}, or another model"
        features, chain = run_once(backbone, input_size, channels, remedy)
        n, width = as_tokens(backbone, features).shape[1:]
        self.stride = stride
        self.grid = Grid(input_size[0] // stride, input_size[1] // stride)
        if self.grid.n != n or nearest != input_size:
            raise UserError(
                f"{name} turns {input_size[0]} x {input_size[1]} px into {n} tokens, which are no grid of square "
                f"patches of {stride} px; {remedy}"
            )
        self.colour = nn.Parameter(torch.empty(channels).normal_(std=0.02))  # as published
        self.norm = nn.LayerNorm(width, eps=1e-6) if last < len(info) else nn.Identity()
        stages = info[:last]
        if len({stage["reduction"] for stage in stages}) > 1:  # else all have the same size, as the blocks of a ViT
            stages = stages[-4:]
        self.depths = cuts(setting.segments, len(stages), "stages", last - len(stages))
        closed = [info[depth - 1] for depth in self.depths[:-1]]  # the stages at the borders
        self.chain = list(chain)
        if not all(stage["module"] in chain for stage in closed):
            raise UserError(
                f"{name} cannot be cut into segments: its stages do not simply follow each other; use --segments 1"
            )
        self.ends = (*(self.chain.index(stage["module"]) + 1 for stage in closed), len(self.chain))
        zooms = tuple(stride // stage["reduction"] for stage in closed)
        widths = tuple(stage["num_chs"] for stage in closed)
        self.widths = (*(w * k**2 for w, k in zip(widths, zooms, strict=True)), width)
        pictures = "channels last" if getattr(backbone, "output_fmt", "NCHW") == "NHWC" else "channels first"
        layouts = tuple("tokens" if chain[stage["module"]] == 3 else pictures for stage in closed)
        swin = isinstance(backbone, SWIN)  # the norm of a border is exported as its own
        eps = backbone.layers[0].blocks[0].norm1.eps if swin else 1e-6
        self.borders = Borders(self.grid, widths, zooms, setting.narrows, layouts, eps)

    def embed(self, images: Float[Tensor, "b c H W"], mask: Mask) -> Float[Tensor, "b c H W"]:
        """The images with the learned colour over what is masked."""
        return paint(images, mask, self.grid, self.colour)

    def segment(self, i: int, x: Float[Tensor, "b c H W"]) -> Tensor:
        """Run the backbone, or the modules of segment ``i``."""
        if len(self.depths) == 1:
            return self.backbone.forward_features(x)
        return run(self.modules_of(i), x, self.recompute)

    def modules_of(self, i: int) -> list[nn.Module]:
        """The run of the backbone's modules that is segment ``i`` of several."""
        return [self.backbone.get_submodule(name) for name in self.chain[self.ends[i - 1] if i else 0 : self.ends[i]]]

    def narrow(self, i: int, x: Tensor, before: Mask, after: Mask) -> Tensor:
        """A token at what is newly masked."""
        return self.borders.narrow(i, x, before, after)

    def read(self, i: int, x: Tensor) -> Float[Tensor, "b n d"]:
        """One token for each patch; of an earlier stage those of a patch side by side."""
        tokens = as_tokens(self.backbone, x)
        return self.borders.read(i, tokens) if i < len(self.depths) - 1 else self.norm(tokens)

    def positions(self, mask: Mask) -> Int[Tensor, "b n"]:
        """Every patch, row by row."""
        return torch.arange(self.grid.n, device=mask.visible.device).expand(len(mask.visible), -1)

    def closing_norm(self, i: int) -> nn.Module:
        """That of the border; the backbone's features are what its own norm gives."""
        return self.norm if i == len(self.depths) - 1 else self.borders.norms[i]

    def parts(self, i: int) -> list[nn.Module | nn.Parameter]:
        """Modules and what its borders train; of the last one also a norm of our own, of the first one the colour."""
        whole = len(self.depths) == 1
        parts = [*([self.backbone] if whole else self.modules_of(i)), *self.borders.parts(i)]
        if i == len(self.depths) - 1:
            parts.append(self.norm)
        return parts if i else [*parts, self.colour]
