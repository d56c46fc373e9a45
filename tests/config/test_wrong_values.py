"""Every field of every configuration refuses what it cannot be: by its type when it is made, by its range when it is checked."""

import math
from dataclasses import MISSING, fields, replace
from typing import Any, Literal, get_origin

import pytest

import leanmim
from leanmim.cli import COMMANDS
from leanmim.config import Pretrain
from leanmim.config.base import RANGES, Config, check_model
from leanmim.errors import UserError
from tests.wrong_lines import flat

KINDS = [row.config for row in COMMANDS.values()]
ALL = [(kind, own) for kind in KINDS for own in fields(kind)]


def made(kind: Any, **changes: Any) -> Config:
    needed = {own.name: "x.npy" for own in fields(kind) if own.default is MISSING and own.default_factory is MISSING}
    return kind(**{"start": "s", **needed, **changes} if "start" in needed else needed | changes)


@pytest.mark.parametrize(("kind", "own"), ALL, ids=lambda value: getattr(value, "name", getattr(value, "__name__", "")))
def test_what_a_field_refuses(kind: Any, own: Any) -> None:
    kinds = flat(own.type)
    of_words = [one for one in kinds if get_origin(one) is Literal]
    for wrong in (object(), b"bytes", *(["fp16", "pixel", "near", "no", "mydata"] if str not in kinds else [])):
        with pytest.raises(UserError, match=rf"^{own.name} cannot be "):
            made(kind, **{own.name: wrong})
    if bool in kinds and not of_words and str not in kinds:
        with pytest.raises(UserError, match=f"^{own.name} cannot be 1"):
            made(kind, **{own.name: 1})
    if own.name in RANGES:
        low, high = RANGES[own.name]
        beyond = (
            [math.ceil(low) - 1, math.floor(high) + 1, 10**23]
            if int in kinds
            else [math.nan, math.inf, -math.inf, 1e39, low - 1.0]
        )
        for number in beyond:
            pair = tuple[float, float] in kinds
            with pytest.raises(UserError, match=f"--{own.name.replace('_', '-')} .*is out of range; it is at least "):
                made(kind, **{own.name: (number, number) if pair else number}).check()
    if str in kinds and own.name not in (*kind.LEFT_EMPTY, "model_kwargs"):
        with pytest.raises(UserError, match="names nothing"):
            made(kind, **{own.name: ""}).check()


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_has_a_range(kind: Any) -> None:
    numbers = {own.name for own in fields(kind) if flat(own.type) & {int, float}}
    assert numbers - RANGES.keys() <= {"mean", "std", "model_kwargs"}


def test_every_range_is_of_some_field() -> None:
    assert RANGES.keys() <= {own.name for _, own in ALL}


@pytest.mark.parametrize(
    "wrong",
    [{"precision": "fp16"}, {"select": "near"}, {"statistics": "mydata"}, {"overwrite": "no"}, {"epochs": "ten"}],
)
def test_a_command_by_name_refuses_them_too(wrong: dict[str, Any], tiny: Pretrain) -> None:
    with pytest.raises(UserError, match=f"{next(iter(wrong))} cannot be"):
        leanmim.pretrain(tiny, **wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"target": "pixel"}, "no --target 'pixel'"), ({"masking": "drops"}, "no --masking 'drops'")],
)
def test_names_that_others_may_add_are_refused_where_nobody_has(
    wrong: dict[str, Any], message: str, tiny: Pretrain
) -> None:
    with pytest.raises(UserError, match=message):
        leanmim.pretrain(tiny, **wrong)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("hf-hub:timm/a", {}, "names weights; give timm's name of the architecture"),
        ("local-dir:folder", {}, "names weights"),
        (None, {"pretrained": True}, "--model-kwargs pretrained is not for the model: weights are given by --init"),
        (None, {"checkpoint_path": "a.pth"}, "weights are given by --init"),
        (None, {"cache_dir": "there"}, "weights are given by --init"),
        (None, {"pretrained_cfg_overlay": "a"}, "weights are given by --init"),
        (None, {"in_chans": 4}, "give --channels"),
        (None, {"img_size": 32}, "give --input-size"),
        (None, {"num_classes": 3}, "labelled folder"),
        (None, {"features_only": True}, "leave it out"),
        (None, {"drop_path_rate": 1.5}, "at least 0 and below 1"),
        (None, {"drop_rate": math.nan}, "at most 65536"),
        (None, {"depth": 10**6}, "out of range"),
        (None, {"depth": 2.5}, "at least 1, at most 1000"),
        (None, {"embed_dim": 10**9}, "at most 65536"),
        (None, {"norm_layer": object()}, "it takes a number, a word, True or False"),
        (None, {"depths": [2, object()]}, "it takes a number, a word, True or False"),
    ],
)
def test_arguments_that_are_not_a_models(model: str | None, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_model(model, arguments)
    with pytest.raises(UserError, match=message):
        replace(made(Pretrain, model_kwargs=arguments), model=model or "vit_tiny_patch16_224").check()


def test_arguments_that_are() -> None:
    check_model(
        "vit_tiny_patch16_224", {"depths": [2, 2], "class_token": False, "global_pool": "avg", "init_values": None}
    )
