"""Features of a labelled folder: one forward pass over each image.

b batch, c channels, H W pixels, s tokens, d width.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import default_collate

from leanmim.config import Evaluate, Pretrain
from leanmim.data import Labelled, Normalise, centre_crop, labelled_pair, loader, resolve_workers
from leanmim.device import device_name, resolve_device
from leanmim.encoders import encoder_of
from leanmim.encoders.backbone import Backbone, as_tokens, full_depth
from leanmim.errors import UserError
from leanmim.evaluators.accuracy import Accuracy
from leanmim.progress import track
from leanmim.run import Run
from leanmim.weights import load_backbone, truncated

Embed = Callable[[Float[Tensor, "b c H W"]], Float[Tensor, "b d"]]


class Features(NamedTuple):
    """Features and labels of a set."""

    x: Float[Tensor, "b d"]
    y: Int[Tensor, "b"]


def embedding(backbone: Backbone, pool: str) -> Embed:
    """The function from normalised images to features.

    Args:
        backbone: a timm model without head.
        pool: ``avg``, the mean of the patch tokens after the backbone's own norm; ``token``, the class token;
            ``timm``, what the model returns.

    Raises:
        UserError: the model has no class token.
    """
    if pool == "timm":
        return backbone
    if pool == "token" and not getattr(backbone, "has_class_token", False):
        raise UserError("--pool token: this model has no class token; use avg")
    last = getattr(backbone, "fc_norm", nn.Identity())

    def embed(images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b d"]:
        tokens = backbone.forward_features(images)
        if pool == "token":
            return last(tokens[:, 0])
        return last(as_tokens(backbone, tokens).mean(1))

    return embed


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
) -> Features:
    """Features of every image of a set, on the device, in the order of its files.

    Args:
        embed: from normalised images to features.
        data: the set.
        normalise: of its images.
        batch_size: images per forward pass.
        workers: processes that read images.
        seed: of the transform's random choices.
        title: of the progress bar.
        console: where the bar is drawn; None is the standard error.
    """
    order = [[(seed, i) for i in range(a, min(a + batch_size, len(data)))] for a in range(0, len(data), batch_size)]
    xs, ys = [], []
    feed = loader(data, order, workers, normalise.device, default_collate)
    for images, labels in track(feed, f"{title} of {len(data)} images", len(order), console):
        xs.append(embed(normalise(images)).float())
        ys.append(labels.to(normalise.device))
    return Features(torch.cat(xs), torch.cat(ys))


class Subject(NamedTuple):
    """Something to evaluate: the pre-trained encoder, or a baseline."""

    name: str
    embed: Embed
    train: Labelled
    val: Labelled
    normalise: Normalise
    workers: int
    step: int = 0  # of pre-training
    facts: dict[str, Any] | None = None  # depth, parameters, ...: of a run whose segments give models of several depths


def extract_pair(subject: Subject, batch_size: int) -> tuple[Features, Features]:
    """Features of the training and of the validation images."""
    title = f"{subject.name} features"
    train, val = (
        extract(subject.embed, data, subject.normalise, batch_size, subject.workers, title=title)
        for data in (subject.train, subject.val)
    )
    return train, val


def subjects(config: Evaluate) -> Iterator[Subject]:
    """The run's encoder, then (with ``baselines``) a freshly initialised one and raw pixels."""
    config.check()
    size = (config.input_size[0], config.input_size[-1]) if config.input_size else None
    backbone, trained, state = load_backbone(config.run, size, config.depth)
    device = resolve_device(config.device)
    size = size or trained.size
    train, val = labelled_pair(config.data, trained.channels, centre_crop(size, config.crop))
    rest = (train, val, Normalise(state["mean"], state["std"], device), resolve_workers(config.workers))
    embed = embedding(backbone.to(device), config.pool)
    facts: dict[str, Any] | None = None
    if trained.cut:
        facts = {
            "depth": config.depth or trained.depth or full_depth(backbone),
            "parameters": sum(p.numel() for p in backbone.parameters()),
            "step": state["step"],
            "device": device_name(device),
            "latency_ms": 1e3 * latency(embed, torch.zeros(1, trained.channels, *size, device=device)),
        }
    yield Subject("pretrained", embed, *rest, state["step"], facts)
    if config.baselines:
        random = random_backbone(trained, size, config.depth).to(device)
        yield Subject("random", embedding(random, config.pool), *rest)
        yield Subject("pixels", raw_pixels, *rest)


@torch.inference_mode()
def latency(embed: Embed, image: Float[Tensor, "1 c H W"], repeats: int = 10) -> float:
    """Seconds for one image, the median of several."""
    times = []
    for _ in range(repeats + 1):
        before = time.perf_counter()
        embed(image).sum().item()  # waits for the device
        times.append(time.perf_counter() - before)
    return median(times[1:])


def random_backbone(config: Pretrain, size: tuple[int, int], depth: int | None = None) -> nn.Module:
    """The encoder as it was before pre-training started from nothing, or its first blocks or stages."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        sized = replace(config, input_size=size)
        return truncated(encoder_of(sized), sized, depth).eval()


def record(config: Evaluate, what: str, subject: Subject, accuracy: Accuracy) -> tuple[str, Accuracy]:
    """Append a result to the run's evaluations.jsonl, for the report."""
    line = {
        "what": what,
        "name": subject.name,
        "value": accuracy,
        "interval": accuracy.interval,
        "images": accuracy.images,
        "data": config.data,
        "options": asdict(config),
    }
    with open(Run(Path(config.run)).evaluations, "a") as file:
        file.write(json.dumps(line | (subject.facts or {})) + "\n")
    return subject.name, accuracy
