"""What a notebook shows of what the commands return. Everywhere else the values are what they were."""

import csv
from collections.abc import Callable, Iterator, Sequence
from html import escape
from importlib.resources import files
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from leanmim.data.read import UNREADABLE
from leanmim.evaluators.accuracy import Accuracy
from leanmim.page.accuracies import depths
from leanmim.page.charts import COLOURS, chart
from leanmim.page.html import Html, bar, picture, png, row, soft, table
from leanmim.page.load import Finetuned, Loaded, load
from leanmim.page.training import FINETUNE_CHARTS, PRETRAIN_CHARTS, lines_of, summary_of
from leanmim.progress import in_notebook
from leanmim.run import Run

ROWS, COLUMNS = 6, 5  # of a table of predictions: image, and twice class and probability
THUMB, WIDTH = 72, 840  # px, of a small image and of a picture
WHERE = {  # what a run leaves, in the order in which one looks
    "export/timm": "the model, for timm",
    "report.html": "report",
    "reconstructions.png": "reconstructions",
    "predictions.csv": "predictions of the validation images",
    "confusion.png": "which classes are taken for which",
    "mistakes.png": "the surest mistakes",
}


def displayed(result: Any) -> Any:
    """The same value, which a notebook shows well."""
    if isinstance(result, Path):
        return Place(result)
    return Pairs(result) if isinstance(result, Iterator) else result


def framed(*parts: str) -> str:
    """HTML for a notebook: its text has the colours of the notebook, light or dark."""
    style = files("leanmim.page").joinpath("notebook.css").read_text(encoding="utf-8")
    # a blank line would end the HTML where Markdown is around it
    return f'<div class="leanmim"><style>{style}</style>{"".join(parts)}</div>'.replace("\n\n", "\n")


class Text(str):
    """Text that a notebook shows in another form.

    Args:
        text: as it is printed.
        html: makes what a notebook shows.
    """

    html: Callable[[], str]

    def __new__(cls, text: str, html: Callable[[], str]) -> "Text":
        """A string with one thing more."""
        self = super().__new__(cls, text)
        self.html = html
        return self

    def _repr_html_(self) -> str:
        return self.html()


class Pairs(Iterator[tuple[str, Any]]):
    """Names and what was found of each, found one after the other when they are asked for; in a notebook at once.

    A loop over them begins with the first, however often.

    Args:
        pairs: what finds them.
    """

    def __init__(self, pairs: Iterator[tuple[str, Any]]) -> None:
        self.coming, self.found = pairs, list[tuple[str, Any]]()
        if in_notebook():  # the cell fails where a command fails, not the one that looks
            self.found += pairs

    def __next__(self) -> tuple[str, Any]:
        self.found.append(next(self.coming))
        return self.found[-1]

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for place in count():
            if place == len(self.found) and next(self, None) is None:
                return
            yield self.found[place]

    def __repr__(self) -> str:
        return "\n".join(f"{name}: {value}" for name, value in self.found)

    def _repr_html_(self) -> str:
        return framed(pairs_table(list(self)))


def pairs_table(pairs: Sequence[tuple[str, Any]]) -> Html:
    """Accuracies with their intervals, or other pairs as they are printed."""
    if not all(isinstance(value, Accuracy) for _, value in pairs):
        return table(("recipe", "plan"), [row(name, [lines(str(value))]) for name, value in pairs])
    rows = []
    for (name, value), colour in zip(pairs, (COLOURS[0], *["#7a8594"] * len(pairs)), strict=False):
        low, high = (100 * end for end in value.interval)
        accuracy = Html(f"{bar(value, colour)}{100 * value:.1f} %")
        rows.append(row(name, [accuracy, f"{low:.1f} to {high:.1f} %", f"{value.images:,}"]))
    return table(("encoder", "accuracy", "95 % interval", "images"), rows)


def lines(text: str) -> Html:
    """Lines below each other; one that is a command stands out."""
    own = (escape(line.strip()) for line in text.splitlines())
    return Html("<br>".join(f"<code>{line}</code>" if line.startswith("leanmim ") else line for line in own))


if TYPE_CHECKING:
    Base = Path
else:
    Base = type(Path())  # before Python 3.12 Path itself has no separators, which its subclasses want


class Place(Base):
    """A path; a notebook shows what lies there, if it is a run, a picture or a table."""

    def _repr_html_(self) -> str | None:
        if Run(self).metrics.is_file():
            return framed(*run_of(load(self, self.name, COLOURS[0])))
        html = SHOWN[self.suffix](self) if self.suffix in SHOWN and self.is_file() else ""
        return framed(html) if html else None


def run_of(run: Loaded) -> Iterator[str]:
    """A run: in one line, in charts, where its files are."""
    folder = run.folder
    yield f"<p><b>{escape(str(folder))}</b> {soft(summary_of(run))}</p>"
    charts = FINETUNE_CHARTS[:3] if isinstance(run, Finetuned) else PRETRAIN_CHARTS[:2]
    drawn = [(title, lines_of([run], key, factor), zero) for key, title, factor, zero in charts]
    yield '<div class="charts">'
    yield from (chart(title, curves, zero, "") for title, curves, zero in drawn if curves)
    yield "</div>"
    yield image_of(folder / "reconstructions.png")
    yield depths([run])
    there = [(what, folder / name) for name, what in WHERE.items() if (folder / name).exists()]
    yield table(("what", "where"), [row(what, [Html(f"<code>{escape(str(path))}</code>")]) for what, path in there])


def image_of(path: Path, side: int = WIDTH) -> Html:
    """A picture at the size at which it is shown, so that notebooks stay small; nothing of what is none, or is gone."""
    try:
        with Image.open(path) as image:
            own = image.convert("RGB")
    except UNREADABLE:
        return Html("")
    own.thumbnail((side, 4 * side))
    return picture(png(own), path.name)


def rows_of(path: Path) -> Html:
    """The first rows of a table of predictions, with their images."""
    with open(path, encoding="utf-8", errors="backslashreplace", newline="") as file:
        lines = csv.reader(file)
        head, first_rows, others = next(lines, []), list(islice(lines, ROWS)), sum(1 for _ in lines)
    shown = [
        row(Html(f"{image_of(Path(first), THUMB)}{escape(first)}"), map(number, rest))
        for first, *rest in (cells[:COLUMNS] for cells in first_rows)
    ]
    more = f"and {others:,} more" if others else "all"
    return Html(f"{table(head[:COLUMNS], shown)}<p>{soft(f'{more} in {path}')}</p>")


def number(cell: str) -> str:
    """A number with three decimals; other text as it is."""
    try:
        return f"{float(cell):.3f}"
    except ValueError:
        return cell


SHOWN: dict[str, Callable[[Path], Html]] = {".png": image_of, ".csv": rows_of}
