"""Nested masks: later segments see some of what earlier ones see (BIM)."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from leanmim.factory import build
from leanmim.masking import Grid, Mask, narrower, random_fine_mask, random_mask
from tests.helpers import images_of, in_segments, seeded


def nested(ratios: tuple[float, ...], unit: int = 1, finer: int = 1, batch: int = 8) -> tuple[Grid, list[Mask]]:
    """As a model makes them, on a grid of 4 x 6."""
    config = in_segments(masking="pixel" if finer > 1 else "drop", input_size=(32, 48), segments=len(ratios))
    model = build(replace(config, mask_ratio=ratios, mask_unit=8 * unit // finer, depth=len(ratios)))
    return model.encoder.grid, model.draw_masks(images_of(config, batch))


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
        model = build(in_segments(mask_ratio=ratio))
        masks = model.draw_masks(torch.zeros(2, 3, 32, 32))
        assert len(masks) == 4 and all(mask is masks[0] for mask in masks)
    _, fine = nested((0.5, 0.5), finer=2)
    assert fine[1] is fine[0]
    _, masks = nested((0.25, 0.5, 0.5, 0.75))
    assert masks[2] is masks[1] and [mask.visible.shape[1] for mask in masks] == [18, 12, 12, 6]
    assert len(build(in_segments(masking="token", mask_ratio=(0.5,) * 4)).encoder.tokens) == 0
    assert len(build(in_segments("swin", "token", mask_ratio=0.5)).encoder.borders.tokens) == 0
