"""The ablation bench: recipe variants x seeds on a labelled set, one table of quality and cost.

    python benchmarks/ablate.py --data data/cifar10 --variants mae simmim --seeds 0 1 2

Every cell (variant, seed) is a process of its own; on a CPU single-threaded ones run side by side, which uses the
cores best. Finished cells are kept in --work: the same command continues where it was stopped. A cell's encoder is
probed as `leanmim knn` and `leanmim probe --solver fast` do it. Random initialisation and raw pixels stand beside.
"""

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import record
import torch
from fillings import FILLINGS, install

import leanmim
from leanmim.config import Pretrain, Probe
from leanmim.cost import count
from leanmim.data import list_images
from leanmim.encoders import cuts
from leanmim.evaluate.features import extract, subjects
from leanmim.evaluate.knn import knn_accuracy
from leanmim.evaluate.probe import fast_probe
from leanmim.recipes import BIM, FASTMIM, MAE, PR_MIM, SIMMIM

# Per scale: the backbone and its decoder, data, schedule. "images" and "val" are per class, 0 is all.
SCALES: dict[str, dict[str, Any]] = {
    "smoke": dict(model=dict(embed_dim=48, depth=2, num_heads=2), decoder=(1, 32, 2), images=40, val=20, epochs=2, jobs=2),
    "cpu": dict(model=dict(embed_dim=96, depth=6, num_heads=3), decoder=(2, 64, 2), images=1000, val=500, epochs=8, jobs=2),
    "cpu-deep": dict(model=dict(embed_dim=64, depth=12, num_heads=2), decoder=(4, 64, 2), images=500, val=500, epochs=8, jobs=2),
    "gpu": dict(model=dict(embed_dim=192, depth=12, num_heads=3), decoder=(4, 128, 4), images=0, val=0, epochs=100, jobs=4),
}  # fmt: skip

