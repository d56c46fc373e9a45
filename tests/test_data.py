"""Files on disk, of every kind and in every state, become the right pixels in the right order."""

import io
import multiprocessing
import os
import pickle
import random
import struct
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from leanmim.data import (
    IMAGENET,
    SUFFIXES,
    UNREADABLE,
    Bad,
    Crops,
    Labelled,
    Normalise,
    Order,
    centre_crop,
    collate,
    epoch_order,
    labelled_pair,
    list_images,
    loader,
    read_image,
    resolve_workers,
    seed_of,
    statistics,
)
from leanmim.errors import UserError

CPU = torch.device("cpu")
# Python 3.12 warns of every fork of a process that has threads
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def blocks(height: int = 48, width: int = 80) -> np.ndarray:
    """16 px squares of one colour each: no symmetry, and nothing for a codec to lose."""
    return noise(height // 16, width // 16, 7).repeat(16, 0).repeat(16, 1)


def grey(rgb: np.ndarray) -> np.ndarray:
    """Luma of ITU-R 601."""
    return rgb @ np.array([0.299, 0.587, 0.114])


def write(path: Path, height: int = 40, width: int = 56, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(height, width, seed)).save(path)
    return path


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def pixels(path: Path, channels: int = 3) -> np.ndarray:
    image = read_image(path, channels)
    assert image.mode == {1: "L", 3: "RGB"}[channels]
    return np.asarray(image).astype(int)


# seed_of


def test_seeds_differ_by_numbers_order_and_length() -> None:
    keys = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (0, 1, 0), (0, 0, 1), (1, 2, 3), (3, 2, 1), (1, 2, 3, 0)]
    seeds = [seed_of(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [seed_of(*key) for key in keys]


# list_images


def test_images_are_found_at_any_depth_and_sorted(tmp_path: Path) -> None:
    names = ["b.png", "a.jpg", "z/deep/er/c.webp", "z/a.bmp", "m/1.gif", "m/10.tif", "m/2.tiff", "naïve ü.jpeg"]
    touch(tmp_path, *names)
    assert list_images(tmp_path) == sorted(tmp_path / name for name in names)
    assert list_images(str(tmp_path)) == list_images(tmp_path)


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_suffixes_count_in_any_case(tmp_path: Path, suffix: str) -> None:
    names = [f"a{suffix}", f"b{suffix.upper()}", f"c{suffix.title()}", f"d{suffix[:-1]}{suffix[-1].upper()}"]
    touch(tmp_path, *names)
    assert {file.name for file in list_images(tmp_path)} == set(names)


def test_what_is_no_image_or_hidden_is_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "notes.txt", "jpg", "b.jpg.part", "c.npy")
    touch(tmp_path, ".hidden.jpg", "._a.jpg", ".cache/d.jpg", "x/.y/e.png")
    (tmp_path / "folder.jpg").mkdir()
    assert list_images(tmp_path) == [tmp_path / "a.jpg"]


def test_a_hidden_folder_can_be_named_itself(tmp_path: Path) -> None:
    touch(tmp_path, ".data/a.jpg")
    assert list_images(tmp_path / ".data") == [tmp_path / ".data" / "a.jpg"]


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    touch(tmp_path, "data/a/1.jpg", "elsewhere/2.jpg")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "a" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "a" / "self").symlink_to(tmp_path / "data" / "a")
    assert list_images(tmp_path / "data") == [tmp_path / "data" / "a" / "1.jpg", tmp_path / "data" / "linked" / "2.jpg"]


def test_of_two_ways_to_a_folder_the_first_by_name_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "real/1.jpg")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    walk = os.walk

    def backwards(*args, **kwargs):  # a file system lists folders in any order
        for here, folders, names in walk(*args, **kwargs):
            folders.sort(reverse=True)
            yield here, folders, names

    monkeypatch.setattr(os, "walk", backwards)
    assert list_images(tmp_path) == [tmp_path / "link" / "1.jpg"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, ["there is no folder", "--data takes a folder of images"]),
        (lambda path: path.mkdir(), ["holds no files", "leanmim reads", "jpg", "png", "tiff"]),
        (lambda path: touch(path, "a.txt", "b/c.csv"), ["holds 2 files but no images", "leanmim reads", "webp"]),
        (lambda path: touch(path, ".a.jpg"), ["holds no files"]),
        (lambda path: path.touch(), ["is a file", "--data takes a folder of images"]),
    ],
    ids=["missing", "empty", "no images", "hidden only", "file"],
)
def test_a_folder_without_images_is_an_error_with_a_remedy(tmp_path: Path, make, words: list[str]) -> None:
    path = tmp_path / "photos.jpg"
    make(path)
    with pytest.raises(UserError) as error:
        list_images(path)
    for word in [str(path), *words]:
        assert word in str(error.value)


