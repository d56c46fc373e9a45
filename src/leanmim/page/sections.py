"""The sections of the page: each is a function from runs to HTML, empty where there is nothing to show."""

import base64
from collections.abc import Callable, Sequence
from dataclasses import fields
from datetime import timedelta
from html import escape
from itertools import cycle
from statistics import median
from typing import Any

from leanmim.config.base import Logging, Machine
from leanmim.page.charts import Curve, chart
from leanmim.page.html import NOT_YET, Html, row, safe, soft, table
from leanmim.page.load import Loaded

CHARTS = (  # key in metrics.jsonl, title with unit, factor to that unit, whether the axis includes 0
    ("loss", "loss", 1, False),
    ("knn", "online kNN accuracy (%)", 100, False),
    ("lr", "learning rate (10⁻³)", 1e3, True),
    ("images_per_second", "speed (images/s)", 1, True),
    ("memory_bytes", "peak memory (GiB)", 2**-30, True),
    ("data_wait", "waiting for data (% of time)", 100, True),
)
DEPTH_CHARTS = (  # key in evaluations.jsonl, label of the axis with unit, factor to that unit
    ("depth", "depth", 1.0),
    ("parameters", "M parameters", 1e-6),
    ("latency_ms", "latency, ms an image", 1.0),
)
INTERVAL = (
    "In brackets: Wilson's 95 % interval, for the choice of validation images; seeds and training images add to it."
)
MEASURES = {"knn": "kNN (%)", "probe": "linear probe (%)"}
LOSS_DEPENDS_ON = (
    "recipe", "target", "hog_cell", "loss", "mask_ratio", "mask_unit", "segments", "throw", "select", "fill",
)  # fmt: skip
IRRELEVANT = {  # options of an evaluation on which its result does not depend, or that have a column of their own
    *(field.name for base in (Machine, Logging) for field in fields(base)), "run", "data", "baselines", "batch_size",
}  # fmt: skip
IRRELEVANT_TO = {"knn": IRRELEVANT, "probe": IRRELEVANT | {"k", "temperature"}}  # the latter written by version 0.1.0
DASHES = {"solid": "", "dashed": "7 4", "dotted": "2 4"}  # CSS's names and SVG's stroke-dasharray


def summary(runs: Sequence[Loaded]) -> Html:
    """One row for each run."""
    head = (
        "run", "recipe", "model", "input (px)", "epochs", "images seen", "loss", "kNN (%)", "images/s, median",
        "waiting for data (%)", "peak memory (GiB)", "training time (h:min:s)", "device",
    )  # fmt: skip
    rows = []
    for run in runs:
        lines = [line for line in run.metrics if "loss" in line]
        knn = [line for line in run.metrics if "knn" in line]
        cells: list[Any] = [run.config.recipe, run.config.model, " x ".join(map(str, run.config.input_size))]
        if lines:
            seconds = sum(line["seconds"] for line in lines)
            cells += [
                f"{lines[-1]['epoch']:.4g} / {run.config.epochs}",
                f"{sum(line['images_per_second'] * line['seconds'] for line in lines):,.0f}",
                f"{lines[-1]['loss']:.4f}",
                percent(knn[-1], "knn") if knn else NOT_YET if run.config.knn_data else "-",
                f"{median(line['images_per_second'] for line in lines):,.0f}",
                f"{100 * sum(line['data_wait'] * line['seconds'] for line in lines) / seconds:.1f}",
                f"{max(line['memory_bytes'] for line in lines) / 2**30:.2f}",
                str(timedelta(seconds=round(seconds))),
            ]
        else:
            cells += [NOT_YET] * 8
        rows.append(row(run.title, [*cells, run.environment.get("device", NOT_YET)]))
    return table(head, rows, "short")


