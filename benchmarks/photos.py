"""Recipes under one budget on real photos: lists of variants for `leanmim compare`.

    python benchmarks/photos.py rival --data data/imagenette224
    python benchmarks/photos.py rival --data data/imagenette224 --scale gpu --model vit_base_patch16_224 --minutes 8

--data is a labelled folder (unpack.py makes it). All its training images are pre-trained on; all recipes are evaluated alike. A finished
cell is kept: the same command continues where it was stopped, or where --minutes were over (exit code 3).
"""

import argparse
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import record

import leanmim
from leanmim.comparison.table import Row, Score, Table
from leanmim.config import Compare
from leanmim.config.compare import parse_budget
from leanmim.data import list_images
from leanmim.signals import Stopped, stoppable

# On a CPU: labelled images of a class, to train and to test; fine-tuning takes 95 of them, a tenth of all that Imagenette has.
SCALES: dict[str, dict[str, Any]] = {
    "cpu": dict(train=300, val=200, model="vit_tiny_patch16_224", labels_per_class=95, finetune_epochs=15),
    "gpu": dict(train=None, val=None, model="vit_small_patch16_224", budget="200epochs", label_share=0.1),
}
RATE = 6.8e-3  # what ``auto`` is for ViT-Ti and these budgets, for 256 images
SWIN = "model=swin_tiny_patch4_window7_224,model-kwargs=embed_dim 48"
GROWING = "phase-scales=1 1.25 1.5,phase-starts=0 0.5 0.8"

# What is not said is ``auto``, on a CPU a decoder of 1 x 192 and 32 images a step, and 75 % masked.
EXPERIMENTS: dict[str, dict[str, Any]] = {
    "rival": dict(
        budget="15min",
        seeds=1,
        recipes=(
            "mae", "mae:mask-ratio=0.9", "mae:decoder-depth=2", f"mae:blr={2 * RATE}", "mae:decoder-width=128",
            "mae:decoder-depth=4", "mae:input-size=224",
        ),
    ),
    "one": dict(
        budget="15min",
        seeds=1,
        recipes=(
            "mae", "mae:target=hog", f"mae:{GROWING}", "pr-mim", "pr-mim:throw=0.7", "pr-mim:fill=0",
            "pr-mim:select=random,fill=0", "mae:segments=2", "mae:segments=4", "mae:segments=4,mask-ratio=0.72 0.78",
        ),
    ),
    "painted": dict(budget="15min", seeds=1, recipes=(f"fastmim:{SWIN}", f"simmim:{SWIN}", "fastmim:model=pvt_v2_b0")),
    **{
        f"growth-{minutes}": dict(budget=f"{minutes}min", seeds=1, recipes=("mae", "mae:mask-ratio=0.9", "mae:input-size=224"))
        for minutes in (15, 30, 60)
    },
}  # fmt: skip


def link(data: Path, work: Path, most: dict[str, int | None]) -> Path:
    """A labelled folder of links to the first images of every class."""
    for part, count in most.items():
        for folder in sorted((data / part).iterdir()):
            target = work / part / folder.name
            target.mkdir(parents=True, exist_ok=True)
            for file in list_images(folder)[:count]:
                if not (target / file.name).exists():
                    (target / file.name).symlink_to(file.resolve())
    return work


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(EXPERIMENTS))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/photos"))
    parser.add_argument("--scale", choices=list(SCALES), default="cpu")
    parser.add_argument("--model", help="default: the scale's")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after so long")
    given = parser.parse_args()
    options = SCALES[given.scale] | ({"model": given.model} if given.model else {})
    most = {part: options.pop(part) for part in ("train", "val")}
    title = "-".join([given.name, *([given.model] if given.model else []), given.scale])
    config = Compare(
        data=str(given.data / "train"),
        eval=str(link(given.data, given.work / f"labelled-{given.scale}", most)),
        out=str(given.work / title),
        device="cuda" if given.scale == "gpu" else "cpu",
        **dict(input_size=(128,), eval_size=(128,)) | EXPERIMENTS[given.name] | options,
    )
    end = threading.Timer(60 * given.minutes, os.kill, (os.getpid(), signal.SIGTERM))
    end.daemon = True
    end.start()
    try:
        with stoppable():
            leanmim.compare(config)
    except Stopped as stop:
        write(config, title, most)
        print(f"{title}: {stop}; the same command continues")
        raise SystemExit(3) from None
    end.cancel()
    write(config, title, most)


def write(config: Compare, title: str, most: dict[str, int | None]) -> None:
    """The table of the cells that are finished, as the comparison left it in its folder."""
    if not (file := Path(config.out) / "table.json").is_file():
        return
    found = json.loads(file.read_text())
    rows = [
        Row(**row | {"scores": {measure: Score(**score) for measure, score in row["scores"].items()}})
        for row in found["rows"]
        if row["seeds"]
    ]
    table = Table(found["title"], config.measures, parse_budget(config.budget).kind, rows, config.seeds)
    columns = dict.fromkeys(key for row in (*table.accuracies(), *table.costs()) for key in row)
    both = {row["recipe"]: dict.fromkeys(columns, "-") | row for row in table.accuracies()}
    for row in table.costs():
        both[row["recipe"]] |= row
    tuned = config.labels_per_class or f"{config.label_share:.0%}"
    configuration = {
        "data": Path(config.data).parent.name, "model": config.model, "budget": config.budget, "seeds": config.seeds,
        "labelled images a class": f"{most['train'] or 'all'} to train, {most['val'] or 'all'} to test",
        "fine-tuning": f"with {tuned} of a class, {config.finetune_epochs} epochs",
        "not finished": ", ".join(row["name"] for row in found["rows"] if row["seeds"] < config.seeds and row["kind"] != "pixels") or "none",
    }  # fmt: skip
    record.write(
        f"photos-{title}", f"Recipes on photos: {title}", configuration, list(both.values()), found["rows"],
        "\n".join(table.findings()),
    )  # fmt: skip


if __name__ == "__main__":
    main()