# read_image


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("suffix", "options", "tolerance"),
    [
        (".jpg", {"quality": 100, "subsampling": 0}, 3),
        (".png", {}, 0),
        (".webp", {"lossless": True}, 0),
        (".bmp", {}, 0),
        (".tiff", {}, 0),
        (".tif", {"compression": "tiff_lzw"}, 0),
        (".gif", {}, 0),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_format_is_read(tmp_path: Path, suffix: str, options: dict, tolerance: int, channels: int) -> None:
    image = Image.fromarray(blocks())
    image = image.quantize(64) if suffix == ".gif" else image
    image.save(tmp_path / ("a" + suffix), **options)
    want = blocks().astype(int) if channels == 3 else grey(blocks())
    assert np.abs(pixels(tmp_path / ("a" + suffix), channels) - want).max() <= tolerance + (channels == 1)


def test_the_photos_of_the_project_are_read(photos: Path) -> None:
    for file in list_images(photos)[:4]:
        rgb, luma = pixels(file, 3), pixels(file, 1)
        assert rgb.std() > 20
        assert np.abs(luma - grey(rgb)).max() <= 1


def test_the_content_counts_and_not_the_suffix(tmp_path: Path) -> None:
    Image.fromarray(blocks()).save(tmp_path / "a.jpg", format="PNG")
    assert (pixels(tmp_path / "a.jpg") == blocks()).all()


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".tiff", ".png"])
def test_of_several_frames_the_first_is_read(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if suffix == ".webp" else {}
    path = tmp_path / ("a" + suffix)
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    with Image.open(path) as file:
        assert file.n_frames == 3
    assert (pixels(path) == [255, 0, 0]).all()
    assert (pixels(path, 1) == 76).all()


UPRIGHT = {  # what a viewer does with the stored rows and columns, by the EXIF standard
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}


@pytest.mark.parametrize("orientation", sorted(UPRIGHT))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tiff"])
def test_exif_orientation_is_applied(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {".webp": {"lossless": True}, ".jpg": {"quality": 100, "subsampling": 0}}.get(suffix, {})
    Image.fromarray(blocks()).save(tmp_path / ("a" + suffix), exif=exif, **options)
    want = UPRIGHT[orientation](blocks()).astype(int)
    assert np.abs(pixels(tmp_path / ("a" + suffix)) - want).max() <= (3 if suffix == ".jpg" else 0)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("depth", [8, 16])
def test_exif_orientation_is_applied_to_grey(tmp_path: Path, depth: int, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    values = np.random.default_rng(0).integers(0, 256, (3, 5))
    stored = values.astype(np.uint8) if depth == 8 else (values * 257).astype(np.uint16)
    Image.fromarray(stored).save(tmp_path / ("a" + suffix), exif=exif)
    got, want = pixels(tmp_path / ("a" + suffix), 1), UPRIGHT[orientation](values)
    assert got.shape == want.shape and (got == want).all()


@pytest.mark.parametrize("suffix", [".png", ".gif", ".bmp", ".tiff"])
def test_palettes_are_looked_up(tmp_path: Path, suffix: str) -> None:
    image = Image.fromarray(np.array([[0, 1, 2], [2, 0, 1]], dtype=np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 200, 100, 0, 0, 0, 255])
    image.save(tmp_path / ("a" + suffix))
    colours = np.array([[10, 20, 30], [200, 100, 0], [0, 0, 255]])
    assert (pixels(tmp_path / ("a" + suffix)) == colours[[[0, 1, 2], [2, 0, 1]]]).all()


@pytest.mark.parametrize(
    ("suffix", "transparency", "second"),
    [(".png", 0, [200, 100, 0]), (".gif", 0, [200, 100, 0]), (".png", bytes([0, 51]), [244, 224, 204])],
    ids=["png index", "gif index", "png alphas"],
)
def test_transparent_palette_entries_are_blended_with_white(tmp_path: Path, suffix, transparency, second) -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 200, 100, 0, 0, 0, 255])
    image.save(tmp_path / ("a" + suffix), transparency=transparency)
    assert np.abs(pixels(tmp_path / ("a" + suffix)) - [[255, 255, 255], second, [0, 0, 255]]).max() <= 1


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tiff"])
@pytest.mark.parametrize("channels", [1, 3])
def test_transparency_is_blended_with_white(tmp_path: Path, suffix: str, channels: int) -> None:
    rgba = np.array([[[0, 0, 0, 0], [0, 0, 0, 255], [0, 0, 0, 128], [200, 100, 50, 64], [200, 100, 50, 255]]], np.uint8)
    options = {"lossless": True, "exact": True} if suffix == ".webp" else {}
    Image.fromarray(rgba).save(tmp_path / ("a" + suffix), **options)
    alpha = rgba[..., 3:] / 255
    want = rgba[..., :3] * alpha + 255 * (1 - alpha)
    want = want if channels == 3 else grey(want)
    assert np.abs(pixels(tmp_path / ("a" + suffix), channels) - want).max() <= 1 + (channels == 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_transparency_of_grey_is_blended_with_white(tmp_path: Path, channels: int) -> None:
    grey_alpha = np.array([[[7, 0], [0, 255], [0, 128], [100, 51]]], np.uint8)
    image = Image.merge("LA", [Image.fromarray(grey_alpha[..., i]) for i in (0, 1)])
    image.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as file:
        assert file.mode == "LA"
    got = pixels(tmp_path / "a.png", channels).reshape(4, -1)
    assert np.abs(got - np.array([[255], [0], [127], [224]])).max() <= 1


@pytest.mark.parametrize(("mode", "key"), [("L", 40), ("RGB", (40, 40, 40))])
def test_a_transparent_colour_becomes_white(tmp_path: Path, mode: str, key) -> None:
    image = Image.fromarray(np.array([[40, 41]], np.uint8)).convert(mode)
    image.save(tmp_path / "a.png", transparency=key)
    assert pixels(tmp_path / "a.png", 1).tolist() == [[255, 41]]
    assert pixels(tmp_path / "a.png", 3).tolist() == [[[255] * 3, [41] * 3]]


@pytest.mark.parametrize(("suffix", "tolerance"), [(".tiff", 0), (".jpg", 3)])
def test_cmyk_is_converted(tmp_path: Path, suffix: str, tolerance: int) -> None:
    inks = {(0, 0, 0, 0): (255, 255, 255), (0, 0, 0, 255): (0, 0, 0), (255, 0, 0, 0): (0, 255, 255)}
    for i, (ink, colour) in enumerate(inks.items()):
        path = tmp_path / f"{i}{suffix}"
        Image.new("CMYK", (16, 16), ink).save(path)
        assert np.abs(pixels(path) - colour).max() <= tolerance
        assert np.abs(pixels(path, 1) - grey(np.array(colour))).max() <= tolerance + 1


@pytest.mark.parametrize("suffix", [".png", ".tiff", ".bmp"])
@pytest.mark.parametrize("channels", [1, 3])
def test_one_bit_is_black_and_white(tmp_path: Path, suffix: str, channels: int) -> None:
    bits = np.random.default_rng(0).integers(0, 2, (9, 13)).astype(bool)
    Image.fromarray(bits).save(tmp_path / ("a" + suffix))
    assert (pixels(tmp_path / ("a" + suffix), channels).reshape(9, 13, -1) == 255 * bits[..., None]).all()


DEEP = np.array([[0, 128, 257, 32768, 65278, 65535]])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_16_bit_grey_is_scaled(tmp_path: Path, suffix: str, channels: int) -> None:
    Image.fromarray(DEEP.astype(np.uint16)).save(tmp_path / ("a" + suffix))
    got = pixels(tmp_path / ("a" + suffix), channels).reshape(-1, channels)
    assert (got == np.array([0, 0, 1, 128, 254, 255])[:, None]).all()


def test_16_bit_grey_is_scaled_big_endian(tmp_path: Path) -> None:
    Image.frombytes("I;16B", DEEP.shape[::-1], DEEP.astype(">u2").tobytes()).save(tmp_path / "a.tiff")
    with Image.open(tmp_path / "a.tiff") as file:
        assert file.mode == "I;16B"
    assert pixels(tmp_path / "a.tiff", 1).tolist() == [[0, 0, 1, 128, 254, 255]]


def test_16_bit_grey_that_is_dark_stays_dark(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 2570, np.uint16)).save(tmp_path / "a.png")
    assert (pixels(tmp_path / "a.png", 1) == 10).all()


@pytest.mark.parametrize("colour_type", [2, 6], ids=["RGB", "RGBA"])
def test_16_bit_colour_is_scaled(tmp_path: Path, colour_type: int) -> None:
    values = [(0, 32768, 65535, 65535), (65535, 257, 0, 65535), (25700, 25700, 25700, 65535)]
    row = b"".join(struct.pack(">4H", *value)[: 2 * (3 if colour_type == 2 else 4)] for value in values)

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">2I5B", 3, 1, 16, colour_type, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"\0" + row))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b""))
    assert pixels(tmp_path / "a.png").tolist() == [[[0, 128, 255], [255, 1, 0], [100, 100, 100]]]


