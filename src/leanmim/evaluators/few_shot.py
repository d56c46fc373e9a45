"""Few-shot accuracy: logistic regression on the frozen features of a few images of each class, drawn several times."""

from collections.abc import Sequence
from statistics import stdev

import numpy as np
import torch
from jaxtyping import Int
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from leanmim.data import seed_of
from leanmim.evaluators.accuracy import Accuracy
from leanmim.evaluators.features import Features


class Draws(Accuracy):
    """The mean accuracy of several draws of training images, all of the same validation images.

    Its interval is for the choice of validation images, as that of one accuracy; `deviation` is for the choice of training
    images.

    Args:
        rights: images that are classified right, for each draw.
        images: all that were classified in each.
    """

    rights: tuple[int, ...]

    def __new__(cls, rights: Sequence[int], images: int) -> "Draws":  # type: ignore[override]
        """Of counts, as the base."""
        self = super().__new__(cls, sum(rights), images * len(rights))
        assert isinstance(self, cls)
        self.rights, self.images = tuple(rights), images
        return self

    def __reduce__(self) -> tuple[type["Draws"], tuple[tuple[int, ...], int]]:  # type: ignore[override]
        return type(self), (self.rights, self.images)

    @property
    def deviation(self) -> float:
        """Standard deviation among the draws; 0 of a single one."""
        shares = [right / self.images for right in self.rights]
        return stdev(shares) if len(shares) > 1 else 0.0


def draw(y: Int[Tensor, "b"], shots: int, seed: int) -> Int[Tensor, "s"]:
    """The same number of images of each class, in order.

    Args:
        y: labels; each class has at least ``shots``.
        shots: images a class.
        seed: of the choice.
    """
    labels, chance = y.cpu().numpy(), np.random.default_rng(seed)
    found = [chance.choice(np.flatnonzero(labels == label), shots, replace=False) for label in np.unique(labels)]
    return torch.from_numpy(np.sort(np.concatenate(found)))


def few_shot(train: Features, val: Features, shots: int, draws: int = 10, seed: int = 0) -> Draws:
    """Accuracy with a few training images of each class, 0 to 1.

    Features are standardised by all training images, for which no label is needed (ours).

    Args:
        train: features to draw from.
        val: features to classify.
        shots: images of each class.
        draws: how often they are drawn.
        seed: of the draws.
    """
    scale = StandardScaler().fit(train.x.cpu().numpy())
    x, queries = (scale.transform(part.x.cpu().numpy()) for part in (train, val))
    y, expected = train.y.cpu().numpy(), val.y.cpu().numpy()
    rights = []
    for number in range(draws):
        rows = draw(train.y, shots, seed_of(seed, shots, number)).numpy()
        model = LogisticRegression(max_iter=5000).fit(x[rows], y[rows])
        rights.append(int(np.sum(model.predict(queries) == expected)))
    return Draws(rights, len(expected))
