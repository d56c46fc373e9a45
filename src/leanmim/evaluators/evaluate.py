"""All measures of a frozen encoder in one table."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from html import escape
from io import StringIO
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from leanmim.config import Evaluate, Evaluator, Knn, Probe
from leanmim.errors import UserError
from leanmim.evaluators.accuracy import Accuracy, Resampled
from leanmim.evaluators.cache import TOKENS, Store, layer_name, storage
from leanmim.evaluators.dense import DRAWS, Dense, Drawn, masked_sets
from leanmim.evaluators.features import Subject, layer_count, record, subjects
from leanmim.evaluators.few_shot import Draws, few_shot
from leanmim.evaluators.knn import knn_accuracy
from leanmim.evaluators.probe import attentive, fast_probe
from leanmim.notebook import framed
from leanmim.page.html import row, soft, table

WIDTH = 80
COLUMNS = 3  # accuracies with their intervals that fit beside each other


class Result(NamedTuple):
    """An accuracy, and its place in the table."""

    order: tuple[int, int]  # kind of measure, number of neighbours, layer, shots
    measure: str
    name: str
    accuracy: Accuracy


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found; printed, a table with a row for each measure and a column for each encoder."""

    title: str
    results: list[Result]

    def __str__(self) -> str:
        text = StringIO()
        console = Console(
            file=text, width=WIDTH, highlight=False, markup=False, force_jupyter=False, force_terminal=False
        )
        console.print(self.title, soft_wrap=True)
        names = list(dict.fromkeys(result.name for result in self.results))
        for first in range(0, len(names), COLUMNS):
            console.print()
            console.print(form_of(self.results, names[first : first + COLUMNS]))
        for note in self.notes:
            console.print(note)
        lines = "\n".join(line.rstrip() for line in text.getvalue().strip("\n").splitlines())
        return lines.encode("utf-8", "backslashreplace").decode()  # the name of a folder need not be text

    def _repr_html_(self) -> str:
        names = list(dict.fromkeys(result.name for result in self.results))
        rows = [row(measure, cells) for measure, *cells in lines_of(self.results, names)]
        return framed(
            f"<p>{escape(self.title)}</p>", table(("measure, %", *names), rows), f"<p>{soft(' '.join(self.notes))}</p>"
        )

    @property
    def notes(self) -> list[str]:
        """What stands in brackets."""
        kinds = {isinstance(result.accuracy, Resampled) for result in self.results}
        texts = {
            False: "In %; in brackets Wilson's 95 % interval, for the choice of validation images.",
            True: f"mIoU and share of pixels, in %; in brackets 95 % of {DRAWS:,} bootstrap draws.",
        }
        return [texts[kind] for kind in sorted(kinds)]


