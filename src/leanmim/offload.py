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

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import accumulate
from mmap import mmap
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import AdamW, Optimizer

from leanmim.errors import UserError
from leanmim.in_backward import trained_by
from leanmim.mim import MIM
from leanmim.offload_state import each_inner
from leanmim.placed import Placed

ALIGNED = 128  # numbers: each tensor begins at a multiple of 512 bytes, as torch's allocator has it
PIECE = 2**23  # numbers that are copied at once; room that one piece leaves is filled while the next one leaves
STATE = ("step", "exp_avg", "exp_avg_sq")


@runtime_checkable
class Streams(Protocol):
    """The orders in which a device works: two for copies, to the host and to the device, beside the computation's."""

    outward: Any
    inward: Any

    def work(self) -> Any:
        """The computation's stream."""
        ...

    def use(self, stream: Any) -> AbstractContextManager[Any]:
        """A context in which work goes to a stream."""
        ...


class OnCuda:
    """Those of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.outward, self.inward = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def work(self) -> torch.cuda.Stream:
        """The one at hand."""
        return torch.cuda.current_stream(self.device)

    def use(self, stream: torch.cuda.Stream) -> AbstractContextManager[Any]:
        """torch's own context."""
        return torch.cuda.stream(stream)


class InTurn:
    """Of a device that has none: everything is done when it is asked for."""

    def __init__(self) -> None:
        self.outward = self.inward = self

    def work(self) -> "InTurn":
        """The same one for all."""
        return self

    def use(self, stream: "InTurn") -> AbstractContextManager[Any]:
        """A context that changes nothing."""
        return nullcontext()

    def record_event(self) -> None:
        """What was asked for has been done."""

    def wait_event(self, event: None) -> None:
        """It has happened."""

    def synchronize(self) -> None:
        """All has been done."""


class Flat(NamedTuple):
    """A segment's tensors in flat memory, on the host or in a room on the device."""

    memory: tuple[Tensor, Tensor]
    """All weights, all of the optimizer's state."""
    weights: list[Tensor]
    """Views, one for each parameter."""
    state: list[dict[str, Tensor]]
    """Views of each parameter's state."""


