"""Hand-picked decoder, batch size, learning rate and epochs beside `auto`: the evidence for its rules.

    python benchmarks/right_size.py decoder rate auto --data data/imagenette

Every trial is a process of its own with one thread, MAE on the first images of every class; the encoder is probed on the
same images and tested on --val others, as `leanmim knn` and `leanmim probe --solver fast` do it. Finished trials are kept in
--work: the same command continues where it was stopped.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import record
import torch
from unpack import link_subset

import leanmim
from leanmim.config import Pretrain, Probe
from leanmim.costs import count
from leanmim.evaluators.features import extract, subjects
from leanmim.evaluators.knn import knn_accuracy
from leanmim.evaluators.probe import fast_probe

CLASSES = 10
HEADS = {32: 1, 48: 1, 64: 2, 96: 3, 128: 4, 192: 3, 256: 8, 384: 6, 512: 16}  # of a decoder, by width


@dataclass(frozen=True)
class Trial:
    """One training; ``None`` is what `auto` chooses."""

    images: int = 600
    model: str = "vit_tiny_patch16_224"
    size: int = 96
    decoder: tuple[int, int] | None = (2, 128)
    batch: int | None = 64
    lr: float | None = 1e-3
    seen: int = 60_000
    """Images seen in training with this decoder, or with `like` the FLOPs of as many with that one."""
    like: tuple[int, int] | None = None
    hours: float | None = None
    seed: int = 0

    def config(self, work: Path) -> Pretrain:
        """The run, without its folder."""
        changes: dict[str, Any] = {}
        if self.decoder:
            depth, width = self.decoder
            changes |= dict(decoder_depth=depth, decoder_width=width, decoder_heads=HEADS[width])
        if self.batch:
            changes |= dict(batch_size=self.batch)
        if self.lr:
            changes |= dict(blr=self.lr * 256 / self.batch)
        if self.hours:
            changes |= dict(hours=self.hours)
        config = replace(
            leanmim.MAE, data=str(work / str(self.images) / "data" / "train"), out="", model=self.model, input_size=(self.size,),
            device="cpu", workers=0, seed=self.seed, **changes,
        )  # fmt: skip
        if not self.hours:
            config = replace(config, epochs=max(1, round(self.seen * self.share(config) / self.images)))
        return config

    def share(self, config: Pretrain) -> float:
        """Images that cost as much as one with the decoder `like`."""
        if not self.like:
            return 1.0
        depth, width = self.like
        other = replace(config, decoder_depth=depth, decoder_width=width, decoder_heads=HEADS[width], batch_size=1)
        costs = [count(each)[0].train_flops_per_image for each in (other, replace(config, batch_size=1))]
        return costs[0] / costs[1]

    @property
    def name(self) -> str:
        """Of its files."""
        return "-".join(
            str(value).strip("()").replace(", ", "x") for value in asdict(self).values() if value is not None
        )


SMALL = "vit_small_patch16_224"
FEW = Trial(seen=48_000)
THOUSANDS = replace(FEW, images=2000, seen=36_000)
ALL = replace(THOUSANDS, images=9469)
TINY128 = replace(FEW, size=128, seen=24_000)
SMALL96 = replace(FEW, model=SMALL, seen=16_000, decoder=(4, 256))
SMALL128 = replace(SMALL96, size=128, seen=12_000)
DECODERS = ((1, 128), (1, 192), (2, 128), (4, 128), (8, 128), (4, 256), (8, 512))
BY_RULE = dict(batch=None, lr=None, decoder=None)
HAND = [
    *(replace(FEW, lr=lr) for lr in (1.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)),
    replace(FEW, batch=256, lr=2e-3),
    *(replace(trial, lr=lr) for trial in (THOUSANDS, ALL) for lr in (1e-3, 2e-3)),
    *(replace(SMALL128, images=2000, lr=lr) for lr in (5e-4, 1e-3)),
    replace(TINY128, lr=2e-3),
]
GRID = [FEW, THOUSANDS, ALL, *(replace(shape, images=images) for shape in (TINY128, SMALL96, SMALL128) for images in
                               (600, 2000, 9469))]  # fmt: skip
EXPERIMENTS: dict[str, list[Trial]] = {
    "auto": [replace(trial, **BY_RULE) for trial in GRID],
    # again, with a quarter of the learning rate that it had in `auto`
    "tiny": [replace(trial, **BY_RULE) for trial in (FEW, THOUSANDS, ALL)],
    "rate": HAND,
    "decoder": [
        replace(THOUSANDS, size=128, decoder=decoder, like=(2, 128), seen=16_000) for decoder in DECODERS
    ],
}  # fmt: skip


def evaluate(config: Probe, name: str = "pretrained") -> dict[str, float]:
    """kNN and linear-probe accuracy of the encoder or of a baseline."""
    subject = next(s for s in subjects(config) if s.name == name)
    train, val = (extract(subject.embed, part, subject.normalise, 256, 0) for part in (subject.train, subject.val))
    return {"knn": knn_accuracy(train, val), "probe": fast_probe(train, val)}


def run_trial(trial: Trial, work: Path, file: Path) -> None:
    """Train and probe; random initialisation too."""
    torch.set_num_threads(1)
    config = replace(trial.config(work), out=str(work / "runs" / trial.name))
    leanmim.pretrain(config)
    stored = json.loads((Path(config.out) / "config.json").read_text())
    labelled = str(work / str(trial.images) / "data")
    probed = Probe(run=config.out, data=labelled, device="cpu", workers=0, baselines=True, input_size=(trial.size,))
    lines = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    file.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "trial": asdict(trial),
        **evaluate(probed),
        "random": evaluate(probed, "random"),
        "seconds": sum(line.get("seconds", 0) for line in lines),
        "steps": lines[-1]["step"],
        "loss": [line["loss"] for line in lines if "loss" in line][-1],
        "config": stored,
        "commit": record.hardware()["commit"],
    }
    file.write_text(json.dumps(result))


def result(trial: Trial, arguments: argparse.Namespace) -> dict[str, Any]:
    """The result of a trial, which is run if there is none."""
    file = arguments.work / "trials" / f"{trial.name}.json"
    if not file.exists():
        command = [
            sys.executable,
            __file__,
            "--work",
            str(arguments.work),
            "--trial",
            json.dumps(asdict(trial)),
            str(file),
        ]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{trial} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        found = json.loads(file.read_text())
        print(
            f"{trial.name}: loss {found['loss']:.3f}, kNN {found['knn']:.1%}, probe {found['probe']:.1%}, random "
            f"{found['random']['probe']:.1%}, {found['seconds']:.0f} s", flush=True,
        )  # fmt: skip
    found = json.loads(file.read_text())
    return found | {"config": record.without_paths(found["config"])}


def row(found: dict[str, Any]) -> dict[str, Any]:
    """A row of the table."""
    trial, config = found["trial"], found["config"]
    lr = config["blr"] * config["batch_size"] * config["accum"] / 256
    return {
        "images": trial["images"],
        "model": trial["model"].removesuffix("_patch16_224"),
        "px": trial["size"],
        "chosen": "by hand" if trial["batch"] else "auto",
        "seed": trial["seed"],
        "decoder": f"{config['decoder_depth']} x {config['decoder_width']}",
        "batch": config["batch_size"] * config["accum"],
        "lr": f"{lr:.2g}",
        "epochs": config["epochs"],
        "steps": found["steps"],
        "training, s": f"{found['seconds']:.0f}",
        "loss": f"{found['loss']:.3f}",
        "kNN, %": f"{100 * found['knn']:.1f}",
        "linear probe, %": f"{100 * found['probe']:.1f}",
        "random kNN": f"{100 * found['random']['knn']:.1f}",
        "random probe": f"{100 * found['random']['probe']:.1f}",
    }


def main() -> None:
    """Run what is missing, write a table for each experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all, or some of: {', '.join(EXPERIMENTS)}")
    parser.add_argument("--data", type=Path, help="labelled folder of ten classes: train/CLASS, val/CLASS")
    parser.add_argument("--val", type=int, default=200, help="test images per class")
    parser.add_argument("--work", type=Path, default=Path("runs/right-size"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--trial", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.trial:
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(arguments.trial[0]).items()}
        run_trial(Trial(**values), arguments.work, Path(arguments.trial[1]))
        return
    for name in arguments.names or EXPERIMENTS:
        for images in {trial.images for trial in EXPERIMENTS[name]}:
            most = 0 if images == ALL.images else images // CLASSES
            link_subset(arguments.data, arguments.work / str(images) / "data", most, arguments.val)
        with ThreadPoolExecutor(arguments.jobs) as pool:
            found = list(pool.map(lambda trial: result(trial, arguments), EXPERIMENTS[name]))
        configuration = {"data": arguments.data.name, "test images": CLASSES * arguments.val, "seeds": "one",
                         "trials side by side": arguments.jobs}  # fmt: skip
        note = (
            "Probe: logistic regression on frozen features of the same images; kNN: k 20, cosine. One thread a trial."
        )
        record.write(
            f"right-size-{name}-cpu", f"Right-sized: {name}", configuration, list(map(row, found)), found, note
        )


if __name__ == "__main__":
    main()
