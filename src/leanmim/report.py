"""One self-contained HTML page about one or several runs: no scripts, nothing loaded from elsewhere."""

import base64
import json
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from html import escape
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from matplotlib.ticker import MaxNLocator

import leanmim
from leanmim.checkpoint import Run, write_atomically
from leanmim.config import Pretrain, Report
from leanmim.errors import UserError

COLOURS = ("#2f7fd1", "#e07b00", "#1a9e6f", "#c2559d", "#8a6fd1", "#a08a00")  # readable on white and on near black
CHARTS = (  # key in metrics.jsonl, title with unit, factor to that unit, does the axis start at 0
    ("loss", "loss", 1, False),
    ("knn", "online kNN accuracy (%)", 100, False),
    ("lr", "learning rate (10⁻³)", 1e3, True),
    ("images_per_second", "speed (images/s)", 1, True),
    ("memory_bytes", "peak memory (GiB)", 2**-30, True),
    ("data_wait", "waiting for data (% of time)", 100, True),
)
LOSS_DEPENDS_ON = (
    "recipe", "target", "hog_cell", "loss", "mask_ratio", "mask_unit", "segments", "throw", "select", "fill",
)  # fmt: skip
NO_PROTOCOL = {  # options of a measurement that its number does not depend on
    "knn": {"run", "data", "baselines", "device", "workers", "batch_size"},
    "probe": {"run", "data", "baselines", "device", "workers", "batch_size", "k", "temperature"},
}
DASHES = {"solid": "", "dashed": "7 4", "dotted": "2 4"}  # how style sheets call them, and how pictures draw them
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 256, 54, 14, 36, 40  # of a chart, in its own units
STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1c2430; --soft: #5d6877; --line: #dfe3e8;
  --mark: #fff3cf; }
