"""What evaluators of a frozen encoder found: evaluations.jsonl as a table, and as curves against depth."""

import re
from collections.abc import Sequence
from dataclasses import fields
from html import escape
from itertools import cycle
from typing import Any

from leanmim.config.base import Logging, Machine
from leanmim.page.charts import Curve, chart
from leanmim.page.html import NOT_YET, Html, bar, row, safe, soft, table
from leanmim.page.load import Loaded, pretrained

DEPTH_CHARTS = (  # key in evaluations.jsonl, label of the axis with unit, factor to that unit
    ("depth", "depth", 1.0),
    ("parameters", "M parameters", 1e-6),
    ("latency_ms", "latency, ms an image", 1.0),
)
INTERVAL = (
    "In brackets: Wilson's 95 % interval, of mIoU and pixel accuracy that of a bootstrap, for the choice of validation images; seeds "
    "and training images add to it."
)
BELOW = "Below each accuracy: that of what is not pre-trained."
ALONE = "An accuracy alone says little: --baselines measures random weights and raw pixels beside it."
DEVIATION = "After ±: the standard deviation over repeated draws of training images."
MEASURES = {"knn": "kNN", "probe": "linear probe", "attentive": "attentive probe"}
IRRELEVANT = {  # options of an evaluation on which its result does not depend, or that have a column of their own
    *(field.name for base in (Machine, Logging) for field in fields(base)), "run", "data", "baselines", "batch_size",
    "cache",
}  # fmt: skip
IRRELEVANT_TO = {"probe": {"k", "temperature"}}  # written by version 0.1.0
OF_OTHER_SOLVERS = {
    "fast": {"blr", "epochs", "warmup_epochs", "probe_batch_size", "queries", "seed"},
    "lars": {"c", "queries"},
    "attentive": {"blr", "c", "probe_batch_size"},
}
DASHES = {"solid": "", "dashed": "7 4", "dotted": "2 4"}  # CSS's names and SVG's stroke-dasharray


def relevant(line: dict[str, Any], *left_out: str) -> dict[str, Any]:
    """The options of an evaluation on which its result depends."""
    others = OF_OTHER_SOLVERS.get(line["options"].get("solver"), ())
    irrelevant = {*IRRELEVANT, *IRRELEVANT_TO.get(line["what"], ()), *others, *left_out}
    return {k: v for k, v in line["options"].items() if k not in irrelevant and v not in (None, [])}


def protocol(line: dict[str, Any], *left_out: str) -> tuple[str, str, Html]:
    """How an evaluation was made: its measure, its data, and the options on which the result depends."""
    return line["what"], line["data"], safe(relevant(line, *left_out))


def interval(line: dict[str, Any], key: str = "value") -> tuple[float, float] | None:
    """The 95 % interval of an accuracy in a line of evaluations.jsonl or metrics.jsonl; None of an earlier version."""
    low, high = line.get("interval") or (line.get(f"{key}_low"), line.get(f"{key}_high"))
    return None if low is None or high is None else (low, high)


def percent(line: dict[str, Any], key: str = "value") -> str:
    """An accuracy in per cent, with its deviation over repeated draws and its interval, where there are such."""
    deviation = f" ± {100 * line['deviation']:.1f}" if "deviation" in line else ""
    ends = interval(line, key)
    return f"{100 * line[key]:.1f}{deviation}" + (f" ({100 * ends[0]:.1f} to {100 * ends[1]:.1f})" if ends else "")