class Offload(Placed):
    """A model whose segments are copied to the device before their forward pass and back to the host after their step.

    `losses` replaces the model's in `update`: when it is asked for the loss of segment ``i``, the caller has finished the
    step of ``i - 1``. Moments of 8 bits are a quarter of AdamW's, and stay on the device.

    Args:
        model: on the host; from now on this class alone moves its parameters, which are float32.
        optimizers: one per segment.
        device: where the segments are computed.
        streams: of the device; None are CUDA's, or everything in turn where there are none.
    """

    def __init__(
        self, model: MIM, optimizers: list[Optimizer], device: torch.device, streams: Streams | None = None
    ) -> None:
        self.model, self.optimizers, self.device = model, optimizers, device
        self.streams: Streams = streams or (OnCuda(device) if device.type == "cuda" else InTurn())
        self.parameters = [trained_by(optimizer) for optimizer in optimizers]
        trained = {p for own in self.parameters for p in own}
        for tensor in (*model.buffers(), *(p for p in model.parameters() if p not in trained)):
            tensor.data = tensor.data.to(device)  # running statistics, fixed positions: always on the device
        moved = isinstance(optimizers[0], AdamW)
        self.hosts = [on_host(own, moved, pinned=device.type == "cuda") for own in self.parameters]
        sizes = [max(len(host.memory[k]) for host in self.hosts) for k in range(2)]
        self.rooms = [tuple(torch.zeros(size, device=device) for size in sizes) for _ in range(2)]
        self.views = [[in_room(own, moved, room) for room in self.rooms] for own in self.parameters]
        self.there: list[int | None] = [None, None]  # the segment in each room
        self.at_work: int | None = None
        self.arrived: dict[int, list[Any]] = {}  # events: the weights of a segment in a room are there, then its state
        for i, optimizer in enumerate(optimizers):
            for parameter, weight in zip(self.parameters[i], self.hosts[i].weights, strict=True):
                weight.copy_(parameter.data)
            self.adopt(i)
            self.bind(i, self.hosts[i])
            optimizer.register_step_pre_hook(waiting(self.streams.work, self.arrived, i))

    @property
    def present(self) -> set[int]:
        """The segments that are on the device, or on their way to it."""
        return {i for i in self.there if i is not None}

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

    def exchange(self, room: int, new: int | None) -> None:
        """Start copying the segment in a room to the host, and segment ``new`` from there into the room."""
        old, work, memory = self.there[room], self.streams.work(), self.rooms[room]
        outward, inward = self.streams.outward, self.streams.inward
        before: list[Any] = [(), ()]
        if old is not None:
            assert all(p.grad is None for p in self.parameters[old]), "a segment leaves before its step"
            work.wait_event(self.arrived.pop(old)[1])  # long ago, unless the step was skipped
            self.adopt(old)
            self.bind(old, self.hosts[old])
            before = list(self.hosts[old].memory)
        after: list[Any] = [(), ()]
        self.there[room] = None
        if new is not None:
            self.adopt(new)
            after = list(self.hosts[new].memory)
        done = work.record_event()
        outward.wait_event(done)
        inward.wait_event(done)
        events = []
        for kept, wanted, place in zip(before, after, memory, strict=True):
            for start in range(0, max(len(kept), len(wanted)), PIECE):
                if leaving := len(kept[start : start + PIECE]):
                    with self.streams.use(outward):
                        kept[start : start + leaving].copy_(place[start : start + leaving], non_blocking=True)
                if coming := len(wanted[start : start + PIECE]):
                    inward.wait_event(outward.record_event())
                    with self.streams.use(inward):
                        place[start : start + coming].copy_(wanted[start : start + coming], non_blocking=True)
            events.append(inward.record_event())
        if new is not None:
            self.there[room], self.arrived[new] = new, events
            self.bind(new, self.views[new][room])

    @contextmanager
    def whole(self) -> Iterator[MIM]:
        """Context in which all weights are on the device, for evaluation, which changes none of them."""
        self.wait()
        absent = [i for i in range(len(self.optimizers)) if i not in self.there]
        for i in absent:
            flat = self.hosts[i].memory[0].to(self.device, copy=True)
            for parameter, weight in zip(self.parameters[i], cut(flat, shapes(self.parameters[i])), strict=True):
                parameter.data = weight
        try:
            yield self.model
        finally:
            for i in absent:
                for parameter, weight in zip(self.parameters[i], self.hosts[i].weights, strict=True):
                    parameter.data = weight

    def settle(self) -> None:
        """Bring everything back to the host, and wait until it is there."""
        for room in range(2):
            self.exchange(room, None)
        self.at_work = None
        self.wait()

    def wait(self) -> None:
        """Wait for all copies."""
        self.streams.outward.synchronize()
        self.streams.inward.synchronize()

    def home(self, i: int) -> Flat:
        """Where a segment is."""
        return self.views[i][self.there.index(i)] if i in self.there else self.hosts[i]

    def adopt(self, i: int) -> None:
        """Take optimizer state that was made elsewhere, in a first step or from a checkpoint, to where its segment is."""
        for parameter, own in zip(self.parameters[i], self.home(i).state, strict=True):
            state = self.optimizers[i].state.get(parameter, {})
            for name, value in state.items():
                if name not in own:
                    state[name] = each_inner(partial(Tensor.to, device=self.device), value)
                elif value is not own[name]:
                    state[name] = own[name].copy_(value)

    def bind(self, i: int, flat: Flat) -> None:
        """Let parameters and optimizer state of a segment be those views."""
        for parameter, weight, own in zip(self.parameters[i], flat.weights, flat.state, strict=True):
            parameter.data = weight
            state = self.optimizers[i].state.get(parameter, {})
            for name in own.keys() & state.keys():
                state[name] = own[name]


