"""Which parts of the recipes are worth their cost: lists of variants for `leanmim compare`.

    python benchmarks/ablate.py photos-rival --data data
    python benchmarks/ablate.py photos-rival --data data --scale gpu --model vit_base_patch16_224 --minutes 8
    python benchmarks/ablate.py --data data                 # all: on a CPU of thumbnails, on a GPU of photos

--data holds the labelled folders that experiments name (unpack.py makes them), or is such a folder. A finished cell is kept: the same
command continues where it was stopped, or where --minutes were over (exit code 3). Results: results/NAME-MODEL-SCALE.json, also of
the cells that are finished when it is stopped. results/cells keeps the plan and what each finished cell found: from these any machine
goes on, and trains what is missing; with other options than theirs it is refused.
"""

import argparse
import json
import os
import shutil
import signal
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import record
from unpack import link_subset

import leanmim
from leanmim.auto import peak_rate
from leanmim.comparison.table import Row, Score, Table
from leanmim.config import Compare
from leanmim.config.compare import parse_budget
from leanmim.signals import Stopped, stoppable

CHOICES = ("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224")
MODELS = {"cpu": "vit_tiny_patch16_224", "gpu": "vit_small_patch16_224"}
BATCHES = {"cpu": 32, "gpu": 256}  # what ``auto`` takes for the photos


@dataclass(frozen=True)
class Experiment:
    """Recipes that are compared on one set of images."""

    set: str
    """Name of the labelled folder."""
    recipes: tuple[str, ...]
    common: str = ""
    """Options of all recipes."""
    images: tuple[int, int] = (0, 0)
    """Labelled ones of a class to train and to test with; 0 is all."""
    subset: bool = False
    """Whether only the labelled images are pre-trained on."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of `leanmim compare`."""
    gpu: bool = False
    """Whether it is meant for a GPU's scale too: there the epochs are given, not the time."""

    def specs(self) -> tuple[str, ...]:
        """The recipes with all their options."""
        joined = [f"{recipe}{',' if ':' in recipe else ':'}{self.common}" for recipe in self.recipes]
        return tuple(joined) if self.common else self.recipes


# Thumbnails: small ViTs, equal epochs, frozen features. PHOTOS: what a core did in 15 minutes where photos-rival was measured, in
# FLOPs, for machines differ. Each recipe of photos-one came to within 4 % of it; its first cells have 4 to 7 % fewer epochs than the
# plan now gives, for the stem got cheaper. Fine-tuning takes 95 labels a class, a tenth of all that Imagenette has. What is not said
# is ``auto``, there a decoder of 1 x 192 and 75 % masked.
FROZEN: dict[str, Any] = dict(measures=("knn", "linear"), seeds=3)
CIFAR = Experiment(
    "cifar10", (), "decoder-depth=2,decoder-width=64,decoder-heads=2,batch-size=64,blr=0.004", (1000, 500), True,
    FROZEN | dict(input_size=(32,), model_kwargs=dict(patch_size=4, embed_dim=96, depth=6, num_heads=3), budget="8epochs"),
)  # fmt: skip
TINY = replace(
    CIFAR, set="tinyimagenet28", images=(400, 500),
    options=CIFAR.options | dict(input_size=(64,), model_kwargs=dict(patch_size=8, embed_dim=96, depth=6, num_heads=3), budget="6epochs"),
)  # fmt: skip
DEEP = replace(
    CIFAR, common="decoder-width=64,decoder-heads=2,batch-size=32,blr=0.008", images=(500, 500),
    options=CIFAR.options | dict(model_kwargs=dict(patch_size=4, embed_dim=64, depth=12, num_heads=2), depths=True),
)  # fmt: skip
SHORT = dict(budget="41TFLOP", seeds=1, labels_per_class=95, finetune_epochs=15)
PHOTOS = Experiment(
    "imagenette224", (), "", (300, 200), options=dict(input_size=(128,), eval_size=(128,), **SHORT), gpu=True
)
LONG = dict(budget="200epochs", label_share=0.1, labels_per_class=None, finetune_epochs="auto")

