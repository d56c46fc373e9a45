"""Step time and memory of our MAE against transformers' ViTMAEForPreTraining: same weights, same batch, one run.

    python benchmarks/vs_transformers.py

The two take turns, so that a machine that slows down slows both; the ratio is the median over the pairs.
Memory: bytes that autograd saves for backward (counted exactly), and on a GPU the allocator's peak.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import record
import torch
from steps import seconds
from transformers import ViTMAEForPreTraining

from leanmim import MAE, MIM, Export, build, export
from leanmim.config import Pretrain
from leanmim.device import resolve_precision
from leanmim.recipes import published
from leanmim.run import save


def theirs_from(ours: MIM, config: Pretrain) -> ViTMAEForPreTraining:
    """Their model with our weights, through the export."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text("{}")
        state = {"config": config.to_json(), "step": 0, "mean": [0.5] * 3, "std": [0.5] * 3, "model": ours.state_dict()}
        save(Path(folder) / "checkpoints" / "last.pt", state)
        theirs = ViTMAEForPreTraining.from_pretrained(export(Export(run=folder, format="transformers")))
    theirs.vit.embeddings.position_embeddings.requires_grad_(False)  # fixed in the paper and in ours
    theirs.decoder.decoder_pos_embed.requires_grad_(False)
    return theirs.train()


def saved_bytes(step: Callable[[], None]) -> int:
    """Bytes that autograd keeps for backward, each storage once; parameters are not counted by a step's caller."""
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and not (tensor._base is not None and tensor._base.is_leaf):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(storages.values())


def compare_steps(
    config: Pretrain, device: torch.device, pairs: int
) -> tuple[dict[str, str], list[tuple[float, float]]]:
    """Steps of our MAE and of theirs in turns.

    Returns:
        Columns of the table, and seconds of ours and theirs for each pair.
    """
    config = replace(config, data="-", out="-")
    ours = build(config)
    theirs = theirs_from(ours, config).to(device)
    ours.to(device)
    dtype = ours.autocast = resolve_precision(config.precision, device)
    images = torch.randn(int(config.batch_size), config.channels, *config.size, device=device)
    optimizers = {m: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-5) for m in (ours, theirs)}

    def our_loss() -> torch.Tensor:
        (loss,) = ours.losses(images)
        return loss

    def their_loss() -> torch.Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            return theirs(images).loss

    losses = {ours: our_loss, theirs: their_loss}

    def step(model: torch.nn.Module) -> None:
        losses[model]().backward()
        optimizers[model].step()
        optimizers[model].zero_grad()

    def timed(model: torch.nn.Module) -> float:
        return seconds(lambda: step(model), device)

    peaks = {}
    for model in (ours, theirs):
        step(model)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            step(model)
            peaks[model] = torch.cuda.max_memory_allocated()
    saved = {model: saved_bytes(losses[model]) for model in (ours, theirs)}
    times = [(timed(ours), timed(theirs)) for _ in range(pairs)]
    row = {
        "ours, ms": f"{1e3 * statistics.median(a for a, _ in times):.0f}",
        "transformers, ms": f"{1e3 * statistics.median(b for _, b in times):.0f}",
        "step time, ratio": f"{statistics.median(a / b for a, b in times):.3f}",
        "ours, MiB saved": f"{saved[ours] / 2**20:.0f}", "transformers, MiB saved": f"{saved[theirs] / 2**20:.0f}",
        "saved, ratio": f"{saved[ours] / saved[theirs]:.3f}",
        **({"peak, ratio": f"{peaks[ours] / peaks[theirs]:.3f}"} if peaks else {}),
    }  # fmt: skip
    return row, times


def main() -> None:
    """Measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["vit_small_patch16_224", "vit_base_patch16_224"])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    arguments = parser.parse_args()
    rows, raw = [], []
    for name in arguments.models:
        config = replace(published(MAE), model=name, batch_size=arguments.batch_size, precision=arguments.precision)
        row, pairs = compare_steps(config, torch.device(arguments.device), arguments.pairs)
        rows.append({"model": name, "batch": arguments.batch_size, **row})
        raw.append({"model": name, "pairs": pairs})
    configuration = {"device": arguments.device, "precision": arguments.precision, "threads": torch.get_num_threads(),
                     "attention": "scaled_dot_product_attention in both", "pairs": arguments.pairs}  # fmt: skip
    record.write(f"vs-transformers-{arguments.device}", "MAE training step against transformers' ViTMAEForPreTraining",
                 configuration, rows, raw, "Below 1 is in our favour. One step is forward, backward and AdamW.")  # fmt: skip


if __name__ == "__main__":
    main()
