"""What ``auto`` stands for: epochs, batch and learning rate from the images, the model and the time there is (ours).

1. Epochs: as many as fit into the time by a short measurement, the last one in part; at most 800 (MAE's) or two million images.
2. Images of a step: the largest power of two that leaves 5,000 steps, between 32 and 256.
3. Learning rate: MAE's, 2.4e-3 with 4,096 images a step, times the square root of the batch's ratio.

benchmarks/README.md has the trials behind these numbers. Numbers that are given stay.
"""

import math
from collections.abc import Iterator

HOURS = 1.0
EPOCHS, IMAGES_SEEN = 800, 2_000_000
STEPS, FEWEST, MOST = 5000, 32, 256
FEW_STEPS = 1000  # of which a run is warned


def images_a_step(seen: int | float, most: int) -> int:
    """Effective batch for so many images seen in training; no more than ``most``."""
    batch = 2 ** math.floor(math.log2(max(1.0, seen / STEPS)))
    return min(max(FEWEST, min(MOST, batch)), max(1, most))


def peak_rate(batch: int) -> float:
    """Learning rate for an effective batch: MAE's, by the root of the batch."""
    return 2.4e-3 * math.sqrt(batch / 4096)


def epochs_within(hours: float, speed: float, images: int) -> int | float:
    """Epochs of ``images`` that take so many hours at ``speed`` images/s; `short`."""
    most = max(EPOCHS, IMAGES_SEEN // images)
    return short(min(most, 3600 * hours * speed / images))


def short(epochs: int | float) -> int | float:
    """A number of epochs in three digits, never a larger one: whole from 100 on, 34.5, 1.86."""
    unit = 10 ** max(0, 2 - math.floor(math.log10(epochs)))
    less = math.floor(epochs * unit + 1e-9) / unit  # a tenth of 30 epochs is 3
    return int(less) if less.is_integer() else less


def few_steps(steps: int) -> Iterator[str]:
    """A warning for a run of too few steps to learn much."""
    if steps < FEW_STEPS:
        yield (
            f"only {steps} optimizer steps: too few to learn much. Give more --epochs (or --hours), a smaller --batch-size, or "
            "a smaller --model or --input-size, which make a step cheaper"
        )
