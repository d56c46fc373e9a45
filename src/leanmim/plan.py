"""Before a run: the batch that fits the memory, the time it takes, the command."""

import shlex
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import psutil
import torch
from torch import Tensor

from leanmim.config import Plan, Pretrain, parse_bytes
from leanmim.cost import StepCost, count, readable
from leanmim.data import IMAGENET, Crops, Normalise, Order, collate, list_images, loader, resolve_workers
from leanmim.device import resolve_device, resolve_precision
from leanmim.errors import UserError
from leanmim.mim import build
from leanmim.recipes import RECIPES, variant
from leanmim.schedule import stages
from leanmim.step import make_optimizers, update

SHARE = 0.9  # of the memory is planned with; the rest is the allocator's and the libraries'
STEPS = 3  # real ones, after one to warm up
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
        cost, _ = count(trial, "cuda" if device.type == "cuda" else "cpu")
        if cost.peak_bytes <= SHARE * memory:
            best, low = (trial, cost), middle + 1
        else:
            high = middle
    return best


def throughput(config: Pretrain, files: list[Path], device: torch.device) -> float:
    """Images per second of a few real steps: reading, forward, backward, update."""
    batch = min(int(config.batch_size), IMAGES[device.type], len(files))
    with torch.random.fork_rng():
        model = build(config).to(device).train()
        model.autocast = resolve_precision(config.precision, device)
        optimizers = make_optimizers(model, config)
        order = Order(len(files), batch, max(1, len(files) // batch), 0, STEPS + 1, config.seed, 0, 1)
        dataset = Crops(
            files,
            config.channels,
            config.size,
            config.crop_scale,
            config.crop_ratio,
            config.flip,
            config.seed,
            config.interpolation,
        )
        batches = iter(loader(dataset, order, resolve_workers(config.workers), device, collate))
        normalise = Normalise(*IMAGENET[config.channels], device)

        def one() -> Iterator[Tensor]:
            images, bad = next(batches)
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


def wait(device: torch.device) -> None:
    """Until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def command(config: Pretrain) -> str:
    """The command that runs this configuration: what differs from the recipe's own values."""
    recipe = RECIPES[config.recipe]
    words = ["leanmim", "pretrain", config.recipe]
    for field in fields(config):
        value = getattr(config, field.name)
        if value != getattr(recipe, field.name) and value != {}:
            pairs = [part for pair in value.items() for part in pair] if isinstance(value, dict) else None
            items = pairs or (value if isinstance(value, tuple) else [value])
            words += [f"--{field.name.replace('_', '-')}", *map(str, items)]
    return shlex.join(words)


def plan(config: Plan) -> str:
    """For every recipe: batch and accumulation, predicted memory, images per second, hours, and the command.

    Raises:
        UserError: the data or a recipe is wrong, or none fits.
    """
    config.check()
    device = resolve_device(config.device)
    files = list_images(config.data)
    memory = parse_bytes(config.memory) or available(device)
    effective = min(config.effective_batch, len(files))
    lines = [
        f"{len(files)} images, {config.model}, {readable(memory)} on {device.type} "
        f"({1 - SHARE:.0%} of it stay free), {effective} images a step"
    ]
    rate: tuple[float, int] | None = None  # images per second, FLOPs an image, of the first recipe
    for name in config.recipes or tuple(RECIPES):
        recipe = replace(variant(name, config), batch_size=1, memory="auto", effective_batch=256, out=f"runs/{name}")
        try:
            found = fit(recipe, effective, memory, device)
        except UserError as error:
            if config.recipes:
                raise
            lines.append(f"\n{name}: {error}")
            continue
        if found is None:
            least, _ = count(replace(recipe, accum=effective), "cuda" if device.type == "cuda" else "cpu")
            lines.append(f"\n{name}: does not fit: even one image at a time needs {readable(least.peak_bytes)}")
            continue
        chosen, cost = found
        if config.images_per_second:
            rate = rate or (config.images_per_second, cost.train_flops_per_image)
            speed, how = rate[0] * rate[1] / cost.train_flops_per_image, "from --images-per-second and FLOPs"
        else:
            shares = [((s.stop - s.start) / chosen.epochs, throughput(s.config, files, device)) for s in stages(chosen)]
            speed = 1 / sum(share / images for share, images in shares)
            how = f"measured in {STEPS} steps here"
        epoch = len(files) / speed / 3600
        lines += [
            f"\n{name}: batch {chosen.batch_size} x accum {chosen.accum}, {readable(cost.peak_bytes)} predicted; "
            f"{speed:.1f} images/s ({how}); {chosen.epochs} epochs take {chosen.epochs * epoch:.3g} hours"
        ]
        if config.hours:
            within = int(config.hours / epoch)
            lines[-1] += f"; {config.hours:g} hours are enough for {within} epochs"
            if within < chosen.epochs and config.epochs is None:
                chosen = replace(chosen, epochs=max(1, within))
        lines.append(f"  {command(chosen)}")
    return "\n".join(lines)
