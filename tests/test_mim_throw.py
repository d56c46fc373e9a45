"""PR-MIM: a part of the masked patches is decoded, predicted and compared."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from leanmim.config import Pretrain
from leanmim.factory import build
from leanmim.masking import Grid, Mask, Split, keep_all
from leanmim.mim import MIM
from leanmim.recipes import MAE, SIMMIM
from tests.helpers import SELECTIONS, VIT, images_of, owners_of, seeded, small, tokens_of_layers

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
    for got, want in zip(model.draw_splits([mask])[0], keep_all(mask), strict=True):
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
    split = model.draw_splits([mask])[0]
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
    split = model.draw_splits([mask])[0]
    assert torch.equal(torch.get_rng_state(), after)
    for got, want in zip(split, expected(mask, Grid(4, 4), 4, noise), strict=True):
        assert torch.equal(got, want)
    other = model.draw_splits([mask])[0]
    assert not torch.equal(other.kept, split.kept)  # every step draws anew


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
    split = model.draw_splits([mask])[0]
    ((ids, prediction),) = model.predictions(images, [mask], [split])
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
    (loss,) = model.losses(images, [mask])
    torch.manual_seed(1)
    ((ids, prediction),) = model.predictions(images, [mask])
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
        split = model.draw_splits([mask])[0]
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
            (loss,) = model.losses(changed, [mask])
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
    masks = model.draw_masks(images)
    torch.manual_seed(1)
    splits = model.draw_splits(masks)
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
        reached = {name for name, p in model.named_parameters() if p.grad is not None}
        assert loss.isfinite() and {owners_of(model)[name] for name in reached} == {i}
