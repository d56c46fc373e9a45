"""Masking in pixel space: any timm backbone, a colour painted on its input."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
from torch import Tensor, nn

import leanmim
from leanmim.checkpoint import Run, save, write_json
from leanmim.config import Pretrain
from leanmim.encoders import Backbone, TimmEncoder, ViTEncoder, create_backbone, make_encoder, paint
from leanmim.errors import UserError
from leanmim.evaluate.features import embedding
from leanmim.masking import Grid, Mask, random_fine_mask, random_mask
from leanmim.mim import MIM, build
from leanmim.recipes import FASTMIM
from leanmim.step import make_optimizers, update
from leanmim.targets import hog


class Family(NamedTuple):
    """A kind of backbone, made small, and what is known about it."""

    stride: int
    kwargs: dict[str, Any] = {}  # noqa: RUF012
    size: tuple[int, int] = (64, 96)
    cell: int = 8
    layout: str = "NCHW"
    untrained: tuple[str, ...] = ()


SMALL = {"depths": (1, 1, 1, 1)}
HEAD_NORM = ("head.norm.weight", "head.norm.bias")
FAMILIES = {
    "vit_tiny_patch16_224": Family(16, {"embed_dim": 32, "depth": 2, "num_heads": 2}, layout="NLC"),
    "eva02_tiny_patch14_224": Family(
        14, {"depth": 2}, (56, 84), cell=7, layout="NLC", untrained=("fc_norm.weight", "fc_norm.bias")
    ),
    "hiera_tiny_224": Family(
        32, {"embed_dim": 32, "stages": (1, 1, 1, 1)}, (64, 96), layout="NLC", untrained=HEAD_NORM
    ),
    "levit_128s": Family(64, size=(128, 192), layout="NLC"),
    "swin_tiny_patch4_window7_224": Family(32, {"embed_dim": 24, **SMALL}, layout="NHWC"),
    "test_mambaout": Family(
        32, layout="NHWC", untrained=(*HEAD_NORM, "head.pre_logits.fc.weight", "head.pre_logits.fc.bias")
    ),
    "pvt_v2_b0": Family(32, SMALL),
    "convnext_atto": Family(32, SMALL, untrained=HEAD_NORM),
    "maxvit_tiny_tf_224": Family(
        32,
        {"embed_dim": (32, 32, 64, 64), **SMALL},
        untrained=(*HEAD_NORM, "head.pre_logits.fc.weight", "head.pre_logits.fc.bias"),
    ),
    "efficientnet_lite0": Family(32),
    "test_efficientnet": Family(32),
    "regnety_002": Family(32),
    "edgenext_xx_small": Family(32, untrained=HEAD_NORM),
    "mobilevit_xxs": Family(32),
}
families = pytest.mark.parametrize("name", FAMILIES)
fast_families = pytest.mark.parametrize("name", [n for n in FAMILIES if n not in ("efficientnet_lite0", "levit_128s")])
HIERARCHICAL = ["swin_tiny_patch4_window7_224", "pvt_v2_b0", "convnext_atto", "hiera_tiny_224"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def backbone_of(name: str, depth: int | None = None, size: tuple[int, int] | None = None) -> Backbone:
    return create_backbone(name, size or FAMILIES[name].size, 3, depth, **FAMILIES[name].kwargs)


def fastmim(name: str, depth: int | None = None, **changes: Any) -> MIM:
    """FastMIM of a small backbone, with a small decoder."""
    family = FAMILIES[name]
    config = replace(
        FASTMIM,
        **{
            "model": name,
            "depth": depth,
            "input_size": family.size,
            "hog_cell": family.cell,
            "decoder_depth": 1,
            "decoder_width": 32,
            "decoder_heads": 2,
            **changes,
        },
    )
    return build(config, backbone_of(name, depth, config.size))


def two_steps(model: MIM, images: Tensor) -> Tensor:
    """The losses of two steps of AdamW."""
    optimizers = make_optimizers(model, FASTMIM)
    for group in optimizers[0].param_groups:
        group["lr"] = 1e-3
    return torch.cat([update(model, optimizers, [images]) for _ in range(2)])


def nothing_masked(n: int, batch: int = 1) -> Mask:
    ids = torch.arange(n).expand(batch, -1)
    return Mask(ids, ids[:, :0])


def tokens_of(encoder: Any, images: Tensor) -> Tensor:
    """The tokens of unmasked images, prefix tokens left out."""
    mask = nothing_masked(encoder.grid.n, len(images))
    return encoder.read(0, encoder.segment(0, encoder.embed(images, mask)))[:, encoder.prefix :]


def stages_of(backbone: Backbone, index: int, images: Tensor) -> Tensor:
    """The features after a stage, as timm's own code lays them out: b d y x."""
    return backbone.forward_intermediates(images, indices=[index], output_fmt="NCHW", intermediates_only=True)[0]


