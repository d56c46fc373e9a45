"""Command lines that must be refused: exit code 2, one message, nothing written. Systematic ones of every field, and others.

`prepare` makes the folder that they are run in, `wrong_lines` gives them, `outcome` runs one in a process of its own.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

from PIL import Image

from leanmim.cli import COMMANDS
from leanmim.recipes import MAE
from tests.helpers import PLAIN
from tests.runs import labelled, untrained

TINY = "--model vit_tiny_patch16_224 --input-size 32 --device cpu --workers 0"
SMALL = f"{TINY} --model-kwargs patch_size 8 embed_dim 32 depth 4 num_heads 2"
START = {  # of each command a line that is right, as far as it is read before the fields are checked
    "pretrain": f"pretrain mae --data photos --out new {TINY}",
    "finetune": "finetune run --data labelled --out new --device cpu --workers 0",
    "predict": "predict run photos --out new.csv --device cpu --workers 0",
    "embed": "embed run --data photos --out new.npy --device cpu --workers 0",
    "cost": "cost mae --device cpu",
    "plan": "plan mae --data photos --device cpu --workers 0",
    "compare": "compare --recipes mae --data photos --eval labelled --out new --device cpu --workers 0",
    "evaluate": "evaluate run --data labelled --device cpu --workers 0",
    "knn": "knn run --data labelled --device cpu --workers 0",
    "probe": "probe run --data labelled --device cpu --workers 0",
    "stats": "stats --data photos --out new.json",
    "show": "show run --out new.png",
    "export": "export run --out new",
    "publish": "publish run me/new",
    "report": "report run --out new.html",
}
GIANT = "9" * 23
OTHERS = f"""
pretrian mae
pretrain
pretrain mea --data photos --out new
pretrain mae --data photos --out new --betas 0.9 1
pretrain mae --data photos --out new --betas 1.5 0.9
pretrain mae --data photos --out new --betas 0.9 nan
pretrain mae --data photos --out new --betas -0.1 0.9
pretrain mae --data photos --out new --crop-ratio .75 inf
pretrain mae --data photos --out new --crop-ratio 0 1
pretrain mae --data photos --out new --crop-scale 0 1
pretrain mae --data photos --out new --crop-scale .5 .2
pretrain mae --data photos --out new --mean 128 128 128 --std 64 64 64
pretrain mae --data photos --out new --mean .5 .5 .5 --std 64 64 64
pretrain mae --data photos --out new --mean .5 .5 .5 --std 0 .2 .2
pretrain mae --data photos --out new --mean .5 .5 .5
pretrain mae --data photos --out new --mean .5 --std .5
pretrain mae --data photos --out new --keep 0
pretrain mae --data photos --out new --process-timeout 0
pretrain mae --data photos --out new --seed {GIANT}
pretrain mae --data photos --out new --seed 4294967296
pretrain mae --data photos --out new --blr 1e39
pretrain mae --data photos --out new --lr 1e39
pretrain mae --data photos --out new --lr 1 --blr 1
pretrain mae --data photos --out new --epochs 0 --blr nan --batch-size -3 --keep 0
pretrain mae --data photos --out new --memory much
pretrain mae --data photos --out new --memory 0
pretrain mae --data photos --out new --memory 1KB {SMALL}
pretrain mae --data photos --out new --hours 0
pretrain mae --data photos --out new --precision fp16
pretrain mae --data photos --out new --target pixel {SMALL}
pretrain mae --data photos --out new --masking drops {SMALL}
pretrain mae --data photos --out new --select near
pretrain mae --data photos --out new --statistics mydata
pretrain mae --data photos --out new --data-changed yes
pretrain mae --data photos --out new --overwrite no
pretrain mae --data photos --out new --channels 17
pretrain mae --data photos --out new --channels 2 --values 8-bit
pretrain mae --data photos --out new --stats nowhere.json
stats --data photos --channels 5
stats --data nowhere
pretrain mae --data photos --out new --segments 0
pretrain mae --data photos --out new --segments 3 2 {SMALL}
pretrain mae --data photos --out new --segments 3 7 {SMALL}
pretrain mae --data photos --out new --depth 9 {SMALL}
pretrain mae --data photos --out new --mask-ratio .9 .5
pretrain mae --data photos --out new --decoder-width 30 --decoder-heads 2
pretrain mae --data photos --out new --batch-size 999999 {SMALL}
pretrain mae --data photos --out new --effective-batch 999999 {SMALL}
pretrain mae --data photos --out new --workers 1025
pretrain mae --data photos --out new --init '' {SMALL}
pretrain mae --data photos --out new --init nowhere {SMALL}
pretrain mae --data photos --out new --init photos {SMALL}
pretrain mae --data photos --out new --knn-data '' {SMALL}
pretrain mae --data photos --out new --knn-data nowhere {SMALL}
pretrain mae --data photos --out new --knn-data text.txt {SMALL}
pretrain mae --data '' --out new
pretrain mae --data photos --out ''
pretrain mae --data photos '' --out new
pretrain mae --data nowhere --out new
pretrain mae --data empty --out new
pretrain mae --data text.txt --out new
pretrain mae --data photos/0.png --out new
pretrain mae --data photos --out text.txt {SMALL}
pretrain mae --data photos --out text.txt/new {SMALL}
pretrain mae --data photos --out photos {SMALL}
pretrain mae --data photos --out run --mask-ratio .5 {SMALL}
pretrain mae --data photos --out {"n" * 300} {SMALL}
pretrain fastmim-p --data photos --out new --phase-scales 1
pretrain fastmim-p --data photos --out new --phase-starts 0 0 0
pretrain fastmim-p --data photos --out new --phase-starts 0 nan 1
pretrain fastmim-p --data photos --out new --phase-scales inf inf inf
pretrain fastmim-p --data photos --out new --phase-blrs 1 1 1e39
finetune '' --data labelled --out new
finetune run --data '' --out new
finetune run --data labelled --out ''
finetune nowhere --data labelled --out new
finetune text.txt --data labelled --out new
finetune run --data nowhere --out new
finetune run --data empty --out new
finetune run --data labelled --out run
finetune run --data labelled --out text.txt
finetune run --data labelled --out new --recipe mea
finetune run --data labelled --out new --recipe ''
finetune run --data labelled --out new --randaugment wild
finetune run --data labelled --out new --model vit_tiny_patch16_224
finetune run --data labelled --out new --betas 1 1
finetune run --data labelled --out new --lr 1e39
finetune run --data labelled --out new --label-share 0
finetune run --data labelled --out new --label-share .5 --labels-per-class 2
finetune scratch --data labelled --out new
finetune scratch --data labelled --out new --model nope
finetune scratch --data labelled --out new --model hf-hub:timm/vit_tiny_patch16_224.augreg_in21k
finetune scratch --data labelled --out new --model vit_tiny_patch16_224 --model-kwargs checkpoint_path text.txt
predict run photos --out new.csv
predict nowhere photos --out new.csv
predict run '' --out new.csv
predict run photos --out ''
predict run photos --out empty
embed run --data photos --out ''
embed run --data '' --out new.npy
embed '' --data photos --out new.npy
embed nowhere --data photos --out new.npy
embed run --data empty --out new.npy
embed run --data photos --out new.txt
embed run --data photos --out text.txt/new.npy
embed run --data photos --out new.npy --layer 5
embed run --data photos --out new.npy --depth 2
embed run --data photos --out new.npy --features patches --pool token
cost mea
cost ''
cost mae:throw=2
cost mae:betas=1,seed=-1
cost mae --model nope
cost mae --model ''
cost mae --model-kwargs depth 0
cost mae --memory 1
plan --data photos --model nope
plan mae --data nowhere
plan mae --data ''
plan mea --data photos
plan mae --data photos --memory nothing
plan mae:blr=inf --data photos
probe run --data labelled --blr inf
probe run --data labelled --c -1
probe nowhere --data labelled
probe run --data ''
probe run --data photos
knn '' --data labelled
knn run --data text.txt
knn run --data labelled --baselines nowhere
knn run --data labelled --baselines ''
knn run --data labelled --model vit_tiny_patch16_224
knn run --data labelled --pool token --depth 0
knn scratch --data labelled --model vit_tiny_patch16_224 --model-kwargs pretrained True
knn scratch --data labelled --model vit_tiny_patch16_224 --model-kwargs embed_dim 64
evaluate nowhere --data labelled
evaluate run --data empty
evaluate run --data labelled --layers 9
evaluate run --data labelled --k 0 1 2
evaluate run --data labelled --shots 0
evaluate run
evaluate run --data ''
evaluate run --masks ''
evaluate run --masks nowhere
evaluate run --masks photos
evaluate run --masks labelled
show
show nowhere
show run nowhere
show ''
show text.txt
show run --out ''
show run --images ''
show run --images nowhere
show run --segment 1
export nowhere
export ''
export run --out ''
export run --out text.txt
export run --out text.txt/new
export run --out photos
export run --out new --depth 2
export run --out new --depth 1 --all-depths
export run --out new --format keras
report nowhere
report ''
report run ''
report run --out ''
report run --out empty
report
""".strip().splitlines()
ARGUMENTS = (
    "patch_size 0", "patch_size -1", "patch_size 7", "patch_size nan", "patch_size big", "patch_size 1e9", "num_heads 0",
    "num_heads 5", "num_heads -2", "embed_dim 0", "embed_dim 63", "embed_dim -64", "embed_dim inf", "embed_dim 1000000000",
    "depth 0", "depth -1", "depth 2.5", "depth 1000000", "in_chans 4", "img_size 32", "pretrained True", "pretrained_cfg x",
    "pretrained_cfg_overlay x", "checkpoint_path text.txt", "cache_dir empty", "num_classes 3", "features_only True",
    "out_indices 1", "device cuda", "dtype float16", "drop_path_rate 1.5", "drop_path_rate nan", "drop_rate -0.1",
    "drop_rate half", "patch_drop_rate 1", "mlp_ratio 0", "mlp_ratio -1", "mlp_ratio nan", "mlp_ratio 1000000",
    "norm_layer nope", "act_layer nope", "init_values word", "reg_tokens -1", "teacher dino", "depth",
    "global_pool nope", "pos_embed nope", "weight_init nope", "patch_drop_rate 0.5",
)  # fmt: skip


def prepare(folder: Path) -> None:
    """Make what the lines name: photos, labelled, a run, an empty folder, a text."""
    tiny = replace(
        MAE, data=str(folder / "photos"), out=str(folder / "run"), model="vit_tiny_patch16_224", model_kwargs=PLAIN,
        input_size=(32,), decoder_depth=1, decoder_width=32, decoder_heads=2, epochs=2, batch_size=4, effective_batch=4,
        blr=1.5e-4, workers=0, device="cpu",
    )  # fmt: skip
    (folder / "photos").mkdir()
    for i in range(8):
        Image.new("RGB", (40 + i, 40), (30 * i, 90, 20)).save(folder / "photos" / f"{i}.png")
    (folder / "empty").mkdir()
    (folder / "text.txt").write_text("no image, no checkpoint")
    labelled(folder / "labelled")
    untrained(tiny)


def wrong_lines() -> list[list[str]]:
    """What follows `leanmim`, some four hundred times: numbers of every command out of range, arguments of a model, others."""
    found = [words(line) for line in OTHERS]
    for start in START.values():
        kind = COMMANDS[start.split()[0]].config
        found += [[*start.split(), *option] for option in out_of_range(kind)]
    found += [[*START["pretrain"].split(), "--model-kwargs", *given.split()] for given in ARGUMENTS]
    return found


def words(line: str) -> list[str]:
    """A line's words; two quotes are an empty one."""
    return ["" if word == "''" else word for word in line.split(" ")]


