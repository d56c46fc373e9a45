"""The storages that live during a step: their bytes, by what they are for."""

import weakref
from collections import Counter
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


class Storages(TorchDispatchMode):
    """Follows every storage that an operator makes: live bytes by kind, now and at their peak.

    Args:
        round_to: what the device's allocator rounds sizes up to, bytes.
    """

    def __init__(self, round_to: int = 1) -> None:
        super().__init__()
        self.round_to = round_to
        self.live: dict[int, tuple[weakref.ref, int, str]] = {}
        self.held: Counter[int] = Counter()  # storage -> how many times autograd holds it
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()

    def add(self, kind: str, size: int) -> None:
        """Count ``size`` bytes more; what waits on the host is not the device's."""
        for name in (kind, "all") if kind != "host" else (kind,):
            self.now[name] += size
            self.peak[name] = max(self.peak[name], self.now[name])

    def follow(self, tensor: Tensor, kind: str | None = None) -> None:
        """Count a tensor's storage, or change its kind."""
        storage = tensor.untyped_storage()
        key = id(storage)  # torch keeps a storage's Python object as long as the storage
        if key in self.live:
            reference, size, old = self.live[key]
            if kind and kind != old:
                self.drop(old, size)
                self.live[key] = reference, size, kind
                self.add(kind, size)
        else:
            size = -(-storage.nbytes() // self.round_to) * self.round_to
            self.live[key] = weakref.ref(storage, partial(self.forget, key)), size, kind or "transient"
            self.add(kind or "transient", size)

    def forget(self, key: int, _: Any) -> None:
        """A storage has ended."""
        _, size, kind = self.live.pop(key)
        self.drop(kind, size)

    def drop(self, kind: str, size: int) -> None:
        """Count ``size`` bytes less."""
        for name in (kind, "all") if kind != "host" else (kind,):
            self.now[name] -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, follow its results; of an operator on quantised tensors those of which it consists."""
        if any(is_traceable_wrapper_subclass(leaf) for leaf in tree_leaves((args, kwargs))):
            return NotImplemented
        result = func(*args, **kwargs or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.follow(leaf)
        return result


class Held:
    """A tensor that autograd keeps for the backward pass; its end is the end of the keeping."""

    def __init__(self, tensor: Tensor, storages: Storages) -> None:
        self.tensor, self.storages, self.key = tensor, storages, id(tensor.untyped_storage())
        if self.key in storages.live and storages.live[self.key][2] in ("transient", "saved"):
            storages.follow(tensor, "saved")
            storages.held[self.key] += 1

    def __del__(self) -> None:
        held = self.storages.held
        if self.key in held:
            held[self.key] -= 1
            if not held[self.key]:
                del held[self.key]
                self.storages.follow(self.tensor, "transient")
