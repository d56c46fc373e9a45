"""Squares finer than a patch: what is hidden, and what the loss covers."""

import math

import pytest
import torch

from leanmim.targets import hog
from tests.families import fastmim


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def test_squares_finer_than_a_patch_hide_what_is_under_them_only() -> None:
    model = fastmim("convnext_atto", mask_unit=16)
    images = torch.randn(2, 3, 64, 96)
    mask = model.draw_mask(images)
    assert mask.masked.tolist() == [list(range(6))] * 2
    assert mask.visible.shape == (2, 0)
    under = mask.hidden.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None]
    with torch.no_grad():
        ((_, before),) = model.predictions(images, [mask])
        ((_, after),) = model.predictions(torch.where(under, torch.randn_like(images), images), [mask])
        assert torch.equal(before, after)
        ((_, seen),) = model.predictions(torch.where(under, images, torch.randn_like(images)), [mask])
        assert not torch.equal(before, seen)


@pytest.mark.parametrize("unit", [8, 16])
@pytest.mark.parametrize("ratio", [0.75, 0.6, 0.37, 0.5])
def test_the_share_of_hidden_squares_is_the_ratio(ratio: float, unit: int) -> None:
    model = fastmim("convnext_atto", mask_unit=unit, mask_ratio=ratio)
    hidden = model.draw_mask(torch.zeros(5, 3, 64, 96)).hidden
    squares = 64 * 96 // unit**2
    assert hidden.shape == (5, 64 // unit, 96 // unit)
    assert hidden.flatten(1).sum(1).tolist() == [math.ceil(ratio * squares)] * 5
    assert len({tuple(each.flatten().tolist()) for each in hidden}) == 5  # every image has its own


def test_hidden_squares_are_everywhere_alike() -> None:
    model = fastmim("convnext_atto", mask_unit=16)
    share = model.draw_mask(torch.zeros(4000, 3, 64, 96)).hidden.float().mean(0)
    assert share.shape == (4, 6)
    assert (share - 0.75).abs().max() < 0.03  # 4 standard deviations of a mean over 4000


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("unit", [8, 16])
def test_the_loss_covers_the_cells_of_hidden_squares_only(unit: int, loss: str) -> None:
    model = fastmim("convnext_atto", mask_unit=unit, loss=loss)
    images = torch.randn(2, 3, 64, 96)
    mask = model.draw_mask(images)
    with torch.no_grad():
        (value,) = model.losses(images, [mask])
        ((_, prediction),) = model.predictions(images, [mask])
    cells = hog(images, 8)
    errors: list[float] = []
    for b in range(2):
        for y in range(8):
            for x in range(12):
                if mask.hidden[b, y * 8 // unit, x * 8 // unit]:
                    start = 27 * (4 * (y % 4) + x % 4)  # of the cell among the patch's 16
                    predicted = prediction[b, 3 * (y // 4) + x // 4, start : start + 27]
                    errors += (predicted - cells[b, :, y, x]).tolist()
    assert len(errors) == 2 * math.ceil(0.75 * (64 * 96 // unit**2)) * (unit // 8) ** 2 * 27
    assert value.item() == pytest.approx(mean_error(errors, loss), rel=1e-5)


@pytest.mark.parametrize("target", ["pixels", "raw-pixels"])
@pytest.mark.parametrize("unit", [4, 16])
def test_the_loss_covers_the_pixels_of_hidden_squares_only(unit: int, target: str) -> None:
    model = fastmim("convnext_atto", mask_unit=unit, target=target)
    images = torch.randn(2, 3, 64, 96)
    mask = model.draw_mask(images)
    with torch.no_grad():
        (value,) = model.losses(images, [mask])
        ((_, prediction),) = model.predictions(images, [mask])
    truth = images.clone()
    if target == "pixels":  # each patch by its own mean and variance, what is visible of it included
        for y in range(0, 64, 32):
            for x in range(0, 96, 32):
                patch = images[:, :, y : y + 32, x : x + 32].flatten(1)
                mean, std = patch.mean(1).view(2, 1, 1, 1), (patch.var(1) + 1e-6).sqrt().view(2, 1, 1, 1)
                truth[:, :, y : y + 32, x : x + 32] = (images[:, :, y : y + 32, x : x + 32] - mean) / std
    errors: list[float] = []
    for b in range(2):
        for y in range(64):
            for x in range(96):
                if mask.hidden[b, y // unit, x // unit]:
                    start = 3 * (32 * (y % 32) + x % 32)
                    predicted = prediction[b, 3 * (y // 32) + x // 32, start : start + 3]
                    errors += (predicted - truth[b, :, y, x]).tolist()
    assert value.item() == pytest.approx(mean_error(errors, "l2"), rel=1e-5)


def mean_error(errors: list[float], loss: str) -> float:
    return sum(abs(error) if loss == "l1" else error**2 for error in errors) / len(errors)


def test_squares_of_several_patches_are_masked_as_one() -> None:
    model = fastmim("convnext_atto", depth=2, mask_unit=16)  # of 2 x 2 patches
    assert model.encoder.stride == 8
    mask = model.draw_mask(torch.zeros(2, 3, 64, 96))
    assert mask.hidden is None
    for ids in mask.masked.tolist():
        squares = [(place // 12 // 2, place % 12 // 2) for place in ids]
        assert len(ids) == 4 * 18
        assert all(squares.count(square) == 4 for square in set(squares))
