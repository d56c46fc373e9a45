"""What recipes cost against each other: FLOPs and bytes counted for large models, step time measured for small ones.

    python benchmarks/recipe_costs.py

Every recipe at its own input size and the same batch; options may follow its name, as in `leanmim cost`. The timed recipes take
turns, so that a machine that slows down slows all of them; a ratio is the median over the rounds. A recipe with phases is the mean
over its epochs.
"""

import argparse
import statistics
from dataclasses import replace
from typing import Any

import record
import torch
from steps import in_turns

from leanmim.config import Cost
from leanmim.costs import count
from leanmim.errors import UserError
from leanmim.recipes import published, variant
from leanmim.schedule import phases


def main() -> None:
    """Count, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["simmim", "mae", "fastmim", "fastmim-p"])
    parser.add_argument("--count", nargs="+", default=["vit_base_patch16_224", "swin_base_patch4_window7_224"])
    parser.add_argument("--time", nargs="*", default=["vit_small_patch16_224", "swin_tiny_patch4_window7_224"])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--time-batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--name", default="fastmim-cost")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    rows: list[dict[str, Any]] = []
    raw: list[dict[str, Any]] = []
    for name in dict.fromkeys((*arguments.count, *arguments.time)):
        timed = name in arguments.time
        batch = arguments.time_batch_size if timed else arguments.batch_size
        entries = []
        for recipe in arguments.recipes:
            config = replace(published(variant(recipe, Cost())), model=name, batch_size=batch, epochs=100)
            try:
                cost, _ = count(replace(config, precision="bf16"), "cuda") if not timed else count(config, device.type)
            except UserError:
                continue  # Swin cannot drop tokens
            entries.append((recipe, config, cost))
        seconds = in_turns([config for _, config, _ in entries], device, arguments.rounds) if timed else []
        first = entries[0][2]
        for i, (recipe, config, cost) in enumerate(entries):
            times = [line[i] for line in seconds]
            ratio = statistics.median(line[i] / line[0] for line in seconds) if seconds else None
            rows.append({
                "model": name, "recipe": recipe,
                "input": " -> ".join(str(phase.config.size[0]) for phase in phases(config)), "batch": batch,
                "training GFLOP an image": f"{cost.train_flops_per_image / 1e9:.2f}",
                "ratio": f"{cost.train_flops_per_image / first.train_flops_per_image:.2f}",
                "saved, MiB an image": f"{cost.saved_bytes / batch / 2**20:.1f}",
                "ratio ": f"{cost.saved_bytes / first.saved_bytes:.2f}",
                "peak, GiB": f"{cost.peak_bytes / 2**30:.2f}", " ratio": f"{cost.peak_bytes / first.peak_bytes:.2f}",
                "step, ms": f"{1e3 * statistics.median(times):.0f}" if times else "",
                " ratio ": f"{ratio:.2f}" if ratio else "",
            })  # fmt: skip
            raw.append({"model": name, "recipe": recipe, "seconds": times})
            print(rows[-1], flush=True)
    configuration = {
        "counted": f"batch {arguments.batch_size}, bf16 as on CUDA",
        "timed": f"batch {arguments.time_batch_size} on {arguments.device}, {torch.get_num_threads()} threads, "
        f"{arguments.rounds} rounds",
    }
    note = "Ratios: to the first recipe of the same model."
    if "fastmim" in arguments.recipes:
        note += (
            " Published by FastMIM for its whole pre-training (GPU hours): SimMIM 3307, MAE 2069, FastMIM 608; memory "
            "242, 203, 70 GB."
        )
    record.write(arguments.name, "Cost of recipes against each other", configuration, rows, raw, note)


if __name__ == "__main__":
    main()
