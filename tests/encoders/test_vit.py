"""Plain ViT: what a mask does to its tokens, and what stays timm's."""

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from leanmim.encoders import make_encoder
from leanmim.encoders.backbone import create_backbone
from leanmim.encoders.paint import paint
from leanmim.encoders.segments import cuts
from leanmim.encoders.vit import ViTEncoder
from leanmim.errors import UserError
from leanmim.factory import build
from leanmim.masking import random_mask, take
from leanmim.recipes import FASTMIM
from tests.helpers import KINDS, images_of, in_segments, made, nothing_masked, owners_of

VITS = {
    "vit_tiny_patch16_224": {},
    "vit_small_patch16_224": {"depth": 2},
    "vit_base_patch16_224": {"depth": 1},
    "vit_tiny_patch16_224 patch 4": {"patch_size": 4, "depth": 2},
    "vit_small_patch8_224": {"depth": 1},
    "vit_medium_patch16_reg4_gap_256": {"depth": 2},
    "vit_tiny_patch16_224 registers": {"depth": 2, "reg_tokens": 4},
    "vit_base_patch16_224 gap": {"depth": 1, "class_token": False, "global_pool": "avg"},
    "vit_base_patch16_clip_224": {"depth": 1},
    "deit3_small_patch16_224": {"depth": 2},
}


def encoder_for(name: str, masking: str = "drop", size: tuple[int, int] = (64, 32), **kwargs: object) -> ViTEncoder:
    backbone = create_backbone(name.split(" ")[0], size, 3, **kwargs)
    return make_encoder(backbone, masking, size)


@pytest.mark.parametrize("masking", ["drop", "token"])
@pytest.mark.parametrize("name", VITS)
def test_without_a_mask_a_vit_computes_what_timm_computes(name: str, masking: str) -> None:
    encoder = encoder_for(name, masking, **VITS[name])
    images = torch.randn(2, 3, 64, 32)
    mask = nothing_masked(encoder.grid.n)
    tokens = encoder.read(0, encoder.segment(0, encoder.embed(images, mask)))
    vit = encoder.backbone
    expected = vit.fc_norm(vit.forward_features(images))  # fc_norm is the final norm under average pooling
    if masking == "drop":
        torch.testing.assert_close(
            tokens, expected, atol=2e-5, rtol=1e-4
        )  # the stem as a linear layer, rounded otherwise
    else:
        assert torch.equal(tokens, expected)
    places = encoder.positions(mask)
    assert torch.equal(places[:, encoder.prefix_tokens :], mask.visible)
    assert torch.equal(
        places[0, : encoder.prefix_tokens], torch.arange(encoder.grid.n, encoder.grid.n + encoder.prefix_tokens)
    )


@pytest.mark.parametrize(
    ("name", "norm"),
    [("vit_tiny_patch16_224", False), ("vit_base_patch16_clip_224", False), ("vit_small_patch8_224", True)],
)
def test_visible_patches_are_embedded_as_the_convolution_embeds_all(name: str, norm: bool) -> None:
    """Also without a bias (clip), and with a norm behind it: outputs, gradients; and only their FLOPs are counted."""
    encoder = encoder_for(name, depth=1)
    stem = encoder.backbone.patch_embed
    stem.norm = nn.LayerNorm(encoder.backbone.embed_dim) if norm else stem.norm
    images = torch.randn(2, 3, 64, 32).to(memory_format=torch.channels_last)
    visible = random_mask(torch.rand(2, encoder.grid.n), encoder.grid, 0.75).visible
    found = []
    for embed in (
        lambda: encoder.visible_patches(images, visible),
        lambda: take(encoder.patches(images), visible),
    ):
        stem.zero_grad()
        with FlopCounterMode(display=False) as counter:
            x = embed()
        x.square().sum().backward()
        found.append((x.detach(), [p.grad for p in stem.parameters()], counter.get_total_flops()))
    (x, gradients, flops), (want, wanted, all_flops) = found
    torch.testing.assert_close(x, want, atol=1e-5, rtol=1e-5)
    for own, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(own, other, atol=1e-4, rtol=1e-4)
    assert flops * 4 == all_flops


def test_dropped_tokens_have_no_influence() -> None:
    encoder = encoder_for("vit_tiny_patch16_224", depth=2).eval()
    images = torch.randn(2, 3, 64, 32)
    mask = random_mask(torch.rand(2, encoder.grid.n), encoder.grid, 0.75)
    before = encoder.segment(0, encoder.embed(images, mask))
    assert before.shape[1] == 1 + mask.visible.shape[1]
    for image, hidden in zip(images, mask.masked, strict=True):
        for place in hidden.tolist():
            y, x = divmod(place, encoder.grid.width)
            image[:, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16] = torch.randn(3, 16, 16)
    assert torch.equal(encoder.segment(0, encoder.embed(images, mask)), before)


