"""What a shell completes: commands, recipes, options, and the values of options that have few."""

from collections.abc import Mapping, Sequence
from dataclasses import make_dataclass
from functools import reduce
from operator import or_
from typing import Annotated, Any

import tyro

from leanmim.errors import UserError


def print_completion(shells: Sequence[str], commands: Mapping[str, Any]) -> None:
    """Print the completion script of a shell for all commands of the table `leanmim.cli.COMMANDS`, then exit.

    Raises:
        UserError: not one shell is given, or another than bash and zsh.
    """
    if len(shells) != 1 or shells[0] not in ("bash", "zsh"):
        raise UserError("--print-completion takes the name of a shell: bash or zsh")
    kinds = {}
    for name, command in commands.items():
        kinds[name] = command.config
        if command.recipes:
            recipes = one_of({recipe: command.config for recipe in command.recipes})
            kinds[name] = make_dataclass(name, [("recipe", recipes)])
    options = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    tyro.cli(one_of(kinds), args=["--tyro-print-completion", *shells], prog="leanmim", config=options)


def one_of(kinds: Mapping[str, Any]) -> Any:
    """The type of a choice among configurations, each behind its name as a subcommand."""
    return reduce(or_, (Annotated[kind, tyro.conf.subcommand(name)] for name, kind in kinds.items()))
