"""The cells of a comparison: a pre-training and its evaluation, or the evaluation of something that was not pre-trained."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from leanmim.classifier.finetune import finetune
from leanmim.classifier.recipes import small_epochs
from leanmim.comparison.plan import Entry, precision_of
from leanmim.comparison.processes import Task
from leanmim.config import Compare, Config, Evaluate, Finetune, Pretrain
from leanmim.config.compare import Measure
from leanmim.data import absolute, effective_batch
from leanmim.data.labels import Labels, labels_of
from leanmim.device import resolve_device
from leanmim.evaluators.accuracy import Accuracy
from leanmim.evaluators.cache import storage
from leanmim.evaluators.evaluate import measures
from leanmim.evaluators.features import Subject, random_backbone, raw_pixels, subject_of, subjects
from leanmim.files import readable_lines, write_json
from leanmim.names import slug
from leanmim.run import Run
from leanmim.start import SCRATCH, is_foreign, start_of
from leanmim.train.pretrain import pretrain
from leanmim.weights import restore

Kind = Literal["recipe", "depth", "untrained", "pixels", "weights"]
UNTRAINED, PIXELS = "random initialisation", "raw pixels"
FROZEN: dict[int, Measure] = {0: "knn", 2: "linear", 3: "attentive"}
"""The measures of a frozen encoder, by the first number of `Result.order`."""
K = 20


@dataclass(frozen=True)
class Cell:
    """A row of the table with one seed."""

    kind: Kind
    name: str
    """Of the row."""
    seed: int
    folder: Path
    measures: tuple[Measure, ...]
    pretrain: Pretrain | None
    """What is trained; of an untrained model what would be. None of given weights."""
    evaluate: Evaluate
    """The frozen encoder's measures; not all of them need be asked for."""
    finetune: Finetune
    depths: bool = False
    """Whether the shallower backbones of a run in segments are evaluated too."""

    @property
    def architecture(self) -> str:
        """The model and what is changed in it, if a recipe says so."""
        own = self.pretrain
        if own is None:
            return ""
        parts = [own.model, *(f"{key}={value}" for key, value in own.model_kwargs.items())]
        return ", ".join([*parts, *([f"--depth {own.depth}"] if own.depth is not None else [])])

    @property
    def result(self) -> dict[str, Any]:
        """What was found, if the cell is finished; else empty."""
        return json.loads(file.read_text()) if (file := self.folder / "result.json").is_file() else {}

    def task(self, seconds: float) -> Task:
        """The task of a process; what it has to know is written into the cell's folder."""
        configs = {
            name: own and own.to_json()
            for name in ("pretrain", "evaluate", "finetune")
            for own in [getattr(self, name)]
        }
        write_json(self.folder / "cell.json", vars(self) | configs | {"folder": str(self.folder)})
        return Task("cell", f"{self.name}, seed {self.seed}", self.folder, seconds)

    @classmethod
    def read(cls, folder: Path) -> "Cell":
        """What `task` wrote."""
        values = json.loads((folder / "cell.json").read_text())
        kinds: dict[str, type[Config]] = {"pretrain": Pretrain, "evaluate": Evaluate, "finetune": Finetune}
        configs = {name: values[name] and kind.from_json(values[name]) for name, kind in kinds.items()}
        return cls(**values | configs | {"folder": folder, "measures": tuple(values["measures"])})

    def at_depth(self, depth: int) -> "Cell":
        """The evaluation of the first blocks or stages of what this cell trains."""
        folder = self.folder / f"depth{depth}"
        tuned = replace(self.finetune, depth=depth, out=str(folder / "finetune"))
        return replace(self, folder=folder, evaluate=replace(self.evaluate, depth=depth), finetune=tuned)


