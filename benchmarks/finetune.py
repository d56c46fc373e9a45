"""Fine-tuning a pre-trained encoder beside one from scratch, at several shares of the labels; and the same encoders frozen.

    python benchmarks/finetune.py screen scratch tune at-224 frozen --data data/imagenette --start mae=runs/mae --start fastmim=runs/fastmim

Every cell is a process of its own with one thread; what is fine-tuned is equal but for the start (from scratch all layers have
the same learning rate, a lower one). at-224 is at 224 px, whatever the start was pre-trained at. Finished cells are kept in --work:
the same command continues where it was stopped, and one with more seeds or shares adds to them.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import record
import torch
from unpack import link_subset

import leanmim
from leanmim.classifier.recipes import small_batch, small_epochs, small_rate
from leanmim.config import Evaluate, Finetune

IMAGES = 9469  # of Imagenette to train with
SHARES = (0.01, 0.1, 1.0)
EPOCHS = {0.01: 50, 0.1: 12, 1.0: 1}  # what two CPU cores can do; the recipe's own are more
MOST = 64  # images a step: in so few epochs the recipe's own number leaves too few steps
SCREEN: dict[str, dict[str, Any]] = {  # changes of the small recipe
    "small": {},
    "lr x 2": dict(lr=2.0),
    "lr / 2": dict(lr=0.5),
    "Mixup 0.8, CutMix 1.0": dict(mixup=0.8, cutmix=1.0),
    "layer decay 0.65": dict(layer_decay=0.65),
    "layer decay 0.9": dict(layer_decay=0.9),
    "no RandAugment": dict(randaugment="none"),
    "lr x 4": dict(lr=4.0),
    "drop path 0": dict(drop_path=0.0),
    "random erasing 0.25": dict(erase=0.25),
    "crops from 8 %": dict(crop_scale=(0.08, 1.0)),
    "moving average 0.99": dict(ema=0.99),
}
SCRATCH = ("lr x 4", "small", "lr / 2")  # of these, from scratch: it may want another rate than a pre-trained start
SCREEN_EPOCHS = 12
PROBE_EPOCHS = 10  # of the attentive probe; published are 90


def cells(names: list[str], starts: dict[str, str], seeds: int, shares: list[float]) -> list[dict[str, Any]]:
    """What is to be run: a screen of the small recipe at the middle share, and the grid."""
    found: list[dict[str, Any]] = []
    if "screen" in names:
        first = next(iter(starts))
        found += [dict(kind="screen", start=first, share=0.1, seed=0, changes=name) for name in SCREEN]
    if "scratch" in names:
        first = next(iter(starts))
        found += [dict(kind="scratch", start=f"{first}, scratch", share=0.1, seed=0, changes=name) for name in SCRATCH]
    if "tune" in names:
        found += [
            dict(kind="tune", start=start, share=share, seed=seed, changes="small")
            for seed in range(seeds) for share in shares for name in starts for start in (name, f"{name}, scratch")
        ]  # fmt: skip
    if "at-224" in names:
        found += [
            dict(kind="at-224", start=start, share=0.1, seed=seed, changes="small")
            for seed in range(seeds)
            for start in starts
        ]
    if "frozen" in names:
        found += [dict(kind="frozen", start=start, share=1.0, seed=0, changes="") for start in starts]
    return found


def file_of(cell: dict[str, Any], work: Path) -> Path:
    """Its result."""
    return work / "cells" / ("-".join(str(value).replace("/", "by") for value in cell.values()) + ".json")


def run_cell(cell: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune, or evaluate frozen, in this process."""
    torch.set_num_threads(1)
    starts = dict(pair.split("=", 1) for pair in arguments.start)
    name, _, scratch = cell["start"].partition(", ")
    trained = leanmim.restore(starts[name])[0]
    data = str(arguments.work / "data")
    if cell["kind"] == "frozen":
        found = leanmim.evaluate(
            Evaluate(
                run=starts[name],
                data=data,
                device="cpu",
                workers=0,
                baselines=("random",),
                epochs=PROBE_EPOCHS,
            )
        )
        return {
            "measures": [{"measure": r.measure, "of": r.name, "accuracy": float(r.accuracy)} for r in found.results]
        }
    out = arguments.work / "runs" / file_of(cell, arguments.work).stem
    changes = dict(SCREEN[cell["changes"]])
    batch = min(MOST, small_batch(round(cell["share"] * IMAGES)))
    config = Finetune(
        start="scratch" if scratch else starts[name], data=data, out=str(out), recipe="small",
        epochs=SCREEN_EPOCHS if cell["kind"] in ("screen", "scratch") else EPOCHS[cell["share"]],
        label_share=cell["share"] if cell["share"] < 1 else None, seed=cell["seed"], workers=0, device="cpu", eval_every=1000,
        effective_batch=batch,
    )  # fmt: skip
    if scratch:
        config = replace(config, model=trained.model, input_size=trained.input_size)
    if cell["kind"] == "at-224":
        config = replace(config, input_size=(224,))
    if factor := changes.pop("lr", None):
        changes["lr"] = factor * small_rate(batch, bool(scratch))
    began = time.perf_counter()
    leanmim.finetune(replace(config, **changes))
    seconds = time.perf_counter() - began
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "accuracy": [line["val_top1"] for line in lines if "val_top1" in line][-1],
        "loss": [line["loss"] for line in lines if "loss" in line][-1],
        "seconds": seconds,
        "config": record.without_paths(json.loads((out / "config.json").read_text())),
    }


