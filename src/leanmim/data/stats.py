"""Mean and standard deviation of images, to normalise them by.

h w pixels, c channels.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Real

from leanmim.config.base import Stored, as_read
from leanmim.config.tools import Stats
from leanmim.data.order import epoch_order
from leanmim.data.read import BAND, Bad, Picture
from leanmim.data.source import Source, open_source, read
from leanmim.data.stored import as_float
from leanmim.errors import UserError
from leanmim.files import write_json
from leanmim.progress import track


def stats(config: Stats) -> Iterator[tuple[str, str]]:
    """Measure images.

    Yields:
        How many were read, their number formats and sizes, the options of `leanmim pretrain` that normalise them, and where
        these were written.

    Raises:
        UserError: the data cannot be read, or the file cannot be written.
    """
    config.check()
    channels = as_read(config.channels, config.values)
    source = open_source(config.data, channels)
    found = tally(source, channels, config.seed, config.count)
    mean, std = found.result()
    bad = f"; {len(found.bad)} more cannot be read: {found.bad[0].path} ({found.bad[0].reason})" if found.bad else ""
    yield "images", f"{len(found.moments)} of {len(source)}{bad}"
    yield "numbers", ", ".join(f"{name} ({count})" for name, count in found.formats.most_common())
    (low, high), (left, right) = ((min(sides), max(sides)) for sides in zip(*found.sizes, strict=True))
    yield "height", f"{low} to {high} px"
    yield "width", f"{left} to {right} px"
    values = "stored" if isinstance(channels, Stored) else "8-bit"
    options = ["--channels", str(config.channels), "--values", values]
    options += ["--mean", *(f"{value:.6g}" for value in mean), "--std", *(f"{value:.6g}" for value in std)]
    yield "options", " ".join(options)
    if config.out is not None:
        facts = {
            "channels": config.channels,
            "values": values,
            "mean": mean,
            "std": std,
            "data": config.data,
            "images": len(found.moments),
            "numbers": found.formats,
            "height": [low, high],
            "width": [left, right],
        }
        write_json(Path(config.out), facts)
        yield "file", config.out


def statistics(source: Source, channels: int, seed: int, sample: int = 2048) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of every channel from a random sample of the images, as `Normalise` takes them.

    Every image counts the same, whatever its size. Unreadable ones are left out. Of stored values, a channel that is the same
    everywhere has the deviation 1.
    """
    return tally(source, channels, seed, sample).result()


class Tally:
    """What images hold, gathered one by one in double precision.

    Args:
        channels: of each image; whether its values are taken as they are stored.
    """

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self.moments: list[tuple[np.ndarray, np.ndarray]] = []  # of each image: mean, and mean of the squares
        self.formats: Counter[str] = Counter()
        self.sizes: set[tuple[int, int]] = set()
        self.bad: list[Bad] = []

    def add(self, image: Picture) -> None:
        """One more image."""
        if isinstance(image, np.ndarray):
            self.moments.append(moments_of(image))
            self.formats[image.dtype.name] += 1
            self.sizes.add((image.shape[0], image.shape[1]))
            return
        # counted, not converted: in double precision a large image needs gigabytes
        levels = np.arange(256) / 255
        counts = np.array(image.histogram()).reshape(self.channels, 256) / (image.width * image.height)
        self.moments.append((counts @ levels, counts @ levels**2))
        self.formats["uint8"] += 1
        self.sizes.add((image.height, image.width))

    def result(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel."""
        mean, square = np.mean(self.moments, axis=0)
        variance = square - mean**2
        if isinstance(self.channels, Stored):
            constant = variance <= 1e-12 * square  # rounding is all there is
            std = np.sqrt(np.where(constant, 1, variance))
        else:
            std = np.sqrt(np.maximum(variance, 1e-6))
        return mean.tolist(), std.tolist()


def tally(source: Source, channels: int, seed: int, sample: int) -> Tally:
    """A random sample of the images.

    Raises:
        UserError: none of them can be read.
    """
    order = epoch_order(len(source), seed, 0)[:sample].tolist()
    found = Tally(channels)
    for index in track(order, f"mean and deviation of {len(order)} images", len(order)):
        image = read(source, index)
        if isinstance(image, Bad):
            found.bad.append(image)
        else:
            found.add(image)
    if not found.moments:
        path, reason = found.bad[0].path, found.bad[0].reason
        raise UserError(f"none of {len(order)} sampled image files can be read, the first: {path} ({reason})")
    return found


def moments_of(values: Real[np.ndarray, "h w c"]) -> tuple[Float64[np.ndarray, " c"], Float64[np.ndarray, " c"]]:
    """Mean of the values of each channel, and of their squares; some rows at a time."""
    rows = max(1, BAND // values[0].size)
    bands = (as_float(values[top : top + rows]).astype(np.float64) for top in range(0, len(values), rows))
    sums = [(band.sum((0, 1)), (band**2).sum((0, 1))) for band in bands]
    mean, square = np.sum(sums, axis=0) / (values.shape[0] * values.shape[1])
    return mean, square
