"""PR-MIM: which masked patches are decoded, against brute force."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from leanmim.masking import Grid, Mask, Split, distances, random_fine_mask, random_mask, select_furthest, select_random
from tests.helpers import SELECTIONS, mask_of, seeded

GRIDS = [Grid(4, 4), Grid(3, 7), Grid(6, 2), Grid(1, 9), Grid(8, 1), Grid(5, 6)]


STARTS = ["visible", "random"]


def masks() -> list[tuple[Grid, Mask]]:
    """Few, half, many visible and none; in squares of units; and finer than the grid."""
    found = [
        (grid, mask_of(6, grid, visible, seed=visible))
        for grid in GRIDS
        for visible in sorted({0, 1, 2, grid.n // 4, grid.n // 2, grid.n - 2, grid.n - 1})
    ]
    for grid, ratio in ((Grid(4, 6), 0.6), (Grid(8, 8), 0.75), (Grid(6, 4), 0.8)):
        found.append((grid, random_mask(torch.rand(5, grid.n // 4, generator=seeded(1)), grid, ratio, 2)))
    for grid in (Grid(3, 5), Grid(4, 4)):
        found.append((grid, random_fine_mask(torch.rand(5, grid.n * 4, generator=seeded(2)), grid, 0.75, 2)))
    return found


def kept_counts(mask: Mask) -> list[int]:
    m = mask.masked.shape[1]
    return sorted({1, (m + 1) // 2, m})


def levels(batch: int, n: int, seed: int) -> Tensor:
    """Noise without equal numbers, and with numbers that float32 tells apart after any distance is added."""
    return torch.rand(batch, n, generator=seeded(seed)).argsort(1) / n


# Furthest sampling.


def apart(a: int, b: int, grid: Grid) -> int:
    """The squared distance of two patches, exact."""
    (y, x), (v, u) = divmod(a, grid.width), divmod(b, grid.width)
    return (y - v) ** 2 + (x - u) ** 2


def candidates(open_: set[int], chosen: list[int], grid: Grid) -> set[int]:
    """The open patches whose nearest chosen patch is the furthest away; all of them if nothing is chosen."""
    if not chosen:
        return open_
    nearest = {patch: min(apart(patch, other, grid) for other in chosen) for patch in open_}
    return {patch for patch in open_ if nearest[patch] == max(nearest.values())}


@pytest.mark.parametrize("start", STARTS)
def test_every_pick_is_the_furthest_from_all_chosen(start: str) -> None:
    for grid, mask in masks():
        for kept in kept_counts(mask):
            noise = torch.rand(len(mask.masked), grid.n, generator=seeded(kept))
            split = select_furthest(mask, grid, kept, noise, start)
            for visible, masked, picks in zip(
                mask.visible.tolist(), mask.masked.tolist(), split.kept.tolist(), strict=True
            ):
                chosen, open_ = list(visible) if start == "visible" else [], set(masked)
                assert len(picks) == kept
                for pick in picks:
                    assert pick in candidates(open_, chosen, grid), (grid, visible, picks)
                    open_.remove(pick)
                    chosen.append(pick)


@pytest.mark.parametrize("start", STARTS)
def test_of_patches_equally_far_away_the_one_of_highest_noise_is_picked(start: str) -> None:
    for grid, mask in masks():
        noise = levels(len(mask.masked), grid.n, seed=grid.n)
        split = select_furthest(mask, grid, mask.masked.shape[1], noise, start)
        for values, visible, masked, picks in zip(
            noise.tolist(), mask.visible.tolist(), mask.masked.tolist(), split.kept.tolist(), strict=True
        ):
            chosen, open_ = list(visible) if start == "visible" else [], set(masked)
            for pick in picks:
                assert pick == max(candidates(open_, chosen, grid), key=values.__getitem__)
                open_.remove(pick)
                chosen.append(pick)


def test_noise_never_outweighs_a_distance() -> None:
    """Noise is below 1 as torch.rand is, by 2^-24 at least, and float32 has no room for that beside a distance."""
    grid, highest = Grid(7, 7), 1 - 2.0**-24
    for seed in range(20):
        mask = mask_of(8, grid, 2, seed)
        noise = torch.randint(0, 2, (8, grid.n), generator=seeded(seed)) * highest
        split = select_furthest(mask, grid, 20, noise)
        for visible, masked, picks in zip(
            mask.visible.tolist(), mask.masked.tolist(), split.kept.tolist(), strict=True
        ):
            chosen, open_ = list(visible), set(masked)
            for pick in picks:
                assert pick in candidates(open_, chosen, grid)
                open_.remove(pick)
                chosen.append(pick)


def shares(ids: Tensor, n: int) -> Tensor:
    """How often each of n patches is among the b rows of ids."""
    return torch.zeros(n).scatter_add_(0, ids.flatten(), torch.ones(ids.numel())) / len(ids)


@pytest.mark.parametrize(("start", "visible"), [("random", (0, 5, 6)), ("random", ()), ("visible", ())])
def test_the_first_pick_is_uniform_where_nothing_is_chosen_yet(start: str, visible: tuple[int, ...]) -> None:
    trials, grid = 20_000, Grid(3, 4)
    masked = [patch for patch in range(12) if patch not in visible]
    rows = [torch.tensor([ids], dtype=torch.int64).expand(trials, -1) for ids in (visible, masked)]
    split = select_furthest(Mask(*rows), grid, 1, torch.rand(trials, 12, generator=seeded(0)), start)
    share, p = shares(split.kept, 12), 1 / len(masked)
    assert (share[list(visible)] == 0).all()
    assert (share[masked] - p).abs().max() < 5 * (p * (1 - p) / trials) ** 0.5


def test_patches_equally_far_away_are_picked_equally_often() -> None:
    """Around the middle of 3 x 3 the corners are furthest; after one of them, the other three still are."""
    trials = 12_000
    mask = Mask(torch.full((trials, 1), 4), torch.tensor([[0, 1, 2, 3, 5, 6, 7, 8]]).expand(trials, -1))
    split = select_furthest(mask, Grid(3, 3), 2, torch.rand(trials, 9, generator=seeded(0)))
    pairs = Counter(map(tuple, split.kept.tolist()))
    assert set(pairs) == {(a, b) for a in (0, 2, 6, 8) for b in (0, 2, 6, 8) if a != b}
    for times in pairs.values():
        assert abs(times / trials - 1 / 12) < 5 * (1 / 12 * 11 / 12 / trials) ** 0.5


def test_a_row_of_patches_by_hand() -> None:
    """Nine in a row, the first visible: the last, then the middle, then the middles of the halves."""
    mask = Mask(torch.tensor([[0]]), torch.arange(1, 9)[None])
    kept = select_furthest(mask, Grid(1, 9), 4, torch.linspace(0.0, 0.5, 9)[None]).kept
    assert kept.tolist() == [[8, 4, 6, 2]]
    far = Mask(torch.tensor([[0, 1, 2, 3]]), torch.arange(4, 9)[None])
    noise = torch.tensor([[0.9, 0.9, 0.9, 0.9, 0.5, 0.0, 0.0, 0.0, 0.0]])
    assert select_furthest(far, Grid(1, 9), 2, noise, "random").kept.tolist() == [[4, 8]]  # 4 has the highest noise


@pytest.mark.parametrize("grid", GRIDS)
def test_distances_are_squared_and_exact(grid: Grid) -> None:
    got = distances(grid)
    assert got.tolist() == [[apart(a, b, grid) for b in range(grid.n)] for a in range(grid.n)]


# Both selections.


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_split_is_a_partition_of_the_right_counts(name: str) -> None:
    for grid, mask in masks():
        b, m = mask.masked.shape
        for kept in kept_counts(mask):
            split = SELECTIONS[name](mask, grid, kept, torch.rand(b, grid.n, generator=seeded(3)))
            assert torch.equal(split.visible, mask.visible)
            assert split.kept.shape == (b, kept) and split.thrown.shape == (b, m - kept)
            assert split.kept.dtype == split.thrown.dtype == torch.int64
            for row, masked in zip(
                torch.cat([split.kept, split.thrown], 1).tolist(), mask.masked.tolist(), strict=True
            ):
                assert sorted(row) == sorted(masked)


@pytest.mark.parametrize("name", SELECTIONS)
def test_rows_are_chosen_independently(name: str) -> None:
    for grid, mask in masks():
        kept = kept_counts(mask)[-1] // 2 or 1
        noise = torch.rand(len(mask.masked), grid.n, generator=seeded(4))
        together = SELECTIONS[name](mask, grid, kept, noise)
        for row in range(len(noise)):
            at = slice(row, row + 1)
            alone = SELECTIONS[name](Mask(mask.visible[at], mask.masked[at]), grid, kept, noise[at])
            for one, all_ in zip(alone, together, strict=True):
                assert torch.equal(one, all_[at])


def test_random_selection_keeps_those_of_lowest_noise() -> None:
    for grid, mask in masks():
        for kept in kept_counts(mask):
            noise = levels(len(mask.masked), grid.n, seed=kept)
            split = select_random(mask, kept, noise)
            for values, masked, picks in zip(noise.tolist(), mask.masked.tolist(), split.kept.tolist(), strict=True):
                assert sorted(picks) == sorted(sorted(masked, key=values.__getitem__)[:kept])


def test_random_selection_is_uniform_without_replacement() -> None:
    trials, grid = 20_000, Grid(2, 6)
    mask = Mask(
        torch.tensor([[3, 7]]).expand(trials, -1), torch.tensor([[11, 0, 1, 2, 4, 5, 6, 8, 9, 10]]).expand(trials, -1)
    )
    split = select_random(mask, 3, torch.rand(trials, grid.n, generator=seeded(0)))
    share = shares(split.kept, 12)
    masked = mask.masked[0].tolist()
    assert (share[masked] - 0.3).abs().max() < 5 * (0.3 * 0.7 / trials) ** 0.5
    chosen = torch.zeros(trials, 12).scatter_(1, split.kept, 1.0)
    both = (chosen.T @ chosen / trials)[masked][:, masked][~torch.eye(10, dtype=torch.bool)]
    want = 3 / 10 * 2 / 9
    assert (both - want).abs().max() < 5 * (want * (1 - want) / trials) ** 0.5


@pytest.mark.parametrize(
    ("start", "kept", "share"), [("visible", 20, 0.3), ("visible", 49, 0.01), ("random", 20, 0.9), ("random", 49, 0.4)]
)
def test_thrown_patches_are_closer_to_decoded_ones_than_at_random(start: str, kept: int, share: float) -> None:
    """The mean distance to the nearest visible or decoded patch, at MAE's mask ratio; 1 is the least there is."""
    grid, images = Grid(14, 14), 64
    mask = random_mask(torch.rand(images, 196, generator=seeded(0)), grid, 0.75)
    noise = torch.rand(images, 196, generator=seeded(1))

    def reach(split: Split) -> Tensor:
        """b t: from every thrown patch."""
        places = torch.stack([torch.arange(196) // 14, torch.arange(196) % 14], 1).double()
        near = torch.cat([split.visible, split.kept], 1)
        return torch.cdist(places[split.thrown], places[near]).amin(2)

    furthest, random = reach(select_furthest(mask, grid, kept, noise, start)), reach(select_random(mask, kept, noise))
    assert furthest.shape == random.shape == (images, 147 - kept)
    assert furthest.mean() - 1 < share * (random.mean() - 1)
    assert furthest.max() <= random.max()
    if start == "visible":
        assert furthest.max() < 1.5  # no thrown patch is without a known one among its eight neighbours
