"""The phases of a run on its data, and the batch that fits."""

from dataclasses import replace
from typing import NamedTuple

import torch

from leanmim.config import Pretrain, parse_bytes
from leanmim.costs import readable
from leanmim.data import Source, effective_batch
from leanmim.errors import UserError
from leanmim.factory import build
from leanmim.planner import available, fit
from leanmim.processes import Process
from leanmim.run import Run
from leanmim.schedule import phases


class PhaseSteps(NamedTuple):
    """A phase of training in steps of the whole run."""

    number: int
    config: Pretrain  # of a run that would be this phase only
    epoch: int  # the first one
    epochs: int  # the one after the last
    start: int  # step
    stop: int  # step
    per_epoch: int  # steps
    images: int  # of a step, over all processes

    def own(self, step: int) -> int:
        """The same step of a run that would be this phase only: it sets order and learning rate."""
        return step - self.start + self.epoch * self.per_epoch


def plan_phases(config: Pretrain, source: Source, world: int) -> list[PhaseSteps]:
    """The phases of a run on this data.

    Raises:
        UserError: a step takes more images than there are, or a phase cannot be built.
    """
    plan: list[PhaseSteps] = []
    start = 0
    for number, phase in enumerate(phases(config)):
        own, images = phase.config, effective_batch(phase.config, world)
        if len(source) < images:
            raise UserError(
                f"a batch of {images} images ({own.batch_size} x accum {own.accum} x {world} processes) is more than "
                f"the {len(source)} in {config.data!r}; choose --batch-size "
                f"{max(1, len(source) // own.accum // world)} or smaller"
            )
        per_epoch = len(source) // images
        stop = start + per_epoch * (phase.stop - phase.start)
        plan.append(PhaseSteps(number, own, phase.start, phase.stop, start, stop, per_epoch, images))
        start = stop
    for later in plan[1:]:
        try:
            with torch.random.fork_rng(devices=[]):
                build(later.config)  # an error now, not when its time comes
        except UserError as error:
            scale = config.phase_scales[later.number]
            raise UserError(f"--phase-scales {scale:g}: {error}; or choose other scales") from error
    return plan


def choose_batch(
    config: Pretrain, run: Run, images: int, process: Process, device: torch.device
) -> tuple[Pretrain, str]:
    """Batch and accumulation for ``--batch-size auto``: those of the run that is continued, or the largest that fits.

    Returns:
        The configuration with numbers in place of auto, and what was chosen, for people to read.

    Raises:
        UserError: not even one image fits the memory, or the step's images do not divide among the processes.
    """
    if config.batch_size != "auto":
        return config, ""
    world, effective = process.world, config.effective_batch
    if effective % world:
        raise UserError(f"--effective-batch {effective} does not divide among {world} processes")
    stored = run.stored()
    batch, accum = stored.get("batch_size"), stored.get("accum")
    if (
        not config.overwrite
        and isinstance(batch, int)
        and isinstance(accum, int)
        and batch * accum * world == effective
    ):
        config = replace(config, batch_size=batch, accum=accum)
        return config, f"batch size auto: {batch} x accum {accum}, as this run began"
    free = min(process.gather(parse_bytes(config.memory) or available(device)))  # all must choose alike
    memory = free // (1 if device.type == "cuda" else world)
    found = fit(replace(config, batch_size=1), effective // world, memory, device)
    if found is None:
        raise UserError(
            f"--batch-size auto: not even one image fits into {readable(memory)}; choose a smaller --model or "
            "--input-size, or give more --memory"
        )
    config, cost = found
    return config, (
        f"batch size auto: {config.batch_size} x accum {config.accum}, {readable(cost.peak_bytes)} predicted "
        f"of {readable(memory)}"
    )
