"""`leanmim cost` against what a real step allocates: peak, and bytes saved for backward; and beside torch's MemTracker.

    python benchmarks/cost_check.py
    python benchmarks/cost_check.py --parts tools

On a CPU every allocation and release of torch's allocator is counted by its profiler, what kernels take for themselves
included; on a GPU the allocator reports its own peak. Each configuration is a process of its own. Tools: the same step, of small
models in this process, counted by `leanmim cost` and by torch.distributed._tools.mem_tracker.MemTracker, both on fake tensors.
"""

import argparse
import json
from dataclasses import replace
from itertools import product
from typing import Any

import record
import torch
from steps import measure, measure_each
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from leanmim.caches import empty_caches
from leanmim.config import Pretrain
from leanmim.costs import count
from leanmim.costs.counting import batches, with_state
from leanmim.costs.kernels import cuda_workspaces
from leanmim.data import Normalise
from leanmim.device import resolve_precision
from leanmim.encoders.backbone import backbone_of
from leanmim.factory import build
from leanmim.recipes import RECIPES, published
from leanmim.recompute import checkpoint_blocks
from leanmim.step import make_optimizers, update

MODELS = ("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224", "swin_tiny_patch4_window7_224")
SMALL = ("vit_tiny_patch16_224", "vit_small_patch16_224")


def allocations(arguments: argparse.Namespace) -> None:
    """Prediction and measurement of every configuration, one after the other."""
    rows, raw = [], []
    axes = (arguments.models, arguments.recipes, arguments.batches, arguments.accums, ("fp32", "bf16"))
    cells = [cell for cell in product(*axes) if not (cell[0].startswith("swin") and cell[1] == "mae")]  # cannot drop
    configs = [
        replace(published(RECIPES[recipe]), model=name, batch_size=batch, accum=accum, precision=precision)
        for name, recipe, batch, accum, precision in cells
    ]
    for cell, found in zip(cells, measure_each(configs, torch.device(arguments.device)), strict=True):
        name, recipe, batch, accum, precision = cell
        raw.append({"configuration": cell, **found})
        rows.append({
            "model": name, "recipe": recipe, "batch": batch, "accum": accum, "precision": precision,
            "peak, predicted MiB": f"{found['predicted_peak'] / 2**20:.0f}",
            "measured MiB": f"{found['peak'] / 2**20:.0f}", "ratio": f"{found['predicted_peak'] / found['peak']:.3f}",
            "saved, predicted MiB": f"{found['predicted_saved'] / 2**20:.0f}",
            "measured, MiB": f"{found['saved'] / 2**20:.0f}",
            "ratio ": f"{found['predicted_saved'] / found['saved']:.3f}",
        })  # fmt: skip
        print(rows[-1], flush=True)
    worst = {
        kind: max(abs(1 - entry[f"predicted_{kind}"] / entry[kind]) for entry in raw) for kind in ("peak", "saved")
    }
    note = (
        f"Largest error: peak {worst['peak']:.1%} (target 10 %), saved for backward {worst['saved']:.1%} (target 3 %)."
    )
    configuration = {"device": arguments.device, "input": "each recipe's own", "threads": torch.get_num_threads()}
    record.write(f"cost-check-{arguments.device}", "Predicted against measured memory of a training step",
                 configuration, rows, raw, note)  # fmt: skip


def by_mem_tracker(config: Pretrain, frozen: bool = True) -> int:
    """The peak of a step by torch's MemTracker, bytes: on fake tensors and after the optimizer's first step, as `count` does it.

    Args:
        config: the recipe, of one phase.
        frozen: whether parameters without gradient stay parameters; else they become buffers, which are as large.
    """
    backbone = backbone_of(config, config.depth, device="meta")
    with empty_caches(), FakeTensorMode(allow_non_fake_inputs=True), torch.random.fork_rng(devices=[]):
        model = build(config, backbone.to_empty(device="cpu")).train()
        model.autocast = resolve_precision(config.precision, torch.device("cpu"))
        if config.checkpointing:
            checkpoint_blocks(model.encoder, model.decoders)
        optimizers = with_state(make_optimizers(model, config), model)
        if not frozen:
            to_buffers(model)
        normalise = Normalise([0.5] * config.channels, [0.5] * config.channels, torch.device("cpu"))
        images = torch.empty(int(config.batch_size), config.channels, *config.size, dtype=torch.uint8)
        tracker = MemTracker()
        tracker.track_external(model, *optimizers)
        with tracker:
            update(
                model, optimizers, batches(images, normalise, config.accum), config.accum, config.clip_grad,
                in_backward=config.update_in_backward,
            )  # fmt: skip
        return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


