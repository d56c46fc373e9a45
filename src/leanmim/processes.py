"""This process among those that torchrun started."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from leanmim.device import resolve_device


class Process(NamedTuple):
    """Which one of how many."""

    rank: int
    world: int

    @property
    def first(self) -> bool:
        """Whether it is the one that writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def mean(self, values: Float[Tensor, " s"]) -> Float[Tensor, " s"]:
        """The mean over all processes."""
        if self.world > 1:
            dist.all_reduce(values)
            values = values / self.world
        return values

    def gather(self, value: Any) -> list[Any]:
        """The objects of all processes."""
        found: list[Any] = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(found, value)
        return found


ALONE = Process(0, 1)


@contextlib.contextmanager
def processes(device: str) -> Iterator[tuple[Process, torch.device]]:
    """Join the other processes, if torchrun started any, and leave them at the end."""
    rank, world, local = (
        int(os.environ.get(key, value)) for key, value in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    place = resolve_device(device, local)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if world > 1:
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield Process(rank, world), place
    finally:
        if world > 1:
            dist.destroy_process_group()
