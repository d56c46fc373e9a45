"""The plan: what fits the memory, how long it takes, the command; and the choice of the batch."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import leanmim.planner
from leanmim.cli import main
from leanmim.config import Plan, Pretrain, parse_bytes
from leanmim.costs import count
from leanmim.errors import UserError
from leanmim.planner import SHARE, command, fit, plan
from leanmim.recipes import BIM, MAE, SIMMIM
from leanmim.train.pretrain import pretrain

CPU = torch.device("cpu")
KWARGS = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SMALL = dict(model="vit_tiny_patch16_224", model_kwargs=KWARGS, input_size=(64,), device="cpu", workers=0)


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 * 2**30), ("500MB", 500_000_000), ("1.5 gib", 3 * 2**29), ("4096", 4096), ("16K", 16_000), ("auto", None)],
)  # fmt: skip
def test_sizes_of_memory(text: str, size: int | None) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "0", "8 GiBs"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match="give one as 8GiB"):
        parse_bytes(text)


def test_the_largest_batch_that_fits(tiny: Pretrain) -> None:
    def peak(batch: int) -> int:
        return count(replace(tiny, batch_size=batch, accum=32 // batch))[0].peak_bytes

    for memory in (peak(8) / SHARE + 1, peak(16) / SHARE - 1, peak(32) / SHARE + 1):
        found = fit(tiny, 32, int(memory), CPU)
        assert found is not None
        config, cost = found
        assert int(config.batch_size) * config.accum == 32
        assert cost.peak_bytes <= SHARE * memory
        assert config.batch_size == 32 or peak(2 * int(config.batch_size)) > SHARE * memory
    assert fit(tiny, 32, peak(1) // 2, CPU) is None


def test_auto_accumulates_to_the_effective_batch_and_resumes(
    tiny: Pretrain, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = int(count(replace(tiny, batch_size=4, accum=2))[0].peak_bytes / SHARE) + 1
    auto = replace(tiny, batch_size="auto", effective_batch=8, memory=str(memory), epochs=1)
    pretrain(auto)
    assert "batch size auto: 4 x accum 2" in capsys.readouterr().out
    written = json.loads((Path(tiny.out) / "config.json").read_text())
    assert (written["batch_size"], written["accum"]) == (4, 2)
    # the same command again continues as the run began, whatever memory there is now
    pretrain(replace(auto, memory="64GiB"))
    assert "4 x accum 2, as this run began" in capsys.readouterr().out


def test_auto_with_too_little_memory_says_so(tiny: Pretrain) -> None:
    with pytest.raises(UserError, match="not even one image fits"):
        pretrain(replace(tiny, batch_size="auto", effective_batch=8, memory="100KB"))
    assert not Path(tiny.out).exists()


def test_auto_chooses_accum_itself(tiny: Pretrain) -> None:
    with pytest.raises(UserError, match="leave --accum out"):
        pretrain(replace(tiny, batch_size="auto", accum=2))


def test_every_run_records_prediction_and_measurement(tiny: Pretrain) -> None:
    pretrain(tiny)
    cost = json.loads((Path(tiny.out) / "cost.json").read_text())
    expected, _ = count(tiny)
    assert cost["predicted"]["peak_bytes"] == expected.peak_bytes
    measured = cost["measured"]
    assert measured["images_per_second"] > 0
    assert measured["flops_per_second"] == measured["images_per_second"] * expected.train_flops_per_image
    assert "Cost, predicted and measured" in (Path(tiny.out) / "report.html").read_text()


def test_the_plan_measures_and_its_commands_run(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = plan(Plan(data=str(photos), recipes=("mae", "simmim"), epochs=1, effective_batch=8, memory="4GiB", **SMALL))
    commands = [line.strip() for line in text.splitlines() if line.strip().startswith("leanmim pretrain")]
    assert len(commands) == 2
    assert text.count("measured in 3 steps here") == 2
    monkeypatch.chdir(tmp_path)
    for line in commands:
        main(shlex.split(line)[1:])
    assert (tmp_path / "runs" / "mae" / "export" / "timm" / "model.safetensors").is_file()


def test_given_throughput_is_scaled_by_flops(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leanmim.planner, "throughput", None)  # nothing is measured
    text = plan(
        Plan(
            data=str(photos),
            recipes=("mae", "simmim"),
            epochs=9,
            hours=0.5,
            effective_batch=8,
            images_per_second=10.0,
            memory="4GiB",
            **SMALL,
        )
    )
    flops = [
        count(replace(recipe, model=SMALL["model"], model_kwargs=KWARGS, input_size=(64,), batch_size=8))[0]
        for recipe in (MAE, SIMMIM)
    ]
    other = 10.0 * flops[0].train_flops_per_image / flops[1].train_flops_per_image
    assert "; 10.0 images/s" in text
    assert f"; {other:.1f} images/s" in text
    assert f"9 epochs take {9 * 16 / 10 / 3600:.3g} hours" in text
    assert "0.5 hours are enough for 1125 epochs" in text


def test_what_does_not_fit_is_said(photos: Path) -> None:
    assert "does not fit: even one image at a time needs" in plan(
        Plan(data=str(photos), recipes=("mae",), memory="1MB", images_per_second=1.0, effective_batch=8, **SMALL)
    )


def test_without_names_a_recipe_that_does_not_go_with_the_model_is_a_line(photos: Path) -> None:
    swin = dict(model="swin_tiny_patch4_window7_224", model_kwargs={"embed_dim": 24}, input_size=(64,), device="cpu")
    text = plan(Plan(data=str(photos), memory="4GiB", images_per_second=1.0, effective_batch=4, **swin))
    assert "mae: --masking drop does not work with SwinTransformer" in text
    assert "leanmim pretrain simmim" in text
    with pytest.raises(UserError, match="does not work with SwinTransformer"):
        plan(Plan(data=str(photos), recipes=("mae",), memory="4GiB", images_per_second=1.0, **swin))


def test_the_command_is_what_differs_from_the_recipe() -> None:
    config = replace(MAE, data="my photos", out="run", model_kwargs={"depth": 4}, betas=(0.9, 0.99))
    assert command(config) == (
        "leanmim pretrain mae --data 'my photos' --out run --model-kwargs depth 4 --betas 0.9 0.99"
    )


def test_a_switch_is_one_word_of_the_command() -> None:
    assert command(replace(BIM, data="a", out="b", offload=True)) == "leanmim pretrain bim --data a --out b --offload"
    assert command(replace(MAE, data="a", out="b", recipe="mine")) == (
        "leanmim pretrain mae --data a --out b --recipe mine"
    )


def test_an_option_changes_its_own_recipe_and_stands_in_its_command(photos: Path) -> None:
    fast = dict(data=str(photos), memory="4GiB", images_per_second=1.0, effective_batch=8, **SMALL)
    text = plan(Plan(recipes=("mae", "pr-mim:throw=0.7", "bim:segments=2,offload=True"), **fast))
    mae, pr_mim, bim = text.split("\n\n")[1:]
    assert mae == plan(Plan(recipes=("mae",), **fast)).split("\n\n")[1]
    assert pr_mim.startswith("pr-mim throw=0.7: batch 8")
    assert "leanmim pretrain pr-mim " in pr_mim
    assert " --throw 0.7" in pr_mim and "--out runs/pr-mim-throw-0.7" in pr_mim
    assert bim.startswith("bim segments=2, offload=True: batch 8")
    assert " --segments 2 --offload" in bim and "--out runs/bim-segments-2-offload-True" in bim


@pytest.mark.parametrize("option", ["batch-size=4", "accum=2", "device=cpu", "data=photos", "out=run", "memory=1GiB"])
def test_what_the_plan_chooses_is_not_a_recipes(photos: Path, option: str) -> None:
    with pytest.raises(UserError, match=f"mae:{option}: the command itself sets {option.partition('=')[0]}"):
        plan(Plan(data=str(photos), recipes=(f"mae:{option}",), memory="4GiB", **SMALL))


def test_hours_leave_epochs_that_were_asked_for(photos: Path) -> None:
    fast = dict(data=str(photos), memory="4GiB", images_per_second=1.0, effective_batch=8, hours=1.0, **SMALL)
    own, given = plan(Plan(recipes=("mae", "mae:epochs=300"), **fast)).split("\n\n")[1:]
    assert "1 hours are enough for 225 epochs" in own and " --epochs 225" in own
    assert "1 hours are enough for 225 epochs" in given and " --epochs 300" in given


@pytest.mark.parametrize("wrong", [{"hours": 0.0}, {"epochs": -1}, {"images_per_second": float("nan")}])
def test_numbers_that_cannot_be(photos: Path, wrong: dict) -> None:
    with pytest.raises(UserError, match="must be above 0"):
        plan(Plan(data=str(photos), **wrong))
