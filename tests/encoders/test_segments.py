"""How a backbone is cut, and what lies at the borders."""

import json
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn

from leanmim.encoders.segments import Borders, cuts
from leanmim.errors import UserError
from leanmim.factory import build
from leanmim.masking import Grid, narrower, random_mask
from tests.helpers import (
    KINDS,
    first_modules,
    hidden_pixels,
    images_of,
    in_segments,
    made,
    seeded,
    side_by_side,
    whole_squares,
)


def test_borders_lay_the_tokens_of_a_patch_side_by_side() -> None:
    grid = Grid(2, 3)
    borders = Borders(grid, (5, 7), (4, 2))
    for i, (k, width) in enumerate(((4, 5), (2, 7))):
        nn.init.normal_(borders.norms[i].weight)
        x = torch.randn(2, 2 * k, 3 * k, width)
        expected = side_by_side(borders.norms[i](x), grid)
        assert torch.equal(borders.read(i, x.flatten(1, 2)), expected)
        assert expected.shape == (2, 6, width * k**2)


@pytest.mark.parametrize("layout", ["tokens", "channels last", "channels first"])
def test_borders_know_the_layouts(layout: str) -> None:
    grid, noise = Grid(2, 3), torch.rand(2, 6, generator=seeded(0))
    borders = Borders(grid, (5, 7), (4, 2), (True, True), (layout, layout))
    before = random_mask(noise, grid, 0.3)
    after = narrower(before, grid, 0.8)
    x = torch.randn(2, 4, 6, 7)
    given = {"tokens": x.flatten(1, 2), "channels last": x, "channels first": x.permute(0, 3, 1, 2)}[layout]
    found = borders.narrow(2, given, before, after)
    assert found.shape == given.shape
    if layout != "channels last":
        found = found.view_as(x) if layout == "tokens" else found.permute(0, 2, 3, 1)
    for b, r, c in product(range(2), range(4), range(6)):
        patch = r // 2 * 3 + c // 2
        new = patch in after.masked[b].tolist() and patch in before.visible[b].tolist()
        assert torch.equal(found[b, r, c], borders.tokens["1"] if new else x[b, r, c])


FULL = {name: config for name, config in KINDS.items() if config.masking != "drop"} | {
    "vit, pixel, fine": in_segments(masking="pixel", mask_unit=4),
    "convnext, wide": in_segments("convnext", "pixel", input_size=(64, 96)),
    "convnext, fine": in_segments("convnext", "pixel", mask_unit=16, mask_ratio=(0.5, 0.6, 0.75, 0.9)),
    "convnext, finer": in_segments("convnext", "pixel", mask_unit=8, mask_ratio=(0.5, 0.6, 0.75, 0.95)),
}


@pytest.mark.parametrize("name", FULL)
def test_a_token_hides_what_is_newly_masked_and_nothing_else(name: str) -> None:
    config = FULL[name]
    model, _ = made(config)
    encoder, images = model.encoder, images_of(config)
    masks = model.draw_masks(images)
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
        tokens = encoder.tokens if before.ndim == 3 else encoder.borders.tokens
        grows = model.mask_ratios[i] > model.mask_ratios[i - 1]
        assert (str(i - 1) in tokens) == grows
        if before.ndim == 3:  # one row of tokens, prefix first
            assert torch.equal(before[:, : encoder.prefix_tokens], after[:, : encoder.prefix_tokens])
            before, after = (x[:, encoder.prefix_tokens :].unflatten(1, encoder.grid) for x in (before, after))
        elif "convnext" in name:
            before, after = before.permute(0, 2, 3, 1), after.permute(0, 2, 3, 1)
        size = (before.shape[1], before.shape[2])
        new = whole_squares(hidden[i], size) & ~whole_squares(hidden[i - 1], size)
        if grows:
            assert torch.equal(after[new], tokens[str(i - 1)].expand(int(new.sum()), -1))
        assert torch.equal(after[~new], before[~new])
        assert not torch.equal(after[new], before[new]) or not new.any()
        replaced += int(new.sum())
    assert replaced


@pytest.mark.parametrize("segments", [3, 5, 8])
def test_segments_that_do_not_divide_the_blocks(segments: int) -> None:
    with pytest.raises(UserError, match=rf"--segments: 4 blocks.* {segments} equal segments; possible: ") as error:
        build(in_segments(segments=segments, mask_ratio=0.5))
    possible = json.loads(str(error.value).split("possible: ")[1])
    assert possible == [1, 2, 4]
    for count_ in possible:
        assert len(build(in_segments(segments=count_, mask_ratio=0.5)).decoders) == count_


@pytest.mark.parametrize("segments", [(), (2,), (2, 2, 4), (3, 1, 4), (2, 5), (4, 2)])
def test_cuts_that_do_not_rise_to_the_last_block(segments: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"--segments.*4 blocks: give rising numbers of which the last is 4"):
        build(in_segments(segments=segments, mask_ratio=0.5))
    with pytest.raises(UserError, match=r"4 stages: give rising numbers of which the last is 4"):
        build(in_segments("swin", "token", segments=segments, mask_ratio=0.5))


def test_cuts_are_the_ends_of_segments() -> None:
    assert cuts(4, 12) == (3, 6, 9, 12)
    assert cuts((1, 5, 12), 12) == (1, 5, 12)
    assert build(in_segments(segments=(1, 4), mask_ratio=0.5)).encoder.depths == (1, 4)
    assert build(in_segments("convnext", "pixel", segments=(2, 4), mask_ratio=0.5)).encoder.depths == (2, 4)
    resnet = replace(in_segments("convnext", "pixel", mask_ratio=0.5), model="resnet10t")  # timm counts its stem
    assert build(replace(resnet, segments=2)).encoder.depths == (3, 5)
    assert build(replace(resnet, segments=(2, 5))).encoder.depths == (2, 5)
    with pytest.raises(UserError, match=r"4 stages, 2 to 5: give rising numbers of which the last is 5"):
        build(replace(resnet, segments=(1, 4)))
