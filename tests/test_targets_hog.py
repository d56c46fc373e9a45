"""HOG is FastMIM's formula: a float64 NumPy version of it is the judge."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import leanmim.targets
from leanmim.config.base import Stored
from leanmim.targets import FLAT, HOG, Pixels, hog, with_levels
from tests.helpers import noisy

NAMES = ["astronaut", "bee", "canyon", "coffee", "kitten", "rocket"]


MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))


CROPS = [(64, 64, 8), (96, 64, 8), (37, 53, 8), (48, 32, 4), (37, 53, 4), (40, 60, 5), (37, 53, 5)]


SHAPES = [
    (2, 3, 32, 32, 8),
    (1, 1, 37, 53, 8),
    (2, 4, 24, 40, 4),
    (1, 3, 37, 53, 5),
    (3, 1, 16, 8, 8),
    (1, 4, 41, 8, 5),
]


# The oracle: written from the paper's description alone, in float64.


def gradients(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 3x3 Sobel gradients to the right and downwards of images padded by their reflection."""
    height, width = images.shape[-2:]
    padded = np.pad(images.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    gx, gy = np.zeros(images.shape), np.zeros(images.shape)
    for i, across in enumerate((1, 2, 1)):
        for j, along in enumerate((-1, 0, 1)):
            gx += across * along * padded[:, :, i : i + height, j : j + width]
            gy += across * along * padded[:, :, j : j + height, i : i + width]
    return gx, gy


def cell_sums(magnitude: np.ndarray, bins: np.ndarray, cell: int) -> np.ndarray:
    """b c y x 9: the magnitudes of every whole cell, in its bins."""
    b, c, height, width = magnitude.shape
    sums = np.zeros((b, c, height // cell, width // cell, 9))
    for y in range(height // cell):
        for x in range(width // cell):
            at = (..., slice(y * cell, (y + 1) * cell), slice(x * cell, (x + 1) * cell))
            for k in range(9):
                sums[:, :, y, x, k] = (magnitude[at] * (bins[at] == k)).sum((-2, -1))
    return sums


def bins_first(cells: np.ndarray) -> np.ndarray:
    """b c y x 9 to b 9c y x, channels as `channel*9 + bin`."""
    b, c, y, x, _ = cells.shape
    return cells.transpose(0, 1, 4, 2, 3).reshape(b, c * 9, y, x)


def bins_last(histogram: np.ndarray) -> np.ndarray:
    """The inverse: b 9c y x to b c y x 9."""
    b, k, y, x = histogram.shape
    return histogram.reshape(b, k // 9, 9, y, x).transpose(0, 1, 3, 4, 2)


def oracle(images: torch.Tensor, cell: int, unit: np.ndarray | float = 1.0) -> np.ndarray:
    """Of images in multiples of a unit for each channel."""
    gx, gy = gradients(images.numpy())
    sums = cell_sums(np.hypot(gx, gy) / unit, np.floor(np.arctan2(gx, gy) / np.pi * 9) % 9, cell)
    return bins_first(sums / np.maximum(np.sqrt((sums**2).sum(-1, keepdims=True)), FLAT))


# Images.


def photo_of(path: Path, height: int, width: int, shrink: int = 3) -> torch.Tensor:
    """The middle of a photo made smaller: 1 3 H W, whole numbers 0 to 255."""
    with Image.open(path) as image:
        small = image.convert("RGB").resize((image.width // shrink, image.height // shrink), Image.Resampling.BICUBIC)
    left, top = (small.width - width) // 2, (small.height - height) // 2
    crop = small.crop((left, top, left + width, top + height))
    return torch.from_numpy(np.array(crop)).permute(2, 0, 1)[None].contiguous().float()


def normalised(photo: torch.Tensor) -> torch.Tensor:
    return (photo / 255 - MEAN) / STD


def ramp(degrees: float, size: int = 24, slope: float = 1.0) -> torch.Tensor:
    """Brighter towards `degrees`, counted from straight down to the right: atan2 of the ramp's gx and gy."""
    y, x = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
    image = slope * (np.sin(np.radians(degrees)) * x + np.cos(np.radians(degrees)) * y)
    return torch.from_numpy(image).float()[None, None]


# Agreement with the oracle.


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("b", "c", "height", "width", "cell"), SHAPES)
def test_random_images_agree(b: int, c: int, height: int, width: int, cell: int, seed: int) -> None:
    images = noisy(b, c, height, width, seed)
    got = hog(images, cell)
    assert got.shape == (b, 9 * c, height // cell, width // cell)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), oracle(images, cell), atol=1e-5)


@pytest.mark.parametrize(("height", "width", "cell"), CROPS)
def test_photos_agree_in_every_cell(height: int, width: int, cell: int, photos: Path) -> None:
    """Scaled by a power of two, so float32 and float64 hold the same gradients: exact ties included."""
    images = torch.cat([photo_of(photos / f"{name}.jpg", height, width) for name in NAMES]) / 64 - 2
    np.testing.assert_allclose(hog(images, cell).numpy(), oracle(images, cell), atol=1e-5)


@pytest.mark.parametrize(("height", "width", "cell"), CROPS)
def test_normalised_photos_agree(height: int, width: int, cell: int, photos: Path) -> None:
    """No tie of a normalised photo is exact; within 1e-6 of half a turn, float32 may take bin 0 (9) for bin 8."""
    images = normalised(torch.cat([photo_of(photos / f"{name}.jpg", height, width) for name in NAMES]))
    got = bins_last(hog(images, cell).numpy())
    expected = bins_last(oracle(images, cell))
    np.testing.assert_allclose(np.linalg.norm(got, axis=-1), np.linalg.norm(expected, axis=-1), atol=1e-5)

    gx, gy = gradients(images.numpy())
    magnitude, position = np.hypot(gx, gy), np.arctan2(gx, gy) / np.pi * 9
    doubtful = (position > 9 - 1e-6) & (position < 9)
    free = cell_sums(magnitude * doubtful, 0 * position, cell)[..., 0]
    assert (free == 0).mean() > 0.8  # cells without such a pixel agree as they are
    np.testing.assert_allclose(got[free == 0], expected[free == 0], atol=1e-5)

    sure = cell_sums(magnitude * ~doubtful, np.floor(position) % 9, cell)
    total = sure.sum(-1) + free  # the same whatever the bins
    sums = got * (total / np.maximum(got.sum(-1), 1e-9))[..., None]
    rounding = 1e-5 * np.maximum(total, FLAT)[..., None]
    assert (np.abs(sums - sure)[..., 1:8] <= rounding).all()
    moved = (sums - sure)[..., [0, 8]]
    assert ((moved >= -rounding) & (moved <= free[..., None] + rounding)).all()


@pytest.mark.parametrize("cell", [4, 8])
def test_photos_shrunk_in_floats_agree(cell: int, photos: Path) -> None:
    images = normalised(torch.cat([photo_of(photos / f"{name}.jpg", 100, 80, 2) for name in NAMES]))
    images = torch.nn.functional.interpolate(images, (61, 48), mode="bicubic", antialias=True)
    np.testing.assert_allclose(hog(images, cell).numpy(), oracle(images, cell), atol=1e-5)


# Whole numbers of 8-bit images.

LEVELS = tuple(MEAN.flatten().tolist()), tuple(STD.flatten().tolist())


@pytest.mark.parametrize(("height", "width", "cell"), CROPS)
def test_photos_of_8_bits_agree_in_every_cell(height: int, width: int, cell: int, photos: Path) -> None:
    """Ties are exact, and their bin is not arbitrary."""
    photo = torch.cat([photo_of(photos / f"{name}.jpg", height, width) for name in NAMES])
    got = hog(normalised(photo), cell, *LEVELS).numpy()
    np.testing.assert_allclose(got, oracle(photo, cell, 255 * STD.double().numpy()), atol=1e-5)
    plain = hog(normalised(photo), cell).numpy()
    assert 0.5 < (np.abs(got - plain) < 1e-4).mean() < 1  # elsewhere normalisation has rounded


def test_every_gradient_of_8_bits_has_its_bin_in_float32() -> None:
    levels = torch.arange(-1020, 1021)  # four times 255
    for gx in levels.split(200):
        turns = [
            (gx[:, None].to(kind) / levels.to(kind)).atan().mul(9 / np.pi) for kind in (torch.float32, torch.float64)
        ]
        assert torch.equal(*(turn.nan_to_num(0).floor().long() for turn in turns))


def test_bytes_are_told_of_and_stored_values_are_as_they_are() -> None:
    for given, read_as, want in (
        (HOG(16), 3, HOG(16, 3, 8, *LEVELS)),
        (HOG(16, 5), Stored(5), HOG(16, 5)),
        (Pixels(16), 3, Pixels(16)),
    ):
        assert with_levels(given, read_as, *LEVELS) == want
    photo = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0)).float()
    target = HOG(16, 3, 8, *LEVELS)
    assert torch.equal(target.histograms(normalised(photo)), hog(normalised(photo), 8, *LEVELS))
    assert torch.equal(target(normalised(photo)), target(normalised(photo).requires_grad_()))


# Bins, by hand.


@pytest.mark.parametrize("degrees", range(10, 360, 20))
def test_a_ramp_falls_into_the_bin_of_its_orientation(degrees: int) -> None:
    middle = hog(ramp(degrees))[0, :, 1, 1]  # at the rim the reflection bends the gradient
    expected = [float(k == degrees // 20 % 9) for k in range(9)]
    np.testing.assert_allclose(middle.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("down", "right", "k"),
    [(1, 0, 0), (1, 1, 2), (0, 1, 4), (-1, 1, 6), (-1, 0, 0), (-1, -1, 2), (0, -1, 4), (1, -1, 6)],
)
def test_ramps_along_the_axes_and_diagonals(down: int, right: int, k: int) -> None:
    """A vertical ramp lies on the border of bins 0 and 8, and is exact: bin 0, upwards and downwards."""
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    middle = hog((down * y + right * x)[None, None])[0, :, 1, 1]
    assert middle.tolist() == [float(i == k) for i in range(9)]


@pytest.mark.parametrize("degrees", [1, 19, 21, 39, 89, 91, 159, 161, 179, 181, 199, 341, 359])
def test_borders_are_every_twenty_degrees(degrees: int) -> None:
    assert hog(ramp(degrees))[0, :, 1, 1].argmax() == degrees // 20 % 9


def test_the_rim_is_reflected() -> None:
    """A horizontal ramp has no gradient in the first and last column, and the usual one in the first and last row."""
    got = hog(ramp(90).expand(1, 1, 24, 24), cell=1)[0].sum(0)
    assert got.shape == (24, 24)
    assert (got[:, [0, -1]].abs() < 1e-6).all()
    np.testing.assert_allclose(got[:, 1:-1].numpy(), 1, atol=1e-6)


def test_magnitudes_weigh_the_bins() -> None:
    """A ramp to the right that also rises downwards, three times as steep, from row 12: the middle of the cell."""
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    middle = hog((x + 3 * (y - 12).clamp(min=0))[None, None])[0, :, 1, 1]
    sums = np.zeros(9)
    sums[4] = 4 * 8 * 8  # rows 8 to 11: (8, 0), 90 degrees
    sums[1] = 8 * np.hypot(8, 12)  # row 12: (8, 12), 34 degrees
    sums[0] = 3 * 8 * np.hypot(8, 24)  # rows 13 to 15: (8, 24), 18 degrees
    np.testing.assert_allclose(middle.numpy(), sums / np.linalg.norm(sums), atol=1e-6)


def test_the_remainder_still_bends_the_gradient_of_the_last_cell() -> None:
    images = noisy(1, 1, 17, 17)
    assert hog(images).shape == hog(images[..., :16, :16]).shape == (1, 9, 2, 2)
    assert torch.equal(hog(images)[..., :1, :1], hog(images[..., :16, :16])[..., :1, :1])
    assert not torch.allclose(hog(images)[..., 1, 1], hog(images[..., :16, :16])[..., 1, 1], atol=1e-3)


# Norms and flat cells.


@pytest.mark.parametrize("cell", [4, 5, 8])
def test_cells_have_norm_one_in_every_channel(cell: int, photos: Path) -> None:
    photo = normalised(photo_of(photos / "coffee.jpg", 60, 60))
    for images in (photo, noisy(2, 4, 43, 40)):
        norms = np.linalg.norm(bins_last(hog(images, cell).numpy()), axis=-1)
        gx, gy = gradients(images.numpy())
        strong = cell_sums(np.hypot(gx, gy), 0 * gx, cell)[..., 0] > 9 * FLAT  # so that some bin is over FLAT
        assert strong.mean() > 0.9
        np.testing.assert_allclose(norms[strong], 1, atol=1e-6)
        assert (norms < 1 + 1e-6).all()


@pytest.mark.parametrize("value", [0.0, 0.5, 1 / 3, -2.117904, 2.64, 1e4])
def test_flat_images_are_zero(value: float) -> None:
    assert (hog(torch.full((2, 3, 37, 53), value)) == 0).all()


def test_sensor_noise_stays_small() -> None:
    for seed in range(5):
        noise = 1e-7 * noisy(1, 3, 32, 32, seed)
        for value in (0.0, 0.5, -2.117904):
            assert hog(value + noise).abs().max() < 2e-3


def test_cells_under_flat_are_divided_by_flat() -> None:
    """A ramp of slope s has a magnitude of 8 s in each of 64 pixels."""
    for norm in (0.25 * FLAT, 0.5 * FLAT, 0.9 * FLAT, 1.1 * FLAT, 4 * FLAT):
        middle = hog(ramp(90, slope=norm / 512))[0, :, 1, 1]
        np.testing.assert_allclose(middle[4].item(), min(1, norm / FLAT), rtol=1e-5)
        np.testing.assert_allclose(middle.norm().item(), min(1, norm / FLAT), rtol=1e-5)


@pytest.mark.parametrize("level", [0, 1, 100, 254])
def test_one_grey_level_is_not_flat(level: int) -> None:
    photo = torch.full((1, 3, 24, 24), float(level))
    photo[..., 8, 8] += 1  # of the first cell, its last pixel alone has a gradient
    norms = np.linalg.norm(bins_last(hog(normalised(photo)).numpy()), axis=-1)
    np.testing.assert_allclose(norms[:, :, :2, :2], 1, atol=1e-6)
    assert (norms[:, :, 2] == 0).all()
    assert (norms[..., 2] == 0).all()


# What it does not depend on.


def test_channels_are_independent() -> None:
    images = noisy(2, 4, 37, 40)
    together = hog(images)
    for channel in range(4):
        assert torch.equal(together[:, channel * 9 : channel * 9 + 9], hog(images[:, channel : channel + 1]))
    images[:, 2] = 0
    assert (hog(images)[:, 18:27] == 0).all()
    assert torch.equal(hog(images)[:, [*range(18), *range(27, 36)]], together[:, [*range(18), *range(27, 36)]])


@pytest.mark.parametrize("seed", range(4))
def test_contrast_brightness_and_sign_do_not_matter(seed: int) -> None:
    images = noisy(2, 3, 40, 37, seed)
    expected = hog(images)
    assert torch.equal(hog(images * 4), expected)
    assert torch.equal(hog(images / 4), expected)
    for other in (images * 0.3, images * 7.7, images + 2, -images):
        torch.testing.assert_close(hog(other), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", range(4))
def test_mirrored_images_have_mirrored_histograms(seed: int) -> None:
    """At the rim the reflection makes ties, and a tie is not mirrored: bin 0 is open to one side."""
    images = noisy(2, 3, 40, 32, seed)
    expected = hog(images)[..., 1:-1, 1:-1]
    mirrored = expected.unflatten(1, (3, 9)).flip(2).flatten(1, 2)
    for axes, histogram in (((2,), mirrored), ((3,), mirrored), ((2, 3), expected)):
        got = hog(images.flip(axes))[..., 1:-1, 1:-1]
        torch.testing.assert_close(got, histogram.flip(axes), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("height", "width", "cell"), [(32, 32, 8), (37, 53, 5)])
def test_a_batch_equals_its_images(height: int, width: int, cell: int) -> None:
    images = noisy(5, 3, height, width)
    singles = torch.cat([hog(image[None], cell) for image in images])
    assert torch.equal(hog(images, cell), singles)


@pytest.mark.parametrize("chunk", [1, 37 * 53, 2 * 37 * 53, 4 * 37 * 53 + 1, 2**30])
def test_chunks_do_not_matter(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    images = noisy(5, 3, 37, 53)
    expected = hog(images)
    monkeypatch.setitem(leanmim.targets.CHUNK, "cpu", chunk)
    assert torch.equal(hog(images), expected)


def test_memory_layout_does_not_matter() -> None:
    images = noisy(2, 3, 24, 37)
    assert torch.equal(hog(images.to(memory_format=torch.channels_last)), hog(images))
    assert torch.equal(hog(images.flip(3).contiguous()), hog(images.flip(3)))
    assert torch.equal(hog(images[:, :, 3:, ::2]), hog(images[:, :, 3:, ::2].contiguous()))
