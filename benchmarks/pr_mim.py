"""What PR-MIM saves against MAE, and what its sampling costs and gives.

    python benchmarks/pr_mim.py

Counted: FLOPs and bytes for every throw ratio and ViT size, with fused attention, and with attention matrices
materialised on both sides as in the paper's day. Measured: step time in turns with MAE, peak memory of real steps.
Sampling: distance of a thrown patch to its nearest decoded or visible one, and the share of a step spent on it.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import asdict, replace

import record
import timm.layers
import torch
from steps import Timed, seconds, side_by_side

from leanmim.config import Pretrain
from leanmim.costs import StepCost, count
from leanmim.masking import Grid, Split, distances, random_mask, select_furthest, select_random
from leanmim.recipes import MAE, PR_MIM, published

MAE, PR_MIM = published(MAE), published(PR_MIM)

MODELS = ("vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224")
RATIOS = (0.25, 0.5, 0.6, 0.7)


def recipes() -> dict[str, Pretrain]:
    """MAE first, then what is compared with it."""
    table = {"mae": MAE}
    for throw in RATIOS:
        table[f"pr-mim {throw:.0%}"] = replace(PR_MIM, throw=throw)
        table[f"plain {throw:.0%}"] = replace(PR_MIM, throw=throw, fill=0)
    return table


def counted(batch: int) -> None:
    """The table of FLOPs and bytes."""
    rows, raw = [], []
    for model in MODELS:
        first: dict[str, StepCost] = {}
        for name, recipe in recipes().items():
            costs = {}
            for attention in ("fused", "materialised"):
                timm.layers.set_fused_attn(attention == "fused")
                config = replace(recipe, model=model, batch_size=batch, precision="fp32")
                costs[attention], _ = count(config)
                first.setdefault(attention, costs[attention])
                raw.append({"model": model, "recipe": name, "attention": attention, **asdict(costs[attention])})

            def change(attention: str, field: str, first: dict = first, costs: dict = costs) -> str:
                return f"{getattr(costs[attention], field) / getattr(first[attention], field) - 1:+.1%}"

            cost = costs["fused"]
            rows.append({
                "model": model.removesuffix("_224"), "recipe": name,
                "forward GMAC": f"{cost.forward_flops_per_image / 2e9:.3f}",
                "forward": change("fused", "forward_flops_per_image"),
                "training": change("fused", "train_flops_per_image"),
                "saved, MiB an image": f"{cost.saved_bytes / batch / 2**20:.1f}",
                "saved": change("fused", "saved_bytes"), "saved, materialised": change("materialised", "saved_bytes"),
                "peak": change("fused", "peak_bytes"), "peak, materialised": change("materialised", "peak_bytes"),
            })  # fmt: skip
            print(rows[-1], flush=True)
    timm.layers.set_fused_attn(True)
    record.write("pr-mim-cost", "PR-MIM against MAE, counted", {"input": "224 px", "batch": batch, "precision": "fp32"},
                 rows, raw, "Changes against MAE with the same attention.")  # fmt: skip


def measured(device: torch.device, batch: int, rounds: int, models: list[str]) -> None:
    """Step time in turns with MAE, peak memory each in a process of its own."""
    chosen = {name: recipe for name, recipe in recipes().items() if name == "mae" or "50%" in name or "70%" in name}
    side_by_side(
        "pr-mim-step", "A training step of PR-MIM against MAE, measured", chosen, models, device, batch, rounds
    )


def sampling(device: torch.device, batch: int) -> None:
    """How near help is, and what finding it costs."""
    rows, raw = [], []
    grid = Grid(14, 14)
    apart = distances(grid, device).sqrt()
    for throw in RATIOS:
        kept = 147 - int(196 * throw)
        near: dict[str, list[float]] = {"visible": [], "random": [], "none": []}
        for seed in range(20):
            torch.manual_seed(seed)
            mask = random_mask(torch.rand(batch, 196, device=device), grid, 0.75)
            noise = torch.rand(batch, 196, device=device)
            ways: dict[str, Callable[[], Split]] = {
                "visible": lambda m=mask, z=noise, k=kept: select_furthest(m, grid, k, z, "visible"),
                "random": lambda m=mask, z=noise, k=kept: select_furthest(m, grid, k, z, "random"),
                "none": lambda m=mask, z=noise, k=kept: select_random(m, k, z),
            }
            for way, select in ways.items():
                split = select()
                known = torch.cat([split.visible, split.kept], dim=1)
                ahead = torch.stack(
                    [apart[t][:, k].amin(dim=1).mean() for t, k in zip(split.thrown, known, strict=True)]
                )
                near[way].append(ahead.mean().item())
        means = {way: statistics.mean(values) for way, values in near.items()}
        rows.append({
            "thrown": f"{throw:.0%}", "decoded": kept,
            "random choice": f"{means['none']:.3f} ± {statistics.stdev(near['none']):.3f}",
            "furthest, from the visible": f"{means['visible']:.3f} ± {statistics.stdev(near['visible']):.3f}",
            "furthest, from a random one": f"{means['random']:.3f} ± {statistics.stdev(near['random']):.3f}",
        })  # fmt: skip
        raw.append({"throw": throw, **near})

    def median(work: Callable[[], object], repeats: int) -> float:
        """Of its seconds, after one to warm up."""
        return statistics.median([seconds(work, device) for _ in range(repeats + 1)][1:])

    mask = random_mask(torch.rand(batch, 196, device=device), grid, 0.75)
    pick = median(lambda: select_furthest(mask, grid, 49, torch.rand(batch, 196, device=device)), 20)
    shares = []
    for model, most in (("vit_tiny_patch16_224", "5 %"), ("vit_base_patch16_224", "2 %")):
        step = median(Timed(replace(PR_MIM, model=model, batch_size=batch), device).step, 3)
        shares.append(f"{1e3 * pick:.2f} ms of a {model} step's {1e3 * step:.0f} ms, {pick / step:.2%} (target {most})")
        raw.append({"model": model, "sampling": pick, "step": step})
    note = (
        "Mean distance of a thrown patch to the nearest decoded or visible one, in patches, over 20 draws of masks; "
        f"± over draws. Time of furthest sampling at 50 %, {device.type}, batch {batch}: {'; '.join(shares)}."
    )
    record.write(f"furthest-sampling-{device.type}", "Furthest sampling: what it gives and costs",
                 {"grid": "14 x 14", "mask ratio": 0.75, "batch": batch}, rows, raw, note)  # fmt: skip


def main() -> None:
    """All three, or those asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["counted", "sampling", "measured"])
    parser.add_argument("--models", nargs="+", default=["vit_small_patch16_224", "vit_base_patch16_224"])
    parser.add_argument("--batch-size", type=int, default=16, help="of what is measured")
    parser.add_argument("--count-batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if "counted" in arguments.parts:
        counted(arguments.count_batch_size)
    if "sampling" in arguments.parts:
        sampling(device, arguments.batch_size)
    if "measured" in arguments.parts:
        measured(device, arguments.batch_size, arguments.rounds, arguments.models)


if __name__ == "__main__":
    main()
