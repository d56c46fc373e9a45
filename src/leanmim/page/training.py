"""How the training of runs went: a table, and curves."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from statistics import median
from typing import Any

from leanmim.config import Finetune, Pretrain
from leanmim.names import sides
from leanmim.page.accuracies import percent
from leanmim.page.charts import Curve, chart
from leanmim.page.html import NOT_YET, Html, row, safe, soft, table
from leanmim.page.load import AXES, Finetuned, Loaded, Pretrained, by_kind, finetuned, pretrained
from leanmim.progress import duration

MACHINE_CHARTS = (  # key in metrics.jsonl, title with unit, factor to that unit, whether the axis includes 0
    ("lr", "learning rate (10⁻³)", 1e3, True),
    ("images_per_second", "speed (images/s)", 1, True),
    ("memory_bytes", "memory of process or GPU (GiB)", 2**-30, True),
    ("data_wait", "waiting for data (% of time)", 100, True),
)
PRETRAIN_CHARTS = (("loss", "loss", 1, False), ("knn", "online kNN accuracy (%)", 100, False), *MACHINE_CHARTS)
FINETUNE_CHARTS = (
    ("val_top1", "validation top-1 accuracy (%)", 100, False),
    ("val_loss", "validation loss", 1, False),
    ("loss", "training loss", 1, False),
    *MACHINE_CHARTS,
)
LOSS_DEPENDS_ON = (
    "recipe", "target", "hog_cell", "loss", "mask_ratio", "mask_unit", "segments", "throw", "select", "fill",
)  # fmt: skip
FINETUNE_LOSS_DEPENDS_ON = ("class_weights", "mixup", "cutmix", "smoothing", "randaugment", "erase", "crop_scale")
MACHINE_TITLES = (
    "images/s, median", "waiting for data (%)", "memory of process or GPU (GiB)", "training time (h:min:s)", "device",
)  # fmt: skip


def each_kind(runs: Sequence[Loaded], section: Callable[[Sequence[Loaded]], Html]) -> Html:
    """A section, made for pre-training and fine-tuning apart: they have other columns, and losses of other meaning."""
    kinds = by_kind(runs)
    if len(kinds) == 1:
        return section(runs)
    return Html("\n".join(f"<h3>{heading}</h3>\n{section(own)}" for heading, own in kinds.items()))


def summary(runs: Sequence[Loaded]) -> Html:
    """One row for each run."""
    return each_kind(runs, lambda own: Html(pretrain_summary(pretrained(own)) + finetune_summary(finetuned(own))))


def pretrain_summary(runs: Sequence[Pretrained]) -> Html:
    """One row for each run of `leanmim pretrain`."""
    head = ("run", "recipe", "model", "input (px)", "epochs", "images seen", "loss", "kNN (%)", *MACHINE_TITLES)
    rows = []
    for run in runs:
        lines, arguments = run.lines("loss"), run.config.model_kwargs
        more = f'<br><span class="soft">{safe(arguments)}</span>' if arguments else ""
        model = Html(f"{safe(run.config.model)}{more}")
        cells: list[Any] = [run.config.recipe, model, sides(run.config.input_size)]
        if lines:
            cells += [
                f"{lines[-1]['epoch']:.4g} / {run.config.epochs}",
                f"{sum(line['images_per_second'] * line['seconds'] for line in lines):,.0f}",
                f"{lines[-1]['loss']:.4f}",
                knn(run),
            ]
        else:
            cells += [NOT_YET] * 4
        rows.append(row(run.title, cells + machine_cells(run)))
    return table(head, rows, "short") if rows else Html("")


def knn(run: Pretrained) -> str:
    """The accuracy that was measured last, while training or by `leanmim knn`."""
    if later := [line for line in run.evaluations if (line["what"], line["name"]) == ("knn", "pretrained")]:
        return percent(later[-1])
    if online := run.lines("knn"):
        return percent(online[-1], "knn")
    return NOT_YET if run.config.knn_data else "-"


def finetune_summary(runs: Sequence[Finetuned]) -> Html:
    """One row for each run of `leanmim finetune`."""
    head = (
        "run", "recipe", "input (px)", "training images", "classes", "epochs", "training loss", "top-1 (%)",
        *MACHINE_TITLES, "start",
    )  # fmt: skip
    rows = []
    for run in runs:
        lines, labels = run.lines("loss"), run.labels
        rows.append(row(run.title, [
            run.config.recipe,
            sides(run.config.input_size) or "-",
            f"{len(labels['train']):,}" if labels else NOT_YET,
            len(labels["classes"]) if labels else NOT_YET,
            f"{lines[-1]['epoch']:.4g} / {run.config.epochs}" if lines else NOT_YET,
            f"{lines[-1]['loss']:.4f}" if lines else NOT_YET,
            top1(run),
            *machine_cells(run),
            run.config.start,
        ]))  # fmt: skip
    return table(head, rows, "short notes") if rows else Html("")


def top1(run: Finetuned) -> str:
    """The accuracy at the end, or the best one so far."""
    if run.results:
        return percent({"value": run.results["top1"], "interval": run.results["top1_interval"]})
    if not (lines := run.lines("val_top1")):
        return NOT_YET
    best = max(lines, key=lambda line: line["val_top1"])
    ends = [best[key] for key in ("val_low", "val_high") if key in best]
    return f"{percent({'value': best['val_top1'], 'interval': ends})}, best so far"


def summary_of(run: Loaded) -> str:
    """One run in one line."""
    config, lines = run.config, run.lines("loss")
    assert isinstance(config, Pretrain | Finetune)
    start = config.model if isinstance(config, Pretrain) else f"from {config.start}"
    parts = [config.recipe, start, f"{sides(config.input_size)} px"]
    if lines:
        parts.append(
            f"{lines[-1]['epoch']:.4g} of {config.epochs} epochs in {duration(sum(line['seconds'] for line in lines))}"
        )
        parts.append(f"loss {lines[-1]['loss']:.4f}")
    if isinstance(run, Pretrained):
        parts += [f"kNN {knn(run)} %"] if run.lines("knn") else []
    elif isinstance(run, Finetuned):
        parts.append(f"accuracy {top1(run)} %")
    return ", ".join(map(str, parts))


def machine_cells(run: Loaded) -> list[Any]:
    """Speed, waiting for data, memory, time and device of a run."""
    lines, device = run.lines("loss"), run.environment.get("device", NOT_YET)
    if not lines:
        return [NOT_YET] * 4 + [device]
    seconds = sum(line["seconds"] for line in lines)
    return [
        f"{median(line['images_per_second'] for line in lines):,.0f}",
        f"{100 * sum(line['data_wait'] * line['seconds'] for line in lines) / seconds:.1f}",
        f"{max(line['memory_bytes'] for line in lines) / 2**30:.2f}",
        str(timedelta(seconds=round(seconds))),
        device,
    ]


def training(runs: Sequence[Loaded]) -> Html:
    """Metrics against epochs, and accuracy and loss against images, time and FLOPs: a chart for each metric with all runs of a kind in it, under one legend."""
    return each_kind(runs, curves)


def curves(runs: Sequence[Loaded]) -> Html:
    """The charts of runs of one kind."""
    if not any(run.metrics for run in runs):
        return Html(f"<p>{NOT_YET}</p>")
    fine, drawn, notes, shown = bool(finetuned(runs)), [], [], set[str]()
    empty = "not yet" if any(run.config.knn_data for run in pretrained(runs)) else "no run has --knn-data"
    if any(segment_losses(run) for run in runs):
        notes.append("Thin lines: the loss of each segment, the deeper the stronger.")
    charts = FINETUNE_CHARTS if fine else PRETRAIN_CHARTS
    for key, title, factor, zero in charts:
        for axis in AXES if (key, title, factor, zero) not in MACHINE_CHARTS else AXES[:1]:
            lines = lines_of(runs, key, factor, axis)
            if lines or axis == AXES[0]:
                heading = title if axis == AXES[0] else f"{title} against {axis}"
                svg = chart(heading, lines, zero, empty if key == "knn" else "not yet", axis)
                drawn.append(f'<figure class="card x{AXES.index(axis)}">{svg}</figure>')
                shown.add(axis)
    depends_on = FINETUNE_LOSS_DEPENDS_ON if fine else LOSS_DEPENDS_ON
    if differing := [key for key in depends_on if len({str(getattr(run.config, key)) for run in runs}) > 1]:
        losses = "training losses" if fine else "losses"
        notes.append(f"The runs differ in {', '.join(differing)}: compare their accuracies, not their {losses}.")
    legend = "".join(f"<span>{run.title}</span>" for run in runs)
    remarks = "".join(f"<p>{soft(note)}</p>" for note in notes)
    choice = axis_choice("finetuning" if fine else "pretraining", [axis for axis in AXES if axis in shown])
    return Html(
        f'<div class="legend">{legend}</div>{remarks}<div>{choice}<div class="grid charts">{"".join(drawn)}</div></div>'
    )


def lines_of(runs: Sequence[Loaded], key: str, factor: int | float, axis: str = AXES[0]) -> list[Curve]:
    """A metric of each run that has it, times a factor; of the loss also that of each segment."""
    lines = [line for run in runs for line in segment_losses(run, axis)] if key == "loss" else []
    lines += [Curve([(x, y * factor) for x, y in run.values(key, axis)], run.colour, run.name) for run in runs]
    return [line for line in lines if line.points]


def axis_choice(name: str, axes: Sequence[str]) -> str:
    """Buttons for the horizontal axis; the style sheet shows the charts of the one that is chosen."""
    if len(axes) < 2:
        return ""
    return "".join(
        f'<input type="radio" class="x{(i := AXES.index(axis))}" name="{name}" id="{name}{i}"{" checked" if i == 0 else ""}>'
        f'<label for="{name}{i}">{axis}</label>'
        for axis in axes
    )


def segment_losses(run: Loaded, axis: str = AXES[0]) -> list[Curve]:
    """The loss of each segment; empty where the run has one segment."""
    count = len({name for line in run.metrics for name in line if name.startswith("loss_")})
    return [
        Curve(run.values(f"loss_{i}", axis), run.colour, f"{run.name}, segment {i}", 1.0, 0.8 * (i + 1) / count)
        for i in range(count)
    ]
