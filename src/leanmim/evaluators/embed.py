"""`leanmim embed`: the features of every image, streamed into a file.

b batch, c channels, H W pixels, p patches, d width.
"""

import hashlib
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from leanmim.config.embed import Embed
from leanmim.data import Normalise, Source, absolute, centre_crop, loader, open_source, resolve_workers
from leanmim.data.readable import Pictures, collate_readable
from leanmim.device import resolve_device
from leanmim.encoders.backbone import Backbone, as_tokens
from leanmim.errors import UserError
from leanmim.evaluators.cache import digest_of_weights
from leanmim.evaluators.embed_file import WRITERS, Parts, Rows
from leanmim.evaluators.features import embedding, has_class_token, layer_count, only_layer, uncovered
from leanmim.progress import track
from leanmim.start import start_of

Extractor = Callable[[Float[Tensor, "b c H W"]], Tensor]  # to b d, or b p d


def embed(config: Embed) -> Path:
    """Write the features of every readable image into a file, continuing where an earlier call was interrupted.

    Returns:
        The file.

    Raises:
        UserError: an option is impossible, the start or the data cannot be read, the file is another's, or no image can be
            read.
    """
    config = config.with_stats()
    write = WRITERS[Path(config.out).suffix]()  # a missing library shows before the work
    start = start_of(config.start, config)
    device, size = resolve_device(config.device), start.model.size
    backbone, image = start.encoder(size).to(device), torch.zeros(1, start.model.channels, *size, device=device)
    features, normalise = extractor(backbone, config, image), Normalise(start.mean, start.std, device)
    source = open_source(config.data, start.model.read_as)
    with torch.inference_mode():
        shape = tuple(features(image).shape[1:])
    config = replace(config, data=absolute(config.data))
    parts = Parts(config, source, shape, identity(config, backbone, start.origin, source))
    if parts.finished():
        print(f"{config.out} is complete; --overwrite computes it afresh", file=sys.stderr)
        return parts.out
    parts.prepare()
    order = [range(a, min(a + config.batch_size, len(source))) for a in range(0, len(source), config.batch_size)]
    order = order[parts.done * parts.batches :]
    pictures = Pictures(source, centre_crop(size, config.crop))
    batches = loader(pictures, order, resolve_workers(config.workers), device, collate_readable)
    feed = track(batches, f"features of {len(source)} images", len(order))
    with torch.inference_mode():
        for part in range(parts.done, parts.count):
            rows = (
                Rows(None if images is None else features(normalise(images)).float().cpu(), places, bad)
                for images, places, bad in islice(feed, parts.batches)
            )
            parts.save(part, rows)
    parts.finish(write)
    return parts.out


def extractor(backbone: Backbone, config: Embed, image: Float[Tensor, "1 c H W"]) -> Extractor:
    """The function from normalised images to the features that are asked for.

    Args:
        backbone: a timm model without head.
        config: which features.
        image: any that the model takes.

    Raises:
        UserError: the model has no such layer, or no class token.
    """
    layer = config.layer
    if layer is None:
        if config.features == "pooled":
            return embedding(backbone, config.pool)
        return lambda images: as_tokens(backbone, backbone.forward_features(images))
    inner, count = uncovered(backbone), layer_count(backbone, image)
    if not count:
        raise UserError(f"--layer: timm's {type(inner).__name__} shows no layers but the last; leave --layer out")
    if layer > count:
        raise UserError(f"--layer {layer} is out of range; the model has {count}")
    if config.pool == "token" and not has_class_token(inner):
        raise UserError("--pool token: this model has no class token; use avg")

    def of_layer(images: Float[Tensor, "b c H W"]) -> Tensor:
        if config.pool == "token":
            return only_layer(backbone, images, layer, return_prefix_tokens=True)[1][:, 0]
        tokens = only_layer(backbone, images, layer).flatten(2).transpose(1, 2)
        return tokens if config.features == "patches" else tokens.mean(1)

    return of_layer


def identity(config: Embed, backbone: Backbone, origin: str, source: Source) -> dict[str, Any]:
    """What decides on the numbers in the file: the configuration, the weights, the images by name."""
    names = hashlib.sha256()
    for name in source.names:
        names.update(name.encode("utf-8", "surrogateescape") + b"\0")
    return {
        "config": config.to_json(),
        "start": origin,
        "weights": digest_of_weights(backbone),
        "images": len(source),
        "names": names.hexdigest(),
    }
