"""Any image file in bounded time and memory: as an 8-bit picture, or its values as they are stored."""

import io
import math
import os
import signal
import stat
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
from jaxtyping import Shaped
from PIL import ExifTags, Image, ImageOps, features

from leanmim.config.base import Stored
from leanmim.data.find import ARRAY
from leanmim.data.stored import Stream, array_of, as_float, stored_values

try:
    import simplejpeg
except ImportError:  # where it has no wheel
    simplejpeg = None

CODECS = {".avif": "avif", ".j2k": "jpg_2000", ".jp2": "jpg_2000", ".jpx": "jpg_2000"}
"""What Pillow calls the codec of a suffix, for those that not every Pillow has."""
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "JPEG2000", "AVIF")
"""What Pillow calls the formats of the suffixes that count as images. No other is tried: some start other programs."""
MAX_BYTES = 2**30
"""Of a file. Pillow itself limits the pixels, by the file's header: `PIL.Image.MAX_IMAGE_PIXELS` times two, 179 million."""
MAX_SECONDS = 30.0
"""Of computing, to decode a file: a busy machine or a slow drive makes no file unreadable."""
BAND = 2**20  # pixels that are converted at once
SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations of pictures whose width is stored as height."""
SAYS_WHICH_WAY_UP = (b"Exif\0", b":Orientation")
"""What a JPEG holds that may say it, in Exif or in XMP."""
Choose = Callable[[int, int], tuple[int, int, int, int]]
"""From width and height, px, a box: left, top, right, bottom."""
Picture = Image.Image | np.ndarray
"""8-bit RGB or grey; or an array of values as they are stored, h w c."""


class Cut(NamedTuple):
    """A picture, decoded for the sake of a box in it."""

    pixels: Shaped[np.ndarray, "h w c"]
    """8-bit, of the whole picture, perhaps at a reduced scale; or the values in the box, float32."""
    box: tuple[float, float, float, float]
    """Left, top, right, bottom, in these pixels."""


def read_image(path: str | Path, channels: int, data: bytes | None = None) -> Picture:
    """Any image file as 8-bit RGB or grey: upright by its EXIF orientation, transparency on white, first frame.

    16-bit and 32-bit integer images are scaled to 8 bits; floating-point ones are taken to lie in 0 to 1, or in
    0 to 255 if any value is above 1; what is not finite is black. Of `Stored` channels the values are not converted,
    see `stored_values`.

    Args:
        path: the file.
        channels: 1 or 3; any number if they are `Stored`.
        data: what it holds, if that is known; nothing is opened then.

    Raises:
        UNREADABLE: the file cannot be read, is no file, or is larger or takes longer than the limits.
    """
    with bounded(path), opened(path, data) as file:
        if isinstance(channels, Stored):
            return stored_values(file, channels, formats())
        if Path(path).suffix.lower() == ARRAY:
            pixels = array_of(file.read(), channels)
            return Image.fromarray(pixels if channels == 3 else pixels[..., 0])
        with Image.open(file, formats=formats()) as stored:
            image = ImageOps.exif_transpose(stored)
            image.load()
            return eight_bit(image, channels)


def read_cut(path: str | Path, channels: int, choose: Choose, size: tuple[int, int], data: bytes | None = None) -> Cut:
    """A box of an image file, which is chosen before anything is decoded; as `read_image` otherwise.

    A JPEG is decoded at the smallest scale (1, 1/2, 1/4 or 1/8) that leaves the box as many pixels as ``size`` has, by
    simplejpeg where that is installed.

    Args:
        path: the file.
        channels: as for `read_image`.
        choose: a box from the upright picture's width and height.
        size: height and width that the box will be resized to.
        data: what the file holds, if that is known.
    """
    if isinstance(channels, Stored) or Path(path).suffix.lower() == ARRAY:
        return cut_whole(read_image(path, channels, data), choose)
    with bounded(path), opened(path, data) as file:
        if (found := plain_jpeg(file)) is not None:
            content, whole = found
            box = choose(*whole)
            pixels = scaled_jpeg(content, channels, whole, needed(box, whole, size))
            if pixels is not None:
                return scaled_cut(pixels, channels, whole, box)
        return cut_picture(file, channels, choose, size)


def cut_picture(file: Stream, channels: int, choose: Choose, size: tuple[int, int]) -> Cut:
    """`read_cut` with Pillow, which knows which way up a picture is, and every format."""
    with Image.open(file, formats=formats()) as stored:
        turned = stored.getexif().get(ExifTags.Base.Orientation, 1)
        whole = stored.size[::-1] if turned in SIDEWAYS else stored.size
        box = choose(*whole)
        least = needed(box, whole, size)
        pixels = None
        if stored.format == "JPEG" and stored.mode in ("L", "RGB"):
            if turned == 1:
                file.seek(0)
                pixels = scaled_jpeg(file.read(), channels, whole, least)
            if pixels is None:
                stored.draft(None, least[::-1] if turned in SIDEWAYS else least)
        if pixels is None:
            image = ImageOps.exif_transpose(stored)
            image.load()
            pixels = np.asarray(eight_bit(image, channels))
    return scaled_cut(pixels, channels, whole, box)


def needed(box: tuple[int, int, int, int], whole: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Width and height of a whole picture in which the box has as many pixels as ``size`` (height, width)."""
    return math.ceil(size[1] * whole[0] / (box[2] - box[0])), math.ceil(size[0] * whole[1] / (box[3] - box[1]))


