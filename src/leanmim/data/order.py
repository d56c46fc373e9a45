"""The order of the images: a pure function of (seed, epoch), so that a run can be continued at any step."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from leanmim.config import Finetune, Pretrain
from leanmim.processes import Process


def seed_of(*numbers: int) -> int:
    """One seed from several numbers, without collisions between, say, (0, 1), (1, 0) and (0, 1, 0)."""
    return int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1, np.uint64)[0]) >> 1


@lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """The order of the files in an epoch."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(seed, epoch)))


def order_of_steps(
    config: Pretrain | Finetune, count: int, per_epoch: int, start: int, stop: int, process: Process
) -> "Order":
    """The order of steps ``start`` to ``stop``, ``config.accum`` batches for each.

    Args:
        config: batch, accumulation, seed.
        count: images.
        per_epoch: steps.
        start: steps that came before.
        stop: the step after the last one.
        process: which part of each step's images is asked for.
    """
    batch, accum = int(config.batch_size), config.accum
    return Order(count, batch, per_epoch * accum, start * accum, stop * accum, config.seed, *process)


class Order(torch.utils.data.Sampler):
    """The batches of forward passes ``start`` to ``stop`` for one of several processes, as lists of (epoch, index).

    Every epoch is a fresh permutation; what does not fill a whole step is left to later epochs. If there are fewer images than
    the steps of an epoch take, they go on to the next permutation, whose number then is the item's epoch.
    """

    def __init__(
        self, count: int, batch: int, per_epoch: int, start: int, stop: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        self.count, self.batch, self.per_epoch = count, batch, per_epoch
        self.start, self.stop, self.seed, self.rank, self.world = start, stop, seed, rank, world

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        stride = max(self.count, self.per_epoch * self.world * self.batch)
        for micro in range(self.start, self.stop):
            epoch, k = divmod(micro, self.per_epoch)
            first = epoch * stride + (k * self.world + self.rank) * self.batch
            yield list(self.items(first, first + self.batch))

    def items(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Those at places ``start`` to ``stop`` of all permutations, one after the other."""
        while start < stop:
            epoch, place = divmod(start, self.count)
            indices = epoch_order(self.count, self.seed, epoch)[place : place + stop - start].tolist()
            yield from ((epoch, index) for index in indices)
            start += len(indices)
