"""From a picture to the model's input: random crops, centre crops, normalisation.

Workers hand over uint8, or float32 of stored values; normalisation happens on the device. b batch, c channels, H W pixels.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from random import Random

import numpy as np
import torch
from jaxtyping import Float, Real
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2

from leanmim.config.base import Decode
from leanmim.data.order import seed_of
from leanmim.data.read import Bad, Cut, Picture, cut_whole
from leanmim.data.source import Source, nothing_readable, read, read_box
from leanmim.data.stored import as_float
from leanmim.device import to_device

IMAGENET = {3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), 1: ((0.449,), (0.226,))}
LARGE = 2**24  # pixels of a resized image


def random_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], draw: Random
) -> tuple[int, int, int, int]:
    """A box of RandomResizedCrop, as torchvision documents it: a share of the area, then the logarithm of width by height,
    both uniform; ten attempts to fit it in, then the largest box in the centre whose ratio is in bounds.

    Returns:
        Left, top, right, bottom, px.
    """
    for _ in range(10):
        area, shape = width * height * draw.uniform(*scale), math.exp(draw.uniform(*map(math.log, ratio)))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            left, top = draw.randint(0, width - w), draw.randint(0, height - h)
            return left, top, left + w, top + h
    w, h = min(width, max(1, round(height * ratio[1]))), min(height, max(1, round(width / ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def resized(cut: Cut, size: tuple[int, int], interpolation: str) -> Real[Tensor, "c H W"]:
    """The box of a cut at a size (height, width), with antialiasing."""
    left, top, right, bottom = map(round, cut.box)
    box = slice(top, max(bottom, top + 1)), slice(left, max(right, left + 1))
    pixels = np.array(cut.pixels[box])  # a copy: Pillow's are not to be written to
    crop = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    # what torchvision calls, but the result has its channels apart, as a batch has
    return nn.functional.interpolate(crop, list(size), mode=interpolation, antialias=True)[0]


class Crops(Dataset):
    """Random crops for training. The item (epoch, index) is a pure function of (seed, epoch, index).

    An unreadable image is replaced by the next readable one of the source, and reported.

    Args:
        source: the images.
        size: height and width, px.
        scale: share of an image's area.
        ratio: width by height.
        flip: probability of a horizontal flip.
        seed: of all that is drawn.
        interpolation: bilinear or bicubic.
        decode: fast draws the box first, and decodes a JPEG at the smallest scale that leaves it its pixels; exact decodes
            it whole.
    """

    def __init__(
        self,
        source: Source,
        size: tuple[int, int],
        scale: tuple[float, float],
        ratio: tuple[float, float],
        flip: float,
        seed: int,
        interpolation: str = "bicubic",
        decode: Decode = "fast",
    ) -> None:
        self.source, self.size, self.scale, self.ratio = source, size, scale, ratio
        self.flip, self.seed, self.interpolation = flip, seed, interpolation
        self.crop = self.fast if decode == "fast" else self.exact
        self.whole = v2.Compose(
            [
                v2.RandomResizedCrop(size, scale, ratio, v2.InterpolationMode(interpolation), antialias=True),
                v2.RandomHorizontalFlip(flip),
                v2.PILToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Real[Tensor, "c H W"], list[Bad]]:
        epoch, index = item
        bad: list[Bad] = []
        for step in range(len(self)):
            crop = self.crop((index + step) % len(self), seed_of(self.seed, epoch, index))
            if not isinstance(crop, Bad):
                return crop, bad
            bad.append(crop)
        raise nothing_readable(len(self), bad[0])

    def fast(self, place: int, seed: int) -> Real[Tensor, "c H W"] | Bad:
        """The box first."""
        draw = Random(seed)
        choose = partial(random_box, scale=self.scale, ratio=self.ratio, draw=draw)
        cut = read_box(self.source, place, choose, self.size)
        if isinstance(cut, Bad):
            return cut
        crop = resized(cut, self.size, self.interpolation)
        return crop.flip(-1) if draw.random() < self.flip else crop

    def exact(self, place: int, seed: int) -> Real[Tensor, "c H W"] | Bad:
        """The whole image first."""
        image = read(self.source, place)
        if isinstance(image, Bad):
            return image
        if isinstance(image, np.ndarray):
            return self.seeded(torch.from_numpy(as_float(image)).permute(2, 0, 1), seed)
        return self.seeded(image, seed)

    def seeded(self, image: Image.Image | Tensor, seed: int) -> Real[Tensor, "c H W"]:
        """torchvision's crop and flip."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch's also reseeds the GPU
            return self.whole(image)


