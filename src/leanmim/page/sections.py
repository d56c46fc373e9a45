"""The sections of the page: each is a function from runs to HTML, empty where there is nothing to show."""

from collections.abc import Callable, Sequence
from typing import Any

from leanmim.errors import UserError
from leanmim.names import one_line
from leanmim.page.accuracies import accuracies, depths
from leanmim.page.html import NOT_YET, Html, picture, png, row, safe, soft, table
from leanmim.page.load import Loaded, finetuned, pretrained
from leanmim.page.results import results
from leanmim.page.training import each_kind, summary, training
from leanmim.pictures.over_time import in_columns

RECIPE = (  # settings that a recipe of fine-tuning gives
    "recipe", "epochs", "batch_size", "accum", "blr", "lr", "min_lr", "schedule", "weight_decay", "betas",
    "clip_grad", "layer_decay", "drop_path", "mixup", "cutmix", "smoothing", "randaugment", "erase", "crop_scale", "flip",
    "ema", "class_weights", "pool",
)  # fmt: skip

CAPTIONS = {
    "features": "patch features as colours; equal colours, equal features",
    "attention": "attention of the last block",
    "neighbours": "images, and those with the nearest features",
    "map": "images by their features, in two dimensions",
}
"""Of the pictures that a run folder may hold, in their order."""


def costs(runs: Sequence[Loaded]) -> Html:
    """The cost predicted before the run next to the measured one, a row for each run."""
    head = (
        "run", "peak memory, predicted (GiB)", "peak memory, measured (GiB)", "weights", "gradients", "optimizer",
        "saved for backward", "transient", "GFLOP an image", "images/s, measured", "GFLOP/s, measured",
    )  # fmt: skip
    rows = []
    for run in [*pretrained(runs), *(run for run in finetuned(runs) if run.cost)]:
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
    note = (
        "Measured on a GPU: its allocator's peak. Elsewhere: what the process grew by since it had no model; the whole process, with "
        "Python and libraries, is in the summary."
    )
    return Html(f"{table(head, rows, 'short')}<p>{soft(note)}</p>" if rows else "")


def reconstructions(runs: Sequence[Loaded]) -> Html:
    """The reconstructions.png of each run of pre-training, embedded in the page."""
    figures = []
    for run in pretrained(runs):
        own = run.reconstructions
        image = picture(own, "original, masked image, reconstruction") if own else NOT_YET
        figures.append(f'<figure class="card"><figcaption>{run.title}</figcaption>\n{image}</figure>')
    return Html(f'<div class="grid">{"".join(figures)}</div>' if figures else "")


def over_time(runs: Sequence[Loaded]) -> Html:
    """What each run of pre-training reconstructed of the same images as it went: a column for each step, a run below the other."""
    figures = []
    for run in pretrained(runs):
        if not run.strips:
            continue
        try:
            columns, _ = in_columns(run.strips)
        except UserError as error:
            columns, remark = {}, soft(str(error))
        else:
            remark = Html("")
        shown = "".join(f"<div>{title}{picture(png(image), title)}</div>" for title, image in columns.items())
        figures.append(
            f'<figure class="card"><figcaption>{run.title}</figcaption>\n<div class="strips">{shown}{remark}</div></figure>'
        )
    return Html("\n".join(figures))


def pictures(runs: Sequence[Loaded]) -> Html:
    """What else was drawn of each run, with a caption."""
    figures = [
        f'<figure class="card"><figcaption>{run.title}: {caption}</figcaption>\n{picture(run.pictures[name], caption)}</figure>'
        for name, caption in CAPTIONS.items()
        for run in runs
        if name in run.pictures
    ]
    return Html(f'<div class="grid">{"".join(figures)}</div>' if figures else "")


def skipped(runs: Sequence[Loaded]) -> Html:
    """The number of files that each run could not read, and the first ten of them."""
    rows = []
    for run in runs:
        first = "".join(f"<br>{safe(line['path'])} {soft(line['reason'])}" for line in run.skipped[:10])
        more = f"<br>and {len(run.skipped) - 10} more, in skipped.jsonl" if len(run.skipped) > 10 else ""
        rows.append(row(run.title, [Html(f"{len(run.skipped)}{first}{more}")]))
    return table(["run", "skipped"], rows, "long")


def changes(runs: Sequence[Loaded]) -> Html:
    """What was another when a run was continued: images that had changed, options."""
    rows = [row(run.title, [line.get("step"), *change(line)]) for run in runs for line in run.changes]
    return table(["run", "after step", "what", "change"], rows, "long") if rows else Html("")


def change(line: dict[str, Any]) -> tuple[str, Html]:
    """What changed, and how, by a line of changes.jsonl."""
    if "option" in line:
        return str(line["option"]), safe(f"{line.get('before')} before, {line.get('now')} from then on")
    counts = [f"{line[kind]} {kind}" for kind in ("added", "removed", "changed") if line.get(kind)]
    names = [name for found in line.get("names", {}).values() for name in found]
    more = ", ..." if len(names) > 10 else ""
    return "images", Html(
        f"{safe(', '.join(counts) or 'another order')}<br>{soft(', '.join(map(one_line, names[:10])) + more)}"
    )


def recipe(runs: Sequence[Loaded]) -> Html:
    """What the recipe of each fine-tuned run has been resolved to."""
    own = finetuned(runs)
    settings = [
        {k: v for k, v in run.config.to_json().items() if k in RECIPE and v is not None}
        | {"warmup_epochs": run.config.warmup}
        for run in own
    ]
    return comparison(own, settings) if own else Html("")


def configuration(runs: Sequence[Loaded]) -> Html:
    """All settings."""
    return each_kind(runs, lambda own: comparison(own, [run.config.to_json() for run in own]))


def environment(runs: Sequence[Loaded]) -> Html:
    """Versions, hardware, command line."""
    return comparison(runs, [run.environment for run in runs])


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
    "Results of fine-tuning": results,
    "Training": training,
    "Cost, predicted and measured": costs,
    "Accuracy on labelled images, encoder frozen": accuracies,
    "Accuracy against depth": depths,
    "Reconstructions": reconstructions,
    "Reconstructions over training time": over_time,
    "Pictures": pictures,
    "Recipe of fine-tuning": recipe,
    "Unreadable files": skipped,
    "Changed while training": changes,
    "Configuration": configuration,
    "Environment": environment,
}
"""The sections in their order, by their headings."""
