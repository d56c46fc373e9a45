"""Hostile and odd image files, made by code: a few of every kind, and as many mutated ones as asked for."""

import io
import os
import random
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

from leanmim.data import UNREADABLE, centre_crop, read_image

NAMES = (
    "$5_to_$.jpg",
    "new\nline.jpg",
    "\N{GRINNING FACE}.jpg",
    "tab\t.jpg",
    "<b>&amp;.jpg",
    "[red]a[bold].jpg",
    "\udcff.jpg",
)
"""Names that are trouble; the last is no UTF-8."""
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"


def noise(height: int, width: int, bands: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, bands), dtype=np.uint8)


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, body: bytes = b"", depth: int = 8, kind: int = 2) -> bytes:
    header = chunk(b"IHDR", struct.pack(">2I5B", width, height, depth, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def readable() -> dict[str, bytes]:
    """Odd files that become pictures, by their names."""
    rgb = Image.fromarray(noise(20, 30))
    grey = np.arange(600, dtype=np.uint16).reshape(20, 30) * 100
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    palette = rgb.quantize(16)
    return {
        "1x1.png": encoded(rgb.resize((1, 1)), "PNG"),
        "wide.png": encoded(Image.new("L", (20000, 1), 9), "PNG"),
        "tall.png": encoded(Image.new("L", (1, 20000), 9), "PNG"),
        "animated.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated.webp": encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "pages.tiff": encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:]),
        "cmyk.jpg": encoded(rgb.convert("CMYK"), "JPEG"),
        # Pillow before 13 cannot read its own
        **({"ycbcr.tiff": encoded(rgb.convert("YCbCr"), "TIFF")} if int(PIL.__version__.split(".")[0]) >= 13 else {}),
        "lab.tiff": encoded(Image.new("LAB", (9, 9), (100, 20, 30)), "TIFF"),
        "palette.png": encoded(palette, "PNG", transparency=3),
        "alphas.png": encoded(palette, "PNG", transparency=bytes(range(0, 160, 10))),
        "bilevel.png": encoded(rgb.convert("1"), "PNG"),
        "keyed.png": encoded(rgb, "PNG", transparency=(1, 2, 3)),
        "deep.png": encoded(Image.fromarray(grey), "PNG"),
        "deep.tiff": encoded(Image.fromarray(grey), "TIFF"),
        "float.tiff": encoded(Image.fromarray(np.full((5, 7), np.nan, np.float32)), "TIFF"),
        "icc.jpg": encoded(rgb, "JPEG", icc_profile=b"no profile" * 99),
        "exif.jpg": encoded(rgb, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
    }


def broken() -> dict[str, bytes]:
    """Files that give a reason instead."""
    whole = encoded(Image.fromarray(noise(64, 64)), "JPEG")
    return {
        "empty.jpg": b"",
        "text.jpg": b"This is no picture.",
        "half.jpg": whole[: len(whole) // 2],
        "zeros.png": bytes(5000),
        "postscript.jpg": EPS,
        "bomb.png": png(60_000, 60_000, bytes(60_000)),
        "no size.png": png(0, 0),
        "text bomb.png": png(4, 4)[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(9 * 2**20))) + png(4, 4)[33:],
    }


def unusual(folder: Path) -> list[Path]:
    """What is no regular file, or too large a one, with the name of an image."""
    names = ("fifo.jpg", "socket.jpg", "device.jpg", "loop.jpg", "dangling.jpg", "to a folder.jpg", "sparse.png")
    fifo, server, device, loop, dangling, linked, sparse = paths = [folder / name for name in names]
    os.mkfifo(fifo)
    here = os.getcwd()
    os.chdir(folder)  # the path of a socket must be short
    with suppress(OSError), socket.socket(socket.AF_UNIX) as listening:
        listening.bind(server.name)
    os.chdir(here)
    device.symlink_to("/dev/zero")
    loop.symlink_to(loop.name)
    dangling.symlink_to("nowhere.jpg")
    linked.symlink_to("/nowhere")
    sparse.write_bytes(png(64, 64))
    os.truncate(sparse, 2**31)
    return [path for path in paths if os.path.lexists(path)]


# Mutations.


def small_pictures() -> list[bytes]:
    """One of every format and of many modes, small so that a change hits what matters."""
    exif = Image.Exif()
    exif[0x0112], exif[0x011A], exif[0x010E] = 6, 72.0, "a picture"
    rgb, icc = Image.fromarray(noise(13, 17)), bytes(range(200))
    pictures: list[tuple[Image.Image, str, dict[str, object]]] = [
        (rgb, "JPEG", {"exif": exif, "icc_profile": icc}),
        (rgb, "JPEG", {"progressive": True}),
        (rgb.convert("CMYK"), "JPEG", {}),
        (rgb, "PNG", {"exif": exif, "icc_profile": icc}),
        (rgb.quantize(7), "PNG", {"transparency": bytes([0, 9, 255])}),
        (Image.fromarray(noise(9, 9)[..., 0].astype(np.uint16) * 257), "PNG", {}),
        (rgb.convert("RGBA"), "PNG", {"save_all": True, "append_images": [rgb.rotate(90).convert("RGBA")]}),
        (rgb, "WEBP", {"exif": exif}),
        (rgb.convert("RGBA"), "WEBP", {"lossless": True}),
        (rgb, "WEBP", {"save_all": True, "append_images": [rgb.rotate(180)]}),
        (rgb, "TIFF", {"exif": exif}),
        *((rgb, "TIFF", {"compression": how}) for how in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg")),
        (rgb.convert("1"), "TIFF", {"compression": "group4"}),
        (Image.fromarray(noise(9, 9)[..., 0].astype(np.float32)), "TIFF", {}),
        (Image.fromarray(noise(9, 9)[..., 0].astype(np.int32)), "TIFF", {}),
        (rgb.quantize(9), "GIF", {"save_all": True, "append_images": [rgb.rotate(90, expand=True).quantize(5)]}),
        (rgb, "BMP", {}),
        (rgb.quantize(5), "BMP", {}),
        (rgb, "JPEG2000", {}),
        (rgb, "JPEG2000", {"no_jp2": True, "tile_size": (8, 8)}),
        (rgb, "AVIF", {"exif": exif}),
    ]
    Image.init()
    return [encoded(image, kind, **options) for image, kind, options in pictures if kind in Image.SAVE]


EXTREMES = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\x7f\xff", b"\xff\x7f\0\0", b"\0\x01\0\0")
SIZES = (0, 1, 255, 13_000, 16_383, 32_767, 65_535, 200_000, 2**31 - 1, 2**32 - 1)


def flipped(data: bytearray, dice: random.Random) -> bytearray:
    for _ in range(dice.choice((1, 1, 2, 8, 40))):
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    return data


def cut(data: bytearray, dice: random.Random) -> bytearray:
    return data[: dice.randrange(len(data))]


def without_a_part(data: bytearray, dice: random.Random) -> bytearray:
    start = dice.randrange(len(data))
    return data[:start] + data[start + dice.randrange(1, 64) :]


def with_a_part_twice(data: bytearray, dice: random.Random) -> bytearray:
    start = dice.randrange(len(data))
    return data[:start] + data[start : start + dice.randrange(1, 200)] * dice.choice((2, 50)) + data[start:]


def with_extremes(data: bytearray, dice: random.Random) -> bytearray:
    for _ in range(dice.choice((1, 2, 4))):
        start = dice.randrange(min(len(data), dice.choice((40, 200, 10**6))))
        value = dice.choice(EXTREMES)[: dice.choice((1, 2, 4))]
        data[start : start + len(value)] = value
    return data


def huge(data: bytearray, dice: random.Random) -> bytearray:
    """Another width and height in the header."""
    width, height = dice.choice(SIZES), dice.choice(SIZES)
    both16 = struct.pack(">2H", height & 0xFFFF, width & 0xFFFF)
    if data.startswith(b"\x89PNG"):
        data[16:24] = struct.pack(">2I", width, height)
    elif data.startswith(b"BM"):
        data[18:26] = struct.pack("<2I", width, height)
    elif data.startswith(b"GIF"):
        data[6:10] = struct.pack("<2H", width & 0xFFFF, height & 0xFFFF)
    elif (place := data.find(b"\xff\x51\0")) >= 0:  # JPEG 2000: the picture, and often the tile
        data[place + 6 : place + 14] = struct.pack(">2I", width, height)
        if dice.random() < 0.5:
            data[place + 22 : place + 30] = data[place + 6 : place + 14]
    elif (place := max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))) >= 0 and data.startswith(b"\xff\xd8"):
        data[place + 5 : place + 9] = both16
    elif (place := data.find(b"ispe")) >= 0:
        data[place + 8 : place + 16] = struct.pack(">2I", width, height)
    elif data[:2] in (b"II", b"MM"):
        for tag in (b"\0\x01", b"\x01\x01"):  # width, length: little-endian, as Pillow writes them
            if (place := data.find(tag, 8)) >= 0:
                data[place + 8 : place + 12] = struct.pack("<I", dice.choice(SIZES))
    elif data.startswith(b"RIFF"):
        data[24:30] = struct.pack("<2I", width, height)[1:7]
    return data