PLACES = ("data", "eval", "out")  # of this machine

HOG = "target=hog,hog-cell=4"
REFERENCE = "Published: MAE, ViT-S/16, 200 epochs of Imagenette on one A100: linear probe 84.1 %, kNN 72.1 %."
RIVALS = {"cpu": "decoder-width=128", "gpu": "decoder-width=auto"}  # the best of photos-rival, once it is measured
HALF, GROWING = "input-size=32", "phase-scales=1 1.25 1.5,phase-starts=0 0.5 0.8"
DOUBLING = "phase-scales=1 1.5 2,phase-starts=0 0.5 0.75"
RISING = "phase-scales=1 1.3333,phase-starts=0 0.5"
PARTIAL = (
    "mae",
    *(
        f"pr-mim:throw={throw}{how}"
        for throw in (0.5, 0.7)
        for how in (",fill=0,select=random", ",fill=0", ",select=random", "")
    ),
)
PUBLISHED = "mask-unit=16,batch-size=64,blr=0.004"  # SimMIM's squares are a sixth of its image's side; a quarter here
SWIN = "model=swin_tiny_patch4_window7_224,model-kwargs=patch_size 2 embed_dim 24"

EXPERIMENTS: dict[str, Experiment] = {
    "cifar10-baselines": replace(
        CIFAR, recipes=("mae:decoder-depth=2,decoder-width=64,decoder-heads=2", "simmim:mask-unit=8"), common="batch-size=64,blr=0.004"
    ),
    "cifar10-hog": replace(CIFAR, recipes=("mae", f"mae:{HOG}")),
    "cifar10-pr-mim": replace(CIFAR, recipes=PARTIAL),
    "cifar10-bim": replace(
        DEEP,
        recipes=(
            "mae:decoder-depth=4", "bim:decoder-depth=1,mask-ratio=0.75", "bim:decoder-depth=1,mask-ratio=0.72 0.74 0.76 0.78",
            "bim:decoder-depth=1,mask-ratio=0.6 0.7 0.8 0.9", "bim:decoder-depth=1,segments=2,mask-ratio=0.75", *(f"mae:decoder-depth=4,depth={depth}" for depth in (3, 6, 9)),
        ),
    ),
    "tinyimagenet28-fastmim": replace(
        TINY, recipes=("mae", f"mae:{HALF}", f"mae:{HOG}", f"mae:{HALF},{HOG}", f"mae:{HALF},{DOUBLING},{HOG}")
    ),
    "tinyimagenet28-fastmim-time": replace(
        TINY, recipes=("mae", f"mae:{HALF},{HOG}", f"mae:{HALF},{DOUBLING},{HOG}"), options=TINY.options | dict(budget="5min")
    ),
    "tinyimagenet28-pr-mim": replace(TINY, recipes=PARTIAL),
    "tinyimagenet28-published": replace(
        TINY,
        recipes=(
            f"fastmim:{HOG},{SWIN}", f"fastmim:{HOG},{SWIN},linear-init=timm", f"fastmim:{HOG}", f"fastmim:{HOG},warmup-share=0.05",
            "simmim", "simmim:schedule=cosine,warmup-share=0.05", "simmim:interpolation=bicubic",
        ),
        common=PUBLISHED,
        options=TINY.options | dict(seeds=1),
    ),
    "photos-224": replace(
        PHOTOS,
        recipes=(
            "mae", "lean:input-size=96", "lean-memory:input-size=96", "lean:input-size=128", "pr-mim", "mae:segments=4",
        ),
        options=PHOTOS.options | dict(input_size=(224,), eval_size=(224,)),
    ),
    "photos-rival": replace(
        PHOTOS,
        recipes=(
            "mae", "mae:mask-ratio=0.9", "mae:decoder-depth=2", "mae:blr={twice}", "mae:decoder-width=128", "mae:decoder-depth=4",
            "mae:input-size=224",
        ),
    ),
    "photos-confirmed": replace(
        PHOTOS,
        recipes=(
            "mae:{rival}", "mae:input-size=96,{rival}", "pr-mim:input-size=96,{rival}", "pr-mim:input-size=96,segments=4,{rival}",
        ),
        options=PHOTOS.options | dict(seeds=3),
    ),
    "photos-decoder": replace(
        PHOTOS, recipes=("mae:{rival}", "mae"), options=PHOTOS.options | dict(seeds=3), gpu=False
    ),
    "photos-one": replace(
        PHOTOS,
        recipes=(
            "mae", "mae:target=hog", f"mae:{GROWING}", "pr-mim", "mae:segments=4", "pr-mim:throw=0.7", "pr-mim:fill=0",
            "mae:segments=2", "pr-mim:select=random,fill=0", "pr-mim:blr={half}", "mae:segments=4,mask-ratio=0.72 0.78",
        ),
        common="{rival}",
    ),
    # half the learning rate was worth more to throwing than anything else: is that of throwing?
    "photos-rate": replace(
        PHOTOS, recipes=("mae:blr={half}", "mae:input-size=96,blr={half}", "mae:input-size=96,blr={quarter}"), common="{rival}", gpu=False
    ),
    "photos-half": replace(
        PHOTOS, recipes=("mae:input-size=96,blr={half}",), common="{rival}", options=PHOTOS.options | dict(seeds=3), gpu=False
    ),
    "photos-quarter": replace(
        PHOTOS, recipes=("mae:input-size=96,blr={quarter}", "mae:input-size=128,blr={quarter}"), common="{rival}",
        options=PHOTOS.options | dict(seeds=3), gpu=False,
    ),
    "photos-quarter-224": replace(PHOTOS, recipes=("mae:input-size=224,blr={quarter}",), gpu=False),
    "photos-eighth": replace(
        PHOTOS, recipes=("mae:input-size=96,blr={eighth}", "mae:input-size=128,blr={eighth}"), common="{rival}", gpu=False
    ),
    "photos-quarter-memory": replace(
        PHOTOS, recipes=("pr-mim:input-size=96,segments=4,blr={quarter}",), common="{rival}", options=PHOTOS.options | dict(seeds=3),
        gpu=False,
    ),
    # photos-rival had wider a decoder, and whole epochs only: 90 % masked had an eighth less to train with than the rival
    "photos-ratio": replace(
        PHOTOS, recipes=("mae:mask-ratio=0.9", "lean:input-size=96,mask-ratio=0.9"), common="{rival}",
        options=PHOTOS.options | dict(seeds=3), gpu=False,
    ),
    "photos-ratio-less": replace(
        PHOTOS, recipes=("mae:mask-ratio=0.85", "lean:input-size=96,mask-ratio=0.85"), common="{rival}", gpu=False
    ),
    "photos-ratio-30": replace(
        PHOTOS, recipes=("mae:mask-ratio=0.9", "lean:input-size=96,mask-ratio=0.9"), common="{rival}",
        options=PHOTOS.options | dict(budget="82TFLOP"), gpu=False,
    ),
    # with auto's decoder
    "photos-shipped": replace(PHOTOS, recipes=("lean:input-size=96", "lean-memory:input-size=96"), gpu=False),
    # HOG and growth are out: with three rows of photos-one and one of photos-lower all combinations of throwing, segments and 96 px
    "photos-together": replace(
        PHOTOS,
        recipes=(
            "pr-mim:segments=4", "pr-mim:input-size=96", "mae:segments=4,input-size=96", "pr-mim:segments=4,input-size=96",
        ),
        common="{rival}",
        gpu=False,
    ),
    # lower than the size of the evaluation: FastMIM's two means, taken further down
    "photos-lower": replace(
        PHOTOS, recipes=("mae:input-size=96", f"mae:input-size=96,{RISING}", f"mae:input-size=64,{DOUBLING}"), common="{rival}", gpu=False
    ),
    "photos-painted": replace(PHOTOS, recipes=("fastmim:{swin}", "simmim:{swin}", "fastmim:model=pvt_v2_b0")),
    # the epochs that the budget gives lean-memory; of its four encoders each beside one of that depth trained alone
    "photos-depths": replace(
        PHOTOS,
        recipes=("pr-mim:segments=4", "mae:depth=3", "mae:depth=6", "mae:depth=9"),
        common="input-size=96,{rival}",
        options=PHOTOS.options | dict(depths=True, budget="8.78epochs"),
    ),
    # with the learning rate that ``auto`` gives, of which photos-quarter is the 15 minutes; photos-growth-... had four times as much
    **{
        f"photos-budget-{minutes}": replace(
            PHOTOS,
            recipes=("lean:input-size=96,{rival}", "mae:{rival}", "mae:input-size=224"),
            options=PHOTOS.options | dict(budget=f"{minutes * 41 / 15:.4g}TFLOP"),
            gpu=False,
        )
        for minutes in (7, 30, 60)
    },
}  # fmt: skip


