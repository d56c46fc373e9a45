"""Before a run: the batch that fits the memory, the time it takes, the command."""

import re
import shlex
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from torch import Tensor

from leanmim.config import Plan, Pretrain, parse_bytes
from leanmim.costs import StepCost, count, readable
from leanmim.data import IMAGENET, Normalise, Source, batches, open_source
from leanmim.device import resolve_device, resolve_precision
from leanmim.errors import UserError
from leanmim.factory import build
from leanmim.recipes import MAE, RECIPES, differences, hyphens, titles, variant, words
from leanmim.schedule import phases
from leanmim.step import make_optimizers, update

SHARE = 0.9  # of the memory is planned with; the rest is the allocator's and the libraries'
STEPS = 3  # real ones, after one to warm up
CHOSEN = (
    "data", "out", "device", "batch_size", "accum", "phase_batches", "phase_accums", "effective_batch", "memory",
)  # fmt: skip
"""Fields that the plan sets for all recipes."""
IMAGES = {"cpu": 16, "cuda": 256, "mps": 64}  # at most, in a measured forward pass


def available(device: torch.device) -> int:
    """Bytes free on the device: a GPU's own memory, or the machine's within the limit of a container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return free


def counted_as(device: torch.device) -> str:
    """The device as which a step is counted: cuda, or cpu for all others."""
    return "cuda" if device.type == "cuda" else "cpu"


def fit(config: Pretrain, images: int, memory: int, device: torch.device) -> tuple[Pretrain, StepCost] | None:
    """The largest batch that fits, with the accumulation that makes up ``images`` for a step; by prediction.

    Args:
        config: the recipe.
        images: effective batch of this process.
        memory: bytes; a tenth stays free.
        device: where it will run.

    Returns:
        The configuration and its predicted cost, or None where not even one image fits.
    """
    sizes = [size for size in range(1, images + 1) if images % size == 0]
    best = None
    low, high = 0, len(sizes)
    while low < high:  # memory grows with the batch
        middle = (low + high) // 2 if best or low else high - 1  # all at once is the likeliest
        trial = replace(config, batch_size=sizes[middle], accum=images // sizes[middle])
        cost, _ = count(trial, counted_as(device))
        if cost.peak_bytes <= SHARE * memory:
            best, low = (trial, cost), middle + 1
        else:
            high = middle
    return best


def throughput(config: Pretrain, source: Source, device: torch.device) -> float:
    """Images per second of a few real steps: reading, forward, backward, update."""
    batch = min(int(config.batch_size), IMAGES[device.type], len(source))
    with torch.random.fork_rng():
        model = build(config).to(device).train()
        model.autocast = resolve_precision(config.precision, device)
        optimizers = make_optimizers(model, config)
        feed = iter(batches(replace(config, batch_size=batch, accum=1), source, 0, STEPS + 1, device=device))
        normalise = Normalise(*IMAGENET[config.channels], device)

        def one() -> Iterator[Tensor]:
            images, bad = next(feed)
            if bad and len(images) == 0:
                raise UserError(f"{bad[0].path} cannot be read: {bad[0].reason}")
            yield normalise(images)

        for step in range(STEPS + 1):
            if step == 1:  # the first one also starts readers and chooses kernels
                wait(device)
                before = time.perf_counter()
            update(model, optimizers, one())
        wait(device)
        return STEPS * batch / (time.perf_counter() - before)


def average_throughput(config: Pretrain, source: Source, device: torch.device) -> float:
    """Images per second of a whole run, from a few real steps of each phase."""
    shares = [(phase.stop - phase.start) / config.epochs for phase in phases(config)]
    speeds = [throughput(phase.config, source, device) for phase in phases(config)]
    return 1 / sum(share / speed for share, speed in zip(shares, speeds, strict=True))


def wait(device: torch.device) -> None:
    """Until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def command(config: Pretrain) -> str:
    """The command that runs this configuration: what differs from the recipe's own values."""
    parts = ["leanmim", "pretrain", RECIPES.get(config.recipe, MAE).recipe]
    for name, value in ({"data": config.data, "out": config.out} | differences(config)).items():
        if isinstance(value, bool):
            parts.append(f"--{hyphens(name)}" if value else f"--no-{hyphens(name)}")
        elif value != {}:
            parts += [f"--{hyphens(name)}", *words(value)]
    return shlex.join(parts)


def plan(config: Plan) -> str:
    """For every recipe: batch and accumulation, predicted memory, images per second, hours, and the command.

    Raises:
        UserError: the data or a recipe is wrong, or the recipe cannot be trained with the model.
    """
    config.check()
    device = resolve_device(config.device)
    source = open_source(config.data, config.channels)
    memory = parse_bytes(config.memory) or available(device)
    effective = min(config.effective_batch, len(source))
    lines = [
        f"{len(source)} images, {config.model}, {readable(memory)} on {device.type} "
        f"({1 - SHARE:.0%} of it stay free), {effective} images a step"
    ]
    recipes = [variant(spec, config, without=CHOSEN) for spec in config.recipes or RECIPES]
    reference: StepCost | None = None  # of the first recipe that fits
    for recipe, title in zip(recipes, titles(recipes), strict=True):
        out = "runs/" + re.sub(r"[^\w.]+", "-", title)
        start = replace(recipe, batch_size=1, memory="auto", effective_batch=256, out=out)
        try:
            found = fit(start, effective, memory, device)
        except UserError as error:
            if config.recipes:
                raise
            lines.append(f"\n{title}: {error}")
            continue
        if found is None:
            least, _ = count(replace(start, accum=effective), counted_as(device))
            lines.append(f"\n{title}: does not fit: even one image at a time needs {readable(least.peak_bytes)}")
            continue
        chosen, cost = found
        reference = reference or cost
        if config.images_per_second:
            speed = config.images_per_second * reference.train_flops_per_image / cost.train_flops_per_image
            how = "from --images-per-second and FLOPs"
        else:
            speed, how = average_throughput(chosen, source, device), f"measured in {STEPS} steps here"
        epoch = len(source) / speed / 3600
        lines.append(
            f"\n{title}: batch {chosen.batch_size} x accum {chosen.accum}, {readable(cost.peak_bytes)} predicted; "
            f"{speed:.1f} images/s ({how}); {chosen.epochs} epochs take {chosen.epochs * epoch:.3g} hours"
        )
        if config.hours:
            within = int(config.hours / epoch)
            lines[-1] += f"; {config.hours:g} hours are enough for {within} epochs"
            if within < chosen.epochs and config.epochs is None and "epochs" not in differences(recipe):
                chosen = replace(chosen, epochs=max(1, within))
        lines.append(f"  {command(chosen)}")
    return "\n".join(lines)
