"""What fine-tuned classifiers get right and wrong."""

from collections.abc import Sequence
from typing import Any

from leanmim.names import sides
from leanmim.page.accuracies import INTERVAL, percent
from leanmim.page.html import NOT_YET, Html, Row, bar, picture, row, soft, table
from leanmim.page.load import Finetuned, Loaded, finetuned

WORST = 15  # classes that are shown at once


def results(runs: Sequence[Loaded]) -> Html:
    """The accuracies of fine-tuned runs in one table; then of each run its classes, confusion matrix and mistakes."""
    own = finetuned(runs)
    if not own:
        return Html("")
    head = ("run", "top-1 (%)", "top-5 (%)", "mean of classes (%)", "px", "images", "classes", "weights", "data")
    rows = [row(run.title, overall(run) if run.results else [NOT_YET] * (len(head) - 1)) for run in own]
    parts = [table(head, rows, "short notes"), *map(remarks, own)]
    if any(run.results for run in own):
        parts.append(Html(f"<p>{soft(INTERVAL)}</p>"))
    return Html("\n".join([*parts, *(details(run) for run in own if run.results)]))


def overall(run: Finetuned) -> list[Any]:
    """The cells of a run, from its results.json."""
    found = run.results
    top5 = {"value": found["top5"], "interval": found["top5_interval"]}
    return [
        percent({"value": found["top1"], "interval": found["top1_interval"]}),
        "-" if found["top5"] is None else percent(top5),
        f"{100 * found['mean_per_class']:.1f}",
        sides(run.config.input_size) or "-",
        f"{found['images']:,}",
        len(found["classes"]),
        f"{found['weights']}, epoch {found['epoch']:.4g}",
        f"{found['data']}, {found['split']}",
    ]


def remarks(run: Finetuned) -> Html:
    """Where a run's weights come from, and how its images were chosen."""
    origin = run.environment.get("origin", run.config.start)
    return Html(f"<p>{run.title}: {soft('; '.join([f'start: {origin}', *run.labels.get('notes', [])]))}</p>")


def details(run: Finetuned) -> Html:
    """A run's classes, confusion matrix and worst mistakes."""
    confusion, mistakes = (
        f'<figure class="card"><figcaption>{caption}</figcaption>\n{picture(png, caption)}</figure>' if png else ""
        for caption, png in (
            ("Confusion matrix", run.confusion),
            ("Wrong predictions of highest probability", run.mistakes),
        )
    )
    table_of_classes = f"<div>{classes(run.results, run.colour)}</div>"
    return Html(f'<h3>{run.title}</h3>\n<div class="grid">{table_of_classes}{confusion}</div>\n{mistakes}')


def classes(found: dict[str, Any], colour: str) -> Html:
    """A table of the classes, the worst first; where there are many, the others can be opened."""
    head = ("class", "right (%)", "images", "most often taken for")
    order = sorted(range(len(found["classes"])), key=lambda i: (found["per_class"][i] is None, found["per_class"][i]))
    rows = [class_row(found, i, colour) for i in order]
    first = table(head, rows[:WORST], "classes")
    if len(rows) <= WORST:
        return first
    rest = table(head, rows[WORST:], "classes")
    return Html(f"{first}\n<details><summary>The other {len(rows) - WORST} classes</summary>\n{rest}</details>")


def class_row(found: dict[str, Any], i: int, colour: str) -> Row:
    """A class: its accuracy as number and bar, its images, the class that most of them were wrongly taken for."""
    share, count = found["per_class"][i], found["counts"][i]
    if not count:
        return row(found["classes"][i], ["-", 0, "-"])
    right = Html(f"{bar(share, colour)}{100 * share:.1f}")
    wrong = {j: taken for j, taken in enumerate(found["confusion"][i]) if taken and j != i}
    most = max(wrong, key=lambda j: wrong[j], default=None)
    return row(
        found["classes"][i], [right, count, "-" if most is None else f"{found['classes'][most]} ({wrong[most]})"]
    )
