"""Our HOG against the straightforward form (one-hot scatter over the image, then unfold), and its share of a step.

    python benchmarks/hog_speed.py

The two take turns in one run; a ratio is the median over the rounds. Transient memory: the allocator's peak above the
start, result included, by torch's profiler on a CPU and its own statistics on a GPU.
"""

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import replace

import record
import torch
from steps import seconds, transient
from torch import Tensor, nn

from leanmim.device import resolve_device, resolve_precision
from leanmim.factory import build
from leanmim.recipes import FASTMIM, published
from leanmim.step import make_optimizers, update
from leanmim.targets import BINS, hog, with_levels

HALF = (0.5, 0.5, 0.5)  # mean and deviation, by which images of 8 bits are normalised here


def straightforward(images: Tensor, cell: int = 8) -> Tensor:
    """HOG by two convolutions, a scatter into nine planes as large as the image, and unfold."""
    _, c, height, width = images.shape
    kernel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=images.device)
    padded = nn.functional.pad(images, (1, 1, 1, 1), mode="reflect")
    gx = nn.functional.conv2d(padded, kernel.expand(c, 1, 3, 3), groups=c)
    gy = nn.functional.conv2d(padded, kernel.T.expand(c, 1, 3, 3), groups=c)
    bins = (torch.atan2(gx, gy) / math.pi * BINS).floor().long() % BINS
    planes = images.new_zeros(len(images), c, BINS, height, width)
    planes.scatter_add_(2, bins[:, :, None], torch.stack([gx, gy], dim=-1).norm(dim=-1)[:, :, None])
    cells = planes.unfold(3, cell, cell).unfold(4, cell, cell).sum(dim=(-1, -2))
    return nn.functional.normalize(cells, dim=2).flatten(1, 2)


def extra(call: Callable[[], object], device: torch.device) -> int:
    """Bytes at the peak above the start."""
    if device.type == "cpu":
        return transient(call)
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - start


@torch.no_grad()
def main() -> None:
    """Measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--step-batch-size", type=int, default=8)
    parser.add_argument("--dry", action="store_true", help="few images, a tiny model on a CPU")
    arguments = parser.parse_args()
    batch, sizes, shape = 64, (128, 224), {}
    if arguments.dry:
        arguments.device, arguments.rounds, arguments.step_batch_size = "cpu", 1, 2
        batch, sizes, shape = 2, (32,), dict(embed_dim=32, depth=2, num_heads=2)
    device = resolve_device(arguments.device)
    rows, raw = [], []
    for size in sizes:
        whole = torch.randint(0, 256, (batch, 3, size, size), device=device).float()
        images = (whole / 255 - HALF[0]) / HALF[0]
        difference = (hog(images, 8, HALF, HALF) - straightforward(whole)).abs()
        calls = {"ours": lambda i=images: hog(i, 8, HALF, HALF), "straightforward": lambda i=images: straightforward(i)}
        for call in calls.values():
            call()
        pairs = [{name: seconds(call, device) for name, call in calls.items()} for _ in range(arguments.rounds)]
        memory = {name: extra(call, device) for name, call in calls.items()}
        rows.append({
            "what": f"batch {batch} at {size} px",
            "ours, ms": f"{1e3 * statistics.median(p['ours'] for p in pairs):.1f}",
            "straightforward, ms": f"{1e3 * statistics.median(p['straightforward'] for p in pairs):.1f}",
            "times faster": f"{statistics.median(p['straightforward'] / p['ours'] for p in pairs):.1f}",
            "ours, MiB": f"{memory['ours'] / 2**20:.1f}",
            "straightforward, MiB": f"{memory['straightforward'] / 2**20:.1f}",
            "share of its memory": f"{memory['ours'] / memory['straightforward']:.3f}",
            "values that differ by over 1e-4": f"{(difference > 1e-4).float().mean():.5f}",
        })  # fmt: skip
        raw.append({"size": size, "pairs": pairs, "memory": memory})
        print(rows[-1], flush=True)

    config = replace(
        published(FASTMIM), model="vit_base_patch16_224", model_kwargs=shape, batch_size=arguments.step_batch_size
    )
    model = build(config).to(device).train()
    model.autocast = resolve_precision("auto", device)
    optimizers = make_optimizers(model, config)
    model.target = with_levels(model.target, config.read_as, HALF, HALF)
    images = torch.randn(arguments.step_batch_size, 3, *config.size, device=device)

    @torch.enable_grad()
    def step() -> None:
        update(model, optimizers, [images])

    step()
    pairs = [(seconds(lambda: model.target(images), device), seconds(step, device)) for _ in range(5)]
    share = statistics.median(a / b for a, b in pairs)
    note = f"Share of HOG in a ViT-B/16 FastMIM step (128 px, batch {arguments.step_batch_size}): {share:.2%}."
    configuration = {
        "device": arguments.device, "precision of the step": "bf16" if model.autocast else "fp32",
        "threads": torch.get_num_threads(), "rounds": arguments.rounds,
    }  # fmt: skip
    record.write(f"hog-speed-{arguments.device}", "HOG against its straightforward form", configuration, rows,
                 [*raw, {"step pairs": pairs}], note)  # fmt: skip


if __name__ == "__main__":
    main()
