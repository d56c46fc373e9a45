"""BIM: gradients that stop at borders, segments that step one by one, nested masks, several depths from one run."""

import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import asdict, replace
from itertools import accumulate, pairwise, product
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import AdamW

import leanmim.train
from leanmim.checkpoint import Run, initialise, load, load_backbone, restore, save
from leanmim.cli import main
from leanmim.config import Cost, Export, Knn, Pretrain, Probe, Report, Show
from leanmim.cost import StepCost, cost, count
from leanmim.data import IMAGENET, Crops, Normalise, collate, epoch_order, list_images, seed_of
from leanmim.decoder import sincos
from leanmim.encoders import Borders, as_tokens, create_backbone, cuts, make_encoder
from leanmim.errors import UserError
from leanmim.evaluate.features import latency
from leanmim.evaluate.knn import knn
from leanmim.evaluate.probe import probe
from leanmim.export import export
from leanmim.masking import Grid, Mask, cover, keep_all, narrower, random_fine_mask, random_mask, take
from leanmim.mim import MIM, build
from leanmim.offload import Offload
from leanmim.recipes import BIM, FASTMIM, FASTMIM_P, MAE
from leanmim.report import report
from leanmim.schedule import learning_rate, stages
from leanmim.show import predict, show
from leanmim.step import make_optimizers, parameter_groups, update
from leanmim.train import at_next_size, pretrain

PHOTOS = Path(__file__).parent.parent / "demo" / "photos"
PLAIN = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
BACKBONES = {
    "vit": ("vit_tiny_patch16_224", PLAIN, (32,)),
    "vit, clip": ("vit_base_patch16_clip_224", PLAIN, (32,)),
    "vit, rms norm": ("vit_tiny_patch16_224", {**PLAIN, "norm_layer": "rmsnorm"}, (32,)),
    "vit, registers, average": ("vit_medium_patch16_reg4_gap_256", PLAIN, (32,)),
    "swin": ("swin_tiny_patch4_window7_224", {"embed_dim": 24}, (64,)),
    "swin v2": ("swinv2_tiny_window8_256", {"embed_dim": 24}, (64,)),
    "convnext": ("convnext_atto", {}, (64,)),
}


def small(backbone: str = "vit", masking: str = "drop", **changes: Any) -> Pretrain:
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
    "vit, drop": small(),
    "vit, registers, drop": small("vit, registers, average"),
    "vit, token": small(masking="token"),
    "vit, pixel": small(masking="pixel"),
    "swin, token": small("swin", "token"),
    "swin, pixel": small("swin", "pixel"),
    "convnext, pixel": small("convnext", "pixel"),
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(config: Pretrain, rate: float = 0.01) -> tuple[MIM, list[AdamW]]:
    """The model with its optimizers, always the same one."""
    torch.manual_seed(0)
    model = build(config).train()
    optimizers = make_optimizers(model, config)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
    return model, optimizers


def images_of(config: Pretrain, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, config.channels, *config.size, generator=seeded(seed))


def batches(config: Pretrain, step: int, accum: int) -> Iterator[Tensor]:
    """As the loop does: images, and a seed for their masks."""
    for micro in range(accum):
        torch.manual_seed(100 * step + micro)
        yield images_of(config, seed=100 * step + micro)


def of_segments(optimizers: list[AdamW]) -> list[list[nn.Parameter]]:
    return [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in optimizers]


def equal(one: Any, two: Any) -> bool:
    """Tensors bit for bit, and whatever holds them."""
    if isinstance(one, Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(equal, one, two))
    return one == two


def state_of(model: MIM, optimizers: list[AdamW]) -> Any:
    return model.state_dict(), [optimizer.state_dict() for optimizer in optimizers]


# Masks and layouts in loops, to compare with.


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


