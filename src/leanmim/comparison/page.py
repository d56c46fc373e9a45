"""The page of a comparison: what follows, the table, accuracy against cost, the commands."""

from collections.abc import Sequence
from html import escape
from itertools import cycle
from statistics import median
from typing import Any

from leanmim.comparison.cells import Cell
from leanmim.comparison.commands import commands_of
from leanmim.comparison.plan import Entry
from leanmim.comparison.table import COSTS, NAMES, Row, Score, Table
from leanmim.config.compare import Measure
from leanmim.names import sides
from leanmim.page import document
from leanmim.page.accuracies import DASHES
from leanmim.page.charts import COLOURS, Curve, chart
from leanmim.page.html import NOT_YET, Html, row, soft, table
from leanmim.progress import duration

GREY = "#7a8594"
STYLES = ("dashed", "dotted")  # of baselines
SPREAD = (
    "After ±: the sample standard deviation over seeds. What is within the spread is nearer than that, or than the standard error that "
    "the choice of the validation images has, if that is more. In brackets, of one seed: Wilson's 95 % interval for this choice. Without "
    "a folder val, fine-tuning holds out other images for each seed. Fine-tuning takes the best epoch on these images, alike for all; from scratch there is no layer decay, and with "
    "few images a smaller learning rate."
)
MEMORY = "Memory: that of a training; measured on a GPU the allocator's peak, elsewhere what the process grew by."


def page_of(found: Table, entries: Sequence[Entry], cells: Sequence[Cell], facts: dict[str, Any]) -> str:
    """The page's HTML.

    Args:
        found: the table.
        entries: the recipes under the budget.
        cells: all cells.
        facts: of the machine.
    """
    colours = colours_of(found.rows)
    finished = sum(bool(cell.result) for cell in cells)
    note = found.title if finished == len(cells) else f"{found.title}. {finished} of {len(cells)} cells are finished."
    return document(
        "Comparison of recipes",
        {
            "In short": f"<p>{soft(note)}</p>{in_short(found.findings())}",
            "Accuracy": f"{table_of(found.accuracies(), colours)}<p>{soft(SPREAD)}</p>",
            "Cost of a training": f"{table_of(found.costs(), colours)}<p>{soft(MEMORY)}</p>",
            "Accuracy against cost": charts_of(found, colours),
            "Budget": f"{schedules(entries)}<p>{soft(basis(entries))}</p>",
            "Commands": commands(cells),
            "Environment": table(("setting", "value"), [row(key, [value]) for key, value in facts.items()], "long"),
        },
    )


def in_short(findings: Sequence[str]) -> Html:
    """What follows; whether pre-training helps stands out."""
    if not findings:
        return Html(f"<p>{NOT_YET}</p>")
    verdict, colon, rest = findings[0].partition(":")
    lines = [f"<strong>{escape(verdict + colon)}</strong>{escape(rest)}", *map(escape, findings[1:])]
    return Html("".join(f"<p>{line}</p>" for line in lines))


def colours_of(rows: Sequence[Row]) -> dict[str, str]:
    """A colour for each recipe, grey for what is not trained here."""
    colours = cycle(COLOURS)
    return {row.name: next(colours) if row.kind == "recipe" else GREY for row in rows}


def titled(name: str, colour: str) -> Html:
    """A name behind a dot of its colour."""
    return Html(f'<span class="dot" style="background:{colour}"></span>{escape(name)}')


def table_of(lines: Sequence[dict[str, str]], colours: dict[str, str]) -> Html:
    """A table, recipes and baselines."""
    rows = [row(titled(name, colours[name]), cells) for name, *cells in (line.values() for line in lines)]
    return table(lines[0], rows, "short")


def charts_of(found: Table, colours: dict[str, str]) -> Html:
    """Of every measure accuracy against time, FLOPs and memory: recipes as points with their spread, what is not trained as
    lines. Given weights may be far above, and are left to the table.
    """
    trained = [row for row in found.rows if row.seconds is not None and row.scores]
    others = [row for row in found.rows if row.kind in ("untrained", "pixels") and row.scores]
    if not trained:
        return Html(f"<p>{NOT_YET}</p>")
    styles = dict(zip((row.name for row in others), cycle(STYLES), strict=False))
    panels = []
    for measure in found.measures:
        for cost, (what, unit, factor) in COSTS.items():
            points = [(row, getattr(row, cost) * factor) for row in trained if measure in row.scores]
            last = 1.05 * max((x for _, x in points), default=1.0)  # no point on the frame
            curves = [
                level(row, row.scores[measure], last, DASHES[styles[row.name]])
                for row in others
                if measure in row.scores
            ]
            curves += [point(row, measure, x, colours[row.name]) for row, x in points]
            panels.append(chart(f"{NAMES[measure]} (%) against {what}", curves, False, "not yet", f"{what} ({unit})"))
    legend = "".join(f"<span>{titled(row.name, colours[row.name])}</span>" for row in trained)
    legend += "".join(
        f'<span><span class="key" style="border-top: 3px {style} {GREY}"></span>{escape(name)}</span>'
        for name, style in styles.items()
    )
    return Html(
        f'<div class="legend">{legend}</div><figure class="card"><div class="grid three">{"".join(panels)}</div></figure>'
    )


def point(row: Row, measure: Measure, x: float, colour: str) -> Curve:
    """A recipe."""
    score = row.scores[measure]
    return Curve(
        [(x, 100 * score.value)], colour, f"{row.name}: {score} %", intervals=[(x, 100 * score.low, 100 * score.high)]
    )


def level(row: Row, score: Score, last: float, dash: str) -> Curve:
    """A baseline, as a line up to the highest cost."""
    y = 100 * score.value
    return Curve([(0.0, y), (last, y)], GREY, f"{row.name}: {score} %", dash=dash)


def schedules(entries: Sequence[Entry]) -> Html:
    """What each recipe does with the budget."""
    head = ("recipe", "px", "epochs", "images an epoch", "TFLOP", "images/s, measured beforehand", "predicted time")
    rows = []
    for entry in entries:
        epochs = float(entry.config.epochs)
        flops = f"{epochs * entry.epoch['flops'] / 1e12:,.4g}"
        cells = [sides(entry.config.input_size), f"{epochs:g}", f"{entry.images:,}", flops]
        if entry.speeds:
            cells.append(f"{median(entry.speeds):,.1f} ({min(entry.speeds):,.1f} to {max(entry.speeds):,.1f})")
            cells.append(duration(epochs * entry.epoch["seconds"]))
        rows.append(row(entry.title, cells))
    return table(head if entries[0].speeds else head[:5], rows, "short")


def basis(entries: Sequence[Entry]) -> str:
    """Where the epochs come from."""
    same = "All seeds train for the same epochs, the last of them in part; images that fill no batch are left out."
    if not entries[0].speeds:
        return same
    return (
        "The speed was measured once, before the first training: by as many processes as train side by side, each in turns "
        f"through all recipes; the median counts. {same}"
    )


def commands(cells: Sequence[Cell]) -> Html:
    """What every cell did, as commands."""
    rows = [
        row(f"{cell.name}, seed {cell.seed}", ["done" if cell.result else NOT_YET, lines_of(cell)]) for cell in cells
    ]
    return Html(
        f"<details><summary>{len(cells)} cells</summary>\n{table(('cell', 'state', 'commands'), rows, 'long')}</details>"
    )


def lines_of(cell: Cell) -> Html:
    """A cell's commands, one below the other."""
    return Html("<br>".join(f"<code>{escape(line)}</code>" for line in commands_of(cell)))
