"""Segmentation by frozen patch features: kNN and logistic regression of patches, judged pixel by pixel. No decoder is trained.

As in CAPI (Darcet et al., arXiv 2502.08769) in kind: the patches of the training images, each of the class of most of its
pixels, are what votes and what is fitted. The votes, or the logits, of a validation image's patches are upsampled bilinearly to
the pixels of its mask, and the largest one is the pixel's class. IoU of a class: pixels that are it and are found to be, by pixels
that are either, over all validation images; mIoU: its mean over the classes that occur in the validation masks.

Nothing is kept on disk: of the training images only the patches that are drawn are in memory, of the validation images one
batch.

b batch, c channels, H W pixels, h w patches of n, d width, k classes, i images, v values of masks.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from rich.markup import escape
from torch import Tensor, nn

from leanmim.config import Evaluate
from leanmim.data import Bad, loader
from leanmim.data.masks import Masked, collate_pairs, masked_pair, patch_classes
from leanmim.data.readable import tell_left_out
from leanmim.data.source import nothing_readable
from leanmim.encoders.backbone import as_tokens
from leanmim.errors import UserError
from leanmim.evaluators.accuracy import Resampled
from leanmim.evaluators.cache import layer_name
from leanmim.evaluators.features import Features, Subject, grid_of, read_layers
from leanmim.evaluators.knn import nearest, vote
from leanmim.evaluators.probe import logistic_regression
from leanmim.progress import track, working
from leanmim.start import Start
from leanmim.targets import patchify

Grid = tuple[int, int]  # patches down and across
FINEST = 16  # px: the side of a patch of raw pixels, at most
AT_ONCE = 2**26  # numbers: of similarities, and of upsampled scores
DRAWS = 1000  # of the bootstrap
Tally = Integer[np.ndarray, "3 v"]
"""Pixels of an image by class: rightly found, those that there are, found."""


class Measure(NamedTuple):
    """A way to classify patches of a layer."""

    order: tuple[int, int]  # kNN or linear; neighbours or layer
    what: str
    title: str
    options: dict[str, Any]
    layer: int  # position among those that are read
    scores: Callable[[Float[Tensor, "n d"]], Float[Tensor, "n k"]]
    values: Int[np.ndarray, " k"]  # what the masks call the classes


class Found(NamedTuple):
    """What a measure found."""

    measure: Measure
    miou: Resampled
    accuracy: Resampled
    ious: dict[str, float]  # of each class that occurs in the validation masks


class Drawn(NamedTuple):
    """Patches of the training images, of one layer."""

    features: Features  # labels are positions in `values`
    values: Int[np.ndarray, " k"]
    total: int  # patches from which they were drawn, those without a class included


def masked_sets(config: Evaluate, start: Start) -> tuple[Masked, Masked]:
    """The images and masks that --masks names, to train with and to validate, as an encoder takes the images."""
    return masked_pair(config.masks or "", start.model.read_as, start.model.size, config.crop)


def pixels_of_patches(images: Float[Tensor, "b c H W"], grid: Grid) -> Float[Tensor, "b h w d"]:
    """The trivial baseline: the pixels of each patch themselves, 16 x 16 of them where there are more."""
    side = max(1, min(FINEST, images.shape[2] // grid[0], images.shape[3] // grid[1]))
    small = nn.functional.interpolate(images, (grid[0] * side, grid[1] * side), mode="area")
    return patchify(small, side).unflatten(1, grid)


@torch.inference_mode()
def patch_features(
    subject: Subject, images: Float[Tensor, "b c H W"], layers: Sequence[int], grid: Grid
) -> list[Float[Tensor, "b h w d"]]:
    """Of normalised images, after some blocks or stages, and after the last one and the model's norm.

    Args:
        subject: whose.
        images: normalised.
        layers: after which blocks or stages too.
        grid: of a subject that is no encoder.
    """
    if subject.backbone is None:
        return [pixels_of_patches(images, grid)]
    features, maps = read_layers(subject.backbone, images, layers)
    tokens = as_tokens(subject.backbone, features)
    last = tokens.unflatten(1, grid_of(tokens.shape[1], subject.size))
    return [*(part.permute(0, 2, 3, 1).float() for part in maps), last.float()]


class Dense:
    """Measures of the patches of an encoder, or of a baseline.

    Args:
        config: how it is measured.
        subject: what.
        layers: blocks or stages after which a linear probe is fitted too.
        grid: the patches of a subject that is no encoder.
    """

    def __init__(self, config: Evaluate, subject: Subject, layers: Sequence[int], grid: Grid = (1, 1)) -> None:
        self.config, self.subject, self.layers, self.grid = config, subject, layers, grid
        self.device = subject.normalise.device
        image = torch.zeros(1, subject.train.source.channels, *subject.size, device=self.device)
        self.grids: list[Grid] = [(x.shape[1], x.shape[2]) for x in patch_features(subject, image, layers, grid)]

    def read(self, data: Masked) -> Iterator[tuple[list[int], list[Float[Tensor, "b h w d"]], list[np.ndarray]]]:
        """The places of a batch, its features of each layer, and its masks.

        Raises:
            UserError: no image can be read, or a mask is none.
        """
        size, count = self.config.batch_size, len(data)
        order = [list(range(a, min(a + size, count))) for a in range(0, count, size)]
        feed = loader(data.pairs, order, self.subject.workers, self.device, collate_pairs)
        read, unreadable = list[int](), list[Bad]()
        title = f"{escape(self.subject.name)} patches of {count} images"
        for images, masks, places, bad in track(feed, title, len(order)):
            read, unreadable = read + places, unreadable + bad
            if places:
                normalised = self.subject.normalise(images)
                yield places, patch_features(self.subject, normalised, self.layers, self.grid), masks
        if not read:
            raise nothing_readable(count, unreadable[0])
        tell_left_out(data.source, read)

    def drawn(self) -> list[Drawn]:
        """Patches of the training images, for each layer; those without a class are left out.

        Raises:
            UserError: they are not of two classes.
        """
        data, limit, void = self.subject.train, self.config.patches, self.config.void
        assert isinstance(data, Masked)
        chosen = [draw(len(data) * h * w, limit, self.config.seed) for h, w in self.grids]
        xs: list[list[Tensor]] = [[] for _ in self.grids]
        ys: list[list[np.ndarray]] = [[] for _ in self.grids]
        for places, layers, masks in self.read(data):
            for row, (place, mask) in enumerate(zip(places, masks, strict=True)):
                classes = {grid: patch_classes(mask, grid, void).ravel() for grid in set(self.grids)}
                for layer, grid in enumerate(self.grids):
                    own, first = classes[grid], place * len(classes[grid])
                    start, stop = np.searchsorted(chosen[layer], (first, first + len(own)))
                    patches = chosen[layer][start:stop] - first
                    patches = patches[own[patches] >= 0]
                    xs[layer].append(layers[layer][row].flatten(0, 1)[torch.from_numpy(patches).to(self.device)])
                    ys[layer].append(own[patches])
        found = []
        for own_xs, own_ys, (h, w) in zip(xs, ys, self.grids, strict=True):
            values, labels = np.unique(np.concatenate(own_ys), return_inverse=True)
            if len(values) < 2:
                held = f"only class {values[0]}" if len(values) else "no class"
                raise UserError(
                    f"the masks of {str(data.masks.root)!r} hold {held} where patches were drawn; two or more are needed: see "
                    "to --void, or give more --patches"
                )
            features = Features(torch.cat(own_xs), torch.from_numpy(labels.ravel()).to(self.device))
            found.append(Drawn(features, values, len(data) * h * w))
        return found

    def measures(self, drawn: Sequence[Drawn]) -> Iterator[Measure]:
        """kNN of the last layer, logistic regression of all."""
        config, last = self.config, len(drawn) - 1
        features, values, _ = drawn[last]
        bank = Features(nn.functional.normalize(features.x, dim=1), features.y)
        ks = sorted({k for k in config.k if k <= len(bank.y)})
        for k, votes in zip(ks, neighbours(bank, len(values), ks, config.temperature), strict=True):
            options: dict[str, Any] = {"k": k, "temperature": config.temperature}
            yield Measure((0, k), "knn", f"kNN, k = {k}", options, last, votes, values)
        for layer, (features, values, _) in enumerate(drawn):
            what = f"logistic regression on {len(features.y):,} patches"
            with working(f"{escape(self.subject.name)}: {what}"):
                model = logistic_regression(features, config.c)
            options, scores = {"c": config.c}, logits(model, self.device)
            if layer == last:
                yield Measure((2, 0), "linear", "linear", options, layer, scores, values)
            else:
                name = layer_name(self.layers[layer])
                yield Measure(
                    (1, self.layers[layer]), f"linear {name}", f"linear, {name}", options, layer, scores, values
                )

    def judged(self, measures: Sequence[Measure]) -> Iterator[Found]:
        """Every measure on the pixels of the validation images, which are read once.

        Raises:
            UserError: no pixel has a class.
        """
        data, void = self.subject.val, self.config.void
        assert isinstance(data, Masked)
        tallies: list[list[np.ndarray]] = [[] for _ in measures]
        for _, layers, masks in self.read(data):
            patches = [x.flatten(0, 2) for x in layers]
            for own, measure in zip(tallies, measures, strict=True):
                b, h, w, _ = layers[measure.layer].shape
                scores = measure.scores(patches[measure.layer]).view(b, h, w, -1).permute(0, 3, 1, 2)
                own += [
                    tally(mask, measure.values[largest(image, mask.shape)], void)
                    for image, mask in zip(scores, masks, strict=True)
                ]
        for measure, own in zip(measures, tallies, strict=True):
            count = max(part.shape[1] for part in own)
            counts = np.stack([np.pad(part, ((0, 0), (0, count - part.shape[1]))) for part in own])
            counts = counts[counts[:, 1].any(1)]  # an image that is void all over judges nothing
            if not len(counts):
                raise UserError(
                    f"no pixel of the masks of {str(data.masks.root)!r} has a class, as the images are cut; see to --void and "
                    "--crop"
                )
            values = np.flatnonzero(counts.any((0, 1)))
            yield judge(measure, counts[..., values], values, self.config.seed)


def draw(total: int, limit: int, seed: int) -> Int[np.ndarray, " n"]:
    """So many of ``total`` at most, drawn without replacement, in order."""
    if total <= limit:
        return np.arange(total)
    return np.sort(np.random.default_rng(seed).choice(total, limit, replace=False, shuffle=False))


def neighbours(
    bank: Features, classes: int, ks: Sequence[int], temperature: float
) -> list[Callable[[Float[Tensor, "n d"]], Float[Tensor, "n k"]]]:
    """For each k the votes of so many nearest patches, as in `knn_accuracy`. They are found once for all k, and for so few patches at
    once that memory stays bounded.
    """
    rows, found = max(1, AT_ONCE // len(bank.y)), list[Any]()

    def ranked(x: Float[Tensor, "n d"]) -> list[Any]:
        if not found or found[0] is not x:
            parts = [nearest(part, bank, max(ks)) for part in nn.functional.normalize(x, dim=1).split(rows)]
            found[:] = x, *map(torch.cat, zip(*parts, strict=True))
        return found[1:]

    def votes(k: int) -> Callable[[Float[Tensor, "n d"]], Float[Tensor, "n k"]]:
        def function(x: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
            similarity, labels = ranked(x)
            return vote(similarity[:, :k], labels[:, :k], classes, temperature)

        return function

    return [votes(k) for k in ks]


def logits(model: Any, device: torch.device) -> Callable[[Float[Tensor, "n d"]], Float[Tensor, "n k"]]:
    """Those of scikit-learn's model for each class; of two classes it gives the second one's only."""

    def function(x: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        found = torch.from_numpy(model.decision_function(x.cpu().numpy())).float().to(device)
        return found if found.ndim == 2 else torch.stack([torch.zeros_like(found), found], dim=1)

    return function


def largest(scores: Float[Tensor, "k h w"], shape: tuple[int, ...]) -> Int[np.ndarray, "H W"]:
    """The class of the largest score at each pixel once they are upsampled bilinearly; few classes at once."""
    at_once = max(1, AT_ONCE // (shape[0] * shape[1]))
    best: Tensor | None = None
    which = torch.zeros(shape, dtype=torch.long, device=scores.device)
    for first in range(0, len(scores), at_once):
        part = scores[None, first : first + at_once]
        value, place = nn.functional.interpolate(part, shape, mode="bilinear", align_corners=False)[0].max(0)
        higher = torch.ones_like(value, dtype=torch.bool) if best is None else value > best
        which = torch.where(higher, place + first, which)
        best = value if best is None else torch.maximum(value, best)
    return which.cpu().numpy()


def tally(truth: Integer[np.ndarray, "H W"], found: Integer[np.ndarray, "H W"], void: Sequence[int]) -> Tally:
    """Of one image; void pixels are left out."""
    kept = ~np.isin(truth, void)
    truth, found = truth[kept], found[kept]
    values = int(max(truth.max(), found.max())) + 1 if len(truth) else 1
    return np.stack([np.bincount(part, minlength=values) for part in (truth[truth == found], truth, found)])


def iou_of(counts: Integer[np.ndarray, "*i 3 v"]) -> Float[np.ndarray, "*i v"]:
    """Intersection over union of each class; NaN where it does not occur."""
    right, there, found = np.moveaxis(counts, -2, 0)
    return np.divide(right, there + found - right, out=np.full(right.shape, np.nan), where=there > 0)


def judge(measure: Measure, counts: Integer[np.ndarray, "i 3 v"], values: Int[np.ndarray, " v"], seed: int) -> Found:
    """mIoU and pixel accuracy of all images, each with 95 % of a bootstrap: as many images, drawn with replacement."""
    images = len(counts)
    drawn = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=DRAWS)
    sums = drawn.astype(float) @ counts.reshape(images, -1).astype(float)  # exact, and by BLAS, as integers are not
    sums = sums.astype(np.int64).reshape(DRAWS, *counts.shape[1:])
    whole = counts.sum(0)

    def resampled(function: Callable[[Any], Any]) -> Resampled:
        low, high = np.quantile(function(sums), (0.025, 0.975)).tolist()
        return Resampled(float(function(whole)), (low, high), images)

    miou = resampled(lambda sums: np.nanmean(iou_of(sums), axis=-1))
    accuracy = resampled(lambda sums: sums[..., 0, :].sum(-1) / sums[..., 1, :].sum(-1))
    ious = {str(value): iou for value, iou in zip(values, iou_of(whole).tolist(), strict=True) if iou == iou}
    return Found(measure, miou, accuracy, ious)
