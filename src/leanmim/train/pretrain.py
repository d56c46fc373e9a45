"""Pre-training. It never knows the method: images in, losses out."""

from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from leanmim.config import Export, Pretrain, Report, Show
from leanmim.config.base import Stored
from leanmim.costs import StepCost, count
from leanmim.data import Labelled, absolute, batches, centre_crop, labelled_pair, open_source, resolve_workers
from leanmim.device import deterministic, forget_peak, peak_memory
from leanmim.environment import environment
from leanmim.errors import UserError
from leanmim.formats import write_export
from leanmim.loop import Loop
from leanmim.page import report
from leanmim.pictures import show
from leanmim.pipeline import balanced
from leanmim.planner import calibrated, counted_as
from leanmim.processes import InPipeline, Process, processes
from leanmim.run import Run, write_json
from leanmim.train.adjusted import check_adjusted, note_adjusted, told
from leanmim.train.bad_files import BadFiles
from leanmim.train.data_list import DataList, check_alike, check_unchanged, keep_list, other_images, read_list
from leanmim.train.header import continuing, header
from leanmim.train.phases import PhaseSteps, plan_phases
from leanmim.train.right_size import guard_memory, of_share, right_sized, split
from leanmim.train.strips import Strips
from leanmim.train.training import Training, begin


def pretrain(config: Pretrain) -> Path:
    """Pre-train a backbone on a folder of images; continue if the run folder holds the same run.

    The run folder gets config.json, environment.json, names.json, metrics.jsonl, tensorboard/, checkpoints/last.pt,
    pictures/, skipped.jsonl if files were unreadable, and at the end export/timm/, reconstructions.png and report.html.

    Returns:
        The run folder.

    Raises:
        UserError: something in the configuration, the data or the run folder is wrong.
    """
    config = config.with_stats()
    for name, what in (("data", "a folder of images"), ("out", "the run folder to write")):
        if not getattr(config, name):
            raise UserError(f"--{name} is needed: {what}")
    exact = deterministic(config.deterministic, config.device)
    with exact, processes(config.device, config.process_timeout) as (process, device), ExitStack() as held:
        return train(config, process, device, held)


def train(config: Pretrain, process: Process, device: torch.device, held: ExitStack) -> Path:
    """`pretrain` in one of several processes; what is held until its end is the lock of the run folder."""
    # Everything that can be wrong is looked at before anything is written.
    resolve_workers(config.workers)
    if config.shard and process.world == 1:
        raise UserError(
            "--shard shares a model out among processes, and this is the only one; start several (torchrun --nproc_per_node=2 -m "
            "leanmim pretrain ...), or leave --shard out, which also goes on with a run that was begun with it"
        )
    run = Run(Path(config.out))
    process = InPipeline(*process) if config.pipeline and process.world > 1 else process
    if config.update_in_backward and process.replica.world > 1:
        raise UserError(
            "--update-in-backward steps before the gradients of several processes are averaged; leave it out, or train in one process "
            "or with --pipeline"
        )
    if config.cuda_graph is True and (device.type != "cuda" or process.world > 1):
        raise UserError(
            "--cuda-graph is for one process on an NVIDIA GPU; leave it out, and where it helps it is taken"
        )
    source = open_source(config.data, config.read_as)
    images = DataList.of(source, len(source), process.replica.world)
    check_alike(process, images.digest, "images in --data")
    config = replace(config, data=absolute(config.data))
    memory_before = psutil.Process().memory_info().rss  # trials leave memory behind that the run then uses
    calibration = calibrated(config, run.calibration(afresh=config.overwrite), source, device, process)
    held.enter_context(calibration.in_use())
    asked = config
    config, notes = right_sized(calibration.applied(config), run, source, process, device)
    config = calibration.withdrawn(config, asked)
    state = run.to_resume(config, config.overwrite)
    check_alike(process, state["step"] if state else 0, "run in --out")
    before = read_list(run, process) if state else None
    images = images.in_place_of(before)
    if state:
        check_extension(config, state)
    own, other_split = split(calibration.applied(config), process)
    if asked.cuda_graph is True:
        own.check_graph()  # now that the accumulation is known
    own = replace(own, cuda_graph=own.cuda_graph is True and not own.not_recorded)
    plan = plan_phases(own, images.images, process.replica.world)
    steps, start = plan[-1].stop, state["step"] if state else 0
    adjusted = check_adjusted(config, run, start, steps)
    changes = check_unchanged(before, images, config.data_changed) if start < steps else None
    predicted, _ = of_share(count, process)(own, counted_as(device))
    guard_memory(own, predicted, process, device)
    knn_sets = labelled_pair(config.knn_data, config.read_as, centre_crop(config.size)) if config.knn_data else None
    forget_peak(device)
    parts = balanced(predicted.segment_flops, process.world) if isinstance(process, InPipeline) else []
    training, origin = begin(config, plan, source, state, device, process, parts)
    if process.first and start < steps:
        run.check_room(training.model, config.keep)

    process.wait()  # all have read the folder before the first one writes to it
    if process.first:
        held.enter_context(run.locked())
        note_adjusted(run, adjusted, start)
        run.prepare(config, start)
        if start < steps:
            keep_list(run, images, changes, start)
        write_json(run.environment, environment(device, process.world) | {"calibration": calibration.to_json()})
    process.wait()
    if process.first and start < steps:
        write_json(run.cost, {"predicted": asdict(predicted)})
    bad = BadFiles(run, len(source), config.max_bad_share, process)

    diagnose = partial(training.diagnose, source)
    with Loop(
        run, config, steps, state, process, device, config.recipe, max_bad_steps=config.max_bad_steps, diagnose=diagnose
    ) as loop:
        notes += [f"starting from {origin}"] if origin else []
        notes += [normalised(training.mean, training.std)] if isinstance(config.read_as, Stored) else []
        for line in (
            *header(config, plan, len(source), predicted, training),
            str(calibration),
            *notes,
            *run.notes,
            *other_split,
            *other_images(changes, images),
            *continuing(config, state, steps),
            *told(adjusted, start),
        ):
            loop.console.print(line)
        strips = Strips(config, source, steps)
        if start < steps:
            bad.retry([source], loop.console)
        if start == 0:
            strips.draw(training, loop, 0.0)
        for phase in plan:
            if start >= phase.stop:
                continue
            training.enter(phase)
            begins, share = phase.own(max(start, phase.start)), process.replica
            feed = batches(phase.config, source, begins, phase.own(phase.stop), share, device, phase.per_epoch)
            read = map(bad.filter, loop.timed(feed))  # in a pipeline by the first process only
            for step in loop.until(phase.stop):
                lr = training.learning_rate(step, config)
                losses = training.step(step, read, partial(meets, config, phase, loop, strips))
                epoch, last = phase.own(step + 1) / phase.per_epoch, step + 1 == phase.stop
                loop.record(losses, images=phase.images, epoch=epoch, lr=lr, line=last, begun=training.begun)
                if epoch.is_integer() or loop.done == steps:
                    bad.merge()
                    if knn_sets and (epoch % config.knn_every == 0 or loop.done == steps):
                        online_knn(training, knn_sets, loop, epoch)
                strips.draw(training, loop, epoch)
                if loop.done == steps:
                    write_measured(loop, predicted, memory_before)
                if loop.checkpoint_due:
                    loop.save(training.state())

    if process.first:
        if bad.seen:
            loop.console.print(f"{len(bad.seen)} unreadable files were skipped; they are listed in {run.skipped}")
        write_results(config.out, loop)
    process.wait()
    return run.folder


