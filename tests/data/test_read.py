"""Files of every kind and in every state become the right pixels."""

import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from leanmim.data import SUFFIXES, UNREADABLE, list_images, read_image
from leanmim.data.read import CODECS
from tests.data.pictures import blocks, crops, grey, noise, pixels, write


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
        (".avif", {"quality": 100, "subsampling": "4:4:4"}, 3),
        (".jp2", {}, 0),
        (".j2k", {}, 0),
        (".jpx", {}, 0),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_format_is_read(tmp_path: Path, suffix: str, options: dict, tolerance: int, channels: int) -> None:
    if suffix in CODECS and CODECS[suffix] not in features.get_supported():
        pytest.skip(f"this Pillow reads no {suffix}")
    assert suffix in SUFFIXES
    image = Image.fromarray(blocks())
    image = image.quantize(64) if suffix == ".gif" else image
    image.save(tmp_path / ("a" + suffix), **options)
    want = blocks().astype(int) if channels == 3 else grey(blocks())
    assert np.abs(pixels(tmp_path / ("a" + suffix), channels) - want).max() <= tolerance + (channels == 1)


@pytest.mark.parametrize("suffix", sorted(CODECS))
def test_a_codec_that_pillow_lacks_is_named(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"a{suffix}").write_bytes(b"what this Pillow cannot identify")
    monkeypatch.setattr(features, "get_supported", lambda: list(CODECS.values()))
    with pytest.raises(UNREADABLE, match="cannot identify image file"):
        read_image(tmp_path / f"a{suffix}", 3)
    monkeypatch.setattr(features, "get_supported", lambda: ["jpg", "webp"])
    with pytest.raises(UNREADABLE, match=rf"Pillow [\d.]+ here reads no \{suffix}; update it: pip install -U pillow"):
        read_image(tmp_path / f"a{suffix}", 3)


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
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "JPEG2000"])
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
    Image.fromarray(noise(6, 9)).save(
        buffer, file_format, **({} if file_format in ("BMP", "GIF", "JPEG2000") else {"exif": exif})
    )
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


def test_odd_exif_does_not_end_a_run(tmp_path: Path) -> None:
    files = [tmp_path / "a.jpg", write(tmp_path / "b.png")]
    files[0].write_bytes(damaged_exif())
    crop, _ = crops(files)[0, 0]
    assert crop.shape == (3, 24, 24)
