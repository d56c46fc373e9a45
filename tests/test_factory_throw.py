"""PR-MIM: shares that cannot be thrown."""

import math
import re
from typing import Any

import pytest
import torch

from leanmim.errors import UserError
from leanmim.factory import build
from tests.helpers import small


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
    assert least.draw_splits([mask])[0].thrown.shape[1] == 1
    assert 1 <= most.draw_splits([mask])[0].kept.shape[1] <= 1 + math.ceil(0.005 * least.encoder.grid.n)


@pytest.mark.parametrize("throw", [-0.1, -1e-9, 1.001, 2.0, math.nan, math.inf, -math.inf])
def test_a_share_that_is_none_is_an_error(throw: float) -> None:
    with pytest.raises(UserError, match=rf"--throw {throw} is out of range; it is at least 0, at most 1"):
        build(small(throw=throw))


def test_a_negative_number_of_rounds_is_an_error() -> None:
    with pytest.raises(UserError, match=r"--fill -1 is out of range; it is at least 0"):
        build(small(throw=0.5, fill=-1))
