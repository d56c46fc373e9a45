"""Images whose values are taken as they are stored: any number of channels, 8 or 16 bits, floating point.

h w pixels, c channels.
"""

import io
import logging
import math
from functools import lru_cache

import numpy as np
from jaxtyping import Float32, Shaped, UInt8
from PIL import Image, ImageOps

Stream = io.BufferedReader | io.BytesIO
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""How such files begin; the last two are BigTIFF."""
MAX_DECODED = 2**30
"""Bytes of a TIFF file once it is decoded."""
MODES = {"L": 1, "I": 1, "I;16": 1, "I;16B": 1, "I;16L": 1, "F": 1, "RGB": 3, "RGBA": 4, "CMYK": 4}
"""Pillow's modes whose values are those of the file, and how many channels they have."""


def stored_values(file: Stream, channels: int, formats: tuple[str, ...]) -> Shaped[np.ndarray, "h w c"]:
    """An image in the number format of its file.

    In an array of three axes the channels are the first or the last one, whichever has so many entries. The channels of a TIFF
    file are its samples or its pages; of several series of pages the first is taken. Other files are upright by their EXIF
    orientation.

    Args:
        file: what it holds.
        channels: how many it must have.
        formats: what Pillow calls those that it may try.

    Raises:
        ValueError: it has another number of channels, it could be read in two ways, or its values are no numbers.
    """
    begins = file.read(6)
    file.seek(0)
    if begins == np.lib.format.MAGIC_PREFIX:
        values = channels_last(np.load(file, allow_pickle=False), channels)
    elif begins[:4] in TIFF:
        values = read_tiff(file)
    else:
        values = read_picture(file, formats)
    if values.dtype.kind not in "uif":
        raise ValueError(f"its values are {values.dtype}, no real numbers")
    if not values.size:
        raise ValueError(f"it has no pixels: {values.shape}")
    if values.shape[2] != channels:
        raise ValueError(f"it has {values.shape[2]} channels, not {channels}")
    return values


def channels_last(values: np.ndarray, channels: int) -> Shaped[np.ndarray, "h w c"]:
    """An array with its channels last: h w, h w c or c h w before."""
    if values.ndim == 2:
        return values[..., None]
    first, last = (values.ndim == 3 and values.shape[axis] == channels for axis in (0, -1))
    if first and last:
        raise ValueError(f"an array of shape {values.shape} can have its {channels} channels first or last")
    if not first and not last:
        raise ValueError(
            f"an array of shape {values.shape} is no image of {channels} channels: height x width, or with the channels first "
            "or last"
        )
    return np.moveaxis(values, 0, -1) if first else values


def read_tiff(file: Stream) -> Shaped[np.ndarray, "h w c"]:
    """A TIFF file, by tifffile: Pillow reads neither its pages as channels nor samples of 16 bits and more."""
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it tells does no harm, or is followed by an error
    with tifffile.TiffFile(file) as tiff:
        if not tiff.series:
            raise ValueError("it has no pages")
        series = tiff.series[0]
        axes, shape = series.get_axes(squeeze=False), series.get_shape(squeeze=False)
        size = math.prod(shape) * np.dtype(series.dtype).itemsize
        if size > MAX_DECODED:
            raise ValueError(f"it has {size} bytes once decoded, more than {MAX_DECODED}")
        others = [i for i, axis in enumerate(axes) if axis not in "YX"]
        if len(axes) - len(others) != 2 or sum(shape[i] > 1 for i in others) > 1:
            raise ValueError(f"its axes {axes} {shape} are not height, width and one of channels")
        values = series.asarray(squeeze=False, maxworkers=1)
    height, width = axes.index("Y"), axes.index("X")
    return values.transpose(height, width, *others).reshape(shape[height], shape[width], -1)


def read_picture(file: Stream, formats: tuple[str, ...]) -> Shaped[np.ndarray, "h w c"]:
    """Any other file, by Pillow."""
    with Image.open(file, formats=formats) as stored:
        if stored.mode not in MODES:
            raise ValueError(f"its mode {stored.mode} has no channels to take as they are; --values 8-bit converts it")
        if any("16" in str(how) for *_, how in stored.tile) and MODES[stored.mode] > 1:
            raise ValueError("Pillow reads colours of 16 bits with 8 bits only; convert it to TIFF")
        image = ImageOps.exif_transpose(stored)
        values = np.asarray(image)
    return values.reshape(*values.shape[:2], -1)


def as_float(values: Shaped[np.ndarray, "h w c"]) -> Float32[np.ndarray, "h w c"]:
    """A copy in float32; what is not finite is 0."""
    with np.errstate(over="ignore"):  # of a float64 that is infinite in float32
        return np.nan_to_num(values.astype(np.float32), copy=False, nan=0, posinf=0, neginf=0)


def array_of(data: bytes, channels: int) -> UInt8[np.ndarray, "h w c"]:
    """The 8-bit picture of an array file, in colour or grey.

    Raises:
        ValueError: it holds no picture of 8 bits.
    """
    begins = 10 + int.from_bytes(data[8:10], "little")  # of version 1.0, as numpy writes it
    pixels = np.frombuffer(data, np.uint8, offset=begins).reshape(shape_of(data[:begins]))
    if pixels.shape[2] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=2)
    return np.asarray(Image.fromarray(pixels).convert("L"))[..., None]


@lru_cache(4096)
def shape_of(header: bytes) -> tuple[int, ...]:
    """Of the picture that follows the header of an array file.

    Raises:
        ValueError: none does.
    """
    file = io.BytesIO(header)
    version = np.lib.format.read_magic(file)
    shape, columns_first, dtype = np.lib.format.read_array_header_1_0(file)
    shape = (*shape, 1) if len(shape) == 2 else shape
    if (
        version != (1, 0)
        or dtype != np.uint8
        or columns_first
        or len(shape) != 3
        or shape[2] not in (1, 3)
        or 0 in shape
    ):
        raise ValueError(
            f"an array of {dtype} and shape {shape} is no picture of 8 bits (uint8, height x width x 1 or 3); give "
            "--channels and --values stored for others"
        )
    return shape
