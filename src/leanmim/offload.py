"""One segment on the device: the others wait in host memory (ours, for BIM).

Block-wise training works on one segment at a time. So only that one's weights, gradients and optimizer state need to be
on the device, and the next one's, which are fetched while it works. The numbers are the same as without.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import AdamW

from leanmim.mim import MIM

Move = Callable[[Tensor], Tensor]


class Offload:
    """A model whose segments are fetched before they run, and put back after their step.

    Use `losses` in place of the model's, in `update`: on entering segment ``i`` the caller has done with ``i - 1``.

    Args:
        model: on the host (`MIM`, built and not moved); from now on this class says where its parameters are.
        optimizers: one per segment.
        device: where the segments work.
        fetch: copy of a tensor on the device; None moves it there.
        store: copy of a tensor on the host; None moves it there, into pinned memory.
    """

    def __init__(
        self,
        model: MIM,
        optimizers: list[AdamW],
        device: torch.device,
        fetch: Move | None = None,
        store: Move | None = None,
    ) -> None:
        self.model, self.optimizers, self.device = model, optimizers, device
        cuda = device.type == "cuda"
        self.lane = torch.cuda.Stream(device) if cuda else None  # copies run beside the work
        self.fetch = fetch or (lambda x: x.to(device, non_blocking=True, copy=True))
        self.store = store or self.to_host
        self.present: set[int] = set()
        self.arrived: torch.cuda.Event | None = None  # what was fetched last
        trained = {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        for tensor in (*model.buffers(), *(p for p in model.parameters() if p not in trained)):
            tensor.data = tensor.data.to(device)  # running statistics, fixed positions: always there
        for i in range(len(optimizers)):
            self.put_back(i)
        self.settle()

    def losses(self, images: Float[Tensor, "b c H W"]) -> Iterator[Float[Tensor, ""]]:
        """The model's losses, one per segment, each computed when its segment is here."""
        losses = self.model(images)
        count = len(self.optimizers)
        for i in range(count):
            self.bring(i)
            if self.arrived:
                torch.cuda.current_stream(self.device).wait_event(self.arrived)
            loss = next(losses)
            self.bring((i + 1) % count)  # beside the forward pass just begun, and the backward pass to come
            yield loss
            self.put_back(i)

    __call__ = losses

    def bring(self, i: int) -> None:
        """Have segment ``i`` on its way to the device, once the one that left last has gone: it takes its memory."""
        if i not in self.present:
            self.settle()
            self.replace(i, self.fetch)
            self.present.add(i)
            self.arrived = self.lane.record_event() if self.lane else None

    def put_back(self, i: int) -> None:
        """Have segment ``i`` on its way to the host, as the device leaves it."""
        if self.lane:
            self.lane.wait_stream(torch.cuda.current_stream(self.device))
        self.replace(i, self.store)
        self.present.discard(i)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All weights on the device, to evaluate the model."""
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
        """Wait until what is on the host may be read there."""
        if self.lane:
            self.lane.synchronize()

    def to_host(self, x: Tensor) -> Tensor:
        """A copy in host memory, pinned where the device is a GPU."""
        if not self.lane:
            return x.clone()
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        host.copy_(x, non_blocking=True)
        if x.is_cuda:
            x.record_stream(self.lane)  # its memory is free for others once the copy is done
        return host

    def replace(self, i: int, move: Move, state: bool = True) -> None:
        """Move all that belongs to segment ``i``: weights, gradients, and (with ``state``) the optimizer's state."""
        work = torch.cuda.current_stream(self.device) if self.lane else None

        def moved(x: Tensor) -> Tensor:
            new = move(x)
            if work and new.is_cuda:
                new.record_stream(work)  # made on the lane, used by the work
            return new

        optimizer = self.optimizers[i]
        with torch.cuda.stream(self.lane):  # without a lane this does nothing
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                gradient, parameter.grad = parameter.grad, None
                parameter.data = moved(parameter.data)
                if gradient is not None:
                    parameter.grad = moved(gradient)
                moments = optimizer.state.get(parameter, {}) if state else {}
                for name, value in moments.items():
                    if isinstance(value, Tensor):
                        moments[name] = moved(value)