def result(cell: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """The result of a cell, which is run if there is none."""
    file = file_of(cell, arguments.work)
    if not file.exists():
        command = [sys.executable, __file__, "--work", str(arguments.work), "--cell", json.dumps(cell)]
        for pair in arguments.start:
            command += ["--start", pair]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{cell} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        found = json.loads(file.read_text())
        print(
            file.stem, f"{found['accuracy']:.1%}, {found['seconds']:.0f} s" if "accuracy" in found else "", flush=True
        )
    return json.loads(file.read_text())


def tables(found: list[dict[str, Any]], names: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Rows of each experiment."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for name in (name for name in ("screen", "scratch", "at-224") if name in names):
        rows[name] = [
            {"start": r["start"], "seed": r["seed"], "small recipe": r["changes"],
             "lr": f"{r['config']['blr'] * r['config']['effective_batch'] / 256:.2g}", "accuracy, %": f"{100 * r['accuracy']:.1f}",
             "loss": f"{r['loss']:.3f}", "s": f"{r['seconds']:.0f}"} for r in found if r["kind"] == name
        ]  # fmt: skip
    if "tune" in names:
        own = [r for r in found if r["kind"] == "tune"]
        for start in dict.fromkeys(r["start"] for r in own):
            row = {"start": start}
            for share in dict.fromkeys(r["share"] for r in own):
                values = [r["accuracy"] for r in own if (r["start"], r["share"]) == (start, share)]
                row[f"{share:.0%} of the labels, %"] = f"{record.spread(values)} ({len(values)})" if values else ""
            rows.setdefault("tune", []).append(row)
    if "frozen" in names:
        for r in (r for r in found if r["kind"] == "frozen"):
            for name in dict.fromkeys(m["of"] for m in r["measures"]):
                own_measures = {m["measure"]: f"{100 * m['accuracy']:.1f}" for m in r["measures"] if m["of"] == name}
                rows.setdefault("frozen", []).append({"start": r["start"], "encoder": name, **own_measures})
    return rows


def order(cell: dict[str, Any]) -> tuple[str, float, int]:
    """Of the table."""
    return cell["start"], cell["share"], cell["seed"]


def main() -> None:
    """Run what is missing, write a table for each experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="all, or some of: screen, scratch, tune, at-224, frozen"
    )
    parser.add_argument("--data", type=Path, help="labelled folder: train/CLASS, val/CLASS")
    parser.add_argument(
        "--start", action="append", default=[], metavar="NAME=RUN", help="a pre-training run; several may be given"
    )
    parser.add_argument("--val", type=int, default=200, help="test images per class")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shares", type=float, nargs="*", default=list(SHARES))
    parser.add_argument("--work", type=Path, default=Path("runs/finetune"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--suffix", default="", help="of the names of the result files: other starts, other files")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        cell = json.loads(arguments.cell)
        file = file_of(cell, arguments.work)
        found = cell | run_cell(cell, arguments) | {"commit": record.hardware()["commit"]}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found))
        return
    names = arguments.names or ["screen", "scratch", "tune", "at-224", "frozen"]
    link_subset(arguments.data, arguments.work / "data", 0, arguments.val)
    starts = dict(pair.split("=", 1) for pair in arguments.start)
    todo = cells(names, starts, arguments.seeds, arguments.shares)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda cell: result(cell, arguments), todo))
    finished = [
        json.loads(file.read_text()) for file in (arguments.work / "cells").glob("*.json")
    ]  # of earlier calls too
    found = sorted((r for r in finished if r["start"].partition(", ")[0] in starts), key=order)
    about = {name: leanmim.restore(run)[0] for name, run in starts.items()}
    configuration = {
        "data": arguments.data.name, "test images": 10 * arguments.val,
        "starts": {name: f"{c.recipe}, {c.model}, {c.size[0]} px, {c.epochs} epochs" for name, c in about.items()},
        "epochs of the screen": SCREEN_EPOCHS, "epochs of the attentive probe": PROBE_EPOCHS, "epochs by share of the labels": EPOCHS, "recipe's own epochs": {s: small_epochs(round(s * IMAGES)) for s in SHARES},
    }  # fmt: skip
    for name, rows in tables(found, names).items():
        note = "Accuracy after the last epoch; mean, sample deviation and number of seeds." if name == "tune" else ""
        own = [r for r in found if r["kind"] == name]
        record.write(f"finetune-{name}{arguments.suffix}-cpu", f"Fine-tuning: {name}", configuration, rows, own, note)


if __name__ == "__main__":
    main()