def scaled_cut(
    pixels: Shaped[np.ndarray, "..."], channels: int, whole: tuple[int, int], box: tuple[int, int, int, int]
) -> Cut:
    """The box of a picture of the size ``whole`` (width, height), in pixels that are perhaps fewer."""
    across, down = pixels.shape[1] / whole[0], pixels.shape[0] / whole[1]
    return Cut(
        pixels.reshape(*pixels.shape[:2], channels), (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
    )


def cut_whole(picture: Picture, choose: Choose) -> Cut:
    """A box of a picture that is in memory already."""
    if isinstance(picture, Image.Image):
        pixels = np.asarray(picture)
        return Cut(pixels.reshape(*pixels.shape[:2], -1), choose(*picture.size))
    left, top, right, bottom = choose(picture.shape[1], picture.shape[0])
    return Cut(as_float(picture[top:bottom, left:right]), (0, 0, right - left, bottom - top))


def plain_jpeg(file: Stream) -> tuple[bytes, tuple[int, int]] | None:
    """What a JPEG holds, and its width and height, where nothing in it speaks of another way up or of unusual colours; None of
    all other files, of which nothing is read then. It spares Pillow's look at the header.
    """
    if simplejpeg is None or file.read(3) != b"\xff\xd8\xff":
        file.seek(0)
        return None
    file.seek(0)
    content = file.read()
    file.seek(0)
    if any(word in content for word in SAYS_WHICH_WAY_UP):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    usual = colours in ("YCbCr", "Gray") and width * height <= (Image.MAX_IMAGE_PIXELS or width * height)
    return (content, (width, height)) if usual else None


def scaled_jpeg(content: bytes, channels: int, whole: tuple[int, int], least: tuple[int, int]) -> np.ndarray | None:
    """A JPEG of the size ``whole`` (width, height) at the smallest scale that leaves it the size ``least``, or whole; None if it
    takes Pillow to read it.
    """
    if simplejpeg is None:
        return None
    scale = next((by for by in (8, 4, 2) if all(side >= by * low for side, low in zip(whole, least, strict=True))), 1)
    try:
        return simplejpeg.decode_jpeg(
            content, "RGB" if channels == 3 else "GRAY", min_width=whole[0] // scale, min_height=whole[1] // scale
        )
    except ValueError:  # also of what does no harm
        return None


@contextmanager
def bounded(path: str | Path) -> Iterator[None]:
    """In bounded time; whatever a damaged file leads the decoder to is `UNREADABLE`."""
    with time_limit(MAX_SECONDS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of what does no harm or is followed by an error
        try:
            yield
        except UNREADABLE as error:
            suffix = Path(path).suffix.lower()
            if suffix in CODECS and CODECS[suffix] not in features.get_supported():
                raise OSError(
                    f"Pillow {PIL.__version__} here reads no {suffix}; update it: pip install -U pillow"
                ) from error
            raise
        except Exception as error:  # whatever else a damaged file leads Pillow to
            raise OSError(f"{type(error).__name__}: {error}") from error


@contextmanager
def opened(path: str | Path, data: bytes | None = None) -> Iterator[Stream]:
    """A file, or what it holds, of which nothing is read yet."""
    if data is not None:
        yield io.BytesIO(data)
        return
    facts = os.stat(path)
    if not stat.S_ISREG(facts.st_mode):  # to open a FIFO waits for ever, to open a device may do anything
        raise OSError("it is no regular file")
    if facts.st_size > MAX_BYTES:
        raise OSError(f"it has {facts.st_size} bytes, more than {MAX_BYTES}")
    # Not Image.open(path): Pillow maps such a file into memory, which scrambles grey TIFFs that lie on their side.
    with open(path, "rb") as file:
        yield file


@cache
def formats() -> tuple[str, ...]:
    """Those that the installed Pillow knows."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def eight_bit(image: Image.Image, channels: int) -> Image.Image:
    """A picture of any mode as RGB or grey."""
    if image.mode.startswith("I") or image.mode == "F":
        most = max(band.max() for band in bands(image))
        if image.mode == "F":
            scale = 255.0 if most <= 1 else 1.0
        else:
            scale = 1 / 257 if most <= 65535 else 255 / (2**31 - 1)
        scaled = [np.clip(np.rint(band * scale), 0, 255).astype(np.uint8) for band in bands(image)]
        image = Image.fromarray(np.concatenate(scaled))
    if image.mode == "LAB":  # from which Pillow converts to RGB only
        image = image.convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB" if channels == 3 else "L")


def bands(image: Image.Image) -> Iterator[np.ndarray]:
    """The values of an image, some rows at a time: in double precision a whole one may need gigabytes."""
    rows = max(1, BAND // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        values = np.array(band, dtype=np.float64)
        values[~np.isfinite(values)] = 0
        yield values


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in what computes for longer; only in a main thread whose timer nobody uses, and not on Windows."""
    main = threading.current_thread() is threading.main_thread()
    if not main or not hasattr(signal, "setitimer") or signal.getitimer(signal.ITIMER_VIRTUAL)[0]:
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"it takes longer than {seconds:g} s to decode")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 1.0)  # again after a second, should Pillow catch the first one
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


UNREADABLE = (
    OSError, ValueError, SyntaxError, RuntimeError, MemoryError, struct.error, Image.DecompressionBombError,
)  # fmt: skip
"""What is raised for files that cannot be read. A MemoryError is that of a file which asks for too much."""


@dataclass(frozen=True)
class Bad:
    """An image that could not be read: where it is, and why."""

    path: str
    reason: str
