"""Swin with a learned token."""

import pytest
import torch

from leanmim.encoders import make_encoder
from leanmim.encoders.backbone import create_backbone
from leanmim.errors import UserError
from leanmim.masking import Mask
from tests.families import fastmim
from tests.helpers import nothing_masked


def test_an_unmasked_swin_computes_what_timm_computes() -> None:
    size = (64, 64)
    backbone = create_backbone("swin_tiny_patch4_window7_224", size, 3)
    encoder = make_encoder(backbone, "token", size).eval()
    images = torch.randn(2, 3, *size)
    tokens = encoder.read(0, encoder.segment(0, encoder.embed(images, nothing_masked(4))))
    assert torch.equal(tokens, backbone.forward_features(images).flatten(1, 2))
    assert torch.allclose(tokens.mean(1), backbone(images), atol=1e-6)


def test_the_stem_grid_is_the_output_grid_zoomed() -> None:
    size = (64, 128)
    encoder = make_encoder(create_backbone("swin_tiny_patch4_window7_224", size, 3), "token", size)
    with torch.no_grad():
        encoder.mask_token.fill_(7.0)
    mask = Mask(torch.arange(1, 8)[None], torch.tensor([[0]]))
    hidden = (encoder.embed(torch.randn(1, 3, *size), mask) == 7).all(-1)
    expected = torch.zeros(1, 16, 32, dtype=torch.bool)
    expected[:, :8, :8] = True
    assert torch.equal(hidden, expected)


def test_some_swin_stages_need_pixel_masking() -> None:
    with pytest.raises(UserError, match=r"--depth with Swin needs --masking pixel"):
        fastmim("swin_tiny_patch4_window7_224", depth=2, masking="token")
