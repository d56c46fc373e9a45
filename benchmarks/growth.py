"""Accuracy against the budget, drawn from the results of ablate.py's photos-growth-... into docs/growth.png.

python benchmarks/growth.py vit_tiny_patch16_224-cpu
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from record import RESULTS

PICTURE = Path(__file__).parents[1] / "docs" / "growth.png"
MEASURES = {"finetune": "fine-tuned with a tenth of the labels", "attentive": "attentive probe"}
TFLOP = 41 / 15  # a minute of one core, as ablate.py has it
COLOURS = ("#2f7fd1", "#e07b00", "#1a9e6f", "#c2559d")


def found(ending: str) -> dict[float, list[dict[str, Any]]]:
    """The rows of each budget, by its minutes."""
    files = {float(match[1]): file for file in RESULTS.glob(f"photos-growth-*-{ending}.json")
             if (match := re.match(r"photos-growth-(\d+)-", file.name))}  # fmt: skip
    if not files:
        raise SystemExit(f"there is no photos-growth-...-{ending}.json in {RESULTS}; ablate.py makes them")
    return {minutes: json.loads(files[minutes].read_text())["raw"] for minutes in sorted(files)}


def draw(budgets: dict[float, list[dict[str, Any]]]) -> Figure:
    """A panel for each measure: a line for each recipe, dashed what was not pre-trained; bars are the tables' spreads, side by side."""
    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    names = list(dict.fromkeys(row["name"] for rows in budgets.values() for row in rows if row["kind"] == "recipe"))
    for axes, (measure, title) in zip(figure.subplots(1, 2), MEASURES.items(), strict=True):
        for place, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
            own = [(minutes * 1.02 ** (place - 1), row["scores"][measure]) for minutes, rows in budgets.items() for row in rows
                   if row["name"] == name and measure in row["scores"]]  # fmt: skip
            x, y = [minutes for minutes, _ in own], [100 * score["value"] for _, score in own]
            ends = [[100 * (s["value"] - s["low"]) for _, s in own], [100 * (s["high"] - s["value"]) for _, s in own]]
            axes.errorbar(x, y, ends, color=colour, marker="o", markersize=4, capsize=3, label=name)
        untrained = [row["scores"][measure]["value"] for rows in budgets.values() for row in rows
                     if row["kind"] == "untrained" and measure in row["scores"]]  # fmt: skip
        if untrained:
            axes.axhline(100 * untrained[-1], color="#7a8594", linestyle="--", label="not pre-trained")
        ticks = [f"{minutes * TFLOP:.0f}\n({minutes:g} min)" for minutes in budgets]
        axes.set(xscale="log", xticks=list(budgets), xticklabels=ticks)
        axes.minorticks_off()
        axes.set(
            xlabel="pre-training, TFLOP (minutes of one core, about)", ylabel="accuracy at 128 px (%)", title=title
        )
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


if __name__ == "__main__":
    draw(found(sys.argv[1])).savefig(PICTURE)
    print(PICTURE)
