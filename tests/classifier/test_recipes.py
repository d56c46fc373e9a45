"""Recipes against the table of their papers."""

from dataclasses import fields, replace

import pytest

from leanmim.classifier.recipes import RECIPES, SMALL, choose, filled, small_batch, small_epochs, small_rate
from leanmim.config import Finetune, Pretrain
from leanmim.errors import UserError
from leanmim.recipes import FASTMIM, MAE, SIMMIM
from leanmim.start import Start, open_start
from tests.helpers import PLAIN, SWIN

PUBLISHED = {  # batch, base lr for 256, layer decay, epochs, warm-up, min lr, clip
    "mae": (1024, 5e-4, 0.65, 100, 5, 1e-6, 0.0),
    "simmim-swin": (2048, 1.25e-3 / 2, 0.8, 100, 20, 2.5e-7 * 2048 / 512, 5.0),
    "fastmim": (1024, 6e-4, 0.70, 100, 5, 1e-6, 0.0),
    "fastmim-swin": (1024, 1e-3, 0.80, 100, 5, 1e-6, 0.0),
}
COMMON = dict(
    betas=(0.9, 0.999), weight_decay=0.05, drop_path=0.1, randaugment="rand-m9-mstd0.5-inc1", mixup=0.8, cutmix=1.0,
    mixup_switch=0.5, smoothing=0.1, erase=0.25, head_init=2e-5,
)  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes(name: str) -> None:
    recipe = RECIPES[name]
    assert (
        recipe.effective_batch, recipe.blr, recipe.layer_decay, recipe.epochs, recipe.warmup, recipe.min_lr, recipe.clip_grad,
    ) == pytest.approx(PUBLISHED[name])  # fmt: skip
    assert {key: getattr(recipe, key) for key in COMMON} == COMMON
    assert recipe.schedule == "cosine"


def start(name: str, kwargs: dict, pretrained: Pretrain | None = None) -> Start:
    return replace(open_start("scratch", model=name, model_kwargs=kwargs, input_size=(64,)), pretrained=pretrained)


@pytest.mark.parametrize(
    ("family", "pretrained", "images", "expected"),
    [
        ("vit", MAE, 50_000, "mae"), ("vit", FASTMIM, 50_000, "fastmim"), ("swin", FASTMIM, 50_000, "fastmim-swin"),
        ("swin", SIMMIM, 50_000, "simmim-swin"), ("vit", SIMMIM, 50_000, "mae"), ("vit", None, 50_000, "mae"),
        ("swin", None, 50_000, "fastmim-swin"), ("swin", SIMMIM, 19_999, "small"), ("vit", MAE, 600, "small"),
    ],
)  # fmt: skip
def test_the_recipe_follows_from_start_and_images(
    family: str, pretrained: Pretrain | None, images: int, expected: str
) -> None:
    name, kwargs = ("vit_tiny_patch16_224", PLAIN) if family == "vit" else SWIN
    config = Finetune(start="s", data="d", out="o")
    assert choose(config, start(name, kwargs, pretrained), images).recipe == expected


def test_an_unknown_recipe_is_an_error() -> None:
    with pytest.raises(UserError, match="did you mean simmim-swin"):
        choose(Finetune(start="s", data="d", out="o", recipe="simmim"), start("vit_tiny_patch16_224", PLAIN), 100)


def test_given_numbers_stay() -> None:
    given = dict(
        mixup=0.3,
        layer_decay=0.9,
        epochs=7,
        warmup_epochs=1.0,
        warmup_share=0.3,
        randaugment="none",
        crop_scale=(0.5, 1.0),
    )
    config = filled(Finetune(start="s", data="d", out="o", **given), RECIPES["mae"])  # type: ignore[arg-type]
    assert {name: getattr(config, name) for name in given} == given
    assert (config.recipe, config.cutmix, config.effective_batch, config.batch_size) == ("mae", 1.0, 1024, "auto")


def test_of_auto_only_what_the_run_itself_decides_is_left() -> None:
    config = filled(Finetune(start="s", data="d", out="o"), RECIPES["fastmim"])
    left = {field.name for field in fields(config) if getattr(config, field.name) == "auto"}
    measured = {"threads", "precision", "channels_last", "compile"}
    assert left == measured | {"batch_size", "values", "class_weights", "pool", "device", "memory", "eval_every"}


def test_the_small_recipe_sizes_itself() -> None:
    assert [small_batch(images) for images in (3, 95, 320, 947, 9469, 100_000)] == [3, 16, 16, 32, 256, 256]
    epochs = [small_epochs(images) for images in (3, 95, 947, 9469)]
    assert epochs == sorted(epochs, reverse=True)
    assert small_rate(64, False) == pytest.approx(small_rate(256, False) / 2)
    assert small_rate(64, True) < small_rate(64, False)
    assert SMALL.recipe == "small"
