"""What else a step could be computed with, against the defaults: attention, optimizer, memory format, compilation, CUDA graphs.

    python benchmarks/kernels.py

One process, the variants of a model take turns. Which of them are measured before every run, and which are settled here: see
`leanmim.calibration`.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import record
import timm.layers
import torch
from steps import Timed
from torch.optim import AdamW

from leanmim.config import Pretrain
from leanmim.device import resolve_device, resolve_precision
from leanmim.recipes import FASTMIM, LEAN, MAE
from leanmim.step import align_state

RECIPES = {
    "lean, ViT-Ti, 128 px": replace(LEAN, model="vit_tiny_patch16_224", input_size=(128,)),
    "mae, ViT-S, 224 px": replace(MAE, model="vit_small_patch16_224"),
    "fastmim, Swin-T, 128 px": replace(FASTMIM, model="swin_tiny_patch4_window7_224"),
    "fastmim, ConvNeXt-atto, 128 px": replace(FASTMIM, model="convnext_atto"),
}

TINY = replace(MAE, input_size=(32,), model_kwargs=dict(patch_size=8, embed_dim=32, depth=2, num_heads=2))


def plain(config: Pretrain, device: torch.device) -> Timed:
    """As a run does where nothing is measured."""
    return Timed(config, device)


def unfused(config: Pretrain, device: torch.device) -> Timed:
    """Attention as products and a softmax."""
    timm.layers.set_fused_attn(False)
    try:
        return Timed(config, device)
    finally:
        timm.layers.set_fused_attn(True)


def stepping(**how: Any) -> Callable[[Pretrain, torch.device], Timed]:
    """Another implementation of AdamW."""

    def made(config: Pretrain, device: torch.device) -> Timed:
        timed = Timed(config, device)
        timed.parts = [
            (share, losses, [AdamW([dict(group, **how) for group in one.param_groups], **how) for one in optimizers], *rest)
            for share, losses, optimizers, *rest in timed.parts
        ]  # fmt: skip
        return timed

    return made


def channels_last(config: Pretrain, device: torch.device) -> Timed:
    """Convolutions read the channels of a pixel side by side."""
    timed = Timed(config, device)
    for _, losses, optimizers, *_ in timed.parts:
        losses.to(memory_format=torch.channels_last)
        align_state(optimizers)
    return timed


def compiled(config: Pretrain, device: torch.device) -> Timed:
    """By torch.compile."""
    return Timed(replace(config, compile=True), device)


def recorded(config: Pretrain, device: torch.device) -> Timed:
    """As a CUDA graph."""
    return Timed(replace(config, cuda_graph=True), device)


VARIANTS = {
    "default: fused attention, fused AdamW": plain,
    "attention not fused": unfused,
    "AdamW, foreach": stepping(fused=False, foreach=True),
    "AdamW, one parameter after the other": stepping(fused=False, foreach=False),
    "channels last": channels_last,
    "compiled": compiled,
    "as a CUDA graph": recorded,
}


def main() -> None:
    """Measure, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dry", action="store_true", help="a tiny model on a CPU, not compiled")
    given = parser.parse_args()
    recipes, variants = RECIPES, VARIANTS
    if given.dry:
        given.device, given.batch_size, given.rounds = "cpu", 2, 1
        recipes, variants = {"mae, tiny": TINY}, {name: make for name, make in VARIANTS.items() if name != "compiled"}
    if given.device != "cuda":
        variants = {name: make for name, make in variants.items() if make is not recorded}
    device, rows, raw = resolve_device(given.device), [], {}
    for name, recipe in recipes.items():
        config = replace(recipe, data="d", out="o", batch_size=given.batch_size, precision="auto", compile=False)
        runs = {variant: make(config, device) for variant, make in variants.items()}
        for run in runs.values():
            run.step()
            run.step()  # after the first, which compiles
        taken = [{variant: run.step() for variant, run in runs.items()} for _ in range(given.rounds)]
        for variant in runs:
            ratios = [one[next(iter(runs))] / one[variant] for one in taken]
            rows.append({
                "recipe": name, "variant": variant, "step, ms": f"{1000 * median(one[variant] for one in taken):.0f}",
                "speed to default": f"{median(ratios):.2f}", "least": f"{min(ratios):.2f}", "most": f"{max(ratios):.2f}",
            })  # fmt: skip
        raw[name] = taken
    configuration = {
        "batch": given.batch_size,
        "precision": "bf16" if resolve_precision("auto", device) else "fp32",
        "threads": torch.get_num_threads(),
        "rounds": given.rounds,
    }
    record.write(f"kernels-{device.type}", "What else a step could be computed with", configuration, rows, raw)


if __name__ == "__main__":
    main()
