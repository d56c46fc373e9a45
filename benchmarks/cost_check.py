"""`leanmim cost` against what a real step allocates: peak, and bytes saved for backward.

    python benchmarks/cost_check.py

On a CPU every allocation and release of torch's allocator is counted by its profiler, what kernels take for themselves
included; on a GPU the allocator reports its own peak. Each configuration is a process of its own.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import record
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from leanmim.config import Pretrain
from leanmim.cost import count
from leanmim.data import Normalise
from leanmim.device import resolve_precision
from leanmim.mim import build
from leanmim.recipes import RECIPES
from leanmim.step import make_optimizers, update

MODELS = ("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224", "swin_tiny_patch4_window7_224")


def measure(config: Pretrain, device: torch.device) -> dict[str, int]:
    """One real step, after the optimizer's state is there."""
    cuda = device.type == "cuda"
    cost, _ = count(config, device.type)
    model = build(config).to(device).train()
    model.autocast = resolve_precision(config.precision, device)
    optimizers = make_optimizers(model, config)
    normalise = Normalise([0.5] * 3, [0.5] * 3, device)
    images = torch.randint(0, 255, (int(config.batch_size), 3, *config.size), dtype=torch.uint8)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    held: dict[int, int] = {}
    saved = 0

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    def losses(images: Tensor) -> Iterator[Tensor]:
        nonlocal saved
        for loss in model(images):
            saved = max(saved, sum(held.values()))
            yield loss
            held.clear()

    def batches() -> Iterator[Tensor]:
        for _ in range(config.accum):
            read = images.clone()
            yield normalise(read)

    def step(through) -> None:
        update(through, optimizers, batches(), config.accum, config.clip_grad)

    if cuda:
        step(model)
        torch.cuda.reset_peak_memory_stats()
        step(model)
        peak = torch.cuda.max_memory_allocated()
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
            step(model)
        sizes = [(e.start_ns(), e.nbytes()) for e in events.profiler.kineto_results.events() if e.name() == "[memory]"]
        now = peak = 0
        for _, size in sorted(sizes, key=lambda event: event[0]):
            now += size
            peak = max(peak, now)
        peak += cost.weight_bytes + cost.optimizer_bytes  # there before the step
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(losses)
    return {
        "peak": peak, "saved": saved, "predicted_peak": cost.peak_bytes, "predicted_saved": cost.saved_bytes,
    }  # fmt: skip


def main() -> None:
    """All configurations, one after the other; write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--recipes", nargs="+", default=["mae", "simmim"])
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--accums", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, recipe, batch, accum, precision = arguments.one
        config = replace(
            RECIPES[recipe], model=name, batch_size=int(batch), accum=int(accum), precision=precision
        )  # fmt: skip
        print(json.dumps(measure(config, torch.device(arguments.device))))
        return
    rows, raw = [], []
    for cell in product(arguments.models, arguments.recipes, arguments.batches, arguments.accums, ("fp32", "bf16")):
        name, recipe, batch, accum, precision = cell
        if name.startswith("swin") and recipe == "mae":
            continue  # cannot drop tokens
        done = subprocess.run(
            [sys.executable, __file__, "--device", arguments.device, "--one", *map(str, cell)],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{cell} failed:\n{done.stderr[-3000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
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
