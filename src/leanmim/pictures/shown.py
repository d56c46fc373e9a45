"""The encoder whose pictures are drawn, the images that it sees, and their classes.

b images, c channels, H W pixels, d width.
"""

import os
from collections.abc import Sequence
from itertools import islice, takewhile
from operator import eq
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Real
from torch import Tensor
from torch.nn.functional import normalize

from leanmim.config import Show
from leanmim.config.evaluate import Evaluator
from leanmim.data import SUFFIXES, Files, Labelled, Normalise, Shards, Source, centre_crop, images_at, open_source
from leanmim.data.crops import kept_share
from leanmim.data.labels import PARTS, Labels
from leanmim.data.source import Joined
from leanmim.device import resolve_device
from leanmim.encoders.backbone import Backbone
from leanmim.errors import UserError
from leanmim.evaluators.cache import KEPT, storage
from leanmim.evaluators.features import subject_of
from leanmim.pictures.images import given_images, open_images, read_some, spread_out
from leanmim.run import run_of
from leanmim.start import Start, open_start

AT_ONCE = 32  # images per forward pass


class Shown(NamedTuple):
    """An encoder and images."""

    start: Start
    backbone: Backbone
    """timm's model without head, on the device."""
    normalise: Normalise
    source: Source
    classes: list[str]
    """The class of each image; empty where there are none."""

    @property
    def caption(self) -> str:
        """What the encoder is."""
        start = self.start
        kind = "fine-tuned" if start.classes and start.step else start.pretrained and start.pretrained.recipe
        return f"{kind}, {start.model.model}, step {start.step}" if kind else start.origin

    def photos(self, places: Sequence[int], largest: int) -> Real[Tensor, "b c H W"]:
        """Images for people to look at: the part that the encoder sees, its larger side ``largest`` px at most."""
        size = self.start.model.size
        factor = min(1.0, largest / max(size))
        height, width = (max(1, round(side * factor)) for side in size)
        crop = centre_crop((height, width), kept_share(size, self.start.crop))
        return torch.stack([crop(self.source.read(place)) for place in places])


def open_shown(config: Show) -> Shown:
    """The encoder and the images that the configuration names.

    Raises:
        UserError: the encoder cannot be read, there are no such images, or none are named.
    """
    start = open_start(config.run)
    source = open_given(config.images, start.model.read_as) if config.images else own_images(config.run, start)
    device = resolve_device("auto")
    return Shown(
        start, start.encoder().to(device), Normalise(start.mean, start.std, device), source, class_names(source)
    )


def open_given(images: Sequence[str], channels: int) -> Source:
    """What --images names: files and folders; or one folder, tar file, list or dataset, whose names tell classes."""
    if len(images) == 1 and os.path.exists(images[0]) and Path(images[0]).suffix.lower() not in SUFFIXES:
        return open_source(images[0], channels)
    return given_images(images, channels)


def own_images(run: str, start: Start) -> Source:
    """The data of a pre-training, the validation images of a fine-tuning."""
    if start.pretrained is not None:
        return open_images((), start.pretrained)
    found = run_of(Path(run))
    if not found.labels.is_file():
        raise UserError(f"{run!r} has no images of its own; give some with --images")
    labels = Labels.from_json(found.read_labels())
    return images_at(labels.root, labels.val, start.model.read_as)


def class_names(source: Source) -> list[str]:
    """The class of each image: the first folder in its name, after those that all share and after train and val. Empty where an
    image is in none, or all are in the same.
    """
    folders = [name.split(os.sep)[:-1] for name in source.names]
    if isinstance(source, Joined):  # whose names begin with a number
        folders = [parts[1:] for parts in folders]
    shared = sum(takewhile(bool, map(eq, min(folders), max(folders))))  # what these two share, all do
    folders = [parts[shared:] for parts in folders]
    if {parts[0].lower() for parts in folders if parts} <= PARTS:
        folders = [parts[1:] for parts in folders]
    found = [parts[0] for parts in folders if parts]
    return found if len(found) == len(folders) and len(set(found)) > 1 else []


def read_shown(config: Show, shown: Shown) -> tuple[list[str], Real[Tensor, "b c H W"]]:
    """Names and centre crops of the images to draw.

    Raises:
        UserError: none can be read.
    """
    found = read_some(shown.source, config.most, centre_crop(shown.start.model.size, shown.start.crop), config.images)
    if not found:
        raise UserError("none of the images can be read; give others with --images")
    names = shown.source.names
    return [Path(names[place]).name for place in found], torch.stack(list(found.values()))


def embedded(config: Show, shown: Shown, most: int) -> tuple[list[int], Float[Tensor, "b d"]]:
    """The places in the source of at most so many images, evenly spread, and their features: pooled, of unit length. A run's are
    kept in its cache.

    Raises:
        UserError: none can be read, or the source is of a kind whose features cannot be kept.
    """
    start, places = shown.start, sorted(islice(spread_out(len(shown.source), most), most))
    data = Labelled.holding(
        part_of(shown.source, places), [0] * len(places), [], centre_crop(start.model.size, start.crop)
    )
    evaluator = Evaluator(run=config.run, data="", crop=start.crop)
    subject = subject_of("pretrained", start, shown.backbone, evaluator, lambda *_: (data, data))
    with storage(evaluator) as store:
        arrays = store.arrays(subject._replace(step=start.step), data, [subject.pool])
        features = torch.from_numpy(np.array(arrays[subject.pool]))
    return [places[row] for row in arrays[KEPT].tolist()], normalize(features, dim=1)


def part_of(source: Source, places: Sequence[int]) -> Files | Shards:
    """Some images of a source.

    Raises:
        UserError: it is of a kind that cannot be divided.
    """
    if isinstance(source, Shards):
        names = source.names
        return source.of(names[place] for place in places)
    if isinstance(source, Files):
        names = source.names
        return Files(source.root, [names[place] for place in places], source.channels)
    if isinstance(source, Joined) and all(isinstance(one, Files) for one in source.sources):
        return Files("", [source.where(place) for place in places], source.sources[0].channels)  # type: ignore[attr-defined]
    raise UserError(f"this picture takes no images of a {type(source).__name__}; give a folder of some with --images")
