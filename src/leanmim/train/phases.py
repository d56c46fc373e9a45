"""The phases of a run on its data."""

from typing import NamedTuple

import torch

from leanmim.config import Pretrain
from leanmim.data import effective_batch
from leanmim.errors import UserError
from leanmim.factory import build
from leanmim.schedule import phase_named, phases


class PhaseSteps(NamedTuple):
    """A phase of training in steps of the whole run."""

    number: int
    config: Pretrain  # of a run that would be this phase only
    epoch: int | float  # with which it begins
    epochs: int | float  # with which it ends
    start: int  # step
    stop: int  # step
    per_epoch: int  # steps
    images: int  # of a step, over all processes

    def own(self, step: int) -> int:
        """The same step of a run that would be this phase only: it sets order and learning rate."""
        return step - self.start + round(self.epoch * self.per_epoch)


def plan_phases(config: Pretrain, count: int, world: int) -> list[PhaseSteps]:
    """The phases of a run on so many images.

    Raises:
        UserError: a step takes more images than there are, a phase would be empty, or cannot be built.
    """
    plan: list[PhaseSteps] = []
    start = 0
    for number, phase in enumerate(phases(config)):
        own, images = phase.config, effective_batch(phase.config, world)
        if count < images:
            raise UserError(
                f"a batch of {images} images ({own.batch_size} x accum {own.accum} x {world} processes) is more than "
                f"the {count} in {config.data!r}; choose --batch-size "
                f"{max(1, count // own.accum // world)} or smaller"
            )
        per_epoch = count // images
        stop = start + round(per_epoch * (phase.stop - phase.start))
        if start == stop:
            where = (
                f" for phases at {', '.join(f'{share:g}' for share in config.phase_starts)} of them: one would be empty"
            )
            raise UserError(
                f"{config.epochs:g} epochs, of {per_epoch} steps each, are too few{where if config.phase_starts else ''}; give "
                f"more --epochs{', or fewer phases' if config.phase_starts else ', or a smaller --batch-size'}"
            )
        plan.append(PhaseSteps(number, own, phase.start, phase.stop, start, stop, per_epoch, images))
        start = stop
    for later in plan[1:]:
        with phase_named(config, later.number, later.config), torch.random.fork_rng(devices=[]):
            build(later.config)  # an error now, not when its time comes
    return plan
