"""timm's models are made for a size, and cut after some blocks or stages."""

import pytest
import torch

from leanmim.encoders.backbone import create_backbone, nearest_models
from leanmim.errors import UserError
from tests.families import backbone_of, fastmim


@pytest.mark.parametrize(("size", "window"), [((224, 224), 7), ((192, 192), 6), ((128, 128), 4)])
def test_swin_windows_are_those_of_the_papers(size: tuple[int, int], window: int) -> None:
    backbone = create_backbone("swin_tiny_patch4_window7_224", size, 3)
    assert backbone.layers[0].blocks[0].window_size == (window, window)


@pytest.mark.parametrize(
    ("name", "key", "value", "reason"),
    [
        ("vit_tiny_patch16_224", "dept", 3, "unexpected keyword argument 'dept'"),
        ("vit_tiny_patch16_224", "patch_size", "x", "unsupported operand"),
        ("vit_tiny_patch16_224", "patch_size", 0, "by zero"),
        ("vit_tiny_patch16_224", "norm_layer", "foo", "foo"),
        ("vit_tiny_patch16_224", "depth", 2.5, "float"),
        ("swin_tiny_patch4_window7_224", "patch_size", "x", "unsupported operand"),
    ],
)
def test_a_wrong_model_argument_is_named_with_its_value(name: str, key: str, value: object, reason: str) -> None:
    with pytest.raises(UserError, match=f"timm cannot build {name} with --model-kwargs {key} {value}: .*{reason}"):
        create_backbone(name, (32, 32), 3, **{key: value})


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("vit_tiny_patch16", "vit_tiny_patch16_224"),
        ("vit_tiny", "vit_tiny_patch16_224"),
        ("ViT-tiny-patch16-224", "vit_tiny_patch16_224"),
        ("timm/vit_tiny_patch16_224.augreg_in21k", "vit_tiny_patch16_224"),
        ("swin_tiny", "swin_tiny_patch4_window7_224"),
        ("resnet", "resnet18"),
    ],
)
def test_the_nearest_models_begin_with_the_plain_one(wrong: str, right: str) -> None:
    assert nearest_models(wrong)[0] == right
    with pytest.raises(UserError, match=f"timm has no model '{wrong}'; nearest: {right}, "):
        create_backbone(wrong, (32, 32), 3)


def test_a_vit_of_which_the_edge_would_be_cut_off_is_refused() -> None:
    with pytest.raises(UserError, match="--input-size 100 is not divided by the model's patch of 16 px; try 96"):
        create_backbone("vit_tiny_patch16_224", (100, 100), 3)
    with pytest.raises(UserError, match="--input-size 32 40 is not divided by the model's patch of 16 px; try 32"):
        create_backbone("vit_tiny_patch16_224", (32, 40), 3)
    assert create_backbone("vit_tiny_patch16_224", (32, 48), 3, depth=1).patch_embed.grid_size == (2, 3)


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


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_a_cut_vit_still_pools_its_features(pool: str) -> None:
    shape = {"patch_size": 8, "embed_dim": 32, "num_heads": 2, "global_pool": pool, "class_token": pool == "token"}
    whole = create_backbone("vit_tiny_patch16_224", (32, 32), 3, depth=2, **shape)
    cut = create_backbone("vit_tiny_patch16_224", (32, 32), 3, 2, depth=4, **shape)
    cut.load_state_dict(whole.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert whole(images).shape == (2, 32)
    assert torch.equal(cut(images), whole(images))
