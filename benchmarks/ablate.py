"""The ablation bench: recipe variants x seeds on a labelled set, one table of quality and cost.

    python benchmarks/ablate.py --data data/cifar10 --variants mae simmim --seeds 0 1 2

Variants and scales stand in suite.py, which also names the experiments that were made with this. Every cell (variant,
seed) is a process of its own; on a CPU single-threaded ones run side by side, which uses the cores best. Finished cells
are kept in --work: the same command continues where it was stopped. A cell's encoder is probed as `leanmim knn` and
`leanmim probe --solver fast` do it. Random initialisation and raw pixels stand beside.
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
from statistics import mean
from typing import Any, NamedTuple

import record
import torch
from suite import SCALES, VARIANTS

import leanmim
from leanmim.config import Pretrain, Probe
from leanmim.costs import count
from leanmim.data import list_images
from leanmim.encoders.segments import cuts
from leanmim.evaluators.features import extract, subjects
from leanmim.evaluators.knn import knn_accuracy
from leanmim.evaluators.probe import fast_probe
from leanmim.recipes import published

BASELINES = {"pixels": "raw pixels", "random": "random initialisation"}


class Cell(NamedTuple):
    """One training: a variant, or a baseline, and a seed."""

    variant: str
    seed: int


def configure(cell: Cell, arguments: argparse.Namespace) -> Pretrain:
    """The configuration of a cell; that of ``mae`` for a baseline."""
    scale = SCALES[arguments.scale]
    named, changes = VARIANTS["mae" if cell.variant in BASELINES else cell.variant]
    recipe, changes = published(named), dict(changes)
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
        blr=arguments.blr or 10 * float(recipe.blr),  # a few epochs need larger steps than the 800 of the paper do
        workers=0 if arguments.device == "cpu" else 3,
        device=arguments.device,
        seed=cell.seed,
        log_every=50,
    )
    return replace(base, **changes)


def result_file(cell: Cell, arguments: argparse.Namespace) -> Path:
    """Where a cell's result is kept: a changed configuration is another cell, a new field with its default is not."""
    values = {key: str(getattr(arguments, key)) for key in ("scale", "input_size", "data", "images")}
    if cell.variant in VARIANTS:
        default = Pretrain(data="", out="").to_json()
        own = configure(cell, arguments).to_json().items()
        values |= {key: value for key, value in own if value != default[key] and key not in ("data", "out")}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]
    return Path(arguments.work) / "cells" / f"{cell.variant}-{cell.seed}-{digest}.json"


def evaluate(config: Probe, name: str = "pretrained") -> dict[str, float]:
    """kNN and linear-probe accuracy of the encoder or of a baseline."""
    subject = next(s for s in subjects(config) if s.name == name)
    train, val = (extract(subject.embed, part, subject.normalise, 256, 0) for part in (subject.train, subject.val))
    return {"knn": knn_accuracy(train, val), "probe": fast_probe(train, val)}


def run_cell(cell: Cell, out: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and probe one cell; the baselines need no training."""
    config = replace(configure(cell, arguments), out=str(out))
    if cell.variant in BASELINES:
        config = replace(config, epochs=1, blr=0.0)
    before = time.perf_counter()
    leanmim.pretrain(config)
    seconds = time.perf_counter() - before
    probed = Probe(
        run=config.out,
        data=str(Path(arguments.work) / "data"),
        device=arguments.device,
        workers=0,
        baselines=cell.variant == "pixels",
        input_size=(arguments.input_size,),
    )
    accuracies = evaluate(probed, "pixels" if cell.variant == "pixels" else "pretrained")
    borders = cuts(config.segments, SCALES[arguments.scale]["model"]["depth"])[:-1]
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {
        **cell._asdict(),
        **accuracies,
        "depths": {depth: evaluate(replace(probed, depth=depth)) for depth in borders},
        "seconds": seconds,
        "flops": count(replace(config, batch_size=1))[0].train_flops_per_image,  # on average over the phases
        "loss": [line["loss"] for line in lines if "loss" in line][-1],
        "config": asdict(config),
    }


def run_missing(cells: list[Cell], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The results of all cells; those that are not there yet are made, each in a process of its own."""
    # one thread each, and waiting threads must not spin: the cells share the cores
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if arguments.device == "cpu" else {})

    def result(cell: Cell) -> dict[str, Any]:
        file = result_file(cell, arguments)
        if not file.exists():
            options = ["--work", arguments.work, "--cell", cell.variant, str(cell.seed)]
            command = [sys.executable, __file__, *sys.argv[1:], *options]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{cell} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
            found = json.loads(file.read_text())
            accuracy = f"kNN {found['knn']:.1%}, probe {found['probe']:.1%}"
            print(f"{cell.variant} {cell.seed}: {accuracy}, {found['seconds']:.0f} s", flush=True)
        return json.loads(file.read_text())

    with ThreadPoolExecutor(arguments.jobs or SCALES[arguments.scale]["jobs"]) as pool:
        return list(pool.map(result, cells))


