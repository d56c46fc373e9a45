"""timm's models are made for a size, and cut after some blocks or stages."""

import pytest
import torch

from leanmim.encoders.backbone import create_backbone
from leanmim.errors import UserError
from tests.families import backbone_of, fastmim


@pytest.mark.parametrize(("size", "window"), [((224, 224), 7), ((192, 192), 6), ((128, 128), 4)])
def test_swin_windows_are_those_of_the_papers(size: tuple[int, int], window: int) -> None:
    backbone = create_backbone("swin_tiny_patch4_window7_224", size, 3)
    assert backbone.layers[0].blocks[0].window_size == (window, window)


def test_wrong_model_arguments_are_named() -> None:
    with pytest.raises(UserError, match="dept"):
        create_backbone("vit_tiny_patch16_224", (32, 32), 3, dept=3)


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
