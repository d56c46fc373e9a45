"""A recipe becomes a model, or an error says what can be."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from leanmim.config import Pretrain
from leanmim.errors import UserError
from leanmim.factory import build
from leanmim.recipes import BIM, FASTMIM
from tests.families import fastmim
from tests.helpers import PLAIN, in_segments


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def test_the_decoder_is_that_of_the_paper() -> None:
    """One layer for a plain ViT, four for a hierarchical backbone; its width is tested with that of other recipes."""
    for name, layers in (("vit_tiny_patch16_224", 1), ("convnext_atto", 4), ("swin_tiny_patch4_window7_224", 4)):
        model = fastmim(name, decoder_depth=FASTMIM.decoder_depth, decoder_width=256, decoder_heads=8)
        (decoder,) = model.decoders
        assert len(decoder.layers) == layers
        assert decoder.mask_token is None
    assert (FASTMIM.decoder_depth, FASTMIM.decoder_width, FASTMIM.decoder_heads) == ("auto", "auto", "auto")
    assert (FASTMIM.masking, FASTMIM.target, FASTMIM.mask_ratio, FASTMIM.size) == ("pixel", "hog", 0.75, (128, 128))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_unit": 12}, r"--mask-unit 12 must divide .* 32 px .*possible: \[8, 16, 32\]"),
        ({"mask_unit": 4}, r"--mask-unit 4 .* multiple of .* 8 px; possible: \[8, 16, 32\]"),
        ({"mask_unit": 8, "hog_cell": 16}, r"--mask-unit 8 .* multiple of .* 16 px; possible: \[16, 32\]"),
        ({"mask_unit": 12, "target": "pixels"}, r"--mask-unit 12 must divide .*possible: \[1, 2, 4, 8, 16, 32\]"),
        ({"mask_unit": 48}, r"--mask-unit 48 is not a multiple .* 32 px; try 64"),
        ({"mask_unit": 64}, r"does not divide the grid of 2 x 3"),
        ({"hog_cell": 12}, r"--hog-cell 12 does not divide .* 32 px; possible: \[2, 4, 8, 16, 32\]"),
        ({"mask_unit": 16, "mask_ratio": 0.99}, r"--mask-ratio 0.99 masks 24 of 24 units"),
    ],
)
def test_mask_units_that_cannot_be_say_what_can(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fastmim("convnext_atto", **changes)


def test_the_mask_unit_must_fit(tiny_simmim: Pretrain) -> None:
    with pytest.raises(UserError, match=r"--mask-unit 12 is not a multiple.*try 16"):
        build(replace(tiny_simmim, mask_unit=12))
    with pytest.raises(UserError, match="does not divide the grid of 5 x 5"):
        build(replace(tiny_simmim, input_size=(40,))).draw_mask(torch.zeros(1, 3, 40, 40))


# Segments.


def test_ratios_that_fall() -> None:
    with pytest.raises(UserError, match=r"--mask-ratio 0\.5 0\.75 0\.7 0\.8 falls.*stay or rise"):
        build(in_segments(mask_ratio=(0.5, 0.75, 0.7, 0.8)))
    build(in_segments(mask_ratio=(0.5, 0.7, 0.75, 0.8)))


@pytest.mark.parametrize("ratios", [(0.5,) * 3, (0.5,) * 5])
def test_another_number_of_ratios_than_of_segments(ratios: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match=f"--mask-ratio gives {len(ratios)} numbers for 4 segments; give one"):
        build(in_segments(mask_ratio=ratios))
    assert build(in_segments(mask_ratio=ratios[:1])).mask_ratios == (0.5,) * 4


def test_two_ratios_are_the_ends_of_equal_steps() -> None:
    assert build(in_segments(mask_ratio=(0.5, 0.8))).mask_ratios == (0.5, 0.6, 0.7, 0.8)
    assert build(in_segments(segments=2, mask_ratio=(0.5, 0.8))).mask_ratios == (0.5, 0.8)
    for segments in (2, 3, 4, 6, 12):  # the recipe's own go with all
        ratios = build(replace(BIM, model_kwargs=PLAIN | {"depth": 12}, segments=segments)).mask_ratios
        assert len(ratios) == segments and ratios[0] == 0.72 and ratios[-1] == 0.78
    assert build(replace(BIM, model_kwargs=PLAIN)).mask_ratios == (0.72, 0.74, 0.76, 0.78)
    with pytest.raises(UserError, match="2 numbers for 1 segments"):
        build(in_segments(segments=1, mask_ratio=(0.5, 0.6)))


def test_no_ratio_at_all() -> None:
    with pytest.raises(UserError, match=r"--mask-ratio takes one number, one for each segment, or"):
        build(in_segments(mask_ratio=()))


@pytest.mark.parametrize("masking", ["drop", "token", "pixel"])
def test_a_later_segment_that_would_see_nothing(masking: str) -> None:
    with pytest.raises(UserError, match=r"--mask-ratio 0\.97 masks 16 of 16 units; choose it between") as error:
        build(in_segments(masking=masking, mask_ratio=(0.5, 0.6, 0.7, 0.97)))
    low, high = map(float, re.findall(r"between ([\d.]+) and ([\d.]+)", str(error.value))[0])
    build(in_segments(masking=masking, mask_ratio=(low, 0.6, 0.7, high)))


def test_offload_with_and_without_segments() -> None:
    for segments in (1, (1,), 2):
        build(in_segments(segments=segments, mask_ratio=0.5, offload=True))
    build(in_segments(segments=1, mask_ratio=0.5))
