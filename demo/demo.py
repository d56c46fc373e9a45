"""The demo: pre-train on crops of the photos beside this file, draw reconstructions, measure the encoder, write a report.

Each photo's left 70 % gives training crops, its right 30 % validation crops: the two never overlap. Pre-training sees
large crops of the left part, without labels. kNN and linear probe see small crops; the label of a crop is the photo that
it comes from.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image

import leanmim
from leanmim.formats import timm_lines

PHOTOS = Path(__file__).parent / "photos"
SHOWN = ("astronaut", "bridge", "castle", "coffee", "kingfisher", "lemur", "macaw", "sheep")
SIZE = 96  # px, of what the model sees


def squares(photo: Image.Image, left: int, right: int, share: float, stride: float) -> Iterator[Image.Image]:
    """Square crops between two columns of a photo; side and stride are shares of the photo's height."""
    side, step = min(int(share * photo.height), right - left), int(stride * photo.height)
    for y in range(0, photo.height - side + 1, step):
        for x in range(left, right - side + 1, step):
            yield photo.crop((x, y, x + side, y + side))


def cut(photos: Path, labelled: Path) -> None:
    """Write unlabelled crops to ``photos``, and small ones to ``labelled``/train/PHOTO and ``labelled``/val/PHOTO."""
    for folder in (photos, labelled):
        shutil.rmtree(folder, ignore_errors=True)
    for path in sorted(PHOTOS.glob("*.jpg")):
        with Image.open(path) as photo:
            border = int(0.7 * photo.width)
            parts = {
                photos: [crop for share in (1, 0.75) for crop in squares(photo, 0, border, share, 1 / 8)],
                labelled / "train" / path.stem: squares(photo, 0, border, 1 / 4, 1 / 8),
                labelled / "val" / path.stem: squares(photo, border, photo.width, 1 / 4, 1 / 8),
            }
        for folder, crops in parts.items():
            folder.mkdir(parents=True, exist_ok=True)
            for i, crop in enumerate(crops):
                crop.thumbnail((2 * SIZE, 2 * SIZE), Image.Resampling.BICUBIC)
                crop.save(folder / f"{path.stem}-{i:02}.png")


def main() -> None:
    """Cut crops, pre-train, draw, evaluate, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/demo", help="run folder")
    parser.add_argument("--epochs", type=int, default=200, help="passes over the crops")
    options = parser.parse_args()
    out = Path(options.out)
    crops, labelled = out.with_name(out.name + "-crops"), out.with_name(out.name + "-labelled")
    cut(crops, labelled)

    leanmim.pretrain(
        leanmim.MAE,
        data=str(crops),
        out=str(out),
        model="vit_tiny_patch16_224",
        model_kwargs={"patch_size": 8, "embed_dim": 192, "num_heads": 6, "depth": 4},
        input_size=(SIZE,),
        target="raw-pixels",  # what is drawn is then what was predicted, colour included
        statistics="data",
        decoder_depth=1,
        decoder_width=128,
        decoder_heads=4,
        crop_scale=(0.5, 1.0),
        epochs=options.epochs,
        batch_size=16,
        blr=0.016,
        log_every=100,
        knn_data=str(labelled),
        knn_every=50,
        overwrite=True,
    )
    leanmim.show(runs=(str(out),), images=tuple(str(PHOTOS / f"{name}.jpg") for name in SHOWN), tiles=2)

    names = {"random": "random encoder", "pixels": "raw pixels", "pretrained": "pre-trained encoder"}
    print("\nWhich photo does a held-out crop come from?")
    results = {
        "kNN": leanmim.knn(run=str(out), data=str(labelled), baselines=True),
        "linear probe": leanmim.probe(run=str(out), data=str(labelled), baselines=True, solver="fast"),
    }
    for measure, accuracies in results.items():
        for name, accuracy in accuracies:
            print(f"  {measure:12}  {names[name]:20}{accuracy}")
    page = leanmim.report(runs=(str(out),))
    print(f"\nSee {out / 'reconstructions.png'} and {page}. The encoder loads in timm:\n")
    export = out / "export" / "timm"
    lines = timm_lines(export / "model.safetensors", json.loads((export / "config.json").read_text()))
    print(lines)
    with torch.inference_mode():
        exec(lines, {})  # what is printed must run


if __name__ == "__main__":
    main()