MUTATIONS: tuple[Callable[[bytearray, random.Random], bytearray], ...] = (
    flipped, cut, without_a_part, with_a_part_twice, with_extremes, huge,
)  # fmt: skip


def mended(data: bytearray) -> bytearray:
    """A PNG with the right checksums, so that what was changed is decoded; other data as they are."""
    place = 8
    while data.startswith(b"\x89PNG") and place + 12 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        end = place + 8 + length
        if end + 4 > len(data):
            break
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[place + 4 : end]))
        place = end + 4
    return data


def fuzz(count: int, seed: int = 0) -> Iterator[bytes]:
    """So many mutated pictures, each a function of the seed and its number."""
    pictures = small_pictures()
    for number in range(count):
        dice = random.Random(f"{seed} {number}")
        data = bytearray(dice.choice(pictures))
        if dice.random() < 0.1:  # the head of one, the body of another
            other = dice.choice(pictures)
            data = data[: dice.randrange(len(data))] + other[dice.randrange(len(other)) :]
        for mutation in dice.choices(MUTATIONS, k=dice.choice((1, 1, 2))):
            data = mutation(data or bytearray(b"\0"), dice)
        yield bytes(mended(data) if dice.random() < 0.7 else data)


def outcome(path: Path) -> str:
    """``readable``, ``bad``, or what a reader must not raise."""
    try:
        centre_crop((16, 16))(read_image(path, 3))
    except UNREADABLE:
        return "bad"
    except BaseException as error:
        return f"crash: {type(error).__name__}: {error}"
    return "readable"
