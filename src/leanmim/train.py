"""Pre-training: the loop. It never knows the method: images in, losses out."""

import contextlib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import PIL
import psutil
import timm
import torch
import torch.distributed as dist
import torchvision
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.utils.tensorboard import SummaryWriter

import leanmim
from leanmim.checkpoint import Run, carry_over, carry_over_moments, initialise, prefix, save, write_json
from leanmim.config import Export, Pretrain, Report, Show, parse_bytes
from leanmim.cost import count, readable
from leanmim.data import (
    IMAGENET,
    Bad,
    Crops,
    Labelled,
    Normalise,
    Order,
    centre_crop,
    collate,
    labelled_pair,
    list_images,
    loader,
    resolve_workers,
    seed_of,
    statistics,
)
from leanmim.device import device_name, peak_memory, resolve_device, resolve_precision
from leanmim.errors import UserError
from leanmim.evaluate.features import embedding, extract
from leanmim.evaluate.knn import knn_accuracy
from leanmim.export import export
from leanmim.mim import MIM, build
from leanmim.offload import Offload
from leanmim.plan import available, fit
from leanmim.report import report
from leanmim.schedule import learning_rate, stages
from leanmim.show import show
from leanmim.step import make_optimizers, update


class Processes(NamedTuple):
    """This process among those that torchrun started; (0, 1) alone."""

    rank: int
    world: int


@contextlib.contextmanager
def processes(device: str) -> Iterator[tuple[Processes, torch.device]]:
    """Join the other processes, if torchrun started any, and leave them at the end."""
    rank, world, local = (int(os.environ.get(key, value)) for key, value in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))  # fmt: skip
    place = resolve_device(device, local)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if world > 1:
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield Processes(rank, world), place
    finally:
        if world > 1:
            dist.destroy_process_group()


def barrier(world: int) -> None:
    """Wait for the other processes."""
    if world > 1:
        dist.barrier()


def environment(device: torch.device, world: int) -> dict[str, Any]:
    """Versions and hardware, for the record."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "leanmim": leanmim.__version__,
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (torch, torchvision, timm, numpy, PIL)},
        "platform": platform.platform(),
        "device": device_name(device),
        "processes": world,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "command": sys.argv,
    }


class Log:
    """metrics.jsonl, TensorBoard events and the terminal, from the first process only."""

    def __init__(self, run: Run, step: int, active: bool) -> None:
        self.active = active
        self.console = Console(quiet=not active, highlight=False, soft_wrap=True)
        if active:
            self.file = open(run.metrics, "a", buffering=1)  # noqa: SIM115 closed with the log
            self.board = SummaryWriter(run.folder / "tensorboard", purge_step=step)

    def write(self, step: int, **values: int | float) -> None:
        """One line, one event for each value."""
        if self.active:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush."""
        if self.active:
            self.file.close()
            self.board.close()


class BadFiles:
    """The unreadable files met so far; too many end the run."""

    def __init__(self, run: Run, files: int, limit: float, active: bool) -> None:
        self.run, self.files, self.limit, self.active = run, files, limit, active
        self.seen: dict[str, str] = {}
        if run.skipped.exists():
            self.seen = {line["path"]: line["reason"] for line in map(json.loads, run.skipped.read_text().splitlines())}

    def add(self, bads: list[Bad]) -> None:
        """Record new ones.

        Raises:
            UserError: their share of all files is over the limit.
        """
        for bad in bads:
            if bad.path not in self.seen:
                self.seen[bad.path] = bad.reason
                if self.active:
                    with open(self.run.skipped, "a") as file:
                        file.write(json.dumps({"path": bad.path, "reason": bad.reason}) + "\n")
        if len(self.seen) > self.limit * self.files:
            raise UserError(
                f"{len(self.seen)} of {self.files} image files cannot be read, more than --max-bad-share {self.limit}; "
                f"they are listed in {self.run.skipped}; mend or remove them, or raise the share"
            )

    def merge(self, world: int) -> None:
        """Learn what the other processes met."""
        if world > 1:
            others: list[Any] = [None] * world
            dist.all_gather_object(others, list(self.seen.items()))
            self.add([Bad(*item) for other in others for item in other])


def pretrain(config: Pretrain) -> Path:
    """Pre-train a backbone on a folder of images; continue if the run folder holds the same run.

    The run folder gets config.json, environment.json, metrics.jsonl, tensorboard/, checkpoints/last.pt,
    skipped.jsonl if files were unreadable, and at the end export/timm/, reconstructions.png and report.html.

    Returns:
        The run folder.

    Raises:
        UserError: something in the configuration, the data or the run folder is wrong.
    """
    config.check()
    for name in ("data", "out"):
        if not getattr(config, name):
            raise UserError(
                f"--{name} is needed: {'a folder of images' if name == 'data' else 'the run folder to write'}"
            )
    with processes(config.device) as (process, device):
        return _pretrain(config, process, device)


