"""Pure functions of the step."""

import math


def learning_rate(step: int, steps: int, warmup: float, peak: float) -> float:
    """Linear warm-up, then half a cosine to 0 (MAE, appendix A.1).

    Args:
        step: optimizer steps done so far, 0 for the first.
        steps: steps of the whole run.
        warmup: steps of warm-up.
        peak: the learning rate at the end of the warm-up.
    """
    if step < warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
