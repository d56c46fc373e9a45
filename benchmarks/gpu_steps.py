"""Training steps on a GPU, beside what was counted without one: the headline, transformers' MAE, the recipes, ways to save memory.

    python benchmarks/gpu_steps.py headline --minutes 8
    python benchmarks/gpu_steps.py --predict            # no GPU needed: results/gpu-predicted.json
    python benchmarks/gpu_steps.py memory --predict     # the cells of this piece anew, the others stay

Each recipe on each model is a cell. A finished cell is added to the journal in --work at once and the table is written anew: however it is
stopped, the same command goes on with the cells that are left (exit code 3 where --minutes were over). `make bench-gpu` runs this.
"""

import argparse
import gc
import json
import re
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import record
import torch
from journal import Journal
from memory_rivals import WAYS
from steps import peak_of, ready, seconds
from torch import Tensor

from leanmim.config import Pretrain
from leanmim.costs import count
from leanmim.costs.kernels import cuda_workspaces
from leanmim.data import Normalise
from leanmim.device import device_name, resolve_device
from leanmim.offload import Offload
from leanmim.recipes import BIM, FASTMIM, LEAN, LEAN_MEMORY, MAE, PR_MIM, SIMMIM, differences, published
from leanmim.step import update

SMALL, BASE = "vit_small_patch16_224", "vit_base_patch16_224"
LARGE, HUGE, SWIN = "vit_large_patch16_224", "vit_huge_patch14_224", "swin_base_patch4_window7_224"
ROOM = {LARGE: 8.0, HUGE: 12.0}
"""GB of device memory in which a model is to train, its segments one by one."""
PEAKS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10": 125, "T4": 65}
"""Dense TFLOP/s in half precision, by the data sheets of these cards."""
ENOUGH = 30.0  # s, with which a cell is begun, or as long as the slowest so far
PREDICTED = "gpu-predicted"  # the result file with what was counted


@dataclass(frozen=True, eq=False)
class Cell:
    """A recipe on a model."""

    name: str
    config: Pretrain


def segments(number: int) -> Pretrain:
    """BIM, one segment at a time on the device."""
    return replace(published(BIM), segments=number, mask_ratio=0.75, offload=True)


def cells(recipes: dict[str, Pretrain], *models: str) -> list[Cell]:
    """Every recipe on the first model, then on the others."""
    common: dict[str, Any] = dict(batch_size=256, precision="bf16")
    return [Cell(name, replace(recipe, model=model, **common)) for model in models for name, recipe in recipes.items()]


PLAIN = {"mae": published(MAE)}
RECIPES = {
    "mae": published(MAE),
    "pr-mim": published(PR_MIM),
    "bim": published(BIM),
    "bim, one segment on the device": published(replace(BIM, offload=True)),
    "fastmim": published(FASTMIM),
    "lean": published(LEAN),
    "lean-memory": published(LEAN_MEMORY),
}
CELLS = {
    "headline": [
        *cells({"bim, 8 segments": segments(8)}, LARGE, HUGE),
        *cells({"bim, 4 segments": segments(4)}, LARGE, HUGE),
        *cells(PLAIN, LARGE, HUGE),
    ],
    "transformers": cells(PLAIN, BASE, LARGE, SMALL),
    "recipes": [
        *cells(RECIPES, BASE),
        *cells({name: published(recipe) for name, recipe in (("mae", MAE), ("lean", LEAN))}, SMALL),
        *cells({name: published(recipe) for name, recipe in (("simmim", SIMMIM), ("fastmim", FASTMIM))}, SWIN),
    ],
    "memory": cells({name: WAYS[name] for name in ("mae", "mae, all four")} | WAYS, BASE),  # the extremes first
}


def tiny(found: list[Cell]) -> list[Cell]:
    """The first cells with a tiny model, in two segments at most: seconds on a CPU."""
    shape: dict[str, Any] = dict(
        model="vit_tiny_patch16_224", model_kwargs=dict(patch_size=8, embed_dim=64, depth=2, num_heads=2), input_size=(32,),
        batch_size=2, precision="fp32", decoder_depth=1, decoder_width=32, decoder_heads=2,
    )  # fmt: skip
    changes = ({**shape, "segments": min(cell.config.segments, 2)} for cell in found)
    return [Cell(cell.name, replace(cell.config, **own)) for cell, own in zip(found, changes, strict=True)][:2]


def described(config: Pretrain) -> dict[str, Any]:
    """By what a configuration is known in files."""
    return json.loads(json.dumps(differences(config) | {"recipe": config.recipe}))


