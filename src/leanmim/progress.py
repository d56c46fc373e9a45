"""Progress bars for people who watch a terminal; elsewhere nothing is drawn."""

import os
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

T = TypeVar("T")


def duration(seconds: float) -> str:
    """A time for people to read: ``45 s``, ``1.5 min``, ``12 min``, ``3.4 h``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    value, unit = (seconds / 60, "min") if seconds < 3600 else (seconds / 3600, "h")
    return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"


def time_left(seconds: float, done: int, left: int) -> str:
    """``left 12 min`` at the mean speed so far, or ``took 12 min`` at the end.

    Args:
        seconds: since the start.
        done: steps since the start, at least one.
        left: steps that are left.
    """
    return f"left {duration(seconds / done * left)}" if left else f"took {duration(seconds)}"


def progress_bar(console: Console, transient: bool, disable: bool = False) -> Progress:
    """A bar; each of its tasks has a field ``text``, shown at the end.

    Args:
        console: where it is drawn, if this is a terminal.
        transient: whether the bar is removed at its end.
        disable: draw nothing.
    """
    return Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=8), TextColumn("{task.percentage:.0f}%"),
        TextColumn("{task.fields[text]}"), console=console, disable=disable or not console.is_terminal,
        transient=transient,
    )  # fmt: skip


def track(items: Iterable[T], title: str, total: int, console: Console | None = None) -> Iterator[T]:
    """The same items, with a bar of the time left while they are worked on.

    Args:
        items: what to iterate over.
        title: of the bar.
        total: how many items there are.
        console: where the bar is drawn; None is the standard error, of the first process only.
    """
    others = console is None and int(os.environ.get("RANK", 0)) > 0
    with progress_bar(console or Console(stderr=True), transient=True, disable=others) as progress:
        task = progress.add_task(title, total=total, text="")
        start = time.perf_counter()
        for done, item in enumerate(items, 1):
            yield item
            progress.update(task, completed=done, text=time_left(time.perf_counter() - start, done, total - done))
