"""Offloading for block-wise training: one segment on the device, the others in host memory (ours, for BIM).

Block-wise training computes one segment at a time. So the device needs weights, gradients and optimizer state of that
segment only, and of the next one, which is copied during the computation. The results are bit-identical to training
without offloading.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from leanmim.mim import MIM
from leanmim.offload_state import each_inner

Move = Callable[[Tensor], Tensor]


class Offload:
    """A model whose segments are copied to the device before their forward pass and back to the host after their step.

    `losses` replaces the model's in `update`: when it is asked for the loss of segment ``i``, the caller has finished the
    step of ``i - 1``.

    Args:
        model: on the host; from now on this class alone moves its parameters.
        optimizers: one per segment.
        device: where the segments are computed.
        fetch: copies a tensor to the device; None is the built-in copy.
        store: copies a tensor to the host; None is the built-in copy, into pinned memory.
    """

    def __init__(
        self,
        model: MIM,
        optimizers: list[Optimizer],
        device: torch.device,
        fetch: Move | None = None,
        store: Move | None = None,
    ) -> None:
        self.model, self.optimizers, self.device = model, optimizers, device
        cuda = device.type == "cuda"
        self.lane = torch.cuda.Stream(device) if cuda else None  # a stream for copies, concurrent with the computation
        self.fetch = fetch or (lambda x: x.to(device, non_blocking=True, copy=True))
        self.store = store or self.to_host
        self.present: set[int] = set()
        self.arrived: torch.cuda.Event | None = None  # recorded after the last copy to the device
        trained = {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        for tensor in (*model.buffers(), *(p for p in model.parameters() if p not in trained)):
            tensor.data = tensor.data.to(device)  # running statistics, fixed positions: always on the device
        for i in range(len(optimizers)):
            self.put_back(i)
        self.settle()

    def losses(self, images: Float[Tensor, "b c H W"]) -> Iterator[Float[Tensor, ""]]:
        """The model's losses, one per segment, each computed once its segment is on the device."""
        losses = self.model(images)
        count = len(self.optimizers)
        for i in range(count):
            self.bring(i)
            if self.arrived:
                torch.cuda.current_stream(self.device).wait_event(self.arrived)
            loss = next(losses)
            self.bring((i + 1) % count)  # concurrent with this segment's forward and backward pass
            yield loss
            self.put_back(i)

    __call__ = losses

    def bring(self, i: int) -> None:
        """Start copying segment ``i`` to the device, after the last copy to the host has ended and freed its memory."""
        if i not in self.present:
            self.settle()
            self.replace(i, self.fetch)
            self.present.add(i)
            self.arrived = self.lane.record_event() if self.lane else None

    def put_back(self, i: int) -> None:
        """Start copying segment ``i`` to the host, after the work queued on the device."""
        if self.lane:
            self.lane.wait_stream(torch.cuda.current_stream(self.device))
        self.replace(i, self.store)
        self.present.discard(i)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Context in which all weights are on the device, for evaluation."""
        absent = [i for i in range(len(self.optimizers)) if i not in self.present]
        for i in absent:
            self.replace(i, self.fetch, state=False)
        self.settle()
        try:
            yield
        finally:
            if self.lane:
                self.lane.wait_stream(torch.cuda.current_stream(self.device))
            for i in absent:
                self.replace(i, self.store, state=False)

    def settle(self) -> None:
        """Wait for all copies."""
        if self.lane:
            self.lane.synchronize()

    def to_host(self, x: Tensor) -> Tensor:
        """A copy in host memory, pinned where the device is a GPU."""
        if not self.lane:
            return x.clone()
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        host.copy_(x, non_blocking=True)
        if x.is_cuda:
            x.record_stream(self.lane)  # keeps its memory until the copy has ended
        return host

    def replace(self, i: int, move: Move, state: bool = True) -> None:
        """Apply ``move`` to weights, gradients and, with ``state``, the optimizer's state of segment ``i``."""
        work = torch.cuda.current_stream(self.device) if self.lane else None

        def moved(x: Tensor) -> Tensor:
            new = move(x)
            if work and new.is_cuda:
                new.record_stream(work)  # allocated on the copy stream, used by the computation
            return new

        optimizer = self.optimizers[i]
        with torch.cuda.stream(self.lane):  # None does nothing
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                gradient, parameter.grad = parameter.grad, None
                parameter.data = moved(parameter.data)
                if gradient is not None:
                    parameter.grad = moved(gradient)
                moments = optimizer.state.get(parameter, {}) if state else {}
                for name, value in moments.items():
                    if isinstance(value, Tensor):
                        moments[name] = each_inner(moved, value)
