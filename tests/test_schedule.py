"""The learning rate is MAE's: linear warm-up, half a cosine. Phases are FastMIM-P's."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from leanmim.config import Pretrain
from leanmim.recipes import FASTMIM_P
from leanmim.schedule import learning_rate, phases

RUNS = [(100, 10.0), (1000, 50.0), (40, 2.5), (20, 0.0), (20, 20.0), (1, 0.0), (7, 6.5)]


@pytest.mark.parametrize(("steps", "warmup"), RUNS)
def test_the_rate_stays_between_nothing_and_the_peak(steps: int, warmup: float) -> None:
    rates = [learning_rate(step, steps, warmup, 0.3) for step in range(steps)]
    assert all(0 <= rate <= 0.3 for rate in rates)
    rise = [rate for step, rate in enumerate(rates) if step <= warmup]
    fall = [rate for step, rate in enumerate(rates) if step >= warmup]
    assert all(a < b for a, b in pairwise(rise))
    assert all(a > b for a, b in pairwise(fall))


def test_the_warm_up_is_a_line_from_nothing_to_the_peak() -> None:
    rates = [learning_rate(step, 100, 8.0, 2.0) for step in range(9)]
    assert rates == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2]


def test_a_warm_up_may_end_between_two_steps() -> None:
    assert learning_rate(2, 40, 2.5, 1.0) == pytest.approx(0.8)
    assert learning_rate(3, 40, 2.5, 1.0) == pytest.approx((1 + math.cos(math.pi * 0.5 / 37.5)) / 2)


def test_without_warm_up_the_peak_comes_first() -> None:
    assert learning_rate(0, 10, 0.0, 0.7) == 0.7


@pytest.mark.parametrize(
    ("share", "value"),
    [(0, 1), (1 / 6, (2 + 3**0.5) / 4), (1 / 4, (2 + 2**0.5) / 4), (1 / 3, 3 / 4), (1 / 2, 1 / 2), (2 / 3, 1 / 4)],
)
def test_after_the_warm_up_the_rate_is_half_a_cosine(share: float, value: float) -> None:
    assert learning_rate(20 + round(120 * share), 140, 20.0, 3.0) == pytest.approx(3 * value)


def test_the_rate_ends_near_nothing() -> None:
    assert 0 < learning_rate(999, 1000, 50.0, 1.0) < 1e-5
    assert learning_rate(1000, 1000, 50.0, 1.0) == pytest.approx(0, abs=1e-12)


def test_the_halves_of_the_cosine_mirror_each_other() -> None:
    for step in range(0, 51):
        assert learning_rate(10 + step, 110, 10.0, 1.0) + learning_rate(110 - step, 110, 10.0, 1.0) == pytest.approx(1)


def test_the_rate_is_proportional_to_the_peak() -> None:
    for step in (0, 3, 10, 50, 99):
        assert learning_rate(step, 100, 10.0, 0.004) == pytest.approx(4 * learning_rate(step, 100, 10.0, 0.001))


# Phases.


def test_the_recipe_is_128_160_192_at_0_50_80_percent() -> None:
    table = phases(replace(FASTMIM_P, epochs=100))
    assert [(phase.start, phase.stop, phase.config.size) for phase in table] == [
        (0, 50, (128, 128)), (50, 80, (160, 160)), (80, 100, (192, 192)),
    ]  # fmt: skip
    assert not any(phase.config.phase_scales for phase in table)


def test_one_phase_unless_there_are_more(tiny: Pretrain) -> None:
    ((start, stop, config),) = phases(tiny)
    assert (start, stop, config) == (0, tiny.epochs, tiny)


def test_sizes_need_not_be_square() -> None:
    table = phases(replace(FASTMIM_P, input_size=(128, 256), epochs=10))
    assert [phase.config.size for phase in table] == [(128, 256), (160, 320), (192, 384)]