def training(runs: Sequence[Loaded]) -> Html:
    """Metrics against epochs: a chart for each metric with all runs in it, under one legend."""
    if not any(run.metrics for run in runs):
        return Html(f"<p>{NOT_YET}</p>")
    drawn, notes = [], []
    for key, title, factor, zero in CHARTS:
        curves = [curve for run in runs for curve in segment_losses(run)] if key == "loss" else []
        if curves:
            notes.append("Thin lines: the loss of each segment, the deeper the stronger.")
        curves += [Curve([(x, y * factor) for x, y in run.values(key)], run.colour, run.name) for run in runs]
        empty = "not yet" if key != "knn" or any(run.config.knn_data for run in runs) else "no run has --knn-data"
        drawn.append(f'<figure class="card">{chart(title, [c for c in curves if c.points], zero, empty)}</figure>')
    differing = [key for key in LOSS_DEPENDS_ON if len({getattr(run.config, key) for run in runs}) > 1]
    if differing:
        notes.append(f"The runs differ in {', '.join(differing)}: compare their accuracies, not their losses.")
    legend = "".join(f"<span>{run.title}</span>" for run in runs)
    remarks = "".join(f"<p>{soft(note)}</p>" for note in notes)
    return Html(f'<div class="legend">{legend}</div>{remarks}<div class="grid">{"".join(drawn)}</div>')


def segment_losses(run: Loaded) -> list[Curve]:
    """The loss of each segment against epochs; empty where the run has one segment."""
    count = len({name for line in run.metrics for name in line if name.startswith("loss_")})
    return [
        Curve(run.values(f"loss_{i}"), run.colour, f"{run.name}, segment {i}", 1.0, 0.8 * (i + 1) / count)
        for i in range(count)
    ]


def costs(runs: Sequence[Loaded]) -> Html:
    """The cost predicted before the run next to the measured one, a row for each run."""
    head = (
        "run", "peak memory, predicted (GiB)", "peak memory, measured (GiB)", "weights", "gradients", "optimizer",
        "saved for backward", "transient", "GFLOP an image", "images/s, measured", "GFLOP/s, measured",
    )  # fmt: skip
    rows = []
    for run in runs:
        predicted, measured = run.cost.get("predicted", {}), run.cost.get("measured", {})
        if not predicted:
            rows.append(row(run.title, [NOT_YET] * (len(head) - 1)))
            continue
        kinds = ("weight", "gradient", "optimizer", "saved", "transient")
        rows.append(row(run.title, [
            f"{predicted['peak_bytes'] / 2**30:.2f}",
            f"{measured['peak_bytes'] / 2**30:.2f}" if measured else NOT_YET,
            *(f"{predicted[f'{kind}_bytes'] / 2**30:.2f}" for kind in kinds),
            f"{predicted['train_flops_per_image'] / 1e9:.3g}",
            f"{measured['images_per_second']:,.0f}" if measured else NOT_YET,
            f"{measured['flops_per_second'] / 1e9:,.0f}" if measured else NOT_YET,
        ]))  # fmt: skip
    note = "Measured on a GPU: its allocator's peak. Elsewhere: what the process grew by, with readers and libraries."
    return Html(f"{table(head, rows, 'short')}<p>{soft(note)}</p>")


def protocol(line: dict[str, Any], *left_out: str) -> tuple[str, str, Html]:
    """How an evaluation was made: its measure, its data, and the options on which the result depends."""
    irrelevant = {*IRRELEVANT_TO.get(line["what"], ()), *left_out}
    options = {k: v for k, v in line["options"].items() if k not in irrelevant and v not in (None, [])}
    return line["what"], line["data"], safe(options)


def interval(line: dict[str, Any], key: str = "value") -> tuple[float, float] | None:
    """The 95 % interval of an accuracy in a line of evaluations.jsonl or metrics.jsonl; None of an earlier version."""
    ends = line.get("interval", (line.get(f"{key}_low"), line.get(f"{key}_high")))
    return None if None in ends else (ends[0], ends[1])


def percent(line: dict[str, Any], key: str = "value") -> str:
    """An accuracy in per cent, with its interval."""
    ends = interval(line, key)
    return f"{100 * line[key]:.1f}" + (f" ({100 * ends[0]:.1f} to {100 * ends[1]:.1f})" if ends else "")


