"""Partial reconstruction goes with every encoder, target and size."""

from dataclasses import replace

import pytest
import torch

from leanmim.factory import build
from leanmim.recipes import FASTMIM, SIMMIM
from tests.helpers import CONVNEXT, SWIN, images_of, small

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
    (loss,) = model.losses(images, [mask])
    torch.manual_seed(1)
    ((ids, prediction),) = model.predictions(images, [mask])
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