@pytest.mark.parametrize(
    ("values", "want"),
    [([0, 2**30, 2**31 - 1], [0, 128, 255]), ([0, 32768, 65535], [0, 128, 255]), ([-5, 257, 65535], [0, 1, 255])],
    ids=["32 bits used", "16 bits used", "negative"],
)
def test_32_bit_integers_are_scaled(tmp_path: Path, values: list[int], want: list[int]) -> None:
    Image.fromarray(np.array([values], np.int32)).save(tmp_path / "a.tiff")
    with Image.open(tmp_path / "a.tiff") as file:
        assert file.mode == "I"
    assert pixels(tmp_path / "a.tiff", 1).tolist() == [want]


@pytest.mark.parametrize(
    ("values", "want"),
    [
        ([0, 0.2, 0.6, 1], [0, 51, 153, 255]),
        ([0, 51, 127.6, 255], [0, 51, 128, 255]),
        ([-1, 0.2, 0.6, 1], [0, 51, 153, 255]),
        ([-1, 0.2, 300, 1], [0, 0, 255, 1]),
        ([0, 0.4, 1.6, 1], [0, 0, 2, 1]),
        ([np.nan, 0.2, -np.inf, 1], [0, 51, 0, 255]),
    ],
    ids=["0 to 1", "0 to 255", "negative", "clipped", "dark", "not finite"],
)
def test_floating_point_is_scaled(tmp_path: Path, values: list[float], want: list[int]) -> None:
    Image.fromarray(np.array([values], np.float32)).save(tmp_path / "a.tiff")
    with Image.open(tmp_path / "a.tiff") as file:
        assert file.mode == "F"
    assert pixels(tmp_path / "a.tiff", 1).tolist() == [want]
    assert (pixels(tmp_path / "a.tiff", 3) == pixels(tmp_path / "a.tiff", 1)[..., None]).all()


