"""What BIM saves against end-to-end MAE: memory, time, and training several depths at once.

    python benchmarks/bim.py

Counted: FLOPs and bytes of ViT-B for cuts, ratios and decoders, with and without one segment on the device; ViT-L and
ViT-H in bf16. Measured: step time in turns with MAE, memory of real steps; memory: with the batch that is counted; huge,
not by default: of ViT-L and ViT-H on a GPU. Depths: one run against independent ones.
"""

import argparse
import statistics
from dataclasses import asdict, replace
from typing import Any

import record
import torch
from steps import in_turns, measure_each, side_by_side

from leanmim.config import Pretrain
from leanmim.costs import StepCost, count
from leanmim.recipes import BIM, MAE, published

MAE, BIM = published(MAE), published(BIM)

RECIPES: dict[str, Pretrain] = {
    "mae": MAE,
    "bim": BIM,
    **{f"bim, {layers}-layer decoders": replace(BIM, decoder_depth=layers) for layers in (2, 4)},
    "bim, ratios 0.65 to 0.85": replace(BIM, mask_ratio=(0.65, 0.7, 0.8, 0.85)),
    **{f"bim, {n} segments": replace(BIM, segments=n, mask_ratio=0.75) for n in (2, 4, 6, 12)},
    "bim, 50 % thrown": replace(BIM, throw=0.5),
}
HUGE = {"vit_large_patch16_224": (4, 8, 12), "vit_huge_patch14_224": (4, 8, 16)}


def row(model: str, name: str, cost: StepCost, first: StepCost) -> dict[str, Any]:
    """A line of the table; ratios to the first."""
    fields = {
        "training FLOPs": "train_flops_per_image", "saved": "saved_bytes", "gradients": "gradient_bytes",
        "peak": "peak_bytes",
    }  # fmt: skip
    ratios = {title: f"{getattr(cost, field) / getattr(first, field):.2f}" for title, field in fields.items()}
    return {
        "model": model.removesuffix("_224"),
        "recipe": name,
        **ratios,
        "peak, GiB": f"{cost.peak_bytes / 2**30:.2f}",
    }


def counted(batch: int) -> None:
    """ViT-B in fp32, as the target is stated; ViT-L and ViT-H in bf16 as on CUDA."""
    rows, raw = [], []

    def add(model: str, recipes: dict[str, Pretrain], batch: int, precision: str, device: str) -> None:
        first = None
        for name, recipe in recipes.items():
            cost, _ = count(replace(recipe, model=model, batch_size=batch, precision=precision), device)
            first = first or cost
            rows.append({**row(model, name, cost, first), "batch": batch, "precision": precision})
            raw.append({"model": model, "recipe": name, "batch": batch, "precision": precision, **asdict(cost)})
            print(rows[-1], flush=True)

    offloaded = {f"{name}, offloaded": replace(RECIPES[name], offload=True) for name in ("bim", "bim, 6 segments")}
    add("vit_base_patch16_224", {**RECIPES, **offloaded}, batch, "fp32", "cuda")
    for model, cuts in HUGE.items():
        recipes = {"mae": MAE}
        for n in cuts:
            recipe = BIM if n == BIM.segments else replace(BIM, segments=n, mask_ratio=0.75)
            recipes |= {f"bim, {n} segments": recipe, f"bim, {n} segments, offloaded": replace(recipe, offload=True)}
        add(model, recipes, 256, "bf16", "cuda")
    record.write("bim-cost", "BIM against MAE, counted", {"input": "224 px", "device": "as on CUDA"}, rows, raw,
                 "Ratios to MAE of the same model. Offloaded: weights, gradients and optimizer state of one segment and "
                 "the next on the device. More than one ratio of masking only with four segments.")  # fmt: skip


def measured(device: torch.device, batch: int, rounds: int, models: list[str]) -> None:
    """Step time in turns with MAE, memory each in a process of its own."""
    chosen = {name: RECIPES[name] for name in ("mae", "bim", "bim, 2-layer decoders")}
    if device.type == "cuda":
        chosen["bim, offloaded"] = replace(BIM, offload=True)
    side_by_side("bim-step", "A training step of BIM against MAE, measured", chosen, models, device, batch, rounds)


