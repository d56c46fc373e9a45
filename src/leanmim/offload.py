"""Offloading for block-wise training: one segment on the device, the others in host memory (ours, for BIM).

Block-wise training computes one segment at a time. So the device needs weights, gradients and optimizer state of that
segment only, and of the next one, which is copied during the computation. The device has two rooms, each as large as the
largest segment. While the segment in one of them is at work, the one before leaves the other for the host, piece by piece,
and the next one follows it in: copies go both ways at once. All is ordered among streams; in a step nobody waits on the host.

With accumulation all batches of a step pass a segment before the next one comes (`update`, ``segment_first``), so that a
segment is copied once a step, however many batches there are. Each batch's target and its activations at the segments' border wait
on the device meanwhile, which `leanmim cost` counts.

The results are bit-identical to training without offloading, on a GPU where its kernels are (``--deterministic``).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import AdamW, Optimizer

from leanmim.in_backward import trained_by
from leanmim.mim import MIM
from leanmim.placed import Placed
from leanmim.rooms import Flat, Rooms, Streams, cut, each_inner


class Offload(Rooms, Placed):
    """A model whose segments are copied to the device before their forward pass and back to the host after their step.

    `losses` replaces the model's in `update`: when it is asked for the loss of segment ``i``, the caller has finished the
    step of ``i - 1``. Moments of 8 bits are a quarter of AdamW's, and stay on the device.

    Args:
        model: on the host; from now on this class alone moves its parameters.
        optimizers: one per segment.
        device: where the segments are computed.
        streams: see `Rooms`.
    """

    def __init__(
        self, model: MIM, optimizers: list[Optimizer], device: torch.device, streams: Streams | None = None
    ) -> None:
        self.model = model
        segments = [trained_by(optimizer) for optimizer in optimizers]
        trained = {p for own in segments for p in own}
        for tensor in (*model.buffers(), *(p for p in model.parameters() if p not in trained)):
            tensor.data = tensor.data.to(device)  # running statistics, fixed positions: always on the device
        moved = isinstance(optimizers[0], AdamW)
        state = [
            [{"step": torch.empty(()), "exp_avg": p, "exp_avg_sq": p} if moved else {} for p in own] for own in segments
        ]
        super().__init__(
            optimizers, segments, [([*own], like) for own, like in zip(segments, state, strict=True)], device, streams
        )
        self.at_work: int | None = None
        for i, optimizer in enumerate(optimizers):
            optimizer.register_step_pre_hook(waiting(self.streams.work, self.arrived, i))

    def losses(self, images: Float[Tensor, "b c H W"]) -> Iterator[Float[Tensor, ""]]:
        """The model's losses, one per segment, each computed once its segment is on the device."""
        losses = self.model(images)
        del images
        for i in range(len(self.optimizers)):
            self.enter(i)
            yield next(losses)

    __call__ = losses

    def enter(self, i: int) -> None:
        """Let the computation wait for segment ``i``, and send the next one on its way."""
        if self.at_work == i:
            return  # another batch
        if i not in self.there:
            self.exchange(0, i)
        self.at_work = i
        self.streams.work().wait_event(self.arrived[i][0])
        following = (i + 1) % len(self.optimizers)
        if following not in self.there:
            self.exchange(1 - self.there.index(i), following)

    @contextmanager
    def whole(self) -> Iterator[MIM]:
        """Context in which all weights are on the device, for evaluation, which changes none of them."""
        self.wait()
        absent = [i for i in range(len(self.optimizers)) if i not in self.there]
        for i in absent:
            flat = self.hosts[i].memory[0].to(self.device, copy=True)
            for parameter, weight in zip(self.parameters[i], cut(flat, [*self.parameters[i]]), strict=True):
                parameter.data = weight
        try:
            yield self.model
        finally:
            for i in absent:
                for parameter, weight in zip(self.parameters[i], self.hosts[i].weights, strict=True):
                    parameter.data = weight

    def settle(self) -> None:
        """See `Rooms`."""
        super().settle()
        self.at_work = None

    def adopt(self, i: int) -> None:
        """See `Rooms`; state that does not move goes to the device."""
        super().adopt(i)
        for parameter, own in zip(self.parameters[i], self.hosts[i].state, strict=True):
            state = self.optimizers[i].state.get(parameter, {})
            for name in state.keys() - own.keys():
                state[name] = each_inner(partial(Tensor.to, device=self.device), state[name])

    def bind(self, i: int, flat: Flat) -> None:
        """See `Rooms`."""
        assert all(p.grad is None for p in self.parameters[i]), "a segment moves before its step"
        super().bind(i, flat)


def waiting(work: Callable[[], Any], arrived: dict[int, list[Any]], i: int) -> Callable[..., None]:
    """A hook before the step of segment ``i``: only that needs the optimizer's state."""

    def wait(*_: Any) -> None:
        if i in arrived:
            work().wait_event(arrived[i][1])

    return wait