class Normalise:
    """Images in memory -> normalised float32 images on the device.

    Args:
        mean: of each channel, of bytes on the scale 0 to 1, of stored values in their own units.
        std: standard deviation, likewise.
        device: where to.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self.device = device
        self.mean = torch.tensor(mean, device=device)[:, None, None]
        self.std = torch.tensor(std, device=device)[:, None, None]

    def __call__(self, images: Real[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
        """Move, then normalise: bytes, or stored values in float32."""
        unit = 255 if images.dtype == torch.uint8 else 1
        return (to_device(images, self.device).float() - self.mean * unit) / (self.std * unit)

    def invert(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
        """Of bytes: back to the scale 0 to 1, clipped, for people to look at."""
        return ((images * (self.std * 255) + self.mean * 255) / 255).clamp(0, 1)


def cut_centre(image: Picture, size: tuple[int, int], crop: float) -> Real[Tensor, "c H W"]:
    """Resize until the share ``crop`` of the image covers ``size``, and cut that out of its centre."""
    if isinstance(image, np.ndarray):
        return centre_of_values(image, size, crop)
    zoom = max(size[0] / image.height, size[1] / image.width) / crop
    # Truncated, as in torchvision, whatever the rounding of the product.
    shape = (max(size[1], int(image.width * zoom + 1e-6)), max(size[0], int(image.height * zoom + 1e-6)))
    if shape[0] * shape[1] > LARGE:  # of a long strip the centre only; elsewhere whole, as torchvision rounds it
        across, down = image.width / shape[0], image.height / shape[1]
        left, top = round((shape[0] - size[1]) / 2), round((shape[1] - size[0]) / 2)
        box = left * across, top * down, (left + size[1]) * across, (top + size[0]) * down
        return v2.functional.pil_to_tensor(image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box))
    image = image.resize(shape, Image.Resampling.BICUBIC)
    return v2.functional.pil_to_tensor(v2.functional.center_crop(image, list(size)))


def centre_of_values(values: Real[np.ndarray, "h w c"], size: tuple[int, int], crop: float) -> Float[Tensor, "c H W"]:
    """`cut_centre` of stored values: cut first, to whole pixels, then resized."""
    height, width = values.shape[:2]
    box = centre_box(height, width, size, crop)
    return resized(cut_whole(values, lambda *_: box), size, "bicubic")


def centre_box(height: int, width: int, size: tuple[int, int], crop: float) -> tuple[int, int, int, int]:
    """What `cut_centre` keeps of an image of so many pixels, to whole ones: left, top, right, bottom."""
    scale = crop * min(height / size[0], width / size[1])
    h, w = (max(1, round(scale * side)) for side in size)
    top, left = (height - h) // 2, (width - w) // 2
    return left, top, left + w, top + h


def centre_crop(size: tuple[int, int], crop: float | None = None) -> Callable:
    """Resize and cut the centre, the evaluation transform of MAE: 256 px then 224 is a crop of 0.875.

    Args:
        size: height and width, px.
        crop: share of the resized side that is kept; None is 0.875 from 128 px on, and 1 for thumbnails.
    """
    # not a closure: workers that do not fork need to pickle it
    return partial(cut_centre, size=size, crop=kept_share(size, crop))


def kept_share(size: tuple[int, int], crop: float | None) -> float:
    """Share of the resized side that `centre_crop` keeps."""
    return (0.875 if min(size) >= 128 else 1.0) if crop is None else crop