def memory(batch: int, model: str) -> None:
    """What is allocated in a step at the batch of the target; memory outside torch's allocator stands for the host's."""
    chosen = {name: RECIPES[name] for name in ("mae", "bim")} | {"bim, offloaded": replace(BIM, offload=True)}
    configs = [replace(recipe, model=model, batch_size=batch) for recipe in chosen.values()]
    found = list(measure_each(configs, torch.device("cpu")))
    rows = [
        {
            "recipe": name,
            **{f"{kind}, MiB": f"{entry[kind] / 2**20:.0f}" for kind in ("saved", "peak")},
            **{f"{kind}, ratio": f"{entry[kind] / found[0][kind]:.2f}" for kind in ("saved", "peak")},
        }
        for name, entry in zip(chosen, found, strict=True)
    ]
    configuration = {"model": model, "device": "cpu", "precision": "fp32", "batch": batch, "input": "224 px"}
    record.write("bim-memory-cpu", "Memory of a training step of BIM against MAE, measured", configuration, rows, found,
                 "Offloaded: what is on the device; memory outside torch's allocator stands for the host's.")  # fmt: skip


def huge(device: torch.device, batch: int, rounds: int) -> None:
    """The headline on a GPU: ViT-L and ViT-H, one segment on the device."""
    chosen = {"mae": MAE} | {
        f"bim, {n} segments, offloaded": replace(BIM, segments=n, mask_ratio=0.75, offload=True) for n in (4, 8)
    }
    title = "ViT-L and ViT-H with one segment on the device, measured"
    side_by_side("bim-huge", title, chosen, list(HUGE), device, batch, rounds)


def depths(device: torch.device, batch: int, rounds: int, model: str) -> None:
    """One run for four depths, against four independent ones, with MAE's decoder and with the local one."""
    ends = (3, 6, 9, 12)
    config = replace(BIM, model=model, batch_size=batch)
    runs = {
        "one run": [config],
        "independent, MAE's decoder": [replace(MAE, model=model, batch_size=batch, depth=end) for end in ends],
        "independent, the local decoder": [
            replace(MAE, model=model, batch_size=batch, depth=end, decoder_depth=BIM.decoder_depth) for end in ends
        ],
    }
    flat = [config for configs in runs.values() for config in configs]
    times = in_turns(flat, device, rounds)
    rows, raw, at = [], [], 0
    for name, configs in runs.items():
        flops = sum(count(config, device.type)[0].train_flops_per_image for config in configs)
        totals = [sum(line[at : at + len(configs)]) for line in times]
        at += len(configs)
        raw.append({"runs": name, "flops": flops, "seconds": totals})
        rows.append({
            "runs": name, "number": len(configs), "training GFLOP an image": f"{flops / 1e9:.1f}",
            "FLOPs saved by one": f"{1 - raw[0]['flops'] / flops:.0%}",
            "steps, ms": f"{1e3 * statistics.median(totals):.0f}",
            "time saved by one": f"{1 - statistics.median(a / b for a, b in zip(raw[0]['seconds'], totals, strict=True)):.0%}",
        })  # fmt: skip
    configuration = {
        "model": model, "depths": ends, "device": device.type, "batch": batch, "rounds": rounds,
        "threads": torch.get_num_threads(), "input": "224 px",
    }  # fmt: skip
    record.write(f"bim-depths-{device.type}", "Four depths from one run against independent runs", configuration,
                 rows, raw)  # fmt: skip


def main() -> None:
    """All, or those asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["counted", "measured", "memory", "depths"])
    parser.add_argument("--models", nargs="+", default=["vit_small_patch16_224", "vit_base_patch16_224"])
    parser.add_argument("--batch-size", type=int, default=8, help="of what is timed")
    parser.add_argument("--count-batch-size", type=int, default=64, help="of counted and memory")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if "counted" in arguments.parts:
        counted(arguments.count_batch_size)
    if "measured" in arguments.parts:
        measured(device, arguments.batch_size, arguments.rounds, arguments.models)
    if "memory" in arguments.parts:
        memory(arguments.count_batch_size, "vit_base_patch16_224")
    if "huge" in arguments.parts:
        huge(device, 256, arguments.rounds)
    if "depths" in arguments.parts:
        depths(device, arguments.batch_size, arguments.rounds, arguments.models[0])


if __name__ == "__main__":
    main()
