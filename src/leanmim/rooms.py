"""Two rooms on the device for what else waits in host memory, and the copies between them (ours).

A training's parts take turns. While the part in one room is at work, the one before leaves the other for the host, piece by piece, and
the next one follows it in: copies go both ways at once. All is ordered among streams; nobody waits on the host.
"""

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate, chain
from mmap import mmap
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from leanmim.errors import UserError

ALIGNED = 512  # bytes: each tensor begins at a multiple, as torch's allocator has it
PIECE = 2**25  # bytes that are copied at once; room that one piece leaves is filled while the next one leaves

Likes = tuple[list[Tensor], list[dict[str, Tensor]]]
"""Of a part, tensors like those that move: its weights, and each parameter's optimizer state by name."""


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
    """A part's tensors in flat memory, on the host or in a room on the device."""

    memory: tuple[Tensor, Tensor]
    """All weights, all of the optimizer's state."""
    weights: list[Tensor]
    """Views, one for each parameter, if they move."""
    state: list[dict[str, Tensor]]
    """Views of each parameter's state."""


class Rooms:
    """Parts of a training, each in host memory or in one of two rooms on the device, which are as large as the largest part.

    Args:
        optimizers: of each part.
        parameters: of each part.
        likes: of each part, what is to move; from now on this class alone moves it.
        device: where the parts are at work.
        streams: of the device; None are CUDA's, or everything in turn where there are none.
    """

    def __init__(
        self,
        optimizers: list[Optimizer],
        parameters: list[list[nn.Parameter]],
        likes: list[Likes],
        device: torch.device,
        streams: Streams | None = None,
    ) -> None:
        self.optimizers, self.parameters, self.device = optimizers, parameters, device
        self.streams: Streams = streams or (OnCuda(device) if device.type == "cuda" else InTurn())
        self.memory, self.hosts = on_host(likes, pinned=device.type == "cuda")
        sizes = [max(len(host.memory[k]) for host in self.hosts) for k in range(2)]
        self.rooms = [tuple(torch.zeros(size, dtype=torch.uint8, device=device) for size in sizes) for _ in range(2)]
        self.views = [[in_room(own, room) for room in self.rooms] for own in likes]
        self.there: list[int | None] = [None, None]  # the part in each room
        self.arrived: dict[int, list[Any]] = {}  # events: the weights of a part in a room are there, then its state
        for i, host in enumerate(self.hosts):
            for parameter, weight in zip(parameters[i], host.weights, strict=False):
                weight.copy_(parameter.data)
            self.adopt(i)
            self.bind(i, host)

    @property
    def present(self) -> set[int]:
        """The parts that are on the device, or on their way to it."""
        return {i for i in self.there if i is not None}

    def exchange(self, room: int, new: int | None) -> None:
        """Start copying the part in a room to the host, and part ``new`` from there into the room."""
        old, work, memory = self.there[room], self.streams.work(), self.rooms[room]
        outward, inward = self.streams.outward, self.streams.inward
        before: list[Any] = [(), ()]
        if old is not None:
            work.wait_event(self.arrived.pop(old)[1])  # long ago, unless the step was skipped
            self.adopt(old)
            self.bind(old, self.hosts[old])
            before = list(self.hosts[old].memory)
        after: list[Any] = [(), ()]
        self.there[room] = None
        if new is not None:
            self.adopt(new)
            after = list(self.hosts[new].memory)
        outward.wait_event(work.record_event())
        events = []
        for kept, wanted, place in zip(before, after, memory, strict=True):
            for start in range(0, max(len(kept), len(wanted)), PIECE):
                if leaving := len(kept[start : start + PIECE]):
                    with self.streams.use(outward):
                        kept[start : start + leaving].copy_(place[start : start + leaving], non_blocking=True)
                if coming := len(wanted[start : start + PIECE]):
                    inward.wait_event(outward.record_event())  # and so for the work before
                    with self.streams.use(inward):
                        place[start : start + coming].copy_(wanted[start : start + coming], non_blocking=True)
            events.append(inward.record_event())
        if new is not None:
            self.there[room], self.arrived[new] = new, events
            self.bind(new, self.views[new][room])

    def settle(self) -> None:
        """Bring everything to the host, and wait until it is there."""
        for room in range(2):
            self.exchange(room, None)
        self.wait()
        for i in range(len(self.hosts)):
            self.adopt(i)

    def wait(self) -> None:
        """Wait for all copies."""
        self.streams.outward.synchronize()
        self.streams.inward.synchronize()

    def home(self, i: int) -> Flat:
        """Where a part is."""
        return self.views[i][self.there.index(i)] if i in self.there else self.hosts[i]

    def adopt(self, i: int) -> None:
        """Take optimizer state that was made elsewhere, in a first step or from a checkpoint, to where its part is."""
        for k, (parameter, own) in enumerate(zip(self.parameters[i], self.home(i).state, strict=True)):
            state = self.optimizers[i].state.get(parameter, {})
            for name, view in own.items():
                if name in state and state[name] is not view:
                    for flat in (self.hosts[i], *self.views[i]):
                        lay_out(flat.state[k][name], parameter)
                    for mine, value in zip(inner_tensors(view), inner_tensors(state[name]), strict=True):
                        mine.copy_(value)
                    state[name] = view

    def bind(self, i: int, flat: Flat) -> None:
        """Let parameters and optimizer state of a part be those views."""
        for parameter, weight in zip(self.parameters[i], flat.weights, strict=False):
            parameter.data = weight
        for parameter, own in zip(self.parameters[i], flat.state, strict=True):
            state = self.optimizers[i].state.get(parameter, {})
            state.update({name: view for name, view in own.items() if name in state})


