"""Every recipe x encoder masking x size trains two steps; changes of a recipe, as words and as a title."""

from dataclasses import fields, replace
from itertools import product
from typing import Any

import pytest
import torch

import leanmim
from leanmim.cli import DESCRIPTIONS
from leanmim.config import Cost, Plan, Pretrain
from leanmim.costs import StepCost, count
from leanmim.errors import UserError
from leanmim.factory import build
from leanmim.recipes import (
    BIM,
    FASTMIM,
    FASTMIM_P,
    LEAN,
    LEAN_MEMORY,
    MAE,
    PR_MIM,
    RECIPES,
    SIMMIM,
    differences,
    hyphens,
    published,
    titles,
    variant,
    words,
)  # fmt: skip
from leanmim.step import parameter_groups

MODELS = {
    "vit": ("vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}),
    "swin": ("swin_tiny_patch4_window7_224", {"embed_dim": 24}),
    "convnext": ("convnext_atto", {}),
}


SIZES = {"square": (64,), "wide": (64, 96), "tall": (128, 64)}


def combined(recipe: Pretrain, masking: str, backbone: str, size: str) -> Pretrain:
    model, arguments = MODELS[backbone]
    return replace(
        recipe,
        model=model,
        model_kwargs=arguments,
        masking=masking,
        input_size=SIZES[size],
        mask_unit=32 if recipe.mask_unit else 0,
        mask_ratio=(0.25, 0.5, 0.5, 0.75) if isinstance(recipe.mask_ratio, tuple) else recipe.mask_ratio,
        decoder_depth=1 if masking == "drop" or recipe.decoder_depth else 0,
        decoder_width=32,
        decoder_heads=2,
    )


COMBINATIONS = [
    (name, masking, backbone, size)
    for name, masking, backbone, size in product(RECIPES, ("drop", "token", "pixel"), MODELS, SIZES)
    if masking == "pixel" or backbone == "vit" or (masking, backbone) == ("token", "swin")
]


@pytest.mark.parametrize(("name", "masking", "backbone", "size"), COMBINATIONS)
def test_two_steps(name: str, masking: str, backbone: str, size: str) -> None:
    config = combined(RECIPES[name], masking, backbone, size)
    torch.manual_seed(0)
    model = build(config)
    optimizers = [torch.optim.AdamW(groups, lr=1e-3) for groups in parameter_groups(model)]
    before = {name: p.clone() for name, p in model.named_parameters()}
    images = torch.randn(4, 3, *config.size)
    losses = []
    for _ in range(2):
        for i, loss in enumerate(model.losses(images)):
            loss.backward()
            optimizers[i].step()
            optimizers[i].zero_grad()
            losses.append(loss.item())
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert still == {name for name, p in model.named_parameters() if not p.requires_grad}


def test_the_recipe_is_mae_with_half_of_all_thrown_and_filled() -> None:
    assert replace(MAE, recipe="pr-mim", throw=0.5) == PR_MIM == RECIPES["pr-mim"]
    assert (PR_MIM.select, PR_MIM.select_start) == ("furthest", "visible")
    assert PR_MIM.fill >= 1
    assert all(
        recipe.throw == 0 for name, recipe in RECIPES.items() if name in ("mae", "simmim", "fastmim", "fastmim-p")
    )


def test_what_the_help_says_of_lean() -> None:
    assert f" {LEAN.input_size[0]} px with a decoder of one layer" in DESCRIPTIONS["lean"] and LEAN.decoder_depth == 1


def test_lean_is_a_cheaper_mae_and_in_segments_needs_an_eleventh_of_the_memory() -> None:
    def cost(recipe: Pretrain, **changes: Any) -> StepCost:
        return count(
            replace(recipe, data="d", out="o", model="vit_base_patch16_224", precision="bf16", **changes), "cuda"
        )[0]

    mae, lean, memory = (cost(recipe, batch_size=256, epochs=10) for recipe in (MAE, LEAN, LEAN_MEMORY))
    assert lean.train_flops_per_image < mae.train_flops_per_image / 9
    assert memory.train_flops_per_image < mae.train_flops_per_image / 8
    assert memory.peak_bytes < mae.peak_bytes / 11


def test_the_recipe_is_public() -> None:
    assert leanmim.FASTMIM is FASTMIM
    assert isinstance(FASTMIM, Pretrain)


PLAIN = Cost(model="vit_tiny_patch16_224", batch_size=8)


def test_what_a_command_gives_reaches_every_recipe_and_nothing_else() -> None:
    for name, recipe in RECIPES.items():
        got = variant(name, PLAIN)
        assert replace(recipe, model="vit_tiny_patch16_224", batch_size=8, device="auto") == got


def test_what_a_command_leaves_to_auto_is_the_recipes_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, "mine", replace(MAE, recipe="mine", epochs=30, precision="fp32"))
    got = variant("mine", Plan(data="photos"))
    assert (got.epochs, got.precision) == (30, "fp32")
    assert variant("mine", Plan(data="photos", epochs=3)).epochs == 3


