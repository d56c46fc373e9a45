"""One run, several devices: BIM trains each segment of a ViT by a loss of its own, and the first ones alone are models too. Which one fits?

    python examples/depths.py --out depths --gflops 0.3

Pre-trains a ViT in segments, exports the model that ends with each, and prints for all of them parameters, GFLOPs of an image,
images per second on this machine (in turn, so that what else it does slows all alike) and the kNN accuracy on labelled images.
Without --data and --labelled it takes crops of the demo's photos; an accuracy is then the share of crops of unseen parts whose
photo is found.
"""

import argparse
import runpy
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import timm
import torch
from torch import Tensor, nn

import leanmim
from leanmim.costs.flops import flop_counter

DEMO = Path(__file__).parent.parent / "demo" / "demo.py"


class Row(NamedTuple):
    """What a depth costs, and what it knows."""

    depth: int
    parameters: int
    gflops: float
    images_per_second: float
    accuracy: float


def speeds(models: list[nn.Module], images: Tensor, rounds: int = 7) -> list[float]:
    """Images per second of each model, all in turn; the median of the rounds, the first of which warms up."""
    seconds: list[list[float]] = [[] for _ in models]
    for _ in range(rounds + 1):
        for model, own in zip(models, seconds, strict=True):
            began = time.perf_counter()
            model(images).cpu()  # waits for a GPU
            own.append(time.perf_counter() - began)
    return [len(images) / median(own[1:]) for own in seconds]


def gflops(model: nn.Module, image: Tensor) -> float:
    """Of a forward pass; a multiplication and an addition are two."""
    with flop_counter() as counter:
        model(image)
    return counter.get_total_flops() / 1e9


def main(arguments: list[str] | None = None) -> list[Row]:
    """Train, export, measure; a row for each depth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="images to pre-train on")
    parser.add_argument("--labelled", type=Path, help="folder with train/CLASS and val/CLASS")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--gflops", type=float, help="budget of an image; half of the whole model's unless given")
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="timm's name of a ViT")
    parser.add_argument("--segments", type=int, default=4)
    parser.add_argument("--size", type=int, default=96, help="of an image, px")
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=-1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    if (given.data is None) != (given.labelled is None):
        parser.error("give --data and --labelled, or neither")

    if given.data is None:
        given.data, given.labelled = given.out / "crops", given.out / "labelled"
        if not given.labelled.exists():
            runpy.run_path(str(DEMO))["cut"](given.data, given.labelled)
    run = leanmim.pretrain(
        leanmim.BIM, data=given.data, out=given.out / "run", model=given.model, segments=given.segments, input_size=given.size,
        epochs=given.epochs, batch_size=given.batch_size, statistics="data", device=given.device,
        workers=given.workers,
    )  # fmt: skip
    exported = leanmim.export(run=run, all_depths=True, out=given.out / "models", overwrite=True)
    folders = {int(folder.name.removeprefix("depth")): folder for folder in exported.glob("depth*")}
    models = {
        depth: timm.create_model(f"local-dir:{folders[depth]}", pretrained=True, num_classes=0).eval().to(given.device)
        for depth in sorted(folders)
    }
    images = torch.randn(32, 3, given.size, given.size, device=given.device)
    rows = []
    with torch.inference_mode():
        for (depth, model), speed in zip(models.items(), speeds([*models.values()], images), strict=True):
            ((_, accuracy),) = leanmim.knn(
                run=run, data=given.labelled, depth=depth, device=given.device, workers=given.workers
            )
            count = sum(p.numel() for p in model.parameters())
            rows.append(Row(depth, count, gflops(model, images[:1]), speed, accuracy))

    print("\n| depth | parameters, M | GFLOPs | images/s | kNN, % | folder |\n|---|---|---|---|---|---|")
    for row in rows:
        cells = (row.depth, f"{row.parameters / 1e6:.2f}", f"{row.gflops:.3f}", f"{row.images_per_second:.0f}")
        print(f"| {' | '.join(map(str, cells))} | {100 * row.accuracy:.1f} | {folders[row.depth]} |")
    budget = given.gflops or rows[-1].gflops / 2
    if fits := [row for row in rows if row.gflops <= budget]:
        best = max(fits, key=lambda row: row.accuracy)
        print(f"\nWithin {budget:.3f} GFLOPs, depth {best.depth} is the most accurate: {folders[best.depth]}")
    else:
        print(f"\nNone is within {budget:.3f} GFLOPs; the shallowest takes {rows[0].gflops:.3f}")
    return rows


if __name__ == "__main__":
    main()
