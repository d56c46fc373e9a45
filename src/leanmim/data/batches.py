"""The batches of a run, from any source, read ahead by workers.

b batch, c channels, H W pixels.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from leanmim.config import Pretrain
from leanmim.data.crops import Crops
from leanmim.data.order import Order
from leanmim.data.read import Bad
from leanmim.data.source import Source
from leanmim.errors import UserError
from leanmim.processes import ALONE, Process

CPU = torch.device("cpu")


def effective_batch(config: Pretrain, world: int = 1) -> int:
    """Images of a step, over all processes; the batch size is a number."""
    return int(config.batch_size) * config.accum * world


def batches(
    config: Pretrain, source: Source, start: int, stop: int, process: Process = ALONE, device: torch.device = CPU
) -> Iterator[tuple[UInt8[Tensor, "b c H W"], list[Bad]]]:
    """The random crops of steps ``start`` to ``stop``, ``config.accum`` batches for each, and the images that could not be
    read.

    The order is that of a run of this configuration alone, and draws nothing from torch's global generator.

    Args:
        config: input size, crops, batch, accumulation, workers, seed.
        source: the images.
        start: steps that came before.
        stop: the step after the last one.
        process: which part of each step's images is asked for.
        device: where the batches will go; for a GPU they wait in pinned memory.
    """
    dataset = Crops(
        source, config.size, config.crop_scale, config.crop_ratio, config.flip, config.seed, config.interpolation
    )
    per_epoch = len(source) // effective_batch(config, process.world)
    order = Order(
        len(source), int(config.batch_size), per_epoch * config.accum, start * config.accum, stop * config.accum,
        config.seed, *process,
    )  # fmt: skip
    return loader(dataset, order, resolve_workers(config.workers), device, collate)


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
