"""Targets are MAE's and SimMIM's pixels, to the last place, and FastMIM's histograms."""

import numpy as np
import pytest
import torch

from leanmim.masking import Grid
from leanmim.targets import HOG, Pixels, Target, hog, patch_statistics, patchify, unpatchify
from tests.helpers import noisy

SHAPES = [(2, 3, 8, 8, 4), (1, 3, 8, 16, 4), (3, 1, 12, 6, 2), (2, 4, 6, 9, 3), (1, 3, 16, 16, 16)]


def patches_by_hand(images: np.ndarray, patch: int) -> np.ndarray:
    """Patches row by row, in each patch pixels row by row, in each pixel its channels."""
    c, height, width = images.shape[1:]
    return np.array(
        [
            [
                [image[channel, top + y, left + x] for y in range(patch) for x in range(patch) for channel in range(c)]
                for top in range(0, height, patch)
                for left in range(0, width, patch)
            ]
            for image in images
        ]
    )


@pytest.mark.parametrize(("b", "c", "height", "width", "patch"), SHAPES)
def test_patchify_is_the_loop(b: int, c: int, height: int, width: int, patch: int) -> None:
    images = noisy(b, c, height, width)
    got = patchify(images, patch)
    assert got.shape == (b, (height // patch) * (width // patch), patch * patch * c)
    assert (got.numpy() == patches_by_hand(images.numpy(), patch)).all()


@pytest.mark.parametrize(("b", "c", "height", "width", "patch"), SHAPES)
def test_unpatchify_undoes_it(b: int, c: int, height: int, width: int, patch: int) -> None:
    images = noisy(b, c, height, width)
    grid = Grid(height // patch, width // patch)
    assert torch.equal(unpatchify(patchify(images, patch), patch, grid), images)
    patches = torch.randn(b, grid.n, patch * patch * c)
    assert torch.equal(patchify(unpatchify(patches, patch, grid), patch), patches)


def test_values_are_ordered_row_column_channel() -> None:
    y, x, channel = np.meshgrid(range(4), range(6), range(3), indexing="ij")
    image = torch.from_numpy(100.0 * y + 10 * x + channel).permute(2, 0, 1)[None].float()  # a pixel spells its place
    first = patchify(image, 2)[0, 0]
    assert first.tolist() == [0, 1, 2, 10, 11, 12, 100, 101, 102, 110, 111, 112]
    assert patchify(image, 2)[0, :, 0].tolist() == [0, 20, 40, 200, 220, 240]


def test_memory_layout_does_not_matter() -> None:
    images = noisy(2, 3, 8, 12)
    assert torch.equal(patchify(images.to(memory_format=torch.channels_last), 4), patchify(images, 4))
    assert torch.equal(patchify(images.flip(3), 4), patchify(images.flip(3).contiguous(), 4))
    patches = patchify(images, 4)
    across = patches.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(unpatchify(across, 4, Grid(2, 3)), images)


@pytest.mark.parametrize(("b", "c", "height", "width", "patch"), SHAPES)
def test_each_patch_is_normalised_by_its_own_statistics(b: int, c: int, height: int, width: int, patch: int) -> None:
    images = noisy(b, c, height, width)
    x = patches_by_hand(images.double().numpy(), patch)
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True, ddof=1)
    target = Pixels(patch, c)
    assert target.width == patch * patch * c == target(images).shape[-1]
    np.testing.assert_allclose(target(images).numpy(), (x - mean) / np.sqrt(variance + 1e-6), atol=2e-5)
    got = patch_statistics(patchify(images, patch))
    np.testing.assert_allclose(got[0].numpy(), mean, atol=1e-5)
    np.testing.assert_allclose(got[1].numpy(), np.sqrt(variance + 1e-6), atol=1e-5)


def test_the_epsilon_is_added_to_the_variance() -> None:
    flat = torch.zeros(1, 1, 2, 2)
    flat[0, 0, 0, 0] = 4e-3  # a variance of 4e-6, against 1e-6
    x = np.array([4e-3, 0, 0, 0])
    np.testing.assert_allclose(Pixels(2, 1)(flat)[0, 0].numpy(), (x - 1e-3) / np.sqrt(4e-6 + 1e-6), rtol=1e-5)
    assert Pixels(2, 1)(torch.full((1, 1, 2, 2), 7.0)).tolist() == [[[0, 0, 0, 0]]]


def test_raw_pixels_are_the_pixels() -> None:
    images = noisy(2, 3, 8, 12)
    target = Pixels(4, per_patch=False)
    assert torch.equal(target(images), patchify(images, 4))
    assert torch.equal(target.paint(target(images), images), images)


@pytest.mark.parametrize("per_patch", [True, False])
@pytest.mark.parametrize(("b", "c", "height", "width", "patch"), SHAPES)
def test_painting_the_target_restores_it(b: int, c: int, height: int, width: int, patch: int, per_patch: bool) -> None:
    images = noisy(b, c, height, width)
    images[0, :, :patch, :patch] = 0.25  # a patch without any structure
    target = Pixels(patch, c, per_patch)
    torch.testing.assert_close(target.paint(target(images), images), images, atol=2e-6, rtol=0)


def test_painting_uses_the_true_statistics_and_the_predicted_structure() -> None:
    images = noisy(1, 3, 8, 8)
    target = Pixels(4)
    nothing = patchify(target.paint(torch.zeros(1, 4, 48), images), 4)
    means = patches_by_hand(images.numpy(), 4).mean(-1)
    np.testing.assert_allclose(nothing.numpy(), np.broadcast_to(means[..., None], nothing.shape), atol=1e-6)


@pytest.mark.parametrize("per_patch", [True, False])
def test_targets_carry_no_gradient(per_patch: bool) -> None:
    images = noisy(1, 3, 8, 8).requires_grad_()
    prediction = torch.zeros(1, 4, 48, requires_grad=True)
    target = Pixels(4, per_patch=per_patch)
    assert not target(images).requires_grad
    assert not target.paint(prediction, images).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_targets_of_half_precision_images_are_computed_in_full(dtype: torch.dtype) -> None:
    images = noisy(1, 3, 8, 8).to(dtype)
    assert Pixels(4)(images).dtype == torch.float32
    assert torch.equal(Pixels(4)(images), Pixels(4)(images.float()))


def test_pixels_are_a_target() -> None:
    assert isinstance(Pixels(4), Target)


# HOG as a target; its values are judged in test_targets_hog.py.


@pytest.mark.parametrize(
    ("b", "c", "height", "width", "patch", "cell"),
    [(2, 3, 32, 48, 16, 8), (1, 3, 64, 32, 32, 8), (2, 1, 24, 32, 8, 4), (2, 4, 20, 30, 10, 5), (1, 3, 24, 16, 8, 8)],
)
def test_tokens_are_the_histogram_rearranged(b: int, c: int, height: int, width: int, patch: int, cell: int) -> None:
    images = noisy(b, c, height, width)
    cells, side = hog(images, cell), patch // cell
    by_hand = [
        [
            [
                cells[i, k, top * side + y, left * side + x].item()
                for y in range(side)
                for x in range(side)
                for k in range(9 * c)
            ]
            for top in range(height // patch)
            for left in range(width // patch)
        ]
        for i in range(b)
    ]
    target = HOG(patch, c, cell)
    assert target(images).tolist() == by_hand
    assert target.width == target(images).shape[-1] == 9 * c * side**2


def test_widths_of_the_paper() -> None:
    images = noisy(1, 3, 64, 64)
    assert HOG(16).width == HOG(16)(images).shape[-1] == 108
    assert HOG(32).width == HOG(32)(images).shape[-1] == 432
    assert (HOG(16).patch, HOG(16).channels, HOG(16).cell) == (16, 3, 8)
    assert isinstance(HOG(16), Target)


def test_it_is_float32_without_gradient() -> None:
    images = noisy(2, 3, 32, 32)
    expected = HOG(16)(images)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = HOG(16)(images.clone().requires_grad_()), hog(images.clone().requires_grad_())
    for got in (HOG(16)(images.clone().requires_grad_()), hog(images.clone().requires_grad_()), *under_autocast):
        assert got.dtype == torch.float32
        assert not got.requires_grad
    assert torch.equal(under_autocast[0], expected)
    assert torch.equal(under_autocast[1], hog(images))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_images_are_computed_in_full(dtype: torch.dtype) -> None:
    images = noisy(1, 3, 32, 32).to(dtype)
    assert HOG(16)(images).dtype == torch.float32
    assert torch.equal(HOG(16)(images), HOG(16)(images.float()))


def test_images_are_left_as_they_are() -> None:
    images = noisy(2, 3, 24, 24)
    before = images.clone()
    HOG(8)(images)
    assert torch.equal(images, before)
