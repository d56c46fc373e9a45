"""The method: losses and gradients."""

import pytest
import torch

from leanmim.config import Pretrain
from leanmim.decoder import Decoder
from leanmim.encoders import make_encoder
from leanmim.encoders.backbone import create_backbone
from leanmim.factory import build
from leanmim.masking import random_mask, take
from leanmim.mim import MIM
from leanmim.targets import Pixels
from tests.helpers import owners_of


def cut(count: int) -> MIM:
    backbone = create_backbone("vit_tiny_patch16_224", (32, 32), 3, patch_size=8, embed_dim=32, depth=4, num_heads=2)
    encoder = make_encoder(backbone, "drop", (32, 32), segments=count)
    target = Pixels(8)
    decoders = [
        Decoder(32, target.width, prefix_tokens=1, full_grid=False, depth=1, width=32, heads=2) for _ in encoder.widths
    ]
    return MIM(encoder, decoders, target, mask_ratios=(0.75,) * count)


def test_the_loss_covers_masked_patches_only(tiny: Pretrain) -> None:
    model = build(tiny)
    images = torch.randn(2, 3, 32, 32)
    mask = model.draw_mask(images)
    (loss,) = model.losses(images, [mask])
    ((ids, prediction),) = model.predictions(images, [mask])
    target = take(model.target(images), mask.masked)
    assert torch.equal(ids, mask.masked)
    assert torch.equal(loss, ((prediction - target) ** 2).mean())


def test_simmim_is_one_linear_layer_and_absolute_error(tiny_simmim: Pretrain) -> None:
    model = build(tiny_simmim)
    images = torch.randn(2, 3, 64, 64)
    mask = model.draw_mask(images)
    (loss,) = model.losses(images, [mask])
    encoder, head = model.encoder, model.decoders[0].head
    tokens = encoder.read(0, encoder.segment(0, encoder.embed(images, mask)))[:, 1:]
    raw = images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).reshape(2, 64, -1)
    expected = (take(head(tokens), mask.masked) - take(raw, mask.masked)).abs().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert mask.masked.shape[1] == 4 * 10  # 16 squares of 16 px at ratio 0.6, rounded up, of 4 patches each


def test_no_gradient_crosses_a_segment_border() -> None:
    model = cut(2)
    owners = owners_of(model)
    losses = model.losses(torch.randn(2, 3, 32, 32))
    next(losses).backward()
    first = {n for n, p in model.named_parameters() if p.grad is not None}
    assert {owners[name] for name in first} == {0}
    model.zero_grad()
    next(losses).backward()
    second = {n for n, p in model.named_parameters() if p.grad is not None}
    assert {owners[name] for name in second} == {1}
    assert first | second == {n for n, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(StopIteration):
        next(losses)


def test_block_wise_gradients_are_autograds_on_the_detached_graph() -> None:
    model = cut(4)
    images = torch.randn(2, 3, 32, 32)
    masks = model.draw_masks(images)
    for loss in model.losses(images, masks):
        loss.backward()
    one_at_a_time = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    sum(model.losses(images, masks)).backward()  # all graphs alive at once: detach alone cuts them
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, one_at_a_time[name]), name


def test_targets_and_losses_are_float32_under_autocast(tiny: Pretrain) -> None:
    model = build(tiny)
    model.autocast = torch.bfloat16
    images = torch.randn(2, 3, 32, 32)
    mask = model.draw_mask(images)
    for loss in model.losses(images, [mask]):
        assert loss.dtype == torch.float32
        assert not torch.is_autocast_enabled("cpu")  # or it would leak into the caller's backward
        loss.backward()
    model.autocast = None
    (exact,) = model.losses(images, [mask])
    assert 0 < abs(exact.item() - loss.item()) < 0.05


def test_masks_follow_torchs_seed(tiny: Pretrain) -> None:
    model = build(tiny)
    images = torch.randn(3, 3, 32, 32)
    torch.manual_seed(1)
    one = model.draw_mask(images)
    torch.manual_seed(1)
    two = model.draw_mask(images)
    assert torch.equal(one.visible, two.visible)
    assert not torch.equal(one.visible[0].sort()[0], one.visible[1].sort()[0])  # every image has its own


def test_random_mask_is_what_the_model_uses(tiny: Pretrain) -> None:
    model = build(tiny)
    noise = torch.rand(2, 16)
    mask = random_mask(noise, model.encoder.grid, tiny.mask_ratio)
    assert mask.visible.shape == (2, 4)
