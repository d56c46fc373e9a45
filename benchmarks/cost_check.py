"""`leanmim cost` against what a real step allocates: peak, and bytes saved for backward.

    python benchmarks/cost_check.py

On a CPU every allocation and release of torch's allocator is counted by its profiler, what kernels take for themselves
included; on a GPU the allocator reports its own peak. Each configuration is a process of its own.
"""

import argparse
from dataclasses import replace
from itertools import product

import record
import torch
from steps import measure_each

from leanmim.recipes import RECIPES, published

MODELS = ("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224", "swin_tiny_patch4_window7_224")


def main() -> None:
    """All configurations, one after the other; write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--recipes", nargs="+", default=["mae", "simmim"])
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--accums", nargs="+", type=int, default=[1, 2])
    arguments = parser.parse_args()
    rows, raw = [], []
    axes = (arguments.models, arguments.recipes, arguments.batches, arguments.accums, ("fp32", "bf16"))
    cells = [cell for cell in product(*axes) if not (cell[0].startswith("swin") and cell[1] == "mae")]  # cannot drop
    configs = [
        replace(published(RECIPES[recipe]), model=name, batch_size=batch, accum=accum, precision=precision)
        for name, recipe, batch, accum, precision in cells
    ]
    for cell, found in zip(cells, measure_each(configs, torch.device(arguments.device)), strict=True):
        name, recipe, batch, accum, precision = cell
        raw.append({"configuration": cell, **found})
        rows.append({
            "model": name, "recipe": recipe, "batch": batch, "accum": accum, "precision": precision,
            "peak, predicted MiB": f"{found['predicted_peak'] / 2**20:.0f}",
            "measured MiB": f"{found['peak'] / 2**20:.0f}", "ratio": f"{found['predicted_peak'] / found['peak']:.3f}",
            "saved, predicted MiB": f"{found['predicted_saved'] / 2**20:.0f}",
            "measured, MiB": f"{found['saved'] / 2**20:.0f}",
            "ratio ": f"{found['predicted_saved'] / found['saved']:.3f}",
        })  # fmt: skip
        print(rows[-1], flush=True)
    worst = {
        kind: max(abs(1 - entry[f"predicted_{kind}"] / entry[kind]) for entry in raw) for kind in ("peak", "saved")
    }
    note = (
        f"Largest error: peak {worst['peak']:.1%} (target 10 %), saved for backward {worst['saved']:.1%} (target 3 %)."
    )
    configuration = {"device": arguments.device, "input": "each recipe's own", "threads": torch.get_num_threads()}
    record.write(f"cost-check-{arguments.device}", "Predicted against measured memory of a training step",
                 configuration, rows, raw, note)  # fmt: skip


if __name__ == "__main__":
    main()
