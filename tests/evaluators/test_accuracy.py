"""Accuracies and their intervals: scipy's."""

import copy
import json
import pickle

import pytest
from scipy.stats import binomtest

from leanmim.evaluators.accuracy import Accuracy


@pytest.mark.parametrize(("right", "images"), [(0, 5), (5, 5), (1, 1), (348, 600), (7, 80), (41_234, 50_000)])
def test_the_interval_is_that_of_scipy(right: int, images: int) -> None:
    expected = binomtest(right, images).proportion_ci(confidence_level=0.95, method="wilson")
    assert Accuracy(right, images).interval == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_it_is_a_number_and_says_how_far_it_can_be_trusted() -> None:
    accuracy = Accuracy(348, 600)
    assert accuracy == 0.58 and json.dumps(accuracy) == "0.58" and f"{accuracy:.1%}" == "58.0%"
    assert f"{accuracy}" == str(accuracy) == "58.0 % (95 % interval 54.0 to 61.9, 600 images)"
    assert str(Accuracy(1, 1000)).endswith("1,000 images)")


def test_copies_keep_the_number_of_images() -> None:
    for twin in (copy.deepcopy(Accuracy(3, 4)), pickle.loads(pickle.dumps(Accuracy(3, 4)))):
        assert (twin, twin.images, twin.interval) == (0.75, 4, Accuracy(3, 4).interval)