def link_subset(data: Path, work: Path, train: int, val: int) -> None:
    """A labelled folder ``work``/data of links to the first images of every class; 0 is all."""
    for part, most in (("train", train), ("val", val)):
        for folder in sorted((data / part).iterdir()):
            target = work / "data" / part / folder.name
            target.mkdir(parents=True, exist_ok=True)
            for file in list_images(folder)[: most or None]:
                if not (target / file.name).exists():
                    (target / file.name).symlink_to(file.resolve())


def table(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each variant, mean and spread over its seeds; below it one for each depth where it was cut."""
    rows = []
    for variant in dict.fromkeys(result["variant"] for result in results):
        own = [result for result in results if result["variant"] == variant]
        trained = variant in VARIANTS
        rows.append({
            "variant": BASELINES.get(variant, variant),
            "seeds": len(own),
            "kNN, %": record.spread([r["knn"] for r in own]),
            "linear probe, %": record.spread([r["probe"] for r in own]),
            "training, s": f"{mean(r['seconds'] for r in own):.0f}" if trained else "",
            "epochs": own[0]["config"]["epochs"] if trained else "",
            "training MFLOP an image": f"{own[0]['flops'] / 1e6:.0f}" if trained else "",
            "final loss": f"{mean(r['loss'] for r in own):.4f}" if trained else "",
        })  # fmt: skip
        for depth in own[0]["depths"]:
            cut = [result["depths"][depth] for result in own]
            rows.append({
                "variant": f"{variant}, first {depth} blocks", "seeds": len(cut),
                "kNN, %": record.spread([r["knn"] for r in cut]),
                "linear probe, %": record.spread([r["probe"] for r in cut]),
            })  # fmt: skip
    return rows


def write(results: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Write the result files."""
    assert all(math.isfinite(result["loss"]) for result in results)
    scale, name = SCALES[arguments.scale], Path(arguments.data).name
    some = configure(Cell(arguments.variants[0], 0), arguments)
    images = {part: len(list_images(Path(arguments.work) / "data" / part)) for part in ("train", "val")}
    configuration = {
        "data": name, "images": f"{images['train']} train, {images['val']} val",
        "model": f"{some.model} {some.model_kwargs}", "input and evaluation": f"{arguments.input_size} px", "epochs": arguments.epochs or scale["epochs"],
        "batch": some.batch_size, "blr": some.blr, "decoder": f"{some.decoder_depth} x {some.decoder_width}",
        "scale": arguments.scale, "cells side by side": arguments.jobs or scale["jobs"],
    }  # fmt: skip
    note = "Spread: sample standard deviation over seeds. kNN: k 20, cosine. Probe: logistic regression on frozen features."
    raw = [{key: value for key, value in result.items() if key != "config"} for result in results]
    record.write(arguments.name, f"Ablation on {name}", configuration, table(results), raw, note)


def parse() -> argparse.Namespace:
    """The command line; what was left out is filled in."""
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
    arguments.name = arguments.name or f"ablate-{Path(arguments.data).name}-{arguments.scale}"
    arguments.work = arguments.work or f"runs/ablate/{arguments.name}"
    arguments.device = "cuda" if arguments.scale == "gpu" and torch.cuda.is_available() else "cpu"
    return arguments


def main() -> None:
    """Run what is missing, then write the table; with --cell that cell only."""
    arguments = parse()
    work, scale = Path(arguments.work), SCALES[arguments.scale]
    if arguments.cell:
        torch.set_num_threads(1 if arguments.device == "cpu" else 4)
        cell = Cell(arguments.cell[0], int(arguments.cell[1]))
        file = result_file(cell, arguments)
        result = run_cell(cell, work / "runs" / file.stem, arguments)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result))
        return
    link_subset(Path(arguments.data), work, arguments.images or scale["images"], scale["val"])
    seeds = [Cell(variant, seed) for seed in arguments.seeds for variant in ("random", *arguments.variants)]
    write(run_missing([Cell("pixels", 0), *seeds], arguments), arguments)


if __name__ == "__main__":
    main()
