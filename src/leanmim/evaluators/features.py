"""What is evaluated, and its features: one forward pass over each image of a labelled folder.

b batch, c channels, H W pixels, h w n patches, d width.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import chain
from math import log
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from rich.console import Console
from torch import Tensor, nn

from leanmim.config import Evaluator, Pretrain
from leanmim.config.evaluate import TRIVIAL
from leanmim.data import Bad, Labelled, Normalise, centre_crop, labelled_pair, loader, resolve_workers
from leanmim.data.readable import collate_readable, tell_left_out
from leanmim.data.source import nothing_readable
from leanmim.device import device_name, resolve_device
from leanmim.encoders import encoder_of
from leanmim.encoders.backbone import Backbone, Truncated, as_tokens, full_depth
from leanmim.errors import UserError
from leanmim.evaluators.accuracy import Accuracy
from leanmim.files import append_line
from leanmim.processes import ALONE, Process
from leanmim.progress import console_of, track
from leanmim.run import Run
from leanmim.start import Start, images_of, open_start, start_of
from leanmim.weights import truncated

Embed = Callable[[Float[Tensor, "b c H W"]], Float[Tensor, "b d"]]
OpenSets = Callable[[Any, Start], tuple[Labelled, Labelled]]
"""From an evaluator's configuration and an encoder to the images to train with and to validate."""


class Features(NamedTuple):
    """Features and labels of a set."""

    x: Float[Tensor, "b d"]
    y: Int[Tensor, "b"]


