"""The demo: pre-train on tiles of the photos beside this file, and measure what the encoder has learned.

Each photo's left 70 % gives training tiles, its right 30 % validation tiles: the two never overlap. The label of a
tile is the photo that it comes from. Pre-training sees the training tiles only, without labels.
"""

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

import leanmim
from leanmim.formats import timm_lines

PHOTOS = Path(__file__).parent / "photos"
TILE = 32  # px


def cut_tiles(folder: Path) -> None:
    """Write train/PHOTO/*.png and val/PHOTO/*.png."""
    shutil.rmtree(folder, ignore_errors=True)
    for path in sorted(PHOTOS.glob("*.jpg")):
        with Image.open(path) as photo:
            border = int(0.7 * photo.width)
            for part, left, right in (("train", 0, border), ("val", border, photo.width)):
                (folder / part / path.stem).mkdir(parents=True)
                for y in range(0, photo.height - TILE + 1, TILE):
                    for x in range(left, right - TILE + 1, TILE):
                        photo.crop((x, y, x + TILE, y + TILE)).save(folder / part / path.stem / f"{y}-{x}.png")


def main() -> None:
    """Cut the tiles, pre-train, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/demo", help="run folder")
    parser.add_argument("--epochs", type=int, default=16, help="passes over the tiles")
    options = parser.parse_args()
    out = Path(options.out)
    tiles = out.with_name(out.name + "-tiles")
    cut_tiles(tiles)

    config = replace(
        leanmim.MAE,
        data=str(tiles / "train"),
        out=str(out),
        model="vit_tiny_patch16_224",
        model_kwargs={"patch_size": 4, "embed_dim": 96, "num_heads": 3, "depth": 6},
        input_size=(TILE,),
        target="raw-pixels",  # colour says much about a photo; patches normalised one by one lose it
        statistics="data",
        decoder_depth=1,
        decoder_width=64,
        decoder_heads=4,
        epochs=options.epochs,
        batch_size=64,
        blr=4e-3,
        knn_data=str(tiles),
        knn_every=4,
        overwrite=True,
    )
    leanmim.pretrain(config)

    names = {"random": "random encoder", "pixels": "raw pixels", "pretrained": "pre-trained encoder"}
    print("\nkNN accuracy on held-out tiles, which photo does a tile come from:")
    for name, accuracy in leanmim.knn(leanmim.Knn(run=str(out), data=str(tiles), baselines=True)):
        print(f"  {names[name]:20} {accuracy:6.1%}")
    print(f"\nSee {out / 'reconstructions.png'} and {out / 'report.html'}. The encoder loads in timm:\n")
    trained, model, _ = leanmim.restore(out)
    lines = timm_lines(out / "export" / "timm", trained, model)
    print(lines)
    with torch.inference_mode():
        exec(lines, {})  # what is printed must run


if __name__ == "__main__":
    main()
