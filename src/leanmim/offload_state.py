"""Offloading for end-to-end training: the optimizer's state waits in host memory.

A parameter's moments are on the device while it is stepped, and those of the next one on their way. The results are bit-identical
to training without offloading.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from leanmim.in_backward import only, trained_by

Move = Callable[[Tensor], Tensor]


def each_inner(move: Move, x: Tensor) -> Tensor:
    """``move`` applied to a tensor; of one that consists of others, as a quantised one, to these."""
    if not is_traceable_wrapper_subclass(x):
        return move(x)
    names, context = x.__tensor_flatten__()
    inner = {name: each_inner(move, getattr(x, name)) for name in names}
    return type(x).__tensor_unflatten__(inner, context, x.shape, x.stride())


def inner_tensors(x: Tensor) -> list[Tensor]:
    """Those of which a tensor consists; itself, if it is an ordinary one."""
    if not is_traceable_wrapper_subclass(x):
        return [x]
    return [tensor for name in x.__tensor_flatten__()[0] for tensor in inner_tensors(getattr(x, name))]


class StateOffload:
    """The optimizers step one parameter after the other, and between two steps its moments wait in host memory.

    Which parameter comes next is what came next in the step before. The numbers of steps, one for each parameter, stay where the
    optimizer has them.

    Args:
        optimizers: of parameters on the device; from now on this class alone moves their state.
        device: where the parameters are.
        fetch: copies a tensor to the device; None is the built-in copy.
        store: copies a tensor to the host; None is the built-in copy, into pinned memory.
    """

    def __init__(
        self, optimizers: list[Optimizer], device: torch.device, fetch: Move | None = None, store: Move | None = None
    ) -> None:
        self.device = device
        self.lane = torch.cuda.Stream(device) if device.type == "cuda" else None  # for copies beside the computation
        self.fetch, self.store = fetch or (lambda x: x.to(device, non_blocking=True, copy=True)), store or self.to_host
        self.owner = {parameter: own for own in optimizers for parameter in trained_by(own)}
        self.after: dict[nn.Parameter | None, nn.Parameter] = {}
        self.last: nn.Parameter | None = None  # that was stepped
        self.ahead: nn.Parameter | None = None  # whose moments are here before its turn
        self.arrived: torch.cuda.Event | None = None  # recorded after the last copy to the device
        for optimizer in optimizers:
            self.put_back_all(optimizer)
            optimizer.step = partial(self.step, optimizer.step)  # type: ignore[method-assign, assignment]
            optimizer.register_load_state_dict_post_hook(self.put_back_all)

    def step(self, step: Callable[[], Any]) -> None:
        """In place of an optimizer's own ``step``: each parameter that has a gradient, one after the other."""
        optimizer: Optimizer = step.__self__  # type: ignore[attr-defined]
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.bring(parameter)
                    with only(optimizer, parameter, group):
                        step()
                    self.put_back(parameter)

    def bring(self, parameter: nn.Parameter) -> None:
        """The moments of a parameter are here, those of the next one start on their way."""
        if self.ahead is not parameter:
            if self.ahead is not None:
                self.put_back(self.ahead)
            self.move(parameter, self.fetch)
        if self.arrived:
            torch.cuda.current_stream(self.device).wait_event(self.arrived)
        self.after[self.last] = parameter
        self.last = parameter
        self.ahead = self.after.get(parameter)
        if self.ahead is parameter:  # the only one
            self.ahead = None
        if self.ahead is not None:
            self.move(self.ahead, self.fetch)

    def put_back(self, parameter: nn.Parameter) -> None:
        """Start copying moments to the host, after the work queued on the device."""
        if self.lane:
            self.lane.wait_stream(torch.cuda.current_stream(self.device))
        self.move(parameter, self.store)

    def put_back_all(self, optimizer: Optimizer) -> None:
        """All moments to the host, as after a checkpoint was loaded."""
        self.ahead = None
        for parameter in trained_by(optimizer):
            self.put_back(parameter)
        self.settle()

    def settle(self) -> None:
        """Wait for all copies."""
        if self.lane:
            self.lane.synchronize()

    def move(self, parameter: nn.Parameter, move: Move) -> None:
        """Apply ``move`` to the moments of a parameter."""
        state = self.owner[parameter].state.get(parameter, {})
        work = torch.cuda.current_stream(self.device) if self.lane else None

        def moved(x: Tensor) -> Tensor:
            new = move(x)
            if work and new.is_cuda:
                new.record_stream(work)  # allocated on the stream of copies, used by the computation
            return new

        with torch.cuda.stream(self.lane):  # None does nothing
            for name, value in state.items():
                if value.ndim:
                    state[name] = each_inner(moved, value)
        if self.lane and move is self.fetch:
            self.arrived = self.lane.record_event()

    def to_host(self, x: Tensor) -> Tensor:
        """A copy in host memory, pinned where the device is a GPU; laid out as the parameter is, which fused kernels take for granted."""
        if not self.lane:
            return x.clone()
        host = torch.empty_like(x, device="cpu", pin_memory=True)
        host.copy_(x, non_blocking=True)
        if x.is_cuda:
            x.record_stream(self.lane)  # keeps its memory until the copy has ended
        return host
