"""Masking in pixel space: any timm backbone trains."""

import re
from dataclasses import replace

import pytest
import timm
import torch

from leanmim.encoders import make_encoder
from leanmim.encoders.anytimm import AnyTimmEncoder
from leanmim.errors import UserError
from leanmim.factory import build
from leanmim.masking import Grid
from leanmim.recipes import FASTMIM
from tests.families import (
    FAMILIES,
    HIERARCHICAL,
    backbone_of,
    families,
    fast_families,
    fastmim,
    stages_of,
    tokens_of,
    two_steps,
)
from tests.helpers import nothing_masked


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@families
def test_two_steps_train_everything_that_the_features_depend_on(name: str) -> None:
    model = fastmim(name)
    height, width = FAMILIES[name].size
    images = torch.randn(2, 3, height, width)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    assert two_steps(model, images).isfinite().all()
    changed = {key for key, parameter in model.named_parameters() if not torch.equal(parameter, before[key])}
    assert changed == {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    untrained = before.keys() - changed
    fixed = ("pos_embed",) if name.startswith("vit_") else FAMILIES[name].untrained
    assert untrained == {f"encoder.backbone.{key}" for key in fixed}

    (loss,) = model.losses(images)  # not at the start, where residual branches may begin with a zero
    loss.backward()
    assert model.encoder.colour.grad.abs().min() > 0
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.any()) == parameter.requires_grad, key


@fast_families
def test_features_do_not_depend_on_what_is_left_untrained(name: str) -> None:
    if name.startswith("vit_"):
        pytest.skip("a plain ViT's positions are fixed, not unused")
    encoder = fastmim(name).encoder.eval()
    images = torch.randn(1, 3, *FAMILIES[name].size)
    with torch.no_grad():
        before = tokens_of(encoder, images)
        for parameter in encoder.backbone.parameters():
            if not parameter.requires_grad:
                parameter.fill_(torch.nan)
        assert torch.equal(tokens_of(encoder, images), before)


@fast_families
def test_the_backbone_is_timms_own_and_computes_what_timm_computes(name: str) -> None:
    family = FAMILIES[name]
    encoder = fastmim(name).encoder
    arguments = {"img_size": family.size, "window_size": (2, 3)} if name.startswith("swin_") else {}
    if name.startswith(("vit_", "eva", "hiera", "maxvit")):
        arguments = {"img_size": family.size}
    fresh = timm.create_model(name, num_classes=0, **arguments, **family.kwargs)
    assert type(encoder.backbone) is type(fresh)
    assert encoder.backbone.state_dict().keys() == fresh.state_dict().keys()
    fresh.load_state_dict(encoder.backbone.state_dict())
    images = torch.randn(2, 3, *family.size)
    inside = encoder.backbone.eval().forward_features(images)
    assert torch.equal(inside, fresh.eval().forward_features(images))
    assert sum(p.numel() for p in encoder.parameters()) == sum(p.numel() for p in fresh.parameters()) + 3  # the colour


@fast_families
def test_predictions_depend_on_visible_pixels_only(name: str) -> None:
    model = fastmim(name)
    images = torch.randn(2, 3, *FAMILIES[name].size)
    mask = model.draw_mask(images)
    other, stride = images.clone(), model.encoder.stride
    for image, hidden in zip(other, mask.masked.tolist(), strict=True):
        for place in hidden:
            y, x = divmod(place, model.encoder.grid.width)
            image[:, stride * y : stride * (y + 1), stride * x : stride * (x + 1)] = torch.randn(3, stride, stride)
    with torch.no_grad():
        ((ids, before),) = model.predictions(images, [mask])
        ((_, after),) = model.predictions(other, [mask])
        assert torch.equal(ids, mask.masked)
        assert torch.equal(before, after)
        assert (model.target(images) - model.target(other)).abs().sum(-1).gather(1, ids).min() > 0.1
        (loss,) = model.losses(images, [mask])
        (changed,) = model.losses(other, [mask])
        assert loss != changed
        ((_, elsewhere),) = model.predictions(images + 1, [mask])
        assert not torch.equal(before, elsewhere)


@pytest.mark.parametrize("name", HIERARCHICAL)
def test_the_first_stages_give_finer_patches_and_train(name: str) -> None:
    model = fastmim(name, depth=2)
    encoder = model.encoder
    assert (encoder.stride, encoder.grid) == (8, Grid(8, 12))
    whole = backbone_of(name).eval()
    weights = encoder.backbone.state_dict()
    assert set(weights) < set(whole.state_dict())
    whole.load_state_dict(weights, strict=False)
    images = torch.randn(2, 3, 64, 96)
    features = stages_of(whole, 1, images).flatten(2).transpose(1, 2)
    assert torch.allclose(tokens_of(encoder.eval(), images), encoder.norm(features), atol=1e-5)

    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    assert all(parameter.requires_grad for parameter in model.parameters())  # the head went with the other stages
    assert two_steps(model.train(), images).isfinite().all()
    assert not any(torch.equal(parameter, before[key]) for key, parameter in model.named_parameters())


@pytest.mark.parametrize(("depth", "size"), [(None, (96, 128)), (4, (96, 128)), (4, (160, 160))])
def test_features_that_do_not_lie_on_the_image_say_so(depth: int | None, size: tuple[int, int]) -> None:
    """Inception has no padding: its features are no grid of equal patches, whatever their number."""
    with pytest.raises(UserError, match=r"InceptionV3 .*no grid of square patches"):
        build(replace(FASTMIM, model="inception_v3", input_size=size, depth=depth, target="pixels"))


@pytest.mark.parametrize("name", ["inception_v3", "coat_lite_tiny"])
def test_a_size_that_failed_is_not_suggested(name: str) -> None:
    with pytest.raises(UserError, match="another model") as caught:
        build(replace(FASTMIM, model=name, input_size=(96, 128)))
    assert "--input-size 96 128" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "size", "nearest"),
    [
        ("vit_tiny_patch16_224", (70, 64), (64, 64)),
        ("convnext_atto", (100, 80), (96, 64)),
        ("pvt_v2_b0", (100, 80), (96, 64)),
        ("swin_tiny_patch4_window7_224", (100, 80), (96, 64)),
        ("regnety_002", (130, 64), (128, 64)),
        ("levit_128s", (128, 208), (128, 192)),
        ("maxvit_tiny_tf_224", (100, 80), (96, 64)),
        ("hiera_tiny_224", (100, 80), (96, 64)),
    ],
)
def test_a_size_that_patches_do_not_divide_says_one_that_works(
    name: str, size: tuple[int, int], nearest: tuple[int, int]
) -> None:
    with pytest.raises(UserError, match=r"try (--input-size )?\d+") as caught:
        fastmim(name, input_size=size)
    tried = [int(side) for side in re.findall(r"try (?:--input-size )?([\d ]+)", str(caught.value))[0].split()]
    assert (tried[0], tried[-1]) == nearest
    assert make_encoder(backbone_of(name, size=nearest), "pixel", nearest).stride == FAMILIES[name].stride


def test_one_channel_has_one_grey() -> None:
    model = build(
        replace(
            FASTMIM,
            model="test_efficientnet",
            channels=1,
            input_size=(64,),
            decoder_depth=1,
            decoder_width=32,
            decoder_heads=2,
        )
    )
    assert model.encoder.colour.shape == (1,)
    assert isinstance(model.encoder, AnyTimmEncoder)
    images = torch.randn(2, 1, 64, 64)
    mask = nothing_masked(4, 2)
    assert torch.equal(model.encoder.embed(images, mask), images)
    assert two_steps(model, images).isfinite().all()
