"""Model, optimizers and where they are, from one phase to the next."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.optim import Optimizer

from leanmim.config import Pretrain
from leanmim.config.base import Stored
from leanmim.data import (
    IMAGENET,
    Labelled,
    Normalise,
    Source,
    batches,
    centre_crop,
    order_of_steps,
    resolve_workers,
    seed_of,
    statistics,
)
from leanmim.device import resolve_precision
from leanmim.evaluators.accuracy import Accuracy
from leanmim.evaluators.features import embedding, extract
from leanmim.evaluators.knn import knn_accuracy
from leanmim.factory import build
from leanmim.graphed import updating
from leanmim.mim import MIM
from leanmim.placement import offloads, place, update_options
from leanmim.processes import Process
from leanmim.schedule import learning_rate
from leanmim.step import load_state, make_optimizers, update
from leanmim.targets import with_levels
from leanmim.train.non_finite import first_not_finite, running_statistics, undo
from leanmim.train.phases import PhaseSteps
from leanmim.weights import carry_over, carry_over_moments, check_shapes, initialise, truncated


class Training:
    """Model, optimizers and where they are; replaced by larger ones at a phase's start.

    Args:
        config: of the run, as it is stored.
        phase: to begin with; no value of its configuration is ``auto``.
        model: of that phase.
        mean, std: of the images, one number per channel.
        device: where to train.
        process: this one among all.
        parts: in a pipeline the segments of each process.
    """

    def __init__(
        self,
        config: Pretrain,
        phase: PhaseSteps,
        model: MIM,
        mean: list[float],
        std: list[float],
        device: torch.device,
        process: Process,
        parts: Sequence[range] = (),
    ) -> None:
        self.config, self.phase, self.model, self.device, self.process = config, phase, model, device, process
        self.parts = parts
        self.mean, self.std = mean, std
        self.ease = (0.0, 1.0)  # see `extend`
        self.normalise = Normalise(mean, std, device)
        if not (config.shard or offloads(config, device)):
            model.to(device)
        model.autocast = resolve_precision(phase.config.precision, device)
        model.target = with_levels(model.target, config.read_as, mean, std)
        self.optimizers = make_optimizers(model, config)
        self.placement = place(model, self.optimizers, phase.config, device, process, parts)
        self.graphed = updating(phase.config)

    def enter(self, phase: PhaseSteps) -> None:
        """Go on with the same model and optimizers at the phase's input size: nothing that was learned is lost."""
        if phase.number == self.phase.number:
            return
        self.placement.settle()
        self.model, self.optimizers = at_next_size(self.placement.gather(), self.optimizers, phase.config, self.device)
        self.model.target = with_levels(self.model.target, self.config.read_as, self.mean, self.std)
        self.placement = place(self.model, self.optimizers, phase.config, self.device, self.process, self.parts)
        self.graphed, self.phase = updating(phase.config), phase

    def set_learning_rate(self, step: int) -> None:
        """Set that of a step."""
        lr = self.learning_rate(step, self.config)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr

    def make_room(self) -> None:
        """Make room for what is computed beside the steps."""
        if self.graphed:
            self.graphed.forget()

    def learning_rate(self, step: int, config: Pretrain) -> float:
        """That of a step by the schedule of ``config``."""
        peak = float(self.phase.config.blr) * self.phase.images / 256
        epoch = self.phase.own(step) / self.phase.per_epoch
        lr = learning_rate(epoch, float(config.epochs), config.warmup, peak, config.schedule)
        since, share = self.ease
        rise = config.warmup_share * (float(config.epochs) - since)
        return lr if share == 1 or epoch >= since + rise else lr * (share + (1 - share) * (epoch - since) / rise)

    def extend(self, step: int, before: int | float) -> None:
        """Go on after ``step`` with more than the ``before`` epochs of the schedule so far (ours).

        The learning rate leaves where it is and rises to the new schedule's as in a warm-up, over --warmup-share of the
        epochs that are left: a run that had cooled down restarts warm, one at constant rate stays there.
        """
        old, self.ease = self.learning_rate(step, replace(self.config, epochs=before)), (0.0, 1.0)
        new = self.learning_rate(step, self.config)
        self.ease = (self.phase.own(step) / self.phase.per_epoch, old / new if new else 1.0)

    def step(self, step: int, feed: Iterator[Tensor], meets: Callable[[int], bool] = lambda done: True) -> Tensor:
        """The losses of one update; masks and drop path depend on seed, process and step only.

        Args:
            step: of the run.
            feed: batches of images in memory.
            meets: whether a pipeline must be empty after so many steps.
        """
        return self.placement.step(step, meets, lambda own: self.work(own, self.placement.batches(feed)))

    @property
    def begun(self) -> int | None:
        """In a pipeline, steps that a process has begun."""
        return self.placement.begun

    def work(self, step: int, feed: Iterator[Tensor]) -> Tensor:
        """The losses of this process's segments, and their update."""
        images, segments = islice(feed, self.phase.config.accum), self.placement.own
        running = [running_statistics(*self.model.parts(i)) for i in segments]
        before = [[value.clone() for value in values] for values in running]
        self.set_learning_rate(step)
        losses = (self.graphed or update)(
            self.placement.losses,
            self.optimizers[segments.start : segments.stop],
            map(self.normalise, images),
            self.phase.config.accum,
            self.config.clip_grad,
            self.seeds(step),
            **update_options(self.phase.config, self.device),
        )
        for values, old, loss in zip(running, before, losses, strict=True):
            undo(values, old, loss)
        return losses

    def seeds(self, step: int) -> list[int]:
        """Of a step's batches in this process."""
        rank = self.process.replica.rank
        return [seed_of(self.config.seed, rank, step, micro) for micro in range(self.phase.config.accum)]

    def diagnose(self, source: Source, step: int) -> dict[str, Any]:
        """What reproduces a step of this process, and what in it is not finite first; in a pipeline the first process says it,
        with weights of earlier segments that may be some steps further.
        """
        own, per_epoch, names, process = self.phase.config, self.phase.per_epoch, source.names, self.process.replica
        begin, seeds = self.phase.own(step), self.seeds(step)
        order = order_of_steps(own, len(source), per_epoch, begin, begin + 1, process)
        again = batches(replace(own, workers=0), source, begin, begin + 1, process, self.device, per_epoch)
        self.make_room()
        with self.placement.whole() as model:
            if self.parts and not self.process.first:
                return {}
            first = first_not_finite(model, model.losses, (self.normalise(images) for images, _ in again), seeds)
        files = [[names[index] for _, index in batch] for batch in order]
        return {"first_not_finite": first, "seeds": seeds, "files": files}

    def knn(self, train: Labelled, val: Labelled, console: Console) -> Accuracy:
        """Online accuracy of the encoder; a bar on the console while it is measured. Each process embeds its share of the
        images, so all must call this.
        """
        own = self.phase.config
        self.make_room()
        with self.placement.whole() as model, torch.autocast(self.device.type, model.autocast, bool(model.autocast)):
            model.eval()
            self.process.broadcast(running_statistics(model))
            embed = embedding(truncated(model.encoder, own, None), "avg")
            voters, queries = (
                extract(
                    embed,
                    part.transformed(centre_crop(own.size)),
                    self.normalise,
                    int(own.batch_size),
                    resolve_workers(own.workers),
                    title="kNN",
                    console=console,
                    process=self.process,
                )
                for part in (train, val)
            )
        self.model.train()
        return knn_accuracy(voters, queries)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the step."""
        self.placement.settle()
        return {
            "config": self.config.to_json(),
            "phase": self.phase.number,
            "mean": self.mean,
            "std": self.std,
            "ease": list(self.ease),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }


def begin(
    config: Pretrain,
    plan: list[PhaseSteps],
    source: Source,
    state: dict[str, Any] | None,
    device: torch.device,
    process: Process,
    parts: Sequence[range] = (),
) -> tuple[Training, str]:
    """A new training, or the one of a checkpoint; and where its weights come from, for people to read."""
    phase = plan[state.get("phase", 0) if state else 0]
    torch.manual_seed(config.seed)
    model = build(phase.config)
    origin = initialise(model, config.init, config.channels) if config.init and state is None else ""
    if state:
        mean, std = state["mean"], state["std"]
    elif config.mean and config.std:
        mean, std = list(config.mean), list(config.std)
    elif config.statistics == "data" or isinstance(config.read_as, Stored):
        mean, std = statistics(source, config.read_as, config.seed)
    else:
        mean, std = map(list, IMAGENET[config.channels])
    if state:
        check_shapes(model, state["model"], config.out)
        model.load_state_dict(state["model"])
    training = Training(config, phase, model, mean, std, device, process, parts)
    if state:
        training.placement.settle()
        load_state(training.optimizers, state["optimizers"], training.placement.loaded)
        since, share = state.get("ease", training.ease)
        training.ease = (since, share)
        if (before := state["config"]["epochs"]) < config.epochs:
            training.extend(state["step"], before)
    return training, origin


def at_next_size(
    model: MIM, optimizers: list[Optimizer], config: Pretrain, device: torch.device
) -> tuple[MIM, list[Optimizer]]:
    """The same model and optimizers for another input size."""
    larger = build(config)
    larger = larger if offloads(config, device) else larger.to(device)
    larger.autocast = model.autocast
    carry_over(model.encoder, larger.encoder)
    backbone = {f"encoder.backbone.{key}" for key in model.encoder.backbone.state_dict()}
    larger.load_state_dict({k: v for k, v in model.state_dict().items() if k not in backbone}, strict=False)
    fresh = make_optimizers(larger, config)
    carry_over_moments(model, optimizers, larger, fresh)
    return larger, fresh