@pytest.mark.parametrize(
    ("spec", "changes"),
    [
        ("mae", {}),
        ("pr-mim:throw=0.7", {"throw": 0.7}),
        ("bim:segments=3 6 12,decoder-depth=2", {"segments": (3, 6, 12), "decoder_depth": 2}),
        ("bim:segments=2,offload=True", {"segments": 2, "offload": True}),
        ("bim:mask_ratio=0.5 0.7", {"mask_ratio": (0.5, 0.7)}),
        ("fastmim-p:phase-scales=,phase-starts=", {"phase_scales": (), "phase_starts": ()}),
        ("fastmim:decoder-depth=auto,mask-ratio=0.6", {"mask_ratio": 0.6}),
        ("mae:depth=3, warmup-epochs=None", {"depth": 3}),
        ("mae:batch-size=2,model-kwargs=depth 4 qkv_bias False", {"batch_size": 2, "model_kwargs": {"depth": 4, "qkv_bias": False}}),
    ],
)  # fmt: skip
def test_options_of_a_recipe(spec: str, changes: dict) -> None:
    plain = variant(spec.partition(":")[0], PLAIN)
    assert variant(spec, PLAIN) == replace(plain, **changes)


@pytest.mark.parametrize("field", [field.name for field in fields(Pretrain)])
def test_every_field_of_pretrain_is_an_option(field: str) -> None:
    value = {
        "data": "photos", "out": "run", "init": "a.pt", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5),
        "knn_data": "labelled", "model_kwargs": {"depth": 4}, "warmup_epochs": 1.0, "depth": 2,
    }.get(field, getattr(MAE, field))  # fmt: skip
    config = replace(MAE, **{field: value}, **{"mean": {"std": value}, "std": {"mean": value}}.get(field, {}))
    spec = ",".join(
        f"{hyphens(name)}={' '.join(words(getattr(config, name)))}" for name in {field, *differences(config)}
    )
    if "mean" in spec.partition("=")[0] or "std" in spec.partition("=")[0]:
        assert len(differences(config)) == 2
    assert variant(f"mae:{spec}", replace(MAE)) == config


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("maee", "there is no recipe 'maee'; did you mean mae?"),
        ("qqq", "there is no recipe 'qqq'; there are: mae, simmim, fastmim, fastmim-p, pr-mim, bim, lean, lean-memory"),
        ("mae:trow=0.5", "mae:trow=0.5: there is no option 'trow'; did you mean throw?"),
        ("mae:decoder-dept=1", "did you mean decoder-depth"),
        ("mae:throw", "mae:throw: 'throw' cannot be read; it is option=value"),
        ("mae:throw=much", "mae:throw=much: 'throw=much' cannot be read"),
        ("mae:throw=0.1 0.2", "cannot be read"),
        ("mae:throw=0.1 --offload True", "cannot be read"),
        ("mae:throw=1.5", "mae:throw=1.5: --throw 1.5 is out of range"),
        ("simmim:update-in-backward=True", "simmim:update-in-backward=True: --update-in-backward steps"),
    ],
)
def test_a_spec_that_is_wrong_is_named(spec: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError) as error:
        variant(spec, PLAIN)
    assert message in str(error.value)
    assert capsys.readouterr() == ("", "")


def test_titles_name_what_differs_from_the_recipe() -> None:
    assert titles([MAE, SIMMIM]) == ["mae", "simmim"]
    assert titles([replace(PR_MIM, throw=0.7)]) == ["pr-mim throw=0.7"]
    assert titles([replace(BIM, segments=(3, 6, 12), offload=True)]) == ["bim segments=3 6 12, offload=True"]
    assert titles([replace(MAE, data="photos", out="run", log_every=3)]) == ["mae"]
    assert titles([replace(MAE, recipe="mine", throw=0.5)]) == ["mine throw=0.5"]


def test_titles_name_a_shared_option_only_where_it_is_not_the_same_for_all() -> None:
    changed = [replace(recipe, model="vit_base_patch16_224", batch_size=4) for recipe in (MAE, SIMMIM)]
    assert titles(changed) == ["mae", "simmim"]
    assert titles([MAE, replace(MAE, model="vit_base_patch16_224")]) == [
        "mae model=vit_small_patch16_224", "mae model=vit_base_patch16_224",
    ]  # fmt: skip
    assert titles([replace(MAE, throw=0.5), replace(SIMMIM, throw=0.5)]) == ["mae throw=0.5", "simmim throw=0.5"]


@pytest.mark.parametrize(
    ("recipe", "decoder", "blr"),
    [
        (MAE, (8, 512, 16), 1.5e-4),
        (PR_MIM, (8, 512, 16), 1.5e-4),
        (BIM, (1, 512, 16), 1.5e-4),
        (FASTMIM_P, ("auto", 256, 8), 1.5e-4),
        (SIMMIM, (0, 512, 16), 5e-5),
    ],
)
def test_the_numbers_of_the_papers(recipe: Pretrain, decoder: tuple[int | str, int, int], blr: float) -> None:
    found = published(recipe)
    assert (found.decoder_depth, found.decoder_width, found.decoder_heads) == decoder
    assert (found.epochs, found.blr) == (800, blr)
