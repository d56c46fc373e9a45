"""Images with masks: what is paired, what a mask's values are, how both are cut, and what is refused."""

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from leanmim.data.masks import Masked, Pair, masked_pair, patch_classes
from leanmim.data.read import Bad
from leanmim.errors import UserError
from tests.corpus import encoded, png
from tests.masked import masked_squares, write_mask


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return masked_squares(tmp_path / "squares", (3, 2))


def first(folder: Path, **options: object) -> Pair:
    """The first pair of the training images, 64 px unless told."""
    found = Masked(folder / "train" / "images", folder / "train" / "masks", 3, **{"size": (64, 64), **options}).pairs[
        0
    ][1]  # type: ignore[arg-type]
    assert isinstance(found, Pair)
    return found


def test_images_and_masks_belong_together_by_their_names(folder: Path) -> None:
    Image.open(folder / "train" / "images" / "1.png").save(folder / "train" / "images" / "1.jpg")
    (folder / "train" / "images" / "1.png").unlink()
    (folder / "train" / "images" / "town").mkdir()
    (folder / "train" / "masks" / "town").mkdir()
    for kind in ("images", "masks"):
        (folder / "train" / kind / "0.png").rename(folder / "train" / kind / "town" / "a.b.png")
    train, val = masked_pair(folder, 3, (64, 64))
    assert (len(train), len(val)) == (3, 2)
    assert train.source.names == ["1.jpg", "2.png", "town/a.b.png"]
    assert train.masks.names == ["1.png", "2.png", "town/a.b.png"]
    pair = train.pairs[2][1]
    assert isinstance(pair, Pair) and pair.image.shape == (3, 64, 64) and pair.mask.shape == (64, 64)


def test_folders_of_parts_may_lie_in_those_of_images_and_masks(folder: Path, tmp_path: Path) -> None:
    for part in ("train", "val"):
        for kind in ("images", "masks"):
            (tmp_path / "other" / kind).mkdir(parents=True, exist_ok=True)
            shutil.copytree(folder / part / kind, tmp_path / "other" / kind / part)
    own, other = masked_pair(folder, 3, (64, 64)), masked_pair(tmp_path / "other", 3, (64, 64))
    for these, those in zip(own, other, strict=True):
        assert these.masks.names == those.masks.names
        for (_, pair), (_, same) in zip(list(these.pairs), list(those.pairs), strict=True):
            assert isinstance(pair, Pair) and isinstance(same, Pair)
            assert torch.equal(pair.image, same.image) and np.array_equal(pair.mask, same.mask)
    shutil.rmtree(tmp_path / "other" / "masks" / "val")
    with pytest.raises(UserError, match=r"no folder '.*masks/val'"):
        masked_pair(tmp_path / "other", 3, (64, 64))


def test_values_are_those_of_the_file(folder: Path) -> None:
    """Of a palette the indices; grey of 1, 2, 4, 8 and 16 bits."""
    expected = np.random.default_rng(0).integers(0, 2, (64, 64))
    file = folder / "train" / "masks" / "0.png"
    write_mask(file, expected * 7)
    assert np.array_equal(first(folder).mask, expected * 7)
    indexed = Image.fromarray((expected * 3).astype(np.uint8))
    indexed.putpalette([value for i in range(256) for value in (255 - i, i, 128)])
    assert indexed.mode == "P"
    for options in ({}, {"bits": 2}, {"transparency": 0}):
        indexed.save(file, **options)
        assert np.array_equal(first(folder).mask, expected * 3)
    Image.fromarray((expected * 300).astype(np.uint16)).save(file)
    assert np.array_equal(first(folder).mask, expected * 300)
    Image.fromarray(expected.astype(bool)).save(file)
    assert np.array_equal(first(folder).mask, expected)
    for bits in (2, 4):
        value = 2**bits - 2
        packed = [
            np.packbits(np.unpackbits((row * value).astype(np.uint8)[:, None], axis=1)[:, -bits:].ravel())
            for row in expected
        ]
        file.write_bytes(png(64, 64, b"".join(struct.pack("B", 0) + row.tobytes() for row in packed), bits, 0))
        assert np.array_equal(first(folder).mask, expected * value)


@pytest.mark.parametrize("crop", [None, 0.5])
def test_a_mask_is_cut_as_its_image_is(folder: Path, crop: float | None) -> None:
    """The image is a picture of its mask."""
    mask = np.kron(np.random.default_rng(0).integers(0, 2, (12, 20)), np.ones((16, 16), int))
    write_mask(folder / "train" / "images" / "0.png", mask * 255)
    write_mask(folder / "train" / "masks" / "0.png", mask)
    for size in ((192, 192), (96, 192), (192, 128)):
        pair = first(folder, size=size, crop=crop)
        as_mask = torch.from_numpy(pair.mask)[None, None].float()
        resized = torch.nn.functional.interpolate(as_mask, size, mode="bilinear", align_corners=False)[0, 0]
        assert (resized - pair.image[0] / 255).abs().mean() < 0.05, size


