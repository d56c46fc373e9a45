"""The commands from Python: of a configuration, of its fields by name, or of both."""

from collections.abc import Callable
from functools import wraps
from typing import Any, Protocol, TypeVar, runtime_checkable

Configuration = TypeVar("Configuration")
Result = TypeVar("Result")
Given = TypeVar("Given", contravariant=True)
Returned = TypeVar("Returned", covariant=True)


@runtime_checkable
class Command(Protocol[Given, Returned]):
    """A function of a configuration, of its fields by name, or of both."""

    def __call__(self, config: Given = ..., /, **fields: Any) -> Returned:
        """Run the command of the configuration with these fields changed, or of the fields alone."""


def by_name(function: Callable[[Configuration], Result]) -> Command[Configuration, Result]:
    """Let the function of a configuration take its fields by name too: ``knn(run="run", data="labelled")``."""
    kind: Any = function.__annotations__["config"]

    @wraps(function)
    def command(config: Any = None, /, **fields: Any) -> Any:
        from leanmim.notebook import displayed  # not at the top: `import leanmim` is quick

        return displayed(function(kind.of(config, **fields)))

    vars(command).pop("__wrapped__")  # its signature is not that of the function
    command.__doc__ = (
        f"{function.__doc__}\n    Fields of the configuration, a leanmim.{kind.__name__}, may be given by name: in its place, "
        "or to change it.\n    "
    )
    return command
