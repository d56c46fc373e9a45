"""BIM: gradients stop at borders, and only one segment's graph is alive."""

import weakref
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from leanmim.masking import Mask, keep_all, take
from leanmim.mim import MIM
from leanmim.step import update
from tests.helpers import (
    KINDS,
    batches_of,
    equal,
    first_modules,
    hidden_pixels,
    images_of,
    in_segments,
    made,
    of_segments,
    side_by_side,
    whole_squares,
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
        elif i and str(i - 1) in encoder.borders.tokens:  # the mask grows
            first = hasattr(backbone, "stem")
            size = (x.shape[2], x.shape[3]) if first else (x.shape[1], x.shape[2])
            new = whole_squares(hidden[i], size) & ~whole_squares(hidden[i - 1], size)
            token = encoder.borders.tokens[str(i - 1)]
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


@pytest.mark.parametrize("name", ["vit, drop", "swin, token", "convnext, pixel"])
def test_gradients_are_those_of_autograd_on_the_detached_graph(name: str) -> None:
    config = KINDS[name]
    model, _ = made(config)
    images = images_of(config)
    masks = model.draw_masks(images)
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
            if name == "vit, drop":  # whose stem computes the visible patches alone
                torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-5, atol=1e-7)
            else:
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
    masks = model.draw_masks(images)
    one_by_one = peak_saved(model, model.losses(images, masks))
    summed = peak_saved(model, (sum(model.losses(images, masks)) for _ in range(1)))
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


# Together with the other methods.


@pytest.mark.parametrize("masking", ["drop", "token", "pixel"])
@pytest.mark.parametrize("target", ["pixels", "hog"])
@pytest.mark.parametrize(("throw", "fill"), [(0.0, 0), (0.3, 0), (0.3, 2)])
def test_every_combination_trains(throw: float, fill: int, target: str, masking: str) -> None:
    config = in_segments(masking=masking, target=target, throw=throw, fill=fill)
    model, optimizers = made(config, rate=1e-3)
    before = deepcopy(dict(model.named_parameters()))
    for step in range(2):
        losses = update(model, optimizers, batches_of(config, step, 2), 2)
        assert losses.shape == (4,) and losses.isfinite().all() and (losses > 0).all()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
