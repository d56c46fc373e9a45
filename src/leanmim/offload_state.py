"""Offloading for end-to-end training: the optimizer's state waits in host memory.

A parameter's moments are on the device while it is stepped; those of the next one are on their way then, and those of the last one
leave before them. The results are bit-identical to training without offloading.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from leanmim.in_backward import only, trained_by
from leanmim.rooms import Likes, Rooms, Streams


class StateOffload(Rooms):
    """The optimizers step one parameter after the other, and between two steps its moments wait in host memory.

    Which parameter comes next is what came next in the step before. The numbers of steps, one for each parameter, stay where the
    optimizer has them.

    Args:
        optimizers: of parameters on the device; from now on this class alone moves their state.
        device: where the parameters are.
        streams: see `Rooms`.
    """

    def __init__(self, optimizers: list[Optimizer], device: torch.device, streams: Streams | None = None) -> None:
        owner = {parameter: own for own in optimizers for parameter in trained_by(own)}
        likes: list[Likes] = [([], [moments(own, parameter)]) for parameter, own in owner.items()]
        super().__init__([*owner.values()], [[parameter] for parameter in owner], likes, device, streams)
        self.number = {parameter: i for i, parameter in enumerate(owner)}
        self.after: dict[int | None, int] = {}
        self.last: int | None = None  # that was stepped
        for optimizer in optimizers:
            optimizer.step = partial(self.step, optimizer.step)  # type: ignore[method-assign, assignment]
            optimizer.register_load_state_dict_post_hook(lambda _: self.settle())

    def step(self, step: Callable[[], Any]) -> None:
        """In place of an optimizer's own ``step``: each parameter that has a gradient, one after the other."""
        optimizer: Optimizer = step.__self__  # type: ignore[attr-defined]
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.bring(self.number[parameter])
                    with only(optimizer, parameter, group):
                        step()

    def bring(self, i: int) -> None:
        """The moments of parameter ``i`` are here, those of the next one start on their way."""
        if i not in self.there:
            self.exchange(0, i)
        self.streams.work().wait_event(self.arrived[i][1])
        self.after[self.last] = i
        self.last = i
        following = self.after.get(i, i)  # itself, if nobody knows
        if following not in self.there:
            self.exchange(1 - self.there.index(i), following)


def moments(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Like those of a parameter, without memory."""
    like = parameter.detach().to("meta")
    if fresh := getattr(optimizer, "fresh", None):  # of 8 bits
        return fresh(like)
    return {"exp_avg": like, "exp_avg_sq": like}