def configure(name: str, scale: str, model: str, data: Path, work: Path) -> Compare:
    """A comparison; its labelled folder is made."""
    own = EXPERIMENTS[name]
    gpu = scale == "gpu"
    data = data / own.set if (data / own.set).is_dir() else data
    if not (data / "train").is_dir():
        raise SystemExit(
            f"{name}: --data {str(data)!r} holds no {own.set}, and has no folder train; unpack.py makes them"
        )
    images = (0, 0) if gpu else own.images
    labelled = work / "-".join(["labelled", own.set, *map(str, images)])
    link_subset(data, labelled, *images)
    # what ``auto`` gives; to a ViT-Ti it gave four times as much when these were begun, a quarter of which is what it gives now
    rate = peak_rate(BATCHES[scale]) * (4 if model == CHOICES[0] else 1) * 256 / BATCHES[scale]
    given = {
        "rival": RIVALS[scale],
        "twice": f"{2 * rate:.3g}",
        "half": f"{rate / 2:.3g}",
        "quarter": f"{rate / 4:.3g}",
        "eighth": f"{rate / 8:.3g}",
        "swin": f"model=swin_tiny_patch4_window7_224{'' if gpu else ',model-kwargs=embed_dim 48'}",
    }
    return Compare(
        data=str((labelled if own.subset else data) / "train"),
        eval=str(labelled),
        out=str(work / f"{name}-{model}-{scale}"),
        device="cuda" if gpu else "cpu",
        model=model,
        recipes=tuple(spec.format(**given) for spec in own.specs()),
        **(own.options | LONG if gpu else own.options),
    )


