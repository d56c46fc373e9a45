"""Costs of several recipes side by side."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from io import StringIO
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from leanmim.config import Cost, Pretrain
from leanmim.costs.counting import StepCost, count
from leanmim.costs.flops import Flops
from leanmim.encoders.backbone import check_name
from leanmim.errors import UserError
from leanmim.names import sides
from leanmim.notebook import Text, framed
from leanmim.page.html import row, table
from leanmim.pipeline import speed_up
from leanmim.progress import track
from leanmim.recipes import RECIPES, titles, variant

MOST = 8  # processes of a pipeline that are spoken of


@dataclass(frozen=True)
class Uncounted:
    """A configuration whose step cannot be counted, and why."""

    title: str
    recipe: str
    model: str
    input_size: tuple[int, ...]
    error: str


@dataclass(frozen=True)
class Comparison:
    """Costs of several configurations; printed, tables with the ratios to the first one."""

    entries: list[StepCost | Uncounted]
    """One for each configuration, in their order."""
    flops: list[dict[str, Flops]]
    """Of an image, for each of `costs`: ``forward`` or ``training``, then by part."""

    @property
    def costs(self) -> list[StepCost]:
        """Of the configurations that could be counted."""
        return [entry for entry in self.entries if isinstance(entry, StepCost)]

    @property
    def uncounted(self) -> list[Uncounted]:
        """The other ones."""
        return [entry for entry in self.entries if isinstance(entry, Uncounted)]

    def __str__(self) -> str:
        return tables(self.costs, self.flops, self.uncounted)

    def _repr_html_(self) -> str:
        parts = [f"<p>{escape(same_step(self.costs))}</p>"]
        for title, columns in TABLES.items():
            head, *lines = lines_of(columns, self.costs, self.flops)
            parts += [f"<p><b>{title}</b></p>", table(head, [row(name, cells) for name, *cells in lines])]
        notes = (*pipelined(self.costs), assumed(self.costs), *map(reason, self.uncounted))
        return framed(*parts, *(f"<p>{escape(note)}</p>" for note in notes))

    def json(self) -> str:
        """A list with one object for each configuration; one that cannot be counted has an "error"."""
        return json.dumps([asdict(entry) for entry in self.entries], indent=2)


def compare(configs: Sequence[Pretrain], device: str = "cpu") -> Comparison:
    """Count the training steps of several configurations.

        print(compare([MAE, replace(PR_MIM, throw=0.7)]))

    Args:
        configs: the first is what the others are compared with; a batch size of ``auto`` is counted as `Cost`'s 256.
        device: ``cpu`` or ``cuda``; the machine need not have it.

    Returns:
        The costs, and why those configurations that cannot be built have none. Titles say what differs from the recipe, or
        among the configurations.

    Raises:
        UserError: not one of them can be counted.
    """
    configs = [replace(c, batch_size=Cost.batch_size) if c.batch_size == "auto" else c for c in configs]
    entries: list[StepCost | Uncounted] = []
    flops = []
    for config, title in track(zip(configs, titles(configs), strict=True), "counting", len(configs)):
        try:
            cost, own = count(config, device)
        except UserError as error:
            entries.append(Uncounted(title, config.recipe, config.model, config.input_size, str(error)))
        else:
            entries.append(replace(cost, title=title))
            flops.append(own)
    compared = Comparison(entries, flops)
    if compared.uncounted and not compared.costs:
        raise UserError("\n".join(map(reason, compared.uncounted)))
    return compared


def reason(entry: Uncounted) -> str:
    """Why it cannot be counted, with the size at which it was tried."""
    return f"{entry.title} cannot be counted at {sides(entry.input_size)} px: {entry.error}"


def cost(config: Cost) -> str:
    """The cost of recipes, as tables against the first one, or as JSON.

    Raises:
        UserError: the model, a recipe or an option of it is unknown, or none goes with the model and the input size.
    """
    config.check()
    check_name(config.model)
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    configs = [variant(spec, config, without=("device",)) for spec in config.recipes or RECIPES]
    compared = compare(configs, device)
    if config.json:
        return compared.json()
    lines = [str(compared)]
    offloaded = [entry.title for entry, own in zip(compared.entries, configs, strict=True) if own.offload]
    if offloaded and device == "cpu":
        lines.append(f"{', '.join(offloaded)}: nothing to offload: cpu has no memory of its own")
    return Text("\n".join(lines), compared._repr_html_)


Column = tuple[str, Callable[[StepCost, dict[str, Flops]], Any], str]  # heading, value, format


def training(part: str) -> Callable[[StepCost, dict[str, Flops]], float]:
    """Training GFLOP of a part of the model."""
    return lambda _, flops: flops["training"][part] / 1e9


def mebibytes(kind: str) -> Callable[[StepCost, dict[str, Flops]], float]:
    """Bytes of a kind, in MiB."""
    return lambda cost, _: getattr(cost, f"{kind}_bytes") / 2**20


TABLES: dict[str, tuple[Column, ...]] = {  # title -> columns; the first one is compared with the first recipe's
    "Memory at the peak, MiB (saved: for the backward pass)": (
        ("all", mebibytes("peak"), ",.0f"),
        ("weights", mebibytes("weight"), ",.0f"),
        ("gradients", mebibytes("gradient"), ",.0f"),
        ("optimizer", mebibytes("optimizer"), ",.0f"),
        ("saved", mebibytes("saved"), ",.0f"),
        ("transient", mebibytes("transient"), ",.0f"),
    ),
    "Training, GFLOP an image": (
        ("all", lambda cost, _: cost.train_flops_per_image / 1e9, ",.2f"),
        ("encoder", training("encoder"), ",.2f"),
        ("decoder", training("decoder"), ",.2f"),
        ("target", training("target"), ",.2f"),
        ("forward", lambda cost, _: cost.forward_flops_per_image / 1e9, ",.2f"),
    ),
    "Parameters, M, and tokens of an image": (
        ("all", lambda cost, _: (cost.encoder_parameters + cost.decoder_parameters) / 1e6, ",.2f"),
        ("encoder", lambda cost, _: cost.encoder_parameters / 1e6, ",.2f"),
        ("decoder", lambda cost, _: cost.decoder_parameters / 1e6, ",.2f"),
        ("input, px", lambda cost, _: ", ".join(map(sides, cost.input_sizes)), ""),
        ("encoder tokens", lambda cost, _: cost.encoder_tokens, ",.0f"),
        ("decoder tokens", lambda cost, _: cost.decoder_tokens, ",.0f"),
    ),
}


def tables(costs: list[StepCost], flops: list[dict[str, Flops]], uncounted: Sequence[Uncounted] = ()) -> str:
    """One row for each recipe, as wide as the terminal."""
    text = StringIO()
    console = Console(file=text, highlight=False, markup=False, force_jupyter=False, force_terminal=False)
    console.print(same_step(costs), soft_wrap=True)
    for title, columns in TABLES.items():
        form = Table(box=SIMPLE, padding=(0, 1, 0, 0), show_edge=False)
        (recipe, *headings), *lines = lines_of(columns, costs, flops)
        form.add_column(recipe, overflow="fold")
        for heading in headings:
            form.add_column(heading, justify="right")
        for line in lines:
            form.add_row(*line)
        console.print(f"\n{title}\n", form, sep="\n")
    console.print()
    for note in (*pipelined(costs), assumed(costs)):
        console.print(note)
    for entry in uncounted:
        console.print(reason(entry), soft_wrap=True)
    return "\n".join(line.rstrip() for line in text.getvalue().strip("\n").splitlines())


def pipelined(costs: list[StepCost]) -> Iterator[str]:
    """How fast several processes can be, for each recipe in segments."""
    for cost in costs:
        if (count := len(cost.segment_flops)) > 1:
            speeds = (f"{speed_up(cost.segment_flops, n):.2f} with {n}" for n in range(2, min(count, MOST) + 1))
            yield f"{cost.title}: speed-up by --pipeline, at most, by the number of processes: {', '.join(speeds)}"


def lines_of(columns: Sequence[Column], costs: list[StepCost], flops: list[dict[str, Flops]]) -> Iterator[list[str]]:
    """The headings of a table, then the cells of each recipe."""
    (heading, first, _), *others = columns
    yield ["recipe", heading, "ratio", *(column[0] for column in others)]
    for cost, own in zip(costs, flops, strict=True):
        value, *rest = (f"{read(cost, own):{how}}" for _, read, how in columns)
        yield [cost.title, value, f"{first(cost, own) / first(costs[0], flops[0]):.2f}", *rest]


def same_step(costs: list[StepCost]) -> str:
    """What the rows share."""
    return f"One training step, {same(costs, 'model')}, batch {same(costs, 'batch_size')}"


def assumed(costs: list[StepCost]) -> str:
    """The allocator for which memory is counted."""
    return f"Memory is counted for {same(costs, 'allocator')}."


def same(costs: list[StepCost], name: str) -> str:
    """The value that the rows share, or all values."""
    return " / ".join(dict.fromkeys(str(getattr(cost, name)) for cost in costs))
