"""A training step whose stem embeds the visible patches only, against one that embeds all of them and drops the others.

    python benchmarks/stem.py

The two take turns on the same weights; times are those of the process on its cores, so that other programs beside it count little.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import record
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from leanmim.encoders.vit import ViTEncoder
from leanmim.factory import build
from leanmim.masking import take
from leanmim.recipes import MAE
from leanmim.step import make_optimizers, update


def seconds(call: Callable[[], object]) -> float:
    """Of the process, for one call."""
    before = time.process_time()
    call()
    return time.process_time() - before


def main() -> None:
    """Measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    config = replace(MAE, model=arguments.model, batch_size=arguments.batch_size)
    model = build(config).train()
    optimizers = make_optimizers(model, config)
    images = torch.randn(arguments.batch_size, 3, *config.size)
    visible = model.draw_mask(images).visible
    encoder = model.encoder
    assert isinstance(encoder, ViTEncoder)
    gathered = encoder.visible_patches

    def of_all(images: Tensor, ids: Tensor) -> Tensor:
        return take(encoder.patches(images), ids)

    def stem() -> None:
        encoder.visible_patches(images, visible).sum().backward()

    def step() -> None:
        update(model, optimizers, [images])

    rows, raw = [], []
    for what, call in (("the stem, forward and backward", stem), ("a step", step)):
        pairs = []
        for _ in range(arguments.rounds + 1):  # the first to warm up
            encoder.visible_patches = of_all  # type: ignore[method-assign]
            plain = seconds(call)
            encoder.visible_patches = gathered  # type: ignore[method-assign]
            pairs.append((seconds(call), plain))
        pairs = pairs[1:]
        rows.append({
            "what": what,
            "visible patches, ms": f"{1e3 * median(own for own, _ in pairs):.1f}",
            "all patches, ms": f"{1e3 * median(plain for _, plain in pairs):.1f}",
            "ratio": f"{median(own / plain for own, plain in pairs):.2f}",
        })  # fmt: skip
        raw.append({"what": what, "pairs": pairs})
    flops = []
    for embed in (gathered, of_all):
        with FlopCounterMode(display=False) as counter:
            embed(images, visible)
        flops.append(counter.get_total_flops() / len(images) / 1e6)
    note = f"Forward FLOPs of the stem for an image: {flops[0]:.1f} M in place of {flops[1]:.1f} M."
    configuration = vars(arguments) | {"threads": torch.get_num_threads(), "time": "of the process"}
    record.write("stem-cpu", "A step that embeds the visible patches only", configuration, rows, raw, note)


if __name__ == "__main__":
    main()
