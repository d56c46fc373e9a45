"""Costs side by side: no column is changed by what another one was asked for."""

import json
from dataclasses import fields, replace

import pytest

import leanmim
from leanmim.cli import main
from leanmim.config import Cost
from leanmim.costs import StepCost, compare, cost, count, table
from leanmim.errors import UserError
from leanmim.recipes import FASTMIM_P, MAE, PR_MIM
from tests.costs.small import SMALL

FAST = dict(model="vit_tiny_patch16_224", model_kwargs={"depth": 4}, input_size=(64,), batch_size=2, device="cpu")
WORDS = ["--model", "vit_tiny_patch16_224", "--model-kwargs", "depth", "4", "--input-size", "64", "--batch-size", "2",
         "--device", "cpu"]  # fmt: skip
KEYS = (
    "title recipe model batch_size forward_flops_per_image train_flops_per_image encoder_parameters decoder_parameters "
    "weight_bytes gradient_bytes optimizer_bytes saved_bytes transient_bytes peak_bytes encoder_tokens decoder_tokens"
)


def entries(*recipes: str) -> list[dict]:
    return json.loads(cost(Cost(recipes=recipes, json=True, **FAST)))


def columns(text: str, name: str) -> list[str]:
    """The cells of a row, ratios left out."""
    (line,) = (line for line in text.splitlines() if line.strip().startswith(name))
    return [cell for cell in line.replace(name, "").split() if "(" not in cell]


def test_json_has_one_object_for_each_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    main(["cost", "simmim", "mae", *WORDS, "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert [(entry["recipe"], entry["title"]) for entry in printed] == [("simmim", "simmim"), ("mae", "mae")]
    assert all(list(entry) == KEYS.split() for entry in printed)
    assert KEYS.split() == [field.name for field in fields(StepCost)]
    assert all(entry["batch_size"] == 2 for entry in printed)


def test_the_table_compares_with_the_first() -> None:
    pairs = [count(replace(SMALL[name], batch_size=2, precision="fp32")) for name in ("mae-vit", "simmim-vit")]
    text = table([cost for cost, _ in pairs], [flops for _, flops in pairs])
    ratio = pairs[1][0].saved_bytes / pairs[0][0].saved_bytes
    (line,) = (line for line in text.splitlines() if "saved for backward" in line)
    assert line.rstrip().endswith(f"({ratio:4.2f})")


def test_an_option_changes_the_column_of_its_recipe_only(capsys: pytest.CaptureFixture[str]) -> None:
    main(["cost", "mae", *WORDS])
    alone = capsys.readouterr().out
    main(["cost", "mae", "bim", "bim:segments=2,decoder-depth=2", *WORDS])
    beside = capsys.readouterr().out
    for name in ("training, GFLOP an image", "forward, GFLOP an image", "decoder parameters, M", "weights"):
        mae = columns(alone, name)
        assert columns(beside, name)[: len(mae)] == mae
    header = " ".join(" ".join(beside.splitlines()[:5]).split())
    assert "bim decoder-depth=2," in header and "segments=2" in header
    assert not any("=" in line for line in alone.splitlines())


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
    compared = compare([one, two])
    assert [entry.title for entry in compared.costs] == ["mae", "pr-mim throw=0.7"]
    assert compared.costs[0] == count(one)[0]
    assert json.loads(compared.json())[1]["title"] == "pr-mim throw=0.7"
    assert str(compared) == table(compared.costs, compared.flops)
    assert "batch 1\n" in str(compared)


def test_different_models_are_all_in_the_first_line() -> None:
    entry, flops = count(replace(SMALL["simmim-vit"], batch_size=1))
    text = table([entry, replace(entry, model="swin_tiny_patch4_window7_224")], [flops, flops])
    assert text.splitlines()[0] == ("One training step, vit_tiny_patch16_224 / swin_tiny_patch4_window7_224, batch 1")


def test_a_recipe_in_phases_has_its_own_name() -> None:
    config = replace(FASTMIM_P, **{**FAST, "batch_size": 1}, decoder_width=32, decoder_heads=2)
    entry, flops = count(config)
    assert entry.title == "fastmim-p decoder-width=32, decoder-heads=2"
    assert entry.train_flops_per_image == sum(flops["training"].values())


def test_cost_is_the_function_of_the_package() -> None:
    assert leanmim.cost is cost
