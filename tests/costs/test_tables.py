"""Costs side by side: no row is changed by what another one was asked for."""

import json
import re
from dataclasses import fields, replace

import pytest

import leanmim
from leanmim.cli import main
from leanmim.config import Cost
from leanmim.costs import StepCost, compare, cost, count
from leanmim.errors import UserError
from leanmim.recipes import FASTMIM_P, MAE, PR_MIM
from tests.costs.small import SMALL

FAST = dict(model="vit_tiny_patch16_224", model_kwargs={"depth": 4}, input_size=(64,), batch_size=2, device="cpu")
WORDS = ["--model", "vit_tiny_patch16_224", "--model-kwargs", "depth", "4", "--input-size", "64", "--batch-size", "2",
         "--device", "cpu"]  # fmt: skip
KEYS = (
    "title recipe model batch_size forward_flops_per_image train_flops_per_image segment_flops segment_parameters message_bytes "
    "encoder_parameters decoder_parameters weight_bytes gradient_bytes optimizer_bytes saved_bytes transient_bytes peak_bytes allocator "
    "encoder_tokens decoder_tokens input_sizes"
)


def entries(*recipes: str) -> list[dict]:
    return json.loads(cost(Cost(recipes=recipes, json=True, **FAST)))


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def cells(text: str, title: str, recipe: str) -> dict[str, str]:
    """A recipe's row in the table of that title, by column."""
    parts = text.split("\n\n")
    place = next(i for i, part in enumerate(parts) if part.startswith(title))
    heading, _, *rows = (re.split(" {2,}", line) for line in parts[place + 1].splitlines())
    (row,) = (row for row in rows if row[0] == recipe)
    return dict(zip(heading, row, strict=True))


