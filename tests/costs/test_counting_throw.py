"""What partial reconstruction saves."""

from functools import cache

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from leanmim.costs import StepCost, count
from leanmim.decoder import Decoder
from leanmim.masking import Grid, Split
from leanmim.recipes import PR_MIM
from tests.helpers import small

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
            decoder = Decoder(768, 768, prefix_tokens=1, full_grid=False, depth=8, width=512, heads=16, fill=fill)
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