def write_results(run: str, loop: Loop) -> None:
    """What a run ends with: its encoder, a picture, a page."""
    (folder,), _ = write_export(Export(run=run, overwrite=True))
    picture = show(Show(runs=(run,)))
    loop.picture("reconstructions", picture)
    page = report(Report(runs=(run,)))
    loop.console.print(f"done: encoder in {folder}, reconstructions in {picture}, report in {page}")


def normalised(mean: list[float], std: list[float]) -> str:
    """By which numbers images are normalised, as options."""
    return " ".join(["normalised by --mean", *(f"{x:.6g}" for x in mean), "--std", *(f"{x:.6g}" for x in std)])


def meets(config: Pretrain, phase: PhaseSteps, loop: Loop, strips: Strips, done: int) -> bool:
    """Whether something is made of the weights after so many steps: then a pipeline has to be empty."""
    epoch = phase.own(done) / phase.per_epoch
    evaluated = config.knn_data is not None and epoch % config.knn_every == 0
    return done == phase.stop or evaluated or strips.due(done, epoch) or loop.meets(done)


def online_knn(training: Training, sets: tuple[Labelled, Labelled], loop: Loop, epoch: float) -> None:
    """Write the encoder's kNN accuracy into the log; all processes measure it."""
    with loop.paused():
        accuracy = training.knn(*sets, loop.console)
        low, high = accuracy.interval
        loop.write(knn=accuracy, knn_low=low, knn_high=high, knn_images=accuracy.images)
        loop.say(f"epoch {epoch:.4g}  kNN {accuracy}")


def check_extension(config: Pretrain, state: dict[str, Any]) -> None:
    """Raise UserError for more epochs of a run whose phases would then begin elsewhere."""
    before = state["config"]["epochs"]
    if config.phase_scales and before < float(config.epochs):
        raise UserError(
            f"--epochs {config.epochs}: this run has {before}, and its phases (--phase-scales) would begin elsewhere; give "
            f"--epochs {before}, and pre-train on from it with --init {config.out} in another --out"
        )


def write_measured(loop: Loop, predicted: StepCost, memory_before: int) -> None:
    """What was measured, into cost.json: before the last checkpoint, since nothing is measured after it.

    Args:
        loop: at its last step.
        predicted: the cost of a step.
        memory_before: bytes of this process before there was a model.
    """
    speed = loop.images_per_second
    if not loop.process.first or speed is None:
        return
    # a GPU's allocator counts tensors; elsewhere it is what the process grew by, readers and all
    peak = peak_memory(loop.device) - (0 if loop.device.type == "cuda" else memory_before)
    found = {
        "peak_bytes": peak,
        "images_per_second": speed,
        "flops_per_second": speed * predicted.train_flops_per_image,
    }
    write_json(loop.run.cost, {"predicted": asdict(predicted), "measured": found})
