"""What a comparison found: a row for each recipe and baseline, and what follows from them."""

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from leanmim.comparison.cells import Cell, Kind
from leanmim.config.compare import Measure
from leanmim.progress import duration

NAMES: dict[Measure, str] = {
    "finetune": "fine-tuned", "attentive": "attentive probe", "linear": "linear probe", "knn": "kNN",
}  # fmt: skip
COSTS: dict[str, tuple[str, str, float]] = {  # field of a row -> what it is, unit, factor to the unit
    "seconds": ("training time", "min", 1 / 60),
    "flops": ("training FLOPs", "TFLOP", 1e-12),
    "memory_bytes": ("predicted peak memory", "MiB", 2**-20),
}
ALIKE = 1.02  # costs that differ by less are the same: two trainings of one recipe take times that differ so much


@dataclass(frozen=True)
class Score:
    """Accuracy over the seeds, 0 to 1; and the spread, within which another one is no better or worse."""

    value: float
    """Mean."""
    low: float
    """Mean less the spread; of one seed the lower end of Wilson's 95 % interval."""
    high: float
    values: tuple[float, ...]
    images: int
    """That were classified."""

    def __str__(self) -> str:
        """In per cent, with the standard deviation over the seeds; of one seed its interval."""
        value, low, high = (100 * number for number in (self.value, self.low, self.high))
        if len(self.values) > 1:
            return f"{value:.1f} ± {100 * stdev(self.values):.1f}"
        return f"{value:.1f} ({low:.1f} to {high:.1f})"


def score_of(found: Sequence[dict[str, Any]]) -> Score:
    """The accuracies of the seeds together.

    The spread is the sample standard deviation over the seeds, and no less than the standard error that the choice of so many
    validation images has: two or three seeds may agree by chance.
    """
    values = tuple(accuracy["value"] for accuracy in found)
    images = found[0]["images"]
    if len(values) == 1:
        low, high = found[0]["interval"]
        return Score(values[0], low, high, values, images)
    mean = fmean(values)
    spread = max(stdev(values), math.sqrt(mean * (1 - mean) / images))
    return Score(mean, mean - spread, mean + spread, values, images)


@dataclass(frozen=True)
class Row:
    """A recipe or a baseline, over its finished seeds."""

    kind: Kind
    name: str
    seeds: int
    scores: dict[Measure, Score]
    epochs: int | float | None = None
    seconds: float | None = None
    """Of a training, on average; as all costs None of what is not trained."""
    flops: float | None = None
    """Of a whole training."""
    memory_bytes: float | None = None
    """Predicted peak memory."""
    measured_bytes: float | None = None
    images_per_second: float | None = None
    screened: Score | None = None
    """With --screen: the accuracy after a tenth of the budget."""
    dropped: bool = False
    """Whether the recipe went no further."""
    screened_seconds: float | None = None
    """Of the training that led there."""
    architecture: str = ""
    """Of a recipe and of its untrained twin: the model and what was changed in it."""
    init: str | None = None
    """The weights that a recipe begins with."""


def rows_of(cells: Iterable[Cell], screening: Sequence[Cell] = (), kept: Sequence[str] = ()) -> list[Row]:
    """The rows of the table.

    Args:
        cells: of the whole budget, finished or not.
        screening: the cells of a tenth of it.
        kept: names of the recipes that went further.
    """
    groups: dict[tuple[Kind, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.kind, cell.name), []).append(cell)
    screened = {cell.name: screened_of(cell) for cell in screening if cell.result}
    rows = []
    for (kind, name), own in groups.items():
        rows += [row_of(own, screened.get(name, {}) if kind == "recipe" else {}), *depths_of(own)]
    return rows + [
        Row("recipe", name, 0, {}, **found, dropped=True) for name, found in screened.items() if name not in kept
    ]


def screened_of(cell: Cell) -> dict[str, Any]:
    """What a row says of a tenth of the budget."""
    (score,) = scores_of([cell.result]).values()
    return {"screened": score, "screened_seconds": cell.result["training"]["seconds"]}


def row_of(cells: Sequence[Cell], screened: dict[str, Any]) -> Row:
    """The cells of one name."""
    results = [cell.result for cell in cells if cell.result]
    trainings = [result["training"] for result in results if "training" in result]
    costs: dict[str, Any] = {}
    if trainings:
        average = {key: fmean(training[key] for training in trainings) for key in trainings[0]}
        costs = {
            "epochs": trainings[0]["epochs"],
            "seconds": average["seconds"],
            "flops": average["flops_per_image"] * average["images"],
            "memory_bytes": average["predicted_bytes"],
            "measured_bytes": average["measured_bytes"],
            "images_per_second": average["images"] / average["seconds"],
        }
    first = cells[0]
    return Row(
        first.kind, first.name, len(results), scores_of(results), **costs, **screened, architecture=first.architecture,
        init=first.pretrain.init if first.kind == "recipe" and first.pretrain else None,
    )  # fmt: skip