def taken_over(config: Compare) -> None:
    """Begin with the plan and the cells that are kept, from whichever machine."""
    out, kept = Path(config.out), record.RESULTS / "cells" / Path(config.out).name
    if kept.is_dir() and not out.exists():
        shutil.copytree(kept, out)
        now, file = config.to_json(), out / "config.json"
        before = now | (json.loads(file.read_text()) if file.is_file() else {})
        if before["recipes"] != now["recipes"]:  # what they do with the budget is planned anew, finished cells stay
            (out / "plan.json").unlink(missing_ok=True)
        file.write_text(json.dumps(before | {name: now[name] for name in (*PLACES, "recipes")}))


def keep_cells(config: Compare) -> None:
    """Copy the plan and what finished cells found; there is no path in them."""
    out, kept = Path(config.out), record.RESULTS / "cells" / Path(config.out).name
    for file in (*out.glob("plan.json"), *out.glob("begun.json"), *out.glob("cells/*/result.json")):
        (to := kept / file.relative_to(out)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, to)
    stored = {name: value for name, value in config.to_json().items() if name not in PLACES}
    (kept / "config.json").write_text(json.dumps(stored, indent=1) + "\n")


def tiny(config: Compare) -> Compare:
    """The first recipe of the model itself, in seconds on a CPU."""
    shape = dict(patch_size=8, embed_dim=32, depth=4, num_heads=2)
    own = tuple(recipe for recipe in config.recipes if "model=" not in recipe)
    return replace(
        config, recipes=own[:1] or ("mae",), model_kwargs=shape, input_size=(32,), eval_size=(32,), budget="1epoch", measures=("knn",),
        label_share=None, device="cpu",
    )  # fmt: skip


