"""Ten bands of 16 bits, as satellites send them: statistics, pre-training, fine-tuning, the classifier in timm.

    python examples/multispectral.py --data tiles --out bands

DATA holds train/CLASS and val/CLASS with TIFF files of --channels samples and --size pixels; pre-training does not look at the
classes. Without --data the script draws tiles of four kinds of ground. They show the steps, and say nothing of real satellites.
"""

import argparse
from pathlib import Path

import numpy as np
import tifffile
import timm
import torch

import leanmim

GROUNDS = ("crops", "forest", "houses", "water")


def tile(ground: int, channels: int, size: int, draw: np.random.Generator) -> np.ndarray:
    """Reflectances, height x width x channels, uint16: each ground has a spectrum of its own and a scale of its texture."""
    spectrum = 1500 + 900 * np.sin(np.linspace(0, 3, channels) * (1 + ground / 4) + ground)
    cells = draw.normal(0, 1, (size >> ground, size >> ground, 1)).repeat(1 << ground, 0).repeat(1 << ground, 1)
    light = draw.uniform(0.6, 1.4)  # of the day: the mean alone does not tell
    noise = draw.normal(0, 300, (size, size, channels))
    return (light * spectrum * (1 + 0.2 * cells) + noise).clip(0, 65535).astype(np.uint16)


def draw_tiles(data: Path, channels: int, size: int, count: int) -> None:
    """So many training tiles of each ground, and a quarter of that for validation."""
    draw = np.random.default_rng(0)
    for part, number in (("train", count), ("val", count // 4)):
        for i, ground in enumerate(GROUNDS):
            (data / part / ground).mkdir(parents=True, exist_ok=True)
            for j in range(number):
                values = tile(i, channels, size, draw)
                tifffile.imwrite(
                    data / part / ground / f"{j}.tif", values, photometric="minisblack", planarconfig="contig"
                )


def main(arguments: list[str] | None = None) -> float:
    """Measure, train, export, load; the accuracy of the classifier."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--channels", type=int, default=10)
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="timm's name of a ViT")
    parser.add_argument("--size", type=int, default=64, help="of a tile, px; patches are an eighth")
    parser.add_argument("--tiles", type=int, default=80, help="of each ground, without --data")
    parser.add_argument("--epochs", type=float, default=10, help="of pre-training")
    parser.add_argument("--tuning-epochs", type=float, default=5, help="of fine-tuning")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=-1)
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    if given.data is None:
        given.data = given.out / "tiles"
        draw_tiles(given.data, given.channels, given.size, given.tiles)

    stats = given.out / "stats.json"
    for what, value in leanmim.stats(data=given.data / "train", channels=given.channels, values="stored", out=stats):
        print(f"{what}: {value}")
    run = leanmim.pretrain(
        leanmim.MAE, data=given.data / "train", out=given.out / "run", stats=stats, model=given.model, input_size=given.size,
        model_kwargs={"patch_size": given.size // 8}, epochs=given.epochs, batch_size=given.batch_size, workers=given.workers,
    )  # fmt: skip
    for what, accuracy in leanmim.knn(run=run, data=given.data, baselines=True, workers=given.workers):
        print(f"kNN, {what}: {accuracy}")
    tuned = leanmim.finetune(
        start=run, data=given.data, out=given.out / "tuned", epochs=given.tuning_epochs, batch_size=given.batch_size,
        workers=given.workers,
    )  # fmt: skip

    # the classifier as anybody loads it: 10 channels in, no leanmim
    model = timm.create_model(f"local-dir:{tuned}/export/timm", pretrained=True, in_chans=given.channels).eval()
    known = model.pretrained_cfg
    mean, std = (torch.tensor(known[name]).view(-1, 1, 1) for name in ("mean", "std"))
    right, files = 0, sorted((given.data / "val").glob("*/*.tif*"))
    for file in files:
        values = torch.from_numpy(tifffile.imread(file).astype(np.float32)).movedim(-1, 0)
        with torch.inference_mode():
            found = known["label_names"][model((values - mean)[None] / std).argmax()]
        right += found == file.parent.name
    print(f"in timm {right} of {len(files)} validation tiles are classified right")
    return right / len(files)


if __name__ == "__main__":
    main()
