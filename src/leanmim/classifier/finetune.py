"""Fine-tuning: from a pre-trained encoder to a classifier, on the loop of pre-training."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from leanmim.classifier.augment import eval_transform, mix, mixing, train_transform
from leanmim.classifier.data import class_weights, steps_per_epoch, train_batches, val_batches
from leanmim.classifier.header import header
from leanmim.classifier.model import Made, make_classifier
from leanmim.classifier.results import Predictions, top_accuracy, write_results
from leanmim.classifier.right_size import calibrated, right_sized
from leanmim.classifier.tuning import Batch, Tuning
from leanmim.config import Export, Finetune, Report
from leanmim.data import Normalise, images_at, order_of_steps, resolve_workers, seed_of
from leanmim.data.labels import Labels, choose_labels
from leanmim.device import deterministic, forget_peak, to_device
from leanmim.environment import environment
from leanmim.errors import Damaged, UserError
from leanmim.formats import write_export
from leanmim.loop import Loop
from leanmim.page import report
from leanmim.processes import Process, processes
from leanmim.run import Run, load, save, write_json
from leanmim.start import Start, start_of
from leanmim.train.adjusted import check_adjusted, note_adjusted, told
from leanmim.train.bad_files import BadFiles
from leanmim.train.data_list import (
    DataList,
    as_labelled,
    check_alike,
    check_unchanged,
    keep_list,
    other_images,
    read_list,
)
from leanmim.train.pretrain import write_measured
from leanmim.train.right_size import split


def finetune(config: Finetune) -> Path:
    """Fine-tune an encoder to a classifier on labelled images; continue if the run folder holds the same run.

    The run folder gets config.json, environment.json, labels.json, metrics.jsonl, tensorboard/, checkpoints/last.pt and
    best.pt, skipped.jsonl if files were unreadable, and at the end results.json, predictions.csv, confusion.png,
    mistakes.png, export/timm/ and report.html.

    Returns:
        The run folder.

    Raises:
        UserError: something in the configuration, the start, the data or the run folder is wrong.
    """
    config = config.with_stats()
    for name, what in (
        ("start", "what to start from"),
        ("data", "a labelled folder"),
        ("out", "the run folder to write"),
    ):
        if not getattr(config, name):
            raise UserError(f"{'START' if name == 'start' else f'--{name}'} is needed: {what}")
    exact = deterministic(config.deterministic, config.device)
    with exact, processes(config.device, config.process_timeout) as (process, device), ExitStack() as held:
        return tune(config, process, device, held)


def tune(config: Finetune, process: Process, device: torch.device, held: ExitStack) -> Path:
    """`finetune` in one of several processes; what is held until its end is the lock of the run folder."""
    # Everything that can be wrong is looked at before anything is written.
    resolve_workers(config.workers)
    run = Run(Path(config.out))
    start = start_of(config.start, config)
    if run.folder.exists() and any(run.folder.samefile(place) for place in own_folders(config.start)):
        raise UserError(f"--out {config.out!r} is where the start's weights are; choose another folder")
    labels = choose_labels(config.data, config.seed, config.val_share, config.label_share, config.labels_per_class)
    classes, names = tuple(labels.classes), labels.train + labels.val
    images = DataList.of(images_at(labels.root, names, 3), len(labels.train), process.world)
    check_alike(process, images.digest, "images in --data")
    memory_before = psutil.Process().memory_info().rss  # trials leave memory behind that the run then uses
    calibration = calibrated(config, run.calibration(afresh=config.overwrite), start, labels, process, device)
    held.enter_context(calibration.in_use())
    asked = config
    config, predicted, notes = right_sized(calibration.applied(config), run, start, labels, process, device)
    config = calibration.withdrawn(config, asked)
    state = run.to_resume(config, config.overwrite)
    check_alike(process, state["step"] if state else 0, "run in --out")
    changes = None
    if state:
        stored = Labels.from_json(run.read_labels())
        labels.check_classes(stored)
        before = read_list(run, process) or as_labelled(stored, process)
        changes = check_unchanged(before, images, config.data_changed)
        images = images.in_place_of(before)
        if state["start"] != start.digest:
            raise UserError(
                f"{config.start!r} holds other weights than those that this run began with; give its own START, another --out, "
                "or --overwrite"
            )
    own, _ = split(calibration.applied(config), process)
    per_epoch = steps_per_epoch(images.images, int(config.effective_batch))
    steps, first = max(1, round(float(config.epochs) * per_epoch)), state["step"] if state else 0
    adjusted = check_adjusted(config, run, first, steps)
    forget_peak(device)
    made = make_classifier(start, classes, config.pool, float(config.drop_path), config.head_init, config.seed)
    made.model.to(device)
    tuning = Tuning(own, made, per_epoch, class_weights(labels, config.class_weights), device, process)
    if state:
        tuning.restore(state)
    if process.first and first < steps:
        run.check_room(made.model, config.keep, copies=2 if tuning.average is not None else 1)  # the average, best.pt
    transform, mixup = train_transform(config, start.mean, start.std), mixing(config, len(classes))

    process.wait()  # all have read the folder before the first one writes to it
    if process.first:
        held.enter_context(run.locked())
        note_adjusted(run, adjusted, first)
        run.prepare(config, first)
        write_json(run.labels, labels.to_json())
        keep_list(run, images, changes, first)
        found = {"origin": start.origin, "calibration": calibration.to_json()}
        write_json(run.environment, environment(device, process.world) | found)
    process.wait()
    if process.first and first < steps:
        write_json(run.cost, {"predicted": asdict(predicted)})
    bad = BadFiles(run, len(labels.train) + len(labels.val), config.max_bad_share, process)
    judge = Judge(config, labels, start, made, run, tuple(state["best"]) if state else (-1.0, 0.0))

    def mixed(feed: Iterator[Any], step: int) -> Iterator[Batch]:
        for micro, (images, targets, found) in enumerate(islice(feed, own.accum)):
            bad.add(found)
            seed = seed_of(config.seed, process.rank, step, micro)
            inputs, soft = mix(mixup, images, targets, seed)
            yield to_device(inputs, device), to_device(soft, device)

    def diagnose(step: int) -> dict[str, Any]:
        """What reproduces a step of this process, and what in it is not finite first."""
        order = order_of_steps(own, len(labels.train), per_epoch, step, step + 1, process)
        alone = replace(own, workers=0)
        again = train_batches(alone, labels, transform, step, step + 1, process, device, per_epoch)
        return {
            "first_not_finite": tuning.diagnose(step, mixed(again, step)),
            "seeds": tuning.seeds(step),
            "files": [[labels.train[index] for _, index in items] for items in order],
        }

    with Loop(
        run, config, steps, state, process, device, "finetune", max_bad_steps=config.max_bad_steps, diagnose=diagnose
    ) as loop:
        for line in (
            *header(own, start, labels, made, tuning, predicted, steps),
            str(calibration),
            *notes,
            *run.notes,
            *other_images(changes, images),
            *told(adjusted, first),
        ):
            loop.console.print(line)
        if state:
            loop.console.print(f"{'continuing' if first < steps else 'finished'} after step {first}")
        if first < steps:
            bad.retry([images_at(labels.root, names, start.model.read_as)], loop.console)
        feed = loop.timed(train_batches(own, labels, transform, first, steps, process, device, per_epoch))

        for step in loop.until(steps):
            lr = tuning.set_learning_rate(step)
            losses = tuning.step(step, mixed(feed, step))
            epoch = (step + 1) / per_epoch
            loop.record(losses, images=tuning.images, epoch=epoch, lr=lr, line=step + 1 == steps)
            if epoch.is_integer() or step + 1 == steps:
                bad.merge()
                if epoch % int(config.eval_every) == 0 or step + 1 == steps:
                    judge.evaluate(tuning, loop, bad, epoch)
            if loop.done == steps:
                write_measured(loop, predicted, memory_before)
            if loop.checkpoint_due:
                loop.save(judge.facts(tuning) | {"best": list(judge.best), **tuning.state()})

    if process.first:
        judge.conclude(tuning, bad, loop)
    process.wait()
    return run.folder


def own_folders(start: str) -> list[Path]:
    """The folders that hold a start, up to three levels above a checkpoint."""
    path = Path(start.removeprefix("local-dir:"))
    return [folder for folder in (path, *path.absolute().parents[:3]) if folder.is_dir()] if path.exists() else []


class Judge:
    """Evaluates on the validation images, keeps the best weights, and writes what the run leaves.

    Args:
        config: of the run.
        labels: the images.
        start: of the run.
        made: the classifier's architecture.
        run: where to write.
        best: the highest accuracy so far, and of equal ones the least loss, negated.
    """

    def __init__(
        self, config: Finetune, labels: Labels, start: Start, made: Made, run: Run, best: tuple[float, float]
    ) -> None:
        self.config, self.labels, self.start, self.made, self.run, self.best = config, labels, start, made, run, best

    def facts(self, tuning: Tuning) -> dict[str, Any]:
        """What a checkpoint needs to be a classifier again."""
        return {
            "config": self.config.to_json(),
            "start": self.start.digest,
            "architecture": self.made.architecture.to_json(),
            "classes": self.labels.classes,
            "mean": self.start.mean,
            "std": self.start.std,
            "step": tuning.done,
        }

    def predict(self, tuning: Tuning, bad: BadFiles) -> tuple[Predictions, float]:
        """The probabilities of every readable validation image, and the mean cross-entropy."""
        normalise = Normalise(self.start.mean, self.start.std, tuning.device)
        transform = eval_transform(self.config)
        probabilities, truths, places = [], [], []
        feed = val_batches(self.config, self.labels, transform, bad.add, tuning.device)
        with tuning.evaluated() as logits:
            for images, targets, where in feed:
                probabilities.append(logits(normalise(images)).softmax(1).cpu())
                truths.append(targets)
                places += where
        shares, labels = torch.cat(probabilities), torch.cat(truths)
        loss = -shares.gather(1, labels[:, None]).clamp(min=1e-12).log().mean().item()
        names = [self.labels.val[place] for place in places]
        return Predictions(self.labels.classes, names, labels.numpy(), shares.numpy().astype(np.float64)), loss

    def evaluate(self, tuning: Tuning, loop: Loop, bad: BadFiles, epoch: float) -> None:
        """Write the accuracy into the log, and the weights to best.pt where they are the best so far."""
        with loop.paused():
            if not loop.process.first:
                return
            found, loss = self.predict(tuning, bad)
            top1 = top_accuracy(found)
            low, high = top1.interval
            top5 = {"val_top5": float(top_accuracy(found, 5))} if len(self.labels.classes) > 5 else {}
            loop.write(
                epoch=epoch,
                val_top1=float(top1),
                val_low=low,
                val_high=high,
                val_images=top1.images,
                val_loss=loss,
                **top5,
            )
            loop.say(f"epoch {epoch:.4g}  accuracy {top1}")
            if (float(top1), -loss) > self.best:
                self.best = (float(top1), -loss)
                self.keep(tuning, float(top1), epoch)

    def keep(self, tuning: Tuning, accuracy: float, epoch: float) -> None:
        """Write the weights to best.pt."""
        save(self.run.best, self.facts(tuning) | {"accuracy": accuracy, "epoch": epoch, "model": tuning.weights()})

    def conclude(self, tuning: Tuning, bad: BadFiles, loop: Loop) -> None:
        """Results, pictures, export and report, of the best weights; of the last ones where those are damaged."""
        say = loop.console.print
        last = top_accuracy(self.predict(tuning, bad)[0])
        try:
            best = load(self.run.best)
        except Damaged as error:
            say(f"{error}\nThe weights of the last step take its place.")
            self.keep(tuning, float(last), float(self.config.epochs))
            best = load(self.run.best)
        tuning.take(best["model"])
        found, _ = self.predict(tuning, bad)
        source = images_at(self.labels.root, found.names, self.start.model.read_as)
        write_results(
            self.run.folder, found, source.read, data=self.config.data, split="val", step=best["step"], epoch=best["epoch"],
            weights="best",
        )  # fmt: skip
        for name in ("confusion", "mistakes"):
            if (drawn := self.run.folder / f"{name}.png").is_file():
                loop.picture(name, drawn)
        if bad.seen:
            say(f"{len(bad.seen)} unreadable files were skipped; they are listed in {self.run.skipped}")
        say(f"accuracy after epoch {best['epoch']:.4g}, the best: {top_accuracy(found)}; after the last: {last}")
        (folder,), _ = write_export(Export(run=self.config.out, overwrite=True))
        page = report(Report(runs=(self.config.out,)))
        say(f"done: classifier in {folder}, predictions in {self.run.folder / 'predictions.csv'}, report in {page}")
