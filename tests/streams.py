"""A device whose streams are only written down, and who looks for copies and computations that are in no order."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Clock = Counter[str]  # how many operators of each stream have ended before


class Race(AssertionError):
    """Two operators that may come in either order."""


class Stream:
    """One that knows what happened before its next operator (a vector clock)."""

    def __init__(self, name: str, watch: "HappensBefore") -> None:
        self.name, self.watch, self.clock = name, watch, Counter[str]()

    def record_event(self) -> Clock:
        return self.clock | self.watch.host

    def wait_event(self, event: Clock) -> None:
        if not self.left_out():
            self.clock |= event

    def synchronize(self) -> None:
        if not self.left_out():
            self.watch.host |= self.clock
        self.watch.waits += 1

    def left_out(self) -> bool:
        return (self.name, sys._getframe(2).f_code.co_name) == self.watch.left_out


class HappensBefore(TorchDispatchMode):
    """Stands for `leanmim.rooms.Streams`, and is told of every operator.

    Two operators that touch the same bytes of watched memory, one of which writes them, must be in the same stream, or one
    must wait for an event after the other; else it raises `Race`.

    Args:
        left_out: a stream and a function: waits of that stream, or for it, in that function are left out.
    """

    def __init__(self, left_out: tuple[str, str] = ("", "")) -> None:
        super().__init__()
        self.left_out = left_out
        self.outward, self.inward, self.current = (Stream(name, self) for name in ("outward", "inward", "work"))
        self.host, self.waits = Counter[str](), 0
        self.watched: list[tuple[int, int, dict[tuple[int, int, str, bool], int]]] = []

    def work(self) -> Stream:
        return self.current

    @contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def watch(self, memory: Tensor) -> None:
        begin = memory.data_ptr()
        self.watched.append((begin, begin + memory.nbytes, {}))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        writes = [argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments]
        if func is torch.ops.aten._local_scalar_dense.default:
            self.waits += 1
        if any(writes) or not any(returned.alias_info for returned in schema.returns):  # a view touches nothing
            stream = self.current
            stream.clock |= self.host
            stream.clock[stream.name] += 1
            given = [*zip(args, writes, strict=False)]
            given += [(value, name == "out") for name, value in (kwargs or {}).items()]
            for value, write in given:
                for leaf in tree_leaves(value):
                    if isinstance(leaf, Tensor) and leaf.numel():
                        self.touch(leaf, write, stream, f"{func} on {stream.name}")
        return func(*args, **kwargs or {})

    def touch(self, tensor: Tensor, write: bool, stream: Stream, what: str) -> None:
        begin = tensor.data_ptr()
        end = begin + tensor.element_size() * (
            1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        )
        for low, high, touched in self.watched:
            if begin >= high or end <= low:
                continue
            for (first, last, other, wrote), tick in touched.items():
                overlap = first < end and begin < last and (write or wrote)
                if overlap and other != stream.name and stream.clock[other] < tick:
                    raise Race(f"{what} is in no order with {'a write' if wrote else 'a read'} on {other}")
            touched[begin, end, stream.name, write] = stream.clock[stream.name]
