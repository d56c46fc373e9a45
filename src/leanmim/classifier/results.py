"""What a fine-tuning leaves behind: accuracies, predictions, the confusion matrix, the worst mistakes.

n images, c classes, k classes of an image, the likeliest first.
"""

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from leanmim.data.read import Picture
from leanmim.evaluators.accuracy import Accuracy
from leanmim.names import shortened
from leanmim.pictures import save_figure
from leanmim.pictures.mistakes import Prediction, draw_mistakes, worst_mistakes
from leanmim.run import write_atomically, write_json

COUNTED, NAMED = 15, 40  # classes up to which the cells of the confusion matrix hold numbers, and the axes names


@dataclass(frozen=True)
class Predictions:
    """What a classifier says of labelled images."""

    classes: Sequence[str]
    names: Sequence[str]
    """Of the images: their paths."""
    labels: Int[np.ndarray, "n"]
    probabilities: Float[np.ndarray, "n c"]

    @property
    def first(self) -> list[Prediction]:
        """Of each image the likeliest class."""
        best, sure = self.probabilities.argmax(1).tolist(), self.probabilities.max(1).tolist()
        rows = zip(self.names, self.labels.tolist(), best, sure, strict=True)
        return [Prediction(name, self.classes[label], self.classes[i], share) for name, label, i, share in rows]


def likeliest(probabilities: Float[np.ndarray, "n c"], k: int) -> Int[np.ndarray, "n k"]:
    """The k likeliest classes of each image; all where there are fewer."""
    return np.argsort(-probabilities, axis=1, kind="stable")[:, :k]


def top_accuracy(found: Predictions, k: int = 1) -> Accuracy:
    """Share of images whose class is among the k likeliest."""
    right = (likeliest(found.probabilities, k) == found.labels[:, None]).any(1)
    return Accuracy(int(right.sum()), len(right))


def confusion_matrix(found: Predictions) -> Int[np.ndarray, "c c"]:
    """How many images of each class (row) were taken for each class (column)."""
    c = len(found.classes)
    predicted = likeliest(found.probabilities, 1)[:, 0]
    return np.bincount(found.labels * c + predicted, minlength=c * c).reshape(c, c)


def class_accuracies(confusion: Int[np.ndarray, "c c"]) -> list[float | None]:
    """Share of each class's images that is right; None of a class without images."""
    counts = confusion.sum(1)
    return [int(confusion[i, i]) / int(count) if count else None for i, count in enumerate(counts)]


def measures(found: Predictions) -> dict[str, Any]:
    """All accuracies, as results.json holds them. Top-5 is None where there are no more than five classes."""
    confusion = confusion_matrix(found)
    per_class = class_accuracies(confusion)
    top1, top5 = top_accuracy(found), top_accuracy(found, 5) if len(found.classes) > 5 else None
    return {
        "classes": list(found.classes),
        "images": len(found.labels),
        "top1": top1,
        "top1_interval": top1.interval,
        "top5": top5,
        "top5_interval": None if top5 is None else top5.interval,
        "mean_per_class": float(np.mean([share for share in per_class if share is not None])),
        "per_class": per_class,
        "counts": confusion.sum(1).tolist(),
        "confusion": confusion.tolist(),
    }


def write_results(
    folder: Path,
    found: Predictions,
    read: Callable[[int], Picture],
    *,
    data: str,
    split: str,
    step: int,
    epoch: float,
    weights: Literal["best", "last"],
    top: int = 5,
) -> dict[str, Any]:
    """Write results.json, predictions.csv, confusion.png and, where there are mistakes, mistakes.png.

    Args:
        folder: of the run.
        found: the predictions, of at least one image.
        read: gives an image by its place among the predictions; for the pictures of mistakes.
        data: where the images are from.
        split: which part of the data they are.
        step: of the weights.
        epoch: of the weights.
        weights: the best of the run, or the last.
        top: how many classes of each image predictions.csv names.

    Returns:
        What results.json holds.
    """
    results = {"data": data, "split": split, "step": step, "epoch": epoch, "weights": weights, **measures(found)}
    write_atomically(folder / "predictions.csv", lambda path: write_predictions(path, found, top))
    title = f"top-1: {top_accuracy(found)}"
    save_figure(draw_confusion(found.classes, confusion_matrix(found), title), folder / "confusion.png")
    if mistakes := worst_mistakes(found.first, read):
        save_figure(draw_mistakes(mistakes), folder / "mistakes.png")
    else:
        (folder / "mistakes.png").unlink(missing_ok=True)
    write_json(folder / "results.json", results)
    return results


def rank_columns(k: int) -> list[str]:
    """The titles of the cells of `ranks`."""
    return ["class", "probability", *(f"{what}_{i}" for i in range(2, k + 1) for what in ("class", "probability"))]


def ranks(classes: Sequence[str], probabilities: Float[np.ndarray, "n c"], k: int) -> Iterable[list[str]]:
    """For each image its k likeliest classes and their probabilities, in turn."""
    for row, best in zip(probabilities, likeliest(probabilities, k), strict=True):
        yield [cell for i in best for cell in (classes[i], f"{row[i]:.6f}")]


def write_predictions(path: Path, found: Predictions, top: int) -> None:
    """Write a CSV table: path, label, and the likeliest classes with their probabilities."""
    k = min(top, len(found.classes))
    # a file's name need not be text: its bytes are kept
    with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "label", *rank_columns(k)])
        rows = zip(found.names, found.labels, ranks(found.classes, found.probabilities, k), strict=True)
        table.writerows([name, found.classes[label], *cells] for name, label, cells in rows)


def draw_confusion(classes: Sequence[str], confusion: Int[np.ndarray, "c c"], title: str) -> Figure:
    """The confusion matrix; colours are shares of a row, so that classes of few images are seen too."""
    c = len(classes)
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    side = min(10.0, max(4.0, 2.2 + 0.34 * c))
    figure = Figure(figsize=(side + 1.4, side + 0.6), dpi=130, layout="constrained")
    axis = figure.subplots()
    # rare mistakes would hardly be seen on a linear scale
    image = axis.imshow(share, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    bar = figure.colorbar(image, ax=axis, ticks=[0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1], shrink=0.8)
    bar.ax.set_yticklabels(["0", "1 %", "5 %", "10 %", "25 %", "50 %", "75 %", "100 %"], fontsize=8)
    bar.set_label("share of the class's images", fontsize=8)
    axis.tick_params(labelsize=8)
    if c <= NAMED:
        names = [shortened(name, 24) for name in classes]
        axis.set_xticks(range(c), names, rotation=90 if c > 4 else 0, parse_math=False)
        axis.set_yticks(range(c), names, parse_math=False)
        axis.tick_params(length=0)
    if c <= COUNTED:
        for i, j in zip(*np.nonzero(confusion), strict=True):
            colour = "white" if share[i, j] > 0.4 else "black"
            axis.text(j, i, f"{confusion[i, j]}", ha="center", va="center", fontsize=8, color=colour)
    number = "" if c <= NAMED else ", by number; results.json has the names"
    axis.set_xlabel(f"predicted class{number}", fontsize=9)
    axis.set_ylabel("class", fontsize=9)
    axis.set_title(title, fontsize=9)
    return figure
