"""What changes during training: a table of stages, and pure functions of the step."""

import math
from dataclasses import replace
from typing import Literal, NamedTuple

from leanmim.config import Pretrain
from leanmim.errors import UserError

Schedule = Literal["cosine", "step"]


class Stage(NamedTuple):
    """A part of training with an input size, batch and learning rate of its own."""

    start: int  # epoch
    stop: int  # epoch
    config: Pretrain  # of a run that would be this stage only


def stages(config: Pretrain) -> list[Stage]:
    """The stages of a run (FastMIM-P): one, unless --stage-scales names more.

    Raises:
        UserError: a stage would be shorter than an epoch.
    """
    starts = [round(share * config.epochs) for share in config.stage_starts] or [0]
    stops = [*starts[1:], config.epochs]
    if any(start >= stop for start, stop in zip(starts, stops, strict=True)):
        raise UserError(
            f"{config.epochs} epochs are too few for stages at {config.stage_starts} of them: one would be empty; give "
            "more --epochs, or fewer stages"
        )
    plain = replace(config, stage_scales=(), stage_starts=(), stage_batches=(), stage_accums=(), stage_blrs=())
    table = []
    for i, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        scale = config.stage_scales[i] if config.stage_scales else 1.0
        own = replace(
            plain,
            input_size=tuple(round(scale * side) for side in config.input_size),
            batch_size=config.stage_batches[i] if config.stage_batches else config.batch_size,
            accum=config.stage_accums[i] if config.stage_accums else config.accum,
            blr=config.stage_blrs[i] if config.stage_blrs else config.blr,
        )
        table.append(Stage(start, stop, own))
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