class Steps(NamedTuple):
    """How a stage goes on through the data."""

    first: int  # step
    per_epoch: int
    images: int  # of a step, over all processes


def prepare(model: MIM, optimizers: list[AdamW], config: Pretrain, device: torch.device, world: int) -> Any:
    """What `update` calls for the losses: the model, compiled, offloaded and wrapped for several processes as asked."""
    model.train()
    if config.compile:
        torch._dynamo.config.recompile_limit = max(8, 2 * len(optimizers))  # one version for each segment
        model.encoder.segment = torch.compile(model.encoder.segment)  # type: ignore[method-assign]
        for decoder in model.decoders:
            decoder.compile()
    if offloads(config, device):
        return Offload(model, optimizers, device)
    if world > 1 and len(optimizers) == 1:  # segments step one by one: `update` averages their gradients itself
        return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    return model


def offloads(config: Pretrain, device: torch.device) -> bool:
    """Whether segments wait in host memory: where a device has memory of its own."""
    return config.offload and device.type == "cuda"


def at_next_size(
    model: MIM, optimizers: list[AdamW], config: Pretrain, device: torch.device
) -> tuple[MIM, list[AdamW]]:
    """The same model and optimizers for another input size: nothing that was learned is lost."""
    larger = build(config)
    larger = larger if offloads(config, device) else larger.to(device)
    larger.autocast = model.autocast
    carry_over(model.encoder, larger.encoder)
    rest = {k: v for k, v in model.state_dict().items() if not k.startswith("encoder.backbone.")}
    larger.load_state_dict(rest, strict=False)
    fresh = make_optimizers(larger, config)
    carry_over_moments(model, optimizers, larger, fresh)
    return larger, fresh