@media (prefers-color-scheme: dark) { :root { --page: #12161c; --card: #1a2028; --ink: #e3e8ee; --soft: #98a4b3;
  --line: #2e3742; --mark: #3d3518; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px 16px 48px; max-width: 1160px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 26px; }
h2 { margin: 36px 0 10px; font-size: 18px; }
p { margin: 4px 0; }
.soft, thead th { color: var(--soft); font-weight: normal; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 8px; text-align: left; vertical-align: top; overflow-wrap: normal; }
tbody > tr > * { border-top: 1px solid var(--line); }
thead th { vertical-align: bottom; line-height: 1.25; }
tbody th, .short td:not(:last-child) { white-space: nowrap; }
tbody th { width: 1%; padding-right: 20px; }
.notes td:last-child { min-width: 24em; }
.long td { min-width: 10em; overflow-wrap: anywhere; }
tr.differs > * { background: var(--mark); }
.grid { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.three { grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); }
figure { margin: 0; padding: 10px; }
img { display: block; width: 100%; max-width: 820px; margin: 8px auto 0; border-radius: 4px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; }
.grid, .legend { margin: 10px 0; }
.key { display: inline-block; width: 28px; margin-right: 7px; vertical-align: middle; }
.dot { display: inline-block; width: 10px; height: 10px; margin-right: 7px; border-radius: 50%; }
svg { display: block; width: 100%; font-size: 12.5px; }
svg text { fill: var(--soft); }
svg .title { fill: var(--ink); font-size: 14px; font-weight: 600; }
svg path { stroke: var(--line); }
svg polyline { fill: none; stroke: currentColor; stroke-linejoin: round; }
svg circle { fill: currentColor; }
"""


class Html(str):
    """Text that is markup already; every other text is escaped."""


class Loaded(NamedTuple):
    """What a run folder holds so far."""

    name: str
    colour: str
    config: Pretrain
    environment: dict[str, Any]
    cost: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    skipped: list[dict[str, Any]]
    picture: bytes

    @property
    def title(self) -> Html:
        """The name behind a dot of the run's colour."""
        return Html(f'<span class="dot" style="background:{self.colour}"></span>{escape(self.name)}')

    def values(self, key: str) -> list[tuple[float, float]]:
        """(epoch, value) pairs of a metric."""
        per_epoch = next((line["step"] / line["epoch"] for line in self.metrics if line.get("epoch")), math.inf)
        pairs = [(line["step"] / per_epoch, float(line[key])) for line in self.metrics if key in line]
        return [pair for pair in pairs if per_epoch < math.inf and math.isfinite(pair[1])]


def report(config: Report) -> Path:
    """Write one HTML page about one or several runs, finished or not.

    Returns:
        The page.

    Raises:
        UserError: a folder is not a run, its configuration cannot be read, or the page cannot be written.
    """
    if not config.runs:
        raise UserError("--runs needs a run folder of `leanmim pretrain`, or several")
    names = [Path(folder).resolve().name for folder in config.runs]
    if len(set(names)) < len(names):  # a/run and b/run
        names = list(config.runs)
    runs = [load(Path(folder), *rest) for folder, *rest in zip(config.runs, names, cycle(COLOURS), strict=False)]
    path = Path(config.out) if config.out else Path(config.runs[0]) / "report.html"
    if path.is_dir():
        raise UserError(f"{str(path)!r} is a folder; give the name of a page with --out")
    try:
        write_atomically(path, lambda file: file.write_text(page(runs), encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be written ({error}); choose another --out") from error
    return path


def load(folder: Path, name: str, colour: str) -> Loaded:
    """Read a run folder; all but the configuration may be missing.

    Raises:
        UserError: it has no configuration, or one that cannot be read.
    """
    run = Run(folder)
    if not run.config.is_file():
        raise UserError(f"{str(folder)!r} is not a run folder of `leanmim pretrain`: it has no config.json")
    try:
        config = Pretrain.from_json(json.loads(run.config.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{str(run.config)!r} cannot be read ({error}); put back the one that this version of leanmim wrote, "
            "or leave the run out"
        ) from error
    environment, picture = folder / "environment.json", folder / "reconstructions.png"
    metrics, evaluations, skipped = (
        parse(read(path).splitlines()) for path in (run.metrics, run.evaluations, run.skipped)
    )
    return Loaded(
        name, colour, config, (parse([read(environment)]) or [{}])[0], (parse([read(run.cost)]) or [{}])[0], metrics, evaluations, skipped,
        picture.read_bytes() if picture.is_file() else b"",
    )  # fmt: skip


def read(path: Path) -> str:
    """The text of a file, none if it is not there yet."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def parse(texts: Iterable[str]) -> list[dict[str, Any]]:
    """JSON objects; what a killed process left half written is passed over."""
    found = []
    for text in texts:
        with suppress(ValueError):
            found.append(json.loads(text))
    return found


def page(runs: Sequence[Loaded]) -> str:
    """The page."""
    title = escape(", ".join(run.name for run in runs))
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    sections = {
        "Summary": summary(runs),
        "Training": charts(runs),
        "Cost, predicted and measured": costs(runs),
        "Accuracy on labelled images": accuracies(runs),
        "Accuracy against depth": depths(runs),
        "Reconstructions": pictures(runs),
        "Unreadable files": skipped(runs),
        "Configuration": comparison(runs, [run.config.to_json() for run in runs]),
        "Environment": comparison(runs, [run.environment for run in runs]),
    }
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title} - leanmim</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{title}</h1>\n<p class="soft">leanmim {leanmim.__version__}, page written {now}</p>\n'
        + "\n".join(f"<section>\n<h2>{heading}</h2>\n{body}\n</section>" for heading, body in sections.items() if body)
        + "\n</body>\n</html>\n"
    )


def safe(value: Any) -> Html:
    """A value as one would type it on the command line, escaped; markup as it is."""
    if isinstance(value, Html):
        return value
    if isinstance(value, dict):
        text = ", ".join(f"{safe(key)} {safe(item)}" for key, item in value.items())
    elif isinstance(value, list):
        text = " ".join(map(safe, value))
    else:
        text = escape(f"{value:.6g}" if isinstance(value, float) else str(value))
    return Html(text or "-")


def table(titles: Iterable[Any], rows: Iterable[Html], style: str = "") -> Html:
    """A table that scrolls sideways where it is too wide."""
    header = "".join(f'<th scope="col">{safe(cell)}</th>' for cell in titles)
    body = f"<thead><tr>{header}</tr></thead>\n<tbody>" + "\n".join(rows) + "</tbody>"
    return Html(f'<div class="card {style}"><table>{body}</table></div>')


def row(head: Any, cells: Iterable[Any], style: str = "", span: int = 1) -> Html:
    """A row of a table."""
    body = "".join(f'<td colspan="{span}">{safe(cell)}</td>' for cell in cells)
    return Html(f'<tr class="{style}"><th scope="row">{safe(head)}</th>{body}</tr>')


def soft(text: str) -> Html:
    """A remark."""
    return Html(f'<span class="soft">{escape(text)}</span>')


NOT_YET = soft("not yet")


def summary(runs: Sequence[Loaded]) -> Html:
    """One row for each run."""
    head = (
        "run", "recipe", "model", "input (px)", "epochs", "images seen", "loss", "kNN (%)", "images/s, median",
        "waiting for data (%)", "peak memory (GiB)", "training time (h:min:s)", "device",
    )  # fmt: skip
    rows = []
    for run in runs:
        lines = [line for line in run.metrics if "loss" in line]
        knn = run.values("knn")
        cells: list[Any] = [run.config.recipe, run.config.model, " x ".join(map(str, run.config.input_size))]
        if lines:
            seconds = sum(line["seconds"] for line in lines)
            cells += [
                f"{lines[-1]['epoch']:.4g} / {run.config.epochs}",
                f"{sum(line['images_per_second'] * line['seconds'] for line in lines):,.0f}",
                f"{lines[-1]['loss']:.4f}",
                f"{100 * knn[-1][1]:.1f}" if knn else NOT_YET if run.config.knn_data else "-",
                f"{median(line['images_per_second'] for line in lines):,.0f}",
                f"{100 * sum(line['data_wait'] * line['seconds'] for line in lines) / seconds:.1f}",
                f"{max(line['memory_bytes'] for line in lines) / 2**30:.2f}",
                str(timedelta(seconds=round(seconds))),
            ]
        else:
            cells += [NOT_YET] * 8
        rows.append(row(run.title, [*cells, run.environment.get("device", NOT_YET)]))
    return table(head, rows, "short")


def costs(runs: Sequence[Loaded]) -> Html:
    """What was counted before the run, next to what the run took."""
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


def charts(runs: Sequence[Loaded]) -> Html:
    """All runs overlaid in each chart, under one legend."""
    if not any(run.metrics for run in runs):
        return Html(f"<p>{NOT_YET}</p>")
    drawn, notes = [], []
    for key, title, factor, zero in CHARTS:
        curves = []
        for run in runs if key == "loss" else ():
            count = len({name for line in run.metrics for name in line if name.startswith("loss_")})
            curves += [
                Curve(run.values(f"loss_{i}"), run.colour, f"{run.name}, segment {i}", 1.0, 0.8 * (i + 1) / count)
                for i in range(count)
            ]
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


class Curve(NamedTuple):
    """A line of a chart."""

    points: list[tuple[float, float]]
    colour: str
    label: str
    width: float = 1.8
    opacity: float = 0.9
    dash: str = ""


def chart(title: str, curves: Sequence[Curve], zero: bool, empty: str, across: str = "epoch") -> str:
    """An SVG picture: the page's own style sheet colours it, so it follows light and dark."""
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts = [f'<text class="title" x="8" y="18">{title}</text>']
    if not curves:
        parts.append(f'<text x="{middle}" y="{HEIGHT / 2}" text-anchor="middle">{empty}</text>')
    else:
        ys = [y for curve in curves for _, y in curve.points] + [0.0] * zero
        last = max(x for curve in curves for x, _ in curve.points)
        scale = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10])
        marks = scale.tick_values(min(ys), max(ys) or 1.0)  # they reach past the lowest and the highest
        low, high = marks[0], marks[-1]

        def place(x: float, y: float) -> tuple[float, float]:
            right, up = x / last, (y - low) / (high - low)
            return LEFT + right * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

        for mark in marks:
            y = place(0.0, mark)[1]
            parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{mark:.6g}</text>')
        for mark in (mark for mark in scale.tick_values(0, last) if mark <= last):
            parts.append(
                f'<text x="{place(mark, 0.0)[0]:.1f}" y="{HEIGHT - 22}" text-anchor="middle">{mark:.6g}</text>'
            )
        parts.append(f'<text x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{across}</text>')
        for curve in curves:
            places = [place(*point) for point in thin(curve.points)]
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in places if len(places) <= 50)
            parts.append(
                f'<g color="{curve.colour}" opacity="{curve.opacity:.2f}"><title>{escape(curve.label)}</title>'
                f'<polyline points="{line}" stroke-width="{curve.width}" stroke-dasharray="{curve.dash}"/>{dots}</g>'
            )
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">{"".join(parts)}</svg>'


def thin(points: list[tuple[float, float]], bins: int = 300) -> list[tuple[float, float]]:
    """Few enough points to draw: the lowest and the highest of each bin, so that no spike is lost."""
    size = math.ceil(len(points) / bins)
    if size <= 2:
        return points
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return sorted(
        {points[0], points[-1], *(find(group, key=lambda p: p[1]) for group in groups for find in (min, max))}
    )


def protocol(line: dict[str, Any], *without: str) -> tuple[str, str, Html]:
    """What a measurement's number depends on beside the run: measure, data, options (some left out)."""
    left_out = {*NO_PROTOCOL.get(line["what"], ()), *without}
    options = {k: v for k, v in line["options"].items() if k not in left_out and v not in (None, [])}
    return line["what"], line["data"], safe(options)


def accuracies(runs: Sequence[Loaded]) -> Html:
    """What `leanmim knn` and `leanmim probe` found; a measurement made again replaces the earlier one."""
    found: dict[tuple[str, ...], dict[str, float]] = {}
    for run in runs:
        for line in run.evaluations:
            found.setdefault((*protocol(line), run.title), {})[line["name"]] = line["value"]
    if not found:
        return Html(f"<p>{NOT_YET}{soft(': `leanmim knn` and `leanmim probe` measure it')}</p>")
    names = list(dict.fromkeys(name for values in found.values() for name in values))
    rows = [
        row(title, [what, *(f"{100 * values[name]:.1f}" if name in values else "-" for name in names), data, options])
        for (what, data, options, title), values in sorted(found.items(), key=lambda item: item[0][:3])
    ]
    return table(["run", "measure", *(f"{name} (%)" for name in names), "data", "options"], rows, "short notes")


def depths(runs: Sequence[Loaded]) -> Html:
    """Accuracy of the ends of segments against their depth, parameters and latency, in one picture: a curve for each run
    and way of measuring.
    """
    found: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for run in runs:
        for line in run.evaluations:
            if "depth" in line and line["name"] == "pretrained":
                key = (run.title, line.get("step"), *protocol(line, "depth"))
                found.setdefault(key, {})[line["depth"]] = line
    curves = {key: [lines[depth] for depth in sorted(lines)] for key, lines in found.items() if len(lines) > 1}
    if not curves:
        return Html("")
    panels, legend = [], {}
    for what, title in (("knn", "kNN (%)"), ("probe", "linear probe (%)")):
        labels = {}  # and a dash for each way of measuring a run
        for run in runs:
            ways = [key for key in curves if (key[0], key[2]) == (run.title, what)]
            for key, (style, _) in zip(ways, cycle(DASHES.items())):
                step, _, data, options = key[1:]
                labels[key] = (
                    run.name if len(ways) == 1 else f"{run.name}, {what}, {data}, {options}, step {step}",
                    style,
                )
                legend[labels[key]] = run.colour
        for field, name, factor in (("depth", "depth", 1.0), ("parameters", "M parameters", 1e-6),
                                    ("latency_ms", "latency, ms an image", 1.0)):  # fmt: skip
            drawn = []
            for key, (label, style) in labels.items():
                lines = curves[key]
                if field == "latency_ms":  # of one device only
                    lines = [line for line in lines if line.get("device") == lines[-1].get("device")]
                points = [(line[field] * factor, 100 * line["value"]) for line in lines]
                drawn.append(Curve(points, legend[label, style], label, dash=DASHES[style]))
            if drawn:
                panels.append(chart(f"{title} against {name}", drawn, False, "", name))
    names = "".join(
        f'<span><span class="key" style="border-top: 3px {style} {colour}"></span>{escape(label)}</span>'
        for (label, style), colour in legend.items()
    )
    return Html(
        f'<div class="legend">{names}</div><figure class="card"><div class="grid three">{"".join(panels)}</div></figure>'
    )


def pictures(runs: Sequence[Loaded]) -> Html:
    """Each run's reconstructions, inside the page."""
    figures = []
    for run in runs:
        source = f"data:image/png;base64,{base64.b64encode(run.picture).decode()}"
        image = f'<img alt="original, masked image, reconstruction" src="{source}">' if run.picture else NOT_YET
        figures.append(f'<figure class="card"><figcaption>{run.title}</figcaption>\n{image}</figure>')
    return Html(f'<div class="grid">{"".join(figures)}</div>')


def skipped(runs: Sequence[Loaded]) -> Html:
    """How many files of each run could not be read, and the first of them."""
    rows = []
    for run in runs:
        first = "".join(f"<br>{safe(line['path'])} {soft(line['reason'])}" for line in run.skipped[:10])
        more = f"<br>and {len(run.skipped) - 10} more, in skipped.jsonl" if len(run.skipped) > 10 else ""
        rows.append(row(run.title, [Html(f"{len(run.skipped)}{first}{more}")]))
    return table(["run", "skipped"], rows, "long")


def comparison(runs: Sequence[Loaded], settings: Sequence[dict[str, Any]]) -> Html:
    """All settings, those that differ between the runs first and marked."""
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
