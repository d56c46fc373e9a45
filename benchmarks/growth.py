"""Accuracy against the budget, drawn from the results of ablate.py's photos-budget-... and photos-quarter into docs/growth.png.

python benchmarks/growth.py vit_tiny_patch16_224-cpu
"""

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from record import RESULTS

PICTURE = Path(__file__).parents[1] / "docs" / "growth.png"
MEASURES = {"finetune": "fine-tuned with a tenth of the labels", "attentive": "attentive probe"}
FILES = {  # ablate.py's, by their minutes
    7: ("photos-budget-7",),
    15: ("photos-quarter", "photos-quarter-224"),
    30: ("photos-budget-30",),
    60: ("photos-budget-60",),
}
LINES = {  # what a recipe is called in the picture: how its rows' names begin; photos-quarter-224 has one recipe, and names no size
    "MAE at 224 px": ("mae input-size=224", "mae blr"),
    "MAE at 128 px, the rival": ("mae input-size=128",),
    "lean (96 px)": ("lean input-size=96", "mae input-size=96"),
}
TFLOP = 41 / 15  # a minute of one core, as ablate.py has it
COLOURS = ("#2f7fd1", "#e07b00", "#1a9e6f")


def found(ending: str) -> dict[int, list[dict[str, Any]]]:
    """The rows of each budget, by its minutes."""
    budgets: dict[int, list[dict[str, Any]]] = {}
    for minutes, names in FILES.items():
        files = [RESULTS / f"{name}-{ending}.json" for name in names]
        if missing := [file for file in files if not file.is_file()]:
            raise SystemExit(f"there is no {missing[0]}; ablate.py makes it")
        budgets[minutes] = [row for file in files for row in json.loads(file.read_text())["raw"]]
    return budgets


def draw(budgets: dict[int, list[dict[str, Any]]]) -> Figure:
    """A panel for each measure: a line for each recipe, dashed what was not pre-trained; bars are the tables' spreads, side by side."""
    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    for axes, (measure, title) in zip(figure.subplots(1, 2), MEASURES.items(), strict=True):
        for place, (name, colour) in enumerate(zip(LINES, COLOURS, strict=True)):
            own = [(minutes * 1.02 ** (place - 1), row["scores"][measure]) for minutes, rows in budgets.items() for row in rows
                   if row["name"].startswith(LINES[name]) and measure in row["scores"]]  # fmt: skip
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
