"""`leanmim predict`: the classes of images, streamed to a CSV table.

b batch, c classes.
"""

import csv
import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from leanmim.classifier.model import build_classifier
from leanmim.classifier.results import rank_columns, ranks
from leanmim.config.predict import Predict
from leanmim.data import ARRAY, SUFFIXES, Bad, Files, Normalise, Source, centre_crop, open_source, resolve_workers
from leanmim.data.readable import image_batches
from leanmim.data.source import Joined
from leanmim.device import resolve_device
from leanmim.errors import CannotWrite, UserError
from leanmim.evaluators.embed_file import write_skipped
from leanmim.progress import console_of, track
from leanmim.run import write_atomically
from leanmim.start import Start, open_start


def predict(config: Predict) -> Path:
    """Classify images and write a table: path, class, probability, class_2, probability_2, ...

    A row is written as soon as its image is classified, to a temporary file that takes the table's name at the end. Files
    that cannot be read have no row; they are listed in a file of their own next to the table.

    Returns:
        The table.

    Raises:
        UserError: the model is no classifier, there are no images or none that can be read, or the table is there already
            or cannot be written.
    """
    config.check()
    out = Path(config.out)
    if out.is_dir():
        raise UserError(f"--out {config.out!r} is a folder; give the name of a table, as predictions.csv")
    if out.exists() and not config.overwrite:
        raise UserError(f"--out {config.out!r} is there already; choose another name, or --overwrite to replace it")
    start = open_start(config.run, input_size=config.input_size)
    if not start.classes:
        raise UserError(
            f"{config.run!r} is an encoder, which knows no classes; fine-tune it first with `leanmim finetune`, and give "
            "the folder of that run"
        )
    source, bad = open_images(config.images, start.model.read_as), list[Bad]()
    skipped = out.with_name(out.name + ".skipped.jsonl")
    try:
        write_atomically(out, lambda path: write_table(path, config, start, source, bad))
        write_skipped(skipped, bad)
    except (OSError, CannotWrite) as error:
        raise UserError(
            f"--out {config.out!r} cannot be written ({error.__cause__ or error}); choose another name"
        ) from error
    if bad:
        console_of(stderr=True).print(
            f"{len(bad)} of {len(source)} files cannot be read and have no row: the first is {bad[0].path} "
            f"({bad[0].reason}), {skipped} lists all"
        )
    return out


def open_images(images: Sequence[str], channels: int) -> Source:
    """The images that are given: files by their names, folders, patterns, lists.

    Raises:
        UserError: one of them names no images.
    """
    sources: list[Source] = []
    for single, group in groupby(
        images, lambda name: Path(name).suffix.lower() in SUFFIXES | {ARRAY} and Path(name).is_file()
    ):
        names = list(group)
        sources += [Files("", names, channels)] if single else [open_source(name, channels) for name in names]
    return sources[0] if len(sources) == 1 else Joined(sources)


def write_table(path: Path, config: Predict, start: Start, source: Source, bad: list[Bad]) -> None:
    """Write the table; reports of unreadable files are added to ``bad``.

    Raises:
        UserError: no file can be read.
    """
    k = min(config.top, len(start.classes))
    # a file's name need not be text: its bytes are kept
    with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", *rank_columns(k)])
        for places, probabilities in classify(config, start, source, bad):
            rows = zip(places, ranks(start.classes, probabilities.numpy(), k), strict=True)
            table.writerows([source.where(place), *cells] for place, cells in rows)


def classify(
    config: Predict, start: Start, source: Source, bad: list[Bad]
) -> Iterator[tuple[list[int], Float[Tensor, "b c"]]]:
    """For each batch the positions of its images in the source, and the probabilities of their classes.

    Raises:
        UserError: no file can be read.
    """
    device = resolve_device(config.device)
    model = build_classifier(start).to(device)
    normalise = Normalise(start.mean, start.std, device)
    transform, workers = (
        centre_crop(start.model.size, start.crop if config.crop is None else config.crop),
        resolve_workers(config.workers),
    )
    feed = image_batches(source, transform, config.batch_size, workers, bad.extend, device)
    batches = math.ceil(len(source) / config.batch_size)
    for images, places in track(feed, f"classes of {len(source)} images", batches):
        with torch.inference_mode():
            probabilities = model(normalise(images)).float().softmax(1).cpu()
        yield places, probabilities
