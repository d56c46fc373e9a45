"""Tables that are computed once, and the list of them all."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import _lru_cache_wrapper, lru_cache
from typing import Any, ParamSpec, TypeVar, cast

P = ParamSpec("P")
T = TypeVar("T")
CACHED: "list[_lru_cache_wrapper[Any]]" = []


def cached(function: Callable[P, T]) -> Callable[P, T]:
    """Keep the function's last 32 results. `empty_caches` knows it from then on."""
    wrapper = lru_cache(maxsize=32)(function)
    CACHED.append(wrapper)
    return cast(Callable[P, T], wrapper)


@contextmanager
def empty_caches() -> Iterator[None]:
    """Inside, the caches of all `cached` functions begin empty; what they get there is forgotten at the end.

    Fake tensors need this: a cached table must be neither real among fake tensors nor fake among real ones.
    """
    try:
        for function in CACHED:
            function.cache_clear()
        yield
    finally:
        for function in CACHED:
            function.cache_clear()
