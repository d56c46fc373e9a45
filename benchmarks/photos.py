"""Recipes under one budget on real photos: lists of variants for `leanmim compare`.

    python benchmarks/photos.py rival --data data/imagenette224

--data is a labelled folder (unpack.py makes it). All its training images are pre-trained on; all recipes are evaluated with the first
300 labelled images of each class, fine-tuning with 95 of them (a tenth of all), and the first 200 to test. The same command
continues where it was stopped.
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import record

import leanmim
from leanmim.config import Compare
from leanmim.data import list_images

TRAIN, VAL = 300, 200  # labelled images of a class
RATE = 6.8e-3  # what ``auto`` is for this model and these budgets, for 256 images

# The rival: plain MAE. What is not said is ``auto``: a decoder of 1 x 192, 75 % masked, 32 images a step.
EXPERIMENTS: dict[str, dict[str, Any]] = {
    "rival": dict(
        budget="15min",
        seeds=1,
        recipes=(
            "mae",
            "mae:mask-ratio=0.9",
            "mae:decoder-depth=2",
            f"mae:blr={2 * RATE}",
            "mae:decoder-width=128",
            "mae:decoder-depth=4",
            "mae:input-size=224",
        ),
    ),
}


def link(data: Path, work: Path) -> Path:
    """A labelled folder of links to the first images of every class."""
    for part, most in (("train", TRAIN), ("val", VAL)):
        for folder in sorted((data / part).iterdir()):
            target = work / part / folder.name
            target.mkdir(parents=True, exist_ok=True)
            for file in list_images(folder)[:most]:
                if not (target / file.name).exists():
                    (target / file.name).symlink_to(file.resolve())
    return work


def main() -> None:
    """Compare, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(EXPERIMENTS))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/photos"))
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    config = Compare(
        data=str(given.data / "train"),
        eval=str(link(given.data, given.work / "labelled")),
        out=str(given.work / given.name),
        device=given.device,
        **dict(model="vit_tiny_patch16_224", input_size=(128,), eval_size=(128,), labels_per_class=95, finetune_epochs=15)
        | EXPERIMENTS[given.name],
    )  # fmt: skip
    table = leanmim.compare(config)
    costs = {row["recipe"]: row for row in table.costs()}
    rows = [row | costs.get(row["recipe"], dict.fromkeys(table.costs()[0], "-") | row) for row in table.accuracies()]
    configuration = {
        "data": given.data.name, "model": config.model, "budget": config.budget, "seeds": config.seeds,
        "evaluation": f"{TRAIN} training, {VAL} test images a class; fine-tuning {config.finetune_epochs} epochs of "
        f"{config.labels_per_class} a class",
    }  # fmt: skip
    note = "\n".join(table.findings())
    record.write(f"photos-{given.name}-cpu", f"Photos: {given.name}", configuration, rows, asdict(table)["rows"], note)


if __name__ == "__main__":
    main()