def accuracies(runs: Sequence[Loaded]) -> Html:
    """The results of `leanmim knn` and `leanmim probe`; a repeated evaluation replaces the earlier one."""
    found: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for run in runs:
        for line in run.evaluations:
            found.setdefault((*protocol(line), run.title), {})[line["name"]] = line
    if not found:
        return Html(f"<p>{NOT_YET}{soft(': `leanmim knn` and `leanmim probe` measure it')}</p>")
    names = list(dict.fromkeys(name for lines in found.values() for name in lines))
    rows = []
    for (what, data, options, title), lines in sorted(found.items(), key=lambda item: item[0][:3]):
        images = {f"{line['images']:,}": None for line in lines.values() if "images" in line}
        cells = [percent(lines[name]) if name in lines else "-" for name in names]
        rows.append(row(title, [what, *cells, " or ".join(images) or "-", data, options]))
    head = ["run", "measure", *(f"{name} (%)" for name in names), "validation images", "data", "options"]
    return Html(f"{table(head, rows, 'short notes')}<p>{soft(INTERVAL)}</p>")


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
    for what, title in MEASURES.items():
        drawn = []  # label, style of the line, colour, evaluations
        for run in runs:
            own = [key for key in found if (key[0], key[2]) == (run.title, what)]
            for key, style in zip(own, cycle(DASHES), strict=False):
                _, step, _, data, options = key
                label = run.name if len(own) == 1 else f"{run.name}, {what}, {data}, {options}, step {step}"
                drawn.append((label, style, run.colour, found[key]))
                legend[label, style] = run.colour
        for field, axis, factor in DEPTH_CHARTS if drawn else ():
            curves = []
            for label, style, colour, lines in drawn:
                if field == "latency_ms":  # of the device measured last; others cannot be compared with it
                    lines = [line for line in lines if line.get("device") == lines[-1].get("device")]
                points = [(line[field] * factor, 100 * line["value"]) for line in lines]
                ends = [(line[field] * factor, interval(line)) for line in lines]
                bars = [(x, 100 * pair[0], 100 * pair[1]) for x, pair in ends if pair]
                curves.append(Curve(points, colour, label, dash=DASHES[style], intervals=bars))
            panels.append(chart(f"{title} against {axis}", curves, False, "", axis))
    if not panels:
        return Html("")
    names = "".join(
        f'<span><span class="key" style="border-top: 3px {style} {colour}"></span>{escape(label)}</span>'
        for (label, style), colour in legend.items()
    )
    return Html(
        f'<div class="legend">{names}</div><figure class="card"><div class="grid three">{"".join(panels)}</div></figure>'
    )


def reconstructions(runs: Sequence[Loaded]) -> Html:
    """Each run's reconstructions.png, embedded in the page."""
    figures = []
    for run in runs:
        source = f"data:image/png;base64,{base64.b64encode(run.picture).decode()}"
        image = f'<img alt="original, masked image, reconstruction" src="{source}">' if run.picture else NOT_YET
        figures.append(f'<figure class="card"><figcaption>{run.title}</figcaption>\n{image}</figure>')
    return Html(f'<div class="grid">{"".join(figures)}</div>')


def skipped(runs: Sequence[Loaded]) -> Html:
    """The number of files that each run could not read, and the first ten of them."""
    rows = []
    for run in runs:
        first = "".join(f"<br>{safe(line['path'])} {soft(line['reason'])}" for line in run.skipped[:10])
        more = f"<br>and {len(run.skipped) - 10} more, in skipped.jsonl" if len(run.skipped) > 10 else ""
        rows.append(row(run.title, [Html(f"{len(run.skipped)}{first}{more}")]))
    return table(["run", "skipped"], rows, "long")


def comparison(runs: Sequence[Loaded], settings: Sequence[dict[str, Any]]) -> Html:
    """A row for each setting and a column for each run; settings that differ come first and are marked."""
    different, same = [], []
    for key in dict.fromkeys(key for values in settings for key in values):
        cells = [safe(values[key]) if key in values else NOT_YET for values in settings]
        if len(set(cells)) > 1:
            different.append(row(key, cells, "differs"))
        else:
            same.append(row(key, cells[:1], span=len(runs)))
    if not different + same:
        return Html(f"<p>{NOT_YET}</p>")
    return table(["setting", *(run.title for run in runs)], different + same, "long")


SECTIONS: dict[str, Callable[[Sequence[Loaded]], Html]] = {
    "Summary": summary,
    "Training": training,
    "Cost, predicted and measured": costs,
    "Accuracy on labelled images": accuracies,
    "Accuracy against depth": depths,
    "Reconstructions": reconstructions,
    "Unreadable files": skipped,
    "Configuration": lambda runs: comparison(runs, [run.config.to_json() for run in runs]),
    "Environment": lambda runs: comparison(runs, [run.environment for run in runs]),
}
"""The sections in their order, by their headings."""
