"""Pre-training. It never knows the method: images in, losses out."""

from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import psutil
import torch

from leanmim.config import Export, Pretrain, Report, Show
from leanmim.costs import StepCost, count, readable
from leanmim.data import Labelled, batches, centre_crop, labelled_pair, open_source
from leanmim.device import peak_memory
from leanmim.environment import environment
from leanmim.errors import UserError
from leanmim.formats import export
from leanmim.loop import Loop
from leanmim.page import report
from leanmim.pictures import show
from leanmim.placement import offloads
from leanmim.processes import Process, processes
from leanmim.run import Run, write_json
from leanmim.train.bad_files import BadFiles
from leanmim.train.phases import PhaseSteps, choose_batch, plan_phases
from leanmim.train.training import Training, begin


def pretrain(config: Pretrain) -> Path:
    """Pre-train a backbone on a folder of images; continue if the run folder holds the same run.

    The run folder gets config.json, environment.json, names.json, metrics.jsonl, tensorboard/, checkpoints/last.pt,
    skipped.jsonl if files were unreadable, and at the end export/timm/, reconstructions.png and report.html.

    Returns:
        The run folder.

    Raises:
        UserError: something in the configuration, the data or the run folder is wrong.
    """
    config.check()
    for name, what in (("data", "a folder of images"), ("out", "the run folder to write")):
        if not getattr(config, name):
            raise UserError(f"--{name} is needed: {what}")
    with processes(config.device) as (process, device):
        return train(config, process, device)


def train(config: Pretrain, process: Process, device: torch.device) -> Path:
    """`pretrain` in one of several processes."""
    # Everything that can be wrong is looked at before anything is written.
    run = Run(Path(config.out))
    source = open_source(config.data, config.channels)
    config, choice = choose_batch(config, run, len(source), process, device)
    state = run.to_resume(config, config.overwrite)
    if state:
        run.check_names(source.names)
    plan = plan_phases(config, source, process.world)
    knn_sets = labelled_pair(config.knn_data, config.channels, centre_crop(config.size)) if config.knn_data else None
    memory_before = psutil.Process().memory_info().rss
    training, origin = begin(config, plan, source, state, device, process)
    steps, start = plan[-1].stop, state["step"] if state else 0

    process.wait()  # all have read the folder before the first one writes to it
    if process.first:
        run.prepare(config, start)
        run.write_names(source.names)
        write_json(run.folder / "environment.json", environment(device, process.world))
    process.wait()
    predicted, _ = count(config, "cuda" if device.type == "cuda" else "cpu")
    if process.first and start < steps:
        write_json(run.cost, {"predicted": asdict(predicted)})
    bad = BadFiles(run, len(source), config.max_bad_share, process)

    with Loop(run, config, steps, state, process, device, config.recipe) as loop:
        notes = (choice, origin and f"starting from {origin}", start and f"continuing after step {start}")
        for line in (*header(config, plan, len(source), predicted, training), *filter(None, notes)):
            loop.console.print(line)
        for phase in plan:
            if start >= phase.stop:
                continue
            training.enter(phase)
            begins = phase.own(max(start, phase.start))
            feed = loop.timed(batches(phase.config, source, begins, phase.own(phase.stop), process, device))
            for step in loop.until(phase.stop):
                lr = training.set_learning_rate(step)
                losses = training.step(step, map(bad.filter, islice(feed, phase.config.accum)))
                epoch = phase.own(step + 1) / phase.per_epoch
                loop.record(losses, images=phase.images, epoch=epoch, lr=lr, line=step + 1 == phase.stop)
                if epoch.is_integer():
                    bad.merge()
                    if knn_sets and (epoch % config.knn_every == 0 or loop.done == steps):
                        online_knn(training, knn_sets, loop, epoch)
                if loop.checkpoint_due:
                    loop.save(training.state())

    if process.first:
        if speed := loop.images_per_second:
            # a GPU's allocator counts tensors; elsewhere it is what the process grew by, readers and all
            peak = peak_memory(device) - (0 if device.type == "cuda" else memory_before)
            write_json(run.cost, {"predicted": asdict(predicted), "measured": measured(predicted, peak, speed)})
        if bad.seen:
            loop.console.print(f"{len(bad.seen)} unreadable files were skipped; they are listed in {run.skipped}")
        folder = export(Export(run=config.out, overwrite=True))
        picture = show(Show(run=config.out))
        page = report(Report(runs=(config.out,)))
        loop.console.print(f"done: encoder in {folder}, reconstructions in {picture}, report in {page}")
    process.wait()
    return run.folder


def online_knn(training: Training, sets: tuple[Labelled, Labelled], loop: Loop, epoch: float) -> None:
    """Write the encoder's kNN accuracy into the log; one process measures it."""
    with loop.paused():
        if loop.process.first:
            accuracy = training.knn(*sets)
            loop.write(knn=accuracy)
            loop.say(f"epoch {epoch:.0f}  kNN {accuracy:.1%}")


def header(
    config: Pretrain, plan: list[PhaseSteps], images: int, predicted: StepCost, training: Training
) -> Iterator[str]:
    """What is said before the first step."""
    device, world, depths = training.device, training.process.world, training.model.encoder.depths
    yield (
        f"{config.recipe}: {config.model}, {predicted.encoder_parameters / 1e6:.1f} M parameters, "
        f"decoder {predicted.decoder_parameters / 1e6:.1f} M, {'bf16' if training.model.autocast else 'fp32'} on {device}"
    )
    yield (
        f"{images} images in {config.data}; {plan[-1].stop} steps in {config.epochs} epochs; "
        f"warm-up {config.warmup:g} epochs"
    )
    for phase in plan:
        own = phase.config
        yield (
            f"epochs {phase.epoch} to {phase.epochs}: {own.size[0]} x {own.size[1]} px, {phase.per_epoch} steps each; "
            f"effective batch {phase.images} = {own.batch_size} x accum {own.accum} x {world} processes; "
            f"lr {own.blr * phase.images / 256:.3g} = blr {own.blr:.3g} x {phase.images} / 256"
        )
    yield (
        f"predicted: {readable(predicted.peak_bytes)} at the peak, "
        f"{predicted.train_flops_per_image / 1e9:.3g} GFLOP an image"
    )
    if len(depths) > 1:
        yield f"{len(depths)} segments, which end at {', '.join(map(str, depths))}: one loss each"
    if config.offload and not offloads(config, device):
        yield f"nothing to offload: {device.type} has no memory of its own"


def measured(predicted: StepCost, peak: int, speed: float) -> dict[str, int | float]:
    """What cost.json says of a run that has ended."""
    return {
        "peak_bytes": peak,
        "images_per_second": speed,
        "flops_per_second": speed * predicted.train_flops_per_image,
    }
