"""The batches of fine-tuning and of its evaluation, from labelled files, read ahead by workers.

b batch, c channels, H W pixels, k classes.
"""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor
from torch.utils.data import Dataset

from leanmim.classifier.augment import seeded
from leanmim.config.base import Stored, as_read
from leanmim.config.finetune import Finetune
from leanmim.data import Bad, images_at, loader, order_of_steps, resolve_workers, seed_of
from leanmim.data.labels import Labels
from leanmim.data.readable import image_batches
from leanmim.data.source import nothing_readable, read
from leanmim.processes import ALONE, Process

CPU = torch.device("cpu")
UNBALANCED = 3  # times the smallest class


class TrainImages(Dataset):
    """Augmented images with their labels. The item (epoch, index) is a pure function of (seed, epoch, index).

    An unreadable image is replaced by the next readable one of its class, or else of the set, and reported.

    Args:
        labels: the images.
        transform: from a picture to a normalised tensor.
        seed: of the augmentations.
        channels: in which the images are read.
    """

    def __init__(self, labels: Labels, transform: Callable, seed: int, channels: int = 3) -> None:
        self.source = images_at(labels.root, labels.train, channels)
        self.labels = torch.tensor(labels.train_labels)
        self.transform, self.seed = transform, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Float[Tensor, "c H W"], int, list[Bad]]:
        epoch, index = item
        bad: list[Bad] = []
        for place in self.candidates(index):
            image = read(self.source, place)
            if isinstance(image, Bad):
                bad.append(image)
                continue
            with seeded(seed_of(self.seed, epoch, index)):
                return self.transform(image), int(self.labels[place]), bad
        raise nothing_readable(len(self), bad[0])

    def candidates(self, index: int) -> Iterator[int]:
        """The image itself, the next ones of its class, the next ones of other classes."""
        yield index
        ring = torch.arange(index + 1, index + len(self)) % len(self)
        same = self.labels[ring] == self.labels[index]
        yield from ring[same].tolist()
        yield from ring[~same].tolist()


def train_images(config: Finetune, labels: Labels, transform: Callable) -> TrainImages:
    """The images to train with; those of 8 bits in colour also where the model takes grey, to be augmented."""
    channels = as_read(config.channels or 3, config.values)
    return TrainImages(labels, transform, config.seed, channels if isinstance(channels, Stored) else 3)


def steps_per_epoch(images: int, effective: int) -> int:
    """Steps of an epoch: as many whole ones as there are images for, and one at least."""
    return max(1, images // effective)


def train_batches(
    config: Finetune,
    labels: Labels,
    transform: Callable,
    start: int,
    stop: int,
    process: Process = ALONE,
    device: torch.device = CPU,
    per_epoch: int | None = None,
) -> Iterator[tuple[Float[Tensor, "b c H W"], Int[Tensor, "b"], list[Bad]]]:
    """The augmented images of steps ``start`` to ``stop``, ``config.accum`` batches for each, with their labels and the images
    that could not be read.

    The order is that of a run of this configuration alone, as in pre-training. Every batch is full: what does not fill a whole
    step is left to later epochs, and where there are fewer images than a step takes, it goes on to the next permutation.

    Args:
        config: batch, accumulation, workers, seed.
        labels: the images.
        transform: `train_transform`.
        start: steps that came before.
        stop: the step after the last one.
        process: which part of each step's images is asked for.
        device: where the batches will go; for a GPU they wait in pinned memory.
        per_epoch: steps; None is `steps_per_epoch`.
    """
    count = len(labels.train)
    per_epoch = per_epoch or steps_per_epoch(count, int(config.batch_size) * config.accum * process.world)
    order = order_of_steps(config, count, per_epoch, start, stop, process)
    dataset = train_images(config, labels, transform)
    return loader(dataset, order, resolve_workers(config.workers), device, collate, config.data_patience)


def collate(
    items: list[tuple[Tensor, int, list[Bad]]],
) -> tuple[Float[Tensor, "b c H W"], Int[Tensor, "b"], list[Bad]]:
    """Stack the images and the labels, gather the reports."""
    images, labels, bads = zip(*items, strict=True)
    return torch.stack(images), torch.tensor(labels), [bad for found in bads for bad in found]


def val_batches(
    config: Finetune,
    labels: Labels,
    transform: Callable,
    report: Callable[[list[Bad]], object],
    device: torch.device = CPU,
) -> Iterator[tuple[Real[Tensor, "b c H W"], Int[Tensor, "b"], list[int]]]:
    """The images to validate with, in the order of ``labels.val``: bytes, labels, and positions in that list.

    Args:
        config: channels, batch, workers.
        labels: the images.
        transform: `eval_transform`.
        report: told of those that cannot be read, which are left out.
        device: where the batches will go.

    Raises:
        UserError: none can be read.
    """
    source = images_at(labels.root, labels.val, as_read(config.channels or 3, config.values))
    workers = resolve_workers(config.workers)
    batch, patience = int(config.batch_size), config.data_patience
    for images, places in image_batches(source, transform, batch, workers, report, device, patience):
        yield images, torch.tensor([labels.val_labels[place] for place in places]), places


def class_weights(labels: Labels, mode: str) -> Float[Tensor, "k"] | None:
    """What each class weighs in the loss, 1 on average over the training images; None is the same for all.

    They are for torch's cross_entropy, which weighs soft targets class by class.

    Args:
        labels: the images.
        mode: ``none``; ``balanced``, the inverse of the number of images; ``auto``, balanced where the largest class has
            more than three times the images of the smallest.
    """
    counts = torch.tensor(labels.counts, dtype=torch.float32)
    if mode == "none" or (mode == "auto" and counts.max() <= UNBALANCED * counts.min()):
        return None
    return counts.sum() / (len(counts) * counts)
