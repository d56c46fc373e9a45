"""What a run says before its first step."""

from dataclasses import replace

import pytest

from leanmim.config import Pretrain
from leanmim.factory import build
from leanmim.recipes import FASTMIM, SIMMIM
from leanmim.train.header import coarse_masks
from tests.helpers import CONVNEXT, SWIN, VIT


@pytest.mark.parametrize(
    ("recipe", "model", "changes", "said"),
    [
        (FASTMIM, CONVNEXT, {"input_size": (64,)}, "2 x 2 squares, so there are few different ones: give a --mask-unit of 16 px or"),
        (FASTMIM, CONVNEXT, {"input_size": (96, 64)}, "3 x 2 squares, so there are few different ones: give a --mask-unit of 16 px or"),
        (FASTMIM, CONVNEXT, {"input_size": (64,), "mask_unit": 16}, ""),
        (FASTMIM, CONVNEXT, {"input_size": (128,)}, ""),
        (SIMMIM, VIT, {"input_size": (64,)}, "2 x 2 squares, so there are few different ones: give a --mask-unit of 8 px or"),
        (SIMMIM, SWIN, {"input_size": (64,)}, "2 x 2 squares, so there are few different ones: give a larger --input-size"),
    ],
)  # fmt: skip
def test_masks_of_few_squares_are_warned_of(
    recipe: Pretrain, model: tuple[str, dict], changes: dict, said: str
) -> None:
    config = replace(recipe, model=model[0], model_kwargs=model[1], **changes)
    warnings = list(coarse_masks(build(config), config))
    assert len(warnings) == bool(said)
    assert said in "".join(warnings)
    for text in warnings:
        assert text.endswith("a larger --input-size")
