"""PR-MIM: which masked patches are decoded, how the others are filled in, and what that does to loss and cost."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from leanmim.checkpoint import Run
from leanmim.config import Pretrain
from leanmim.cost import StepCost, count
from leanmim.decoder import Decoder, Filling, sincos
from leanmim.errors import UserError
from leanmim.masking import (
    Grid,
    Mask,
    Split,
    distances,
    keep_all,
    random_fine_mask,
    random_mask,
    select_furthest,
    select_random,
)
from leanmim.mim import MIM, build
from leanmim.recipes import FASTMIM, FASTMIM_P, MAE, PR_MIM, RECIPES, SIMMIM
from leanmim.schedule import stages
from leanmim.step import make_optimizers
from leanmim.train import at_next_size, pretrain

GRIDS = [Grid(4, 4), Grid(3, 7), Grid(6, 2), Grid(1, 9), Grid(8, 1), Grid(5, 6)]
STARTS = ["visible", "random"]
VIT = ("vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2})
SWIN = ("swin_tiny_patch4_window7_224", {"embed_dim": 24})
CONVNEXT = ("convnext_atto", {})


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mask_of(batch: int, grid: Grid, visible: int, seed: int = 0) -> Mask:
    """Any number of visible patches, none included, in any order."""
    ids = torch.rand(batch, grid.n, generator=seeded(seed)).argsort(1)
    return Mask(ids[:, :visible], ids[:, visible:])


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


# Furthest sampling, against brute force.


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

SELECTIONS: dict[str, Callable[[Mask, Grid, int, Tensor], Split]] = {
    "visible": lambda mask, grid, kept, noise: select_furthest(mask, grid, kept, noise, "visible"),
    "random start": lambda mask, grid, kept, noise: select_furthest(mask, grid, kept, noise, "random"),
    "random": lambda mask, grid, kept, noise: select_random(mask, kept, noise),
}


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


# The split that a model draws.


def small(recipe: Pretrain = MAE, backbone: tuple[str, dict[str, Any]] = VIT, **changes: Any) -> Pretrain:
    """A recipe at its smallest: 32 px are 16 patches of 8, four of which are visible."""
    model, arguments = backbone
    own: dict[str, Any] = dict(
        model=model,
        model_kwargs=arguments,
        input_size=(32,),
        mask_unit=0,
        decoder_depth=recipe.decoder_depth and 1,
        decoder_width=32,
        decoder_heads=2,
        hog_cell=4,
        batch_size=2,
        precision="fp32",
    )
    return replace(recipe, **{**own, **changes})


def images_of(config: Pretrain, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, config.channels, *config.size, generator=seeded(seed))


@pytest.mark.parametrize(
    ("size", "patch", "throw", "thrown"),
    [
        ((224,), 16, 0.5, 98),  # PR-MIM: half of all 196, two thirds of the masked ones
        ((80,), 8, 0.29, 29),  # 100 * 0.29 is below 29
        ((80,), 8, 0.07, 7),  # 100 * 0.07 is above 7
        ((80,), 8, 0.295, 29),  # rounded down: what is kept is rounded up
        ((32, 56), 8, 0.5, 14),
        ((16, 56), 8, 0.3, 4),
    ],
)
def test_the_throwing_ratio_is_a_share_of_all_patches(
    size: tuple[int, ...], patch: int, throw: float, thrown: int
) -> None:
    arguments = {**VIT[1], "patch_size": patch}
    model = build(small(backbone=(VIT[0], arguments), input_size=size, throw=throw))
    mask = model.draw_mask(torch.zeros(3, 3, *model.encoder.backbone.patch_embed.img_size))
    split = model.draw_split(mask)
    assert split.thrown.shape == (3, thrown)
    assert split.kept.shape == (3, mask.masked.shape[1] - thrown)
    assert torch.equal(split.visible, mask.visible)


@pytest.mark.parametrize(
    ("select", "start", "expected"),
    [
        ("furthest", "visible", SELECTIONS["visible"]),
        ("furthest", "random", SELECTIONS["random start"]),
        ("random", "visible", SELECTIONS["random"]),
        ("random", "random", SELECTIONS["random"]),
    ],
)
def test_a_model_selects_as_it_is_told(
    select: str, start: str, expected: Callable[[Mask, Grid, int, Tensor], Split]
) -> None:
    model = build(small(throw=0.5, select=select, select_start=start))
    mask = model.draw_mask(torch.zeros(8, 3, 32, 32))
    torch.manual_seed(5)
    noise = torch.rand(8, 16)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    split = model.draw_split(mask)
    assert torch.equal(torch.get_rng_state(), after)
    for got, want in zip(split, expected(mask, Grid(4, 4), 4, noise), strict=True):
        assert torch.equal(got, want)
    other = model.draw_split(mask)
    assert not torch.equal(other.kept, split.kept)  # every step draws anew


def test_the_recipe_is_mae_with_half_of_all_thrown_and_filled() -> None:
    assert replace(MAE, recipe="pr-mim", throw=0.5) == PR_MIM == RECIPES["pr-mim"]
    assert (PR_MIM.select, PR_MIM.select_start) == ("furthest", "visible")
    assert PR_MIM.fill >= 1
    assert all(
        recipe.throw == 0 for name, recipe in RECIPES.items() if name in ("mae", "simmim", "fastmim", "fastmim-p")
    )


# Filling, against a slow version.


def affine(layer: torch.nn.Linear, x: np.ndarray) -> np.ndarray:
    return layer.weight.detach().double().numpy() @ x + layer.bias.detach().double().numpy()


def slow_filling(module: Filling, tokens: np.ndarray, empty: np.ndarray, heads: int) -> np.ndarray:
    """One image: every thrown patch by itself asks one known token after another."""
    channels = module.query.out_features // heads
    known, filled = list(tokens), list(empty)
    for _ in range(module.rounds):
        keys, values = ([affine(layer, token) for token in known] for layer in (module.key, module.value))
        told = []
        for question in [affine(module.query, token) for token in filled]:
            answer = np.zeros(len(question))
            for at in (slice(i * channels, (i + 1) * channels) for i in range(heads)):
                scores = np.array([question[at] @ key[at] / channels**0.5 for key in keys])
                weights = np.exp(scores - scores.max())
                answer[at] = sum(w * value[at] for w, value in zip(weights / weights.sum(), values, strict=True))
            told.append(answer)
        filled = [old + affine(module.out, answer) for old, answer in zip(empty, told, strict=True)]
        known = [*tokens, *filled]
    return np.stack(filled)


def random_filling(width: int, rounds: int, sizes: tuple[int, int, int]) -> tuple[Filling, Tensor, Tensor]:
    """In float64, with tokens of so many images, known and thrown places; numbers for which no softmax saturates."""
    generator, (batch, known, thrown) = seeded(rounds), sizes
    module = Filling(width, rounds).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
    tokens, empty = (torch.randn(batch, n, width, generator=generator).double() for n in (known, thrown))
    return module, tokens, empty


@pytest.mark.parametrize("rounds", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("width", "heads"), [(4, 1), (16, 1), (64, 1), (256, 1), (384, 1), (512, 2), (768, 3), (800, 1)]
)
def test_filling_agrees_with_loops_over_patches(width: int, heads: int, rounds: int) -> None:
    """It is as wide as an eighth, in heads of 32 channels where that divides."""
    for sizes in ((1, 1, 1), (2, 1, 5), (3, 4, 1), (2, 9, 6)):
        module, tokens, empty = random_filling(width, rounds, sizes)
        assert module.query.out_features == module.value.out_features == max(1, width // 8) and module.heads == heads
        for got, *image in zip(module(tokens, empty).detach(), tokens.numpy(), empty.numpy(), strict=True):
            np.testing.assert_allclose(got.numpy(), slow_filling(module, *image, heads), rtol=0, atol=1e-12)


def test_one_known_token_is_the_answer_to_every_question() -> None:
    module, tokens, empty = random_filling(512, 1, (2, 1, 7))
    answer = module.out(module.value(tokens))
    torch.testing.assert_close(module(tokens, empty) - empty, answer.expand_as(empty), rtol=0, atol=1e-12)


def test_neither_the_order_of_known_tokens_nor_other_images_matter() -> None:
    module, tokens, empty = random_filling(512, 3, (4, 9, 7))
    filled = module(tokens, empty)
    for same in (
        module(tokens[:, torch.randperm(9, generator=seeded(0))], empty),
        torch.cat([module(tokens[row : row + 1], empty[row : row + 1]) for row in range(4)]),
    ):
        torch.testing.assert_close(same, filled, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_thrown_patches_know_each_other_from_the_second_round_on(rounds: int) -> None:
    module, tokens, empty = random_filling(64, rounds, (2, 5, 4))
    other = empty.clone()
    other[:, 0] += 1
    change = (module(tokens, other) - module(tokens, empty))[:, 1:].abs().amax(2)
    assert (change < 1e-12).all() if rounds == 1 else (change > 1e-6).all()


@pytest.mark.parametrize("rounds", [1, 2])
def test_gradients_reach_weights_and_tokens(rounds: int) -> None:
    module, tokens, empty = random_filling(64, rounds, (2, 5, 4))
    weights = torch.randn(2, 4, 64, generator=seeded(0)).double()
    (module(tokens.requires_grad_(), empty.requires_grad_()) * weights).sum().backward()
    for name, parameter in module.named_parameters():
        without = name == "key.bias"  # it adds the same to all scores
        assert (parameter.grad.abs().max() > 1e-12) != without, name
    assert tokens.grad.any(2).all()
    assert (empty.grad - weights).any(2).all()  # as questions too, not only as what is added to


@pytest.mark.parametrize(("depth", "full_grid"), [(1, False), (2, False), (0, True), (1, True)])
def test_a_decoder_fills_from_what_its_layers_return(depth: int, full_grid: bool) -> None:
    """Thrown places hold the mask token and their position (or the encoder's own token) and what is filled in.

    All that the layers return is known, the prefix token too.
    """
    grid, d, e = Grid(3, 5), 12, 16 if depth else 12
    torch.manual_seed(0)
    decoder = Decoder(d, 7, prefix=1, full_grid=full_grid, depth=depth, width=16, heads=2, fill=2)
    assert not any(layer.bias.any() for layer in decoder.filling.children())  # MAE's initialisation
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    mask = mask_of(2, grid, 4)
    split = select_random(mask, 5, torch.rand(2, 15))
    seen = torch.arange(15).expand(2, -1) if full_grid else mask.visible
    ids = torch.cat([torch.full((2, 1), 15), seen], 1)
    tokens = torch.randn(2, ids.shape[1], d)
    returned: list[Tensor] = []
    decoder.layers.register_forward_hook(lambda _, arguments, out: returned.append(out))
    with torch.no_grad():
        places, prediction = decoder(tokens, ids, split, grid)
        (x,) = returned
        assert x.shape == (2, 4 + 5 + 1, e)
        assert torch.equal(places, torch.cat([split.kept, split.thrown], 1))
        torch.testing.assert_close(prediction[:, :5], decoder.head(decoder.norm(x[:, 4:9])))
        for row, thrown in enumerate(split.thrown):
            if full_grid:
                empty = decoder.embed(tokens[row, 1:])[thrown]
            else:
                empty = decoder.mask_token[0] + sincos(grid, e)[thrown]
            filled = slow_filling(decoder.filling, x[row].double().numpy(), empty.double().numpy(), heads=1)
            want = decoder.head(decoder.norm(torch.from_numpy(filled).float()))
            torch.testing.assert_close(prediction[row, 5:], want, atol=1e-4, rtol=1e-4)


# Nothing thrown is the full method.


def step_of(config: Pretrain, seed: int = 0) -> tuple[MIM, float, Tensor]:
    """The model after backward, its loss, and the state of the generator."""
    torch.manual_seed(seed)
    model = build(config)
    (loss,) = model.losses(images_of(config))
    loss.backward()
    return model, loss.item(), torch.get_rng_state()


@pytest.mark.parametrize("fill", [0, 2])
@pytest.mark.parametrize(("select", "start"), [("furthest", "visible"), ("furthest", "random"), ("random", "visible")])
@pytest.mark.parametrize("recipe", [MAE, SIMMIM], ids=["mae", "simmim"])
def test_nothing_thrown_is_the_full_method_bit_for_bit(recipe: Pretrain, select: str, start: str, fill: int) -> None:
    plain, loss, state = step_of(small(recipe))
    model, same, after = step_of(small(recipe, throw=0.0, select=select, select_start=start, fill=fill))
    assert all(decoder.filling is None for decoder in model.decoders)
    assert loss == same
    assert torch.equal(state, after)
    own, other = dict(plain.named_parameters()), dict(model.named_parameters())
    assert own.keys() == other.keys()
    for name, parameter in own.items():
        assert torch.equal(parameter, other[name]), name
        assert (parameter.grad is None) == (other[name].grad is None), name
        assert parameter.grad is None or torch.equal(parameter.grad, other[name].grad), name


def test_nothing_thrown_takes_no_random_numbers_beside_the_masks() -> None:
    config = small()
    model = build(config)
    torch.manual_seed(3)
    torch.rand(2, 16)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    list(model.losses(images_of(config)))
    assert torch.equal(torch.get_rng_state(), state)
    mask = model.draw_mask(torch.zeros(2, 3, 32, 32))
    for got, want in zip(model.draw_split(mask), keep_all(mask), strict=True):
        assert torch.equal(got, want)


def test_throwing_without_filling_changes_no_parameter() -> None:
    """What is thrown only matters in a step, so that runs can be compared from the same start."""
    torch.manual_seed(0)
    plain = build(small())
    torch.manual_seed(0)
    thrown = build(small(throw=0.5, fill=0))
    assert plain.state_dict().keys() == thrown.state_dict().keys()
    assert all(torch.equal(value, thrown.state_dict()[name]) for name, value in plain.state_dict().items())


# What is decoded, predicted and compared.


def tokens_of_layers(model: MIM) -> list[int]:
    """How many tokens each decoder layer is given, written down as the model runs."""
    seen: list[int] = []
    for decoder in model.decoders:
        for layer in decoder.layers:
            layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape[1]))
    return seen


@pytest.mark.parametrize("fill", [0, 2])
@pytest.mark.parametrize("select", ["furthest", "random"])
@pytest.mark.parametrize(("recipe", "registers"), [(MAE, 0), (MAE, 3), (SIMMIM, 0)])
def test_layers_see_visible_kept_and_prefix_tokens(recipe: Pretrain, registers: int, select: str, fill: int) -> None:
    backbone = (VIT[0], {**VIT[1], "reg_tokens": registers})
    config = small(recipe, backbone, decoder_depth=2, throw=0.375, select=select, fill=fill, mask_ratio=0.75)
    model = build(config)
    seen = tokens_of_layers(model)
    images = images_of(config)
    mask = model.draw_mask(images)
    split = model.draw_split(mask)
    ((ids, prediction),) = model.predictions(images, mask, split)
    assert split.thrown.shape == (2, 6)
    assert seen == [4 + 6 + 1 + registers] * 2
    assert prediction.shape == (2, 12 if fill else 6, 192) and prediction.dtype == torch.float32
    if fill:
        assert torch.equal(ids.sort(1)[0], mask.masked.sort(1)[0])
        assert torch.equal(ids[:, :6], split.kept)
    else:
        assert torch.equal(ids, split.kept)


def by_hand(target: Tensor, ids: Tensor, prediction: Tensor, power: int) -> float:
    """The mean over all values of |error| ** power, one image and one patch after another, in float64."""
    target, prediction = target.double(), prediction.detach().double()
    total, values = 0.0, 0
    for row in range(len(ids)):
        for place, patch in zip(ids[row].tolist(), prediction[row], strict=True):
            total += ((patch - target[row, place]).abs() ** power).sum().item()
            values += patch.numel()
    return total / values


@pytest.mark.parametrize("fill", [0, 2])
@pytest.mark.parametrize("select", ["furthest", "random"])
@pytest.mark.parametrize(("recipe", "power"), [(MAE, 2), (SIMMIM, 1)])
def test_the_loss_is_the_mean_error_over_the_predicted_patches(
    recipe: Pretrain, power: int, select: str, fill: int
) -> None:
    config = small(recipe, throw=0.25, select=select, fill=fill)
    model = build(config)
    images = images_of(config)
    patches = images.view(2, 3, 4, 8, 4, 8).permute(0, 2, 4, 3, 5, 1).reshape(2, 16, 192).double()
    if config.target == "pixels":
        patches = (patches - patches.mean(2, keepdim=True)) / (patches.var(2, keepdim=True) + 1e-6).sqrt()
    mask = model.draw_mask(images)
    torch.manual_seed(1)
    (loss,) = model.losses(images, mask)
    torch.manual_seed(1)
    ((ids, prediction),) = model.predictions(images, mask)
    assert ids.shape[1] == mask.masked.shape[1] - (0 if fill else 4)
    assert loss.item() == pytest.approx(by_hand(patches, ids, prediction, power), rel=1e-5)


def test_thrown_patches_count_only_if_they_are_filled() -> None:
    """The pixels of dropped patches are in the target alone."""
    losses = {}
    for fill in (0, 2):
        config = small(throw=0.5, fill=fill)
        torch.manual_seed(0)
        model = build(config)
        images = images_of(config)
        mask = model.draw_mask(images)
        torch.manual_seed(1)
        split = model.draw_split(mask)
        for what in ("nothing", "visible", "kept", "thrown"):
            changed = images.clone()
            if what != "nothing":
                for row, ids in enumerate(getattr(split, what).tolist()):
                    for y, x in (divmod(place, 4) for place in ids):
                        changed[row, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8] = torch.randn(
                            3, 8, 8, generator=seeded(9)
                        )
            model.zero_grad()
            torch.manual_seed(1)
            (loss,) = model.losses(changed, mask)
            loss.backward()
            gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            losses[fill, what] = loss.item(), gradient
    for fill in (0, 2):
        loss, gradient = losses[fill, "nothing"]
        for what in ("visible", "kept", "thrown"):
            other, changed = losses[fill, what]
            same = (fill, what) == (0, "thrown")
            assert (loss == other) == same and torch.equal(gradient, changed) == same, (fill, what)


def test_every_segment_decodes_a_share_of_what_is_masked_for_it() -> None:
    """With nested masks later segments have more masked patches; as many are thrown, so more are decoded."""
    model = build(small(segments=2, mask_ratio=(0.75, 0.8125), throw=0.5))
    seen, images = tokens_of_layers(model), torch.randn(3, 3, 32, 32)
    masks = model.nest(model.draw_mask(images))
    torch.manual_seed(1)
    splits = [model.draw_split(mask) for mask in masks]
    assert [split.kept.shape[1] for split in splits] == [4, 5]
    torch.manual_seed(1)
    predictions = list(model.predictions(images, masks))
    for (ids, _), mask, split in zip(predictions, masks, splits, strict=True):
        assert torch.equal(ids.sort(1)[0], mask.masked.sort(1)[0])
        assert torch.equal(ids[:, : split.kept.shape[1]], split.kept)
    assert seen == [16 - 8 + 1] * 2
    for i, loss in enumerate(model.losses(images, masks)):
        model.zero_grad()
        loss.backward()
        owners = {model.owner(name) for name, p in model.named_parameters() if p.grad is not None}
        assert loss.isfinite() and owners == {i}


# It goes with every encoder, target and size.

WITH = {
    "mae": small(),
    "mae, wide, hog": small(input_size=(32, 56), target="hog"),
    "mae, deep": small(decoder_depth=2, loss="l1"),
    "simmim": small(SIMMIM),
    "simmim, layers": small(SIMMIM, decoder_depth=1, mask_unit=16),
    "simmim, tall, hog": small(SIMMIM, input_size=(48, 32), target="hog"),
    "simmim, swin": small(SIMMIM, SWIN, input_size=(64, 96), mask_ratio=0.75),
    "simmim, swin, layers": small(SIMMIM, SWIN, input_size=(96, 64), mask_ratio=0.75, decoder_depth=1),
    "fastmim": small(FASTMIM),
    "fastmim, wide, pixels": small(FASTMIM, input_size=(32, 48), target="pixels"),
    "fastmim, swin": small(FASTMIM, SWIN, input_size=(64, 96)),
    "fastmim, convnext": small(FASTMIM, CONVNEXT, input_size=(64, 96)),
    "fastmim, convnext, fine": small(FASTMIM, CONVNEXT, input_size=(96, 64), mask_unit=16, target="raw-pixels"),
    "fastmim, convnext, linear": small(FASTMIM, CONVNEXT, input_size=(64, 96), decoder_depth=0),
}


@pytest.mark.parametrize("fill", [0, 2])
@pytest.mark.parametrize("name", WITH)
def test_losses_and_gradients_are_finite(name: str, fill: int) -> None:
    config = replace(WITH[name], throw=0.4, fill=fill, select="random" if fill == 0 else "furthest")
    torch.manual_seed(0)
    model = build(config)
    (loss,) = model.losses(images_of(config))
    loss.backward()
    assert loss.isfinite() and loss > 0
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key
            assert "filling" not in key or key.endswith("key.bias") or parameter.grad.any(), key
    assert (model.decoders[0].filling is not None) == bool(fill)


@pytest.mark.parametrize("name", ["mae", "simmim", "simmim, layers", "fastmim, convnext"])
def test_half_precision_agrees_with_full(name: str) -> None:
    config = replace(WITH[name], throw=0.4, fill=2)
    torch.manual_seed(0)
    model = build(config)
    images, losses = images_of(config), []
    for autocast in (None, torch.bfloat16):
        model.autocast = autocast
        torch.manual_seed(1)
        (loss,) = model.losses(images)
        assert loss.dtype == torch.float32
        loss.backward()
        losses.append(loss.item())
        assert [prediction.dtype for _, prediction in model.predictions(images)] == [torch.float32]
    assert 0 < abs(losses[0] - losses[1]) < 0.05 * losses[0]


@pytest.mark.parametrize("fill", [0, 2])
def test_with_a_mask_finer_than_patches_only_hidden_squares_count(fill: int) -> None:
    """Of a patch of 32 px, squares of 16 px are masked: no patch is visible, and the error is weighted."""
    config = replace(WITH["fastmim, convnext, fine"], throw=0.5, fill=fill)
    model = build(config)
    images = images_of(config)
    mask = model.draw_mask(images)
    assert mask.visible.shape == (2, 0) and mask.hidden.shape == (2, 6, 4)
    torch.manual_seed(1)
    (loss,) = model.losses(images, mask)
    torch.manual_seed(1)
    ((ids, prediction),) = model.predictions(images, mask)
    assert ids.shape == (2, 6 if fill else 3)
    total = values = 0.0
    for row in range(2):
        for place, patch in zip(ids[row].tolist(), prediction[row].detach().double(), strict=True):
            y, x = divmod(place, 2)
            truth = images[row, :, 32 * y : 32 * y + 32, 32 * x : 32 * x + 32].permute(1, 2, 0).double()
            hidden = mask.hidden[row].repeat_interleave(16, 0).repeat_interleave(16, 1)
            hidden = hidden[32 * y : 32 * y + 32, 32 * x : 32 * x + 32]
            error = (patch.view(32, 32, 3) - truth)[hidden]
            total, values = total + (error**2).sum().item(), values + error.numel()
    assert loss.item() == pytest.approx(total / values, rel=1e-5)


def test_a_loss_is_a_number_even_if_nothing_of_the_kept_patches_is_hidden() -> None:
    """One square of 16 px of eight is masked and one patch of two is decoded, sometimes the other one."""
    config = small(
        FASTMIM, CONVNEXT, input_size=(32, 64), mask_unit=16, mask_ratio=0.1, target="raw-pixels", throw=0.5, fill=0
    )
    model = build(config)
    torch.manual_seed(0)
    for _ in range(8):
        (loss,) = model.losses(images_of(config, batch=1))
        assert loss.isfinite()


def growing(tiny: Pretrain, **changes: Any) -> Pretrain:
    """FastMIM-P in two stages of 16 and 36 patches."""
    config = small(
        FASTMIM_P,
        **{key: getattr(tiny, key) for key in ("data", "out", "workers", "device", "log_every")},
        epochs=2,
        batch_size=8,
        stage_scales=(1.0, 1.5),
        stage_starts=(0.0, 0.5),
        throw=0.5,
    )
    return replace(config, **changes)


def test_stages_throw_the_same_share(tiny: Pretrain) -> None:
    pretrain(growing(tiny))
    lines = [json.loads(line) for line in Run(Path(tiny.out)).metrics.read_text().splitlines()]
    assert len(lines) == 4
    assert all(math.isfinite(line["loss"]) for line in lines)


def test_the_next_stage_keeps_what_filling_has_learned(tiny: Pretrain) -> None:
    first, second = (stage.config for stage in stages(growing(tiny)))
    model = build(first)
    optimizers = make_optimizers(model, first)
    (loss,) = model.losses(images_of(first))
    loss.backward()
    optimizers[0].step()
    larger, fresh = at_next_size(model, optimizers, second, torch.device("cpu"))
    learned = {name: value for name, value in model.named_parameters() if "filling" in name}
    assert len(learned) == 8
    for name, parameter in larger.named_parameters():
        if name in learned:
            assert torch.equal(parameter, learned[name])
            assert torch.equal(fresh[0].state[parameter]["exp_avg"], optimizers[0].state[learned[name]]["exp_avg"])
    mask = larger.draw_mask(images_of(second))
    assert larger.draw_split(mask).thrown.shape == (2, 18)


# What cannot be.


@pytest.mark.parametrize(
    ("changes", "throw", "words"),
    [
        ({}, 0.75, ["is 12 of all 16 patches", "12 are masked"]),  # nothing left to decode
        ({}, 0.9, ["is 14 of all 16 patches", "12 are masked"]),
        ({}, 1.0, ["is 16 of all 16 patches"]),
        ({}, 0.001, ["is 0 of all 16 patches"]),  # nothing thrown although asked for
        ({}, 0.06, ["is 0 of all 16 patches"]),
        ({"mask_ratio": 0.25}, 0.5, ["is 8 of all 16 patches", "4 are masked"]),
        ({"input_size": (32, 56)}, 0.8, ["of all 28 patches"]),
        ({"input_size": (64,)}, 0.75, ["of all 64 patches"]),
        ({"input_size": (112,)}, 0.001, ["of all 196 patches"]),
        ({"input_size": (384,)}, 0.75, ["is 1728 of all 2304 patches"]),
    ],
)
def test_a_share_that_leaves_nothing_is_an_error(changes: dict[str, Any], throw: float, words: list[str]) -> None:
    """The message proposes a range, and its ends work."""
    with pytest.raises(UserError) as error:
        build(small(throw=throw, **changes))
    for word in [f"--throw {throw}", "choose it between", *words]:
        assert word in str(error.value)
    low, high = map(float, re.search(r"between (\S+) and ([^\s,;]+)", str(error.value)).groups())
    least, most = (build(small(throw=share, **changes)) for share in (low, high))
    size = small(**changes).size
    mask = least.draw_mask(torch.zeros(1, 3, *size))
    assert least.draw_split(mask).thrown.shape[1] == 1
    assert 1 <= most.draw_split(mask).kept.shape[1] <= 1 + math.ceil(0.005 * least.encoder.grid.n)


@pytest.mark.parametrize("throw", [-0.1, -1e-9, 1.001, 2.0, math.nan, math.inf, -math.inf])
def test_a_share_that_is_none_is_an_error(throw: float) -> None:
    with pytest.raises(UserError, match=rf"--throw {throw} is out of range; it is at least 0, at most 1"):
        build(small(throw=throw))


def test_a_negative_number_of_rounds_is_an_error() -> None:
    with pytest.raises(UserError, match=r"--fill -1 is out of range; it is at least 0"):
        build(small(throw=0.5, fill=-1))


def test_a_stage_that_cannot_throw_is_an_error_before_training(tiny: Pretrain) -> None:
    """32 px are 16 patches; half the size is 4, of which 1 is visible, and 0.2 of 4 is less than one."""
    config = growing(tiny, stage_scales=(0.5, 1.0), throw=0.2)
    with pytest.raises(UserError, match=r"--throw 0\.2 is 0 of all 4 patches"):
        pretrain(config)
    assert not Path(tiny.out).exists()


# What it saves.

N, V, M, T, D, E, P, LAYERS = 64, 16, 48, 32, 32, 64, 192, 2


@cache
def cost_of(throw: float, fill: int) -> tuple[StepCost, dict[str, int]]:
    """The cost, and the forward FLOPs by part."""
    config = small(input_size=(64,), decoder_depth=LAYERS, decoder_width=E, decoder_heads=4, throw=throw, fill=fill)
    cost, flops = count(config)
    return cost, flops["forward"]


def layers(tokens: int, width: int, depth: int) -> int:
    """Multiply-adds of transformer layers: 12 e^2 a token and 2 e for every pair of tokens."""
    return depth * (12 * tokens * width**2 + 2 * tokens**2 * width)


def decoder_macs(tokens: int, predicted: int) -> int:
    """Of the visible tokens' embedding, the layers on so many tokens, and the head; the class token counts too."""
    return (V + 1) * D * E + layers(tokens, E, LAYERS) + predicted * E * P


def test_flops_are_those_of_fewer_tokens() -> None:
    (full, all_), (plain, fewer), (filled, extra) = cost_of(0.0, 2), cost_of(0.5, 0), cost_of(0.5, 2)
    assert [cost.decoder_tokens for cost in (full, plain, filled)] == [N + 1, N - T + 1, N - T + 1]
    assert all_["decoder"] == 2 * decoder_macs(N + 1, M)
    assert fewer["decoder"] == 2 * decoder_macs(N - T + 1, M - T)
    thin, filling = E // 8, 0
    for known in (N - T + 1, N + 1):  # in the second round, all are known
        filling += (2 * T + 2 * known) * E * thin + 2 * T * known * thin
    assert extra["decoder"] == 2 * (decoder_macs(N - T + 1, M) + filling)
    assert all_["encoder"] == fewer["encoder"] == extra["encoder"]


def test_less_is_saved_for_backward() -> None:
    full, plain, filled = (cost_of(throw, fill)[0].saved_bytes for throw, fill in ((0.0, 2), (0.5, 0), (0.5, 2)))
    least = 2 * LAYERS * T * (2 * 4 * E) * 4  # of 2 images, what each layer's MLP keeps for a thrown token, at least
    assert plain < full - least
    assert plain < 0.65 * full
    assert plain < filled < 0.8 * full


def test_half_thrown_makes_a_vit_b_28_percent_cheaper() -> None:
    """The paper: forward, against MAE, whose decoder predicts all 196 patches. Filling stays under 0.05 GMAC."""
    grid, macs = Grid(14, 14), []
    for thrown, fill in ((0, 0), (98, 0), (98, PR_MIM.fill)):
        with torch.device("meta"):
            decoder = Decoder(768, 768, prefix=1, full_grid=False, depth=8, width=512, heads=16, fill=fill)
            split = Split(*(torch.zeros(1, size, dtype=torch.int64) for size in (49, 147 - thrown, thrown)))
            ids, tokens = torch.zeros(1, 50, dtype=torch.int64), torch.zeros(1, 50, 768)
            with FlopCounterMode(display=False) as counter:
                decoder(tokens, ids, split, grid)
        macs.append(counter.get_total_flops() / 2)
    full, plain, filled = macs
    head = 512 * 768
    assert 0 < filled - plain - 98 * head < 0.05e9
    encoder = 196 * 768 * 768 + layers(50, 768, 12)
    assert 1 - (encoder + plain + 49 * head) / (encoder + full + 49 * head) == pytest.approx(0.28, abs=0.005)
    assert 1 - (encoder + filled) / (encoder + full + 49 * head) > 0.27
