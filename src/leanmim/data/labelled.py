"""Labelled folders, for evaluation.

b images, c channels, H W pixels.
"""

import os
from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path

import torch
from jaxtyping import Int, Real
from torch import Tensor
from torch.utils.data import Dataset

from leanmim.data.labels import choose_labels, images_at, labelled_shards
from leanmim.data.read import Bad
from leanmim.data.readable import Pictures
from leanmim.data.shards import Shards
from leanmim.data.source import Files, Folder
from leanmim.errors import UserError


class Labelled(Dataset):
    """Images of a folder with one sub-folder per class, transformed, with their labels.

    An evaluation reads `pictures`, and leaves out what cannot be read. ``held_out`` says that they validate because there is no
    val folder.

    Raises:
        UserError: there are no classes, or (when an item is asked for) its file is unreadable.
    """

    held_out = False

    def __init__(self, folder: Path, channels: int, transform: Callable, classes: list[str] | None = None) -> None:
        self.source: Files | Shards = Folder(folder, channels)
        names = [name.split(os.sep)[0] for name in self.source.names if os.sep in name]
        if len(names) < len(self.source):
            raise UserError(f"{str(folder)!r} holds images outside of class folders; put each into {folder}/CLASS/")
        self.classes = sorted(set(names)) if classes is None else classes
        if unknown := set(names) - set(self.classes):
            raise UserError(f"{str(folder)!r} has classes that training has not: {', '.join(sorted(unknown)[:5])}")
        places = {name: place for place, name in enumerate(self.classes)}
        self.labels = [places[name] for name in names]
        self.transform = transform

    @classmethod
    def of(
        cls, root: Path, names: Sequence[str], labels: list[int], classes: list[str], channels: int, transform: Callable
    ) -> "Labelled":
        """Of images that were chosen already; ``names`` are paths below ``root``."""
        return cls.holding(images_at(str(root), names, channels), labels, classes, transform)

    @classmethod
    def holding(cls, source: Files | Shards, labels: list[int], classes: list[str], transform: Callable) -> "Labelled":
        """Of a source that is open already."""
        self = cls.__new__(cls)
        self.source, self.labels, self.classes, self.transform = source, labels, classes, transform
        return self

    def transformed(self, transform: Callable) -> "Labelled":
        """The same images, transformed in another way."""
        other = copy(self)
        other.transform = transform
        return other

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: int | tuple[int, int]) -> tuple[Real[Tensor, "c H W"], int]:
        """Image and label; an item (seed, index) fixes the transform's random choices."""
        index, image = self.pictures[item]
        if isinstance(image, Bad):
            raise UserError(f"{image.path} cannot be read ({image.reason}); remove it from the labelled folder")
        return image, self.labels[index]

    @property
    def pictures(self) -> Pictures:
        """The images without labels; in the place of unreadable ones why they are."""
        return Pictures(self.source, self.transform)

    def labels_of(self, places: list[int]) -> Int[Tensor, " b"]:
        """The labels of some of the images."""
        return torch.tensor([self.labels[place] for place in places], dtype=torch.long)


def labelled_pair(folder: str | Path, channels: int, transform: Callable) -> tuple[Labelled, Labelled]:
    """The sets train/CLASS and val/CLASS of a labelled folder, or of a tar file or a dataset with such names; without val those
    that fine-tuning would hold out.

    Raises:
        UserError: it is no labelled folder, or there are fewer than two classes.
    """
    root = Path(folder)
    if labelled_shards(root, channels) or not all((root / part).is_dir() for part in ("train", "val")):
        chosen = choose_labels(root)
        pair = (
            Labelled.of(root, chosen.train, chosen.train_labels, chosen.classes, channels, transform),
            Labelled.of(root, chosen.val, chosen.val_labels, chosen.classes, channels, transform),
        )
        pair[1].held_out = not all(name.startswith("val/") for name in chosen.val)
        return pair
    train = Labelled(root / "train", channels, transform)
    if len(train.classes) < 2:
        raise UserError(f"{str(root / 'train')!r} holds one class only; accuracy needs two or more")
    return train, Labelled(root / "val", channels, transform, train.classes)
