"""Few-shot accuracy: against scikit-learn on the same draws."""

import copy
import pickle
from statistics import mean, stdev

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from leanmim.data import seed_of
from leanmim.evaluators.accuracy import Accuracy
from leanmim.evaluators.few_shot import Draws, draw, few_shot
from tests.evaluators.samples import clusters

LABELS = torch.tensor([2, 0, 1, 1, 0, 2, 2, 2, 0, 1, 1, 0])


@pytest.mark.parametrize("shots", [1, 3, 4])
def test_draws_are_stratified_and_seeded(shots: int) -> None:
    rows = [draw(LABELS, shots, seed) for seed in (0, 0, 1, 2, 3)]
    for chosen in rows:
        assert torch.bincount(LABELS[chosen]).tolist() == [shots] * 3
        assert len(chosen.unique()) == 3 * shots
    assert torch.equal(rows[0], rows[1])
    assert len({tuple(chosen.tolist()) for chosen in rows}) == (4 if shots < 4 else 1)


def test_it_is_scikit_learns_on_these_images() -> None:
    train, val = clusters(60, 4, 1.5, 1), clusters(80, 4, 1.5, 2)
    found = few_shot(train, val, shots=3, draws=4, seed=7)
    scale = StandardScaler().fit(train.x)
    expected = []
    for number in range(4):
        rows = draw(train.y, 3, seed_of(7, 3, number))
        model = LogisticRegression(max_iter=5000).fit(scale.transform(train.x[rows]), train.y[rows])
        expected.append(model.score(scale.transform(val.x), val.y))
    assert 0.3 < min(expected) < max(expected) < 1
    assert found == pytest.approx(mean(expected))
    assert found.deviation == pytest.approx(stdev(expected))
    assert found.images == 80


def test_more_images_help() -> None:
    train, val = clusters(80, 4, 1.5, 1), clusters(80, 4, 1.5, 2)
    assert few_shot(train, val, 1) < few_shot(train, val, 5) < few_shot(train, val, 20, draws=1)


def test_the_interval_is_that_of_one_accuracy() -> None:
    """The draws share the validation images: more draws do not narrow it."""
    drawn = Draws([30, 50], 80)
    assert drawn == 0.5 and drawn.interval == Accuracy(40, 80).interval
    assert str(drawn) == str(Accuracy(40, 80))
    assert Draws([40], 80).deviation == 0.0
    for twin in (copy.deepcopy(drawn), pickle.loads(pickle.dumps(drawn))):
        assert (twin, twin.rights, twin.images) == (0.5, (30, 50), 80)
