"""The decoder: every token in its place, thrown patches filled in."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from leanmim.decoder import Decoder, Filling, sincos
from leanmim.masking import Grid, Mask, keep_all, select_random
from tests.helpers import mask_of, seeded


def test_the_decoder_puts_every_token_in_its_place() -> None:
    """One attention-free decoder layer less: with depth 0 the head sees exactly the token of each place."""
    grid = Grid(2, 3)
    decoder = Decoder(4, 5, prefix_tokens=1, full_grid=True, depth=0, width=0, heads=1)
    tokens = torch.randn(1, 7, 4)
    ids = torch.tensor([[6, 3, 1, 0, 2, 5, 4]])  # the class token first, then patches in any order
    mask = Mask(torch.tensor([[3, 0]]), torch.tensor([[1, 2, 5, 4]]))
    places, prediction = decoder(tokens, ids, keep_all(mask), grid)
    assert torch.equal(places, mask.masked)
    assert torch.allclose(prediction, decoder.head(tokens[:, [2, 4, 5, 6]]))


def test_a_decoder_does_not_care_for_the_order_of_visible_tokens() -> None:
    grid = Grid(2, 3)
    torch.manual_seed(0)
    decoder = Decoder(8, 5, prefix_tokens=0, full_grid=False, depth=2, width=16, heads=2)
    tokens, ids, masked = torch.randn(1, 2, 8), torch.tensor([[4, 1]]), torch.tensor([[0, 2, 3, 5]])
    _, one = decoder(tokens, ids, keep_all(Mask(ids, masked)), grid)
    _, two = decoder(tokens.flip(1), ids.flip(1), keep_all(Mask(ids.flip(1), masked)), grid)
    assert torch.allclose(one, two, atol=1e-5)
    _, three = decoder(tokens, ids.flip(1), keep_all(Mask(ids, masked)), grid)
    assert not torch.allclose(one, three, atol=1e-3)


def test_positions_follow_the_formula() -> None:
    """MAE, appendix A.1, written out: columns in the first half of the width, rows in the second."""
    grid, width = Grid(3, 5), 16
    for row in range(grid.height):
        for column in range(grid.width):
            expected = []
            for place in (column, row):
                angles = [place / 10000 ** (j / (width / 4)) for j in range(width // 4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            assert sincos(grid, width)[row * grid.width + column].tolist() == pytest.approx(expected, abs=1e-7)


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
    decoder = Decoder(d, 7, prefix_tokens=1, full_grid=full_grid, depth=depth, width=16, heads=2, fill=2)
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