def counted() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What the file holds: rows of its table, and the numbers."""
    file = record.RESULTS / f"{PREDICTED}.json"
    known = json.loads(file.read_text()) if file.is_file() else {"table": [], "raw": []}
    return list(zip(known["table"], known["raw"], strict=True))


def key_of(config: dict[str, Any]) -> str:
    """Of a configuration as files have it."""
    return json.dumps(config, sort_keys=True)


def predict(found: list[Cell], others: list[Cell]) -> None:
    """Count the step of every cell as CUDA does it; write the file, in which what was counted for ``others`` stays."""
    stay = {key_of(described(cell.config)) for cell in others}
    known = {key: entry for entry in counted() if (key := key_of(entry[1]["config"])) in stay}
    for key, cell in {key_of(described(cell.config)): cell for cell in found}.items():
        cost, _ = count(cell.config, "cuda")
        row = {
            "model": cell.config.model.removesuffix("_224"), "recipe": cell.name, "precision": cell.config.precision, "batch": cost.batch_size,
            "training GFLOP an image": f"{cost.train_flops_per_image / 1e9:.1f}",
            **{f"{kind}, GB": f"{getattr(cost, f'{kind}_bytes') / 1e9:.2f}" for kind in ("weight", "gradient", "optimizer", "saved", "peak")},
        }  # fmt: skip
        known[key] = row, {"config": described(cell.config), "workspace": cuda_workspaces(), **asdict(cost)}
        print(row, flush=True)
    rows, raw = [row for row, _ in known.values()], [one for _, one in known.values()]
    title = "What `make bench-gpu` compares with: steps counted without a GPU"
    record.write(PREDICTED, title, {"as on": "CUDA", "GB": "1e9 bytes"}, rows, raw)


def predicted(config: Pretrain) -> dict[str, Any] | None:
    """What was counted for a configuration; None where it was not, or another one was."""
    return next((one for _, one in counted() if one["config"] == described(config)), None)


def measured(config: Pretrain, device: torch.device) -> dict[str, Any]:
    """Seconds of real steps, and bytes at their peak: allocated, kept by the allocator, in use on the card."""
    placed, optimizers = ready(config, device)
    normalise = Normalise([0.5] * config.channels, [0.5] * config.channels, device)
    shape = (int(config.batch_size), config.channels, *config.size)

    def batches() -> Iterator[Tensor]:
        for _ in range(config.accum):
            read = torch.randint(0, 255, shape, dtype=torch.uint8, device=device)  # a batch that has just arrived
            yield normalise(read)

    def step() -> None:
        update(
            placed.losses, optimizers, batches(), config.accum, config.clip_grad,
            segment_first=isinstance(placed, Offload), in_backward=config.update_in_backward,
        )  # fmt: skip

    step()
    found: dict[str, Any] = {"allocated": peak_of(step, placed, optimizers, device)}
    found["seconds"] = [seconds(step, device) for _ in range(5)]
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        found |= {"reserved": torch.cuda.max_memory_reserved(device), "used": total - free, "card": total}
    return found


def beside_transformers(config: Pretrain, device: torch.device) -> dict[str, Any]:
    """Our MAE's step and transformers'."""
    from vs_transformers import compare_steps

    row, pairs = compare_steps(config, device, 10)
    return {"row": row, "pairs": pairs, "seconds": [ours for ours, _ in pairs]}


MEASURE: dict[str, Callable[[Pretrain, torch.device], dict[str, Any]]] = {"transformers": beside_transformers}


def product_speed(device: torch.device) -> float:
    """FLOP/s of a large matrix product in bf16: what the card reaches."""
    side = 8192 if device.type == "cuda" else 64
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    times = [seconds(lambda: a @ b, device) for _ in range(13)]
    return 2 * side**3 / median(times[3:])


def row(cell: Cell, found: dict[str, Any], card: dict[str, Any]) -> dict[str, Any]:
    """A line of the table. GB are 1e9 bytes."""
    own: dict[str, Any] = {
        "model": cell.config.model.removesuffix("_224"),
        "recipe": cell.name,
        "batch": cell.config.batch_size,
    }
    if "error" in found:
        return own | {"step, ms": found["error"]}
    cost, took = predicted(cell.config), median(found["seconds"])
    own |= found.get("row") or {"step, ms": f"{1e3 * took:.1f}"}
    own["images/s"] = f"{cell.config.batch_size / took:.0f}"
    speed = cost["train_flops_per_image"] * cell.config.batch_size / took if cost else None
    own["TFLOP/s"] = f"{speed / 1e12:.1f}" if speed else "not counted"
    own["of a matrix product's"] = f"{speed / card['product']:.0%}" if speed else ""
    own["of the data sheet's"] = f"{speed / card['sheet']:.0%}" if speed and card["sheet"] else ""
    if "row" in found:
        return own
    own["peak, GB"] = f"{found['allocated'] / 1e9:.3g}"
    if cost:
        expected = cost["peak_bytes"] - cost["workspace"] + card["workspace"]
        own |= {"predicted, GB": f"{expected / 1e9:.3g}", "error": f"{expected / found['allocated'] - 1:+.1%}"}
    if "reserved" in found:
        own |= {
            "reserved, GB": f"{found['reserved'] / 1e9:.3g}",
            "in use on the card, GB": f"{found['used'] / 1e9:.3g}",
        }
    if cell.config.offload and cell.config.model in ROOM:
        room = ROOM[cell.config.model]
        own["room"] = f"{room:g} GB: {'kept' if found.get('used', found['allocated']) / 1e9 <= room else 'not kept'}"
    return own


def write(piece: str, found: list[tuple[Cell, dict[str, Any]]], total: int, card: dict[str, Any], shown: bool) -> None:
    """The table of what is finished, perhaps ``shown`` too; the columns are those of all rows."""
    rows = [row(cell, one, card) for cell, one in found]
    columns = dict.fromkeys(key for line in rows for key in line)
    configuration = {
        "precision": found[0][0].config.precision, "finished": f"{len(found)} of {total}",
        "matrix product": f"{card['product'] / 1e12:.3g} TFLOP/s", "data sheet": f"{card['sheet'] / 1e12:g} TFLOP/s" if card["sheet"] else "not known",
    }  # fmt: skip
    note = (
        f"GB are 1e9 bytes. Predicted: {PREDICTED}.json, counted without a GPU, with this card's cuBLAS workspace. In use on the card: all processes, the CUDA "
        "context included."
    )
    raw = [{"recipe": cell.name, "config": described(cell.config), **one} for cell, one in found]
    rows = [dict.fromkeys(columns, "") | line for line in rows]
    record.write(f"gpu-{piece}", TITLES[piece], configuration, rows, raw, note, shown)


TITLES = {
    "headline": "ViT-L/16 and ViT-H/14 with one segment at a time on the GPU",
    "transformers": "MAE's training step against transformers' ViTMAE, and its share of the card's peak",
    "recipes": "Step time and peak memory of the recipes",
    "memory": "Ways to save memory: step time and peak of ViT-B/16",
}


def run(piece: str, own: list[Cell], journal: Journal, device: torch.device, minutes: float) -> int:
    """Measure the cells that are left.

    Returns:
        Exit code: 0 all are measured; 1 some failed, which are tried again by the next call; 3 the time is over.
    """
    end, where, slowest, code = time.monotonic() + 60 * minutes, device_name(device), ENOUGH, 0
    cuda = device.type == "cuda"
    card = {
        "product": product_speed(device), "workspace": cuda_workspaces() if cuda else 0,
        "sheet": next((1e12 * PEAKS[word] for word in re.split(r"\W+", where) if word in PEAKS), None),
    }  # fmt: skip
    keys = {cell: dict(piece=piece, cell=cell.name, config=described(cell.config), device=where) for cell in own}

    def finished() -> list[tuple[Cell, dict[str, Any]]]:
        done = [(cell, [e["found"] for e in journal.find(**keys[cell]) if "found" in e]) for cell in own]
        return [(cell, found[-1]) for cell, found in done if found]

    known = {cell for cell, _ in finished()}
    left = [cell for cell in own if cell not in known]
    for cell in sorted(left, key=lambda cell: len(journal.find(**keys[cell]))):  # what was begun in vain comes last
        if end - time.monotonic() < slowest:
            code = 3
            break
        began = time.monotonic()
        journal.add(**keys[cell])
        try:
            found = MEASURE.get(piece, measured)(cell.config, device)
        except torch.OutOfMemoryError:
            found = {"error": "out of memory"}
        except Exception:  # the other cells are worth their time
            traceback.print_exc()
            print(f"{piece}: {cell.name}, {cell.config.model} failed, see above", flush=True)
            found, code = None, 1
        if found:
            journal.add(**keys[cell], found=found)
            write(piece, finished(), len(own), card, shown=False)
            print(row(cell, found, card), flush=True)
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
        slowest = max(slowest, time.monotonic() - began)
    if done := finished():
        write(piece, done, len(own), card, shown=True)
    return code


def main() -> None:
    """Count, or measure a piece."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("piece", nargs="?", choices=list(CELLS))
    parser.add_argument(
        "--predict", action="store_true", help="count what all pieces, or this one, compare with; needs no GPU"
    )
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--work", type=Path, default=Path("runs/bench-gpu"))
    parser.add_argument("--dry", action="store_true", help="tiny models on a CPU")
    arguments = parser.parse_args()
    if not arguments.predict and not arguments.piece:
        parser.error(f"name a piece ({', '.join(CELLS)}), or give --predict")
    chosen = {name: tiny(own) if arguments.dry else own for name, own in CELLS.items()}
    if arguments.predict:
        everything = [cell for own in chosen.values() for cell in own]
        predict(*((chosen[arguments.piece], everything) if arguments.piece else (everything, [])))
        return
    device = resolve_device("cpu" if arguments.dry else "cuda")
    code = run(
        arguments.piece, chosen[arguments.piece], Journal(arguments.work / "journal.jsonl"), device, arguments.minutes
    )
    raise SystemExit(code)


if __name__ == "__main__":
    main()
