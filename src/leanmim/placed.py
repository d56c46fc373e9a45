"""What all placements of a model have in common; each is a module of its own, and `leanmim.placement` chooses."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from jaxtyping import Float
from torch import Tensor

from leanmim.mim import MIM


class Placed(ABC):
    """A model, its optimizers, and where they are."""

    model: MIM
    losses: Callable[[Tensor], Iterator[Tensor]]
    """What `update` calls."""
    begun: int | None = None
    """Steps that some process has begun, if it may go ahead."""

    @property
    def own(self) -> range:
        """The segments that this process trains."""
        return range(len(self.model.decoders))

    @abstractmethod
    def settle(self) -> None:
        """Wait until all weights and optimizer state may be read."""

    @abstractmethod
    def whole(self) -> AbstractContextManager[MIM]:
        """A context with the model, all weights on the device, to evaluate it; all processes must enter it."""

    def step(
        self, step: int, meets: Callable[[int], bool], work: Callable[[int], Float[Tensor, " s"]]
    ) -> Float[Tensor, " n"]:
        """The losses of a step.

        Args:
            step: of the run.
            meets: whether something is made of the weights after so many steps.
            work: does this process's share of a step and returns its losses.
        """
        return work(step)

    def batches(self, feed: Iterator[Any]) -> Iterator[Any]:
        """The images of a step, from those that this process reads."""
        return feed

    def gather(self) -> MIM:
        """The model as one process has it, which the optimizers train from now on; it has settled."""
        return self.model

    def loaded(self, i: int) -> None:
        """The optimizer state of segment ``i`` has come from a checkpoint."""
        return
