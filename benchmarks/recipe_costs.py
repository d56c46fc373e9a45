"""What recipes cost against each other: FLOPs and bytes counted for large models, step time measured for small ones.

    python benchmarks/recipe_costs.py

Every recipe at its own input size and the same batch. The timed recipes take turns, so that a machine that slows down
slows all of them; a ratio is the median over the rounds. A recipe with stages is the mean over its epochs.
"""

import argparse
import statistics
import time
from dataclasses import replace
from typing import Any

import record
import torch

from leanmim.config import Pretrain
from leanmim.cost import count
from leanmim.device import resolve_precision
from leanmim.errors import UserError
from leanmim.mim import build
from leanmim.recipes import RECIPES
from leanmim.schedule import stages
from leanmim.step import make_optimizers, update


class Timed:
    """A recipe, ready to take steps; one model for each of its stages."""

    def __init__(self, config: Pretrain, device: torch.device) -> None:
        self.device, self.parts = device, []
        for stage in stages(config):
            model = build(stage.config).to(device).train()
            model.autocast = resolve_precision(config.precision, device)
            images = torch.randn(int(config.batch_size), config.channels, *stage.config.size, device=device)
            share = (stage.stop - stage.start) / config.epochs
            self.parts.append((share, model, make_optimizers(model, stage.config), images, stage.config.clip_grad))

    def step(self) -> float:
        """Seconds of a step, on average over the epochs."""
        seconds = 0.0
        for share, model, optimizers, images, clip in self.parts:
            self.wait()
            before = time.perf_counter()
            update(model, optimizers, [images], 1, clip)
            self.wait()
            seconds += share * (time.perf_counter() - before)
        return seconds

    def wait(self) -> None:
        """Until the device has done its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


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
        entries, runs = [], []
        for recipe in arguments.recipes:
            config = replace(RECIPES[recipe], model=name, batch_size=batch, epochs=100)
            try:
                cost, _ = count(replace(config, precision="bf16"), "cuda") if not timed else count(config, device.type)
            except UserError:
                continue  # Swin cannot drop tokens
            entries.append((config, cost))
            if timed:
                runs.append(Timed(config, device))
        for run in runs:
            run.step()  # warm up
        seconds = [[run.step() for run in runs] for _ in range(arguments.rounds if runs else 0)]
        first = entries[0][1]
        for i, (config, cost) in enumerate(entries):
            times = [line[i] for line in seconds]
            ratio = statistics.median(line[i] / line[0] for line in seconds) if seconds else None
            rows.append({
                "model": name, "recipe": config.recipe,
                "input": " -> ".join(str(stage.config.size[0]) for stage in stages(config)), "batch": batch,
                "training GFLOP an image": f"{cost.train_flops_per_image / 1e9:.2f}",
                "ratio": f"{cost.train_flops_per_image / first.train_flops_per_image:.2f}",
                "saved, MiB an image": f"{cost.saved_bytes / batch / 2**20:.1f}",
                "ratio ": f"{cost.saved_bytes / first.saved_bytes:.2f}",
                "peak, GiB": f"{cost.peak_bytes / 2**30:.2f}", " ratio": f"{cost.peak_bytes / first.peak_bytes:.2f}",
                "step, ms": f"{1e3 * statistics.median(times):.0f}" if times else "",
                " ratio ": f"{ratio:.2f}" if ratio else "",
            })  # fmt: skip
            raw.append({"model": name, "recipe": config.recipe, "seconds": times})
            print(rows[-1], flush=True)
    configuration = {
        "counted": f"batch {arguments.batch_size}, bf16 as on CUDA",
        "timed": f"batch {arguments.time_batch_size} on {arguments.device}, {torch.get_num_threads()} threads, "
        f"{arguments.rounds} rounds",
    }
    note = (
        "Ratios: to the first recipe of the same model. Published by FastMIM for its whole pre-training (GPU hours): "
        "SimMIM 3307, MAE 2069, FastMIM 608; memory 242, 203, 70 GB."
    )
    record.write(arguments.name, "Cost of recipes against each other", configuration, rows, raw, note)


if __name__ == "__main__":
    main()
