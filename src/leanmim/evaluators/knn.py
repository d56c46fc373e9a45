"""Weighted k-nearest neighbours on cosine similarity (Wu et al. 2018, section 3.4; as in DINO)."""

from collections.abc import Iterator

import torch
from torch import nn

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
    bank = nn.functional.normalize(train.x, dim=1)
    classes = int(train.y.max()) + 1
    right = 0
    for x, y in zip(nn.functional.normalize(val.x, dim=1).split(1024), val.y.split(1024), strict=True):
        similarity, nearest = (x @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(x), classes, device=x.device)
        votes.scatter_add_(1, train.y[nearest], (similarity / temperature).softmax(1))  # exp alone may overflow
        right += int((votes.argmax(1) == y).sum())
    return Accuracy(right, len(val.y))


def knn(config: Knn) -> Iterator[tuple[str, Accuracy]]:
    """The accuracy of the encoder, and of the baselines where asked for."""
    with storage(config) as store:
        for subject in subjects(config):
            train, val = store.pair(subject)
            yield record(config, "knn", subject, knn_accuracy(train, val, config.k, config.temperature))
