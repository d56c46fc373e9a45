"""Layer decay: against the published tables, written out."""

import pytest
import timm
import torch
from torch import nn

from leanmim.classifier.groups import blocks_of, decayed_groups, layer_numbers


def scales(model: nn.Module, decay: float) -> dict[str, float]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: group["lr_scale"] for group in decayed_groups(model, decay) for p in group["params"]}


def undecayed(model: nn.Module) -> set[str]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[p] for group in decayed_groups(model, 0.5) if group.get("weight_decay") == 0.0 for p in group["params"]
    }


def test_vit_b_as_published() -> None:
    """MAE: stem, class token and positions 0.65^13, block i (from 0) 0.65^(12 - i), norm and head 1."""
    model = timm.create_model("vit_base_patch16_224", num_classes=10, global_pool="avg", device="meta")
    found = scales(model, 0.65)
    assert found.keys() == dict(model.named_parameters()).keys()
    table = {
        "cls_token": 13, "pos_embed": 13, "patch_embed": 13, "blocks.0": 12, "blocks.1": 11, "blocks.2": 10, "blocks.3": 9,
        "blocks.4": 8, "blocks.5": 7, "blocks.6": 6, "blocks.7": 5, "blocks.8": 4, "blocks.9": 3, "blocks.10": 2,
        "blocks.11": 1, "fc_norm": 0, "head": 0,
    }  # fmt: skip
    for name, scale in found.items():
        (power,) = [power for part, power in table.items() if name == part or name.startswith(part + ".")]
        assert scale == pytest.approx(0.65**power), name
    vectors = {name for name, p in model.named_parameters() if p.ndim == 1}
    assert undecayed(model) == vectors | {"cls_token", "pos_embed"}


def test_swin_b_as_published() -> None:
    """SimMIM: blocks count over all stages (2, 2, 18, 2); what makes a stage smaller has the layer of the block before it,
    which timm keeps at the front of the next stage.
    """
    model = timm.create_model("swin_base_patch4_window7_224", num_classes=10, device="meta")
    found = scales(model, 0.8)
    assert found.keys() == dict(model.named_parameters()).keys()
    table = {
        "patch_embed": 25,
        "layers.1.downsample": 23,
        "layers.2.downsample": 21,
        "layers.3.downsample": 3,
        "norm": 0,
        "head": 0,
    }
    before = 0
    for stage, blocks in enumerate((2, 2, 18, 2)):
        table |= {f"layers.{stage}.blocks.{block}": 24 - before - block for block in range(blocks)}
        before += blocks
    for name, scale in found.items():
        (power,) = [power for part, power in table.items() if name.startswith(part + ".")]
        assert scale == pytest.approx(0.8**power), name
    tables = {name for name in found if name.endswith("relative_position_bias_table")}
    assert undecayed(model) == {name for name, p in model.named_parameters() if p.ndim == 1} | tables


@pytest.mark.parametrize(
    ("name", "count"),
    [("vit_tiny_patch16_224", 12), ("pvt_v2_b0", 8), ("convnext_atto", 12), ("resnet18", 8), ("hiera_tiny_224", 12),
     ("efficientnet_b0", 16), ("swinv2_tiny_window8_256", 12)],
)  # fmt: skip
def test_every_family_has_layers_in_the_order_of_its_forward_pass(name: str, count: int) -> None:
    model = timm.create_model(name, num_classes=10, device="meta")
    blocks = blocks_of(model)
    assert len(blocks) == count
    numbers, last = layer_numbers(model)
    assert last == count + 1
    assert set(numbers) == set(model.parameters())
    assert sorted(set(numbers.values())) == list(range(count + 2))
    for number, block in enumerate(blocks, start=1):
        assert {numbers[p] for p in block.parameters()} == {number}
    assert (
        numbers[
            next(
                p for n, p in model.named_parameters() if n.endswith(("head.weight", "fc.weight", "classifier.weight"))
            )
        ]
        == last
    )
    assert list(numbers.values()) == sorted(numbers.values())


def test_a_shallower_vit_decays_by_its_own_depth() -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=3, device="meta")
    assert scales(model, 0.5)["patch_embed.proj.weight"] == 0.5**4
    assert scales(model, 0.5)["blocks.2.norm1.weight"] == 0.5


def test_without_decay_all_layers_learn_alike() -> None:
    model = timm.create_model("convnext_atto", num_classes=3)
    assert set(scales(model, 1.0).values()) == {1.0}


def test_frozen_parameters_are_left_out() -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=1)
    model.pos_embed.requires_grad_(False)
    assert "pos_embed" not in scales(model, 0.5)
    assert torch.optim.AdamW(decayed_groups(model, 0.5)).param_groups
