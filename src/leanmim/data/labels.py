"""Which labelled images train and which validate: a function of the folder, the shares and the seed."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from leanmim.data.find import image_names, unlisted
from leanmim.data.hub import Hub, open_hub
from leanmim.data.source import Files
from leanmim.data.tar import Tar, is_tar
from leanmim.errors import UserError

LAYOUT = "a labelled folder holds train/CLASS and val/CLASS, or CLASS folders only"
PARTS = {"train", "training", "val", "valid", "validation", "test"}
Classes = dict[str, list[str]]  # of each class its images, as paths below the root


@dataclass(frozen=True)
class Labels:
    """The images of a fine-tuning, with their labels."""

    root: str
    """The labelled folder."""
    classes: list[str]
    """Names; a label is a position in this list."""
    train: list[str]
    """Paths below the root, by class and name."""
    val: list[str]
    train_labels: list[int]
    val_labels: list[int]
    notes: list[str]
    """How they were chosen, for people to read."""

    @property
    def counts(self) -> list[int]:
        """Training images of each class."""
        counts = [0] * len(self.classes)
        for label in self.train_labels:
            counts[label] += 1
        return counts

    def to_json(self) -> dict[str, Any]:
        """Plain values, for labels.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Labels":
        """The inverse of `to_json`."""
        return cls(**values)

    def check_classes(self, before: "Labels") -> None:
        """Raise UserError if these are not the classes that the run began with."""
        pairs = (
            (set(self.classes) - set(before.classes), "added"),
            (set(before.classes) - set(self.classes), "removed"),
        )
        changes = [f"{len(names)} classes {how}: {listed(sorted(names))}" for names, how in pairs if names]
        if changes:
            raise UserError(
                "the classes in --data are not those that the run began with:\n  "
                + "\n  ".join(changes)
                + "\nPut them back, or start afresh in another --out (or with --overwrite)"
            )


