"""The words of a command become its configuration. On its help page the options stand in groups; in Python the fields stay flat."""

import re
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import MISSING, field, fields, make_dataclass
from functools import partial
from io import StringIO
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro
from docstring_parser import parse

from leanmim.config import Config
from leanmim.config.explained import field_docstrings
from leanmim.config.groups import COMMON, groups

Kind = TypeVar("Kind", bound=Config)


def parse_arguments(
    kind: type[Kind],
    words: Sequence[str],
    prog: str,
    about: str | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Kind:
    """The configuration that a command line gives. Exit with a message for a wrong word, or with the help page.

    tyro shows the fields of a nested dataclass as a group. So it gets the fields in one dataclass for each group, inside one of the
    common fields, and what it finds is made flat again.

    Args:
        kind: of configuration.
        words: behind the command.
        prog: the command, as messages cite it.
        about: what the command does; None takes it from the configuration's docstring.
        defaults: values by field, in place of the field's own default.
    """
    known = arguments(kind, defaults or {})
    parts = {
        group: make_dataclass(group, [known[name] for name in names], kw_only=True)
        for group, names in groups(kind).items()
    }
    common = parts.pop(COMMON)
    nested = {f"group_{i}": group for i, group in enumerate(parts)}  # a field may have the name of a group
    whole = make_dataclass(
        kind.__name__,
        [(key, Annotated[parts[group], tyro.conf.arg(name=group, help="")]) for key, group in nested.items()],
        bases=(common,),
        kw_only=True,
    )
    if about is None:
        about = parse(kind.__doc__ or "").description or ""
    page = Page()
    try:
        with redirect_stdout(page):
            found = dict(
                vars(tyro.cli(whole, args=words, prog=prog, description=about, config=(tyro.conf.OmitArgPrefixes,)))
            )
    finally:
        page.show()
    for key in nested:
        found |= vars(found.pop(key))
    return kind(**found)


def arguments(kind: type[Config], defaults: Mapping[str, Any]) -> dict[str, tuple[str, Any, Any]]:
    """The fields of a configuration, by name, as `make_dataclass` takes them, explained by their docstrings."""
    hints, texts = get_type_hints(kind, include_extras=True), field_docstrings(kind)  # type: ignore[arg-type]  # mypy asks for the hash of an instance
    found = {}
    for own in fields(kind):
        name, metavar = own.name, None
        if tyro.conf.Positional in getattr(hints[name], "__metadata__", ()):
            metavar = name.upper() if own.default is MISSING else f"[{name.upper()}]"
        shown = tyro.conf.arg(help=texts.get(name), metavar=metavar)
        default = field(default=own.default, default_factory=own.default_factory)
        if name in defaults:
            default = field(default_factory=partial(defaults.get, name))
        found[name] = (name, Annotated[hints[name], shown], default)
    return found


class Page(StringIO):
    """Holds back what is printed, as tyro wraps neither usage nor description; it passes for the standard output meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.output = sys.stdout

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Decides over the characters that frame a group."""
        return self.output.encoding

    def isatty(self) -> bool:
        """Decides over colours."""
        return self.output.isatty()

    def show(self) -> None:
        """Print it, no line wider than the terminal."""
        width = shutil.get_terminal_size().columns
        for line in self.getvalue().splitlines():
            plain = re.sub(r"\x1b\[[\d;]*m", "", line)  # without colours
            print(line if len(plain) <= width else textwrap.fill(plain, width))