def natural(text: str) -> list[str | int]:
    """A key to sort texts by, numbers in them by value: few-shot 5 before few-shot 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", text)]


def accuracies(runs: Sequence[Loaded]) -> Html:
    """The results of all evaluators, whatever they measured, a row for each and a column for each run; a repeated evaluation
    replaces the earlier one.
    """
    found: dict[tuple[str, ...], dict[str, dict[str, dict[str, Any]]]] = {}
    for run in runs:
        for line in run.evaluations:
            found.setdefault(protocol(line), {}).setdefault(run.title, {})[line["name"]] = line
    if not found:
        if not pretrained(runs):
            return Html("")
        return Html(f"<p>{NOT_YET}{soft(': `leanmim evaluate` measures it')}</p>")
    measured = [run for run in runs if run.evaluations]
    rows = []
    for (what, data, options), of_runs in sorted(found.items(), key=lambda item: list(map(natural, item[0]))):
        images = {
            f"{line['images']:,}": None for lines in of_runs.values() for line in lines.values() if "images" in line
        }
        cells = [measure(of_runs.get(run.title, {}), run.colour) for run in measured]
        rows.append(row(what, [*cells, " or ".join(images) or "-", data, options]))
    head = ["measure (%)", *(run.title for run in measured), "validation images", "data", "options"]
    baselines = any(line["name"] != "pretrained" for run in measured for line in run.evaluations)
    notes = [BELOW if baselines else ALONE, INTERVAL]
    if any("deviation" in line for run in measured for line in run.evaluations):
        notes.append(DEVIATION)
    return Html(f"{table(head, rows, 'short notes')}<p>{soft(' '.join(notes))}</p>")


def measure(lines: dict[str, dict[str, Any]], colour: str) -> Html:
    """An accuracy of a run with a bar, and below it those of baselines; by the names that its evaluator gave them."""
    if not lines:
        return Html("-")
    own = lines.get("pretrained")
    first = f"{bar(own['value'], colour)}{percent(own)}" if own else ""
    others = [soft(f"{name} {percent(line)}") for name, line in lines.items() if name != "pretrained"]
    return Html("<br>".join([first, *others] if own else others))


Evaluated = tuple[str, int | None, str, str, Html]  # title of the run, step, and `protocol` without the depth


def by_depth(runs: Sequence[Loaded]) -> dict[Evaluated, list[dict[str, Any]]]:
    """Lines of evaluations.jsonl that differ in depth only, shallowest first, where there are at least two."""
    found: dict[Evaluated, dict[int, dict[str, Any]]] = {}
    for run in runs:
        for line in run.evaluations:
            if "depth" in line and line["name"] == "pretrained":
                key = (run.title, line.get("step"), *protocol(line, "depth"))
                found.setdefault(key, {})[line["depth"]] = line
    return {key: [lines[depth] for depth in sorted(lines)] for key, lines in found.items() if len(lines) > 1}


def depths(runs: Sequence[Loaded]) -> Html:
    """Accuracy at the end of each segment against depth, parameters and latency: a curve for each run and protocol."""
    found = by_depth(runs)
    panels, legend = [], {}
    for what in sorted({what for _, _, what, _, _ in found}, key=natural):
        drawn = []  # label, style of the line, colour, evaluations
        for run in runs:
            own = [key for key in found if (key[0], key[2]) == (run.title, what)]
            for key, style in zip(own, cycle(DASHES), strict=False):
                _, step, _, data, options = key
                label = run.name if len(own) == 1 else f"{run.name}, {what}, {data}, {options}, step {step}"
                drawn.append((label, style, run.colour, found[key]))
                legend[label, style] = run.colour
        title = escape(f"{MEASURES.get(what, what)} (%)")
        panels += [
            chart(f"{title} against {axis}", [curve(field, factor, *line) for line in drawn], False, "", axis)
            for field, axis, factor in DEPTH_CHARTS
        ]
    if not panels:
        return Html("")
    names = "".join(
        f'<span><span class="key" style="border-top: 3px {style} {colour}"></span>{escape(label)}</span>'
        for (label, style), colour in legend.items()
    )
    return Html(
        f'<div class="legend">{names}</div><figure class="card"><div class="grid three">{"".join(panels)}</div></figure>'
    )


def curve(field: str, factor: float, label: str, style: str, colour: str, lines: list[dict[str, Any]]) -> Curve:
    """Accuracies against a field of evaluations.jsonl, times a factor."""
    if field == "latency_ms":  # of the device measured last; others cannot be compared with it
        lines = [line for line in lines if line.get("device") == lines[-1].get("device")]
    points = [(line[field] * factor, 100 * line["value"]) for line in lines]
    ends = [(line[field] * factor, interval(line)) for line in lines]
    bars = [(x, 100 * pair[0], 100 * pair[1]) for x, pair in ends if pair]
    return Curve(points, colour, label, dash=DASHES[style], intervals=bars)
