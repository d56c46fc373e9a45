"""Tiny models of every method, masks, and what tests look at; shared by the tests of several files."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from leanmim.config import Pretrain
from leanmim.factory import build
from leanmim.masking import Grid, Mask, Split, select_furthest, select_random
from leanmim.mim import MIM
from leanmim.recipes import BIM, FASTMIM_P, MAE
from leanmim.run import save
from leanmim.step import make_optimizers

PHOTOS = Path(__file__).parent.parent / "demo" / "photos"


PLAIN = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}


VIT = ("vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2})


SWIN = ("swin_tiny_patch4_window7_224", {"embed_dim": 24})


CONVNEXT = ("convnext_atto", {})


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images_of(config: Pretrain, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, config.channels, *config.size, generator=seeded(seed))


def noisy(b: int, c: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(b, c, height, width, generator=torch.Generator().manual_seed(seed)) * 2 + 0.5


def equal(one: Any, two: Any) -> bool:
    """Tensors bit for bit, and whatever holds them."""
    if isinstance(one, Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(equal, one, two))
    return one == two


# Masks.


def nothing_masked(n: int, batch: int = 2) -> Mask:
    ids = torch.arange(n).expand(batch, -1)
    return Mask(ids, ids[:, :0])


def mask_of(batch: int, grid: Grid, visible: int, seed: int = 0) -> Mask:
    """Any number of visible patches, none included, in any order."""
    ids = torch.rand(batch, grid.n, generator=seeded(seed)).argsort(1)
    return Mask(ids[:, :visible], ids[:, visible:])


def hidden_pixels(mask: Mask, grid: Grid, side: int) -> Tensor:
    """True where a pixel is masked; an image has ``side`` rows."""
    squares = torch.zeros(len(mask.masked), *grid, dtype=torch.bool)
    for row, ids in enumerate(mask.masked.tolist()):
        for place in ids:
            squares[row, place // grid.width, place % grid.width] = True
    squares = squares if mask.hidden is None else mask.hidden
    k = side // squares.shape[1]
    return torch.kron(squares.int(), torch.ones(1, k, k, dtype=torch.int)).bool()


def whole_squares(hidden: Tensor, size: tuple[int, int]) -> Tensor:
    """Which squares of a grid of ``size`` have no visible pixel."""
    y, x = hidden.shape[1] // size[0], hidden.shape[2] // size[1]
    result = torch.zeros(len(hidden), *size, dtype=torch.bool)
    for b, r, c in product(range(len(hidden)), range(size[0]), range(size[1])):
        result[b, r, c] = hidden[b, r * y : (r + 1) * y, c * x : (c + 1) * x].all()
    return result


def side_by_side(x: Tensor, grid: Grid) -> Tensor:
    """Tokens b h w c; for each patch those in it, row by row, one after the other."""
    k = x.shape[1] // grid.height
    return torch.stack(
        [
            torch.cat([x[:, r * k + y, c * k + z] for y in range(k) for z in range(k)], dim=1)
            for r in range(grid.height)
            for c in range(grid.width)
        ],
        dim=1,
    )


# Partial reconstruction.


SELECTIONS: dict[str, Callable[[Mask, Grid, int, Tensor], Split]] = {
    "visible": lambda mask, grid, kept, noise: select_furthest(mask, grid, kept, noise, "visible"),
    "random start": lambda mask, grid, kept, noise: select_furthest(mask, grid, kept, noise, "random"),
    "random": lambda mask, grid, kept, noise: select_random(mask, kept, noise),
}


def small(recipe: Pretrain = MAE, backbone: tuple[str, dict[str, Any]] = VIT, **changes: Any) -> Pretrain:
    """A recipe at its smallest: 32 px are 16 patches of 8, four of which are visible."""
    model, arguments = backbone
    own: dict[str, Any] = dict(
        model=model,
        model_kwargs=arguments,
        input_size=(32,),
        mask_unit=0,
        decoder_depth=recipe.decoder_depth and 1,
        decoder_width=32,
        decoder_heads=2,
        hog_cell=4,
        batch_size=2,
        precision="fp32",
    )
    return replace(recipe, **{**own, **changes})


def tokens_of_layers(model: MIM) -> list[int]:
    """How many tokens each decoder layer is given, written down as the model runs."""
    seen: list[int] = []
    for decoder in model.decoders:
        for layer in decoder.layers:
            layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape[1]))
    return seen


# Models in segments.


BACKBONES = {
    "vit": ("vit_tiny_patch16_224", PLAIN, (32,)),
    "vit, clip": ("vit_base_patch16_clip_224", PLAIN, (32,)),
    "vit, rms norm": ("vit_tiny_patch16_224", {**PLAIN, "norm_layer": "rmsnorm"}, (32,)),
    "vit, registers, average": ("vit_medium_patch16_reg4_gap_256", PLAIN, (32,)),
    "swin": ("swin_tiny_patch4_window7_224", {"embed_dim": 24}, (64,)),
    "swin v2": ("swinv2_tiny_window8_256", {"embed_dim": 24}, (64,)),
    "convnext": ("convnext_atto", {}, (64,)),
    "pvt": ("pvt_v2_b0", {}, (64,)),
}


def in_segments(backbone: str = "vit", masking: str = "drop", **changes: Any) -> Pretrain:
    """Four segments, of which the later ones see less: of a ViT's 16 patches 8, 6, 4, 3, of the others' 4 2, 1, 1, 1."""
    model, arguments, size = BACKBONES[backbone]
    ratios = (0.5, 0.6, 0.7, 0.8) if "vit" in backbone else (0.5, 0.75, 0.75, 0.75)
    own = dict(
        model=model, model_kwargs=arguments, input_size=size, masking=masking, mask_ratio=ratios,
        decoder_depth=1, decoder_width=32, decoder_heads=2, data=str(PHOTOS), out="-", epochs=2, batch_size=4,
        workers=0, device="cpu", log_every=1,
    )  # fmt: skip
    return replace(BIM, **{**own, **changes})


KINDS = {
    "vit, drop": in_segments(),
    "vit, registers, drop": in_segments("vit, registers, average"),
    "vit, token": in_segments(masking="token"),
    "vit, pixel": in_segments(masking="pixel"),
    "swin, token": in_segments("swin", "token"),
    "swin, pixel": in_segments("swin", "pixel"),
    "convnext, pixel": in_segments("convnext", "pixel"),
}


def made(config: Pretrain, rate: float = 0.01) -> tuple[MIM, list[AdamW]]:
    """The model with its optimizers, always the same one."""
    torch.manual_seed(0)
    model = build(config).train()
    optimizers = make_optimizers(model, config)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
    return model, optimizers


def batches_of(config: Pretrain, step: int, accum: int) -> Iterator[Tensor]:
    """As the loop does: images, and a seed for their masks."""
    for micro in range(accum):
        torch.manual_seed(100 * step + micro)
        yield images_of(config, seed=100 * step + micro)


def of_segments(optimizers: list[AdamW]) -> list[list[nn.Parameter]]:
    return [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in optimizers]


def state_of(model: MIM, optimizers: list[AdamW]) -> Any:
    return model.state_dict(), [optimizer.state_dict() for optimizer in optimizers]


def first_modules(model: MIM) -> list[nn.Module]:
    """The first module of each of four segments."""
    backbone = model.encoder.backbone
    if hasattr(backbone, "stages"):
        return [backbone.stem, *backbone.stages[1:]]
    return list(backbone.blocks if hasattr(backbone, "blocks") else backbone.layers)


def owners_of(model: Any) -> dict[str, int]:
    """The segment that trains each parameter of a model or an encoder."""
    owners: dict[str, int] = {}
    count = len(model.decoders) if isinstance(model, MIM) else len(model.depths)
    for i in range(count):
        for part in model.parts(i):
            own = {part} if isinstance(part, nn.Parameter) else set(part.parameters())
            owners |= {name: i for name, p in model.named_parameters() if p in own}
    return owners


def fake_run(config: Pretrain, folder: Path) -> Pretrain:
    """A run folder with random weights, norms too, as if it had been trained."""
    config = replace(config, out=str(folder))
    torch.manual_seed(3)
    model = build(config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_json()))
    state = {"config": config.to_json(), "step": 7, "mean": [0.4] * config.channels, "std": [0.2] * config.channels}
    save(folder / "checkpoints" / "last.pt", {**state, "model": model.state_dict()})
    return config


def first_blocks(vit: Any, images: Tensor, depth: int, positions: Tensor | None = None) -> Tensor:
    """The tokens of a ViT after so many blocks."""
    x = vit.patch_embed.proj(images).flatten(2).transpose(1, 2)  # of any size
    own = vit.pos_embed if positions is None else positions
    n = x.shape[1]
    x = x + own[:, -n:]
    if vit.cls_token is not None:
        x = torch.cat([(vit.cls_token + own[:, :1]).expand(len(x), -1, -1), x], dim=1)
    if vit.reg_token is not None:
        x = torch.cat([vit.reg_token.expand(len(x), -1, -1), x], dim=1)
    x = vit.norm_pre(x)
    for block in vit.blocks[:depth]:
        x = block(x)
    return x


def three_classes(folder: Path) -> str:
    """A labelled folder: three classes of one photo each."""
    for part, name in product(("train", "val"), ("cat", "sheep", "macaw")):
        (folder / part / name).mkdir(parents=True)
        (folder / part / name / "1.jpg").symlink_to(PHOTOS / f"{name}.jpg")
    return str(folder)


# Growing models.

GROWING = {
    "vit": ("vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}, 32),
    "swin": ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": [1, 2, 1, 1]}, 64),
    "pvt": ("pvt_v2_b0", {"depths": [1, 1, 1, 1]}, 64),
}


def growing(tiny: Pretrain, name: str = "vit", **changes: object) -> Pretrain:
    """Two phases; the second half twice as large, in smaller batches."""
    model, arguments, size = GROWING[name]
    config = replace(
        FASTMIM_P,
        **{key: getattr(tiny, key) for key in ("data", "out", "workers", "device", "log_every", "show_every")},
        model=model,
        model_kwargs=arguments,
        input_size=(size,),
        hog_cell=4,
        decoder_depth=1,
        decoder_width=32,
        decoder_heads=2,
        epochs=4,
        blr=1e-2,
        batch_size=8,
        phase_scales=(1.0, 2.0),
        phase_starts=(0.0, 0.5),
        phase_batches=(8, 4),
        phase_accums=(1, 2),
    )
    return replace(config, **changes)


def throwing(tiny: Pretrain, **changes: Any) -> Pretrain:
    """FastMIM-P in two phases of 16 and 36 patches."""
    config = small(
        FASTMIM_P,
        **{key: getattr(tiny, key) for key in ("data", "out", "workers", "device", "log_every")},
        epochs=2,
        batch_size=8,
        phase_scales=(1.0, 1.5),
        phase_starts=(0.0, 0.5),
        throw=0.5,
    )
    return replace(config, **changes)
