"""Options that are changed when a training is continued before its end: against its divergence (`Config.ADJUSTABLE`)."""

from collections.abc import Iterator
from typing import Any

from leanmim.config import Config
from leanmim.errors import UserError
from leanmim.run import Run


def check_adjusted(config: Config, run: Run, start: int, steps: int) -> list[dict[str, Any]]:
    """The options that differ from those of the run folder: option, before, now.

    Args:
        config: of the command, its numbers resolved.
        run: that is continued; nothing is written yet.
        start: steps that are done; before the first one nothing is continued.
        steps: of the whole run.

    Raises:
        UserError: the run is finished.
    """
    adjusted = config.adjusted(run.stored()) if start else []
    if adjusted and start >= steps:
        lines = (f"{one['option']}: {one['before']!r} there, {one['now']!r} now" for one in adjusted)
        raise UserError(
            "\n  ".join([f"--out {str(run.folder)!r} holds a finished run of another configuration:", *lines])
            + "\nChoose another --out, give the same options, or --overwrite to start afresh"
        )
    return adjusted


def note_adjusted(run: Run, adjusted: list[dict[str, Any]], start: int) -> None:
    """Write them down, before the configuration of the run folder becomes the command's."""
    for one in adjusted:
        run.note_change(start, **one)


def told(adjusted: list[dict[str, Any]], start: int) -> Iterator[str]:
    """What is said of them before the first step."""
    if adjusted:
        yield f"from step {start} on: " + ", ".join(
            f"{one['option']} {shown(one['now'])} instead of {shown(one['before'])}" for one in adjusted
        )


def shown(value: Any) -> str:
    """A value as it follows its option."""
    if isinstance(value, list):
        return " ".join(map(shown, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
