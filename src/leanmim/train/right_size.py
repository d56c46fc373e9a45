"""The numbers of a run in place of every ``auto``, by the rules of `leanmim.auto`; the memory guard."""

import math
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch

from leanmim.auto import HOURS, MOST, epochs_within, images_a_step, peak_rate
from leanmim.checkpoint import all_of
from leanmim.config import Optimisation, Pretrain, parse_bytes
from leanmim.config.base import Logging
from leanmim.costs import StepCost, count
from leanmim.data import Source
from leanmim.encoders import Encoder, encoder_of
from leanmim.encoders.backbone import backbone_of
from leanmim.errors import UserError
from leanmim.factory import decoder_shape
from leanmim.fake import fake_tensors
from leanmim.files import readable
from leanmim.pipeline import speed_up
from leanmim.planner import Trained, available, average_throughput, fit
from leanmim.processes import ALONE, InPipeline, Process
from leanmim.progress import working
from leanmim.recipes import hyphens
from leanmim.run import Run
from leanmim.schedule import phases
from leanmim.train.data_list import read_list

Counted = Callable[[Any, str], tuple[StepCost, Any]]
CHOSEN = ("epochs", "batch_size", "blr", "decoder_depth", "decoder_width", "decoder_heads")


def right_sized(
    config: Pretrain, run: Run, source: Source, process: Process, device: torch.device
) -> tuple[Pretrain, list[str]]:
    """The configuration with numbers in place of every ``auto``.

    A run that is continued keeps the numbers that it began with, and those are of the processes that it began with: `split`
    fits them to those that there are.

    Returns:
        The configuration, and what was chosen, for people to read.

    Raises:
        UserError: not even one image fits the memory, or the step's images do not divide among the processes.
    """
    config, kept = as_begun(config, {} if config.overwrite and not run.begun_by_this_job() else run.stored())
    encoder = untrained_encoder(config)
    chosen: list[str] = []
    if "auto" in (config.decoder_depth, config.decoder_width, config.decoder_heads):
        depth, width, heads = decoder_shape(config, encoder)
        config = replace(config, decoder_depth=depth, decoder_width=width, decoder_heads=heads)
        chosen.append(f"decoder {depth} x {width}")
    if config.epochs == "auto":
        hours = config.hours or HOURS
        with working("measuring the speed of some steps"):
            speed = faster(config, process) * min(process.gather(trial_speed(config, source, process, device)))
        config = replace(config, epochs=epochs_within(hours, speed, len(source)))
        chosen.append(f"{config.epochs:g} epochs, for {hours:g} hours at {speed:.0f} images/s")
        config.check()
    if config.batch_size == "auto":
        effective = config.effective_batch
        if effective == "auto":
            world = process.replica.world
            effective = images_a_step(float(config.epochs) * len(source), len(source) // world) * world
        elif effective > len(source):
            raise UserError(
                f"--effective-batch {effective} is more than the {len(source)} images in {config.data!r}; give "
                f"--effective-batch {len(source)} or fewer, or auto"
            )
        config, cost, memory = batch_that_fits(config, effective, process, device)
        fits = f"{readable(cost.peak_bytes)} predicted of {readable(memory)}"
        chosen.append(f"batch {config.batch_size} x accum {config.accum}, {fits}")
    effective = int(config.batch_size) * config.accum * processes_begun(config, run, process)
    if config.lr is None and config.blr == "auto":
        rate = peak_rate(effective)
        config = replace(config, blr=rate * 256 / effective)
        chosen.append(f"lr {rate:.2g}")
    elif config.lr is not None:
        config = replace(config, blr=config.lr * 256 / effective, lr=None)
    config = replace(config, effective_batch=effective)
    notes = [f"auto: {'; '.join(chosen)}"] if chosen else []
    if kept:
        notes.append("as this run began: " + ", ".join(f"{hyphens(key)} {value:.4g}" for key, value in kept.items()))
    return config, notes


def as_begun(
    config: Trained, stored: dict[str, Any], chosen: Collection[str] = CHOSEN
) -> tuple[Trained, dict[str, Any]]:
    """What is ``auto`` as it is stored; the batch only if not another step is asked for, which `Run.to_resume` refuses.

    Args:
        config: of the command.
        stored: that of the run folder; empty if there is none.
        chosen: fields that may be ``auto``.

    Returns:
        The configuration, and the fields that were taken over.
    """
    kept = {key: stored[key] for key in chosen if getattr(config, key) == "auto" and is_number(stored.get(key))}
    if config.lr is not None:
        kept.pop("blr", None)
    if "batch_size" in kept and is_number(stored.get("accum")):
        if config.effective_batch in ("auto", stored.get("effective_batch")):
            kept["accum"] = stored["accum"]
        else:
            del kept["batch_size"]
    return replace(config, **kept), kept


def processes_begun(config: Logging, run: Run, process: Process) -> int:
    """How many processes the run in the folder began with; those that there are, if it has no checkpoint."""
    afresh = not all_of(run.last) or (config.overwrite and not run.begun_by_this_job())
    began = None if afresh else read_list(run, process)
    return began.processes if began else process.replica.world


def split(config: Trained, process: Process) -> tuple[Trained, list[str]]:
    """The same images a step by another number of processes than the run began with.

    A batch stays if accumulation makes up for the number, else it becomes the largest smaller one that does: what fitted the
    memory fits.

    Args:
        config: as the run began; its numbers are resolved.
        process: this one among all.

    Returns:
        The configuration of this call, and what is different, for people to read.

    Raises:
        UserError: a step's images do not divide among the processes.
    """
    batch, world = int(config.batch_size), process.replica.world
    begun = int(config.effective_batch) // (batch * config.accum)
    if begun == world:
        return config, []
    pairs = [(batch, config.accum)]
    if isinstance(config, Pretrain) and (config.phase_batches or config.phase_accums):
        pairs += [(int(phase.config.batch_size), phase.config.accum) for phase in phases(config)]
    images = [batch * accum * begun for batch, accum in pairs]
    if any(step % world for step in images):
        common = math.gcd(*images)
        counts = [count for count in range(1, common + 1) if common % count == 0]
        raise UserError(
            f"this run began with {begun} {'process' if begun == 1 else 'processes'} and has {' or '.join(map(str, dict.fromkeys(images)))} images "
            f"a step, which do not divide among {world}; continue it with {', '.join(map(str, counts))} processes"
        )
    shared = [shared_batch(batch, step // world) for (batch, _), step in zip(pairs, images, strict=True)]
    changes: dict[str, Any] = {"batch_size": shared[0][0], "accum": shared[0][1]}
    if len(shared) > 1:
        phase_batches, phase_accums = zip(*shared[1:], strict=True)
        changes |= {"phase_batches": phase_batches, "phase_accums": phase_accums}
    own = replace(config, **changes)
    return own, [
        f"processes: {world} in place of the {begun} that the run began with; batch {own.batch_size} x accum {own.accum} in place "
        f"of {batch} x {config.accum}: steps, their images and learning rates stay; masks and augmentation are drawn anew in each "
        "process, so the weights will not be bit for bit those of a run that went on as it began"
    ]


def shared_batch(batch: int, images: int) -> tuple[int, int]:
    """The largest batch up to ``batch``, and the accumulation, that make up so many images."""
    largest = max(size for size in range(1, min(batch, images) + 1) if images % size == 0)
    return largest, images // largest


def is_number(value: Any) -> bool:
    """Whether a stored value is a number."""
    return isinstance(value, int | float)


def untrained_encoder(config: Pretrain) -> Encoder:
    """The encoder without memory, to know its shape."""
    backbone = backbone_of(config, config.depth, device="meta")
    with fake_tensors():
        return encoder_of(config, backbone.to_empty(device="cpu"))


def trial_speed(config: Pretrain, source: Source, process: Process, device: torch.device) -> float:
    """Images per second of this process in a few real steps of the largest batch that fits."""
    return average_throughput(trial(config, source, process, device), source, device, process)


def trial(config: Pretrain, source: Source, process: Process, device: torch.device) -> Pretrain:
    """What is measured: the largest batch that fits, weights that stay."""
    most = min(MOST, len(source))
    config = replace(config, blr=0.0, phase_batches=(), phase_accums=(), phase_blrs=())
    if isinstance(process, InPipeline):  # each tries the model as a whole
        return batch_that_fits(config, most, ALONE, device)[0]
    return batch_that_fits(config, most * process.world, process, device)[0]


def faster(config: Pretrain, process: Process) -> float:
    """How many times as fast all processes are as one."""
    if not isinstance(process, InPipeline):
        return float(process.world)
    return speed_up(count(replace(config, batch_size=1, accum=1))[0].segment_flops, process.world)


def batch_that_fits(
    config: Trained, effective: int, process: Process, device: torch.device, counted: Counted = count
) -> tuple[Trained, StepCost, int]:
    """Batch and accumulation for so many images a step, the predicted cost, and the memory that it must fit.

    Raises:
        UserError: not even one image fits, or the images do not divide among the processes.
    """
    world = process.replica.world
    if effective % world:
        raise UserError(f"--effective-batch {effective} does not divide among {world} processes")
    memory = memory_of(config, process, device)
    start: Trained = replace(config, batch_size=1)
    found = fit(start, effective // world, memory, device, of_share(counted, process))
    if found is None:
        raise UserError(
            f"--batch-size auto: not even one image fits into {readable(memory)}; choose a smaller --model or "
            "--input-size, or give more --memory"
        )
    fitting, cost = found
    if config.effective_batch != "auto" and int(fitting.batch_size) * fitting.accum * world != effective:
        raise UserError(
            f"--update-in-backward accumulates nothing, and of --effective-batch {effective} only {fitting.batch_size} images fit; give "
            f"--effective-batch {fitting.batch_size}, or leave --update-in-backward out"
        )
    return fitting, cost, memory


def of_share(counted: Counted, process: Process) -> Counted:
    """Gives the cost for one of several processes, which with --shard and --pipeline has a part of the model."""

    def own(config: Any, device: str) -> tuple[StepCost, Any]:
        cost, flops = counted(config, device)
        if isinstance(process, InPipeline):
            return cost.piped(process.world, config.accum), flops
        return (cost.shared(process.world) if getattr(config, "shard", False) else cost), flops

    return own


def memory_of(config: Optimisation, process: Process, device: torch.device) -> int:
    """Bytes that a process may use; the same number for all, so that they choose alike."""
    free = min(process.gather(parse_bytes(config.memory) or available(device)))
    return free // (1 if device.type == "cuda" else process.world)


def guard_memory(
    config: Trained, predicted: StepCost, process: Process, device: torch.device, counted: Counted = count
) -> None:
    """Refuse a run that is predicted to need more memory than there is.

    Args:
        config: of the run; its numbers are resolved.
        predicted: the cost of its step.
        process: this one among all.
        device: where it will run.
        counted: gives the cost of a step of a configuration as on a device.

    Raises:
        UserError: it does; the message names a batch that fits.
    """
    memory = memory_of(config, process, device)
    if predicted.peak_bytes <= memory:
        return
    effective = int(config.batch_size) * config.accum
    plain = replace(config, phase_batches=(), phase_accums=()) if isinstance(config, Pretrain) else config
    found = fit(plain, effective, memory, device, of_share(counted, process))
    remedy = "not even one image fits: choose a smaller --model or --input-size"
    if found:
        fitting = found[0]
        remedy = f"--batch-size {fitting.batch_size} --accum {fitting.accum} fits, or give --batch-size auto"
    raise UserError(
        f"{readable(predicted.peak_bytes)} of memory are predicted at the peak, and {readable(memory)} are free; {remedy}. "
        "--memory none starts the run all the same"
    )
