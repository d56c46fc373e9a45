"""Values of fields, as their declared types have them: from Python a scalar may stand for a tuple, a path for a string."""

import os
from collections.abc import Mapping
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

WORDS = {int: "a whole number", float: "a number", str: "a string", bool: "True or False", NoneType: "None"}


def fitted(value: Any, kind: Any) -> Any:
    """The value as a declared type has it.

    Lists become tuples, a scalar a tuple of one where the type allows no scalar, paths strings, whole numbers floats.
    What a dictionary holds is left as it is.

    Raises:
        TypeError: the value is not of this type.
    """
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if origin is Annotated:
        return fitted(value, arguments[0])
    if origin in (Union, UnionType):
        for possible in arguments:
            try:
                return fitted(value, possible)
            except (TypeError, OverflowError):
                continue
    elif origin is tuple:
        items = tuple(value) if isinstance(value, list | tuple) else (value,)
        kinds = arguments[:1] * len(items) if arguments[-1] is ... else arguments
        if len(items) == len(kinds):
            return tuple(map(fitted, items, kinds))
    elif origin is Literal:
        if any(type(value) is type(possible) and value == possible for possible in arguments):
            return value
    elif origin is dict:
        if isinstance(value, Mapping):
            return dict(value)
    elif origin is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    elif origin in (int, float):
        if isinstance(value, Integral if origin is int else Real) and not isinstance(value, bool):
            return origin(value)
    elif isinstance(value, origin):
        return value
    raise TypeError(f"{value!r} is not {described(kind)}")


def described(kind: Any) -> str:
    """A declared type, for people to read."""
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if origin is Annotated:
        return described(arguments[0])
    if origin in (Union, UnionType):
        return " or ".join(described(own) for own in arguments if own is not int or float not in arguments)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is tuple:
        return f"({', '.join('...' if item is ... else described(item) for item in arguments)})"
    return WORDS.get(origin, f"a {origin.__name__}")