def run(name: str, arguments: argparse.Namespace) -> bool:
    """Compare; whether all is finished."""
    config = configure(name, arguments.scale, arguments.model, arguments.data, arguments.work)
    if arguments.dry:
        config = tiny(config)
    else:
        taken_over(config)
    stopped = False
    try:
        with stoppable():
            leanmim.compare(config)
    except Stopped as stop:
        print(f"{name}: {stop}; the same command continues")
        stopped = True
    write(name, config, arguments.scale)
    if not arguments.dry:
        keep_cells(config)
    return not stopped


def write(name: str, config: Compare, scale: str) -> None:
    """The table of the cells that are finished, if any, as the comparison left it in its folder."""
    if not (file := Path(config.out) / "table.json").is_file():
        return
    found = json.loads(file.read_text())
    rows = [
        Row(
            **row
            | {
                "scores": {
                    measure: Score(**score | {"values": tuple(score["values"])})
                    for measure, score in row["scores"].items()
                }
            }
        )
        for row in found["rows"]
        if row["seeds"]
    ]
    if not rows:
        return
    table = Table(found["title"], config.measures, parse_budget(config.budget).kind, rows, config.seeds)
    columns = dict.fromkeys(key for row in (*table.accuracies(), *table.costs()) for key in row)
    both = {row["recipe"]: dict.fromkeys(columns, "-") | row for row in table.accuracies()}
    for row in table.costs():
        both[row["recipe"]] |= row
    own = EXPERIMENTS[name]
    train, val = (0, 0) if scale == "gpu" else own.images
    configuration = {
        "data": Path(config.data).parent.name if not own.subset else f"{own.set}, the labelled images", "model": f"{config.model} {config.model_kwargs or ''}".strip(),
        "common": own.common.format(rival=RIVALS[scale]) or "nothing", "budget": config.budget, "seeds": config.seeds,
        "labelled images a class": f"{train or 'all'} to train, {val or 'all'} to test",
        "not finished": ", ".join(row["name"] for row in found["rows"] if row["seeds"] < config.seeds and row["kind"] != "pixels") or "none",
    }  # fmt: skip
    if "finetune" in config.measures:
        tuned = config.labels_per_class or f"{config.label_share:.0%}"
        configuration["fine-tuning"] = f"with {tuned} of a class, {config.finetune_epochs} epochs"
    record.write(
        Path(config.out).name, f"Recipes compared: {name}", configuration, list(both.values()), found["rows"],
        "\n".join([*table.findings(), *([REFERENCE] if scale == "gpu" else [])]),
    )  # fmt: skip


def main() -> None:
    """Compare, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all, or some of: {', '.join(EXPERIMENTS)}")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--work", type=Path, default=Path("runs/ablate"))
    parser.add_argument("--scale", choices=list(MODELS), default="cpu")
    parser.add_argument("--model", choices=CHOICES, help="default: the scale's")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after so long")
    parser.add_argument("--dry", action="store_true", help="the first recipe of each, a tiny model on a CPU")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - EXPERIMENTS.keys():
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are: {', '.join(EXPERIMENTS)}")
    arguments.model = arguments.model or MODELS[arguments.scale]
    gpu = arguments.scale == "gpu"
    names = arguments.names or [
        name for name, own in EXPERIMENTS.items() if (own.gpu if gpu else own.set != PHOTOS.set)
    ]
    if gpu and (short := [name for name in names if not EXPERIMENTS[name].gpu]):
        parser.error(f"{', '.join(short)}: not meant for a GPU's scale")
    end = threading.Timer(60 * arguments.minutes, os.kill, (os.getpid(), signal.SIGTERM))
    end.daemon = True
    end.start()
    try:
        for name in names:
            if not run(name, arguments):
                raise SystemExit(3)
    finally:
        end.cancel()


if __name__ == "__main__":
    main()