def damaged_exif() -> bytes:
    """A JPEG whose orientation can be read and whose other EXIF values cannot be written back."""
    entries = [(0x0100, 5, 1, 26), (0x0112, 3, 1, 6)]  # a fraction without room for it, an orientation
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    exif = b"Exif\0\0" + struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + table + b"\0" * 4
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def truncated(file_format: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(buffer, file_format)
    return buffer.getvalue()[: buffer.tell() // 2]


BROKEN = {
    "empty": b"",
    "text": b"This is no picture.",
    "html": b"<!DOCTYPE html><title>404</title>",
    **{f"half a {name}": truncated(name) for name in ("JPEG", "PNG", "WEBP", "BMP", "TIFF")},
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_broken_files_raise_what_is_caught(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(UNREADABLE):
        read_image(tmp_path / "a.jpg", 3)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF"])
def test_damaged_bytes_raise_what_is_caught_or_nothing(
    tmp_path: Path, file_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.init()
    if file_format not in Image.SAVE:
        pytest.skip(f"this Pillow has no {file_format}")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    exif = Image.Exif()
    exif[0x0112], exif[0x011A], exif[0x010E] = 6, 72.0, "a picture"
    buffer = io.BytesIO()
    Image.fromarray(noise(6, 9)).save(buffer, file_format, **({} if file_format in ("BMP", "GIF") else {"exif": exif}))
    dice, readable = random.Random(0), 0
    for _ in range(80):
        data = bytearray(buffer.getvalue())
        for _ in range(dice.choice((1, 2, 8))):
            data[dice.randrange(len(data))] = dice.choice((0, 1, 255, dice.randrange(256)))
        (tmp_path / "a.jpg").write_bytes(data)
        try:
            read_image(tmp_path / "a.jpg", 3)
            readable += 1
        except UNREADABLE:
            pass
    assert readable < 80


# Crops


def crops(files: list[Path], size: tuple[int, int] = (24, 24), channels: int = 3, seed: int = 0) -> Crops:
    return Crops(files, channels, size, (0.2, 1.0), (0.75, 4 / 3), 0.5, seed)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / "images" / f"{i}.png", seed=i) for i in range(12)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(24, 24), (16, 40), (40, 16)])
def test_crops_are_bytes_of_the_size_asked_for(images: list[Path], size: tuple[int, int], channels: int) -> None:
    crop, bad = crops(images, size, channels)[0, 3]
    assert crop.dtype == torch.uint8 and crop.shape == (channels, *size)
    assert bad == []


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 50), (50, 1), (2, 3)])
def test_crops_of_tiny_images_are_enlarged(tmp_path: Path, height: int, width: int) -> None:
    crop, bad = crops([write(tmp_path / "a.png", height, width)])[0, 0]
    assert crop.shape == (3, 24, 24) and not bad


