"""Masks are partitions of the grid, drawn as in MAE and SimMIM."""

import pytest
import torch

from leanmim.errors import UserError
from leanmim.masking import Grid, Mask, cover, keep_all, mask_units, random_mask, take
from tests.helpers import seeded, whole_squares


def draw(batch: int, grid: Grid, ratio: float, unit: int = 1, seed: int = 0) -> tuple[torch.Tensor, Mask]:
    units = grid.n // unit**2
    noise = torch.rand(batch, units, generator=torch.Generator().manual_seed(seed))
    return noise, random_mask(noise, grid, ratio, unit)


@pytest.mark.parametrize(
    ("grid", "ratio", "unit", "visible"),
    [
        ((14, 14), 0.75, 1, 49),  # MAE
        ((6, 6), 0.6, 1, 14),  # SimMIM's Swin: 22 of 36 are masked
        ((12, 12), 0.6, 2, 56),  # SimMIM's ViT: squares of 32 px
        ((14, 14), 0.9, 1, 19),
        ((2, 5), 0.9, 1, 1),  # 10 * 0.9 is not 9 exactly
        ((10, 10), 0.29, 1, 71),  # 100 * 0.29 is below 29
        ((10, 10), 0.07, 1, 93),  # 100 * 0.07 is above 7
        ((4, 10), 0.5, 1, 20),
        ((4, 10), 0.5, 2, 20),
        ((10, 4), 0.55, 2, 16),
        ((1, 7), 0.5, 1, 3),
        ((2, 2), 0.01, 1, 3),  # rounded up: at least one is masked
    ],
)
def test_a_mask_is_a_partition_of_the_right_counts(
    grid: tuple[int, int], ratio: float, unit: int, visible: int
) -> None:
    grid = Grid(*grid)
    _, mask = draw(5, grid, ratio, unit)
    assert mask.visible.shape == (5, visible) and mask.masked.shape == (5, grid.n - visible)
    for row in torch.cat([mask.visible, mask.masked], 1).tolist():
        assert sorted(row) == list(range(grid.height * grid.width))


@pytest.mark.parametrize("grid", [Grid(4, 4), Grid(3, 8)])
def test_the_patches_of_lowest_noise_are_seen_in_its_order(grid: Grid) -> None:
    noise, mask = draw(6, grid, 0.7)
    for values, visible, masked in zip(noise.tolist(), mask.visible.tolist(), mask.masked.tolist(), strict=True):
        ranked = sorted(range(grid.n), key=values.__getitem__)
        assert visible + masked == ranked


def test_equal_noise_is_told_apart_by_position() -> None:
    mask = random_mask(torch.zeros(2, 16), Grid(4, 4), 0.5)
    assert mask.visible.tolist() == [list(range(8))] * 2


def test_rows_are_masked_independently() -> None:
    noise, mask = draw(8, Grid(6, 6), 0.6)
    assert len({tuple(sorted(row)) for row in mask.visible.tolist()}) == 8
    alone = random_mask(noise[3:4], Grid(6, 6), 0.6)
    assert torch.equal(alone.visible, mask.visible[3:4]) and torch.equal(alone.masked, mask.masked[3:4])


