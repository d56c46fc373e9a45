"""Any image file as an 8-bit picture."""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageOps, features

CODECS = {".avif": "avif", ".j2k": "jpg_2000", ".jp2": "jpg_2000", ".jpx": "jpg_2000"}
"""What Pillow calls the codec of a suffix, for those that not every Pillow has."""


def read_image(path: str | Path, channels: int) -> Image.Image:
    """Any image file as 8-bit RGB or grey: upright by its EXIF orientation, transparency on white, first frame.

    16-bit and 32-bit integer images are scaled to 8 bits; floating-point ones are taken to lie in 0 to 1, or in
    0 to 255 if any value is above 1; what is not finite is black.

    Raises:
        UNREADABLE: the file cannot be read.
    """
    # Not Image.open(path): Pillow maps such a file into memory, which scrambles grey TIFFs that lie on their side.
    try:
        with open(path, "rb") as file, Image.open(file) as stored:
            image = ImageOps.exif_transpose(stored)
            image.load()
    except UNREADABLE as error:
        suffix = Path(path).suffix.lower()
        if suffix in CODECS and CODECS[suffix] not in features.get_supported():
            raise OSError(
                f"Pillow {PIL.__version__} here reads no {suffix}; update it: pip install -U pillow"
            ) from error
        raise
    if image.mode.startswith("I") or image.mode == "F":
        values = np.array(image, dtype=np.float64)
        values[~np.isfinite(values)] = 0
        if image.mode == "F":
            scale = 255.0 if values.max(initial=0) <= 1 else 1.0
        else:
            scale = 1 / 257 if values.max(initial=0) <= 65535 else 255 / (2**31 - 1)
        image = Image.fromarray(np.clip(np.rint(values * scale), 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB" if channels == 3 else "L")


# What Pillow raises on damaged files: RuntimeError from AVIF, struct.error from EXIF.
UNREADABLE = (OSError, ValueError, SyntaxError, RuntimeError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class Bad:
    """An image that could not be read: where it is, and why."""

    path: str
    reason: str