def test_positions_are_fixed_and_survive_training_mode() -> None:
    encoder = encoder_for("vit_tiny_patch16_224")
    assert not encoder.backbone.pos_embed.requires_grad
    assert not encoder.backbone.pos_embed[:, 0].any()


def test_segments_are_runs_of_blocks_with_norms_of_their_own() -> None:
    backbone = create_backbone("vit_tiny_patch16_224", (32, 32), 3)
    encoder = make_encoder(backbone, "drop", (32, 32), segments=4)
    mask = nothing_masked(4)
    x = encoder.embed(torch.randn(2, 3, 32, 32), mask)
    whole = backbone.blocks(x)
    for i in range(4):
        x = encoder.segment(i, x)
    assert torch.equal(x, whole)
    owners = owners_of(encoder)
    assert owners["backbone.blocks.2.mlp.fc1.weight"] == 0
    assert owners["backbone.blocks.3.mlp.fc1.weight"] == 1
    assert owners["backbone.blocks.11.norm1.weight"] == owners["backbone.norm.weight"] == 3
    assert owners["norms.1.bias"] == 1
    assert owners["backbone.cls_token"] == owners["backbone.patch_embed.proj.weight"] == 0
    with pytest.raises(UserError, match=r"12 blocks do not divide into 5.*\[1, 2, 3, 4, 6, 12\]"):
        cuts(5, 12)


def test_the_backbone_is_timms_own_module() -> None:
    encoder = encoder_for("vit_tiny_patch16_224")
    fresh = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=(64, 32))
    assert type(encoder.backbone) is type(fresh)
    assert encoder.backbone.state_dict().keys() == fresh.state_dict().keys()


def test_initialisation_is_that_of_the_paper() -> None:
    encoder = encoder_for("vit_base_patch16_224", depth=1, size=(224, 224))
    weight = encoder.backbone.blocks[0].mlp.fc1.weight
    bound = (6 / (768 + 3072)) ** 0.5
    assert 0.99 * bound < weight.abs().max() <= bound
    assert not encoder.backbone.blocks[0].mlp.fc1.bias.any()
    stem = encoder.backbone.patch_embed.proj.weight
    assert stem.abs().max() <= (6 / (768 + 3 * 256)) ** 0.5


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


@pytest.mark.parametrize("name", ["vit, drop", "vit, registers, drop"])
def test_segments_see_the_visible_tokens_in_order(name: str) -> None:
    """Blocks that do nothing let the tokens through; positions tell them apart."""
    model, _ = made(KINDS[name])
    encoder, backbone = model.encoder, model.encoder.backbone
    images = images_of(KINDS[name])
    masks = model.draw_masks(images)
    tokens = backbone.patch_embed(images)
    tokens = tokens + backbone.pos_embed[:, -16:]
    backbone.blocks = nn.Sequential(*(nn.Identity() for _ in range(4)))
    entered: list[Tensor] = []
    decoded: list[tuple[Any, ...]] = []
    for block, decoder in zip(backbone.blocks, model.decoders, strict=True):
        block.register_forward_pre_hook(lambda _, arguments: entered.append(arguments[0]))
        decoder.register_forward_pre_hook(lambda _, arguments: decoded.append(arguments))
    list(model.losses(images, masks))
    for i, (mask, x, (read, ids, split, _)) in enumerate(zip(masks, entered, decoded, strict=True)):
        assert x.shape[1] == encoder.prefix_tokens + (8, 6, 4, 3)[i]
        for row in range(2):
            for place, patch in enumerate(mask.visible[row].tolist(), start=encoder.prefix_tokens):
                torch.testing.assert_close(x[row, place], tokens[row, patch], atol=1e-5, rtol=1e-4)
            prefix = range(16, 16 + encoder.prefix_tokens)
            assert ids[row].tolist() == [*prefix, *mask.visible[row].tolist()]
            assert split.kept[row].tolist() == mask.masked[row].tolist()
        assert torch.equal(x[:, : encoder.prefix_tokens], entered[0][:, : encoder.prefix_tokens])
        assert torch.equal(read, encoder.closing_norm(i)(x))


def test_a_vit_without_a_last_norm_closes_its_segments_with_none() -> None:
    config = in_segments(segments=2, mask_ratio=0.5)
    model = build(replace(config, model_kwargs={**config.model_kwargs, "final_norm": False}))
    assert isinstance(model.encoder.closing_norm(0), torch.nn.Identity)