def each_inner(move: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
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


def lay_out(view: Tensor, parameter: Tensor) -> None:
    """Let a moment's view have the strides that its parameter has by now (channels last), which fused kernels take for granted."""
    if view.shape == parameter.shape and view.stride() != parameter.stride():
        view.as_strided_(parameter.shape, parameter.stride())


def ordinary(likes: Likes) -> tuple[list[Tensor], list[Tensor]]:
    """What a part's weights and its state consist of, in the order of its memory."""
    weights, state = likes
    return weights, [x for own in state for value in own.values() for x in inner_tensors(value)]


def starts(likes: list[Tensor]) -> list[int]:
    """Where tensors like these begin, in bytes, and last the end."""
    return list(accumulate((-(-x.nbytes // ALIGNED) * ALIGNED for x in likes), initial=0))


def cut(flat: Tensor, likes: list[Tensor]) -> list[Tensor]:
    """Views of flat memory, like these; all are dense."""
    return [
        flat[start : start + x.nbytes].view(x.dtype).as_strided(x.shape, x.stride())
        for start, x in zip(starts(likes), likes, strict=False)
    ]


def filled(memory: tuple[Tensor, Tensor], likes: Likes, views: Iterable[Tensor]) -> Flat:
    """A part whose `ordinary` tensors are the next views."""
    weights, state = likes
    rest = iter(views)
    own = [next(rest) for _ in weights]
    return Flat(memory, own, [{name: each_inner(lambda _: next(rest), x) for name, x in one.items()} for one in state])


def in_room(likes: Likes, room: tuple[Tensor, ...]) -> Flat:
    """A part's views of a room."""
    weights, state = room
    return filled((weights, state), likes, chain(*map(cut, room, ordinary(likes))))


def on_host(likes: list[Likes], pinned: bool) -> tuple[Tensor, list[Flat]]:
    """Host memory for all parts in one piece, and each part of it. Arguments and errors as for `host_memory`."""
    kinds = [kind for own in likes for kind in ordinary(own)]  # two a part
    flat, views = host_memory([x for kind in kinds for x in kind], pinned)
    memory, rest = iter(flat.split([starts(kind)[-1] for kind in kinds])), iter(views)
    return flat, [filled((next(memory), next(memory)), own, rest) for own in likes]


def host_memory(likes: list[Tensor], pinned: bool) -> tuple[Tensor, list[Tensor]]:
    """Flat memory for tensors like these, and one tensor for each, with a storage of its own, so that a checkpoint holds no
    more than the tensor.

    torch's own pinned memory is rounded up to powers of two. This is shared with processes that are forked, so that none
    of its pages is ever copied away from where the GPU looks for it. It is locked as long as the flat tensor is kept.

    Args:
        likes: of all tensors.
        pinned: whether it is locked, as a GPU copies from and to it.

    Raises:
        UserError: so much memory cannot be locked.
    """
    places = starts(likes)
    if isinstance(likes[0], FakeTensor):  # is only counted
        flat = torch.zeros(places[-1], dtype=torch.uint8)
        return flat, cut(flat, likes)
    memory = mmap(-1, places[-1])
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    if pinned:
        cudart, address = torch.cuda.cudart(), flat.data_ptr()
        if error := int(cudart.cudaHostRegister(address, len(memory), 1)):  # 1: for all devices
            raise UserError(
                f"--offload: {len(memory) / 2**30:.1f} GiB of host memory cannot be locked (CUDA error {error}); close what "
                "else uses it, or leave --offload out"
            )
        weakref.finalize(flat, cudart.cudaHostUnregister, address).atexit = False
    views = [
        torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=place).as_strided(x.shape, x.stride())
        for place, x in zip(places, likes, strict=False)
    ]
    return flat, views
