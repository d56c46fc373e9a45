"""Images of many channels, written in every form that is read."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import tifffile


def values(channels: int = 5, height: int = 20, width: int = 30, kind: str = "uint16", seed: int = 0) -> np.ndarray:
    """Channels first; of whole numbers the full range, of others both signs."""
    draw = np.random.default_rng(seed)
    if kind.startswith("float"):
        return draw.normal(0, 300, (channels, height, width)).astype(kind)
    limits = np.iinfo(kind)
    return draw.integers(limits.min, limits.max, (channels, height, width), kind, endpoint=True)


def bands(path: Path, array: np.ndarray) -> None:
    """The channels are samples of one page, pixel by pixel."""
    several = {"planarconfig": "contig"} if len(array) > 1 else {}
    tifffile.imwrite(path, array.transpose(1, 2, 0).squeeze(), photometric="minisblack", **several)


WRITERS: dict[str, tuple[str, Callable[[Path, np.ndarray], None]]] = {
    "bands": (".tif", bands),
    "planes": (".tif", lambda path, x: tifffile.imwrite(path, x, photometric="minisblack", planarconfig="separate")),
    "pages": (".tiff", lambda path, x: tifffile.imwrite(path, x, photometric="minisblack", metadata=None)),
    "deflated": (".tif", lambda path, x: tifffile.imwrite(path, x, photometric="minisblack", compression="zlib")),
    "imagej": (".tif", lambda path, x: tifffile.imwrite(path, x, imagej=True, metadata={"axes": "CYX"})),
    "ome": (".ome.tif", lambda path, x: tifffile.imwrite(path, x, photometric="minisblack", metadata={"axes": "CYX"})),
    "array, channels first": (".npy", np.save),
    "array, channels last": (".npy", lambda path, x: np.save(path, x.transpose(1, 2, 0))),
}


def write(folder: Path, count: int = 6, channels: int = 5, **options: int) -> list[np.ndarray]:
    """So many arrays of 16 bits in a folder; what they hold, channels first."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = [values(channels, seed=seed, **options) for seed in range(count)]
    for i, array in enumerate(arrays):
        np.save(folder / f"{i}.npy", array)
    return arrays
