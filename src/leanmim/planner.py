"""Before a run: the batch that fits the memory, the time it takes, the command."""

import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor

from leanmim.auto import EPOCHS, HOURS, MOST, epochs_within, few_steps, images_a_step, short
from leanmim.calibration import IMAGES, READ, Calibration, Trial, calibrate, first_guess, given
from leanmim.config import Finetune, Plan, Pretrain, parse_bytes
from leanmim.costs import StepCost, count
from leanmim.data import IMAGENET, Normalise, Source, batches, open_source, resolve_workers
from leanmim.device import resolve_device, resolve_precision
from leanmim.encoders.backbone import backbone_of, check_name
from leanmim.errors import UserError
from leanmim.factory import build
from leanmim.files import readable
from leanmim.graphed import GraphedUpdate, updating
from leanmim.names import slug
from leanmim.placement import compile_parts, offloads, place, update_options
from leanmim.processes import ALONE, Process
from leanmim.progress import console_of, duration, progress_bar
from leanmim.recipes import MAE, RECIPES, differences, options, titles, variant
from leanmim.schedule import phase_named, phases
from leanmim.step import make_optimizers, update
from leanmim.targets import with_levels

Trained = TypeVar("Trained", Pretrain, Finetune)
SHARE = 0.9  # of the memory is planned with; the rest is the allocator's and the libraries'
WARM_UP = 2  # steps before the measured ones
SECONDS, LEAST_STEPS, MOST_STEPS = 5.0, 5, 20  # measured: for so long, but so many at least and at most
CHOSEN = (
    "data", "out", "device", "batch_size", "accum", "phase_batches", "phase_accums", "effective_batch", "memory",
)  # fmt: skip
"""Fields that the plan sets for all recipes."""


def available(device: torch.device) -> int:
    """Bytes free on the device: a GPU's own memory, or the machine's within the limit of a container."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of what was tried before
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return free


def counted_as(device: torch.device) -> str:
    """The device as which a step is counted: cuda, or cpu for all others."""
    return "cuda" if device.type == "cuda" else "cpu"


def fit(
    config: Trained,
    images: int,
    memory: int,
    device: torch.device,
    counted: Callable[[Any, str], tuple[StepCost, Any]] = count,
) -> tuple[Trained, StepCost] | None:
    """The largest batch that fits, with the accumulation that makes up ``images`` for a step; by prediction.

    Args:
        config: the recipe.
        images: effective batch of this process.
        memory: bytes; a tenth stays free.
        device: where it will run.
        counted: gives the cost of a step of a configuration as on a device.

    Returns:
        The configuration and its predicted cost, or None where not even one image fits.
    """
    sizes = [size for size in range(1, images + 1) if images % size == 0]
    best = None
    low, high = 0, len(sizes)
    while low < high:  # memory grows with the batch
        middle = (low + high) // 2 if best or low else high - 1  # all at once is the likeliest
        at_once = getattr(config, "update_in_backward", False)  # nothing is accumulated, a step has fewer images
        trial = replace(config, batch_size=sizes[middle], accum=1 if at_once else images // sizes[middle])
        cost, _ = counted(trial, counted_as(device))
        if cost.peak_bytes <= SHARE * memory:
            best, low = (trial, cost), middle + 1
        else:
            high = middle
    return best


class PretrainTrial(Trial):
    """A model of a recipe, to try settings of the machine on. Errors as for `build`."""

    def __init__(self, config: Pretrain, device: torch.device) -> None:
        self.mim, self.options = build(config), update_options(config, device)
        self.mim.target = with_levels(self.mim.target, config.read_as, *IMAGENET.get(config.channels, IMAGENET[1]))
        if not offloads(config, device):
            self.mim.to(device)
        super().__init__(self.mim, make_optimizers(self.mim, config), device, IMAGES[device.type])
        self.recorded: GraphedUpdate | None = None
        self.placement, self.shape = place(self.mim, self.optimizers, config, device), (config.channels, *config.size)
        if config.batch_size != "auto":
            self.most = min(self.most, int(config.batch_size))
        elif found := fit(replace(config, batch_size=1), self.most, available(device), device):
            self.most = int(found[0].batch_size)

    def autocast(self, dtype: torch.dtype | None) -> None:
        """See `Trial`."""
        self.mim.autocast = dtype

    def compile(self) -> None:
        """See `Trial`."""
        compile_parts(self.mim)

    def step(self, images: int) -> None:
        """See `Trial`."""
        batch = torch.randn(images, *self.shape, device=self.device)
        if self.graphed and self.recorded is None:
            self.recorded = GraphedUpdate()
            self.step(images)  # warms up, and the next one is recorded
        one_step = (self.graphed and self.recorded) or update
        one_step(self.placement.losses, self.optimizers, [batch], **self.options)
        wait(self.device)


def calibrated(
    config: Pretrain, stored: Any, source: Source, device: torch.device, process: Process = ALONE
) -> Calibration:
    """What ``auto`` of the machine is for a recipe and these images; the largest phase stands for all. See `calibrate`."""
    if offloads(config, device) or config.optimizer == "adamw8bit":
        config = replace(config, channels_last=False)
    shared = config.shard or (config.pipeline and process.world > 1 and device.type == "cuda")
    if shared:  # one device may not hold the model, and nothing is tried on it
        config = replace(config, **{**first_guess(device), "workers": resolve_workers(-1), **given(config)})
    largest = max((phase.config for phase in phases(config)), key=lambda own: own.size)
    one = replace(largest, batch_size=1, accum=1, workers=0)
    crops = batches(one, source, 0, READ, process, per_epoch=len(source))

    def seconds(speed: float) -> float:
        if config.epochs == "auto":
            return 3600 * (config.hours or HOURS)
        return float(config.epochs) * len(source) / (speed * process.world)

    return calibrate(
        config,
        stored,
        backbone_of(config, config.depth, device="meta"),
        lambda: PretrainTrial(replace(largest, blr=0.0), device),
        lambda: next(crops),
        seconds,
        process,
        device,
    )


def throughput(config: Pretrain, source: Source, device: torch.device, process: Process = ALONE) -> float:
    """Images per second of this process in real steps, after some to warm up: reading, forward, backward, update."""
    batch = min(int(config.batch_size), IMAGES[device.type], len(source))
    with torch.random.fork_rng():
        config = replace(config, shard=config.shard and process.world > 1)
        model = build(config)
        if not (config.shard or offloads(config, device)):
            model.to(device)
        model.autocast = resolve_precision(config.precision, device)
        optimizers = make_optimizers(model, config)
        losses = place(model, optimizers, config, device, process).losses
        one_step = updating(config) or update
        trial = replace(config, batch_size=batch, accum=1)
        feed = iter(batches(trial, source, 0, WARM_UP + MOST_STEPS, device=device))
        mean, std = IMAGENET.get(config.channels, IMAGENET[1])
        model.target = with_levels(model.target, config.read_as, mean, std)
        normalise = Normalise(mean, std, device)  # whatever they are: the time does not depend on them

        def one() -> Iterator[Tensor]:
            images, bad = next(feed)
            if bad and len(images) == 0:
                raise UserError(f"{bad[0].path} cannot be read: {bad[0].reason}")
            yield normalise(images)

        options = update_options(config, device)
        for _ in range(WARM_UP):  # the first step also starts readers and chooses kernels
            one_step(losses, optimizers, one(), **options)
        wait(device)
        start, steps = time.perf_counter(), 0
        # several processes average their gradients, so they must agree on the last step
        while steps < LEAST_STEPS or (
            steps < MOST_STEPS and max(process.gather(time.perf_counter() - start)) < SECONDS
        ):
            one_step(losses, optimizers, one(), **options)
            wait(device)
            steps += 1
        return steps * batch / (time.perf_counter() - start)


def average_throughput(config: Pretrain, source: Source, device: torch.device, process: Process = ALONE) -> float:
    """Images per second of a whole run, from real steps of each phase; ``auto`` epochs are as many as a run has at most."""
    config = replace(config, epochs=EPOCHS) if config.epochs == "auto" else config
    speeds = []
    for number, phase in enumerate(phases(config)):
        with phase_named(config, number, phase.config):
            speeds.append(throughput(phase.config, source, device, process))
    shares = [(phase.stop - phase.start) / float(config.epochs) for phase in phases(config)]
    return 1 / sum(share / speed for share, speed in zip(shares, speeds, strict=True))


def wait(device: torch.device) -> None:
    """Until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def command(config: Pretrain) -> str:
    """The command that runs this configuration: what differs from the recipe's own values."""
    own = {"data": config.data, "out": config.out} | differences(config)
    return shlex.join(["leanmim", "pretrain", RECIPES.get(config.recipe, MAE).recipe, *options(own)])


def plan(config: Plan) -> Iterator[tuple[str, str]]:
    """For every recipe: epochs, time, steps, batch and accumulation, predicted memory, and the command.

    What is auto follows the rules of the run itself (`leanmim.auto`).

    Yields:
        First the number of images, and what is planned with. Then each recipe's title and its plan, as soon as it is
        measured; of a recipe that does not go with the model or the size, the reason.

    Raises:
        UserError: the data, the model, a recipe's name or an option is wrong, or not one of the recipes can be trained.
    """
    config.check()
    check_name(config.model)
    device = resolve_device(config.device)
    source = open_source(config.data, config.read_as)
    memory = parse_bytes(config.memory) or available(device)
    free = f"{readable(memory)} on {device.type} ({1 - SHARE:.0%} of it stay free)"
    recipes = [variant(spec, config, without=CHOSEN) for spec in config.recipes or RECIPES]
    yield f"{len(source)} images", f"{config.model}, {free}"
    progress = progress_bar(console_of(stderr=True), transient=True)
    task = progress.add_task("", total=len(recipes), text="")
    flops_per_second = 0.0  # of the first recipe, if its throughput is given
    calibration: Calibration | None = None

    def speed(chosen: Pretrain, cost: StepCost) -> float:
        nonlocal flops_per_second, calibration
        if config.images_per_second is None:
            progress.update(task, text="measuring steps")
            calibration = calibration or calibrated(chosen, None, source, device)
            with calibration.in_use():
                return average_throughput(calibration.applied(chosen), source, device)
        flops_per_second = flops_per_second or config.images_per_second * cost.train_flops_per_image
        return flops_per_second / cost.train_flops_per_image

    refused = 0
    for done, (recipe, title) in enumerate(zip(recipes, titles(recipes), strict=True)):
        progress.update(task, description=title, completed=done, text="predicting memory")
        out = f"runs/{slug(title)}"
        try:
            with progress:
                text = plan_one(replace(recipe, out=out), len(source), memory, device, speed)
        except UserError as error:
            refused += 1
            text = f"cannot be trained at {' x '.join(map(str, recipe.input_size))} px: {error}"
            if refused == len(recipes):
                raise UserError(f"{title} {text}") from error
        yield title, text


def plan_one(
    recipe: Pretrain, images: int, memory: int, device: torch.device, speed: Callable[[Pretrain, StepCost], float]
) -> str:
    """The plan of a recipe.

    Args:
        recipe: effective batch and epochs may be auto.
        images: there are.
        memory: bytes to stay within.
        device: where it will run.
        speed: images per second of a configuration, whose cost is given too.

    Raises:
        UserError: the recipe cannot be built, or its phases or warm-up do not go with the epochs.
    """
    most = min(MOST if recipe.effective_batch == "auto" else recipe.effective_batch, images)
    start = replace(recipe, batch_size=1, memory="auto", effective_batch="auto", hours=None)
    found = fit(start, most, memory, device)
    if found is None:
        least, _ = count(replace(start, accum=most), counted_as(device))
        return f"does not fit: even one image at a time needs {readable(least.peak_bytes)}"
    rate = speed(*found)
    if recipe.epochs == "auto":
        start = replace(start, epochs=epochs_within(recipe.hours or HOURS, rate, images))
    epochs = float(start.epochs)
    step = images_a_step(epochs * images, images) if recipe.effective_batch == "auto" else most
    found = fit(start, step, memory, device)
    assert found  # fewer images a step need no more
    chosen, cost = found
    step = int(chosen.batch_size) * chosen.accum  # less than was asked for where nothing can be accumulated
    chosen.check()
    phases(chosen)  # raises where there are too few epochs for them
    steps = round(epochs * (images // step))
    lines = [
        f"{epochs:g} epochs in {duration(epochs * images / rate)}, at {rate:.1f} images/s; {steps} steps of {step} images: "
        f"batch {chosen.batch_size} x accum {chosen.accum}, {readable(cost.peak_bytes)} predicted"
    ]
    if recipe.hours and recipe.epochs != "auto":
        lines[0] += f"; {recipe.hours:g} hours are enough for {short(3600 * recipe.hours * rate / images):g} epochs"
    return "\n  ".join([*lines, *few_steps(steps), command(chosen)])
