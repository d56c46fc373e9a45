"""Whole images in tiles."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from leanmim.config import Pretrain, Show
from leanmim.pictures import show
from leanmim.pictures.images import stretched
from leanmim.pictures.tiles import evenly, fitted, tiling
from tests.drawn import Drawn, run_of
from tests.helpers import noisy


@pytest.mark.parametrize(
    ("length", "begins"), [(32, [0]), (40, [0, 8]), (64, [0, 32]), (72, [0, 16, 40]), (96, [0, 32, 64])]
)
def test_as_few_tiles_as_cover_a_side(length: int, begins: list[int]) -> None:
    assert evenly(length, 32, 8) == begins


@pytest.mark.parametrize("cell", [1, 4])
def test_tiles_make_the_image_again(cell: int) -> None:
    own = tiling((72, 104), (32, 40), 8)
    image = torch.rand(3, 72, 104)
    tiles = own.tiles(image)
    assert tiles.shape == (9, 3, 32, 40)
    assert torch.equal(own.whole(tiles[..., ::cell, ::cell]), image[..., ::cell, ::cell])
    assert torch.equal(own.whole(tiles[:, 0] > 0.5), image[0] > 0.5)


@pytest.mark.parametrize(
    ("size", "fits"), [((600, 400), (64, 96)), ((300, 451), (96, 64)), ((50, 50), (64, 64)), ((200, 20), (64, 640))]
)
def test_an_image_stays_whole(size: tuple[int, int], fits: tuple[int, int]) -> None:
    """Its aspect is kept, up to a patch."""
    assert fitted(Image.new("RGB", size), (32, 32), 2, 8).shape[1:] == fits
    assert fitted(np.zeros((size[1], size[0], 3), np.float32), (32, 32), 2, 8).shape[1:] == fits


@pytest.mark.parametrize("target", ["raw-pixels", "hog"])
@pytest.mark.usefixtures("whole_pictures")
def test_whole_photos_are_drawn(tiny: Pretrain, photos: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    drawn = Drawn(monkeypatch)
    images = tuple(str(photos / name) for name in ("castle.jpg", "astronaut.jpg"))
    show(Show(runs=(str(run_of(replace(tiny, target=target))),), images=images, tiles=2, seed=1))
    columns = 3 if target == "raw-pixels" else 4
    assert [picture.shape[:2] for picture in drawn.pictures] == [(64, 96)] * columns + [(64, 64)] * columns
    original, masked, *_, last = drawn.pictures[:columns]
    hidden = (masked == 0.5).all(-1)
    assert "masked, 75%" in drawn.texts and hidden.mean() == pytest.approx(0.75, abs=0.01)
    assert (
        len({hidden[y : y + 32, x : x + 32].tobytes() for y in (0, 32) for x in (0, 32, 64)}) == 6
    )  # each its own mask
    if target == "raw-pixels":
        assert np.array_equal(last[~hidden], original[~hidden])
    assert drawn.texts[-1].endswith("in tiles of 32 x 32 px, each seen alone")


def test_tiles_of_stored_values_are_stretched_together() -> None:
    image = noisy(1, 5, 32, 64)[0]
    own = tiling((32, 64), (32, 32), 8)
    tiles = torch.cat([own.tiles(image), own.tiles(1000 * image)])
    found = stretched(tiles, [2, 2])(tiles)
    assert torch.allclose(own.whole(found[:2]), stretched(image[None])(image[None])[0])
    assert torch.allclose(found[:2], found[2:], atol=1e-4)
