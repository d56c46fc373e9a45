"""Help for Python: the docstrings of a configuration's fields, as a section of the class's own docstring."""

import inspect
import textwrap
from dataclasses import fields
from functools import cache
from typing import Any

from docstring_parser import parse_from_object


def explain(*kinds: Any) -> None:
    """Give configurations docstrings that explain their fields too."""
    for kind in kinds:
        kind.__doc__ = Explained(kind.__doc__)


class Explained:
    """The docstring of a class, made when it is first read: to read the sources takes too long for an import.

    Args:
        own: what the class says of itself. Where there are no sources, it is all there is.
    """

    def __init__(self, own: str | None) -> None:
        self.own = own

    def __get__(self, instance: Any, kind: Any) -> str | None:
        kind.__doc__ = self.own  # the parser reads it too
        if found := field_docstrings(kind):
            wrapper = textwrap.TextWrapper(
                100, initial_indent="    ", subsequent_indent=" " * 8, break_on_hyphens=False
            )
            lines = [wrapper.fill(f"{name}: {text}") for name, text in found.items()]
            kind.__doc__ = "\n".join([inspect.cleandoc(self.own or ""), "", "Attributes:", *lines, ""])
        return kind.__doc__


@cache
def field_docstrings(kind: type[Any]) -> dict[str, str]:
    """What the sources of a dataclass and its bases say of its fields, each on one line; empty without sources. Read once."""
    bases = [base for base in reversed(kind.__mro__) if base is not object]
    try:
        found = {doc.arg_name: doc.description or "" for base in bases for doc in parse_from_object(base).params}
    except (OSError, TypeError):  # what inspect.getsource raises
        return {}
    return {own.name: " ".join(found[own.name].split()) for own in fields(kind) if own.name in found}
