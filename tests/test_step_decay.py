"""Weight decay spares what timm's own rule spares for a backbone, and vectors; nothing by a part of its name."""

from dataclasses import replace
from typing import Any

import pytest
from timm.optim import param_groups_weight_decay
from torch import nn

from leanmim.factory import build
from leanmim.mim import MIM
from leanmim.recipes import FASTMIM
from leanmim.step import no_weight_decay, parameter_groups

# Name, arguments, size; parts of names that must be decayed, and parts that must not
FAMILIES: dict[str, tuple[dict[str, Any], int, tuple[str, ...], tuple[str, ...]]] = {
    "efficientformerv2_s0": (
        {},
        64,
        ("token_mixer.q.conv.weight", "token_mixer.proj.conv.weight"),
        ("attention_biases",),
    ),
    "convformer_s18": (
        {},
        64,
        ("token_mixer.pwconv1.weight", "token_mixer.dwconv.weight", "token_mixer.pwconv2.weight"),
        ("scale1.scale", "norm1.weight"),
    ),
    "cait_xxs24_224": (
        {"embed_dim": 24, "depth": 2, "num_heads": 2},
        64,
        ("blocks_token_only.0.attn.q.weight", "blocks_token_only.0.mlp.fc1.weight"),
        ("cls_token", "pos_embed", "gamma_1"),
    ),
    "swinv2_tiny_window8_256": (
        {"embed_dim": 24},
        64,
        ("attn.qkv.weight",),
        ("logit_scale", "cpb_mlp.0.weight", "q_bias"),
    ),
    "levit_128s": ({}, 128, ("qkv.linear.weight",), ("attention_biases",)),
    "mvitv2_tiny": ({}, 64, ("attn.qkv.weight", "attn.pool_q.weight"), ("rel_pos_h", "rel_pos_w")),
}


def built(name: str) -> MIM:
    arguments, size, _, _ = FAMILIES[name]
    config = replace(
        FASTMIM,
        model=name,
        model_kwargs=arguments,
        input_size=(size,),
        target="pixels",
        decoder_depth=1,
        decoder_width=32,
        decoder_heads=2,
    )
    return build(config)


@pytest.mark.parametrize("name", FAMILIES)
def test_weight_decay_spares_what_timm_spares_and_vectors(name: str) -> None:
    model = built(name)
    backbone, spared = model.encoder.backbone, no_weight_decay(model)
    names = backbone.no_weight_decay() if hasattr(backbone, "no_weight_decay") else set()
    plain, _ = param_groups_weight_decay(backbone, no_weight_decay_list=names)
    assert plain["weight_decay"] == 0
    timms = set(plain["params"])
    assert timms <= spared
    for parameter in spared - timms:
        assert sum(side > 1 for side in parameter.shape) <= 1
    ((decayed, rest),) = parameter_groups(model)
    assert rest["weight_decay"] == 0 and set(rest["params"]) <= spared
    assert not set(decayed["params"]) & spared


@pytest.mark.parametrize("name", FAMILIES)
def test_examples_of_what_is_decayed_and_what_is_not(name: str) -> None:
    _, _, decayed, plain = FAMILIES[name]
    model = built(name)
    spared = no_weight_decay(model)

    def parts(ending: str) -> list[nn.Parameter]:
        return [p for key, p in model.encoder.backbone.named_parameters() if key.endswith(ending)]

    for ending in decayed:
        assert parts(ending) and not set(parts(ending)) & spared, ending
    for ending in plain:
        assert parts(ending) and set(parts(ending)) <= spared, ending
    assert model.encoder.colour in spared