# What differs from the base. "shrink" is the input's share of --input-size, at the same patch; "longer" a factor of the
# epochs; "filling" another way to fill in thrown patches. Later methods add lines here.
SWIN = dict(model="swin_tiny_patch4_window7_224", model_kwargs={"patch_size": 2, "embed_dim": 24})
GROWING = dict(stage_scales=(1.0, 1.5, 2.0), stage_starts=(0.0, 0.5, 0.75))
VARIANTS: dict[str, tuple[Pretrain, dict[str, Any]]] = {
    "mae": (MAE, {}),
    "mae-raw-pixels": (MAE, dict(target="raw-pixels")),
    "mae-mask-0.6": (MAE, dict(mask_ratio=0.6)),
    "mae-hog": (MAE, dict(target="hog")),
    "simmim": (SIMMIM, {}),
    "fastmim": (FASTMIM, {}),
    "fastmim-pixels": (FASTMIM, dict(target="pixels")),
    "fastmim-raw-pixels": (FASTMIM, dict(target="raw-pixels")),
    "mae-half": (MAE, dict(shrink=0.5)),
    "mae-half-time": (MAE, dict(shrink=0.5, longer=2.5)),
    "mae-hog-half": (MAE, dict(target="hog", shrink=0.5)),
    "mae-hog-half-time": (MAE, dict(target="hog", shrink=0.5, longer=2.5)),
    "mae-hog-p": (MAE, dict(target="hog", shrink=0.5, **GROWING)),
    "mae-hog-p-time": (MAE, dict(target="hog", shrink=0.5, longer=1.6, **GROWING)),
    "fastmim-half": (FASTMIM, dict(shrink=0.5)),
    "fastmim-half-time": (FASTMIM, dict(shrink=0.5, longer=2.5)),
    "fastmim-half-pixels": (FASTMIM, dict(shrink=0.5, target="pixels")),
    "fastmim-p": (FASTMIM, dict(shrink=0.5, **GROWING)),
    "fastmim-p-time": (FASTMIM, dict(shrink=0.5, longer=1.6, **GROWING)),
    **{
        f"pr-mim-{round(100 * throw)}{name}": (PR_MIM, dict(throw=throw, **changes))
        for throw in (0.5, 0.7)
        for name, changes in {
            "": {},
            "-random": dict(select="random"),
            "-plain": dict(fill=0),
            "-plain-random": dict(fill=0, select="random"),
            "-start-random": dict(select_start="random"),
            "-fill-2": dict(fill=2),
            "-fill-4": dict(fill=4),
            "-near-random": dict(filling="near", fill=2, select="random"),
            "-near-start-random": dict(filling="near", fill=2, select_start="random"),
            **{
                f"-{name}": dict(filling=name, fill=2 if "near" in name or name == "shared-quarter" else 1)
                for name in FILLINGS
            },
        }.items()
    },
    # for twelve blocks; without a word the ratio is 0.75 everywhere and a local decoder has one layer
    **{
        f"bim-{name}": (BIM, dict(mask_ratio=0.75, decoder_depth=1) | changes)
        for name, changes in {
            "2": dict(segments=2),
            "4": {},
            "12": dict(segments=12),
            "4-layers-2": dict(decoder_depth=2),
            "4-layers-4": dict(decoder_depth=4),
            "4-gentle": dict(mask_ratio=(0.72, 0.74, 0.76, 0.78)),
            "4-rising": dict(mask_ratio=(0.65, 0.7, 0.8, 0.85)),
            "4-steep": dict(mask_ratio=(0.6, 0.7, 0.8, 0.9)),
        }.items()
    },
    # what the published recipes do, against what ours did before
    "simmim-cosine": (SIMMIM, dict(schedule="cosine", warmup_share=0.05)),
    "simmim-bicubic": (SIMMIM, dict(interpolation="bicubic")),
    "fastmim-warmup-5": (FASTMIM, dict(warmup_share=0.05)),
    "fastmim-swin": (FASTMIM, SWIN),
    "fastmim-swin-timm-init": (FASTMIM, SWIN | dict(linear_init="timm")),
    # a backbone of fewer blocks, trained end to end: the twin of a segment's end
    **{f"mae-depth-{depth}": (MAE, dict(depth=depth)) for depth in (3, 6, 9)},
}


