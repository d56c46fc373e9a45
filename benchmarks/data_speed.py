"""Images a second of our crops beside torchvision's usual pipeline, and what scaled decoding changes.

    python benchmarks/data_speed.py --data photos

Photos are written once as JPEGs of 500 x 375 px. Every pipeline is read through torch's DataLoader with two workers, and in
this process alone; rounds of all of them follow each other, and what is reported is the median of the ratios of a round.
Without --data the photos are those of the demo. Beside ours: webdataset alone, with the photos and with the same small ones that
a pack holds, and a Hugging Face data set (Arrow) of each; both with torchvision's transforms.
"""

import argparse
import os
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import datasets
import numpy as np
import record
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import leanmim
from leanmim.config import Pack
from leanmim.data import Normalise, open_source
from leanmim.data.batches import collate
from leanmim.data.crops import Crops, random_box, resized
from leanmim.data.pack import pack
from leanmim.data.source import Folder

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
SIDES = (128, 224)
IMAGES = 480  # of a pass
SHARDS = 4  # of webdataset


class Pass(torch.utils.data.Dataset):
    """So many images of a data set, again and again.

    Args:
        dataset: the images.
        item: what it calls one.
    """

    def __init__(self, dataset: ImageFolder | Crops | datasets.Dataset, item: Callable[[int], Any]) -> None:
        self.dataset, self.item = dataset, item

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.item(index % len(self.dataset))]


