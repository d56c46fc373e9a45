"""kNN: against scikit-learn and a loop over the definition."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from leanmim.config import Knn, Pretrain
from leanmim.evaluators.features import Features
from leanmim.evaluators.knn import knn, knn_accuracy
from tests.evaluators.samples import clusters, swin
from tests.runs import untrained


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (20, 0.5), (200, 0.07), (7, 5.0)])
def test_knn_is_that_of_scikit_learn(k: int, temperature: float) -> None:
    train, val = clusters(200, 5, 1.5, 1), clusters(90, 5, 1.5, 2)
    theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / temperature))
    expected = theirs.fit(train.x.numpy(), train.y.numpy()).score(val.x.numpy(), val.y.numpy())
    assert 0.3 < expected < 0.95
    assert knn_accuracy(train, val, k, temperature) == pytest.approx(expected, abs=1e-9)


def test_knn_is_that_of_a_loop_over_the_definition() -> None:
    train, val = clusters(60, 4, 1.5, 1), clusters(40, 4, 1.5, 2)
    right = 0
    for x, label in zip(val.x.double(), val.y.tolist(), strict=True):
        similarity = [
            (float(x @ other / x.norm() / other.norm()), int(y))
            for other, y in zip(train.x.double(), train.y, strict=True)
        ]
        votes = [0.0] * 4
        for s, y in sorted(similarity, reverse=True)[:9]:
            votes[y] += math.exp(s / 0.1)
        right += votes.index(max(votes)) == label
    assert knn_accuracy(train, val, 9, 0.1) == right / 40


def test_knn_on_separable_clusters_is_perfect() -> None:
    assert knn_accuracy(clusters(50, 5, 0.01, 1), clusters(25, 5, 0.01, 2), k=5) == 1.0


def test_knn_on_noise_is_chance() -> None:
    draw = torch.Generator().manual_seed(0)
    noise = [Features(torch.randn(n, 8, generator=draw), torch.arange(n) % 4) for n in (800, 1000)]
    assert knn_accuracy(*noise) == pytest.approx(0.25, abs=0.06)


def test_more_neighbours_than_images_are_all_images() -> None:
    train, val = clusters(12, 3, 1.0, 1), clusters(30, 3, 1.0, 2)
    assert knn_accuracy(train, val, k=1000) == knn_accuracy(train, val, k=12)


def test_the_accuracy_knows_how_many_images_it_is_of() -> None:
    assert knn_accuracy(clusters(12, 3, 1.0, 1), clusters(30, 3, 1.0, 2)).images == 30


def test_a_minute_temperature_is_one_neighbour() -> None:
    """exp(similarity / temperature) alone would be infinite."""
    train, val = clusters(100, 5, 1.5, 1), clusters(80, 5, 1.5, 2)
    assert knn_accuracy(train, val, k=20, temperature=1e-4) == knn_accuracy(train, val, k=1)


def test_knn_sees_directions_only() -> None:
    train, val = clusters(100, 5, 1.5, 1), clusters(80, 5, 1.5, 2)
    scaled = Features(train.x * torch.rand(100, 1).add(0.1) * 50, train.y)
    assert knn_accuracy(scaled, val) == knn_accuracy(train, val)


def test_validation_sets_larger_than_a_chunk() -> None:
    train, val = clusters(50, 5, 1.0, 1), clusters(1500, 5, 1.0, 2)
    parts = [knn_accuracy(train, Features(val.x[a : a + 500], val.y[a : a + 500])) for a in (0, 500, 1000)]
    assert knn_accuracy(train, val) == pytest.approx(sum(parts) / 3)


def test_a_class_that_training_has_not_is_never_right() -> None:
    train, val = clusters(20, 2, 0.01, 1), clusters(20, 4, 0.01, 2)
    assert knn_accuracy(train, val, k=3) == 0.5


def test_baselines(options: dict[str, object]) -> None:
    found = dict(knn(Knn(**options, baselines=True)))  # type: ignore[arg-type]
    assert list(found) == ["pretrained", "random", "pixels"]
    assert found["pixels"] == 1.0
    assert dict(knn(Knn(**options))) == {"pretrained": found["pretrained"]}  # type: ignore[arg-type]


SIZES: list[tuple[int, ...]] = [(48,), (40, 24), (64,)]


@pytest.mark.parametrize("size", SIZES)
def test_another_input_size_of_a_vit(size: tuple[int, ...], options: dict[str, object]) -> None:
    ((_, accuracy),) = knn(Knn(**options, input_size=size))  # type: ignore[arg-type]
    assert accuracy >= 0.9


# timm's, when it resizes tables of relative positions
@pytest.mark.filterwarnings("ignore:.*searchsorted.*:UserWarning", "ignore:Using a non-tuple sequence:UserWarning")
def test_another_input_size_of_a_swin(tiny_simmim: Pretrain, tiles: Path) -> None:
    run = str(untrained(swin(tiny_simmim)))
    for size in ((128,), (64, 96)):
        config = Knn(run=run, data=str(tiles), input_size=size, device="cpu", workers=0, baselines=True)
        found = dict(knn(config))
        assert found["pretrained"] >= 0.9
        assert set(found) == {"pretrained", "random", "pixels"}


def test_grey_images(tiny: Pretrain, tiles: Path) -> None:
    run = untrained(replace(tiny, channels=1))
    ((_, accuracy),) = knn(Knn(run=str(run), data=str(tiles), device="cpu", workers=0))
    assert accuracy > 0.5
