"""Progress bars for people who watch a terminal or a notebook; elsewhere nothing is drawn."""

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from html import escape
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

T = TypeVar("T")
PAUSE = 0.2  # s between two drawings of a bar in a notebook


def in_notebook() -> bool:
    """Whether a cell of a Jupyter notebook runs this."""
    return Console().is_jupyter


def console_of(stderr: bool = False, quiet: bool = False) -> Console:
    """Where lines and bars go, as they are: the standard output or error; in a notebook, which paints errors red, the former."""
    return Console(
        stderr=stderr and not in_notebook(),
        quiet=quiet,
        highlight=False,
        soft_wrap=True,
        markup=False,
        force_jupyter=False,
    )


def watched(console: Console) -> bool:
    """Whether somebody sees a bar move there."""
    return console.is_terminal or in_notebook()


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
        console: where it is drawn, if this is a terminal; in a notebook below the cell.
        transient: whether the bar is removed at its end.
        disable: draw nothing.
    """
    if in_notebook() and not disable:
        return CellBar(transient)
    return Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=8), TextColumn("{task.percentage:.0f}%"),
        TextColumn("{task.fields[text]}"), console=console, disable=disable or not console.is_terminal,
        transient=transient,
    )  # fmt: skip


class CellBar(Progress):
    """A bar of one task below a notebook's cell, drawn anew in its place; rich's own would want ipywidgets.

    Args:
        transient: whether nothing is left of it at its end.
    """

    def __init__(self, transient: bool) -> None:
        super().__init__(disable=True)  # rich draws nothing
        self.transient, self.drawn, self.place = transient, time.monotonic(), None

    def update(self, task_id: TaskID, *args: Any, **fields: Any) -> None:
        """Change the task; draw if some time has passed."""
        super().update(task_id, *args, **fields)
        if time.monotonic() - self.drawn > PAUSE:
            self.draw()

    def stop(self) -> None:
        """Draw the end, or nothing."""
        super().stop()
        if self.place or not self.transient:
            self.draw(ended=True)

    def draw(self, ended: bool = False) -> None:
        """Draw the bar, or in place of a transient one that has ended nothing."""
        from IPython.display import HTML, display  # a notebook has it

        html = ""
        for task in self.tasks if not (ended and self.transient) else []:
            title = escape(Text.from_markup(task.description).plain)
            value = "" if task.total is None else f' value="{task.percentage / 100:.3f}"'
            html = f"<div>{title} <progress{value}></progress> {escape(task.fields['text'])}</div>"
        if self.place is None:
            self.place = display(HTML(html), display_id=True)
        else:
            self.place.update(HTML(html))
        self.drawn = time.monotonic()


@contextmanager
def working(title: str) -> Iterator[None]:
    """Say what is done as long as it takes, on the standard error."""
    if not in_notebook():
        with Console(stderr=True).status(title):
            yield
        return
    with CellBar(transient=True) as bar:
        bar.add_task(title, total=None, text="")
        bar.draw()
        yield


def track(items: Iterable[T], title: str, total: int, console: Console | None = None) -> Iterator[T]:
    """The same items, with a bar of the time left while they are worked on.

    Args:
        items: what to iterate over.
        title: of the bar.
        total: how many items there are.
        console: where the bar is drawn; None is the standard error, of the first process only.
    """
    others = console is None and int(os.environ.get("RANK", 0)) > 0
    with progress_bar(console or console_of(stderr=True), transient=True, disable=others) as progress:
        task = progress.add_task(title, total=total, text="")
        start = time.perf_counter()
        for done, item in enumerate(items, 1):
            yield item
            progress.update(task, completed=done, text=time_left(time.perf_counter() - start, done, total - done))