def choose_batch(config: Pretrain, run: Run, files: int, world: int, device: torch.device) -> tuple[Pretrain, str]:
    """Batch and accumulation for ``--batch-size auto``: those of the run that is continued, or the largest that fits.

    Returns:
        The configuration with numbers in place of auto, and what was chosen, for people to read.

    Raises:
        UserError: not even one image fits the memory, or the step's images do not divide among the processes.
    """
    if config.effective_batch % world:
        raise UserError(f"--effective-batch {config.effective_batch} does not divide among {world} processes")
    if not config.overwrite and (before := run.batch()) and math.prod(before) * world == config.effective_batch:
        config = replace(config, batch_size=before[0], accum=before[1])
        return config, f"batch size auto: {before[0]} x accum {before[1]}, as this run began"
    free = torch.tensor(float(parse_bytes(config.memory) or available(device)), device=device)
    if world > 1:
        dist.all_reduce(free, dist.ReduceOp.MIN)  # all must choose alike
    memory = int(free) // (1 if device.type == "cuda" else world)
    found = fit(replace(config, batch_size=1), config.effective_batch // world, memory, device)
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


def _pretrain(config: Pretrain, process: Processes, device: torch.device) -> Path:
    rank, world = process
    first = rank == 0

    # Everything that can be wrong is looked at before anything is written.
    run = Run(Path(config.out))
    files = list_images(config.data)
    chosen = ""
    if config.batch_size == "auto":
        config, chosen = choose_batch(config, run, len(files), world, device)
    state = run.to_resume(config)
    table = stages(config)
    plan = []  # for each stage: its first step, steps of an epoch, images of a step
    first_step = 0
    for stage in table:
        batch = int(stage.config.batch_size)
        effective = batch * stage.config.accum * world
        if len(files) < effective:
            raise UserError(
                f"a batch of {effective} images ({batch} x accum {stage.config.accum} x {world} processes) is more than "
                f"the {len(files)} in {config.data!r}; choose --batch-size "
                f"{max(1, len(files) // stage.config.accum // world)} or smaller"
            )
        plan.append(Steps(first_step, len(files) // effective, effective))
        first_step += plan[-1].per_epoch * (stage.stop - stage.start)
    steps = first_step
    reached = state.get("stage", 0) if state else 0
    now = table[reached].config
    knn_sets = labelled_pair(config.knn_data, config.channels, centre_crop(config.size)) if config.knn_data else None
    base = psutil.Process().memory_info().rss
    torch.manual_seed(config.seed)
    for i, stage in enumerate(table[1:], start=1):
        try:
            build(stage.config)  # speaks up now, not when its time comes
        except UserError as error:
            raise UserError(f"--stage-scales {config.stage_scales[i]:g}: {error}; or choose other scales") from error
    model = build(now)
    origin = initialise(model, config.init) if config.init and state is None else ""
    if state:
        mean, std = state["mean"], state["std"]
    elif config.mean and config.std:
        mean, std = list(config.mean), list(config.std)
    elif config.statistics == "data":
        mean, std = statistics(files, config.channels, config.seed)
    else:
        mean, std = map(list, IMAGENET[config.channels])

    start = state["step"] if state else 0
    if not offloads(config, device):
        model.to(device)
    model.autocast = resolve_precision(config.precision, device)
    optimizers = make_optimizers(model, config)
    if state:
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    del state

    barrier(world)  # all have read the folder before the first one writes to it
    if first:
        run.prepare(config, start)
        write_json(run.folder / "environment.json", environment(device, world))
    barrier(world)
    log = Log(run, start, first)
    bad = BadFiles(run, len(files), config.max_bad_share, first)
    predicted, _ = count(config, "cuda" if device.type == "cuda" else "cpu")
    if first and start < steps:
        write_json(run.cost, {"predicted": asdict(predicted)})
    log.console.print(
        f"{config.recipe}: {config.model}, {predicted.encoder_parameters / 1e6:.1f} M parameters, "
        f"decoder {predicted.decoder_parameters / 1e6:.1f} M, {'bf16' if model.autocast else 'fp32'} on {device}\n"
        f"{len(files)} images in {config.data}; {steps} steps in {config.epochs} epochs; "
        f"warm-up {config.warmup:g} epochs"
    )
    for stage, part in zip(table, plan, strict=True):
        own = stage.config
        log.console.print(
            f"epochs {stage.start} to {stage.stop}: {own.size[0]} x {own.size[1]} px, {part.per_epoch} steps each; "
            f"effective batch {part.images} = {own.batch_size} x accum {own.accum} x {world} processes; "
            f"lr {own.blr * part.images / 256:.3g} = blr {own.blr:.3g} x {part.images} / 256"
        )
    log.console.print(
        f"predicted: {readable(predicted.peak_bytes)} at the peak, "
        f"{predicted.train_flops_per_image / 1e9:.3g} GFLOP an image"
        + (
            f"\n{len(optimizers)} segments, which end at {', '.join(map(str, model.encoder.depths))}: one loss each"
            if len(optimizers) > 1
            else ""
        )
        + (f"\n{chosen}" if chosen else "")
        + (
            f"\nnothing to offload: {device.type} has no memory of its own"
            if config.offload > offloads(config, device)
            else ""
        )
        + (f"\nstarting from {origin}" if origin else "")
        + (f"\ncontinuing after step {start}" if start else "")
    )
    normalise = Normalise(mean, std, device)
    trainer = prepare(model, optimizers, config, device, world)

    def checkpoint(step: int) -> None:
        if isinstance(trainer, Offload):
            trainer.wait()
        state = dict(
            config=config.to_json(), stage=reached, step=step, mean=mean, std=std, model=model.state_dict(),
            optimizers=[optimizer.state_dict() for optimizer in optimizers],
        )  # fmt: skip
        save(run.last, state)

    def online_knn(train: Labelled, val: Labelled) -> float:
        model.eval()
        for part in (train, val):
            part.transform = centre_crop(now.size)
        embed = embedding(prefix(model.encoder, now, None), "avg")
        workers = resolve_workers(config.workers)
        with trainer.whole() if isinstance(trainer, Offload) else contextlib.nullcontext():
            accuracy = knn_accuracy(
                extract(embed, train, normalise, int(now.batch_size), workers),
                extract(embed, val, normalise, int(now.batch_size), workers),
            )
        model.train()
        return accuracy

    waited = 0.0  # s, for data, since the last line of the log

    def micro_batches(batches: Iterator[tuple[Tensor, list[Bad]]], accum: int, step: int) -> Iterator[Tensor]:
        nonlocal waited
        for micro in range(accum):
            before = time.perf_counter()
            images, bads = next(batches)
            waited += time.perf_counter() - before
            bad.add(bads)
            torch.manual_seed(seed_of(config.seed, rank, step, micro))  # masks, and drop path if there is any
            yield normalise(images)

    progress = Progress(  # narrow enough for 80 columns
        TextColumn("{task.description}"), BarColumn(bar_width=8), TextColumn("{task.percentage:.0f} %"), TextColumn("left"),
        TimeRemainingColumn(), TextColumn("{task.fields[text]}"),
        console=log.console, disable=not (first and log.console.is_terminal), transient=True,
    )  # fmt: skip
    task = progress.add_task(config.recipe, total=steps, completed=start, text="")

    model.train()
    losses: list[Tensor] = []  # since the last line of the log, one number for each segment
    since, saved = time.perf_counter(), time.perf_counter()
    logged, spent, trained = start, 0.0, 0
    with contextlib.closing(log), progress:
        for number, (stage, part) in enumerate(zip(table, plan, strict=True)):
            stop = part.first + part.per_epoch * (stage.stop - stage.start)
            if start >= stop:
                continue
            if number > reached:
                if isinstance(trainer, Offload):
                    trainer.wait()
                model, optimizers = at_next_size(model, optimizers, stage.config, device)
                trainer = prepare(model, optimizers, config, device, world)
                reached, now = number, stage.config
            begin = max(start, part.first)
            dataset = Crops(
                files, now.channels, now.size, now.crop_scale, now.crop_ratio, now.flip, now.seed, now.interpolation
            )
            offset = stage.start * part.per_epoch - part.first  # the stage's steps, as if all epochs were like its own
            order = Order(
                len(files), int(now.batch_size), part.per_epoch * now.accum, (begin + offset) * now.accum,
                (stop + offset) * now.accum, config.seed, rank, world,
            )  # fmt: skip
            batches = iter(loader(dataset, order, resolve_workers(config.workers), device, collate))
            for step in range(begin, stop):
                epoch = (step + offset) / part.per_epoch
                lr = learning_rate(epoch, config.epochs, config.warmup, now.blr * part.images / 256, config.schedule)
                for optimizer in optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = lr
                feed = micro_batches(batches, now.accum, step)
                losses.append(update(trainer, optimizers, feed, now.accum, config.clip_grad))

                done = step + 1
                epoch, over = divmod(done + offset, part.per_epoch)
                # on a step all processes agree on: they average the losses together, and their clocks differ
                logs = done % config.log_every == 0 or done == stop or not config.checkpoint_minutes
                if logs:
                    means = torch.stack(losses).mean(0)
                    if world > 1:
                        dist.all_reduce(means, dist.ReduceOp.AVG if device.type == "cuda" else dist.ReduceOp.SUM)
                        means = means if device.type == "cuda" else means / world
                    values = means.tolist()
                    if not all(map(math.isfinite, values)):
                        raise UserError(
                            f"the loss is {values} at step {done}: training diverged; lower --blr, set --clip-grad, or use "
                            "--precision fp32. The last checkpoint is from before and stays"
                        )
                    seconds = time.perf_counter() - since
                    line = {
                        "epoch": (done + offset) / part.per_epoch,
                        "loss": sum(values) / len(values),
                        "lr": lr,
                        "images_per_second": (done - logged) * part.images / seconds,
                        "data_wait": waited / seconds,
                        "memory_bytes": peak_memory(device),
                        "seconds": seconds,
                    }
                    if len(values) > 1:
                        line |= {f"loss_{i}": value for i, value in enumerate(values)}
                    log.write(done, **line)
                    text = (
                        f"loss {line['loss']:.4f} {line['images_per_second']:.0f} images/s "
                        f"data wait {line['data_wait']:.0%} {line['memory_bytes'] / 2**30:.1f} GiB"
                    )
                    progress.update(task, completed=done, text=text)
                    twentieth = max(config.log_every, steps // 20)
                    if not log.console.is_terminal and (done // twentieth > logged // twentieth or done == steps):
                        log.console.print(f"step {done}/{steps}  epoch {line['epoch']:.1f}  {text}")
                    spent, trained = spent + seconds, trained + (done - logged) * part.images
                    losses, waited, since, logged = [], 0.0, time.perf_counter(), done
                if not over:
                    bad.merge(world)
                    if knn_sets and (epoch % config.knn_every == 0 or done == steps):
                        before = time.perf_counter()
                        if first:
                            accuracy = online_knn(*knn_sets)
                            log.write(done, knn=accuracy)
                            log.console.print(f"step {done}/{steps}  epoch {epoch}  kNN {accuracy:.1%}")
                        barrier(world)
                        since += time.perf_counter() - before  # no time of training
                late = time.perf_counter() - saved >= 60 * config.checkpoint_minutes
                if first and logs and (late or done == steps):
                    checkpoint(done)
                    saved = time.perf_counter()

    if first:
        if trained:
            speed = trained / spent
            measured = {
                # a GPU's allocator counts tensors; elsewhere it is what the process grew by, readers and all
                "peak_bytes": peak_memory(device) - (0 if device.type == "cuda" else base),
                "images_per_second": speed,
                "flops_per_second": speed * predicted.train_flops_per_image,
            }
            write_json(run.cost, {"predicted": asdict(predicted), "measured": measured})
        if bad.seen:
            log.console.print(f"{len(bad.seen)} unreadable files were skipped; they are listed in {run.skipped}")
        folder = export(Export(config.out, overwrite=True))
        picture = show(Show(config.out))
        page = report(Report((config.out,)))
        log.console.print(f"done: encoder in {folder}, reconstructions in {picture}, report in {page}")
    barrier(world)
    return run.folder