def pipelines(root: Path, side: int) -> dict[str, tuple[torch.utils.data.Dataset, Callable | None]]:
    """Data sets, and how their items are collated; the first is the one to compare with."""
    usual = v2.Compose(
        [
            v2.RandomResizedCrop(side, SCALE, RATIO),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )
    found: dict[str, tuple[torch.utils.data.Dataset, Callable | None]] = {
        "torchvision: ImageFolder, RandomResizedCrop, flip, to float": (
            Pass(ImageFolder(str(root / "folder"), usual), lambda index: index),
            None,
        )
    }
    for kind in ("photos", "small"):
        shards = webdataset.WebDataset(str(root / f"{kind}-{{0..{SHARDS - 1}}}.tar"), shardshuffle=False)
        found[f"webdataset, {kind}"] = (shards.decode("pil").to_tuple("jpg").map_tuple(usual), None)
        arrow = datasets.load_from_disk(str(root / f"{kind}-arrow"))
        arrow.set_transform(lambda rows: {"image": [usual(image.convert("RGB")) for image in rows["image"]]})
        found[f"Hugging Face datasets, {kind}"] = (Pass(arrow, lambda index: index), None)
    for name, data, decode in (
        ("leanmim, --decode exact", root / "photos", "exact"),
        ("leanmim", root / "photos", "fast"),
        ("leanmim pack --size 192", root / "jpeg.tar", "fast"),
        ("leanmim pack --size 192 --format raw", root / "raw.tar", "fast"),
    ):
        crops = Crops(open_source(str(data), 3), (side, side), SCALE, RATIO, 0.5, 0, decode=decode)
        found[name] = (Pass(crops, lambda index: (0, index)), collate)
    return found


def seconds(dataset: torch.utils.data.Dataset, collate_fn: Callable | None, workers: int) -> float:
    """Of a pass, without the start of the workers."""
    loader = DataLoader(
        dataset, batch_size=32, num_workers=workers, collate_fn=collate_fn, prefetch_factor=4 if workers else None
    )
    feed = iter(loader)
    began = time.perf_counter() if not workers else None
    for number, _ in enumerate(feed):
        if number == 0 and workers:
            began = time.perf_counter()
    assert began is not None
    taken = time.perf_counter() - began
    return taken * IMAGES / (IMAGES - 32) if workers else taken


def pairs(root: Path, side: int, each: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """The same boxes of all photos, fast and exact."""
    source, fast, exact, how = Folder(root / "photos", 3), [], [], v2.InterpolationMode.BICUBIC
    for place in range(len(source)):
        image, draw = source.read(place), Random(place)
        for _ in range(each):
            left, top, right, bottom = box = random_box(*image.size, SCALE, RATIO, draw)
            fast.append(resized(source.cut(place, lambda *_, box=box: box, (side, side)), (side, side), "bicubic"))
            crop = v2.functional.resized_crop(image, top, left, bottom - top, right - left, [side, side], how, True)
            exact.append(v2.functional.pil_to_tensor(crop))
    return torch.stack(fast), torch.stack(exact)


def differences(root: Path, side: int) -> dict[str, float]:
    """Mean and 99th percentile of the absolute difference of pixels, of 255."""
    fast, exact = pairs(root, side)
    every = (fast.float() - exact.float()).abs()
    return {"mean": every.mean().item(), "99th percentile": float(np.percentile(every.numpy(), 99))}


@torch.inference_mode()
def losses(run: str, root: Path) -> dict[str, float]:
    """Of a trained model, for the same boxes and masks, fast and exact; and how far its losses of one photo's crops differ."""
    config, model, state = leanmim.restore(run)
    normalise = Normalise(state["mean"], state["std"], torch.device("cpu"))
    found = []
    for images in pairs(root, config.size[0], each=8):
        torch.manual_seed(0)
        found.append([sum(model.eval().losses(normalise(part))).item() for part in images.split(8)])
    fast, exact = np.array(found)
    return {
        "fast": fast.mean(),
        "exact": exact.mean(),
        "largest difference for a photo": float(np.abs(fast - exact).max()),
    }


def photos(given: Path, root: Path) -> None:
    """JPEGs of 500 x 375 px, quality 90."""
    (root / "folder" / "photos").mkdir(parents=True)
    (root / "photos").symlink_to(root / "folder" / "photos")
    for number, path in enumerate(sorted(given.rglob("*.[jJ][pP]*[gG]"))[:IMAGES]):
        with Image.open(path) as image:
            image.convert("RGB").resize((500, 375), Image.Resampling.BICUBIC).save(
                root / "photos" / f"{number:04}.jpg", quality=90
            )


def for_others(root: Path) -> None:
    """The photos and the pack's small ones, as shards of webdataset and as a Hugging Face data set."""
    with tarfile.open(root / "jpeg.tar") as file:
        small = [file.extractfile(own).read() for own in file if own.name.endswith(".jpg")]  # type: ignore[union-attr]
    for kind, images in (
        ("photos", [path.read_bytes() for path in sorted((root / "photos").iterdir())]),
        ("small", small),
    ):
        assert len(images) == IMAGES
        for shard in range(SHARDS):
            with webdataset.TarWriter(str(root / f"{kind}-{shard}.tar")) as written:
                for place in range(shard, IMAGES, SHARDS):
                    written.write({"__key__": f"{place:04}", "jpg": images[place]})
        rows = datasets.Dataset.from_dict({"image": [{"bytes": image, "path": None} for image in images]})
        rows.cast_column("image", datasets.Image()).save_to_disk(str(root / f"{kind}-arrow"))


def main() -> None:
    """Measure, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parent.parent / "demo" / "photos")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--run", help="of `leanmim pretrain`: its loss on fast and on exact crops")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    raw: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        photos(given.data, root)
        for form in ("jpeg", "raw"):
            pack(Pack(data=str(root / "photos"), out=str(root / f"{form}.tar"), size=192, format=form, workers=0))
        for_others(root)
        for side in SIDES:
            sets = pipelines(root, side)
            for workers in (0, 2):
                taken: dict[str, list[float]] = {name: [] for name in sets}
                for number in range(given.rounds + 1):
                    for name, (dataset, collate_fn) in sets.items():
                        own = seconds(dataset, collate_fn, workers)
                        if number:  # the first warms up
                            taken[name].append(own)
                usual = next(iter(taken.values()))
                for name, own in taken.items():
                    ratios = [one / other for one, other in zip(usual, own, strict=True)]
                    rows.append({"px": side, "workers": workers, "pipeline": name, "images/s": f"{IMAGES / median(own):.0f}",
                                 "to torchvision": f"{median(ratios):.2f}", "least": f"{min(ratios):.2f}", "most": f"{max(ratios):.2f}"})  # fmt: skip
                raw[f"{side} px, {workers} workers"] = taken
            raw[f"{side} px, difference of fast from exact, of 255"] = differences(root, side)
        if given.run:
            raw["loss of a trained model, difference"] = losses(given.run, root)
    said = [
        f"{key}: " + ", ".join(f"{name} {value:.3g}" for name, value in found.items())
        for key, found in raw.items()
        if "difference" in key
    ]
    record.write("data-speed-cpu", "Reading photos", {"photos": "500 x 375 px, quality 90", "images a pass": IMAGES, "rounds": given.rounds,
                 "load at the end": os.getloadavg()[0]}, rows, raw, "\n".join(said))  # fmt: skip


if __name__ == "__main__":
    main()