def cells_of(config: Compare, entries: Sequence[Entry], labels: Labels, size: tuple[int, ...]) -> list[Cell]:
    """The cells of the whole budget, seed by seed; the baselines first.

    Args:
        config: of the comparison.
        entries: the recipes.
        labels: the images to evaluate on.
        size: at which all are evaluated, px.
    """
    found = []
    for seed in range(config.seeds):
        recipes = [cell_of(config, "recipe", entry.title, seed, labels, size, entry.config) for entry in entries]
        architectures: dict[str, Pretrain | None] = {}
        for cell in recipes:
            architectures.setdefault(cell.architecture, cell.pretrain)
        for architecture, recipe in architectures.items():
            name = UNTRAINED if len(architectures) == 1 else f"{UNTRAINED}, {architecture}"
            found.append(cell_of(config, "untrained", name, seed, labels, size, recipe))
        if seed == 0 and {"knn", "linear"} & set(config.measures):
            found.append(cell_of(config, "pixels", PIXELS, seed, labels, size, entries[0].config))
        found += [
            cell_of(own, "weights", name, seed, labels, size)
            for name, own in weights_of(config, [entry.config for entry in entries]).items()
        ]
        found += recipes
    return found


def weights_of(config: Compare, recipes: Iterable[Pretrain]) -> dict[str, Compare]:
    """The weights that are evaluated as they are, each with the configuration that has its architecture: those that are given, and
    those that a recipe begins with.
    """
    begun = {
        recipe.init: replace(config, model=recipe.model, model_kwargs=recipe.model_kwargs)
        for recipe in recipes
        if recipe.init
    }
    return {name: begun.get(name, config) for name in (*config.weights, *begun)}


def screening_of(config: Compare, entries: Sequence[Entry], labels: Labels, size: tuple[int, ...]) -> list[Cell]:
    """The cells of a tenth of the budget, with one seed and the first measure."""
    config = replace(config, measures=config.measures[:1], depths=False)
    return [
        cell_of(
            config, "recipe", entry.title, 0, labels, size, replace(entry.config, epochs=entry.screen_epochs), "screen"
        )
        for entry in entries
    ]


def cell_of(
    config: Compare,
    kind: Kind,
    name: str,
    seed: int,
    labels: Labels,
    size: tuple[int, ...],
    recipe: Pretrain | None = None,
    part: str = "cells",
) -> Cell:
    """A cell; ``part`` is the folder within that of the comparison."""
    called = f"weights-{slug(name)}" if kind == "weights" else slug(name)  # a folder may be called as a recipe is
    folder = Path(config.out) / part / f"{called}-{seed}"
    machine: dict[str, Any] = {"device": config.device, "workers": config.workers}
    if recipe is not None:
        out = str(folder / "pretrain")
        recipe = replace(
            recipe, data=absolute(config.data), out=out, seed=seed, keep=1, memory=config.memory, **machine
        )
    untrained = kind in ("untrained", "pixels")
    start = SCRATCH if untrained else name if recipe is None else recipe.out
    architecture: dict[str, Any] = {"channels": config.channels, "values": config.values}
    if recipe is not None:
        architecture["depth"] = recipe.depth  # fine-tuning would take the whole model, its later layers untrained
    if untrained and recipe is not None:
        architecture |= {"model": recipe.model, "model_kwargs": recipe.model_kwargs, "stats": config.stats}
    if kind == "weights" and is_foreign(Path(name)):
        architecture |= {"model": config.model, "model_kwargs": config.model_kwargs, "stats": config.stats}
    frozen = Evaluate(
        run=start, data=config.eval, input_size=size, k=(min(K, len(labels.train)),), layers=(0,), shots=(), seed=seed,
        attentive="attentive" in config.measures, cache=False, **architecture, **machine,
    )  # fmt: skip
    tuned = Finetune(
        start=start, data=config.eval, out=str(folder / "finetune"), input_size=size, recipe="small", seed=seed, keep=1,
        epochs=finetune_epochs(config, labels), label_share=config.label_share, labels_per_class=config.labels_per_class,
        memory=config.memory, precision=precision_of(config), compile=False, **architecture, **machine,
    )  # fmt: skip
    return Cell(kind, name, seed, folder, config.measures, recipe, frozen, tuned, config.depths and kind == "recipe")


def finetune_images(config: Compare, labels: Labels) -> int:
    """Labelled images that fine-tuning trains with."""
    return sum(min(count, labels_of(count, config.label_share, config.labels_per_class)) for count in labels.counts)