def listed(names: list[str]) -> str:
    """The first names of a list."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


VAL_SHARE = 0.1  # held out where there is no val folder


def choose_labels(
    folder: str | Path,
    seed: int = 0,
    val_share: float = VAL_SHARE,
    label_share: float | None = None,
    labels_per_class: int | None = None,
) -> Labels:
    """The images to train with and to validate with.

    Images are drawn class by class, in an order that depends on the seed and their names only. So with one seed the images of
    a smaller --label-share or --labels-per-class are among those of a larger one, the held-out images are the same for all of
    them, and an image that is added to the folder moves few others.

    Args:
        folder: the labelled folder.
        seed: of what is drawn.
        val_share: of each class, held out where there is no val folder.
        label_share: of the labels of each class to train with; None is all.
        labels_per_class: to train with at most; None is all.

    Raises:
        UserError: the folder is no labelled folder, or has fewer than two classes, or nothing to validate with.
    """
    root = Path(folder)
    train, val, notes = read_layout(root)
    if len(train) < 2:
        raise UserError(f"{str(root)!r} has one class only ({', '.join(train)}); a classifier needs two or more")
    classes = sorted(train)
    train = {name: in_drawing_order(train[name], seed) for name in classes}
    if not val:
        total = size(train)
        train, val = hold_out(train, val_share)
        if not val:
            raise UserError(f"{str(root)!r} has one image a class and no val folder: none is left to validate with")
        notes.append(
            f"no val folder: {size(val)} of {total} images are held out, of each class a share (--val-share "
            f"{val_share:g}) but never its only image"
        )
    kept = {name: images[: labels_of(len(images), label_share, labels_per_class)] for name, images in train.items()}
    if size(kept) < size(train):
        how = f"--labels-per-class {labels_per_class}" if label_share is None else f"--label-share {label_share:g}"
        few, most = min(map(len, kept.values())), max(map(len, kept.values()))
        notes.append(f"{size(kept)} of {size(train)} labels are used ({how}), {few} to {most} a class")
    if unseen := [name for name in classes if name not in val]:
        notes.append(f"no image in val of {len(unseen)} of {len(classes)} classes: {listed(unseen)}")
    return Labels(
        str(root), classes, listing(classes, kept), listing(classes, val), labelling(classes, kept),
        labelling(classes, val), notes,
    )  # fmt: skip


def size(part: Classes) -> int:
    """Images of all classes."""
    return sum(map(len, part.values()))


def listing(classes: list[str], part: Classes) -> list[str]:
    """The images, by class and name."""
    return [image for name in classes for image in sorted(part.get(name, []))]


def labelling(classes: list[str], part: Classes) -> list[int]:
    """The labels of `listing`."""
    return [label for label, name in enumerate(classes) for _ in part.get(name, [])]


def in_drawing_order(images: list[str], seed: int) -> list[str]:
    """The images in an order that looks random: by a hash of seed and name."""
    return sorted(images, key=lambda image: hashlib.sha256(f"{seed}/{image}".encode(errors="surrogateescape")).digest())


def hold_out(classes: Classes, share: float) -> tuple[Classes, Classes]:
    """Train and val: of each class the share validates, but one image at least, and one at least is left to train with."""
    held = {name: min(len(images) - 1, max(1, round(share * len(images)))) for name, images in classes.items()}
    train = {name: images[held[name] :] for name, images in classes.items()}
    return train, {name: images[: held[name]] for name, images in classes.items() if held[name]}


def labels_of(count: int, label_share: float | None, labels_per_class: int | None) -> int:
    """How many images of a class train."""
    if label_share is not None:
        return max(1, round(label_share * count))
    return count if labels_per_class is None else labels_per_class


def read_layout(root: Path) -> tuple[Classes, Classes, list[str]]:
    """The classes of train and of val (empty if there is no such folder), and what is worth saying.

    Raises:
        UserError: this is no labelled folder.
    """
    if shards := labelled_shards(root, 3):
        return layout_of(shards.names, root)
    if not root.is_dir():
        raise UserError(f"--data {str(root)!r} is {'a file' if root.exists() else 'no folder'}; {LAYOUT}")
    folders = subfolders(root)
    if "train" not in folders:
        if folders and {name.lower() for name in folders} <= PARTS:
            raise UserError(f"{str(root)!r} has no folder 'train', but {listed(folders)}; {LAYOUT}")
        return read_classes(root, root), {}, []
    train = read_classes(root, root / "train")
    val = read_classes(root, root / "val", empty=True) if "val" in folders else {}
    if unknown := sorted(val.keys() - train.keys()):
        raise UserError(f"{str(root / 'val')!r} has classes that train has not: {listed(unknown)}")
    others = [name for name in folders if name not in ("train", "val")]
    return train, val, [f"only train and val are read, not {listed(others)}"] if others else []


def labelled_shards(root: str | Path, channels: int) -> Tar | Hub | None:
    """The source of a labelled tar file or dataset; None if it is none.

    Raises:
        UserError: the dataset has no labels.
    """
    if is_tar(root):
        return Tar([root], channels)
    if (found := open_hub(str(root), channels)) and found.label is None:
        raise UserError(
            f"{str(root)!r} has no column of labels among {', '.join(found.columns)}; it is one of the type datasets.ClassLabel "
            "(Dataset.class_encode_column), called 'label' if there are several"
        )
    return found


def images_at(root: str, names: Sequence[str], channels: int) -> Files | Tar | Hub:
    """Images by their names, below a folder, in a tar file or in a dataset."""
    shards = labelled_shards(root, channels)
    return shards.of(names) if shards else Files(root, names, channels)


def layout_of(names: list[str], root: Path) -> tuple[Classes, Classes, list[str]]:
    """The same from the names in a tar file or a dataset."""
    parts = [PurePosixPath(name).parts for name in names]
    split = any(part[0] == "train" for part in parts)
    found: dict[str, Classes] = {"train": {}, "val": {}}
    others: set[str] = set()
    for name, (first, *rest) in zip(names, parts, strict=True):
        own = rest if split else [first, *rest]
        if split and first not in found:
            others.add(first)
        elif len(own) < 2:
            raise UserError(f"{name!r} in {str(root)!r} is in no class folder; {LAYOUT}")
        else:
            found[first if split else "train"].setdefault(own[0], []).append(name)
    if unknown := sorted(found["val"].keys() - found["train"].keys()):
        raise UserError(f"{str(root)!r} has classes in val that train has not: {listed(unknown)}")
    return (
        found["train"],
        found["val"],
        [f"only train and val are read, not {listed(sorted(others))}"] if others else [],
    )


def read_classes(root: Path, folder: Path, empty: bool = False) -> Classes:
    """The images below each class folder; sub-folders belong to the class.

    Args:
        root: what the paths are relative to.
        folder: that of the class folders.
        empty: whether a class folder may be empty.

    Raises:
        UserError: there are no images, or some outside of class folders, or an empty class folder, or one twice.
    """
    first: dict[str, Path] = {}
    for path in map(folder.joinpath, subfolders(folder)):
        if (twin := first.setdefault(os.path.realpath(path), path)) != path:
            raise UserError(f"{str(twin)!r} and {str(path)!r} are one folder, by a link; remove one of these classes")
    classes: Classes = defaultdict(list)
    above = "" if folder == root else f"{folder.relative_to(root).as_posix()}/"
    for name in image_names(folder):
        own, *inside = name.split(os.sep)
        if not inside:
            raise UserError(
                f"{str(folder / name)!r} lies outside of class folders; put each image into {folder}/CLASS/: {LAYOUT}"
            )
        classes[own].append(above + "/".join([own, *inside]))
    if not empty and (without := [name for name in subfolders(folder) if name not in classes]):
        raise UserError(
            f"{str(folder)!r} has class folders without images: {listed(without)}; fill them or remove them"
        )
    return dict(classes)


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in it, hidden ones left out.

    Raises:
        UserError: it cannot be listed.
    """
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        unlisted(error)
