"""What it costs to notice a step that is not finite: the norm of the gradients, and a look at the losses, against a whole step.

    python benchmarks/non_finite_cost.py

Both are measured in turns, so that a busy machine slows down both alike, and on a CPU only the time of this process counts.
That fused AdamW asks whether to step is in the step itself: the difference is too small to be measured.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import record
import torch
from steps import parameters, ready
from steps import seconds as waited

from leanmim.loop import Arriving
from leanmim.recipes import MAE
from leanmim.step import gradient_norm, update


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """How long one call takes; on a CPU what it computes, whoever else does."""
    if device.type != "cpu":
        return waited(call, device)
    before = time.process_time()
    call()
    return time.process_time() - before


def main() -> None:
    """Measure, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = replace(
        MAE, model="vit_tiny_patch16_224", input_size=(128,), batch_size=32, precision="fp32", data="-", out="-"
    )
    torch.manual_seed(0)
    placed, optimizers = ready(config, device)
    images = torch.randn(32, 3, *config.size, device=device)
    trained = parameters(optimizers[0])

    def look() -> None:
        Arriving(gradient_norm(trained, 0.0)[None], 0, 0.0).read()

    found = []
    for _ in range(given.repeats + 2):
        step = seconds(lambda: update(placed.losses, optimizers, [images]), device)
        for parameter in trained:
            parameter.grad = torch.randn_like(parameter)
        found.append((step, seconds(look, device)))
        optimizers[0].zero_grad()
    found = found[2:]  # the first ones warm up
    shares = sorted(added / (step - added) for step, added in found)
    quarter = len(shares) // 4
    rows = [{
        "step, ms": f"{1000 * statistics.median(step for step, _ in found):.1f}",
        "added, ms": f"{1000 * statistics.median(added for _, added in found):.2f}",
        "added, median": f"{statistics.median(shares):.2%}",
        "added, middle half": f"{shares[quarter]:.2%} to {shares[-quarter - 1]:.2%}",
        "repeats": len(found),
    }]  # fmt: skip
    record.write(
        f"non-finite-{device.type}", "What it costs to notice a step that is not finite",
        {"recipe": "mae", "model": config.model, "input": "128 px", "batch": 32, "precision": "fp32", "threads": given.threads},
        rows, found, "Added: the norm of the gradients and a look at the losses; the step has both.",
    )  # fmt: skip


if __name__ == "__main__":
    main()
