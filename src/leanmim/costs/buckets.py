"""DistributedDataParallel's memory, counted in one process."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from leanmim.costs.storages import Storages


class Buckets:
    """Stands for DistributedDataParallel with ``gradient_as_bucket_view``: memory for all gradients, which stays. Those of the
    last batch are moved into it, to be averaged there.

    Args:
        losses: of the model.
        parameters: that are trained.
        storages: where the memory is counted.
    """

    def __init__(
        self, losses: Callable[[Any], Iterator[Tensor]], parameters: list[nn.Parameter], storages: Storages
    ) -> None:
        self.losses, self.averages = losses, True
        buckets = torch.zeros(sum(p.numel() for p in parameters))
        storages.follow(buckets, "gradients")
        parts = buckets.split([p.numel() for p in parameters])
        self.views = {p: part.view(p.shape) for p, part in zip(parameters, parts, strict=True)}
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self.take)

    def take(self, parameter: Tensor) -> None:
        """Move a gradient into its bucket."""
        if self.averages and parameter.grad is not None:
            parameter.grad = self.views[parameter].copy_(parameter.grad)  # type: ignore[index]

    def __call__(self, images: Tensor) -> Iterator[Tensor]:
        """The model's losses."""
        return self.losses(images)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Context in which gradients are accumulated where they are."""
        self.averages = False
        yield
        self.averages = True