def form_of(results: Sequence[Result], names: Sequence[str]) -> Table:
    """Measures of some encoders, for a terminal."""
    form = Table(box=SIMPLE, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    form.add_column("measure", no_wrap=True)
    for name in names:
        form.add_column(name, overflow="fold", justify="right")
    for line in lines_of(results, names):
        form.add_row(*line)
    return form


def lines_of(results: Sequence[Result], names: Sequence[str]) -> Iterator[list[str]]:
    """For each measure its name and the cells of some encoders."""
    rows: dict[tuple[tuple[int, int], str], dict[str, Accuracy]] = {}
    for result in results:
        rows.setdefault((result.order, result.measure), {})[result.name] = result.accuracy
    for (_, measure), found in sorted(rows.items(), key=lambda item: item[0]):
        yield [measure, *(cell(found.get(name)) for name in names)]
        if spreads := {name: value for name, value in found.items() if isinstance(value, Draws)}:
            count = len(next(iter(spreads.values())).rights)
            deviations = (f"± {100 * spreads[name].deviation:.1f}" if name in spreads else "-" for name in names)
            yield [f"  ± of {count} draws", *deviations]


def cell(accuracy: Accuracy | None) -> str:
    """An accuracy with its interval, in per cent."""
    if accuracy is None:
        return "-"
    low, high = (100 * end for end in accuracy.interval)
    return f"{100 * accuracy:.1f} ({low:.1f}-{high:.1f})"


def evaluate(config: Evaluate) -> Evaluation:
    """kNN over several k, linear probe at several layers, attentive probe and few-shot accuracy of an encoder and baselines;
    with masks, mIoU and pixel accuracy of kNN and linear probe of patches.

    Raises:
        UserError: an encoder or the images cannot be read, or an option does not go with them.
    """
    config.check()
    results: list[Result] = []
    titles: list[str] = []
    if config.data:
        with storage(config) as store:
            for number, subject in enumerate(subjects(config)):
                titles += [] if number else [title_of(config, config.data, subject)]
                results += measures(config, subject, store)
    if config.masks is not None:
        grid = (1, 1)
        for number, subject in enumerate(subjects(config, masked_sets)):
            dense = Dense(config, subject, chosen_layers(config.layers, subject), grid)
            drawn = dense.drawn()
            if not number:
                grid, last = dense.grids[-1], drawn[-1]
                patches = (
                    f"{len(last.features.y):,} of the {last.total:,} training patches, drawn with seed {config.seed}"
                )
                titles.append(f"{title_of(config, config.masks, subject)}; {patches}")
            results += dense_measures(config, dense, drawn)
    return Evaluation("\n".join(titles), results)


def title_of(config: Evaluate, data: str, subject: Subject) -> str:
    """What is measured on which images."""
    count = f"{len(subject.train):,} training and {len(subject.val):,} validation images"
    return f"{config.run} on {data}: {count}, {' x '.join(map(str, subject.size))} px"


def dense_measures(config: Evaluate, dense: Dense, drawn: Sequence[Drawn]) -> Iterator[Result]:
    """mIoU and pixel accuracy of one encoder or baseline, each written down."""
    subject = dense.subject
    shared = {name: asdict(config)[name] for name in ("depth", "input_size", "crop", "void", "seed")}
    found = list(dense.judged(list(dense.measures(drawn))))
    for kind, (name, title) in enumerate((("mIoU", "mIoU"), ("pixel accuracy", "pixels"))):
        for own in found:
            measure = own.measure
            options = shared | measure.options | {"patches": len(drawn[measure.layer].features.y)}
            more = {"data": config.masks, "options": options} | ({} if kind else {"ious": own.ious})
            value = (own.miou, own.accuracy)[kind]
            stored = record(config, f"{name} {measure.what}", subject, value, **more)
            yield Result((5 + 3 * kind + measure.order[0], measure.order[1]), f"{title}, {measure.title}", *stored)


def measures(config: Evaluate, subject: Subject, store: Store) -> Iterator[Result]:
    """All of one encoder, each written down as soon as it is known."""
    layers = chosen_layers(config.layers, subject)
    names = [layer_name(layer) for layer in layers]
    deep = config.attentive and subject.backbone is not None
    train, val = store.pair(subject, also=[*names, *([TOKENS] if deep else [])])
    shared = {own.name: getattr(config, own.name) for own in fields(Evaluator)}
    how = {name: asdict(config)[name] for name in ("depth", "input_size", "crop")} | {"pool": subject.pool}

    for k in sorted({k for k in config.k if k <= len(train.y)}):
        as_knn = Knn(**shared, k=k, temperature=config.temperature)
        found = record(as_knn, "knn", subject, knn_accuracy(train, val, k, config.temperature))
        yield Result((0, k), f"kNN, k = {k}", *found)
    for layer, name in zip(layers, names, strict=True):
        options = how | {"c": config.c, "pool": "avg"}
        accuracy = fast_probe(*store.pair(subject, name), config.c)
        yield Result(
            (1, layer), f"linear, {name}", *record(config, f"linear {name}", subject, accuracy, options=options)
        )
    found = record(Probe(**shared, c=config.c), "probe", subject, fast_probe(train, val, config.c))
    yield Result((2, 0), "linear", *found)
    if deep:
        how_deep: dict[str, Any] = dict(queries=config.queries, epochs=config.epochs, seed=config.seed)
        own = Probe(**shared, solver="attentive", **how_deep)
        found = record(
            own, "attentive", subject, attentive(subject, store, warmup_epochs=own.warmup_epochs, **how_deep)
        )
        yield Result((3, 0), "attentive", *found)
    for shots in sorted(set(config.shots)):
        if shots <= int(np.unique(train.y.cpu().numpy(), return_counts=True)[1].min()):
            drawn = few_shot(train, val, shots, config.draws, config.seed)
            options = how | {"draws": config.draws, "seed": config.seed}
            more = {"options": options, "deviation": drawn.deviation}
            yield Result(
                (4, shots), f"few-shot, {shots} a class", *record(config, f"few-shot {shots}", subject, drawn, **more)
            )


def chosen_layers(layers: Sequence[int], subject: Subject) -> list[int]:
    """The blocks or stages after which a linear probe is fitted too; of a baseline those that it has.

    Raises:
        UserError: the encoder has no such layer.
    """
    if subject.backbone is None or tuple(layers) == (0,):
        return []
    image = torch.zeros(1, subject.train.source.channels, *subject.size, device=subject.normalise.device)
    count = layer_count(subject.backbone, image)
    if not layers:
        return sorted({round(count * share) for share in (0.25, 0.5, 0.75)} - {0, count})
    wrong = [layer for layer in layers if not 0 < layer <= count]
    if wrong and subject.name == "pretrained":
        raise UserError(
            f"--layers {wrong[0]}: this encoder has {count} blocks or stages; choose among them, or leave it out"
        )
    return sorted(set(layers) - set(wrong))