def test_what_cannot_be_read_says_why(folder: Path) -> None:
    for kind, place in (("images", 0), ("masks", 1)):
        (folder / "train" / kind / f"{place}.png").write_bytes(b"none")
    pairs = Masked(folder / "train" / "images", folder / "train" / "masks", 3, (64, 64)).pairs
    for kind, place in (("images", 0), ("masks", 1)):
        found = pairs[place][1]
        assert isinstance(found, Bad) and f"{kind}/{place}.png" in found.path
    assert isinstance(pairs[2][1], Pair)


def test_folders_that_are_laid_out_otherwise(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder '.*nowhere'; it holds train/images, train/masks"):
        masked_pair(tmp_path / "nowhere", 3, (64, 64))
    (folder / "val" / "masks").rename(folder / "val" / "labels")
    with pytest.raises(UserError, match=r"no folder '.*val/masks'"):
        masked_pair(folder, 3, (64, 64))
    (folder / "val").rename(folder / "test")
    with pytest.raises(UserError, match=r"no folder '.*val'"):
        masked_pair(folder, 3, (64, 64))
    (folder / "train" / "masks").rename(folder / "val")
    with pytest.raises(UserError, match=r"no folder '.*train/masks'"):
        masked_pair(folder, 3, (64, 64))


def test_names_without_counterpart(folder: Path) -> None:
    extra = folder / "train" / "masks" / "other.png"
    write_mask(extra, np.zeros((64, 64)))
    with pytest.raises(UserError, match=r"1 of 4 masks in .* have no image of the same name: other\.png"):
        masked_pair(folder, 3, (64, 64))
    extra.unlink()
    for file in (folder / "val" / "masks").iterdir():
        file.rename(file.with_stem(f"{file.stem}_mask"))
    with pytest.raises(
        UserError, match=r"2 of 2 images in .*val/images have no mask of the same name: 0\.png, 1\.png;"
    ):
        masked_pair(folder, 3, (64, 64))


def test_two_images_of_one_name(folder: Path) -> None:
    (folder / "train" / "images" / "0.jpg").write_bytes(encoded(Image.new("RGB", (64, 64)), "JPEG"))
    with pytest.raises(UserError, match=r"holds 0\.jpg and 0\.png: .* rename or remove one"):
        masked_pair(folder, 3, (64, 64))


def test_masks_that_are_none(folder: Path) -> None:
    file = folder / "train" / "masks" / "0.png"
    for mode in ("RGB", "RGBA", "LA"):
        Image.new(mode, (64, 64)).save(file)
        with pytest.raises(UserError, match=r"train/masks/0\.png is a picture in colours; .* write it as a grey PNG"):
            first(folder)
    Image.new("L", (64, 32)).save(file)
    with pytest.raises(UserError, match=r"0\.png has 64 x 32 pixels, its image .*images/0\.png 64 x 64; give the mask"):
        first(folder)
    Image.new("L", (64, 64)).save(file.with_suffix(".jpg"))
    with pytest.raises(UserError, match=r"masks are PNG files, .* holds 0\.jpg"):
        first(folder)


def test_the_class_of_a_patch_is_that_of_most_pixels() -> None:
    mask = np.full((6, 10), 3)
    mask[:3, :5] = [[255, 255, 255, 4, 4], [255, 255, 255, 9, 9], [255, 255, 255, 9, 4]]  # 4 and 9: three each
    mask[3:, :5] = 255
    mask[:3, 5:] = 0
    assert patch_classes(mask, (2, 2), (255,)).tolist() == [[4, 0], [-1, 3]]
    assert patch_classes(mask, (2, 2), ()).tolist() == [[255, 0], [255, 3]]
    assert patch_classes(mask, (2, 2), (0, 255)).tolist() == [[4, -1], [-1, 3]]


def test_the_class_of_a_patch_by_a_loop() -> None:
    mask = np.random.default_rng(0).integers(0, 5, (23, 17))
    found = patch_classes(mask, (4, 3), (0,))
    for r in range(4):
        for c in range(3):
            own = [
                mask[y, x] for y in range(23) for x in range(17) if (y * 4 // 23, x * 3 // 17) == (r, c) and mask[y, x]
            ]
            assert found[r, c] == max(sorted(set(own)), key=own.count)