def finetune_epochs(config: Compare, labels: Labels) -> int:
    """Passes over these."""
    auto = config.finetune_epochs == "auto"
    return round(small_epochs(finetune_images(config, labels)) / 5) if auto else int(config.finetune_epochs)


def run_cell(folder: Path) -> None:
    """Train and evaluate what is not done yet; the result is written last."""
    with FileLock(folder / ".lock"):  # of a comparison that was killed the process may not have ended yet
        cell = Cell.read(folder)
        found: dict[str, Any] = {}
        if cell.kind == "recipe":
            found["training"] = once(folder / "training.json", lambda: trained(cell))
        found["accuracies"] = evaluated(cell)
        if cell.depths:
            depths = restore(cell.evaluate.run)[1].encoder.depths[:-1]
            found["depths"] = {depth: evaluated(cell.at_depth(depth)) for depth in depths}
        write_json(folder / "result.json", found)


def evaluated(cell: Cell) -> dict[Measure, Any]:
    """The accuracies by all measures that there are for such a cell."""
    accuracies: dict[str, Any] = {}
    if set(cell.measures) & set(FROZEN.values()):
        accuracies |= once(cell.folder / "frozen.json", lambda: frozen(cell))
    if "finetune" in cell.measures and cell.kind != "pixels":
        accuracies |= once(cell.folder / "finetuned.json", lambda: finetuned(cell))
    return {measure: accuracies[measure] for measure in cell.measures if measure in accuracies}


def once(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a file holds, which is made first if it is not there."""
    if not file.is_file():
        write_json(file, make())
    return json.loads(file.read_text())


def trained(cell: Cell) -> dict[str, Any]:
    """Pre-train, and what it took."""
    assert cell.pretrain is not None
    run = Run(pretrain(cell.pretrain))
    cost = json.loads(run.cost.read_text())
    lines = [line for line in readable_lines(run.metrics) if "images_per_second" in line]
    logged = sum(line["images_per_second"] * line["seconds"] for line in lines)
    images = lines[-1]["step"] * effective_batch(Pretrain.from_json(run.stored()))
    return {
        "epochs": cell.pretrain.epochs,
        # of a training that was stopped, the steps between a line of the log and the checkpoint are in no line
        "seconds": sum(line["seconds"] for line in lines) * images / logged,
        "images": images,
        "flops_per_image": cost["predicted"]["train_flops_per_image"],
        "predicted_bytes": cost["predicted"]["peak_bytes"],
        "measured_bytes": cost["measured"]["peak_bytes"],
    }


def frozen(cell: Cell) -> dict[str, Any]:
    """The accuracies of the frozen encoder, or of raw pixels."""
    with storage(cell.evaluate) as store:
        return {
            FROZEN[result.order[0]]: as_json(result.accuracy)
            for subject in measured(cell)
            for result in measures(cell.evaluate, subject, store)
        }


def measured(cell: Cell) -> Iterator[Subject]:
    """What is evaluated: an untrained encoder is that of the recipe before its first step."""
    own = cell.evaluate.with_stats()
    if cell.kind not in ("untrained", "pixels"):
        yield next(subjects(own))
        return
    assert cell.pretrain is not None
    start = start_of(SCRATCH, own)
    encoder = random_backbone(cell.pretrain, start.model.size).to(resolve_device(own.device))
    subject = subject_of(cell.name, start, encoder, own)
    yield subject if cell.kind == "untrained" else subject._replace(embed=raw_pixels, backbone=None)


def finetuned(cell: Cell) -> dict[str, Any]:
    """The accuracy after fine-tuning."""
    results = json.loads((finetune(cell.finetune) / "results.json").read_text())
    return {"finetune": {"value": results["top1"], "interval": results["top1_interval"], "images": results["images"]}}


def as_json(accuracy: Accuracy) -> dict[str, Any]:
    """An accuracy with its interval and the number of images."""
    return {"value": float(accuracy), "interval": accuracy.interval, "images": accuracy.images}