def out_of_range(kind: Any) -> Iterator[list[str]]:
    """Options of a configuration with a number that none of them takes: of each field too little, too much, not finite."""
    for number, own in enumerate(fields(kind)):
        option, pair = "--" + own.name.replace("_", "-"), tuple[float, float] in flat(own.type)
        kinds = flat(own.type)
        wrong = ["-7", GIANT] if int in kinds else ["nan", "-inf", "1e39", "-7"] if float in kinds else []
        for value in wrong[number % 2 :: 2]:  # in turn: a few hundred lines in all, not thousands
            yield [option, value, value] if pair else [option, value]


def flat(kind: Any) -> set[Any]:
    """The types that a declared type is made of."""
    return {kind}.union(*map(flat, get_args(kind)))


def contents(folder: Path) -> set[str]:
    """Every file and folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def outcome(line: list[str], folder: Path) -> str:
    """What is wrong with what a line does in a prepared folder, in a process of its own; empty if it is refused as it must be."""
    before = contents(folder)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "leanmim", *line]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=120)
    except subprocess.TimeoutExpired:
        return "hangs"
    return judged(done.returncode, done.stderr, contents(folder) - before)


def judged(code: object, said: str, new: set[str]) -> str:
    """What is wrong with an exit code, the text on stderr, and new files; empty if nothing is."""
    if "Traceback" in said:
        return f"traceback: {said.strip().splitlines()[-1]}"
    if code != 2:
        return f"exit code {code}"
    if not said.startswith("leanmim: ") and "--help" not in said:  # of what cannot be parsed tyro tells in its own way
        return f"says {said[:200]!r}"
    return f"writes {', '.join(sorted(new))}" if new else ""
