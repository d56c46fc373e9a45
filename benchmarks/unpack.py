"""Turn a packed image set (NPZ of JPEG bytes, offsets, labels, is_test, classes) into train/CLASS and val/CLASS.

python benchmarks/unpack.py cifar10_jpegpack.npz data/cifar10
"""

import sys
from pathlib import Path

import numpy as np

from leanmim.data import list_images


def unpack(pack: Path, out: Path) -> None:
    """Write every image as a file."""
    z = np.load(pack)
    head = z["header"].tobytes() if "header" in z else b""
    data, offsets = z["data"].tobytes(), z["offsets"]
    names = [str(name).split(",")[0].replace(" ", "_") for name in z["classes"]]
    for part in ("train", "val"):
        for name in names:
            (out / part / name).mkdir(parents=True, exist_ok=True)
    for i, (label, test) in enumerate(zip(z["label"], z["is_test"], strict=True)):
        file = out / ("val" if test else "train") / names[label] / f"{i}.jpg"
        file.write_bytes(head + data[offsets[i] : offsets[i + 1]])


def link_subset(data: Path, out: Path, train: int, val: int) -> None:
    """A labelled folder of links to the first images of every class; 0 is all."""
    for part, most in (("train", train), ("val", val)):
        for folder in sorted((data / part).iterdir()):
            target = out / part / folder.name
            target.mkdir(parents=True, exist_ok=True)
            for file in list_images(folder)[: most or None]:
                if not (target / file.name).exists():
                    (target / file.name).symlink_to(file.resolve())


if __name__ == "__main__":
    unpack(Path(sys.argv[1]), Path(sys.argv[2]))
