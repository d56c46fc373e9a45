"""A device that records operators and repeats them, as a CUDA graph does its kernels: on the same memory, with the same numbers from
the host.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """Stands for `leanmim.graphed.CudaGraphs`. What reads a number from the device while it is recorded raises."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[Any, Any, Any, Any]] = []
        self.written: list[tuple[Tensor, Tensor]] = []
        self.repeats = 0

    def warm_up(self, work: Callable[[], Tensor]) -> Tensor:
        return work()

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """The work has to be done to be known; nothing of it stays."""
        self.entries = []
        state = torch.get_rng_state()
        with self:
            result = work()
        torch.set_rng_state(state)
        while self.written:
            memory, before = self.written.pop()
            memory.copy_(before)
        return self.repeat, result

    def wait(self) -> None:
        pass

    def keep(self, memory: Iterable[Tensor]) -> None:
        self.written += [(leaf.detach(), leaf.detach().clone()) for leaf in memory]

    @torch.no_grad()
    def repeat(self) -> None:
        self.repeats += 1
        for func, args, kwargs, result in self.entries:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host waits for a number"
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.keep(tree_leaves(value))
        if "batch_norm" in str(func):
            self.keep(args[3:5])  # running statistics, of which the schema does not say that they are written
        result = func(*args, **(kwargs or {}))
        self.entries.append((func, args, kwargs or {}, result))
        return result
