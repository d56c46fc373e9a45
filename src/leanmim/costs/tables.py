"""Costs of several recipes side by side."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from io import StringIO

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from leanmim.config import Cost, Pretrain
from leanmim.costs.counting import StepCost, count
from leanmim.costs.flops import Flops
from leanmim.recipes import RECIPES, titles, variant

Row = tuple[
    str, list[int | float], Callable[[int | float], str]
]  # what, its value for each recipe, how a value is written


@dataclass(frozen=True)
class Comparison:
    """Costs of several configurations; printed, a table with the ratios to the first one."""

    costs: list[StepCost]
    flops: list[dict[str, Flops]]
    """Of an image, for each configuration: ``forward`` or ``training``, then by part."""

    def __str__(self) -> str:
        return table(self.costs, self.flops)

    def json(self) -> str:
        """A list with one object for each configuration."""
        return json.dumps([asdict(cost) for cost in self.costs], indent=2)


def compare(configs: Sequence[Pretrain], device: str = "cpu") -> Comparison:
    """Count the training steps of several configurations.

        print(compare([MAE, replace(PR_MIM, throw=0.7)]))

    Args:
        configs: the first is what the others are compared with.
        device: ``cpu`` or ``cuda``; the machine need not have it.

    Returns:
        The costs. Their titles say what differs from the recipe, or among the configurations.

    Raises:
        UserError: one of them cannot be built or counted.
    """
    counted = [count(config, device) for config in configs]
    named = zip(counted, titles(configs), strict=True)
    return Comparison([replace(cost, title=title) for (cost, _), title in named], [flops for _, flops in counted])


def cost(config: Cost) -> str:
    """The cost of recipes, as a table against the first one, or as JSON.

    Raises:
        UserError: a recipe or an option of it is unknown, or does not go with the model or the input size.
    """
    config.check()
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    configs = [variant(spec, config, without=("device",)) for spec in config.recipes or RECIPES]
    compared = compare(configs, device)
    if config.json:
        return compared.json()
    lines = [str(compared)]
    offloaded = [entry.title for entry, own in zip(compared.costs, configs, strict=True) if own.offload]
    if offloaded and device == "cpu":
        lines.append(f"{', '.join(offloaded)}: nothing to offload: cpu has no memory of its own")
    return "\n".join(lines)


def readable(size: int | float) -> str:
    """Bytes for people, in MiB or GiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def table(costs: list[StepCost], flops: list[dict[str, Flops]]) -> str:
    """One column for each recipe; from the second on with the ratio to the first."""
    form = Table(box=SIMPLE)
    form.add_column("")
    for cost in costs:
        form.add_column(cost.title, justify="right", max_width=24)
    for name, values, write in rows(costs, flops):
        ratios = ["", *(f" ({value / values[0]:4.2f})" if values[0] else "" for value in values[1:])]
        form.add_row(name, *(write(value) + ratio for value, ratio in zip(values, ratios, strict=True)))
    text = StringIO()
    Console(file=text, width=40 + 24 * len(costs), highlight=False, markup=False).print(form)
    lines = [
        f"One training step, {same(costs, 'model')}, batch {same(costs, 'batch_size')}",
        text.getvalue().strip("\n"),
    ]
    return "\n".join(line.rstrip() for line in "\n".join(lines).splitlines())


def same(costs: list[StepCost], name: str) -> str:
    """The value that the columns share, or all values."""
    return " / ".join(dict.fromkeys(str(getattr(cost, name)) for cost in costs))


def rows(costs: list[StepCost], flops: list[dict[str, Flops]]) -> list[Row]:
    """The rows of the table."""
    found: list[Row] = []

    def row(name: str, values: Iterable[int | float], write: Callable[[int | float], str]) -> None:
        found.append((name, list(values), write))

    for name in ("forward", "training"):
        row(f"{name}, GFLOP an image", (sum(f[name].values()) / 1e9 for f in flops), "{:.2f}".format)
        for part in ("encoder", "decoder", "target"):
            row(f"  {part}", (f[name][part] / 1e9 for f in flops), "{:.2f}".format)
    for part in ("encoder", "decoder"):
        row(f"{part} parameters, M", (getattr(c, f"{part}_parameters") / 1e6 for c in costs), "{:.2f}".format)
    for kind, title in (
        ("weight", "weights"), ("gradient", "gradients"), ("optimizer", "optimizer state"),
        ("saved", "saved for backward, peak"), ("transient", "transient, peak"), ("peak", "all together, peak"),
    ):  # fmt: skip
        row(title, (getattr(c, f"{kind}_bytes") for c in costs), readable)
    for part in ("encoder", "decoder"):
        row(f"{part} tokens an image", (getattr(c, f"{part}_tokens") for c in costs), "{:.0f}".format)
    return found