def configure(variant: str, seed: int, arguments: argparse.Namespace) -> Pretrain:
    """The configuration of one cell."""
    scale = SCALES[arguments.scale]
    recipe, changes = VARIANTS[variant]
    changes = {key: value for key, value in changes.items() if key != "filling"}
    shrink, longer = changes.pop("shrink", 1.0), changes.pop("longer", 1.0)
    patch = arguments.input_size // 8
    depth, width, heads = scale["decoder"]
    base = replace(
        recipe,
        data=str(Path(arguments.work) / "data" / "train"),
        out="",
        model="vit_tiny_patch16_224",
        model_kwargs={"patch_size": patch, **scale["model"]},
        input_size=(int(shrink * arguments.input_size),),
        # four cells a patch, as FastMIM has; but of fewer than 4 x 4 pixels there is no histogram
        hog_cell=max(4, patch // 2) if changes.get("target", recipe.target) == "hog" else recipe.hog_cell,
        # SimMIM's squares are 1/6 of its image's side; a quarter of the grid here, one patch more
        mask_unit=arguments.input_size // 4 if recipe.mask_unit else 0,
        decoder_depth=recipe.decoder_depth if recipe.decoder_depth in (0, "auto") else depth,
        decoder_width=width,
        decoder_heads=heads,
        epochs=round(longer * (arguments.epochs or scale["epochs"])),
        batch_size=arguments.batch_size,
        blr=arguments.blr or 10 * recipe.blr,  # a few epochs need larger steps than the 800 of the paper do
        workers=0 if arguments.device == "cpu" else 3,
        device=arguments.device,
        seed=seed,
        log_every=50,
    )
    return replace(base, **changes)


def training_flops(config: Pretrain) -> int:
    """FLOPs of one image's forward and backward, on average over the stages."""
    return count(replace(config, batch_size=1))[0].train_flops_per_image


def evaluate(config: Probe, name: str = "pretrained") -> dict[str, float]:
    """kNN and linear-probe accuracy of the encoder or of a baseline."""
    subject = next(s for s in subjects(config) if s.name == name)
    train, val = (extract(subject.embed, part, subject.normalise, 256, 0) for part in (subject.train, subject.val))
    return {
        "knn": knn_accuracy(train, val, config.k, config.temperature),
        "probe": fast_probe(train, val, config.c),
    }


def run_cell(variant: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and probe one variant with one seed; the two baselines need no training."""
    scale = SCALES[arguments.scale]
    labelled = str(Path(arguments.work) / "data")
    if variant in VARIANTS and "filling" in VARIANTS[variant][1]:
        install(VARIANTS[variant][1]["filling"])
    config = configure("mae" if variant in ("random", "pixels") else variant, seed, arguments)
    config = replace(config, out=arguments.run)
    if variant in ("random", "pixels"):
        config = replace(config, epochs=1, blr=0.0)
    before = time.perf_counter()
    leanmim.pretrain(config)
    seconds = time.perf_counter() - before
    probed = Probe(run=config.out, data=labelled, device=arguments.device, workers=0, baselines=variant == "pixels",
                   input_size=(arguments.input_size,))  # fmt: skip
    accuracies = evaluate(probed, "pixels" if variant == "pixels" else "pretrained")
    ends = cuts(config.segments, scale["model"]["depth"])[:-1] if variant in VARIANTS else ()
    depths = {depth: evaluate(replace(probed, depth=depth)) for depth in ends}
    lines = map(json.loads, (Path(config.out) / "metrics.jsonl").read_text().splitlines())
    loss = [line["loss"] for line in lines if "loss" in line][-1]
    return {"variant": variant, "seed": seed, **accuracies, "depths": depths, "seconds": seconds, "flops": training_flops(config),
            "loss": loss, "config": asdict(config)}  # fmt: skip


def link_subset(data: Path, work: Path, train: int, val: int) -> None:
    """A labelled folder of links to the first images of every class."""
    for part, most in (("train", train), ("val", val)):
        for folder in sorted((data / part).iterdir()):
            target = work / "data" / part / folder.name
            target.mkdir(parents=True, exist_ok=True)
            for file in list_images(folder)[: most or None]:
                if not (target / file.name).exists():
                    (target / file.name).symlink_to(file.resolve())


def spread(values: list[float], scale: float = 100) -> str:
    """Mean and sample standard deviation."""
    values = [scale * value for value in values]
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="labelled folder: train/CLASS, val/CLASS")
    parser.add_argument("--variants", nargs="+", default=["mae", "simmim"], choices=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--scale", default="cpu", choices=list(SCALES))
    parser.add_argument("--input-size", type=int, default=32, help="px; patches are 1/8 of it")
    parser.add_argument("--images", type=int, default=0, help="training images per class; 0 is the scale's own")
    parser.add_argument("--epochs", type=int, default=0, help="0 is the scale's own")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--blr", type=float, default=0.0, help="0 is ten times the recipe's own")
    parser.add_argument("--jobs", type=int, default=0, help="cells side by side; 0 is the scale's own")
    parser.add_argument("--work", default="", help="folder for runs; default runs/ablate/NAME")
    parser.add_argument("--name", default="", help="of the result; default ablate-DATA-SCALE")
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    scale = SCALES[arguments.scale]
    arguments.name = arguments.name or f"ablate-{Path(arguments.data).name}-{arguments.scale}"
    arguments.work = arguments.work or f"runs/ablate/{arguments.name}"
    arguments.device = "cuda" if arguments.scale == "gpu" and torch.cuda.is_available() else "cpu"
    work = Path(arguments.work)

    def place(variant: str, seed: int) -> Path:
        """Where a cell's result is kept: a changed configuration is another cell, a new field with its default is not."""
        values = {key: str(getattr(arguments, key)) for key in ("scale", "input_size", "data", "images")}
        if variant in VARIANTS:
            default = Pretrain(data="", out="").to_json()
            own = configure(variant, seed, arguments).to_json().items()
            values |= {key: value for key, value in own if value != default[key] and key not in ("data", "out")}
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]
        return work / "cells" / f"{variant}-{seed}-{digest}.json"

    if arguments.cell:
        variant, seed = arguments.cell[0], int(arguments.cell[1])
        torch.set_num_threads(1 if arguments.device == "cpu" else 4)
        arguments.run = str(work / "runs" / place(variant, seed).stem)
        result = run_cell(variant, seed, arguments)
        place(variant, seed).parent.mkdir(parents=True, exist_ok=True)
        place(variant, seed).write_text(json.dumps(result))
        return

    link_subset(Path(arguments.data), work, arguments.images or scale["images"], scale["val"])
    cells = [("pixels", 0)] + [(v, s) for s in arguments.seeds for v in ("random", *arguments.variants)]
    # one thread each, and waiting threads must not spin: the cells share the cores
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if arguments.device == "cpu" else {})

    def start(cell: tuple[str, int]) -> None:
        if place(*cell).exists():
            return
        command = [sys.executable, __file__, *sys.argv[1:], "--work", arguments.work, "--cell", cell[0], str(cell[1])]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{cell} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        result = json.loads(place(*cell).read_text())
        print(
            f"{cell[0]} {cell[1]}: kNN {result['knn']:.1%}, probe {result['probe']:.1%}, {result['seconds']:.0f} s",
            flush=True,
        )

    with ThreadPoolExecutor(arguments.jobs or scale["jobs"]) as pool:
        list(pool.map(start, cells))

    results = [json.loads(place(*cell).read_text()) for cell in cells]
    rows = []
    for variant in ("pixels", "random", *arguments.variants):
        own = [result for result in results if result["variant"] == variant]
        trained = variant in VARIANTS
        rows.append({
            "variant": {"pixels": "raw pixels", "random": "random initialisation"}.get(variant, variant),
            "seeds": len(own),
            "kNN, %": spread([r["knn"] for r in own]),
            "linear probe, %": spread([r["probe"] for r in own]),
            "training, s": f"{mean(r['seconds'] for r in own):.0f}" if trained else "",
            "epochs": own[0]["config"]["epochs"] if trained else "",
            "training MFLOP an image": f"{own[0]['flops'] / 1e6:.0f}" if trained else "",
            "final loss": f"{mean(r['loss'] for r in own):.4f}" if trained else "",
        })  # fmt: skip
        for depth in own[0].get("depths", ()):
            cut = [result["depths"][depth] for result in own]
            rows.append({"variant": f"{variant}, first {depth} blocks", "seeds": len(cut),
                         "kNN, %": spread([r["knn"] for r in cut]), "linear probe, %": spread([r["probe"] for r in cut])})  # fmt: skip
    some = configure(arguments.variants[0], 0, arguments)
    images = {part: len(list_images(work / "data" / part)) for part in ("train", "val")}
    configuration = {
        "data": Path(arguments.data).name, "images": f"{images['train']} train, {images['val']} val",
        "model": f"{some.model} {some.model_kwargs}", "input and evaluation": f"{arguments.input_size} px", "epochs": arguments.epochs or scale["epochs"],
        "batch": some.batch_size, "blr": some.blr, "decoder": f"{some.decoder_depth} x {some.decoder_width}",
        "scale": arguments.scale, "cells side by side": arguments.jobs or scale["jobs"],
    }  # fmt: skip
    note = "Spread: sample standard deviation over seeds. kNN: k 20, cosine. Probe: logistic regression on frozen features."
    raw = [{key: value for key, value in result.items() if key != "config"} for result in results]
    assert all(math.isfinite(result["loss"]) for result in results)
    record.write(arguments.name, f"Ablation on {Path(arguments.data).name}", configuration, rows, raw, note)


if __name__ == "__main__":
    main()
