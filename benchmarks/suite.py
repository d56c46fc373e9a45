"""The accuracy benchmarks in one table: model scales, recipe variants, and the experiments that compare variants.

    python benchmarks/suite.py --data data                    # all experiments
    python benchmarks/suite.py bim-cifar10-cpu --data data    # those named

An experiment is one call of ablate.py, which writes results/NAME.json and keeps finished cells: the same command continues
where it was stopped. --data holds the labelled folders that experiments name (unpack.py makes them).
"""

import argparse
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from leanmim.config import Pretrain
from leanmim.recipes import BIM, FASTMIM, MAE, PR_MIM, SIMMIM

# Per scale: the backbone; the decoder's depth, width, heads; images per class, 0 is all; epochs; cells side by side.
SCALES: dict[str, dict[str, Any]] = {
    "smoke": dict(model=dict(embed_dim=48, depth=2, num_heads=2), decoder=(1, 32, 2), images=40, val=20, epochs=2, jobs=2),
    "cpu": dict(model=dict(embed_dim=96, depth=6, num_heads=3), decoder=(2, 64, 2), images=1000, val=500, epochs=8, jobs=2),
    "cpu-deep": dict(model=dict(embed_dim=64, depth=12, num_heads=2), decoder=(4, 64, 2), images=500, val=500, epochs=8, jobs=2),
    "gpu": dict(model=dict(embed_dim=192, depth=12, num_heads=3), decoder=(4, 128, 4), images=0, val=0, epochs=100, jobs=4),
}  # fmt: skip

# A variant is a recipe and what is changed in it. Two changes are no fields: "shrink" multiplies the input size at the same
# patch, "longer" the epochs.
GROWING = dict(shrink=0.5, phase_scales=(1.0, 1.5, 2.0), phase_starts=(0.0, 0.5, 0.75))
SWIN = dict(model="swin_tiny_patch4_window7_224", model_kwargs={"patch_size": 2, "embed_dim": 24})
LOCAL = dict(mask_ratio=0.75, decoder_depth=1)  # of BIM, where nothing else is said

VARIANTS: dict[str, tuple[Pretrain, dict[str, Any]]] = {
    "mae": (MAE, {}),
    "mae-raw-pixels": (MAE, dict(target="raw-pixels")),
    "mae-mask-0.6": (MAE, dict(mask_ratio=0.6)),
    "mae-hog": (MAE, dict(target="hog")),
    "simmim": (SIMMIM, {}),
    "fastmim": (FASTMIM, {}),
    "fastmim-pixels": (FASTMIM, dict(target="pixels")),
    "fastmim-raw-pixels": (FASTMIM, dict(target="raw-pixels")),
    # resolution
    "mae-half": (MAE, dict(shrink=0.5)),
    "mae-half-time": (MAE, dict(shrink=0.5, longer=2.5)),
    "mae-hog-half": (MAE, dict(target="hog", shrink=0.5)),
    "mae-hog-half-time": (MAE, dict(target="hog", shrink=0.5, longer=2.5)),
    "mae-hog-p": (MAE, dict(target="hog", **GROWING)),
    "mae-hog-p-time": (MAE, dict(target="hog", longer=1.6, **GROWING)),
    "fastmim-half": (FASTMIM, dict(shrink=0.5)),
    "fastmim-half-time": (FASTMIM, dict(shrink=0.5, longer=2.5)),
    "fastmim-half-pixels": (FASTMIM, dict(shrink=0.5, target="pixels")),
    "fastmim-p": (FASTMIM, GROWING),
    "fastmim-p-time": (FASTMIM, dict(longer=1.6, **GROWING)),
    # what the published recipes do, against what ours did before
    "simmim-cosine": (SIMMIM, dict(schedule="cosine", warmup_share=0.05)),
    "simmim-bicubic": (SIMMIM, dict(interpolation="bicubic")),
    "fastmim-warmup-5": (FASTMIM, dict(warmup_share=0.05)),
    "fastmim-swin": (FASTMIM, SWIN),
    "fastmim-swin-timm-init": (FASTMIM, SWIN | dict(linear_init="timm")),
    # partial reconstruction
    **{
        f"pr-mim-{round(100 * throw)}{name}": (PR_MIM, dict(throw=throw, **changes))
        for throw in (0.5, 0.7)
        for name, changes in {
            "": {},
            "-random": dict(select="random"),
            "-plain": dict(fill=0),
            "-plain-random": dict(fill=0, select="random"),
            "-start-random": dict(select_start="random"),
            "-fill-2": dict(fill=2),
            "-fill-4": dict(fill=4),
        }.items()
    },
    # block-wise training, for twelve blocks
    "bim-2": (BIM, LOCAL | dict(segments=2)),
    "bim-4": (BIM, LOCAL),
    "bim-12": (BIM, LOCAL | dict(segments=12)),
    "bim-4-gentle": (BIM, LOCAL | dict(mask_ratio=(0.72, 0.74, 0.76, 0.78))),
    "bim-4-rising": (BIM, LOCAL | dict(mask_ratio=(0.65, 0.7, 0.8, 0.85))),
    "bim-4-steep": (BIM, LOCAL | dict(mask_ratio=(0.6, 0.7, 0.8, 0.9))),
    "bim-4-layers-2": (BIM, LOCAL | dict(decoder_depth=2)),
    "bim-4-layers-4": (BIM, LOCAL | dict(decoder_depth=4)),
    # fewer blocks, trained end to end: what a depth of a BIM run is compared with
    "mae-depth-3": (MAE, dict(depth=3)),
    "mae-depth-6": (MAE, dict(depth=6)),
    "mae-depth-9": (MAE, dict(depth=9)),
}


