"""How a mask reaches a backbone, and what stays timm's."""

import pytest
import timm
import torch

from leanmim.encoders import ViTEncoder, create_backbone, cuts, make_encoder
from leanmim.errors import UserError
from leanmim.masking import Grid, Mask, random_mask, take

NAMES = {
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


def build(name: str, masking: str = "drop", size: tuple[int, int] = (64, 32), **kwargs: object) -> ViTEncoder:
    backbone = create_backbone(name.split(" ")[0], size, 3, **kwargs)
    return make_encoder(backbone, masking, size)


def nothing_masked(n: int, batch: int = 2) -> Mask:
    ids = torch.arange(n).expand(batch, -1)
    return Mask(ids, ids[:, :0])


@pytest.mark.parametrize("masking", ["drop", "token"])
@pytest.mark.parametrize("name", NAMES)
def test_without_a_mask_a_vit_computes_what_timm_computes(name: str, masking: str) -> None:
    encoder = build(name, masking, **NAMES[name])
    images = torch.randn(2, 3, 64, 32)
    mask = nothing_masked(encoder.grid.n)
    tokens = encoder.read(0, encoder.segment(0, encoder.embed(images, mask)))
    vit = encoder.backbone
    expected = vit.fc_norm(vit.forward_features(images))  # fc_norm is the final norm under average pooling
    assert torch.equal(tokens, expected)
    places = encoder.positions(mask)
    assert torch.equal(places[:, encoder.prefix :], mask.visible)
    assert torch.equal(places[0, : encoder.prefix], torch.arange(encoder.grid.n, encoder.grid.n + encoder.prefix))


def test_dropped_tokens_have_no_influence() -> None:
    encoder = build("vit_tiny_patch16_224", depth=2).eval()
    images = torch.randn(2, 3, 64, 32)
    mask = random_mask(torch.rand(2, encoder.grid.n), encoder.grid, 0.75)
    before = encoder.segment(0, encoder.embed(images, mask))
    assert before.shape[1] == 1 + mask.visible.shape[1]
    for image, hidden in zip(images, mask.masked, strict=True):
        for place in hidden.tolist():
            y, x = divmod(place, encoder.grid.width)
            image[:, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16] = torch.randn(3, 16, 16)
    assert torch.equal(encoder.segment(0, encoder.embed(images, mask)), before)


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


def test_an_unmasked_swin_computes_what_timm_computes() -> None:
    size = (64, 64)
    backbone = create_backbone("swin_tiny_patch4_window7_224", size, 3)
    encoder = make_encoder(backbone, "token", size).eval()
    images = torch.randn(2, 3, *size)
    tokens = encoder.read(0, encoder.segment(0, encoder.embed(images, nothing_masked(4))))
    assert torch.equal(tokens, backbone.forward_features(images).flatten(1, 2))
    assert torch.allclose(tokens.mean(1), backbone(images), atol=1e-6)


@pytest.mark.parametrize(("size", "window"), [((224, 224), 7), ((192, 192), 6), ((128, 128), 4)])
def test_swin_windows_are_those_of_the_papers(size: tuple[int, int], window: int) -> None:
    backbone = create_backbone("swin_tiny_patch4_window7_224", size, 3)
    assert backbone.layers[0].blocks[0].window_size == (window, window)


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


def test_positions_are_fixed_and_survive_training_mode() -> None:
    encoder = build("vit_tiny_patch16_224")
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
    owners = {name: encoder.owner(name) for name, _ in encoder.named_parameters()}
    assert owners["backbone.blocks.2.mlp.fc1.weight"] == 0
    assert owners["backbone.blocks.3.mlp.fc1.weight"] == 1
    assert owners["backbone.blocks.11.norm1.weight"] == owners["backbone.norm.weight"] == 3
    assert owners["norms.1.bias"] == 1
    assert owners["backbone.cls_token"] == owners["backbone.patch_embed.proj.weight"] == 0
    with pytest.raises(UserError, match=r"12 blocks do not divide into 5.*\[1, 2, 3, 4, 6, 12\]"):
        cuts(5, 12)


def test_the_backbone_is_timms_own_module() -> None:
    encoder = build("vit_tiny_patch16_224")
    fresh = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=(64, 32))
    assert type(encoder.backbone) is type(fresh)
    assert encoder.backbone.state_dict().keys() == fresh.state_dict().keys()


def test_initialisation_is_that_of_the_paper() -> None:
    encoder = build("vit_base_patch16_224", depth=1, size=(224, 224))
    weight = encoder.backbone.blocks[0].mlp.fc1.weight
    bound = (6 / (768 + 3072)) ** 0.5
    assert 0.99 * bound < weight.abs().max() <= bound
    assert not encoder.backbone.blocks[0].mlp.fc1.bias.any()
    stem = encoder.backbone.patch_embed.proj.weight
    assert stem.abs().max() <= (6 / (768 + 3 * 256)) ** 0.5


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


def test_wrong_model_arguments_are_named() -> None:
    with pytest.raises(UserError, match="dept"):
        create_backbone("vit_tiny_patch16_224", (32, 32), 3, dept=3)


def test_take_follows_the_mask() -> None:
    x = torch.arange(12.0).view(1, 6, 2)
    assert take(x, torch.tensor([[5, 0]])).tolist() == [[[10, 11], [0, 1]]]