def to_buffers(model: nn.Module) -> None:
    """Make a buffer of every parameter that is not trained."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                delattr(module, name)
                module.register_buffer(name, parameter.data)


def tried(config: Pretrain) -> dict[str, Any]:
    """What MemTracker finds: its peak, as the model is or with buffers for what is frozen, and why not where it does not run. It does
    not tell a host's memory from a device's, and is not asked where both are used.
    """
    reasons: list[str] = []
    if config.offload:
        return {"tracked": None, "frozen": None, "reasons": reasons}
    for frozen in (True, False):
        try:
            return {"tracked": by_mem_tracker(config, frozen), "frozen": frozen, "reasons": reasons}
        except (RuntimeError, NotImplementedError, AssertionError, KeyError) as error:  # its own, of many kinds
            reasons.append(f"{type(error).__name__}: {error}".splitlines()[0])
    return {"tracked": None, "frozen": None, "reasons": reasons}


def as_on_cuda(config: Pretrain) -> dict[str, int]:
    """What is counted where something waits on the host: on a CPU nothing would."""
    return {"predicted_peak": count(config, "cuda")[0].peak_bytes - cuda_workspaces()} if config.offload else {}


WAYS: dict[str, dict[str, Any]] = {
    "": {},
    "checkpointing": {"checkpointing": True},
    "8-bit": {"optimizer": "adamw8bit"},
    "update in backward": {"update_in_backward": True},
    "offload": {"offload": True},
}
WAYS["all four"] = {name: value for way in WAYS.values() for name, value in way.items()}
CELLS = [  # model, recipe, precision, images of a batch, batches of a step, a way to save memory
    *((model, recipe, "fp32", 8, 1, "") for recipe in ("mae", "bim") for model in SMALL),
    *((SMALL[0], recipe, "fp32", 8, 1, "") for recipe in ("simmim", "fastmim", "pr-mim")),
    (SMALL[0], "mae", "fp32", 8, 2, ""), (SMALL[0], "mae", "bf16", 8, 1, ""), (SMALL[1], "fastmim", "fp32", 8, 1, ""),
    # where activations weigh most, which is what checkpointing saves
    *((SMALL[0], "mae", "fp32", 128, 1, way) for way in WAYS),
    *((SMALL[0], "bim", "fp32", 128, 1, way) for way in ("offload", "all four")),
]  # fmt: skip


def tools(size: int, batches: list[int]) -> None:
    """Our count, MemTracker's and what is allocated, of recipes with the numbers that ``auto`` gives them. Cells of other batches than
    these stay as the file has them.
    """
    file = record.RESULTS / "cost-tools-cpu.json"
    known = json.loads(file.read_text())["raw"] if file.is_file() else []
    rows: list[dict[str, Any]] = []
    raw: list[dict[str, Any]] = []
    for model, recipe, precision, batch, accum, way in CELLS:
        cell = {
            "model": model, "recipe": recipe, "with": way, "precision": precision, "batch": batch, "accum": accum,
        }  # fmt: skip
        found: dict[str, Any] | None
        if batch in batches:
            config = replace(
                RECIPES[recipe], model=model, input_size=(size,), batch_size=batch, precision=precision, accum=accum,
                **WAYS[way],
            )  # fmt: skip
            found = {**cell, **measure(config, torch.device("cpu")), **tried(config), **as_on_cuda(config)}
        else:
            found = next((entry for entry in known if cell.items() <= entry.items()), None)
        if not found:
            continue
        raw.append(found)
        tracked = found["tracked"]
        rows.append({
            "model": model.removesuffix("_224"), "recipe": recipe, "with": way, "precision": precision, "batch": batch, "accum": accum,
            "allocated, MiB": f"{found['peak'] / 2**20:.1f}", "leanmim cost, MiB": f"{found['predicted_peak'] / 2**20:.1f}",
            "error": f"{found['predicted_peak'] / found['peak'] - 1:+.1%}",
            "MemTracker, MiB": f"{tracked / 2**20:.1f}" if tracked else "does not run" if found["reasons"] else "not tried",
            "its error": f"{tracked / found['peak'] - 1:+.1%}" if tracked else "",
        })  # fmt: skip
        print(rows[-1], flush=True)
    ours = max(abs(entry["predicted_peak"] / entry["peak"] - 1) for entry in raw)
    theirs = [abs(entry["tracked"] / entry["peak"] - 1) for entry in raw if entry["tracked"]]
    asked = sum(bool(entry["tracked"] or entry["reasons"]) for entry in raw)
    worst = f"{max(theirs):.1%} in the {len(theirs)} of {asked} where it runs" if theirs else "runs nowhere"
    note = f"Largest error: leanmim cost {ours:.1%}, MemTracker {worst}."
    if reasons := dict.fromkeys(reason for entry in raw for reason in entry["reasons"]):
        note += f" It raises: {'; '.join(reasons)}. Where it does so for frozen parameters, they are made buffers for it, which are as large."
    note += " Offloaded: what is on the device; memory outside torch's allocator stands for the host's, which MemTracker does not tell "
    note += "apart; counted as on CUDA, without cuBLAS's workspaces."
    configuration = {"device": "cpu", "input": f"{size} px", "threads": torch.get_num_threads()}
    title = "Peak memory of a training step: counted, by MemTracker, and allocated"
    record.write("cost-tools-cpu", title, configuration, rows, raw, note)


def main() -> None:
    """Measure, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["allocations", "tools"], choices=["allocations", "tools"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of allocations")
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="of allocations")
    parser.add_argument("--recipes", nargs="+", default=["mae", "simmim"], help="of allocations")
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 32], help="of allocations")
    parser.add_argument("--accums", nargs="+", type=int, default=[1, 2], help="of allocations")
    parser.add_argument("--input-size", type=int, default=96, help="of tools")
    parser.add_argument(
        "--tools-batches", nargs="+", type=int, default=[8, 128], help="cells of tools; the others' results stay"
    )
    arguments = parser.parse_args()
    if "allocations" in arguments.parts:
        allocations(arguments)
    if "tools" in arguments.parts:
        tools(arguments.input_size, arguments.tools_batches)


if __name__ == "__main__":
    main()