def losses_by_hand(model: MIM, images: Tensor, masks: list[Mask]) -> list[Tensor]:
    """All graphs at once, cut by detach: drop for a ViT, token for Swin, pixel for ConvNeXt, patches as units."""
    encoder, backbone, grid = model.encoder, model.encoder.backbone, model.encoder.grid
    side, target = images.shape[2], model.target(images)
    hidden = [hidden_pixels(mask, grid, side) for mask in masks]
    every = torch.arange(grid.n).expand(len(images), -1)
    if hasattr(backbone, "blocks"):
        x = backbone.patch_embed(images) + backbone.pos_embed[:, 1:]
        x = torch.stack([row[ids] for row, ids in zip(x, masks[0].visible, strict=True)])
        x = torch.cat([(backbone.cls_token + backbone.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
        runs, norms = [[block] for block in backbone.blocks], [*encoder.norms, backbone.norm]
    elif hasattr(backbone, "layers"):
        x = backbone.patch_embed(images)
        x = torch.where(whole_squares(hidden[0], (side // 4, side // 4))[..., None], encoder.mask_token, x)
        runs, norms = [[stage] for stage in backbone.layers], [*encoder.borders.norms, backbone.norm]
    else:
        x = torch.where(hidden[0][:, None], encoder.colour[:, None, None], images)
        runs = [[stage] for stage in backbone.stages]
        runs[0].insert(0, backbone.stem)
        norms = [*encoder.borders.norms, nn.Identity()]
    losses = []
    for i, (run, norm, mask) in enumerate(zip(runs, norms, masks, strict=True)):
        x = x.detach() if i else x
        if i and hasattr(backbone, "blocks"):
            before = masks[i - 1].visible.tolist()
            stay = [
                [0] + [1 + old.index(patch) for patch in new]
                for old, new in zip(before, mask.visible.tolist(), strict=True)
            ]
            x = torch.stack([row[ids] for row, ids in zip(x, stay, strict=True)])
        elif i:
            first = hasattr(backbone, "stem")
            size = (x.shape[2], x.shape[3]) if first else (x.shape[1], x.shape[2])
            new = whole_squares(hidden[i], size) & ~whole_squares(hidden[i - 1], size)
            token = encoder.borders.tokens[i - 1]
            x = torch.where(new[:, None], token[:, None, None], x) if first else torch.where(new[..., None], token, x)
        for module in run:
            x = module(x)
        if hasattr(backbone, "blocks"):
            tokens, ids = norm(x), torch.cat([torch.full((len(x), 1), grid.n), mask.visible], dim=1)
        else:
            tokens = side_by_side(norm(x.permute(0, 2, 3, 1) if hasattr(backbone, "stem") else x), grid)
            ids = every
        ids, prediction = model.decoders[i](tokens, ids, keep_all(mask), grid)
        losses.append((prediction - take(target, ids)).square().mean())
    return losses


# Gradients.


@pytest.mark.parametrize("name", ["vit, drop", "swin, token", "convnext, pixel"])
def test_gradients_are_those_of_autograd_on_the_detached_graph(name: str) -> None:
    config = KINDS[name]
    model, _ = made(config)
    images = images_of(config)
    masks = model.nest(model.draw_mask(images))
    found = []
    for loss in model.losses(images, masks):
        loss.backward()
        found.append(loss.detach())
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    expected = losses_by_hand(model, images, masks)
    sum(expected).backward()
    assert equal(found, [loss.detach() for loss in expected])
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, gradients[key]), key


@pytest.mark.parametrize("name", KINDS)
def test_a_loss_reaches_its_own_segment_only_and_each_parameter_has_one(name: str) -> None:
    model, optimizers = made(KINDS[name])
    segments = of_segments(optimizers)
    for i, loss in enumerate(list(model.losses(images_of(KINDS[name])))):
        model.zero_grad()
        loss.backward()
        assert {id(p) for p in model.parameters() if p.grad is not None} == {id(p) for p in segments[i]}
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(trained) == sorted(id(p) for segment in segments for p in segment)


@pytest.mark.parametrize("name", ["vit, drop", "swin, token", "convnext, pixel"])
def test_what_enters_a_segment_has_no_history(name: str) -> None:
    config = replace(KINDS[name], mask_ratio=0.5)  # else a token of the segment's own comes in
    model, _ = made(config)
    seen = []
    for module in first_modules(model):
        module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].requires_grad))
    for loss in model.losses(images_of(config)):
        loss.backward()
    assert seen[1:] == [False] * 3


def first_modules(model: MIM) -> list[nn.Module]:
    """The first module of each of four segments."""
    backbone = model.encoder.backbone
    if hasattr(backbone, "stages"):
        return [backbone.stem, *backbone.stages[1:]]
    return list(backbone.blocks if hasattr(backbone, "blocks") else backbone.layers)


# Stepping as you go.


def all_at_the_end(
    losses: Callable[[Tensor], Iterator[Tensor]],
    optimizers: list[AdamW],
    images: Iterable[Tensor],
    accum: int,
    clip_grad: float,
) -> Tensor:
    """One backward pass over all graphs of a batch, one step of all optimizers."""
    means = 0.0
    for batch in images:
        found = list(losses(batch))
        (sum(found) / accum).backward()
        means = means + torch.stack(found).detach() / accum
    for optimizer, parameters in zip(optimizers, of_segments(optimizers), strict=True):
        if clip_grad:
            norm = torch.stack([p.grad.norm() for p in parameters]).norm()
            assert norm > clip_grad
            nn.utils.clip_grad_norm_(parameters, clip_grad)
        optimizer.step()
        optimizer.zero_grad()
    return means


@pytest.mark.parametrize(
    ("accum", "clip_grad", "autocast"),
    [(1, 0.0, None), (2, 0.0, None), (1, 0.05, None), (2, 0.05, torch.bfloat16)],
)
def test_stepping_as_you_go_is_stepping_at_the_end(accum: int, clip_grad: float, autocast: torch.dtype | None) -> None:
    config = small()
    model, optimizers = made(config)
    other, others = made(config)
    model.autocast = other.autocast = autocast
    for step in range(3):
        means = update(model, optimizers, batches(config, step, accum), accum, clip_grad)
        expected = all_at_the_end(other, others, batches(config, step, accum), accum, clip_grad)
        assert torch.equal(means, expected)
        assert equal(state_of(model, optimizers), state_of(other, others))
    assert not equal(model.state_dict(), made(config)[0].state_dict())


@pytest.mark.parametrize("accum", [1, 2])
def test_gradients_are_gone_before_the_next_segment_runs(accum: int) -> None:
    config = small()
    model, optimizers = made(config)
    segments, seen = of_segments(optimizers), []

    def before() -> None:
        seen.append([sum(p.grad is not None for p in segment) / len(segment) for segment in segments])

    for block in model.encoder.backbone.blocks:
        block.register_forward_pre_hook(lambda *_: before())
    update(model, optimizers, batches(config, 0, accum), accum)
    gone = [[float(j >= i) * (accum - 1) for j in range(4)] for i in range(4)]
    kept = [[float(j < i) for j in range(4)] for i in range(4)]
    assert seen == kept * (accum - 1) + gone
    assert all(p.grad is None for segment in segments for p in segment)


# Memory.


def peak_saved(model: MIM, losses: Iterable[Tensor]) -> int:
    """Bytes that autograd holds for the backward pass, at the most, weights aside; ``losses`` runs it all."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = {"now": 0, "peak": 0}

    def drop(size: int) -> None:
        held["now"] -= size

    def pack(tensor: Tensor) -> Tensor:
        kept = tensor.detach()
        if tensor.untyped_storage().data_ptr() not in weights:
            size = tensor.numel() * tensor.element_size()
            held["now"] += size
            held["peak"] = max(held.values())
            weakref.finalize(kept, drop, size)
        return kept

    with saved_tensors_hooks(pack, lambda kept: kept):
        for loss in losses:
            loss.backward()
            del loss
    assert held["now"] == 0
    return held["peak"]


@pytest.mark.parametrize("name", ["vit, drop", "vit, token"])
def test_only_one_segments_graph_is_alive(name: str) -> None:
    config = replace(KINDS[name], mask_ratio=0.5)
    model, _ = made(config)
    images = images_of(config)
    mask = model.draw_mask(images)
    one_by_one = peak_saved(model, model.losses(images, mask))
    summed = peak_saved(model, (sum(model.losses(images, mask)) for _ in range(1)))
    assert one_by_one < 0.3 * summed


@pytest.mark.parametrize("name", ["vit, drop", "vit, token"])
def test_predictions_and_losses_end_before_the_next_segment_runs(name: str) -> None:
    model, _ = made(KINDS[name])
    alive: list[weakref.ref] = []
    seen = []
    for block, decoder in zip(model.encoder.backbone.blocks, model.decoders, strict=True):
        block.register_forward_pre_hook(lambda *_: seen.append([reference() is not None for reference in alive]))
        decoder.register_forward_hook(lambda _, __, result: alive.append(weakref.ref(result[1])))
    for loss in model.losses(images_of(KINDS[name])):
        loss.backward()
    assert seen == [[False] * i for i in range(4)]


def counted(device: str = "cpu", depth: int = 8, **changes: Any) -> tuple[StepCost, Any]:
    arguments = {"patch_size": 8, "embed_dim": 64, "depth": depth, "num_heads": 2}
    config = replace(
        MAE, model="vit_tiny_patch16_224", model_kwargs=arguments, input_size=(64,), decoder_width=64, decoder_heads=2,
        batch_size=8, **changes,
    )  # fmt: skip
    return count(config, device)


def test_four_segments_hold_a_quarter_of_what_mae_holds() -> None:
    mae, _ = counted()
    bim, _ = counted(segments=4, decoder_depth=2)
    assert bim.saved_bytes < 0.31 * mae.saved_bytes
    assert bim.gradient_bytes < 0.3 * mae.gradient_bytes
    assert bim.encoder_parameters == mae.encoder_parameters + 3 * 2 * 64  # a norm at each border
    recipe, _ = counted(segments=BIM.segments, mask_ratio=BIM.mask_ratio, decoder_depth=BIM.decoder_depth)
    assert recipe.saved_bytes < 0.25 * mae.saved_bytes and recipe.train_flops_per_image < mae.train_flops_per_image


# Nested masks.


def nested(ratios: tuple[float, ...], unit: int = 1, finer: int = 1, batch: int = 8) -> tuple[Grid, list[Mask]]:
    """As a model makes them, on a grid of 4 x 6."""
    config = small(masking="pixel" if finer > 1 else "drop", input_size=(32, 48), segments=len(ratios))
    model = build(replace(config, mask_ratio=ratios, mask_unit=8 * unit // finer, depth=len(ratios)))
    return model.encoder.grid, model.nest(model.draw_mask(images_of(config, batch)))


@pytest.mark.parametrize(("unit", "counts"), [(1, (12, 9, 6, 4)), (2, (12, 8, 4, 4))])
def test_later_masks_see_some_of_what_earlier_ones_see(unit: int, counts: tuple[int, ...]) -> None:
    grid, masks = nested((0.5, 0.61, 0.75, 0.8), unit)
    for mask, visible in zip(masks, counts, strict=True):
        assert mask.hidden is None and mask.visible.shape == (8, visible)
        for seen, hidden in zip(mask.visible.tolist(), mask.masked.tolist(), strict=True):
            assert sorted(seen + hidden) == list(range(grid.n))
            units = {(y // unit, x // unit) for y, x in (divmod(patch, grid.width) for patch in seen)}
            assert len(seen) == len(units) * unit**2
    for earlier, later in pairwise(masks):
        for seen, fewer in zip(earlier.visible.tolist(), later.visible.tolist(), strict=True):
            assert set(fewer) <= set(seen)
            assert fewer == [patch for patch in seen if patch in fewer]  # in the same order


def test_later_fine_masks_hide_what_earlier_ones_hide() -> None:
    grid, masks = nested((0.5, 0.61, 0.75, 0.8), finer=2)
    for mask, hidden in zip(masks, (48, 59, 72, 77), strict=True):
        assert mask.hidden.shape == (8, 8, 12)
        assert mask.hidden.sum((1, 2)).tolist() == [hidden] * 8
        assert mask.visible.shape == (8, 0) and mask.masked.tolist() == [list(range(grid.n))] * 8
    for earlier, later in pairwise(masks):
        assert (earlier.hidden <= later.hidden).all()


@pytest.mark.parametrize("finer", [1, 2])
def test_what_stays_visible_is_chosen_uniformly(finer: int) -> None:
    """Of 8 visible places 4 stay: each of them half the time, each two of them together 3 times of 14."""
    trials, grid = 20_000, Grid(4, 4 // finer)
    noise = torch.rand(trials, 16 if finer == 1 else 32, generator=seeded(0))
    torch.manual_seed(0)
    if finer == 1:
        first = random_mask(noise, grid, 0.5)
        second = narrower(first, grid, 0.75)
        before, after = (
            torch.zeros(trials, 16, dtype=torch.bool).scatter(1, mask.visible, True) for mask in (first, second)
        )
    else:
        first = random_fine_mask(noise, grid, 0.75, 2)
        second = narrower(first, grid, 0.875)
        before, after = (~mask.hidden.flatten(1) for mask in (first, second))
    assert (before.sum(1) == 8).all() and (after.sum(1) == 4).all()
    before, after = before.double(), after.double()
    both, stay = before.T @ before, after.T @ after
    p = torch.where(torch.eye(len(both), dtype=torch.bool), 4 / 8, 4 * 3 / (8 * 7))
    assert ((stay / both - p).abs() < 5 * (p * (1 - p) / both).sqrt()).all()


def test_a_constant_ratio_changes_nothing() -> None:
    for ratio in (0.5, (0.5,) * 4):
        model = build(small(mask_ratio=ratio))
        masks = model.nest(model.draw_mask(torch.zeros(2, 3, 32, 32)))
        assert len(masks) == 4 and all(mask is masks[0] for mask in masks)
    _, fine = nested((0.5, 0.5), finer=2)
    assert fine[1] is fine[0]
    _, masks = nested((0.25, 0.5, 0.5, 0.75))
    assert masks[2] is masks[1] and [mask.visible.shape[1] for mask in masks] == [18, 12, 12, 6]
    assert len(build(small(masking="token", mask_ratio=(0.5,) * 4)).encoder.tokens) == 0
    assert len(build(small("swin", "token", mask_ratio=0.5)).encoder.borders.tokens) == 0


@pytest.mark.parametrize("name", ["vit, drop", "vit, registers, drop"])
def test_segments_see_the_visible_tokens_in_order(name: str) -> None:
    """Blocks that do nothing let the tokens through; positions tell them apart."""
    model, _ = made(KINDS[name])
    encoder, backbone = model.encoder, model.encoder.backbone
    images = images_of(KINDS[name])
    masks = model.nest(model.draw_mask(images))
    tokens = backbone.patch_embed(images)
    tokens = tokens + backbone.pos_embed[:, -16:]
    backbone.blocks = nn.Sequential(*(nn.Identity() for _ in range(4)))
    entered: list[Tensor] = []
    decoded: list[tuple[Any, ...]] = []
    for block, decoder in zip(backbone.blocks, model.decoders, strict=True):
        block.register_forward_pre_hook(lambda _, arguments: entered.append(arguments[0]))
        decoder.register_forward_pre_hook(lambda _, arguments: decoded.append(arguments))
    list(model.losses(images, masks))
    for i, (mask, x, (read, ids, split, _)) in enumerate(zip(masks, entered, decoded, strict=True)):
        assert x.shape[1] == encoder.prefix + (8, 6, 4, 3)[i]
        for row in range(2):
            for place, patch in enumerate(mask.visible[row].tolist(), start=encoder.prefix):
                assert torch.equal(x[row, place], tokens[row, patch])
            prefix = range(16, 16 + encoder.prefix)
            assert ids[row].tolist() == [*prefix, *mask.visible[row].tolist()]
            assert split.kept[row].tolist() == mask.masked[row].tolist()
        assert torch.equal(x[:, : encoder.prefix], entered[0][:, : encoder.prefix])
        assert torch.equal(read, encoder.closing_norm(i)(x))


FULL = {name: config for name, config in KINDS.items() if config.masking != "drop"} | {
    "vit, pixel, fine": small(masking="pixel", mask_unit=4),
    "convnext, wide": small("convnext", "pixel", input_size=(64, 96)),
    "convnext, fine": small("convnext", "pixel", mask_unit=16, mask_ratio=(0.5, 0.6, 0.75, 0.9)),
    "convnext, finer": small("convnext", "pixel", mask_unit=8, mask_ratio=(0.5, 0.6, 0.75, 0.95)),
}


@pytest.mark.parametrize("name", FULL)
def test_a_token_hides_what_is_newly_masked_and_nothing_else(name: str) -> None:
    config = FULL[name]
    model, _ = made(config)
    encoder, images = model.encoder, images_of(config)
    masks = model.nest(model.draw_mask(images))
    firsts, entered, left = first_modules(model), [], []
    lasts = [encoder.backbone.stages[0], *firsts[1:]] if hasattr(encoder.backbone, "stages") else firsts
    for first, last in zip(firsts, lasts, strict=True):
        first.register_forward_pre_hook(lambda _, arguments: entered.append(arguments[0].detach()))
        last.register_forward_hook(lambda _, __, result: left.append(result.detach()))
    list(model.losses(images, masks))
    hidden = [hidden_pixels(mask, encoder.grid, images.shape[2]) for mask in masks]
    replaced = 0
    for i in (1, 2, 3):
        before, after = left[i - 1], entered[i]
        token = (encoder.tokens if before.ndim == 3 else encoder.borders.tokens)[i - 1].flatten()
        if before.ndim == 3:  # one row of tokens, prefix first
            assert torch.equal(before[:, : encoder.prefix], after[:, : encoder.prefix])
            before, after = (x[:, encoder.prefix :].unflatten(1, encoder.grid) for x in (before, after))
        elif "convnext" in name:
            before, after = before.permute(0, 2, 3, 1), after.permute(0, 2, 3, 1)
        size = (before.shape[1], before.shape[2])
        new = whole_squares(hidden[i], size) & ~whole_squares(hidden[i - 1], size)
        assert torch.equal(after[new], token.expand(int(new.sum()), -1))
        assert torch.equal(after[~new], before[~new])
        assert not torch.equal(after[new], before[new]) or not new.any()
        replaced += int(new.sum())
    assert replaced


@pytest.mark.parametrize("layout", ["tokens", "NHWC", "NCHW"])
def test_borders_know_the_layouts(layout: str) -> None:
    grid, noise = Grid(2, 3), torch.rand(2, 6, generator=seeded(0))
    borders = Borders(grid, (5, 7), (4, 2), narrows=True)
    before = random_mask(noise, grid, 0.3)
    after = narrower(before, grid, 0.8)
    x = torch.randn(2, 4, 6, 7)
    given = {"tokens": x.flatten(1, 2), "NHWC": x, "NCHW": x.permute(0, 3, 1, 2)}[layout]
    found = borders.narrow(2, given, before, after, layout == "NHWC")
    assert found.shape == given.shape
    if layout != "NHWC":
        found = found.view_as(x) if layout == "tokens" else found.permute(0, 2, 3, 1)
    for b, r, c in product(range(2), range(4), range(6)):
        patch = r // 2 * 3 + c // 2
        new = patch in after.masked[b].tolist() and patch in before.visible[b].tolist()
        assert torch.equal(found[b, r, c], borders.tokens[1] if new else x[b, r, c])


@pytest.mark.parametrize("size", [(6, 4), (12, 8), (18, 4), (3, 2), (2, 4), (1, 1), (6, 12)])
def test_cover_against_loops(size: tuple[int, int]) -> None:
    hidden = torch.rand(5, 6, 4, generator=seeded(0)) < 0.7
    hidden[0], hidden[1, :3] = True, True
    pixels = torch.kron(hidden.int(), torch.ones(1, 6, 6, dtype=torch.int)).bool()
    assert torch.equal(cover(hidden, size), whole_squares(pixels, size))


# Backbones in segments.


def test_borders_lay_the_tokens_of_a_patch_side_by_side() -> None:
    grid = Grid(2, 3)
    borders = Borders(grid, (5, 7), (4, 2), narrows=False)
    for i, (k, width) in enumerate(((4, 5), (2, 7))):
        nn.init.normal_(borders.norms[i].weight)
        x = torch.randn(2, 2 * k, 3 * k, width)
        expected = side_by_side(borders.norms[i](x), grid)
        assert torch.equal(borders.read(i, x.flatten(1, 2)), expected)
        assert expected.shape == (2, 6, width * k**2)


FAMILIES = {
    "resnet18": {}, "efficientnet_b0": {}, "pvt_v2_b0": {}, "mobilevit_xxs": {}, "convnext_atto": {},
    "swin_tiny_patch4_window7_224": {"embed_dim": 24}, "regnetx_002": {},
}  # fmt: skip


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_segments_one_after_the_other_are_the_backbone(name: str, equal: bool) -> None:
    backbone = create_backbone(name, (64, 64), 3, **FAMILIES[name])
    first = len(backbone.feature_info) - 3  # some families count their stem as a stage
    segments = 4 if equal else (first, first + 3)
    encoder = make_encoder(backbone, "pixel", (64, 64), segments=segments).eval()
    x = images = torch.randn(2, 3, 64, 64)
    ends = range(4 if equal else 2)
    with torch.no_grad():
        for i in ends:
            x = encoder.segment(i, x)
            tokens = encoder.read(i, x)
            assert tokens.shape == (2, 4, encoder.widths[i])
            if i < ends[-1]:
                assert x.shape[1:] != backbone.forward_features(images).shape[1:]
                rows = x if getattr(backbone, "output_fmt", "NCHW") == "NHWC" else x.permute(0, 2, 3, 1)
                assert torch.equal(tokens, side_by_side(encoder.borders.norms[i](rows), Grid(2, 2)))
        assert torch.equal(x, backbone.forward_features(images))
    assert encoder.depths[-1] == len(backbone.feature_info)
    assert encoder.depths == (tuple(range(first, first + 4)) if equal else segments)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "pvt_v2_b0", "convnext_atto"])
def test_every_parameter_is_trained_by_the_optimizer_of_one_segment(name: str) -> None:
    config = replace(small("convnext", "pixel", mask_ratio=(0.4, 0.5, 0.6, 0.7)), model=name, mask_unit=16)
    model, optimizers = made(config)
    names = [key for key, p in model.named_parameters() if p.requires_grad]
    segments = of_segments(optimizers)
    assert sum(map(len, segments)) == len(names)
    assert len({id(p) for segment in segments for p in segment}) == len(names)
    before = deepcopy(dict(model.named_parameters()))
    for step in range(2):
        update(model, optimizers, [images_of(config, 4, step)])
    changed = [key for key, p in model.named_parameters() if not torch.equal(p, before[key])]
    assert changed == names
    assert set(names) >= {f"encoder.borders.{part}" for part in ("tokens.2", "norms.2.weight", "norms.0.bias")}


@pytest.mark.parametrize(
    ("name", "size", "arguments"),
    [
        ("hiera_tiny_224", 224, {"embed_dim": 24}),
        ("twins_svt_small", 64, {}),
        ("deit_tiny_distilled_patch16_224", 32, {"depth": 4, "embed_dim": 24, "num_heads": 2}),
        ("beit_base_patch16_224", 32, {"depth": 4, "embed_dim": 24, "num_heads": 2}),
    ],
)
def test_families_whose_stages_do_not_follow_each_other_are_refused(
    name: str, size: int, arguments: dict[str, int]
) -> None:
    backbone = create_backbone(name, (size, size), 3, **arguments)
    with pytest.raises(UserError, match=r"cannot be cut into segments.*use --segments 1"):
        make_encoder(backbone, "pixel", (size, size), segments=2)
    assert make_encoder(backbone, "pixel", (size, size), segments=1).depths == (4,)


# Mistakes.


@pytest.mark.parametrize("segments", [0, -1, 3, 5, 8])
def test_segments_that_do_not_divide_the_blocks(segments: int) -> None:
    with pytest.raises(UserError, match=rf"--segments: 4 blocks.* {segments} equal segments; possible: ") as error:
        build(small(segments=segments, mask_ratio=0.5))
    possible = json.loads(str(error.value).split("possible: ")[1])
    assert possible == [1, 2, 4]
    for count_ in possible:
        assert len(build(small(segments=count_, mask_ratio=0.5)).decoders) == count_


@pytest.mark.parametrize("segments", [(), (2,), (2, 2, 4), (3, 1, 4), (0, 4), (-1, 4), (2, 5), (4, 2)])
def test_cuts_that_do_not_rise_to_the_last_block(segments: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"--segments.*4 blocks: give rising numbers of which the last is 4"):
        build(small(segments=segments, mask_ratio=0.5))
    with pytest.raises(UserError, match=r"4 stages: give rising numbers of which the last is 4"):
        build(small("swin", "token", segments=segments, mask_ratio=0.5))


def test_cuts_are_the_ends_of_segments() -> None:
    assert cuts(4, 12) == (3, 6, 9, 12)
    assert cuts((1, 5, 12), 12) == (1, 5, 12)
    assert build(small(segments=(1, 4), mask_ratio=0.5)).encoder.depths == (1, 4)
    assert build(small("convnext", "pixel", segments=(2, 4), mask_ratio=0.5)).encoder.depths == (2, 4)
    resnet = replace(small("convnext", "pixel", mask_ratio=0.5), model="resnet10t")  # timm counts its stem
    assert build(replace(resnet, segments=2)).encoder.depths == (3, 5)
    assert build(replace(resnet, segments=(2, 5))).encoder.depths == (2, 5)
    with pytest.raises(UserError, match=r"4 stages, 2 to 5: give rising numbers of which the last is 5"):
        build(replace(resnet, segments=(1, 4)))


def test_ratios_that_fall() -> None:
    with pytest.raises(UserError, match=r"--mask-ratio 0\.5 0\.75 0\.7 0\.8 falls.*stay or rise"):
        build(small(mask_ratio=(0.5, 0.75, 0.7, 0.8)))
    build(small(mask_ratio=(0.5, 0.7, 0.75, 0.8)))


@pytest.mark.parametrize("ratios", [(0.5,) * 3, (0.5,) * 5])
def test_another_number_of_ratios_than_of_segments(ratios: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match=f"--mask-ratio gives {len(ratios)} numbers for 4 segments; give one"):
        build(small(mask_ratio=ratios))
    assert build(small(mask_ratio=ratios[:1])).mask_ratios == (0.5,) * 4


def test_two_ratios_are_the_ends_of_equal_steps() -> None:
    assert build(small(mask_ratio=(0.5, 0.8))).mask_ratios == (0.5, 0.6, 0.7, 0.8)
    assert build(small(segments=2, mask_ratio=(0.5, 0.8))).mask_ratios == (0.5, 0.8)
    for segments in (2, 3, 4, 6, 12):  # the recipe's own go with all
        ratios = build(replace(BIM, model_kwargs=PLAIN | {"depth": 12}, segments=segments)).mask_ratios
        assert len(ratios) == segments and ratios[0] == 0.72 and ratios[-1] == 0.78
    assert build(replace(BIM, model_kwargs=PLAIN)).mask_ratios == (0.72, 0.74, 0.76, 0.78)
    with pytest.raises(UserError, match="2 numbers for 1 segments"):
        build(small(segments=1, mask_ratio=(0.5, 0.6)))


def test_no_ratio_at_all() -> None:
    with pytest.raises(UserError, match=r"--mask-ratio takes one number, one for each segment, or"):
        build(small(mask_ratio=()))


@pytest.mark.parametrize("masking", ["drop", "token", "pixel"])
def test_a_later_segment_that_would_see_nothing(masking: str) -> None:
    with pytest.raises(UserError, match=r"--mask-ratio 0\.97 masks 16 of 16 units; choose it between") as error:
        build(small(masking=masking, mask_ratio=(0.5, 0.6, 0.7, 0.97)))
    low, high = map(float, re.findall(r"between ([\d.]+) and ([\d.]+)", str(error.value))[0])
    build(small(masking=masking, mask_ratio=(low, 0.6, 0.7, high)))


def test_offload_of_a_single_segment() -> None:
    for segments in (1, (1,)):
        with pytest.raises(UserError, match=r"--offload.*give --segments, or leave it out"):
            build(small(segments=segments, mask_ratio=0.5, offload=True))
    build(small(segments=2, mask_ratio=0.5, offload=True))
    build(small(segments=1, mask_ratio=0.5))


# Several depths.


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
    state = {"config": config.to_json(), "step": 7, "mean": [0.4] * 3, "std": [0.2] * 3, "model": model.state_dict()}
    save(folder / "checkpoints" / "last.pt", state)
    return config


def loaded(folder: Path, config: Pretrain) -> tuple[Any, dict[str, Any]]:
    """What timm makes of an export, strictly, and what is written about it."""
    description = json.loads((folder / "config.json").read_text())
    model = timm.create_model(
        config.model, num_classes=0, **description["model_args"], checkpoint_path=str(folder / "model.safetensors")
    )
    return model.eval(), description


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


@pytest.mark.parametrize("name", [name for name in BACKBONES if "vit" in name])
def test_exported_depths_of_a_vit_are_its_first_blocks_and_the_segments_norm(name: str, tmp_path: Path) -> None:
    config = fake_run(small(name, segments=(1, 2, 4), mask_ratio=0.5), tmp_path / "run")
    folder = export(Export(config.out, all_depths=True, out=str(tmp_path / "all")))
    assert {path.name for path in folder.iterdir()} == {"depth1", "depth2", "depth4"}
    _, trained, _ = restore(config.out)
    trained.eval()
    vit, images = trained.encoder.backbone, images_of(config)
    average = name == "vit, registers, average"
    norms = [*trained.encoder.norms, vit.fc_norm if average else vit.norm]
    for depth, norm in zip((1, 2, 4), norms, strict=True):
        model, description = loaded(folder / f"depth{depth}", config)
        assert len(model.blocks) == depth
        assert [block.attn.num_heads for block in model.blocks] == [2] * depth
        assert "not_pretrained" not in description["leanmim"]
        tokens = first_blocks(vit, images, depth)
        if average:
            assert torch.allclose(model(images), norm(tokens[:, 4:].mean(1)), atol=1e-6)
        else:
            assert torch.allclose(model(images), norm(tokens)[:, 0], atol=1e-6)
            assert torch.allclose(model.forward_features(images), norm(tokens), atol=1e-6)
        last = model.fc_norm if average else model.norm
        assert last.eps == norm.eps
        one, _, _ = load_backbone(config.out, depth=depth)
        assert equal(one.state_dict(), model.state_dict())
    one = export(Export(config.out, depth=2))
    assert one == tmp_path / "run" / "export" / "timm-depth2"
    local = timm.create_model(f"local-dir:{one}", pretrained=True)
    assert equal(local.state_dict(), loaded(folder / "depth2", config)[0].state_dict())


def test_all_depths_go_into_the_run_folder_by_default(tmp_path: Path) -> None:
    config = fake_run(small(segments=2, mask_ratio=0.5), tmp_path / "run")
    assert export(Export(config.out, all_depths=True)) == tmp_path / "run" / "export"
    assert {path.name for path in (tmp_path / "run" / "export").iterdir()} == {"timm-depth2", "timm-depth4"}
    export(Export(config.out, all_depths=True))  # again: what leanmim wrote there it may write anew
    taken = tmp_path / "all" / "depth4"
    taken.mkdir(parents=True)
    (taken / "mine").touch()
    with pytest.raises(UserError, match="depth4' is not empty; choose another --out, or --overwrite"):
        export(Export(config.out, all_depths=True, out=str(tmp_path / "all")))
    assert not (tmp_path / "all" / "depth2").exists()  # it said so before it wrote anything
    export(Export(config.out, all_depths=True, out=str(tmp_path / "all"), overwrite=True))
    with pytest.raises(UserError, match=r"--all-depths: --format transformers.*use --format timm"):
        export(Export(config.out, all_depths=True, format="transformers"))
    with pytest.raises(UserError, match="--depth and --all-depths: give one"):
        export(Export(config.out, all_depths=True, depth=2))
    with pytest.raises(UserError, match=r"--depth: --format transformers.*use --format timm"):
        export(Export(config.out, format="transformers", depth=2))


@pytest.mark.parametrize(
    ("backbone", "masking", "ends"),
    [("swin", "token", (1, 3, 4)), ("swin", "pixel", (2, 4)), ("swin v2", "pixel", (1, 2, 4))],
)
def test_exported_depths_of_a_swin_are_its_first_stages_and_the_borders_norm(
    backbone: str, masking: str, ends: tuple[int, ...], tmp_path: Path
) -> None:
    config = fake_run(small(backbone, masking, segments=ends, mask_ratio=0.5), tmp_path / "run")
    folder = export(Export(config.out, all_depths=True, out=str(tmp_path / "all")))
    assert {path.name for path in folder.iterdir()} == {f"depth{end}" for end in ends}
    _, trained, _ = restore(config.out)
    swin, images = trained.eval().encoder.backbone, images_of(config)
    for depth, norm in zip(ends, [*trained.encoder.borders.norms, swin.norm], strict=True):
        model, description = loaded(folder / f"depth{depth}", config)
        assert [len(stage.blocks) for stage in model.layers] == [2, 2, 6, 2][:depth]
        heads = [[block.attn.num_heads for block in stage.blocks] for stage in swin.layers[:depth]]
        assert [[block.attn.num_heads for block in stage.blocks] for stage in model.layers] == heads
        expected = norm(swin.layers[:depth](swin.patch_embed(images)))
        assert torch.allclose(model.forward_features(images), expected, atol=1e-6)
        assert model.norm.eps == norm.eps
        assert "not_pretrained" not in description["leanmim"]


def test_exported_depths_of_a_convnext_are_whole_and_say_what_is_fresh(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = fake_run(small("convnext", "pixel", segments=(2, 4), mask_ratio=0.5), tmp_path / "run")
    folder = export(Export(config.out, all_depths=True, out=str(tmp_path / "all")))
    _, trained, _ = restore(config.out)
    convnext, images = trained.eval().encoder.backbone, images_of(config)
    own = convnext.state_dict()

    model, description = loaded(folder / "depth4", config)
    assert "not_pretrained" not in description["leanmim"] and equal(model.state_dict(), own)

    model, description = loaded(folder / "depth2", config)
    fresh = description["leanmim"]["not_pretrained"]
    assert description["leanmim"]["depth"] == 2
    assert "does not build convnext_atto shorter" in capsys.readouterr().err
    later = {key for key in own if key.startswith(("stages.2.", "stages.3."))}
    assert later <= set(fresh) <= later | {"head.norm.weight", "head.norm.bias"}
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in own.items() if key not in fresh)
    assert not any(torch.equal(state[key], own[key]) for key in later)

    ours, _, _ = load_backbone(config.out, depth=2)  # leanmim knows the norm, for which timm's model has no place
    tokens = convnext.stages[:2](convnext.stem(images)).flatten(2).transpose(1, 2)
    expected = trained.encoder.borders.norms[0](tokens)
    assert torch.allclose(ours.forward_features(images), expected, atol=1e-6)
    assert torch.allclose(ours(images), expected.mean(1), atol=1e-6)


@pytest.mark.parametrize(("backbone", "masking"), [("vit", "drop"), ("swin", "pixel"), ("convnext", "pixel")])
def test_depths_of_a_run_of_the_first_layers(backbone: str, masking: str, tmp_path: Path) -> None:
    """--depth in pre-training, and again in the export."""
    config = fake_run(small(backbone, masking, depth=3, segments=3, mask_ratio=0.5), tmp_path / "run")
    _, trained, _ = restore(config.out)
    own = trained.encoder.backbone.state_dict()
    for depth in (2, 3):
        model, description = loaded(export(Export(config.out, depth=depth)), config)
        fresh = description["leanmim"].get("not_pretrained", [])
        whole = depth == 3 or backbone == "convnext"  # those that timm builds shorter are shorter
        assert len(getattr(model, PARTS[backbone])) == (4 if whole else 2)
        assert description["leanmim"].get("depth") == (depth if whole else None)
        later = tuple(f"{PARTS[backbone]}.{i}." for i in range(depth, 4))
        assert {key for key in fresh if "norm" not in key.split(".")[:2]} == {
            key for key in model.state_dict() if key.startswith(later)
        }
        norms = ("norm.", "head.norm.") if depth == 2 else ()  # the segment's own
        for key, value in model.state_dict().items():
            assert key in fresh or key.startswith(norms) or torch.equal(value, own[key]), key


PARTS = {"vit": "blocks", "swin": "layers", "convnext": "stages"}


def test_depths_go_to_another_size(tmp_path: Path) -> None:
    config = fake_run(small(), tmp_path / "vit")
    _, trained, _ = restore(config.out)
    vit, images = trained.eval().encoder.backbone, torch.randn(2, 3, 48, 64)
    positions = nn.functional.pad(sincos(Grid(6, 8), 32), (0, 0, 1, 0))[None]
    for depth in (1, 3):
        ours, _, _ = load_backbone(config.out, (48, 64), depth)
        expected = trained.encoder.norms[depth - 1](first_blocks(vit, images, depth, positions))
        assert torch.allclose(ours.forward_features(images), expected, atol=1e-6)

    config = fake_run(small("convnext", "pixel"), tmp_path / "convnext")
    _, trained, _ = restore(config.out)
    backbone, images = trained.eval().encoder.backbone, torch.randn(2, 3, 96, 64)
    ours, _, _ = load_backbone(config.out, (96, 64), 2)
    x = backbone.stages[1](backbone.stages[0](backbone.stem(images))).flatten(2).transpose(1, 2)
    assert torch.allclose(ours.forward_features(images), trained.encoder.borders.norms[1](x), atol=1e-6)

    config = fake_run(small("swin", "token"), tmp_path / "swin")
    _, trained, _ = restore(config.out)
    ours, _, _ = load_backbone(config.out, (128, 64), 3)
    assert len(ours.layers) == 3 and ours(torch.randn(1, 3, 128, 64)).shape == (1, 96)
    assert equal(ours.norm.state_dict(), trained.encoder.borders.norms[2].state_dict())


def test_a_depth_at_which_no_segment_ends(tmp_path: Path) -> None:
    config = fake_run(small(segments=(1, 2, 4), mask_ratio=0.5), tmp_path / "run")
    for depth in (0, 3, 5):
        for call in (
            lambda depth=depth: export(Export(config.out, depth=depth)),
            lambda depth=depth: load_backbone(config.out, depth=depth),
            lambda depth=depth: next(knn(Knn(config.out, str(PHOTOS), depth=depth))),
        ):
            with pytest.raises(UserError, match=rf"--depth {depth}:.* end at 1, 2, 4; choose one of these"):
                call()


# A run.


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Pretrain:
    """Two segments, eight steps."""
    out = tmp_path_factory.mktemp("bim") / "run"
    config = small(segments=2, mask_ratio=(0.5, 0.75), out=str(out), blr=0.1)
    pretrain(config)
    return config


@pytest.fixture
def labelled(tmp_path: Path) -> str:
    """Three classes of one photo each."""
    for part, name in product(("train", "val"), ("cat", "sheep", "macaw")):
        (tmp_path / "labelled" / part / name).mkdir(parents=True)
        (tmp_path / "labelled" / part / name / "1.jpg").symlink_to(PHOTOS / f"{name}.jpg")
    return str(tmp_path / "labelled")


def lines(config: Pretrain) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Run(Path(config.out)).metrics.read_text().splitlines()]


def test_metrics_have_a_loss_for_each_segment(trained: Pretrain) -> None:
    written = lines(trained)
    assert [line["step"] for line in written] == list(range(1, 9))
    for line in written:
        losses = [line[key] for key in sorted(line) if key.startswith("loss_")]
        assert [key for key in sorted(line) if key.startswith("loss_")] == ["loss_0", "loss_1"]
        assert line["loss"] == pytest.approx(sum(losses) / 2) and all(0 < loss < 10 for loss in losses)


def test_show_draws_the_segment_asked_for(trained: Pretrain, tmp_path: Path) -> None:
    pictures = []
    for block in (0, 1, None):
        out = str(tmp_path / f"{block}.png")
        pictures.append(show(Show(trained.out, count=1, out=out, block=block)).read_bytes())
        assert pictures[-1].startswith(b"\x89PNG")
    whole = (Path(trained.out) / "reconstructions.png").read_bytes()
    assert show(Show(trained.out, count=1, block=0)) == Path(trained.out) / "reconstructions-block0.png"
    assert (Path(trained.out) / "reconstructions.png").read_bytes() == whole  # the run's own, as in the report
    assert pictures[0] != pictures[1] == pictures[2]
    for block in (-1, 2):
        with pytest.raises(UserError, match=f"--block {block}: this run has 2 segments, 0 to 1"):
            show(Show(trained.out, count=1, block=block))


def test_a_reconstruction_is_the_work_of_its_own_decoder() -> None:
    config = small(segments=2, mask_ratio=0.5)
    model, _ = made(config)
    images = images_of(config)
    masks = model.nest(model.draw_mask(images))
    before = [predict(model, images, masks, block=i) for i in range(2)]
    nn.init.zeros_(model.decoders[1].head.weight)
    nn.init.zeros_(model.decoders[1].head.bias)
    assert before[0].any() and torch.equal(predict(model, images, masks, block=0), before[0])
    assert before[1].any() and not predict(model, images, masks, block=1).any()


def test_depths_are_evaluated_and_compared_in_the_report(
    trained: Pretrain, labelled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leanmim.evaluate.features.latency", lambda embed, image: 0.25)
    title = "Accuracy against depth"
    run = Run(Path(trained.out))
    options = dict(run=trained.out, data=labelled, device="cpu", workers=0, k=1)
    assert title not in (run.folder / "report.html").read_text()
    assert list(knn(Knn(**options, depth=2))) == [("pretrained", 1.0)]  # each image finds itself
    assert title not in report(Report((trained.out,))).read_text()
    assert dict(knn(Knn(**options, baselines=True)))["pretrained"] == 1.0
    page = report(Report((trained.out,))).read_text()
    assert title in page and "kNN (%) against depth" in page and "linear probe (%) against depth" not in page
    for depth in (2, 4):
        ((name, accuracy),) = probe(Probe(**options, solver="fast", depth=depth))
        assert (name, accuracy) == ("pretrained", 1.0)
    assert "linear probe (%) against depth" in report(Report((trained.out,))).read_text()

    written = [json.loads(line) for line in run.evaluations.read_text().splitlines()]
    facts = [line for line in written if "depth" in line]
    assert [(line["what"], line["name"], line["depth"]) for line in facts] == [
        ("knn", "pretrained", 2), ("knn", "pretrained", 4), ("probe", "pretrained", 2), ("probe", "pretrained", 4),
    ]  # fmt: skip
    _, model, _ = restore(trained.out)
    vit = model.encoder.backbone
    block = sum(p.numel() for p in vit.blocks[0].parameters())
    whole = sum(p.numel() for p in vit.parameters())
    assert [line["parameters"] for line in facts] == [whole - 2 * block, whole] * 2
    assert [line["latency_ms"] for line in facts] == [250.0] * 4


def test_latency_is_the_median_of_what_each_image_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = accumulate([0.0, 9.0, 1.0, 2.0, 1.0, 4.0, 1.0, 8.0])  # s between readings; the first image warms up
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    assert latency(lambda image: image, torch.zeros(1, 3, 4, 4), repeats=3) == 4.0


def test_the_depth_of_a_run_of_the_first_stages_is_recorded(tmp_path: Path, labelled: str) -> None:
    config = fake_run(small("convnext", "pixel", depth=3, segments=3, mask_ratio=0.5), tmp_path / "run")
    for depth in (2, None):
        list(knn(Knn(config.out, labelled, device="cpu", workers=0, depth=depth)))
    written = Run(Path(config.out)).evaluations.read_text().splitlines()
    assert [json.loads(line)["depth"] for line in written] == [2, 3]


def test_the_first_stages_alone_are_closed_by_their_norm_too(tmp_path: Path) -> None:
    """A model pre-trained with --depth: what is evaluated is what the decoder read."""
    config = fake_run(small("convnext", "pixel", depth=2, segments=1, mask_ratio=0.5), tmp_path / "run")
    _, model, _ = restore(config.out)
    backbone, _, _ = load_backbone(config.out)
    images = images_of(config)
    raw = as_tokens(model.encoder.backbone, model.encoder.backbone.eval().forward_features(images))
    assert torch.equal(backbone.forward_features(images), model.encoder.norm(raw))
    export(Export(config.out, out=str(tmp_path / "timm")))
    whole, description = loaded(tmp_path / "timm", config)
    own = model.encoder.backbone.state_dict()
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in own.items())
    assert set(description["leanmim"]["not_pretrained"]) == whole.state_dict().keys() - own.keys() != set()


@pytest.mark.parametrize(("before", "after"), [(4, 1), (4, 2), (1, 4), ((1, 3, 4), (3, 4)), (2, 2)])
def test_weights_go_where_a_segment_ends_after_the_same_block(before: Any, after: Any, tmp_path: Path) -> None:
    """--init from a run of other segments."""
    base = small(segments=before, mask_ratio=0.5)
    _, old, _ = restore(fake_run(base, tmp_path / "run").out)
    torch.manual_seed(5)
    new = build(replace(base, segments=after))
    fresh = {name: value.clone() for name, value in new.state_dict().items()}
    said = initialise(new, str(tmp_path / "run"))
    for i, depth in enumerate(new.encoder.depths):
        shared = depth in old.encoder.depths
        j = old.encoder.depths.index(depth) if shared else 0
        for mine, theirs, start in (
            (new.decoders[i], old.decoders[j], f"decoders.{i}."),
            (new.encoder.closing_norm(i), old.encoder.closing_norm(j), f"encoder.norms.{i}."),
        ):
            for name, value in mine.state_dict().items():
                assert torch.equal(value, theirs.state_dict()[name] if shared else fresh[start + name]), (depth, name)
        assert (f"decoders.{depth}" in said) == (f"norms.{depth}" in said) == (not shared)


def test_a_decoder_that_learns_to_fill_takes_the_rest_from_one_that_did_not(tmp_path: Path) -> None:
    base = small(segments=1, mask_ratio=0.75)
    _, old, _ = restore(fake_run(base, tmp_path / "run").out)
    new = build(replace(base, throw=0.25))
    assert "new are decoders.4.filling" in initialise(new, str(tmp_path / "run"))
    assert torch.equal(new.decoders[0].head.weight, old.decoders[0].head.weight)
    deeper = build(replace(base, decoder_depth=2))
    assert "its decoder has another shape" in initialise(deeper, str(tmp_path / "run"))
    assert not torch.equal(deeper.decoders[0].head.weight, old.decoders[0].head.weight)


def test_a_model_without_stages_is_cut_at_its_blocks() -> None:
    model = build(replace(FASTMIM, model="resmlp_12_224", input_size=(224,), segments=4, decoder_depth=1))
    assert model.encoder.depths == (3, 6, 9, 12)


def test_a_vit_without_a_last_norm_closes_its_segments_with_none() -> None:
    config = small(segments=2, mask_ratio=0.5)
    model = build(replace(config, model_kwargs={**config.model_kwargs, "final_norm": False}))
    assert isinstance(model.encoder.closing_norm(0), torch.nn.Identity)


def test_offloading_is_a_switch_and_says_where_it_does_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("cost", "bim", "--offload", "--model", "vit_tiny_patch16_224", "--model-kwargs", "depth", "4",
             "--input-size", "64", "--batch-size", "2")  # fmt: skip
    nothing = "nothing to offload: cpu has no memory of its own"
    main([*words, "--device", "cpu"])
    assert nothing in capsys.readouterr().out
    main([*words, "--device", "cuda"])
    assert nothing not in capsys.readouterr().out


def test_beside_a_recipe_in_segments_one_without_is_not_offloaded() -> None:
    one = Cost(("mae", "bim"), model="vit_tiny_patch16_224", model_kwargs={"depth": 4}, input_size=(64,), batch_size=2,
               offload=True, device="cuda", json=True)  # fmt: skip
    mae, bim = json.loads(cost(one))
    alone = json.loads(cost(replace(one, recipes=("mae",), offload=False)))[0]
    assert mae == alone and bim["weight_bytes"] < mae["weight_bytes"]
    with pytest.raises(UserError, match="--offload keeps one segment of several"):
        cost(replace(one, recipes=("mae",)))


def test_curves_of_the_report_do_not_mix_data_sets(trained: Pretrain, tmp_path: Path) -> None:
    run = Run(Path(shutil.copytree(trained.out, tmp_path / "run")))
    lines = [
        {"what": "knn", "name": "pretrained", "value": value, "data": data, "options": {"depth": depth, "k": 20},
         "depth": depth, "parameters": depth, "latency_ms": 1.0}
        for data, depth, value in (("a", 2, 0.1), ("b", 4, 0.9))
    ]  # fmt: skip
    run.evaluations.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "Accuracy against depth" not in report(Report((str(run.folder),))).read_text()
    lines += [{**lines[0], "depth": 4, "value": 0.2}, {**lines[1], "depth": 2, "value": 0.8}]
    run.evaluations.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report(Report((str(run.folder),))).read_text()
    assert all(f", {data}, k 20" in page for data in "ab")


def test_interrupted_and_continued_is_bit_identical(
    trained: Pretrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """And --offload, for which a CPU has no use, changes nothing."""
    config = replace(trained, out=str(tmp_path / "run"), checkpoint_minutes=0.0, offload=True)
    calls: list[int] = []

    def interrupted(*arguments: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return update(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(leanmim.train, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pretrain(config)
    assert load(Run(Path(config.out)).last)["step"] == 3
    pretrain(config)
    said = capsys.readouterr().out
    assert "continuing after step 3" in said and "nothing to offload: cpu has no memory of its own" in said
    one, two = load(Run(Path(config.out)).last), load(Run(Path(trained.out)).last)
    assert one["step"] == two["step"] == 8
    for key in ("model", "optimizers"):
        assert equal(one[key], two[key])
    keep = ("step", "loss", "loss_0", "loss_1", "lr")
    assert [[line[key] for key in keep] for line in lines(config)] == [
        [line[key] for key in keep] for line in lines(trained)
    ]


TWO_PROCESSES = """
import os, socket, sys, time, types
import leanmim.train
from leanmim.cli import main
for name in ("export", "show", "report"):
    setattr(leanmim.train, name, str)  # what comes after training takes its time
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
child = os.fork()
os.environ["RANK"] = os.environ["LOCAL_RANK"] = "1" if child else "0"
if child:  # whose clock says that a checkpoint is due, every time
    leanmim.train.time = types.SimpleNamespace(perf_counter=lambda: 1e6 * time.perf_counter())
main(sys.argv[1:])
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""  # as torchrun does, but with one import of torch


def test_two_processes_average_their_gradients(tmp_path: Path) -> None:
    config = small(
        segments=2, mask_ratio=(0.5, 0.75), out=str(tmp_path / "run"), epochs=1, blr=0.1, warmup_epochs=0.0,
        clip_grad=0.5,
    )  # fmt: skip
    options = {
        "data": config.data, "out": config.out, "model": config.model, "input-size": 32, "segments": 2,
        "decoder-depth": 1, "decoder-width": 32, "decoder-heads": 2, "epochs": 1, "batch-size": 4, "workers": 0,
        "device": "cpu", "blr": 0.1, "warmup-epochs": 0, "clip-grad": 0.5,
    }  # fmt: skip
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    words += ["--mask-ratio", "0.5", "0.75", "--model-kwargs", *(str(part) for pair in PLAIN.items() for part in pair)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TWO_PROCESSES, "pretrain", "bim", *words],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

    torch.manual_seed(0)
    model = build(config).train()
    optimizers = make_optimizers(model, config)
    data = Crops(list_images(config.data), 3, (32, 32), (0.2, 1.0), (3 / 4, 4 / 3), 0.5, seed=0)
    normalise, order = Normalise(*IMAGENET[3], torch.device("cpu")), epoch_order(16, 0, 0)
    for step in range(2):
        for rank in range(2):
            start = (2 * step + rank) * 4
            images, _ = collate([data[0, index] for index in order[start : start + 4].tolist()])
            torch.manual_seed(seed_of(0, rank, step, 0))
            (sum(model.losses(normalise(images))) / 2).backward()
        for optimizer, parameters in zip(optimizers, of_segments(optimizers), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, 2, 0.0, 0.1 * 8 / 256)
            nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()
            optimizer.zero_grad()
    for name, value in load(Run(Path(config.out)).last)["model"].items():
        assert torch.allclose(value, model.state_dict()[name], rtol=1e-4, atol=2e-6), name


# One segment on the device.


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_offloaded_training_is_the_same_training(autocast: torch.dtype | None) -> None:
    """Copies to the host and back change no bit; what is saved is what would be saved without."""
    config = small()
    model, optimizers = made(config)
    other, others = made(config)
    model.autocast = other.autocast = autocast
    places = {p: p.data_ptr() for p in model.parameters()}
    offload = Offload(model, optimizers, torch.device("cpu"))
    assert all(p.data_ptr() != places[p] for segment in of_segments(optimizers) for p in segment)
    for step in range(3):
        means = update(offload, optimizers, batches(config, step, 2), 2, 0.05)
        assert torch.equal(means, update(other, others, batches(config, step, 2), 2, 0.05))
        assert offload.present == {0}  # for the next step
        offload.wait()
        assert equal(state_of(model, optimizers), state_of(other, others))
    moments = [value for optimizer in optimizers for value in optimizer.state.values()]
    assert len(moments) == sum(map(len, of_segments(optimizers)))
    assert all(state["step"] == 3 and state["exp_avg"].any() for state in moments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offloaded_training_on_a_gpu_is_the_same_training(tmp_path: Path, labelled: str) -> None:
    """Streams, events and pinned memory; evaluated and saved on the way."""
    config = small(device="cuda", precision="fp32", accum=2, batch_size=2, knn_data=labelled, knn_every=1,
                   checkpoint_minutes=0.0)  # fmt: skip
    runs = [replace(config, out=str(tmp_path / str(offload)), offload=offload) for offload in (False, True)]
    for run in runs:
        pretrain(run)
    one, other = (load(Run(Path(run.out)).last) for run in runs)
    assert equal(one["model"], other["model"]) and equal(one["optimizers"], other["optimizers"])


def test_only_a_segment_and_the_next_are_here_while_it_works() -> None:
    config = small()
    model, optimizers = made(config)
    segments, here = of_segments(optimizers), set()

    def fetch(x: Tensor) -> Tensor:
        new = x.clone()
        here.add(new.data_ptr())
        return new

    def store(x: Tensor) -> Tensor:
        here.discard(x.data_ptr())
        return x.clone()

    offload = Offload(model, optimizers, torch.device("cpu"), fetch, store)
    seen: list[tuple[int, set[int]]] = []
    hooks = []

    def look(i: int) -> None:
        for j, segment in enumerate(segments):
            assert {p.data_ptr() in here for p in segment} == {j in offload.present}
            held = {value.data_ptr() in here for p in segment for value in optimizers[j].state.get(p, {}).values()}
            assert held <= {j in offload.present}
        seen.append((i, set(offload.present)))

    for i, (block, decoder) in enumerate(zip(model.encoder.backbone.blocks, model.decoders, strict=True)):
        hooks += [module.register_forward_hook(lambda *_, i=i: look(i)) for module in (block, decoder)]
        segments[i][0].register_post_accumulate_grad_hook(lambda _, i=i: look(i))
        optimizers[i].register_step_post_hook(lambda *_, i=i: seen.append((i, set(offload.present))))
    for step in range(2):
        update(offload, optimizers, batches(config, step, 1))
    assert [i for i, _ in seen] == [i for i in range(4) for _ in range(4)] * 2
    for k, (i, present) in enumerate(seen):  # block, decoder; backward, step: by then the next one is there
        assert present == ({i} if k % 4 < 2 else {i, (i + 1) % 4})
    assert offload.present == {0} and here

    for hook in hooks:
        hook.remove()
    images = images_of(config)
    with torch.no_grad():
        expected = model.encoder.backbone(images)
        with offload.whole():
            assert all(p.data_ptr() in here for segment in segments for p in segment)
            held = [
                v.data_ptr() in here for o in optimizers[1:] for moments in o.state.values() for v in moments.values()
            ]
            assert held and not any(held)  # evaluating needs no moments
            assert torch.equal(model.encoder.backbone(images), expected)
    assert {p.data_ptr() in here for segment in segments[1:] for p in segment} == {False}


def test_offloading_leaves_two_segments_of_all_on_the_device() -> None:
    all_here, flops = counted("cuda", 4, segments=4, decoder_depth=1)
    four, same = counted("cuda", 4, segments=4, decoder_depth=1, offload=True)
    eight, _ = counted("cuda", 8, segments=8, decoder_depth=1, offload=True)
    for found, low, high in ((all_here, 0.99, 1.03), (four, 0.5, 0.53), (eight, 0.25, 0.28)):
        parameters = 4 * (found.encoder_parameters + found.decoder_parameters)  # bytes
        assert low < found.weight_bytes / parameters < high
        assert low < found.optimizer_bytes / (2 * parameters) < high
    assert four.peak_bytes < all_here.peak_bytes
    assert four.gradient_bytes == all_here.gradient_bytes
    assert same == flops


# Together with the other methods.


@pytest.mark.parametrize("masking", ["drop", "token", "pixel"])
@pytest.mark.parametrize("target", ["pixels", "hog"])
@pytest.mark.parametrize(("throw", "fill"), [(0.0, 0), (0.3, 0), (0.3, 2)])
def test_every_combination_trains(throw: float, fill: int, target: str, masking: str) -> None:
    config = small(masking=masking, target=target, throw=throw, fill=fill)
    model, optimizers = made(config, rate=1e-3)
    before = deepcopy(dict(model.named_parameters()))
    for step in range(2):
        losses = update(model, optimizers, batches(config, step, 2), 2)
        assert losses.shape == (4,) and losses.isfinite().all() and (losses > 0).all()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


@pytest.mark.parametrize(("backbone", "masking"), [("vit", "pixel"), ("vit", "drop"), ("swin", "pixel")])
def test_segments_grow_with_their_images(backbone: str, masking: str) -> None:
    """FastMIM-P's stages: norms, tokens, decoders and moments of all segments go along, training goes on."""
    config = replace(
        FASTMIM_P, **{name: value for name, value in asdict(small(backbone, masking, throw=0.3)).items()
                      if name in ("model", "model_kwargs", "input_size", "masking", "mask_ratio", "decoder_width",
                                  "decoder_heads", "throw")},
        segments=4, decoder_depth=1, stage_scales=(1.0, 1.5), stage_starts=(0.0, 0.5), epochs=2,
    )  # fmt: skip
    first, second = (stage.config for stage in stages(config))
    model, optimizers = made(first, rate=1e-3)
    update(model, optimizers, batches(first, 0, 1))
    larger, others = at_next_size(model, optimizers, second, torch.device("cpu"))
    assert larger.encoder.grid.n > model.encoder.grid.n
    own, state = model.state_dict(), deepcopy(larger.state_dict())
    for name, value in state.items():
        if not name.startswith("encoder.backbone.") or ("pos_embed" not in name and "relative" not in name):
            assert torch.equal(value, own[name]), name
    places = {name: p for name, p in model.named_parameters()}
    for name, parameter in larger.named_parameters():
        if parameter.requires_grad and places[name].shape == parameter.shape:
            i = larger.owner(name)
            assert equal(others[i].state[parameter], optimizers[i].state[places[name]]), name
    assert [len(group) for group in map(list, parameter_groups(larger))] == [2] * 4
    for optimizer in others:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
    for step in range(2):
        assert update(larger.train(), others, batches(second, step, 1)).isfinite().all()
    assert not equal(larger.state_dict(), state)
