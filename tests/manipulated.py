"""A checkpoint as a stranger, or a fault, may have left it: something missing, of another type or size, not finite, renamed."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

WRONGS: list[Any] = [None, True, -1, 10**30, 1e300, float("nan"), "word", [], [None], {}, {"a": 1}, torch.zeros(2, 3)]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to every value inside another, whatever is around it."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, part in inside:
        yield (*path, key)
        yield from places(part, (*path, key))


def at(state: Any, path: tuple[Any, ...]) -> Any:
    """The value there."""
    for key in path:
        state = state[key]
    return state


def changed(state: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A copy with another value there."""
    state = copy.deepcopy(state)
    at(state, path[:-1])[path[-1]] = value
    return state


def without(state: dict[str, Any], path: tuple[Any, ...], name: Any = None) -> dict[str, Any]:
    """A copy without the value there, or with another name for it."""
    state = copy.deepcopy(state)
    value = at(state, path[:-1]).pop(path[-1])
    if name is not None:
        at(state, path[:-1])[name] = value
    return state


def of_tensor(value: Tensor) -> Iterator[tuple[str, Any]]:
    """Other tensors in place of one."""
    yield "one more", torch.cat([value.flatten(), value.new_zeros(1)])
    yield "of another shape", value.new_zeros(3, 5, 7)
    yield "empty", value.new_zeros(0)
    yield "vast, of one number", value.new_zeros(1).expand(2**40)
    yield "complex", value.to(torch.complex64)
    yield "sparse", value.to_sparse()
    yield "without memory", value.to("meta")
    if value.is_floating_point():
        for number in ("nan", "inf", "-inf"):
            wrong = value.clone()
            wrong.view(-1)[-1:] = float(number)
            yield number, wrong


Made = Callable[[], dict[str, Any]]


def manipulated(state: dict[str, Any]) -> Iterator[tuple[str, Made]]:
    """Checkpoints that differ from a good one in one place, with a name for each; at every field, alike for alike.

    Args:
        state: what `leanmim.run.load` returns; it stays as it is.
    """
    for path in places(state):
        if path[0] in ("model", "average") and len(path) > 1 and path[1] not in list(state[path[0]])[:2]:
            continue  # the first weights stand for all
        if any(isinstance(key, int) and key > 0 for key in path):
            continue  # as do the first of a list, and the moments of the first parameter
        name, value = ".".join(map(str, path)), at(state, path)
        if isinstance(at(state, path[:-1]), tuple):
            continue
        yield f"{name}: away", partial(without, state, path)
        if isinstance(path[-1], str):
            yield f"{name}: renamed", partial(without, state, path, f"{path[-1]}s")
        if isinstance(value, Tensor):
            for what, other in of_tensor(value):
                yield f"{name}: {what}", partial(changed, state, path, other)
        if isinstance(value, list) and value:
            yield f"{name}: one less", partial(changed, state, path, value[:-1])
            yield f"{name}: one more", partial(changed, state, path, [*value, value[-1]])
        for i, wrong in enumerate(WRONGS):
            yield f"{name}: {type(wrong).__name__} {i}", partial(changed, state, path, wrong)
    yield "format: newer", partial(changed, state, ("format",), "leanmim-3")
    yield "format: foreign", partial(changed, state, ("format",), "other")
