"""The order of the images is a pure function of (seed, epoch)."""

from itertools import pairwise

import pytest

from leanmim.data import Order, epoch_order, seed_of


def test_seeds_differ_by_numbers_order_and_length() -> None:
    keys = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (0, 1, 0), (0, 0, 1), (1, 2, 3), (3, 2, 1), (1, 2, 3, 0)]
    seeds = [seed_of(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [seed_of(*key) for key in keys]


@pytest.mark.parametrize("seed", [0, 3])
def test_an_epoch_shows_every_image_once_to_one_process(seed: int) -> None:
    per_epoch, batch, world, epochs = 5, 4, 2, 3
    count = per_epoch * batch * world
    ranks = [list(Order(count, batch, per_epoch, 0, epochs * per_epoch, seed, rank, world)) for rank in range(world)]
    orders = []
    for epoch in range(epochs):
        steps = slice(epoch * per_epoch, (epoch + 1) * per_epoch)
        seen = [[item for items in order[steps] for item in items] for order in ranks]
        assert set(seen[0]).isdisjoint(seen[1])
        assert sorted(seen[0] + seen[1]) == [(epoch, index) for index in range(count)]
        orders.append([index for _, index in seen[0] + seen[1]])
    assert all(a != b for a, b in pairwise(orders))
    assert all(order != sorted(order) for order in orders)


def test_the_batches_of_two_processes_are_that_of_one_twice_as_large() -> None:
    one = list(Order(48, 8, 6, 0, 12, 0))
    two = [list(Order(48, 4, 6, 0, 12, 0, rank, 2)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*two, strict=True)] == one


def test_what_does_not_fill_a_step_comes_in_other_epochs() -> None:
    batches = list(Order(10, 4, 2, 0, 12, 0))
    assert all(len(set(batch)) == 4 for batch in batches)
    for epoch in range(6):
        indices = [index for batch in batches[2 * epoch : 2 * epoch + 2] for _, index in batch]
        assert len(set(indices)) == 8
    assert {index for batch in batches for _, index in batch} == set(range(10))


@pytest.mark.parametrize(
    ("count", "batch", "per_epoch", "world"), [(10, 16, 1, 1), (10, 4, 2, 2), (3, 8, 1, 1), (1, 4, 1, 1)]
)
def test_fewer_images_than_a_step_takes_are_shown_permutation_after_permutation(
    count: int, batch: int, per_epoch: int, world: int
) -> None:
    ranks = [list(Order(count, batch, per_epoch, 0, 6 * per_epoch, 5, rank, world)) for rank in range(world)]
    shown = [item for step in zip(*ranks, strict=True) for items in step for item in items]
    assert all(len(items) == batch for order in ranks for items in order)
    assert len(set(shown)) == len(shown) == 6 * per_epoch * batch * world
    want = [(epoch, index) for epoch in range(len(shown)) for index in epoch_order(count, 5, epoch).tolist()]
    assert shown == want[: len(shown)]
    assert list(Order(count, batch, per_epoch, 3, 6 * per_epoch, 5, 0, world)) == ranks[0][3:]


@pytest.mark.parametrize("start", [1, 5, 6, 13])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_order_can_be_entered_anywhere(start: int, rank: int) -> None:
    whole = Order(50, 4, 6, 0, 18, 7, rank, 2)
    tail = Order(50, 4, 6, start, 18, 7, rank, 2)
    assert list(tail) == list(whole)[start:]
    assert len(tail) == 18 - start == len(list(tail))


def test_orders_differ_by_seed_and_are_permutations() -> None:
    orders = [epoch_order(100, seed, epoch).tolist() for seed in range(3) for epoch in range(3)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in orders}) == 9