def embedding(backbone: Backbone, pool: str) -> Embed:
    """The function from normalised images to features.

    Args:
        backbone: a timm model without head.
        pool: ``avg``, the mean of the patch tokens after the backbone's own norm, or before it where timm's model norms
            the mean (``fc_norm``, as of a fine-tuned ViT); ``token``, the class token; ``timm``, what the model returns.

    Raises:
        UserError: the model has no class token.
    """
    if pool == "timm":
        return backbone
    if pool == "token" and not has_class_token(backbone):
        raise UserError("--pool token: this model has no class token; use avg")

    def embed(images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b d"]:
        return pooled(backbone, pool, backbone.forward_features(images))

    return embed


def pooled(backbone: Backbone, pool: str, features: Tensor) -> Float[Tensor, "b d"]:
    """One vector for each image, from what the backbone's ``forward_features`` returns."""
    if pool == "timm":
        return backbone.forward_head(features) if hasattr(backbone, "forward_head") else features.mean(1)
    last = getattr(backbone, "fc_norm", nn.Identity())
    return last(features[:, 0] if pool == "token" else as_tokens(backbone, features).mean(1))


def has_class_token(backbone: Backbone) -> bool:
    """Whether the first token is a class token."""
    return bool(getattr(backbone, "has_class_token", False))


def uncovered(backbone: Backbone) -> Backbone:
    """timm's model itself, without the norm that closes it where it was cut."""
    return backbone.backbone if isinstance(backbone, Truncated) else backbone


@torch.inference_mode()
def layer_count(backbone: Backbone, image: Float[Tensor, "1 c H W"]) -> int:
    """Blocks or stages whose output timm gives, also of a model that was cut; 0 of a model that gives none."""
    inner = uncovered(backbone)
    return len(inner.forward_intermediates(image)[1]) if hasattr(inner, "forward_intermediates") else 0


def only_layer(backbone: Backbone, images: Float[Tensor, "b c H W"], layer: int, **options: Any) -> Any:
    """The patches after so many blocks or stages, before any norm, ``b d h w``, as timm returns them; no layer after it runs."""
    wanted: dict[str, Any] = dict(intermediates_only=True, stop_early=True, **options)
    return uncovered(backbone).forward_intermediates(images, indices=[layer - 1], **wanted)[0]


def read_layers(
    backbone: Backbone, images: Float[Tensor, "b c H W"], layers: Sequence[int]
) -> tuple[Tensor, list[Float[Tensor, "b d h w"]]]:
    """One forward pass: what ``forward_features`` returns, and the patches after so many blocks or stages, before any norm."""
    if not layers:
        return backbone.forward_features(images), []
    inner = uncovered(backbone)
    features, maps = inner.forward_intermediates(images, indices=[layer - 1 for layer in layers])
    return features if inner is backbone else backbone.norm(as_tokens(inner, features)), maps


def raw_pixels(images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b d"]:
    """The trivial baseline: the pixels themselves, at 32 x 32 px where images are larger."""
    if max(images.shape[2:]) > 32:
        images = nn.functional.interpolate(images, (32, 32), mode="area")
    return images.flatten(1)


@torch.inference_mode()
def extract(
    embed: Embed,
    data: Labelled,
    normalise: Normalise,
    batch_size: int,
    workers: int,
    seed: int = 0,
    title: str = "features",
    console: Console | None = None,
    process: Process = ALONE,
) -> Features:
    """Features of every readable image of a set, on the device, in the order of its files.

    Several processes embed a share each, of the same batches as one would, and get the features of all.

    Args:
        embed: from normalised images to features.
        data: the set.
        normalise: of its images.
        batch_size: images per forward pass.
        workers: processes that read images.
        seed: of the transform's random choices.
        title: of the progress bar.
        console: where the bar is drawn; None is the standard error.
        process: this one among all; all must call this.

    Raises:
        UserError: none can be read.
    """
    order = [[(seed, i) for i in range(a, min(a + batch_size, len(data)))] for a in range(0, len(data), batch_size)]
    order = order[len(order) * process.rank // process.world : len(order) * (process.rank + 1) // process.world]
    xs, kept, unreadable = [], list[int](), list[Bad]()
    feed = loader(data.pictures, order, workers, normalise.device, collate_readable)
    for images, places, bad in track(feed, f"{title} of {len(data)} images", len(order), console):
        kept, unreadable = kept + places, unreadable + bad
        if places:
            xs.append(embed(normalise(images)).float())
    process.wait()
    kept, unreadable = (list(chain(*found)) for found in zip(*process.gather((kept, unreadable[:1])), strict=True))
    if not kept:
        raise nothing_readable(len(data), unreadable[0])
    if process.first:
        tell_left_out(data.source, kept)
    return Features(process.concatenate(xs, normalise.device), data.labels_of(kept).to(normalise.device))


class Subject(NamedTuple):
    """Something to evaluate: an encoder, or a baseline."""

    name: str
    embed: Embed
    train: Labelled
    val: Labelled
    normalise: Normalise
    workers: int
    step: int = 0  # of pre-training
    facts: dict[str, Any] | None = None  # depth, parameters, ...: of a run whose segments give models of several depths
    backbone: Backbone | None = None  # None is no encoder: raw pixels
    pool: str = "avg"
    size: tuple[int, int] = (0, 0)  # of the images, px
    crop: float | None = None


def labelled_sets(config: Evaluator, start: Start) -> tuple[Labelled, Labelled]:
    """The images that --data names, to train with and to validate, as an encoder takes them."""
    train, val = labelled_pair(config.data, start.model.read_as, centre_crop(start.model.size, config.crop))
    if val.held_out:
        console_of(stderr=True).print(f"no val folder in {config.data}: {len(val)} images are held out")
    return train, val


def subjects(config: Evaluator, sets: OpenSets = labelled_sets) -> Iterator[Subject]:
    """The encoder, then the baselines.

    Args:
        config: which, and how they are measured.
        sets: opens the images to train with and to validate.

    Raises:
        UserError: an encoder or the images cannot be read, or an option does not go with them.
    """
    config = config.with_stats()
    start = start_of(config.run, config)
    assert isinstance(config.baselines, tuple)  # its __post_init__ made it one
    others = {  # opened now: a wrong one shows before anything is measured
        word: open_start(word, input_size=config.input_size, images=images_of(start))
        for word in config.baselines
        if word not in TRIVIAL
    }
    device = resolve_device(config.device)
    first = subject_of("pretrained", start, start.encoder().to(device), config, sets)
    yield first._replace(step=start.step, facts=facts_of(start, first, config.depth))
    for word in config.baselines:
        if word == "pixels":
            yield first._replace(name=word, embed=raw_pixels, backbone=None)
        elif word == "random":
            yield subject_of(word, start, random_start(start).to(device), config, sets)
        else:
            other = others[word]
            yield subject_of(word, other, other.encoder().to(device), config, sets)._replace(step=other.step)


def subject_of(
    name: str, start: Start, backbone: Backbone, config: Evaluator, sets: OpenSets = labelled_sets
) -> Subject:
    """An encoder with the images that it is evaluated on."""
    size, pool = start.model.size, config.pool
    if pool == "auto":
        pool = "token" if getattr(config, "solver", "") == "lars" and has_class_token(backbone) else "avg"
    train, val = sets(config, start)
    normalise = Normalise(start.mean, start.std, resolve_device(config.device))
    embed = embedding(backbone, pool)
    return Subject(
        name, embed, train, val, normalise, resolve_workers(config.workers), 0, None, backbone, pool, size, config.crop
    )


def facts_of(start: Start, subject: Subject, depth: int | None) -> dict[str, Any] | None:
    """What the report draws accuracies of several depths against; None if the run has one depth."""
    trained, backbone, device = start.pretrained, subject.backbone, subject.normalise.device
    if trained is None or not trained.cut or backbone is None:
        return None
    return {
        "depth": depth or trained.depth or full_depth(backbone),
        "parameters": sum(p.numel() for p in backbone.parameters()),
        "step": start.step,
        "device": device_name(device),
        "latency_ms": 1e3 * latency(subject.embed, torch.zeros(1, trained.channels, *subject.size, device=device)),
    }


@torch.inference_mode()
def latency(embed: Embed, image: Float[Tensor, "1 c H W"], repeats: int = 10) -> float:
    """Seconds for one image, the median of several."""
    times = []
    for _ in range(repeats + 1):
        before = time.perf_counter()
        embed(image).sum().item()  # waits for the device
        times.append(time.perf_counter() - before)
    return median(times[1:])


def random_start(start: Start) -> Backbone:
    """The encoder at random: as it was before pre-training started from nothing, or of the same architecture."""
    if start.pretrained is not None:
        return random_backbone(start.pretrained, start.model.size, start.depth)
    return replace(start, weights=None).encoder()


def random_backbone(config: Pretrain, size: tuple[int, int], depth: int | None = None) -> nn.Module:
    """The encoder as it was before pre-training started from nothing, or its first blocks or stages."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        sized = replace(config, input_size=size)
        return truncated(encoder_of(sized), sized, depth).eval()


def run_folder(config: Evaluator) -> Path | None:
    """Where results and features are kept; None if the encoder is not a run's."""
    return Path(config.run) if Run(Path(config.run)).last.is_file() else None


def record(config: Evaluator, what: str, subject: Subject, accuracy: Accuracy, **more: Any) -> tuple[str, Accuracy]:
    """Append a result to the evaluations.jsonl of a run folder, for the report.

    Args:
        config: how it was measured.
        what: the measure.
        subject: of what.
        accuracy: the result.
        more: further entries of the line; ``options`` replaces those of the configuration.
    """
    line: dict[str, Any] = (
        {
            "what": what,
            "name": subject.name,
            "value": accuracy,
            "interval": accuracy.interval,
            "images": accuracy.images,
            "data": config.data,
            "options": asdict(config) | {"pool": subject.pool},
            "step": subject.step,
        }
        | (subject.facts or {})
        | more
    )
    line["options"] = line["options"] | {"input_size": list(subject.size)}  # also where it is the encoder's own
    if (left_out := len(subject.val) - accuracy.images) > 0:  # of several draws there are more than images
        line["left_out"] = left_out
    if (folder := run_folder(config)) is not None:
        try:
            append_line(Run(folder).evaluations, line)
        except OSError as error:
            print(f"leanmim: {subject.name}'s {what} is not recorded in {str(folder)!r}: {error}", file=sys.stderr)
    return subject.name, accuracy


def grid_of(n: int, size: tuple[int, int]) -> tuple[int, int]:
    """Patches down and across: of the ways to lay out so many of them that whose patches are the squarest."""
    rows = (h for h in range(1, n + 1) if n % h == 0)
    h = min(rows, key=lambda h: abs(log(h * h * size[1] / (n * size[0]))))
    return h, n // h