# Training


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


def test_the_decoder_is_that_of_the_paper() -> None:
    """One layer for a plain ViT, four for a hierarchical backbone, 256 wide, heads of 32."""
    for name, layers in (("vit_tiny_patch16_224", 1), ("convnext_atto", 4), ("swin_tiny_patch4_window7_224", 4)):
        model = fastmim(name, decoder_depth=FASTMIM.decoder_depth, decoder_width=256, decoder_heads=8)
        (decoder,) = model.decoders
        assert len(decoder.layers) == layers
        assert decoder.mask_token is None
    assert (FASTMIM.decoder_depth, FASTMIM.decoder_width, FASTMIM.decoder_heads) == ("auto", 256, 8)
    assert (FASTMIM.masking, FASTMIM.target, FASTMIM.mask_ratio, FASTMIM.size) == ("pixel", "hog", 0.75, (128, 128))


def test_a_model_can_be_built_without_gradients() -> None:
    """As around `leanmim.load_backbone` in an evaluation."""
    with torch.no_grad():
        model = fastmim("convnext_atto")
    trained = {key for key, parameter in model.encoder.backbone.named_parameters() if parameter.requires_grad}
    everything = {key for key, _ in model.encoder.backbone.named_parameters()}
    assert everything - trained == set(HEAD_NORM)


def test_building_teaches_the_running_statistics_nothing() -> None:
    backbone = create_backbone("resnet18", (64, 96), 3)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    make_encoder(backbone, "pixel", (64, 96))
    assert backbone.training
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert all(parameter.grad is None for parameter in backbone.parameters())


# Where the tokens sit


