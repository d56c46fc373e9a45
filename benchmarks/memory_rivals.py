"""MAE with each way to save memory, and BIM with and without them, in one table.

    python benchmarks/memory_rivals.py

Counted: peak memory and training FLOPs of ViT-B, ViT-L and ViT-H at batch 64 and 256, as on CUDA in bf16. Measured: ViT-B at a small
batch on the CPU, what a step allocates, each way in a process of its own, and its time in turns with MAE's. The 8-bit
optimizer wants torchao.
"""

import argparse
import json
import statistics
from dataclasses import asdict, fields, replace

import record
import torch
from steps import in_turns, measure_each

from leanmim.config import Pretrain
from leanmim.costs import StepCost, count
from leanmim.recipes import BIM, MAE, published

MAE, BIM = published(MAE), published(BIM)
EIGHT = replace(BIM, segments=8, mask_ratio=0.75)
LIGHT = replace(MAE, decoder_depth=1)  # as light a decoder as each of BIM's

WAYS: dict[str, Pretrain] = {
    "mae": MAE,
    "mae, checkpointing": replace(MAE, checkpointing=True),
    "mae, 8-bit": replace(MAE, optimizer="adamw8bit"),
    "mae, update in backward": replace(MAE, update_in_backward=True),
    "mae, offload": replace(MAE, offload=True),
    "mae, checkpointing, 8-bit, update in backward": replace(
        MAE, checkpointing=True, optimizer="adamw8bit", update_in_backward=True
    ),
    "mae, all four": replace(MAE, checkpointing=True, optimizer="adamw8bit", update_in_backward=True, offload=True),
    "mae, decoder of one layer": LIGHT,
    "mae, decoder of one layer, checkpointing": replace(LIGHT, checkpointing=True),
    "bim": BIM,
    "bim, checkpointing": replace(BIM, checkpointing=True),
    "bim, 8-bit": replace(BIM, optimizer="adamw8bit"),
    "bim, offload": replace(BIM, offload=True),
    "bim, all four": replace(BIM, checkpointing=True, optimizer="adamw8bit", update_in_backward=True, offload=True),
}
EIGHT_SEGMENTS = {
    "bim, 8 segments": EIGHT,
    "bim, 8 segments, offload": replace(EIGHT, offload=True),
    "bim, 8 segments, all four": replace(
        EIGHT, checkpointing=True, optimizer="adamw8bit", update_in_backward=True, offload=True
    ),
}
BATCH = 8  # of what is measured, which takes a CPU a quarter of an hour
MODELS = ("vit_base_patch16_224", "vit_large_patch16_224", "vit_huge_patch14_224")


def counted(models: list[str], batches: list[int], again: bool) -> None:
    """Peaks and FLOPs, ratios to MAE of the same model and batch. What was counted before is not counted again, unless asked to."""
    rows, raw = [], []
    file = record.RESULTS / "memory-rivals-cost.json"
    before = [] if again or not file.is_file() else json.loads(file.read_text())["raw"]
    known = {(one["model"], one["batch"], one["way"]): one for one in before}
    for model in models:
        ways = WAYS | ({} if model.startswith("vit_base") else EIGHT_SEGMENTS)
        for batch in batches:
            first = None
            for name, way in ways.items():
                if found := known.get((model, batch, name)):
                    cost = StepCost(**{field.name: found.get(field.name, 0) for field in fields(StepCost)})
                else:
                    cost, _ = count(replace(way, model=model, batch_size=batch, precision="bf16"), "cuda")
                first = first or cost
                rows.append({
                    "model": model.removesuffix("_224"), "batch": batch, "way": name,
                    "peak, GiB": f"{cost.peak_bytes / 2**30:.2f}", "ratio": f"{cost.peak_bytes / first.peak_bytes:.2f}",
                    **{f"{kind}, GiB": f"{getattr(cost, f'{kind}_bytes') / 2**30:.2f}"
                       for kind in ("weight", "gradient", "optimizer", "saved")},
                    "training FLOPs": f"{cost.train_flops_per_image / first.train_flops_per_image:.2f}",
                })  # fmt: skip
                raw.append({"model": model, "batch": batch, "way": name, **asdict(cost)})
                print(rows[-1], flush=True)
            record.write("memory-rivals-cost", "Ways to save memory, counted", {"input": "224 px", "device": "as on CUDA", "precision": "bf16"},
                         rows, raw, "Ratios to MAE of the same model and batch; peaks of each kind, which fall at different times. All "
                         "four: checkpointing, 8-bit, update in backward, offload. Offload: of MAE the optimizer's state, but for two parameters, waits on the "
                         "host; of BIM all of every segment but two, moments of 8 bits excepted. What the 8-bit optimizer takes for a parameter while it steps is "
                         "counted as if it were not compiled.")  # fmt: skip


def measured(names: list[str], model: str, batch: int, rounds: int) -> None:
    """What steps allocate, and, if there are rounds, their time in turns; memory outside torch's allocator stands for the host's."""
    configs = [replace(WAYS[name], model=model, batch_size=batch, precision="fp32", compile=False) for name in names]
    device = torch.device("cpu")
    memory = list(measure_each(configs, device))
    rows, raw = [], []
    for name, config, found in zip(names, configs, memory, strict=True):
        times = in_turns([configs[0], config], device, rounds) if rounds else []  # two at a time fit the memory
        rows.append({
            "way": name, "peak, MiB": f"{found['peak'] / 2**20:.0f}", "ratio": f"{found['peak'] / memory[0]['peak']:.2f}",
            "predicted": "" if config.offload else f"{found['predicted_peak'] / found['peak']:.3f}",
        })  # fmt: skip
        if rounds:
            rows[-1]["step, ms"] = f"{1e3 * statistics.median(own for _, own in times):.0f}"
            rows[-1]["time"] = f"{statistics.median(own / first for first, own in times):.2f}"
        raw.append({"way": name, "seconds, mae and this": times, **found})
        print(rows[-1], flush=True)
    configuration = {
        "model": model, "device": "cpu", "precision": "fp32", "batch": batch, "rounds": rounds, "input": "224 px",
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    record.write(f"memory-rivals{'' if batch == BATCH else f'-{batch}'}-cpu", "Ways to save memory, measured", configuration, rows, raw,
                 "Ratios to MAE, of times the median over rounds; predicted: what is counted, as a share of what is measured, where nothing "
                 "is offloaded. Offloaded: what is on the device; memory outside torch's allocator stands for the host's. On a CPU the "
                 "8-bit optimizer is not compiled.")  # fmt: skip


def main() -> None:
    """Both parts, or the one asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["counted", "measured"])
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="of counted")
    parser.add_argument("--batches", nargs="+", type=int, default=[64, 256], help="of counted")
    parser.add_argument("--again", action="store_true", help="count what was counted before, too")
    parser.add_argument(
        "--ways", nargs="+", default=list(WAYS), help="of measured, the first one is what the others are compared with"
    )
    parser.add_argument("--model", default=MODELS[0], help="of measured")
    parser.add_argument("--batch-size", type=int, default=BATCH, help="of measured")
    parser.add_argument("--rounds", type=int, default=1, help="of measured; 0 measures memory only")
    arguments = parser.parse_args()
    if "counted" in arguments.parts:
        counted(arguments.models, arguments.batches, arguments.again)
    if "measured" in arguments.parts:
        measured(arguments.ways, arguments.model, arguments.batch_size, arguments.rounds)


if __name__ == "__main__":
    main()