def waiting(work: Callable[[], Any], arrived: dict[int, list[Any]], i: int) -> Callable[..., None]:
    """A hook before the step of segment ``i``: only that needs the optimizer's state."""

    def wait(*_: Any) -> None:
        if i in arrived:
            work().wait_event(arrived[i][1])

    return wait


def shapes(parameters: list[nn.Parameter]) -> list[torch.Size]:
    """Of the weights."""
    return [p.shape for p in parameters]


def state_shapes(parameters: list[nn.Parameter], moved: bool) -> list[torch.Size]:
    """Of the optimizer's state, for each parameter in the order of `STATE`; of none if it is not ``moved``."""
    return [shape for p in parameters for shape in (torch.Size(), p.shape, p.shape) if moved]


def starts(sizes: list[torch.Size]) -> list[int]:
    """Where tensors of these shapes begin, in numbers, and last the end."""
    return list(accumulate((-(-size.numel() // ALIGNED) * ALIGNED for size in sizes), initial=0))


def cut(flat: Tensor, sizes: list[torch.Size]) -> list[Tensor]:
    """Views of these shapes of a flat tensor."""
    return [flat[start : start + size.numel()].view(size) for start, size in zip(starts(sizes), sizes, strict=False)]


def by_parameter(state: list[Tensor], count: int) -> list[dict[str, Tensor]]:
    """The optimizer's state of each of so many parameters, by name, as far as there is some."""
    return [dict(zip(STATE, state[3 * k : 3 * k + 3], strict=False)) for k in range(count)]


def in_room(parameters: list[nn.Parameter], moved: bool, room: tuple[Tensor, ...]) -> Flat:
    """A segment's views of a room; of the optimizer's state if that is ``moved``."""
    weights, state = room
    moments = cut(state, state_shapes(parameters, moved))
    return Flat((weights, state), cut(weights, shapes(parameters)), by_parameter(moments, len(parameters)))


def on_host(parameters: list[nn.Parameter], moved: bool, pinned: bool) -> Flat:
    """Host memory for a segment.

    Args:
        parameters: of the segment.
        moved: whether the optimizer's state goes there too.
        pinned: whether a GPU copies from and to it.

    Raises:
        UserError: so much memory cannot be locked.
    """
    assert all(p.dtype == torch.float32 for p in parameters)
    kinds = shapes(parameters), state_shapes(parameters, moved)
    if isinstance(parameters[0], FakeTensor):  # is only counted
        weights, state = (torch.zeros(starts(sizes)[-1]) for sizes in kinds)
        return in_room(parameters, moved, (weights, state))
    (weights, own), (state, moments) = (host_memory(sizes, pinned) for sizes in kinds)
    return Flat((weights, state), own, by_parameter(moments, len(parameters)))


def host_memory(sizes: list[torch.Size], pinned: bool) -> tuple[Tensor, list[Tensor]]:
    """Flat memory for tensors of these shapes, and one tensor for each, with a storage of its own, so that a checkpoint
    holds no more than the tensor. Errors as for `on_host`.

    torch's own pinned memory is rounded up to powers of two. This is shared with processes that are forked, so that none
    of its pages is ever copied away from where the GPU looks for it.
    """
    places = starts(sizes)
    memory = mmap(-1, 4 * max(places[-1], 1))
    flat = torch.frombuffer(memory, dtype=torch.float32)
    if pinned:
        cudart, address = torch.cuda.cudart(), flat.data_ptr()
        if error := int(cudart.cudaHostRegister(address, len(memory), 1)):  # 1: for all devices
            raise UserError(
                f"--offload: {len(memory) / 2**30:.1f} GiB of host memory cannot be locked (CUDA error {error}); close what "
                "else uses it, or leave --offload out"
            )
        weakref.finalize(flat, cudart.cudaHostUnregister, address).atexit = False
    views = [
        torch.frombuffer(memory, dtype=torch.float32, count=size.numel(), offset=4 * place).view(size)
        for place, size in zip(places, sizes, strict=False)
    ]
    return flat, views