def test_a_crop_of_everything_is_the_resized_image(tmp_path: Path) -> None:
    file = write(tmp_path / "a.png", 48, 48)
    crop, _ = Crops([file], 3, (24, 24), (1.0, 1.0), (1.0, 1.0), 0.0, 0)[0, 0]
    want = Image.fromarray(noise(48, 48)).resize((24, 24), Image.Resampling.BICUBIC)
    assert (crop.permute(1, 2, 0).numpy() == np.asarray(want)).all()


def test_flips_happen_as_often_as_asked(tmp_path: Path) -> None:
    file = write(tmp_path / "a.png", 16, 16)

    def share(flip: float) -> float:
        data = Crops([file], 3, (16, 16), (1.0, 1.0), (1.0, 1.0), flip, 0)
        want = torch.from_numpy(noise(16, 16)).permute(2, 0, 1)
        got = [data[epoch, 0][0] for epoch in range(60)]
        assert all(torch.equal(crop, want) or torch.equal(crop, want.flip(2)) for crop in got)
        return sum(torch.equal(crop, want.flip(2)) for crop in got) / 60

    assert share(0.0) == 0 and share(1.0) == 1
    assert 0.3 < share(0.5) < 0.7


def test_crops_depend_on_seed_epoch_and_index_only(images: list[Path]) -> None:
    keys = [(epoch, index) for epoch in range(3) for index in range(len(images))]
    data = crops(images)
    torch.manual_seed(1)
    first = {key: data[key][0] for key in keys}
    torch.manual_seed(2)
    again = crops(images)
    second = {key: again[key][0] for key in reversed(keys)}
    assert all(torch.equal(first[key], second[key]) for key in keys)
    assert not any(torch.equal(first[0, i], first[1, i]) for i in range(len(images)))
    other = crops(images, seed=1)
    assert not any(torch.equal(first[0, i], other[0, i][0]) for i in range(len(images)))


def test_two_images_of_an_epoch_are_cropped_differently(tmp_path: Path) -> None:
    data = crops([write(tmp_path / f"{i}.png", seed=0) for i in range(4)])
    assert not any(torch.equal(data[0, 0][0], data[0, i][0]) for i in range(1, 4))