def depths_of(cells: Sequence[Cell]) -> list[Row]:
    """The rows of the shallower backbones that the cells of one name train."""
    results = [cell.result for cell in cells if cell.result]
    found: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        for depth, accuracies in result.get("depths", {}).items():
            found.setdefault(depth, []).append({"accuracies": accuracies})
    return [Row("depth", f"{cells[0].name}, first {depth}", len(own), scores_of(own)) for depth, own in found.items()]


def scores_of(results: Sequence[dict[str, Any]]) -> dict[Measure, Score]:
    """The scores of every measure that all results have."""
    found = [result["accuracies"] for result in results]
    return {measure: score_of([one[measure] for one in found]) for measure in (found[0] if found else ())}


def promising(rows: Sequence[tuple[str, Score]], share: float = 1.0) -> list[str]:
    """The names of those that are not hopeless, whose interval reaches that of the best; and of these no more than a share of
    all, the best ones.
    """
    ranked = sorted(rows, key=lambda row: row[1].value, reverse=True)[: math.ceil(share * len(rows))]
    return [name for name, score in ranked if reaches(score, ranked[0][1])]


def reaches(score: Score, best: Score) -> bool:
    """Whether the interval of one reaches that of the best."""
    return score.high >= best.low


@dataclass(frozen=True)
class Table:
    """What `compare` found; printed, a Markdown table and what follows from it."""

    title: str
    measures: tuple[Measure, ...]
    budget: str
    """Which cost all recipes share: ``seconds``, ``epochs`` or ``flops``."""
    rows: list[Row]
    planned: int
    """Seeds of each recipe."""
    failed: tuple[str, ...] = ()
    """Of each cell that failed its name and its last words."""

    def __str__(self) -> str:
        return "\n\n".join([self.title, *self.findings(), markdown(self.accuracies()), markdown(self.costs())])

    def _repr_markdown_(self) -> str:
        """What a notebook shows."""
        return str(self)

    def best(self, measure: Measure, *kinds: Kind) -> tuple[Row, Score] | None:
        """The row of some kinds with the highest accuracy; None if there is none yet."""
        found = [(row, row.scores[measure]) for row in self.rows if row.kind in kinds and measure in row.scores]
        return max(found, key=lambda pair: pair[1].value, default=None)

    def accuracies(self) -> list[dict[str, str]]:
        """The accuracies, a dictionary of texts for each row."""
        screened = any(row.screened is not None for row in self.rows)
        return [
            {
                "recipe": row.name,
                **({"screened, %": screened_text(row)} if screened else {}),
                **{f"{NAMES[measure]}, %": str(row.scores.get(measure, "-")) for measure in self.measures},
                "seeds": f"{row.seeds}",
            }
            for row in self.rows
        ]

    def costs(self) -> list[dict[str, str]]:
        """What a training of each recipe took, on average; a dictionary of texts for each row."""
        return [
            {
                "recipe": row.name,
                "epochs": shown(row.epochs, 1.0, "g"),
                "time, min": shown(row.seconds, 1 / 60, ".1f"),
                "images/s": shown(row.images_per_second, 1.0, ",.1f"),
                "TFLOP": shown(row.flops, 1e-12, ",.4g"),
                "peak memory, MiB, predicted": shown(row.memory_bytes, 2**-20, ",.0f"),
                "measured": shown(row.measured_bytes, 2**-20, ",.0f"),
            }
            for row in self.rows
            if row.kind == "recipe"
        ]

    def findings(self) -> list[str]:
        """What follows from the table, in sentences; whether pre-training helps is the first."""
        found = [*self.helps(), *self.worth(), *self.better_weights()]
        found += self.screening()
        if self.planned == 1 and any(row.scores for row in self.rows):
            found.append(
                "One seed: there is no spread, and Wilson's 95 % interval for the choice of validation images stands in its place. "
                "Another seed may change the order."
            )
        missing = [
            f"{row.name} ({row.seeds} of {seeds} seeds)"
            for row in self.rows
            for seeds in [1 if row.kind == "pixels" else self.planned]
            if row.seeds < seeds and row.kind != "depth" and not row.dropped
        ]
        if found and missing:
            found.append(f"Not finished: {'; '.join(missing)}. What is said above holds so far.")
        if self.failed:
            found.append(f"Failed: {'; '.join(self.failed)}. The same command tries again.")
        return found

    def screening(self) -> Iterator[str]:
        """Who went no further after a tenth of the budget, and why; what that took."""
        screened = [(row, row.screened) for row in self.rows if row.screened]
        if not screened:
            return
        best = max((score for _, score in screened), key=lambda score: score.value)
        hopeless = [row.name for row, score in screened if not reaches(score, best)]
        behind = [row.name for row, score in screened if row.dropped and reaches(score, best)]
        went = f"lay below that of the best for {'; '.join(hopeless)}: they went no further"
        all_on = "of every recipe reached that of the best" + ("" if behind else ": all went on")
        took = duration(sum(row.screened_seconds or 0.0 for row, _ in screened))
        yield (
            f"Screened after a tenth of the budget, with one seed: the 95 % interval ({NAMES[self.measures[0]]}) "
            f"{went if hopeless else all_on}. This took {took} of training, which is not in the table."
        )
        if behind:
            yield (
                f"By --screen-share {'; '.join(behind)} went no further either: not among the best then, by less than "
                "can be told apart."
            )

    def helps(self) -> Iterator[str]:
        """By which measures pre-training helps: whether any recipe is above raw pixels and its own untrained model."""
        verdicts = (
            "does not help on these data",
            "is not shown to help on these data, for the difference is within the spread",
            "helps",
        )
        said: dict[str, list[str]] = {verdict: [] for verdict in reversed(verdicts)}
        for measure in self.measures:
            found = []
            for row in self.rows:
                if row.kind == "recipe" and measure in row.scores and (others := self.baselines(row, measure)):
                    other = max(others, key=lambda own: own.scores[measure].value)
                    own, reached = row.scores[measure], other.scores[measure]
                    level = (own.value > reached.value) + (own.low > reached.high)
                    text = f"{NAMES[measure]} {own} % ({row.name}) against {reached} % ({other.name})"
                    found.append((level, own.value, text))
            if found:
                level, _, text = max(found)
                said[verdicts[level]].append(text)
        subject = "Pre-training"
        for verdict, texts in said.items():
            if texts:
                yield f"{subject} {verdict}: {'; '.join(texts)}."
                subject = "By other measures it"

    def baselines(self, recipe: Row, measure: Measure) -> list[Row]:
        """What a recipe has to be better than: its untrained model, the weights that it begins with, and raw pixels; none as long as
        one of the first two has no score.
        """
        found = [row for row in self.rows if measure in row.scores]
        own = [row for row in found if row.kind == "untrained" and row.architecture == recipe.architecture]
        begun = [row for row in found if row.kind == "weights" and row.name == recipe.init]
        if not own or (recipe.init and not begun):
            return []
        return [*own, *begun, *(row for row in found if row.kind == "pixels")]

    def worth(self) -> Iterator[str]:
        """By each measure the recipes within the spread of the best, and the cheapest of them in all that the budget leaves open."""
        for measure in self.measures:
            own = [row for row in self.rows if row.kind == "recipe" and measure in row.scores]
            if len(own) < 2:
                continue
            best = max(own, key=lambda row: row.scores[measure].value)
            equal = [row for row in own if row.scores[measure].value >= best.scores[measure].low]
            if len(equal) == 1:
                yield f"Best, {NAMES[measure]}: {best.name}; no other recipe is within its spread."
                continue
            cheapest: dict[str, list[str]] = {}
            for cost, (what, unit, factor) in COSTS.items():
                if cost != self.budget:
                    least = min(getattr(row, cost) for row in equal)
                    for row in equal:
                        if getattr(row, cost) <= ALIKE * least:
                            cheapest.setdefault(row.name, []).append(
                                f"{what} {getattr(row, cost) * factor:,.4g} {unit}"
                            )
            names = "; ".join(f"{name} ({', '.join(costs)})" for name, costs in cheapest.items())
            others = "; ".join(row.name for row in equal if row != best)  # a name may have commas
            yield f"Best, {NAMES[measure]}: {best.name}; within its spread: {others}. The cheapest of these: {names}."

    def better_weights(self) -> Iterator[str]:
        """By which measures given weights are better than every recipe."""
        texts = []
        for measure in self.measures:
            best, given = self.best(measure, "recipe"), self.best(measure, "weights")
            if best and given and given[1].low > best[1].high:
                texts.append(f"{NAMES[measure]} {given[1]} % ({given[0].name})")
        if texts:
            yield f"Given weights are better, start from them: {'; '.join(texts)}."

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"title": self.title, "rows": [asdict(row) for row in self.rows], "findings": self.findings()}

    def csv(self) -> str:
        """A line for each row and measure."""
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        costs = ("epochs", "seconds", "flops", "memory_bytes", "measured_bytes")
        lines.writerow(["name", "kind", "seeds", "measure", "mean", "low", "high", "images", *costs])
        for row in self.rows:
            for measure, score in row.scores.items():
                own = [getattr(row, cost) for cost in costs]
                lines.writerow(
                    [row.name, row.kind, row.seeds, measure, score.value, score.low, score.high, score.images, *own]
                )
        return text.getvalue()


def screened_text(row: Row) -> str:
    """The accuracy after a tenth of the budget."""
    return "-" if row.screened is None else f"{row.screened}, dropped" if row.dropped else str(row.screened)


def shown(value: int | float | None, factor: float, how: str) -> str:
    """A number in another unit."""
    return "-" if value is None else f"{value * factor:{how}}"


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """A Markdown table whose columns stand below each other; they are the keys of the first row."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )
