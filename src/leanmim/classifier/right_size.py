"""The numbers of a fine-tuning in place of every ``auto``: the recipe's, or by the rules of the small recipe."""

import itertools
import math
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from leanmim.auto import epochs_within
from leanmim.calibration import IMAGES, Calibration, Trial, calibrate
from leanmim.calibration import NAMES as MEASURED
from leanmim.classifier.augment import mix, mixing, train_transform
from leanmim.classifier.cost import count_tuning
from leanmim.classifier.data import train_batches, train_images
from leanmim.classifier.model import make_classifier, pooling
from leanmim.classifier.recipes import choose, filled, small_batch, small_epochs, small_rate
from leanmim.classifier.tuning import Tuning
from leanmim.config import Finetune
from leanmim.config.base import Stored
from leanmim.costs import StepCost
from leanmim.data.labels import Labels
from leanmim.encoders.backbone import backbone_of
from leanmim.files import readable
from leanmim.planner import counted_as, wait
from leanmim.processes import ALONE, Process
from leanmim.progress import working
from leanmim.run import Run
from leanmim.start import Start
from leanmim.step import update
from leanmim.train.right_size import as_begun, batch_that_fits, guard_memory, processes_begun, split

SECONDS, LEAST_STEPS, MOST_STEPS, WARM_UP = 5.0, 3, 100, 1  # of the trial that measures the speed


def of_start(config: Finetune, start: Start) -> Finetune:
    """The configuration with what the start says of the images."""
    own = start.model
    if isinstance(own.read_as, Stored) and config.randaugment == "auto":
        config = replace(config, randaugment="none")
    return replace(config, input_size=own.input_size, channels=own.channels, values=own.values)


def right_sized(
    config: Finetune, run: Run, start: Start, labels: Labels, process: Process, device: torch.device
) -> tuple[Finetune, StepCost, list[str]]:
    """The configuration with numbers in place of every ``auto``, and with what the start says of the images.

    A run that is continued keeps the numbers that it began with; the cost is that of the processes that there are.

    Returns:
        The configuration, the predicted cost of a step, and what was chosen, for people to read.

    Raises:
        UserError: there is no such recipe, a number is impossible, or the step does not fit the memory.
    """
    images, classes = len(labels.train), len(labels.classes)
    architecture = replace(start.model, model_kwargs=start.model.model_kwargs | pooling(start, config.pool))
    config = replace(of_start(config, start), data=str(Path(config.data).absolute()))
    choices = [field.name for field in fields(config) if getattr(config, field.name) == "auto"]
    stored = {} if config.overwrite and not run.begun_by_this_job() else run.stored()
    if isinstance(stored.get("recipe"), str) and config.recipe == "auto":
        config = replace(config, recipe=stored["recipe"])
    config, kept = as_begun(config, stored, [name for name in choices if name not in MEASURED])
    recipe = choose(config, start, images)
    if start.weights is None:  # lower layers know nothing that smaller steps would keep
        recipe = replace(recipe, layer_decay=1.0)
    config = filled(config, recipe)

    def counted(own: Finetune, as_device: str) -> tuple[StepCost, object]:
        return count_tuning(own, architecture, classes, as_device)

    chosen: list[str] = []
    effective = small_batch(images) if config.effective_batch == "auto" else int(config.effective_batch)
    if "effective_batch" in choices:
        effective = min(effective, images)
    if config.batch_size == "auto":
        effective = max(process.world, effective // process.world * process.world)
        trial = replace(config, epochs=1) if config.epochs == "auto" else config
        fitting, cost, memory = batch_that_fits(trial, effective, process, device, counted)
        config = replace(config, batch_size=fitting.batch_size, accum=fitting.accum)
        chosen.append(
            f"batch {config.batch_size} x accum {config.accum}, {readable(cost.peak_bytes)} predicted of {readable(memory)}"
        )
    effective = int(config.batch_size) * config.accum * processes_begun(config, run, process)
    config = replace(config, effective_batch=effective)
    if config.lr is not None or config.blr == "auto":
        rate = small_rate(effective, start.weights is None) if config.lr is None else config.lr
        config = replace(config, blr=rate * 256 / effective, lr=None)
        chosen.append(f"lr {rate:.2g}")
    if config.epochs == "auto":
        config = replace(config, epochs=small_epochs(images))
        chosen.append(f"{config.epochs:g} epochs")
    if config.hours is not None and "epochs" in choices and "epochs" not in kept:
        with working("measuring the speed of some steps"):
            speed = process.world * min(process.gather(trial_speed(config, start, labels, process, device)))
        config = replace(config, epochs=min(config.epochs, epochs_within(config.hours, speed, images)))
        chosen.append(f"{config.epochs:g} epochs, for {config.hours:g} hours at {speed:.0f} images/s")
    if config.eval_every == "auto":
        config = replace(config, eval_every=max(1, math.ceil(len(labels.val) / images)))
    config.check()
    own, other_split = split(config, process)
    predicted, _ = counted(own, counted_as(device))
    guard_memory(own, predicted, process, device, counted)
    return config, predicted, [*([f"auto: {'; '.join(chosen)}"] if chosen else []), *other_split]


class TuningTrial(Trial):
    """A classifier, to try settings of the machine on."""

    def __init__(
        self, config: Finetune, start: Start, classes: tuple[str, ...], device: torch.device, most: int
    ) -> None:
        made = make_classifier(start, classes, config.pool, float(config.drop_path))
        made.model.to(device)
        self.tuning = Tuning(config, made, 1, None, device, ALONE)
        super().__init__(self.tuning.model, [self.tuning.optimizer], device, most)
        self.shape, self.classes = (made.architecture.channels, *made.architecture.size), len(classes)

    def autocast(self, dtype: torch.dtype | None) -> None:
        """See `Trial`."""
        self.tuning.losses.autocast = dtype

    def compile(self) -> None:
        """See `Trial`."""
        self.model.compile(dynamic=False)

    def step(self, images: int) -> None:
        """See `Trial`."""
        noise = torch.randn(images, *self.shape, device=self.device)
        targets = torch.full((images, self.classes), 1 / self.classes, device=self.device)
        update(self.tuning.losses, self.optimizers, [(noise, targets)])
        wait(self.device)


def calibrated(
    config: Finetune, stored: Any, start: Start, labels: Labels, process: Process, device: torch.device
) -> Calibration:
    """What ``auto`` of the machine is for a start and these images, see `calibrate`."""
    config = of_start(config, start)
    recipe = filled(config, choose(config, start, len(labels.train)))
    most = min(
        IMAGES[device.type], small_batch(len(labels.train)) if recipe.batch_size == "auto" else int(recipe.batch_size)
    )
    trial = replace(recipe, blr=0.0, lr=None, ema=0.0)
    images = train_images(config, labels, train_transform(recipe, start.mean, start.std))
    places = itertools.cycle(range(len(images)))

    def seconds(speed: float) -> float:
        epochs = small_epochs(len(labels.train)) if recipe.epochs == "auto" else float(recipe.epochs)
        return epochs * len(labels.train) / (speed * process.world)

    def make_trial() -> TuningTrial:
        return TuningTrial(trial, start, tuple(labels.classes), device, most)

    backbone = backbone_of(start.model, device="meta")
    return calibrate(config, stored, backbone, make_trial, lambda: images[0, next(places)], seconds, process, device)


def trial_speed(config: Finetune, start: Start, labels: Labels, process: Process, device: torch.device) -> float:
    """Images per second of this process in a few real steps, after one to warm up."""
    trial = replace(config, blr=0.0, compile=False)
    with torch.random.fork_rng():
        made = make_classifier(start, tuple(labels.classes), config.pool, float(config.drop_path))
        made.model.to(device)
        tuning = Tuning(trial, made, 1, None, device, ALONE)
        mixup = mixing(config, len(labels.classes))
        transform = train_transform(config, start.mean, start.std)
        feed = train_batches(trial, labels, transform, 0, MOST_STEPS + WARM_UP, device=device)
        began, steps = time.perf_counter(), -WARM_UP
        # the processes average their gradients, so they must agree on the last step
        while steps < LEAST_STEPS or (
            steps < MOST_STEPS and max(process.gather(time.perf_counter() - began)) < SECONDS
        ):
            if steps == 0:
                began = time.perf_counter()
            batches = (
                mix(mixup, images, targets, 0)
                for _, (images, targets, _) in zip(range(config.accum), feed, strict=False)
            )
            loss = tuning.step(0, ((images.to(device), soft.to(device)) for images, soft in batches))
            loss.item()  # waits for the device
            steps += 1
        return steps * tuning.images / (time.perf_counter() - began)