def test_json_has_one_object_for_each_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    main(["cost", "simmim", "mae", *WORDS, "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert [(entry["recipe"], entry["title"]) for entry in printed] == [("simmim", "simmim"), ("mae", "mae")]
    assert all(list(entry) == KEYS.split() for entry in printed)
    assert KEYS.split() == [field.name for field in fields(StepCost)]
    assert all(entry["batch_size"] == 2 for entry in printed)


def test_a_row_compares_with_the_first() -> None:
    mae, simmim = (replace(SMALL[name], batch_size=2, precision="fp32") for name in ("mae-vit", "simmim-vit"))
    compared = compare([mae, simmim])
    first, second = compared.costs
    row = cells(str(compared), "Memory", second.title)
    assert row["ratio"] == f"{second.peak_bytes / first.peak_bytes:.2f}"
    assert row["all"] == f"{second.peak_bytes / 2**20:,.0f}"
    assert row["saved"] == f"{second.saved_bytes / 2**20:,.0f}"
    assert cells(str(compared), "Memory", first.title)["ratio"] == "1.00"
    row = cells(str(compared), "Training", second.title)
    assert row["ratio"] == f"{second.train_flops_per_image / first.train_flops_per_image:.2f}"
    assert row["decoder"] == f"{compared.flops[1]['training']['decoder'] / 1e9:.2f}"
    row = cells(str(compared), "Parameters", second.title)
    assert row["input, px"] == str(simmim.input_size[0])
    assert (row["encoder tokens"], row["encoder"]) == ("37", f"{second.encoder_parameters / 1e6:.2f}")


def test_an_option_changes_the_row_of_its_recipe_only(capsys: pytest.CaptureFixture[str]) -> None:
    main(["cost", "mae", *WORDS])
    alone = capsys.readouterr().out
    main(["cost", "mae", "bim", "bim:segments=2,decoder-depth=2", *WORDS])
    beside = capsys.readouterr().out
    for title in ("Memory", "Training", "Parameters"):
        assert cells(beside, title, "mae") == cells(alone, title, "mae")
        assert cells(beside, title, "bim decoder-depth=2, segments=2") != cells(beside, title, "bim")
    assert "=" not in alone


def test_a_line_is_no_wider_than_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    main(["cost", "mae", "pr-mim:throw=0.7", "bim:segments=2,decoder-depth=2", *WORDS])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    assert "recipe              all  ratio  weights  gradients  optimizer  saved  transient" in lines


def test_a_recipe_that_does_not_take_the_size_says_why_and_the_others_are_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*WORDS[: WORDS.index("--input-size")], "--input-size", "96", "--batch-size", "2", "--device", "cpu"]
    main(["cost", "fastmim-p", "mae", "simmim", *words])
    text = capsys.readouterr().out
    assert text.splitlines()[-1].startswith(
        "fastmim-p cannot be counted at 96 px: phase 2 of 3, 120 x 120 px (--phase-scales 1.25): "
    )
    assert cells(text, "Memory", "mae")["ratio"] == "1.00"
    main(["cost", "fastmim-p", "mae", *words, "--json"])
    refused, counted = json.loads(capsys.readouterr().out)
    assert list(refused) == ["title", "recipe", "model", "input_size", "error"]
    assert refused["title"] == "fastmim-p" and "120 x 120 px" in refused["error"]
    assert list(counted) == KEYS.split()


def test_nothing_that_can_be_counted_is_an_error_that_names_all() -> None:
    with pytest.raises(UserError) as error:
        cost(Cost(recipes=("mae", "bim"), **{**FAST, "input_size": (100,)}))
    mae, bim = str(error.value).splitlines()
    assert mae.startswith("mae cannot be counted at 100 px: --input-size 100 is not divided")
    assert bim.startswith("bim cannot be counted at 100 px: ")
    with pytest.raises(UserError, match=r"^timm has no model 'vit_tiny'; nearest: vit_tiny_patch16_224"):
        cost(Cost(model="vit_tiny"))


def test_a_changed_recipe_differs_and_its_title_says_so() -> None:
    mae, plain, changed = entries("mae", "pr-mim", "pr-mim:throw=0.7")
    assert [entry["title"] for entry in (mae, plain, changed)] == ["mae", "pr-mim", "pr-mim throw=0.7"]
    assert changed["train_flops_per_image"] < plain["train_flops_per_image"] < mae["train_flops_per_image"]
    assert entries("mae") == [mae]


@pytest.mark.parametrize("option", ["--segments", "--throw", "--masking", "--decoder-depth", "--offload"])
def test_a_methods_option_is_not_one_of_the_command(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["cost", "mae", "bim", option, "1"])
    assert end.value.code == 2
    assert f"{option} is called RECIPE:{option[2:]}=VALUE now" in capsys.readouterr().err


def test_the_device_is_the_commands() -> None:
    with pytest.raises(UserError, match="mae:device=cuda: the command itself sets device"):
        entries("mae:device=cuda")


def test_who_has_nothing_to_offload_is_named() -> None:
    text = cost(Cost(recipes=("mae", "bim:segments=2,offload=True"), **FAST))
    assert text.splitlines()[-1] == "bim segments=2, offload=True: nothing to offload: cpu has no memory of its own"


def test_configurations_are_compared_from_python() -> None:
    one, two = (replace(recipe, **{**FAST, "batch_size": 1}) for recipe in (MAE, replace(PR_MIM, throw=0.7)))
    compared = compare([one, replace(one, input_size=(100,)), two])
    titles = ["mae input-size=64", "mae input-size=100", "pr-mim input-size=64, throw=0.7"]
    assert [entry.title for entry in compared.entries] == titles
    assert [entry.title for entry in compared.costs] == [titles[0], titles[2]]
    assert [entry.title for entry in compared.uncounted] == [titles[1]]
    assert replace(compared.costs[0], title="mae") == count(one)[0]
    assert compared.flops == [count(config)[1] for config in (one, two)]
    assert [entry["title"] for entry in json.loads(compared.json())] == titles
    assert str(compared).splitlines()[0] == "One training step, vit_tiny_patch16_224, batch 1"


def test_a_batch_of_auto_is_counted_as_the_commands_own() -> None:
    config = replace(MAE, **{**FAST, "batch_size": "auto"})
    assert compare([config]).costs[0].batch_size == Cost.batch_size == 256


def test_different_models_are_all_in_the_first_line() -> None:
    config = replace(SMALL["simmim-vit"], batch_size=1)
    text = str(compare([config, replace(config, model="deit_tiny_patch16_224")]))
    assert text.splitlines()[0] == "One training step, vit_tiny_patch16_224 / deit_tiny_patch16_224, batch 1"


def test_a_recipe_in_phases_has_its_own_name() -> None:
    config = replace(FASTMIM_P, **{**FAST, "batch_size": 1}, decoder_width=32, decoder_heads=2)
    entry, flops = count(config)
    assert entry.title == "fastmim-p decoder-width=32, decoder-heads=2"
    assert entry.train_flops_per_image == sum(flops["training"].values())


def test_cost_is_the_function_of_the_package() -> None:
    assert leanmim.cost(recipes=("mae",), **FAST) == cost(Cost(recipes=("mae",), **FAST))