@families
def test_strides_grids_and_widths_are_those_of_the_backbone(name: str) -> None:
    family = FAMILIES[name]
    encoder = make_encoder(backbone_of(name), "pixel", family.size)
    assert encoder.stride == family.stride
    assert encoder.grid == Grid(family.size[0] // family.stride, family.size[1] // family.stride)
    assert encoder.widths == (encoder.backbone.num_features,)
    tokens = tokens_of(encoder.eval(), torch.randn(2, 3, *family.size))
    assert tokens.shape == (2, encoder.grid.n, encoder.backbone.num_features)
    places = encoder.positions(nothing_masked(encoder.grid.n, 2))
    expected = [*range(encoder.grid.n, encoder.grid.n + encoder.prefix), *range(encoder.grid.n)]
    assert places.tolist() == [expected, expected]


def heaviest_patch(encoder: Any, size: tuple[int, int]) -> Tensor:
    """For each token, the patch of the image that it depends on most, by its gradient.

    Gradients are balanced first (Sinkhorn): each token's add up to one, and each patch's too. Else those near the
    middle, which many tokens look at, would lead.
    """
    n, (rows, columns), stride = encoder.grid.n, encoder.grid, encoder.stride
    images = torch.randn(1, 3, *size).repeat(n, 1, 1, 1).requires_grad_()  # one for each token
    tokens = tokens_of(encoder.eval(), images)
    every = torch.arange(n)
    (tokens[every, every] @ torch.randn(tokens.shape[-1])).sum().backward()
    energy = images.grad.double().square().sum(1).view(n, rows, stride, columns, stride).sum((2, 4)).flatten(1)
    energy = energy / energy.sum() + 1e-30
    for _ in range(100):
        energy = energy / energy.sum(0)
        energy = energy / energy.sum(1, keepdim=True)
    return energy.argmax(1)


# Not those whose tokens, at random weights, look at everything alike: for them see the next test
LOCAL = [name for name in FAMILIES if name not in ("efficientnet_lite0", "mobilevit_xxs", "levit_128s")]


@pytest.mark.parametrize("name", LOCAL)
def test_a_token_depends_most_on_the_patch_at_its_position(name: str) -> None:
    encoder = make_encoder(backbone_of(name), "pixel", FAMILIES[name].size)
    positions = encoder.positions(nothing_masked(encoder.grid.n))[0, encoder.prefix :]
    assert torch.equal(heaviest_patch(encoder, FAMILIES[name].size), positions)


@pytest.mark.parametrize("name", HIERARCHICAL)
def test_a_token_of_the_first_stages_depends_most_on_the_patch_at_its_position(name: str) -> None:
    encoder = fastmim(name, depth=3).encoder
    assert encoder.stride == 16
    assert torch.equal(heaviest_patch(encoder, (64, 96)), torch.arange(24))


def test_a_wrong_order_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make_encoder(backbone_of("convnext_atto"), "pixel", (64, 96))
    by_columns = torch.arange(6).view(2, 3).T.flatten()
    read = encoder.read
    monkeypatch.setattr(encoder, "read", lambda i, x: read(i, x)[:, by_columns])
    assert torch.equal(heaviest_patch(encoder, (64, 96)), by_columns)


INTERMEDIATE = [name for name in FAMILIES if "efficientnet" not in name]  # whose last convolution timm leaves out there


@pytest.mark.parametrize("name", INTERMEDIATE)
def test_tokens_are_timms_own_feature_map_read_row_by_row(name: str) -> None:
    encoder = make_encoder(backbone_of(name), "pixel", FAMILIES[name].size).eval()
    images = torch.randn(2, 3, *FAMILIES[name].size)
    last = len(encoder.backbone.feature_info) - 1
    features = stages_of(encoder.backbone, last, images)
    tokens = tokens_of(encoder, images)
    norm = getattr(encoder.backbone, "norm", None)  # timm's intermediates come before it
    if not isinstance(norm, nn.LayerNorm):
        norm = getattr(encoder, "final_norm", nn.Identity())
    for y in range(encoder.grid.height):
        for x in range(encoder.grid.width):
            expected = norm(features[:, :, y, x])
            assert torch.allclose(tokens[:, y * encoder.grid.width + x], expected, rtol=1e-4, atol=1e-5), (y, x)


# What reaches the backbone


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


@pytest.mark.parametrize("finer", [1, 2, 4])
def test_the_image_is_painted_where_it_is_masked_and_nowhere_else(finer: int) -> None:
    grid, side = Grid(2, 3), 32 // finer
    images, colour = torch.randn(3, 3, 64, 96), torch.tensor([1.0, -2.0, 3.0])
    if finer == 1:
        mask = random_mask(torch.rand(3, 6), grid, 0.5)
        squares = [{divmod(place, 3) for place in ids.tolist()} for ids in mask.masked]
    else:
        mask = random_fine_mask(torch.rand(3, 6 * finer**2), grid, 0.5, finer)
        squares = [{(y, x) for y, x in hidden.nonzero().tolist()} for hidden in mask.hidden]
    painted = paint(images, mask, grid, colour)
    for b in range(3):
        assert len(squares[b]) == 3 * finer**2
        for y in range(64):
            for x in range(96):
                expected = colour if (y // side, x // side) in squares[b] else images[b, :, y, x]
                assert torch.equal(painted[b, :, y, x], expected), (b, y, x)


@fast_families
def test_the_backbone_sees_the_painted_image(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What enters its first layer is the image outside the mask and the colour inside."""
    encoder = fastmim(name).encoder
    with torch.no_grad():
        encoder.colour.copy_(torch.tensor([1.0, -2.0, 3.0]))
    images = torch.randn(2, 3, *FAMILIES[name].size)
    mask = random_mask(torch.rand(2, encoder.grid.n), encoder.grid, 0.5)
    seen: list[Tensor] = []
    first = next(module for module in encoder.backbone.modules() if isinstance(module, nn.Conv2d))
    handle = first.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    encoder.segment(0, encoder.embed(images, mask))
    handle.remove()
    expected, stride = images.clone(), encoder.stride
    for image, hidden in zip(expected, mask.masked.tolist(), strict=True):
        for place in hidden:
            y, x = divmod(place, encoder.grid.width)
            image[:, stride * y : stride * (y + 1), stride * x : stride * (x + 1)] = encoder.colour.detach()[
                :, None, None
            ]
    height, width = expected.shape[2:]
    assert torch.equal(seen[0][:, :, :height, :width], expected)  # some models pad on the right and below


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
        ((ids, before),) = model.predictions(images, mask)
        ((_, after),) = model.predictions(other, mask)
        assert torch.equal(ids, mask.masked)
        assert torch.equal(before, after)
        assert (model.target(images) - model.target(other)).abs().sum(-1).gather(1, ids).min() > 0.1
        (loss,) = model.losses(images, mask)
        (changed,) = model.losses(other, mask)
        assert loss != changed
        ((_, elsewhere),) = model.predictions(images + 1, mask)
        assert not torch.equal(before, elsewhere)


# Squares finer than a patch


def test_squares_finer_than_a_patch_hide_what_is_under_them_only() -> None:
    model = fastmim("convnext_atto", mask_unit=16)
    images = torch.randn(2, 3, 64, 96)
    mask = model.draw_mask(images)
    assert mask.masked.tolist() == [list(range(6))] * 2
    assert mask.visible.shape == (2, 0)
    under = mask.hidden.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None]
    with torch.no_grad():
        ((_, before),) = model.predictions(images, mask)
        ((_, after),) = model.predictions(torch.where(under, torch.randn_like(images), images), mask)
        assert torch.equal(before, after)
        ((_, seen),) = model.predictions(torch.where(under, images, torch.randn_like(images)), mask)
        assert not torch.equal(before, seen)


@pytest.mark.parametrize("unit", [8, 16])
@pytest.mark.parametrize("ratio", [0.75, 0.6, 0.37, 0.5])
def test_the_share_of_hidden_squares_is_the_ratio(ratio: float, unit: int) -> None:
    model = fastmim("convnext_atto", mask_unit=unit, mask_ratio=ratio)
    hidden = model.draw_mask(torch.zeros(5, 3, 64, 96)).hidden
    squares = 64 * 96 // unit**2
    assert hidden.shape == (5, 64 // unit, 96 // unit)
    assert hidden.flatten(1).sum(1).tolist() == [math.ceil(ratio * squares)] * 5
    assert len({tuple(each.flatten().tolist()) for each in hidden}) == 5  # every image has its own


def test_hidden_squares_are_everywhere_alike() -> None:
    model = fastmim("convnext_atto", mask_unit=16)
    share = model.draw_mask(torch.zeros(4000, 3, 64, 96)).hidden.float().mean(0)
    assert share.shape == (4, 6)
    assert (share - 0.75).abs().max() < 0.03  # 4 standard deviations of a mean over 4000


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("unit", [8, 16])
def test_the_loss_covers_the_cells_of_hidden_squares_only(unit: int, loss: str) -> None:
    model = fastmim("convnext_atto", mask_unit=unit, loss=loss)
    images = torch.randn(2, 3, 64, 96)
    mask = model.draw_mask(images)
    with torch.no_grad():
        (value,) = model.losses(images, mask)
        ((_, prediction),) = model.predictions(images, mask)
    cells = hog(images, 8)
    errors: list[float] = []
    for b in range(2):
        for y in range(8):
            for x in range(12):
                if mask.hidden[b, y * 8 // unit, x * 8 // unit]:
                    start = 27 * (4 * (y % 4) + x % 4)  # of the cell among the patch's 16
                    predicted = prediction[b, 3 * (y // 4) + x // 4, start : start + 27]
                    errors += (predicted - cells[b, :, y, x]).tolist()
    assert len(errors) == 2 * math.ceil(0.75 * (64 * 96 // unit**2)) * (unit // 8) ** 2 * 27
    assert value.item() == pytest.approx(mean_error(errors, loss), rel=1e-5)


@pytest.mark.parametrize("target", ["pixels", "raw-pixels"])
@pytest.mark.parametrize("unit", [4, 16])
def test_the_loss_covers_the_pixels_of_hidden_squares_only(unit: int, target: str) -> None:
    model = fastmim("convnext_atto", mask_unit=unit, target=target)
    images = torch.randn(2, 3, 64, 96)
    mask = model.draw_mask(images)
    with torch.no_grad():
        (value,) = model.losses(images, mask)
        ((_, prediction),) = model.predictions(images, mask)
    truth = images.clone()
    if target == "pixels":  # each patch by its own mean and variance, what is visible of it included
        for y in range(0, 64, 32):
            for x in range(0, 96, 32):
                patch = images[:, :, y : y + 32, x : x + 32].flatten(1)
                mean, std = patch.mean(1).view(2, 1, 1, 1), (patch.var(1) + 1e-6).sqrt().view(2, 1, 1, 1)
                truth[:, :, y : y + 32, x : x + 32] = (images[:, :, y : y + 32, x : x + 32] - mean) / std
    errors: list[float] = []
    for b in range(2):
        for y in range(64):
            for x in range(96):
                if mask.hidden[b, y // unit, x // unit]:
                    start = 3 * (32 * (y % 32) + x % 32)
                    predicted = prediction[b, 3 * (y // 32) + x // 32, start : start + 3]
                    errors += (predicted - truth[b, :, y, x]).tolist()
    assert value.item() == pytest.approx(mean_error(errors, "l2"), rel=1e-5)


def mean_error(errors: list[float], loss: str) -> float:
    return sum(abs(error) if loss == "l1" else error**2 for error in errors) / len(errors)


def test_squares_of_several_patches_are_masked_as_one() -> None:
    model = fastmim("convnext_atto", depth=2, mask_unit=16)  # of 2 x 2 patches
    assert model.encoder.stride == 8
    mask = model.draw_mask(torch.zeros(2, 3, 64, 96))
    assert mask.hidden is None
    for ids in mask.masked.tolist():
        squares = [(place // 12 // 2, place % 12 // 2) for place in ids]
        assert len(ids) == 4 * 18
        assert all(squares.count(square) == 4 for square in set(squares))


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


# The first layers only


def test_the_first_blocks_of_a_vit_are_run_and_closed_by_its_norm() -> None:
    kwargs = {"embed_dim": 32, "depth": 4, "num_heads": 2, "patch_size": 8}
    whole = create_backbone("vit_tiny_patch16_224", (32, 48), 3, **kwargs).eval()
    config = replace(
        FASTMIM, model="vit_tiny_patch16_224", model_kwargs=kwargs, input_size=(32, 48), depth=2, decoder_depth=1
    )
    encoder = build(config).encoder.eval()
    assert isinstance(encoder, ViTEncoder)
    weights = encoder.backbone.state_dict()
    assert set(weights) == {key for key in whole.state_dict() if not key.startswith(("blocks.2.", "blocks.3."))}
    whole.load_state_dict(weights, strict=False)
    images = torch.randn(2, 3, 32, 48)
    mask = random_mask(torch.rand(2, 24), encoder.grid, 0.75)
    x = whole.patch_embed(paint(images, mask, encoder.grid, encoder.colour))
    x = torch.cat([whole.cls_token.expand(2, -1, -1), x], dim=1) + whole.pos_embed
    expected = whole.norm(whole.blocks[1](whole.blocks[0](x)))
    assert torch.allclose(encoder.read(0, encoder.segment(0, encoder.embed(images, mask))), expected, atol=1e-6)


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


@pytest.mark.parametrize("depth", [0, -1, 5])
@pytest.mark.parametrize(
    ("name", "has"),
    [("convnext_atto", "4 stages"), ("pvt_v2_b0", "4 stages"), ("vit_tiny_patch16_224", "2 blocks")],
)
def test_a_depth_out_of_range_says_what_there_is(name: str, has: str, depth: int) -> None:
    with pytest.raises(UserError, match=f"--depth {depth} is out of range; {name} has {has}"):
        backbone_of(name, depth)


@pytest.mark.parametrize(("name", "layers"), [("vit_tiny_patch16_224", 2), ("swin_tiny_patch4_window7_224", 4)])
def test_all_layers_are_the_whole_model(name: str, layers: int) -> None:
    assert fastmim(name, depth=layers).state_dict().keys() == fastmim(name).state_dict().keys()


def test_some_swin_stages_need_pixel_masking() -> None:
    with pytest.raises(UserError, match=r"--depth with Swin needs --masking pixel"):
        fastmim("swin_tiny_patch4_window7_224", depth=2, masking="token")


# Layouts


def test_channels_last_is_not_taken_for_channels_first() -> None:
    """Where a grid is as wide as the features, as Swin-T's first stage is at 384 px, shapes do not tell."""
    encoder = fastmim("swin_tiny_patch4_window7_224", depth=1, input_size=(96,), hog_cell=4).encoder.eval()
    backbone = encoder.backbone
    images = torch.randn(1, 3, 96, 96)
    features = backbone.forward_features(images)
    assert features.shape == (1, 24, 24, 24)
    assert torch.equal(tokens_of(encoder, images), encoder.norm(features.flatten(1, 2)))
    assert torch.equal(embedding(backbone, "avg")(images), features.mean((1, 2)))


@fast_families
def test_an_embedding_is_the_mean_over_positions(name: str) -> None:
    size = FAMILIES[name].size
    backbone = backbone_of(name).eval()
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        features = backbone.forward_features(images)
        pooled = embedding(backbone, "avg")(images)
    rows, columns = size[0] // FAMILIES[name].stride, size[1] // FAMILIES[name].stride
    total = torch.zeros_like(pooled)
    for y in range(rows):
        for x in range(columns):
            match FAMILIES[name].layout:
                case "NCHW":
                    total += features[:, :, y, x]
                case "NHWC":
                    total += features[:, y, x]
                case "NLC":  # patches come last
                    total += features[:, features.shape[1] - rows * columns + y * columns + x]
    last = getattr(backbone, "fc_norm", nn.Identity())  # some ViTs' own norm comes after pooling
    assert pooled.shape == (2, backbone.num_features)
    assert torch.allclose(pooled, last(total / (rows * columns)), atol=1e-5)


def test_an_embedding_ends_with_the_models_norm_after_pooling() -> None:
    backbone = backbone_of("eva02_tiny_patch14_224").eval()
    nn.init.normal_(backbone.fc_norm.weight)
    images = torch.randn(2, 3, 56, 84)
    expected = backbone.fc_norm(backbone.forward_features(images)[:, 1:].mean(1))
    assert torch.equal(embedding(backbone, "avg")(images), expected)
    assert torch.allclose(embedding(backbone, "timm")(images), expected, atol=1e-6)


def run_of(folder: Path, **changes: Any) -> tuple[MIM, Path]:
    """An untrained FastMIM and its run folder."""
    config = replace(
        FASTMIM, out=str(folder), input_size=(64,), decoder_depth=1, decoder_width=32, decoder_heads=2, **changes
    )
    model = build(config)
    run = Run(folder)
    write_json(run.config, config.to_json())
    state = dict(config=config.to_json(), step=0, mean=[0.5] * 3, std=[0.25] * 3, model=model.state_dict())
    save(run.last, {**state, "stage": 0, "optimizers": []})
    return model, run.folder


@pytest.mark.parametrize(
    ("changes", "layout"),
    [
        ({"model": "test_efficientnet"}, "NCHW"),
        ({"model": "convnext_atto", "depth": 2}, "NLC"),  # with the norm that closed it
        ({"model": "swin_tiny_patch4_window7_224", "model_kwargs": {"embed_dim": 24}}, "NHWC"),
        ({"model": "swin_tiny_patch4_window7_224", "model_kwargs": {"embed_dim": 24}, "depth": 2}, "NLC"),
        ({"model": "hiera_tiny_224", "model_kwargs": {"embed_dim": 16}}, "NLC"),
    ],
)
@pytest.mark.parametrize("size", [None, (96, 64)])
def test_a_loaded_backbone_pools_its_features(
    tmp_path: Path, changes: dict[str, Any], layout: str, size: tuple[int, int] | None
) -> None:
    if "hiera" in changes["model"] and size == (96, 64):
        pytest.skip("Hiera's positions have one size")
    model, folder = run_of(tmp_path / "run", **changes)
    backbone, config, _ = leanmim.load_backbone(folder, size)
    assert not backbone.training
    images = torch.randn(2, 3, *(size or config.size))
    with torch.no_grad():
        features = backbone.forward_features(images)
        if size is None:
            own = model.encoder.eval().backbone.forward_features(images)
            assert torch.equal(features, model.encoder.read(0, own) if "depth" in changes else own)
        over = {"NCHW": (2, 3), "NHWC": (1, 2), "NLC": 1}[layout]
        assert torch.allclose(embedding(backbone, "avg")(images), features.mean(over), atol=1e-6)
    assert json.loads((folder / "config.json").read_text())["masking"] == "pixel"


# What cannot be


class TwoGrids(nn.Module):
    """A backbone whose features are two grids."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 16, 16)

    def forward_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.stem(images), self.stem(images)


def test_features_that_are_several_grids_cannot_be_read() -> None:
    with pytest.raises(UserError, match="TwoGrids cannot be masked in pixel space: its features are not one grid"):
        make_encoder(TwoGrids(), "pixel", (64, 96))


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
    with pytest.raises(UserError, match=r"try (--input-size )?\d+ \d+") as caught:
        fastmim(name, input_size=size)
    height, width = map(int, re.findall(r"try (?:--input-size )?(\d+) (\d+)", str(caught.value))[0])
    assert (height, width) == nearest
    assert make_encoder(backbone_of(name, size=nearest), "pixel", nearest).stride == FAMILIES[name].stride


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


def test_one_channel_has_one_grey(tmp_path: Path) -> None:
    model, _ = run_of(tmp_path / "run", model="test_efficientnet", channels=1)
    assert model.encoder.colour.shape == (1,)
    assert isinstance(model.encoder, TimmEncoder)
    images = torch.randn(2, 1, 64, 64)
    mask = nothing_masked(4, 2)
    assert torch.equal(model.encoder.embed(images, mask), images)
    assert two_steps(model, images).isfinite().all()


def test_the_recipe_is_public() -> None:
    assert leanmim.FASTMIM is FASTMIM
    assert isinstance(FASTMIM, Pretrain)
