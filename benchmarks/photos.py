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
from ablate import link_subset

import leanmim
from leanmim.auto import peak_rate
from leanmim.comparison.table import Row, Score, Table
from leanmim.config import Compare
from leanmim.config.compare import parse_budget
from leanmim.signals import Stopped, stoppable

# Labelled images of a class, to train and to test, 0 is all; on a CPU fine-tuning takes 95 of them, a tenth of all that Imagenette
# has. The batch is what ``auto`` is there. On a CPU Swin-T is half as wide.
SCALES: dict[str, dict[str, Any]] = {
    "cpu": dict(
        images=(300, 200), batch=32, swin=",model-kwargs=embed_dim 48", model="vit_tiny_patch16_224", labels_per_class=95,
        finetune_epochs=15,
    ),
    "gpu": dict(images=(0, 0), batch=256, swin="", model="vit_small_patch16_224", budget="200epochs", label_share=0.1),
}  # fmt: skip
WIDTHS = {"vit_tiny_patch16_224": 192, "vit_small_patch16_224": 384, "vit_base_patch16_224": 768}
RIVAL = "decoder-width=128"  # the best of the experiment of this name
GROWING = "phase-scales=1 1.25 1.5,phase-starts=0 0.5 0.8"

# What is not said is ``auto``, on a CPU a decoder of 1 x 192 and 32 images a step, and 75 % masked.
EXPERIMENTS: dict[str, dict[str, Any]] = {
    "rival": dict(
        budget="15min",
        seeds=1,
        recipes=(
            "mae", "mae:mask-ratio=0.9", "mae:decoder-depth=2", "mae:blr={twice}", "mae:decoder-width=128",
            "mae:decoder-depth=4", "mae:input-size=224",
        ),
    ),
    "one": dict(
        budget="15min",
        seeds=1,
        recipes=(
            f"mae:{RIVAL}", f"mae:{RIVAL},target=hog", f"mae:{RIVAL},{GROWING}", f"pr-mim:{RIVAL}", f"mae:{RIVAL},segments=4",
            f"pr-mim:{RIVAL},throw=0.7", f"pr-mim:{RIVAL},fill=0", f"mae:{RIVAL},segments=2",
            f"pr-mim:{RIVAL},select=random,fill=0", f"pr-mim:{RIVAL},blr={{half}}", f"mae:{RIVAL},segments=4,mask-ratio=0.72 0.78",
        ),
    ),
    "painted": dict(budget="15min", seeds=1, recipes=("fastmim:{swin}", "simmim:{swin}", "fastmim:model=pvt_v2_b0")),
    **{
        f"growth-{minutes}": dict(budget=f"{minutes}min", seeds=1, recipes=("mae", "mae:mask-ratio=0.9", "mae:input-size=224"))
        for minutes in (15, 30, 60)
    },
}  # fmt: skip


def configure(name: str, scale: str, model: str, data: Path, work: Path) -> Compare:
    """A comparison; its labelled folder is made."""
    options = SCALES[scale] | {"model": model}
    images, batch, swin = (options.pop(key) for key in ("images", "batch", "swin"))
    own = EXPERIMENTS[name] | options
    rate = peak_rate(batch, WIDTHS[model]) * 256 / batch
    given = {
        "twice": f"{2 * rate:.3g}",
        "half": f"{rate / 2:.3g}",
        "swin": f"model=swin_tiny_patch4_window7_224{swin}",
    }
    labelled = work / f"labelled-{scale}"
    link_subset(data, labelled, *images)
    return Compare(
        data=str(data / "train"),
        eval=str(labelled / "data"),
        out=str(work / f"{name}-{model}-{scale}"),
        device="cuda" if scale == "gpu" else "cpu",
        input_size=(128,),
        eval_size=(128,),
        **own | {"recipes": tuple(recipe.format(**given) for recipe in own["recipes"])},
    )


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(EXPERIMENTS))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/photos"))
    parser.add_argument("--scale", choices=list(SCALES), default="cpu")
    parser.add_argument("--model", choices=list(WIDTHS), help="default: the scale's")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after so long")
    given = parser.parse_args()
    config = configure(given.name, given.scale, given.model or SCALES[given.scale]["model"], given.data, given.work)
    title = Path(config.out).name
    end = threading.Timer(60 * given.minutes, os.kill, (os.getpid(), signal.SIGTERM))
    end.daemon = True
    end.start()
    try:
        with stoppable():
            leanmim.compare(config)
    except Stopped as stop:
        write(config, given.scale)
        print(f"{title}: {stop}; the same command continues")
        raise SystemExit(3) from None
    end.cancel()
    write(config, given.scale)


def write(config: Compare, scale: str) -> None:
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
    title, (train, val) = Path(config.out).name, SCALES[scale]["images"]
    tuned = config.labels_per_class or f"{config.label_share:.0%}"
    configuration = {
        "data": Path(config.data).parent.name, "model": config.model, "budget": config.budget, "seeds": config.seeds,
        "labelled images a class": f"{train or 'all'} to train, {val or 'all'} to test",
        "fine-tuning": f"with {tuned} of a class, {config.finetune_epochs} epochs",
        "not finished": ", ".join(row["name"] for row in found["rows"] if row["seeds"] < config.seeds and row["kind"] != "pixels") or "none",
    }  # fmt: skip
    record.write(
        f"photos-{title}", f"Recipes on photos: {title}", configuration, list(both.values()), found["rows"],
        "\n".join(table.findings()),
    )  # fmt: skip


if __name__ == "__main__":
    main()