@dataclass(frozen=True)
class Experiment:
    """Variants that are compared on one data set under one schedule; the fields are ablate.py's options."""

    data: str
    variants: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    scale: str = "cpu"
    input_size: int = 32
    images: int = 0
    epochs: int = 0
    batch_size: int = 64
    blr: float = 0.004

    def options(self) -> list[str]:
        """The command line."""
        words = []
        for field in fields(self):
            value = getattr(self, field.name)
            words += ["--" + field.name.replace("_", "-"), *map(str, value if isinstance(value, tuple) else (value,))]
        return words


CIFAR = Experiment("cifar10")
TINY = Experiment("tinyimagenet28", input_size=64, images=400, epochs=6)
DEEP_CIFAR = replace(CIFAR, scale="cpu-deep", batch_size=32, blr=0.008)
DEEP_TINY = replace(DEEP_CIFAR, data="tinyimagenet28", input_size=64, images=180)
PARTIAL = ("mae", *(f"pr-mim-{t}{name}" for t in (50, 70) for name in ("-plain-random", "-plain", "-random", "")))
DEPTHS = ("mae-depth-3", "mae-depth-6", "mae-depth-9")
BLOCKWISE = ("mae", *(name for name in VARIANTS if name.startswith("bim-")), *DEPTHS)

EXPERIMENTS: dict[str, Experiment] = {
    "ablate-cifar10-cpu": replace(CIFAR, variants=("mae", "simmim"), batch_size=128, blr=0.0),
    "fastmim-tinyimagenet28-cpu": replace(
        TINY,
        variants=("mae", "mae-half", "mae-hog", "mae-hog-half", "mae-hog-half-time", "mae-hog-p", "mae-hog-p-time"),
    ),
    "fastmim-cifar10-cpu": replace(CIFAR, variants=("mae", "mae-hog")),
    "screen-tinyimagenet28-cpu": replace(TINY, variants=("mae-half-time", "fastmim", "fastmim-half"), seeds=(0,)),
    "screen-cifar10-cpu": replace(
        CIFAR, variants=("mae-hog-half", "mae-hog-p", "fastmim", "fastmim-pixels"), seeds=(0,)
    ),
    "screen-published-tinyimagenet28-cpu": replace(
        TINY,
        variants=(
            "fastmim-swin", "fastmim-swin-timm-init", "fastmim", "fastmim-warmup-5", "simmim", "simmim-cosine",
            "simmim-bicubic",
        ),
        seeds=(0,),
    ),
    "pr-mim-cifar10-cpu": replace(CIFAR, variants=PARTIAL),
    "pr-mim-tinyimagenet28-cpu": replace(TINY, variants=PARTIAL),
    "screen-bim-cifar10-cpu": replace(DEEP_CIFAR, variants=BLOCKWISE, seeds=(0,)),
    "bim-cifar10-cpu": replace(DEEP_CIFAR, variants=("mae", "bim-4-gentle", *DEPTHS)),
    "screen-bim-tinyimagenet28-cpu": replace(DEEP_TINY, variants=BLOCKWISE, seeds=(0,)),
    "bim-tinyimagenet28-cpu": replace(DEEP_TINY, variants=("mae", "bim-4-gentle", *DEPTHS)),
}  # fmt: skip


def main() -> None:
    """Run the experiments one after the other; the first that fails ends it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all, or some of: {', '.join(EXPERIMENTS)}")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of labelled folders")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - EXPERIMENTS.keys():
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are: {', '.join(EXPERIMENTS)}")
    ablate = Path(__file__).with_name("ablate.py")
    for name in arguments.names or EXPERIMENTS:
        experiment = replace(EXPERIMENTS[name], data=str(arguments.data / EXPERIMENTS[name].data))
        subprocess.run([sys.executable, str(ablate), "--name", name, *experiment.options()], check=True)


if __name__ == "__main__":
    main()
