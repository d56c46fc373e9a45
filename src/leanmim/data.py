"""Images on disk -> batches on the device.

Order and crops are pure functions of (seed, epoch, index), whatever the number of workers, so a run can be
continued at any step. Workers hand over uint8; normalisation happens on the device.

b batch, c channels, H W pixels.
"""

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from leanmim.errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
IMAGENET = {3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), 1: ((0.449,), (0.226,))}


def seed_of(*numbers: int) -> int:
    """One seed from several numbers, without collisions between, say, (0, 1), (1, 0) and (0, 1, 0)."""
    return int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1, np.uint64)[0] >> 1)


def list_images(folder: str | Path) -> list[Path]:
    """Every image file below a folder, sorted, hidden files left out.

    Raises:
        UserError: the folder is missing, empty, or holds no images.
    """
    root = Path(folder)
    if not root.exists():
        raise UserError(f"there is no folder {str(root)!r}; --data takes a folder of images")
    if not root.is_dir():
        raise UserError(f"{str(root)!r} is a file; --data takes a folder of images")
    files: list[Path] = []
    seen: set[str] = set()
    for here, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(here)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            files += [Path(here, name) for name in names if not name.startswith(".")]
        seen.add(real)
    images = sorted(file for file in files if file.suffix.lower() in SUFFIXES)
    if not images:
        what = f"{len(files)} files but no images" if files else "no files"
        raise UserError(f"{str(root)!r} holds {what}; leanmim reads {', '.join(sorted(s[1:] for s in SUFFIXES))}")
    return images


def read_image(path: str | Path, channels: int) -> Image.Image:
    """Any image file as 8-bit RGB or grey: upright by its EXIF orientation, transparency on white, first frame.

    16-bit and 32-bit integer images are scaled to 8 bits; floating-point ones are taken to lie in 0 to 1, or in
    0 to 255 if any value is above 1; what is not finite is black.

    Raises:
        UNREADABLE: the file cannot be read.
    """
    # Not Image.open(path): Pillow maps such a file into memory, which scrambles grey TIFFs that lie on their side.
    with open(path, "rb") as file, Image.open(file) as stored:
        image = ImageOps.exif_transpose(stored)
        image.load()
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
    """A file that could not be read."""

    path: str
    reason: str


class Crops(Dataset):
    """Random crops for training. The item (epoch, index) is a pure function of (seed, epoch, index).

    An unreadable file is replaced by the next readable one in the list, and reported.
    """

    def __init__(
        self,
        files: Sequence[Path],
        channels: int,
        size: tuple[int, int],
        scale: tuple[float, float],
        ratio: tuple[float, float],
        flip: float,
        seed: int,
        interpolation: str = "bicubic",
    ) -> None:
        # one string, not a million Python objects: forked workers then share it instead of copying it
        self.files = np.array([os.fspath(file) for file in files])
        self.channels = channels
        self.seed = seed
        self.crop = v2.Compose(
            [
                v2.RandomResizedCrop(size, scale, ratio, v2.InterpolationMode(interpolation), antialias=True),
                v2.RandomHorizontalFlip(flip),
                v2.PILToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, item: tuple[int, int]) -> tuple[UInt8[Tensor, "c H W"], list[Bad]]:
        epoch, index = item
        bad: list[Bad] = []
        for step in range(len(self)):
            path = str(self.files[(index + step) % len(self)])
            try:
                image = read_image(path, self.channels)
            except UNREADABLE as error:
                bad.append(Bad(path, f"{type(error).__name__}: {error}"))
                continue
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed_of(self.seed, epoch, index))  # torch's also reseeds the GPU
                return self.crop(image), bad
        raise UserError(f"none of the {len(self)} image files can be read; the first: {bad[0].path} ({bad[0].reason})")


@lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """The order of the files in an epoch."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(seed, epoch)))


class Order(torch.utils.data.Sampler):
    """The batches of forward passes ``start`` to ``stop`` for one of several processes, as lists of (epoch, index).

    Every epoch is a fresh permutation; what does not fill a whole step is left to later epochs.
    """

    def __init__(
        self, count: int, batch: int, per_epoch: int, start: int, stop: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        self.count, self.batch, self.per_epoch = count, batch, per_epoch
        self.start, self.stop, self.seed, self.rank, self.world = start, stop, seed, rank, world

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for micro in range(self.start, self.stop):
            epoch, k = divmod(micro, self.per_epoch)
            first = (k * self.world + self.rank) * self.batch
            order = epoch_order(self.count, self.seed, epoch)
            yield [(epoch, index) for index in order[first : first + self.batch].tolist()]


def collate(items: list[tuple[Tensor, list[Bad]]]) -> tuple[UInt8[Tensor, "b c H W"], list[Bad]]:
    """Stack the images, gather the reports."""
    return torch.stack([image for image, _ in items]), [bad for _, bads in items for bad in bads]


def resolve_workers(workers: int) -> int:
    """-1 is the CPU count less one, 8 at most."""
    return min(8, max(0, (os.cpu_count() or 1) - 1)) if workers < 0 else workers


def loader(dataset: Dataset, order: Any, workers: int, device: torch.device, collate_fn: Callable) -> Iterator[Any]:
    """The batches of ``order``, read ahead; workers use one thread each."""
    batches = DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=collate_fn,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
        # Workers draw nothing from this: it only keeps the loader from advancing torch's global generator.
        generator=torch.Generator(),
    )
    try:
        yield from batches
    except UserError as error:
        # From a worker the message comes wrapped in a traceback. Ours would keep the workers alive: it is dropped.
        raise UserError(str(error).rpartition("UserError: ")[2].strip()) from error.with_traceback(None)


class Normalise:
    """uint8 images in memory -> normalised float32 images on the device."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self.device = device
        self.mean = torch.tensor(mean, device=device)[:, None, None] * 255
        self.std = torch.tensor(std, device=device)[:, None, None] * 255

    def __call__(self, images: UInt8[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
        """Move, then normalise."""
        return (images.to(self.device, non_blocking=True).float() - self.mean) / self.std

    def invert(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
        """Back to the scale 0 to 1, clipped, for people to look at."""
        return ((images * self.std + self.mean) / 255).clamp(0, 1)


def statistics(files: Sequence[Path], channels: int, seed: int, sample: int = 2048) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of every channel, on the scale 0 to 1, from a random sample of the files.

    Every image counts the same, whatever its size. Unreadable files are left out.
    """
    order = epoch_order(len(files), seed, 0)[:sample].tolist()
    moments = []
    for index in order:
        try:
            image = read_image(files[index], channels)
        except UNREADABLE:
            continue
        pixels = np.asarray(image, dtype=np.float64).reshape(-1, channels) / 255
        moments.append((pixels.mean(0), (pixels**2).mean(0)))
    if not moments:
        raise UserError(f"none of {len(order)} sampled image files can be read, the first: {files[order[0]]}")
    mean, square = np.mean(moments, axis=0)
    std = np.sqrt(np.maximum(square - mean**2, 1e-6))
    return mean.tolist(), std.tolist()


class Labelled(Dataset):
    """Images of a folder with one sub-folder per class, transformed, with their labels.

    Raises:
        UserError: there are no classes, or (when read) a file is unreadable.
    """

    def __init__(self, folder: Path, channels: int, transform: Callable, classes: list[str] | None = None) -> None:
        self.folder = folder
        files = list_images(folder)
        names = [file.relative_to(folder).parts[0] for file in files if len(file.relative_to(folder).parts) > 1]
        if len(names) < len(files):
            raise UserError(f"{str(folder)!r} holds images outside of class folders; put each into {folder}/CLASS/")
        self.classes = sorted(set(names)) if classes is None else classes
        if unknown := set(names) - set(self.classes):
            raise UserError(f"{str(folder)!r} has classes that training has not: {', '.join(sorted(unknown)[:5])}")
        self.files = files
        self.labels = [self.classes.index(name) for name in names]
        self.channels = channels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, item: int | tuple[int, int]) -> tuple[UInt8[Tensor, "c H W"], int]:
        """Image and label; an item (seed, index) fixes the transform's random choices."""
        seed, index = (0, item) if isinstance(item, int) else item
        try:
            image = read_image(self.files[index], self.channels)
        except UNREADABLE as error:
            path = self.files[index]
            raise UserError(f"{path} cannot be read ({error}); remove it from the labelled folder") from error
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.transform(image), self.labels[index]


def labelled_pair(folder: str | Path, channels: int, transform: Callable) -> tuple[Labelled, Labelled]:
    """The sets train/CLASS and val/CLASS of a labelled folder.

    Raises:
        UserError: one of the two is missing, or there are fewer than two classes.
    """
    root = Path(folder)
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise UserError(f"{str(root)!r} has no folder {part!r}; a labelled folder holds train/CLASS and val/CLASS")
    train = Labelled(root / "train", channels, transform)
    if len(train.classes) < 2:
        raise UserError(f"{str(root / 'train')!r} holds one class only; accuracy needs two or more")
    return train, Labelled(root / "val", channels, transform, train.classes)


def cut_centre(image: Image.Image, size: tuple[int, int], crop: float) -> UInt8[Tensor, "c H W"]:
    """Resize until the share ``crop`` of the image covers ``size``, and cut that out of its centre."""
    zoom = max(size[0] / image.height, size[1] / image.width) / crop
    # Truncated, as in torchvision, whatever the rounding of the product.
    shape = (max(size[1], int(image.width * zoom + 1e-6)), max(size[0], int(image.height * zoom + 1e-6)))
    image = image.resize(shape, Image.Resampling.BICUBIC)
    return v2.functional.pil_to_tensor(v2.functional.center_crop(image, list(size)))


def centre_crop(size: tuple[int, int], crop: float | None = None) -> Callable:
    """Resize and cut the centre, the evaluation transform of MAE: 256 px then 224 is a crop of 0.875.

    Args:
        size: height and width, px.
        crop: share of the resized side that is kept; None is 0.875 from 128 px on, and 1 for thumbnails.
    """
    crop = (0.875 if min(size) >= 128 else 1.0) if crop is None else crop
    return partial(cut_centre, size=size, crop=crop)  # not a closure: workers that do not fork need to pickle it
