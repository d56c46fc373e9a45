"""The crop is chosen first, and a JPEG is decoded no larger than it needs."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop, v2

from leanmim.data import read as module
from leanmim.data.crops import Crops, random_box, resized
from leanmim.data.read import read_cut, read_image
from leanmim.data.source import Files, Folder, Joined
from tests.helpers import PHOTOS


@pytest.fixture(params=["simplejpeg", "Pillow"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Either one that reads JPEGs."""
    if request.param == "Pillow":
        monkeypatch.setattr(module, "simplejpeg", None)
    else:
        pytest.importorskip("simplejpeg")
    return request.param


def at(*box: int) -> Any:
    """This box, whatever the picture."""
    return lambda width, height: box


def smooth(width: int, height: int) -> Image.Image:
    """A picture without the detail that a smaller scale loses."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize(
    ("box", "size", "scale"),
    [((0, 0, 640, 480), 240, 2), ((0, 0, 640, 480), 241, 1), ((0, 0, 640, 480), 120, 4), ((0, 0, 640, 480), 16, 8),
     ((100, 100, 300, 300), 100, 2), ((100, 100, 300, 300), 101, 1), ((5, 5, 6, 6), 32, 1)],
)  # fmt: skip
def test_a_jpeg_is_decoded_at_the_smallest_scale_that_has_the_pixels(
    box: tuple[int, ...], size: int, scale: int, tmp_path: Path
) -> None:
    smooth(640, 480).save(tmp_path / "a.jpg", quality=95)
    cut = read_cut(tmp_path / "a.jpg", 3, at(*box), (size, size))
    assert cut.pixels.shape == (480 // scale, 640 // scale, 3)
    assert cut.box == tuple(side / scale for side in box)


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(orientation: int, tmp_path: Path) -> None:
    """The box lies in the upright picture, which may be stored in eight ways."""
    exif = Image.Exif()
    exif[0x112] = orientation
    smooth(200, 120).save(tmp_path / "a.jpg", quality=95, exif=exif)
    upright = read_image(tmp_path / "a.jpg", 3)
    asked: list[tuple[int, int]] = []

    def choose(width: int, height: int) -> tuple[int, int, int, int]:
        asked.append((width, height))
        return (20, 10, 80, 60)

    crop = resized(read_cut(tmp_path / "a.jpg", 3, choose, (25, 30)), (25, 30), "bicubic")
    assert asked == [upright.size]
    want = v2.functional.pil_to_tensor(upright.crop((20, 10, 80, 60)).resize((30, 25), Image.Resampling.BICUBIC))
    assert (crop.float() - want.float()).abs().max() <= 8


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK", "P", "RGBA", "I;16", "1"])
def test_any_mode(mode: str, channels: int, tmp_path: Path) -> None:
    path = tmp_path / ("a.jpg" if mode in ("L", "RGB", "CMYK") else "a.png")
    smooth(96, 64).convert("L" if mode == "I;16" else mode).convert(mode).save(path)
    cut = read_cut(path, channels, at(0, 0, 96, 64), (64, 96))
    want = np.asarray(read_image(path, channels)).reshape(64, 96, channels)
    assert cut.pixels.dtype == np.uint8 and cut.pixels.shape == want.shape
    assert np.abs(cut.pixels.astype(int) - want).max() <= 2


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.95])
def test_truncated_files_are_bad_in_either_way(keep: float, tmp_path: Path) -> None:
    data = (PHOTOS / "bee.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: round(keep * len(data))])
    errors = []
    for decode in ("fast", "exact"):
        with pytest.raises(Exception, match="image files can be read") as error:
            Crops(Files(tmp_path, ["a.jpg"], 3), (16, 16), (0.2, 1.0), (0.75, 4 / 3), 0.5, 0, decode=decode)[0, 0]
        errors.append(str(error.value))
    assert errors[0] == errors[1]


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_without_scaling_a_crop_is_torchvisions(interpolation: str) -> None:
    """A box of the size of the crop and larger, of a photo: decoder and resizing differ by rounding, and at the box's edge,
    beyond which Pillow does not look either.
    """
    size = (80, 80)
    source = Folder(PHOTOS, 3)
    for place in range(4):
        cut = source.cut(place, at(10, 20, 130, 150), size)
        image = source.read(place)
        assert cut.pixels.shape[:2] == image.size[::-1]
        how = v2.InterpolationMode(interpolation)
        want = v2.functional.pil_to_tensor(v2.functional.resized_crop(image, 20, 10, 130, 120, list(size), how, True))
        difference = (resized(cut, size, interpolation).float() - want.float()).abs()
        assert difference.mean() < 0.6 and difference.max() <= 12


def boxes(width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float]) -> Iterator[tuple[int, ...]]:
    draw = Random(0)
    for _ in range(4000):
        yield random_box(width, height, scale, ratio, draw)


@pytest.mark.parametrize(("width", "height"), [(500, 375), (64, 64), (20, 600)])
def test_boxes_are_distributed_as_torchvisions(width: int, height: int) -> None:
    """Share of the area, shape, centre: means and deviations of four thousand."""
    scale, ratio = (0.2, 1.0), (3 / 4, 4 / 3)
    ours = np.array(
        [(left, top, right - left, bottom - top) for left, top, right, bottom in boxes(width, height, scale, ratio)]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        canvas = torch.empty(3, height, width, device="meta")
        drawn = (RandomResizedCrop.get_params(canvas, list(scale), list(ratio)) for _ in range(4000))
        theirs = np.array([(left, top, w, h) for top, left, h, w in drawn])
    for one, other in zip((*ours.T, ours[:, 2] * ours[:, 3]), (*theirs.T, theirs[:, 2] * theirs[:, 3]), strict=True):
        spread = max(other.std(), 0.5)
        assert abs(one.mean() - other.mean()) < 0.1 * spread
        assert abs(one.std() - other.std()) < 0.1 * spread
    assert (
        (ours[:, :2] >= 0).all()
        and (ours[:, 0] + ours[:, 2] <= width).all()
        and (ours[:, 1] + ours[:, 3] <= height).all()
    )


def test_a_box_of_a_sliver_has_a_pixel() -> None:
    for width, height in ((1, 1), (1, 400), (400, 1)):
        for left, top, right, bottom in boxes(width, height, (0.01, 1.0), (3 / 4, 4 / 3)):
            assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_sources_joined_and_those_that_read_whole_images(tmp_path: Path) -> None:
    class Whole:
        names = ("one",)

        def __len__(self) -> int:
            return 1

        def read(self, index: int) -> Image.Image:
            return smooth(64, 48).convert("L")

        def where(self, index: int) -> str:
            return "one"

    smooth(64, 48).convert("L").save(tmp_path / "a.jpg", quality=100)
    make = partial(Crops, size=(16, 16), scale=(1.0, 1.0), ratio=(4 / 3, 4 / 3), flip=0.0, seed=0)
    joined = make(Joined([Folder(tmp_path, 1), Whole()]))
    (first, _), (second, _) = joined[0, 0], joined[0, 1]
    assert first.shape == second.shape == (1, 16, 16)
    assert (first.int() - second.int()).abs().max() <= 4
    assert torch.equal(second, make(Whole())[0, 0][0])
