"""What changes during training: a table of phases, and pure functions of the step."""

import math
from dataclasses import replace
from typing import NamedTuple

from leanmim.config import Pretrain
from leanmim.config.base import Schedule
from leanmim.errors import UserError


class Phase(NamedTuple):
    """A part of training with an input size, batch and learning rate of its own."""

    start: int  # epoch
    stop: int  # epoch
    config: Pretrain  # of a run that would be this phase only


def phases(config: Pretrain) -> list[Phase]:
    """The phases of a run (FastMIM-P): one, unless --phase-scales names more.

    Raises:
        UserError: a phase would be shorter than an epoch.
    """
    starts = [round(share * config.epochs) for share in config.phase_starts] or [0]
    stops = [*starts[1:], config.epochs]
    if any(start >= stop for start, stop in zip(starts, stops, strict=True)):
        raise UserError(
            f"{config.epochs} epochs are too few for phases at {config.phase_starts} of them: one would be empty; give "
            "more --epochs, or fewer phases"
        )
    plain = replace(config, phase_scales=(), phase_starts=(), phase_batches=(), phase_accums=(), phase_blrs=())
    table = []
    for i, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        scale = config.phase_scales[i] if config.phase_scales else 1.0
        own = replace(
            plain,
            input_size=tuple(round(scale * side) for side in config.input_size),
            batch_size=config.phase_batches[i] if config.phase_batches else config.batch_size,
            accum=config.phase_accums[i] if config.phase_accums else config.accum,
            blr=config.phase_blrs[i] if config.phase_blrs else config.blr,
        )
        table.append(Phase(start, stop, own))
    return table


def learning_rate(
    step: int | float, steps: int, warmup: int | float, peak: float, schedule: Schedule = "cosine"
) -> float:
    """Linear warm-up, then a schedule of its own.

    Args:
        step: optimizer steps done so far, 0 for the first; or epochs, as the other two.
        steps: of the whole run.
        warmup: of the warm-up.
        peak: the learning rate at the end of the warm-up.
        schedule: ``cosine``, from 0 and half a cosine to 0 (MAE, appendix A.1); ``step``, from peak / 200, then constant,
            and peak / 10 in the last eighth (SimMIM's published 800 epochs: 5e-7 to 1e-4, a tenth at epoch 700).
    """
    first = 0.0 if schedule == "cosine" else peak / 200
    if step < warmup:
        return first + (peak - first) * step / warmup
    if schedule == "step":
        return peak if step < 7 / 8 * steps else peak / 10
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