def test_crops_leave_the_random_numbers_of_the_process_alone(
    images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def reseeded(seed: int) -> None:
        raise AssertionError("masks and drop path on the GPU would repeat")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", reseeded)
    before = torch.get_rng_state()
    crops(images)[0, 0]
    Labelled(images[0].parent.parent, 3, v2.Compose([v2.RandomCrop(8), v2.PILToTensor()]))[0, 0]
    assert torch.equal(torch.get_rng_state(), before)


def read(data: Crops, workers: int, start: int = 0, stop: int = 6) -> tuple[list[torch.Tensor], list[Bad]]:
    order = Order(len(data), 4, 3, start, stop, seed=0)
    batches = list(loader(data, order, workers, CPU, collate))
    return [images for images, _ in batches], [bad for _, bads in batches for bad in bads]


@forks
def test_batches_do_not_depend_on_workers_or_start(images: list[Path]) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    want, _ = read(crops(images), 0)
    assert len(want) == 6 and want[0].shape == (4, 3, 24, 24) and want[0].dtype == torch.uint8
    for workers in (1, 2):
        got, _ = read(crops(images), workers)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    tail, _ = read(crops(images), 2, start=4)
    assert all(torch.equal(a, b) for a, b in zip(tail, want[4:], strict=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_workers_hold_can_be_pickled(images: list[Path]) -> None:
    """Workers are forked on Linux only, and no longer from Python 3.14 on."""
    data = crops(images)
    assert torch.equal(pickle.loads(pickle.dumps(data))[1, 5][0], data[1, 5][0])
    labelled = Labelled(images[0].parent.parent, 3, centre_crop((16, 24)))
    assert torch.equal(pickle.loads(pickle.dumps(labelled))[2][0], labelled[2][0])
    assert pickle.loads(pickle.dumps(collate)) is collate


@forks
@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_files_are_replaced_by_the_next_and_reported(images: list[Path], workers: int) -> None:
    half = images[2].read_bytes()
    images[2].write_bytes(half[: len(half) // 2])
    images[3].write_text("not a picture")
    images[11].unlink()
    data = crops(images)
    _, bad = data[0, 2]
    assert [report.path for report in bad] == [str(images[2]), str(images[3])]
    assert "OSError" in bad[0].reason and "truncated" in bad[0].reason
    assert "UnidentifiedImageError" in bad[1].reason and "cannot identify" in bad[1].reason
    _, bad = data[0, 11]  # the file after the last is the first
    assert [report.path for report in bad] == [str(images[11])] and "FileNotFoundError" in bad[0].reason

    batches, reports = read(data, workers)
    assert all(batch.shape == (4, 3, 24, 24) for batch in batches)
    assert {report.path for report in reports} == {str(images[i]) for i in (2, 3, 11)}


def test_a_replacement_is_the_next_image(tmp_path: Path) -> None:
    files = [tmp_path / "a.png", write(tmp_path / "b.png", 24, 24, seed=5)]
    files[0].write_text("not a picture")
    crop, _ = Crops(files, 3, (24, 24), (1.0, 1.0), (1.0, 1.0), 0.0, 0)[0, 0]
    assert (crop.permute(1, 2, 0).numpy() == noise(24, 24, 5)).all()


def test_odd_exif_does_not_end_a_run(tmp_path: Path) -> None:
    files = [tmp_path / "a.jpg", write(tmp_path / "b.png")]
    files[0].write_bytes(damaged_exif())
    crop, _ = crops(files)[0, 0]
    assert crop.shape == (3, 24, 24)


@forks
@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_readable_is_an_error_without_traceback(tmp_path: Path, workers: int) -> None:
    touch(tmp_path, *(f"{i}.jpg" for i in range(12)))
    with pytest.raises(UserError, match=r"^none of the 12 image files can be read; the first: ") as error:
        read(crops(list_images(tmp_path)), workers)
    assert str(tmp_path) in str(error.value) and "UnidentifiedImageError" in str(error.value)
    assert "Traceback" not in str(error.value)
    assert not multiprocessing.active_children()  # though the error is still in hand


# Order


@pytest.mark.parametrize("seed", [0, 3])
def test_an_epoch_shows_every_image_once_to_one_process(seed: int) -> None:
    per_epoch, batch, world, epochs = 5, 4, 2, 3
    count = per_epoch * batch * world
    ranks = [list(Order(count, batch, per_epoch, 0, epochs * per_epoch, seed, rank, world)) for rank in range(world)]
    orders = []
    for epoch in range(epochs):
        steps = slice(epoch * per_epoch, (epoch + 1) * per_epoch)
        seen = [[item for items in order[steps] for item in items] for order in ranks]
        assert set(seen[0]).isdisjoint(seen[1])
        assert sorted(seen[0] + seen[1]) == [(epoch, index) for index in range(count)]
        orders.append([index for _, index in seen[0] + seen[1]])
    assert all(a != b for a, b in pairwise(orders))
    assert all(order != sorted(order) for order in orders)


def test_the_batches_of_two_processes_are_that_of_one_twice_as_large() -> None:
    one = list(Order(48, 8, 6, 0, 12, 0))
    two = [list(Order(48, 4, 6, 0, 12, 0, rank, 2)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*two, strict=True)] == one


def test_what_does_not_fill_a_step_comes_in_other_epochs() -> None:
    batches = list(Order(10, 4, 2, 0, 12, 0))
    assert all(len(set(batch)) == 4 for batch in batches)
    for epoch in range(6):
        indices = [index for batch in batches[2 * epoch : 2 * epoch + 2] for _, index in batch]
        assert len(set(indices)) == 8
    assert {index for batch in batches for _, index in batch} == set(range(10))


@pytest.mark.parametrize("start", [1, 5, 6, 13])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_order_can_be_entered_anywhere(start: int, rank: int) -> None:
    whole = Order(50, 4, 6, 0, 18, 7, rank, 2)
    tail = Order(50, 4, 6, start, 18, 7, rank, 2)
    assert list(tail) == list(whole)[start:]
    assert len(tail) == 18 - start == len(list(tail))


def test_orders_differ_by_seed_and_are_permutations() -> None:
    orders = [epoch_order(100, seed, epoch).tolist() for seed in range(3) for epoch in range(3)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in orders}) == 9


def test_workers_are_counted_from_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    for cpus, want in ((None, 0), (1, 0), (2, 1), (9, 8), (64, 8)):
        monkeypatch.setattr(os, "cpu_count", lambda cpus=cpus: cpus)
        assert resolve_workers(-1) == want
        assert resolve_workers(0) == 0 and resolve_workers(20) == 20


# Normalise, statistics


@pytest.mark.parametrize("channels", [1, 3])
def test_normalise_is_the_formula_and_invert_undoes_it(channels: int) -> None:
    mean, std = IMAGENET[channels]
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, channels, 16, 16)
    normalise = Normalise(mean, std, CPU)
    y = normalise(x)
    want = (x.numpy().astype(np.float64) / 255 - np.reshape(mean, (-1, 1, 1))) / np.reshape(std, (-1, 1, 1))
    assert y.dtype == torch.float32
    np.testing.assert_allclose(y.numpy(), want, atol=1e-6)
    np.testing.assert_allclose(normalise.invert(y).numpy(), x.numpy() / 255, atol=1e-6)
    assert torch.equal((normalise.invert(y) * 255).round().to(torch.uint8), x)
    extremes = normalise.invert(torch.tensor([-9.0, 9.0]).view(1, 1, 1, 2).expand(1, channels, 1, 2))
    assert extremes.flatten(0, 2).tolist() == [[0, 1]] * channels


@pytest.mark.parametrize("channels", [1, 3])
def test_statistics_weigh_every_image_alike(tmp_path: Path, channels: int) -> None:
    arrays = [noise(9, 7, 0), noise(30, 20, 1) // 2, noise(4, 50, 2) // 3]
    for i, array in enumerate(arrays):
        Image.fromarray(array if channels == 3 else array[..., 0]).save(tmp_path / f"{i}.png")
    touch(tmp_path, "bad.png")
    mean, std = statistics(list_images(tmp_path), channels, seed=0)
    for c in range(channels):
        weights = np.concatenate([np.full(a[..., c].size, 1 / a[..., c].size / 3) for a in arrays])
        values = np.concatenate([a[..., c].ravel() / 255 for a in arrays])
        want = np.sum(weights * values)
        assert mean[c] == pytest.approx(want, abs=1e-6)
        assert std[c] == pytest.approx(np.sqrt(np.sum(weights * (values - want) ** 2)), abs=1e-6)


def test_statistics_of_a_sample_are_those_of_some_of_the_files(tmp_path: Path) -> None:
    levels = [0, 10, 30, 70]
    files = []
    for level in levels:
        files.append(tmp_path / f"{level}.png")
        Image.new("L", (4, 4), level).save(files[-1])
    sums = {(a + b) / 2 / 255: abs(a - b) / 2 / 255 for a in levels for b in levels if a < b}
    (mean,), (std,) = statistics(files, 1, seed=0, sample=2)
    (match,) = [key for key in sums if abs(key - mean) < 1e-9]
    assert std == pytest.approx(sums[match], abs=1e-6)
    assert statistics(files, 1, seed=0, sample=2) == ([mean], [std])


def test_the_deviation_of_a_single_colour_is_not_zero(tmp_path: Path) -> None:
    Image.new("RGB", (5, 5), (51, 0, 255)).save(tmp_path / "a.png")
    mean, std = statistics([tmp_path / "a.png"], 3, seed=0)
    assert mean == pytest.approx([0.2, 0, 1]) and min(std) > 0


def test_statistics_of_nothing_readable_are_an_error(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg")
    with pytest.raises(UserError, match=r"none of 2 sampled image files can be read.*jpg"):
        statistics(list_images(tmp_path), 3, seed=0)


# labelled folders


def tree(root: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        write(root / name, 12, 12, seed=i)
    return root


def test_classes_are_the_folders_in_order(tmp_path: Path) -> None:
    root = tree(tmp_path, "train/dog/1.png", "train/cat/2.png", "train/cat/deep/3.png", "val/dog/4.png")
    train, val = labelled_pair(str(root), 3, centre_crop((8, 8)))
    assert train.classes == val.classes == ["cat", "dog"]
    assert len(train) == 3 and len(val) == 1
    names = {"2.png": 0, "3.png": 0, "1.png": 1}
    assert {file.name: label for file, label in zip(train.files, train.labels, strict=True)} == names
    assert val.labels == [1]
    image, label = val[0]
    assert image.shape == (3, 8, 8) and image.dtype == torch.uint8 and label == 1
    assert torch.equal(val[9, 0][0], image)


def test_a_labelled_item_is_a_function_of_its_seed(tmp_path: Path) -> None:
    root = tree(tmp_path, "train/a/1.png", "train/b/2.png", "val/a/3.png")
    train, _ = labelled_pair(root, 1, v2.Compose([v2.RandomCrop(4), v2.PILToTensor()]))
    assert torch.equal(train[5, 1][0], train[5, 1][0])
    assert len({train[seed, 1][0].numpy().tobytes() for seed in range(8)}) > 4


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["val/a/1.png", "val/b/1.png"], ["has no folder 'train'", "train/CLASS and val/CLASS"]),
        (["train/a/1.png", "train/b/1.png"], ["has no folder 'val'", "train/CLASS and val/CLASS"]),
        (["train/a/1.png", "val/a/1.png"], ["train", "one class only", "two or more"]),
        (["train/a/1.png", "train/b/1.png", "val/c/1.png"], ["val", "classes that training has not: c"]),
        (["train/a/1.png", "train/b/1.png", "train/1.png", "val/a/1.png"], ["train", "outside of class folders"]),
        (["train/a/1.png", "train/b/1.png", "val/1.png"], ["val", "outside of class folders"]),
    ],
    ids=["no train", "no val", "one class", "unknown class", "loose in train", "loose in val"],
)
def test_mistakes_in_a_labelled_folder_are_errors_with_a_remedy(tmp_path: Path, names, words: list[str]) -> None:
    tree(tmp_path, *names)
    with pytest.raises(UserError) as error:
        labelled_pair(tmp_path, 3, centre_crop((8, 8)))
    for word in [str(tmp_path), *words]:
        assert word in str(error.value)


def test_an_empty_part_of_a_labelled_folder_is_an_error(tmp_path: Path) -> None:
    tree(tmp_path, "train/a/1.png", "train/b/1.png")
    (tmp_path / "val").mkdir()
    with pytest.raises(UserError, match="val' holds no files"):
        labelled_pair(tmp_path, 3, centre_crop((8, 8)))


@forks
@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_labelled_file_is_named(tmp_path: Path, workers: int) -> None:
    tree(tmp_path, "train/a/1.png", "train/b/1.png", "val/a/1.png")
    (tmp_path / "val/a/1.png").write_text("not a picture")
    _, val = labelled_pair(tmp_path, 3, centre_crop((8, 8)))
    with pytest.raises(UserError) as error:
        list(loader(val, [[(0, 0)]], workers, CPU, torch.utils.data.default_collate))
    assert str(error.value).startswith(f"{tmp_path}/val/a/1.png cannot be read")
    assert "remove it" in str(error.value) and "Traceback" not in str(error.value)


# centre_crop


@pytest.mark.parametrize(("height", "width"), [(30, 90), (90, 30), (24, 24), (1, 1), (1, 40), (300, 301)])
@pytest.mark.parametrize("size", [(24, 24), (16, 40), (40, 16), (160, 128)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_centre_crops_have_the_size_asked_for(height: int, width: int, size: tuple[int, int], mode: str) -> None:
    crop = centre_crop(size)(Image.fromarray(noise(height, width)).convert(mode))
    assert crop.shape == (len(mode) if mode == "RGB" else 1, *size) and crop.dtype == torch.uint8


@pytest.mark.parametrize("shape", [(256, 256), (256, 341), (256, 343), (345, 256), (333, 480), (640, 427), (99, 61)])
def test_at_224_the_crop_is_that_of_the_literature(photos: Path, shape: tuple[int, int]) -> None:
    with Image.open(photos / "bee.jpg") as file:
        image = file.resize(shape)
    reference = v2.Compose(
        [v2.Resize(256, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(224), v2.PILToTensor()]
    )
    assert torch.equal(centre_crop((224, 224))(image), reference(image))


def test_the_share_that_is_kept_counts_from_the_centre() -> None:
    array = noise(20, 30)
    image = Image.fromarray(array)
    crop = centre_crop((10, 16), crop=0.8)  # 16 of 20 rows would be 10 of 12.5: the width decides, 16 of 24 of 30
    whole = centre_crop((20, 20))(image)  # a thumbnail keeps all of its short side
    assert crop(image).shape == (3, 10, 16)
    assert (whole.permute(1, 2, 0).numpy() == array[:, 5:25]).all()
    half = centre_crop((10, 15), crop=0.5)(image)
    assert (half.permute(1, 2, 0).numpy() == array[5:15, 8:23]).all() or (
        half.permute(1, 2, 0).numpy() == array[5:15, 7:22]
    ).all()
