"""Weighted k-nearest neighbours on cosine similarity (Wu et al. 2018, section 3.4; as in DINO).

b features to classify, k neighbours, d width, c classes.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from leanmim.config import Knn
from leanmim.evaluators.accuracy import Accuracy
from leanmim.evaluators.cache import storage
from leanmim.evaluators.features import Features, record, subjects


def knn_accuracy(train: Features, val: Features, k: int = 20, temperature: float = 0.07) -> Accuracy:
    """Share of validation images whose neighbours' weighted vote is right, 0 to 1.

    Args:
        train: features that vote.
        val: features to classify.
        k: neighbours; all of ``train`` when it has fewer.
        temperature: votes weigh exp(similarity / temperature).
    """
    bank = Features(nn.functional.normalize(train.x, dim=1), train.y)
    classes = int(train.y.max()) + 1
    right = 0
    for x, y in zip(nn.functional.normalize(val.x, dim=1).split(1024), val.y.split(1024), strict=True):
        right += int((vote(*nearest(x, bank, k), classes, temperature).argmax(1) == y).sum())
    return Accuracy(right, len(val.y))


def nearest(x: Float[Tensor, "b d"], bank: Features, k: int) -> tuple[Float[Tensor, "b k"], Int[Tensor, "b k"]]:
    """Cosine similarities and labels of the neighbours, nearest first; all features are of unit length."""
    similarity, places = (x @ bank.x.T).topk(min(k, len(bank.x)), dim=1)
    return similarity, bank.y[places]


def vote(
    similarity: Float[Tensor, "b k"], labels: Int[Tensor, "b k"], classes: int, temperature: float
) -> Float[Tensor, "b c"]:
    """The neighbours' shares in the vote for each class; each weighs exp(similarity / temperature)."""
    votes = torch.zeros(len(similarity), classes, device=similarity.device)
    return votes.scatter_add_(1, labels, (similarity / temperature).softmax(1))  # exp alone may overflow


def knn(config: Knn) -> Iterator[tuple[str, Accuracy]]:
    """The accuracy of the encoder, and of the baselines where asked for."""
    with storage(config) as store:
        for subject in subjects(config):
            train, val = store.pair(subject)
            yield record(config, "knn", subject, knn_accuracy(train, val, config.k, config.temperature))
