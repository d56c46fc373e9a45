"""What changes during training: a table of phases, and pure functions of the step."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

from leanmim.config import Pretrain
from leanmim.config.base import Schedule
from leanmim.errors import UserError

NOMINAL = 800  # epochs that stand for auto before a run has its own number


class Phase(NamedTuple):
    """A part of training with an input size, batch and learning rate of its own."""

    start: int | float  # epoch
    stop: int | float  # epoch
    config: Pretrain  # of a run that would be this phase only


def phases(config: Pretrain) -> list[Phase]:
    """The phases of a run (FastMIM-P): one, unless --phase-scales names more."""
    epochs = NOMINAL if config.epochs == "auto" else config.epochs
    starts = [share * epochs for share in config.phase_starts] or [0]
    stops = [*starts[1:], epochs]
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


@contextmanager
def phase_named(config: Pretrain, number: int, own: Pretrain) -> Iterator[None]:
    """A UserError raised inside names the phase and its size.

    Args:
        config: of the run.
        number: of the phase, from 0.
        own: the phase's configuration.
    """
    try:
        yield
    except UserError as error:
        if not config.phase_scales:
            raise
        raise UserError(
            f"phase {number + 1} of {len(config.phase_scales)}, {own.size[0]} x {own.size[1]} px (--phase-scales "
            f"{config.phase_scales[number]:g}): {error}, or choose other --phase-scales"
        ) from error


def learning_rate(
    step: int | float, steps: int | float, warmup: int | float, peak: float, schedule: Schedule = "cosine"
) -> float:
    """Linear warm-up, then a schedule of its own.

    Args:
        step: optimizer steps done so far, 0 for the first; or epochs, as the other two.
        steps: of the whole run.
        warmup: of the warm-up.
        peak: the learning rate at the end of the warm-up.
        schedule: ``cosine``, from 0 and half a cosine to 0 (MAE, appendix A.1); ``step``, from peak / 200, then constant,
            and peak / 10 in the last eighth (SimMIM's published 800 epochs: 5e-7 to 1e-4, a tenth at epoch 700);
            ``constant``, from 0, then constant, and linear to 0 in the last fifth (arXiv 2405.18392).
    """
    first = peak / 200 if schedule == "step" else 0.0
    if step < warmup:
        return first + (peak - first) * step / warmup
    if schedule == "step":
        return peak if step < 7 / 8 * steps else peak / 10
    if schedule == "constant":
        return peak * min(1.0, (steps - step) / (steps - max(warmup, 0.8 * steps)))
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