@pytest.mark.parametrize(("grid", "unit"), [(Grid(6, 6), 2), (Grid(4, 10), 2), (Grid(10, 4), 2), (Grid(6, 9), 3)])
def test_units_are_masked_as_whole_squares(grid: Grid, unit: int) -> None:
    noise, mask = draw(5, grid, 0.5, unit)
    for values, visible, masked in zip(noise.tolist(), mask.visible.tolist(), mask.masked.tolist(), strict=True):

        def unit_of(i: int) -> int:
            y, x = divmod(i, grid.width)
            return (y // unit) * (grid.width // unit) + x // unit

        seen, hidden = set(map(unit_of, visible)), set(map(unit_of, masked))
        assert seen.isdisjoint(hidden)
        assert max(values[u] for u in seen) < min(values[u] for u in hidden)


def test_units_are_numbered_row_by_row() -> None:
    assert mask_units(Grid(4, 6), 2).tolist() == [
        [0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11], [12, 13, 18, 19], [14, 15, 20, 21], [16, 17, 22, 23],
    ]  # fmt: skip
    assert mask_units(Grid(2, 3), 1).tolist() == [[0], [1], [2], [3], [4], [5]]


@pytest.mark.parametrize(("grid", "ratio", "unit"), [(Grid(5, 4), 0.75, 1), (Grid(4, 8), 0.5, 2)])
def test_every_patch_is_masked_equally_often(grid: Grid, ratio: float, unit: int) -> None:
    trials = 20_000
    _, mask = draw(trials, grid, ratio, unit)
    share = torch.zeros(grid.n).scatter_add_(0, mask.masked.flatten(), torch.ones(mask.masked.numel())) / trials
    deviation = (ratio * (1 - ratio) / trials) ** 0.5
    assert (share - ratio).abs().max() < 5 * deviation


def test_pairs_of_patches_are_masked_as_without_replacement() -> None:
    trials, grid = 20_000, Grid(3, 4)
    _, mask = draw(trials, grid, 0.75)
    hidden = torch.zeros(trials, 12).scatter_(1, mask.masked, 1.0)
    both = (hidden.T @ hidden / trials)[~torch.eye(12, dtype=torch.bool)]
    want = 9 / 12 * 8 / 11
    assert (both - want).abs().max() < 5 * (want * (1 - want) / trials) ** 0.5


@pytest.mark.parametrize(
    ("grid", "ratio", "unit", "words"),
    [
        (Grid(4, 4), 0.0, 1, ["masks 0 of 16 units", "between 0.0625 and 0.9375"]),
        (Grid(4, 4), 1.0, 1, ["masks 16 of 16 units"]),
        (Grid(4, 4), 0.99, 1, ["masks 16 of 16 units"]),
        (Grid(4, 4), 0.8, 2, ["masks 4 of 4 units", "between 0.25 and 0.75"]),
    ],
)
def test_a_ratio_that_leaves_nothing_is_an_error(grid: Grid, ratio: float, unit: int, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        draw(2, grid, ratio, unit)
    for word in [f"--mask-ratio {ratio}", "--input-size", *words]:
        assert word in str(error.value)


@pytest.mark.parametrize(("low", "high"), [(0.0625, 0.938), (0.25, 0.75)])
def test_the_ratios_the_error_proposes_work(low: float, high: float) -> None:
    grid = Grid(4, 4) if low < 0.1 else Grid(2, 2)
    assert draw(1, grid, low)[1].masked.shape[1] == 1
    assert draw(1, grid, min(high, 1 - 1 / grid.n))[1].visible.shape[1] == 1


@pytest.mark.parametrize(("grid", "unit"), [(Grid(7, 7), 2), (Grid(4, 7), 2), (Grid(7, 4), 2), (Grid(4, 4), 8)])
def test_a_unit_that_does_not_divide_is_an_error(grid: Grid, unit: int) -> None:
    with pytest.raises(UserError) as error:
        random_mask(torch.rand(1, 4), grid, 0.5, unit)
    for word in (f"{unit} x {unit}", f"{grid.height} x {grid.width}", "--mask-unit", "--input-size"):
        assert word in str(error.value)


def test_take_picks_for_each_image_its_own() -> None:
    x = torch.randn(3, 10, 4)
    ids = torch.stack([torch.randperm(10)[:6] for _ in range(3)])
    got = take(x, ids)
    assert got.shape == (3, 6, 4)
    for b in range(3):
        for k in range(6):
            assert torch.equal(got[b, k], x[b, ids[b, k]])
    assert take(x, ids[:, :0]).shape == (3, 0, 4)


def test_take_passes_gradients_to_what_was_picked() -> None:
    x = torch.zeros(1, 4, 2, requires_grad=True)
    take(x, torch.tensor([[3, 1]])).sum().backward()
    assert x.grad.tolist() == [[[0, 0], [1, 1], [0, 0], [1, 1]]]


def test_keep_all_throws_nothing() -> None:
    _, mask = draw(3, Grid(4, 4), 0.75)
    split = keep_all(mask)
    assert torch.equal(split.visible, mask.visible) and torch.equal(split.kept, mask.masked)
    assert split.thrown.shape == (3, 0) and split.thrown.dtype == torch.int64


def test_a_grid_counts_its_patches() -> None:
    assert Grid(14, 14).n == 196 and Grid(3, 5).n == 15


def test_take_follows_the_mask() -> None:
    x = torch.arange(12.0).view(1, 6, 2)
    assert take(x, torch.tensor([[5, 0]])).tolist() == [[[10, 11], [0, 1]]]


@pytest.mark.parametrize("size", [(6, 4), (12, 8), (18, 4), (3, 2), (2, 4), (1, 1), (6, 12)])
def test_cover_against_loops(size: tuple[int, int]) -> None:
    hidden = torch.rand(5, 6, 4, generator=seeded(0)) < 0.7
    hidden[0], hidden[1, :3] = True, True
    pixels = torch.kron(hidden.int(), torch.ones(1, 6, 6, dtype=torch.int)).bool()
    assert torch.equal(cover(hidden, size), whole_squares(pixels, size))
