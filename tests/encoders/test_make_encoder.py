"""Which masking goes with which backbone."""

from dataclasses import replace

import pytest
import torch

from leanmim.encoders import make_encoder
from leanmim.encoders.backbone import create_backbone
from leanmim.errors import UserError
from leanmim.factory import build
from leanmim.masking import Grid, random_mask
from leanmim.recipes import FASTMIM
from tests.families import backbone_of, fastmim, two_steps


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_masked_pixels_are_replaced_by_the_token(name: str) -> None:
    size = (64, 128)
    encoder = make_encoder(create_backbone(name, size, 3), "token", size).eval()
    assert encoder.grid == Grid(size[0] // encoder.stride, size[1] // encoder.stride)
    images = torch.randn(2, 3, *size)
    mask = random_mask(torch.rand(2, encoder.grid.n), encoder.grid, 0.5)
    before = encoder.embed(images, mask)
    stride = encoder.stride
    for image, hidden in zip(images, mask.masked, strict=True):
        for place in hidden.tolist():
            y, x = divmod(place, encoder.grid.width)
            image[:, stride * y : stride * (y + 1), stride * x : stride * (x + 1)] += 1
    assert torch.equal(encoder.embed(images, mask), before)
    images += 1
    assert not torch.equal(encoder.embed(images, mask), before)


@pytest.mark.parametrize(
    ("name", "masking", "message"),
    [
        ("vit_smal_patch16_224", "drop", "vit_small_patch16_224"),
        ("swin_tiny_patch4_window7_224", "drop", "token"),
        ("resnet18", "drop", "ResNet"),
        ("vit_tiny_patch16_224", "drop", "try 96 64"),
    ],
)
def test_what_cannot_be_says_why(name: str, masking: str, message: str) -> None:
    size = (100, 64) if message.startswith("try") else (64, 64)
    with pytest.raises(UserError, match=message):
        make_encoder(create_backbone(name, size, 3), masking, size)


@pytest.mark.parametrize("masking", ["drop", "token"])
@pytest.mark.parametrize("name", ["regnety_002", "convnext_atto", "hiera_tiny_224"])
def test_other_maskings_of_such_backbones_say_what_works(name: str, masking: str) -> None:
    family = type(backbone_of(name)).__name__
    message = rf"--masking {masking} does not work with {family}.*it can do: pixel .*`leanmim pretrain fastmim`"
    with pytest.raises(UserError, match=message):
        fastmim(name, masking=masking)


@pytest.mark.parametrize("masking", ["pixel", "drop"])
@pytest.mark.parametrize("name", ["vit_tiny_r_s16_p8_224", "vitamin_small_224"])
def test_a_vit_on_a_convolutional_stem_trains_or_says_why_not(name: str, masking: str) -> None:
    """timm gives them the class of a plain ViT, but their patches are the stem's."""
    config = replace(FASTMIM, model=name, input_size=(64, 96), masking=masking, target="pixels", decoder_depth=1)
    try:
        model = build(config, create_backbone(name, (64, 96), 3, **({} if "vitamin" in name else {"depth": 1})))
    except UserError:
        return
    images = torch.randn(2, 3, 64, 96)
    assert two_steps(model, images).isfinite().all()
    assert model.target(images).shape[1] == model.encoder.grid.n
