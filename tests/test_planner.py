"""The plan: what fits the memory, how long it takes, the command; and the choice of the batch."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import leanmim.planner
from leanmim import placement
from leanmim.auto import epochs_within, images_a_step
from leanmim.cli import main
from leanmim.config import Plan, Pretrain, parse_bytes
from leanmim.costs import count
from leanmim.data import open_source
from leanmim.errors import UserError
from leanmim.offload import Offload
from leanmim.planner import SHARE, WARM_UP, average_throughput, command, fit, plan, throughput
from leanmim.recipes import BIM, MAE, SIMMIM
from leanmim.train.pretrain import pretrain
from tests.helpers import in_segments

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
        return leanmim.planner.count(replace(tiny, batch_size=batch, accum=4 // batch))[0].peak_bytes

    for memory in (peak(2) / SHARE - 1, peak(4) / SHARE + 1):
        found = fit(tiny, 4, int(memory), CPU)
        assert found is not None
        config, cost = found
        assert int(config.batch_size) * config.accum == 4
        assert cost.peak_bytes <= SHARE * memory
        assert config.batch_size == 4 or peak(2 * int(config.batch_size)) > SHARE * memory
    assert fit(tiny, 4, peak(1) // 2, CPU) is None


def test_auto_accumulates_to_the_effective_batch_and_resumes(
    tiny: Pretrain, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = int(count(replace(tiny, batch_size=4, accum=2))[0].peak_bytes / SHARE) + 1
    auto = replace(tiny, batch_size="auto", effective_batch=8, memory=str(memory), epochs=1)
    pretrain(auto)
    assert "batch 4 x accum 2, " in capsys.readouterr().out
    written = json.loads((Path(tiny.out) / "config.json").read_text())
    assert (written["batch_size"], written["accum"]) == (4, 2)
    # the same command again continues as the run began, whatever memory there is now
    pretrain(replace(auto, memory="64GiB"))
    assert "as this run began: batch-size 4, accum 2" in capsys.readouterr().out


def test_auto_with_too_little_memory_says_so(tiny: Pretrain) -> None:
    with pytest.raises(UserError, match="not even one image fits"):
        pretrain(replace(tiny, batch_size="auto", effective_batch=8, memory="100KB"))
    assert not Path(tiny.out).exists()


def test_auto_chooses_accum_itself(tiny: Pretrain) -> None:
    with pytest.raises(UserError, match="leave --accum out"):
        pretrain(replace(tiny, batch_size="auto", accum=2))


@pytest.mark.results
def test_every_run_records_prediction_and_measurement(tiny: Pretrain) -> None:
    pretrain(tiny)
    cost = json.loads((Path(tiny.out) / "cost.json").read_text())
    expected, _ = count(tiny)
    assert cost["predicted"]["peak_bytes"] == expected.peak_bytes
    measured = cost["measured"]
    assert measured["images_per_second"] > 0
    assert measured["flops_per_second"] == measured["images_per_second"] * expected.train_flops_per_image
    assert "Cost, predicted and measured" in (Path(tiny.out) / "report.html").read_text()


def planned(**options: Any) -> dict[str, str]:
    """The plan of each recipe, by its title."""
    (_, first), *recipes = plan(Plan(**SMALL, **({"memory": "4GiB", "effective_batch": 8} | options)))
    assert first.startswith("vit_tiny_patch16_224, ")
    return dict(recipes)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are measured for an instant."""
    monkeypatch.setattr(leanmim.planner, "SECONDS", 0.0)


@pytest.mark.results
def test_the_plan_measures_and_its_commands_run(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: None
) -> None:
    texts = planned(data=str(photos), recipes=("mae", "simmim"), epochs=1)
    commands = [text.splitlines()[-1].strip() for text in texts.values()]
    assert all(line.startswith("leanmim pretrain ") for line in commands)
    monkeypatch.chdir(tmp_path)
    for line in commands:
        main(shlex.split(line)[1:])
    assert (tmp_path / "runs" / "mae" / "export" / "timm" / "model.safetensors").is_file()


def test_a_recipe_is_told_of_before_the_next_is_measured(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    monkeypatch.setattr(
        leanmim.planner, "average_throughput", lambda config, *_: measured.append(config.recipe) or 10.0
    )
    found = plan(Plan(data=str(photos), recipes=("mae", "simmim"), effective_batch=8, memory="4GiB", **SMALL))
    assert next(found)[0] == "16 images"
    assert (next(found)[0], measured) == ("mae", ["mae"])
    assert (next(found)[0], measured) == ("simmim", ["mae", "simmim"])


def test_the_command_prints_what_the_plan_yields(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(leanmim.planner, "average_throughput", lambda *_: 10.0)
    words = "--model vit_tiny_patch16_224 --input-size 32 --model-kwargs depth 1 --device cpu --memory 4GiB --epochs 1"
    main(["plan", "mae", "--data", str(photos), *words.split()])
    out, err = capsys.readouterr()
    assert not err  # the bar is for terminals
    assert out.startswith("16 images: vit_tiny_patch16_224, 4.00 GiB on cpu (10% of it stay free)\nmae: 1 epochs in ")
    assert "\n  leanmim pretrain mae --data " in out


@pytest.mark.parametrize(("seconds", "counted"), [(0.0, 5), (60.0, 20), (0.1, 7)])
def test_steps_are_measured_for_a_while(
    tiny: Pretrain, seconds: float, counted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step takes 15 ms by the clock; the first two do not count."""
    done = []
    monkeypatch.setattr(leanmim.planner, "SECONDS", seconds)
    monkeypatch.setattr(leanmim.planner, "update", lambda *_, **__: done.append(0))
    monkeypatch.setattr(leanmim.planner.time, "perf_counter", lambda: 0.015 * len(done))
    assert throughput(tiny, open_source(tiny.data, 3), CPU) == pytest.approx(4 / 0.015)
    assert len(done) == WARM_UP + counted


def test_the_speed_is_measured_with_what_is_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that may not hold the model as a whole; here a CPU offloads."""
    config, placed = in_segments(offload=True), []

    def place(*arguments: Any) -> Any:
        placed.append(placement.place(*arguments))
        return placed[-1]

    for module in (leanmim.planner, placement):
        monkeypatch.setattr(module, "offloads", lambda config, device: config.offload and config.cut)
    monkeypatch.setattr(leanmim.planner, "place", place)
    assert throughput(config, open_source(config.data, 3), CPU) > 0
    assert isinstance(placed[0], Offload)


def test_the_throughput_of_phases_is_that_of_their_shares(tiny: Pretrain, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(tiny, epochs="auto", phase_scales=(1.0, 2.0), phase_starts=(0.0, 0.25))
    monkeypatch.setattr(leanmim.planner, "throughput", lambda config, *_: {32: 10.0, 64: 2.0}[config.size[0]])
    assert average_throughput(config, open_source(tiny.data, 3), CPU) == pytest.approx(1 / (0.25 / 10 + 0.75 / 2))


def test_what_is_auto_follows_the_rules_of_a_run(photos: Path) -> None:
    own = planned(data=str(photos), recipes=("mae",), effective_batch="auto", images_per_second=100.0, hours=2.0)["mae"]
    epochs = epochs_within(2.0, 100.0, 16)
    step = images_a_step(16 * epochs, 16)
    assert f"{epochs} epochs in 2.0 h, at 100.0 images/s; {epochs} steps of {step} images: batch {step} x" in own
    assert f" --epochs {epochs} --batch-size {step}" in own
    assert "--hours" not in own and "optimizer steps" not in own
    assert "225 epochs in 1.0 h" in planned(data=str(photos), recipes=("mae",), images_per_second=1.0)["mae"]


def test_a_thousand_photos_in_twelve_hours_are_trained_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `plan --hours 12` made of a photo collection: 129 steps."""
    monkeypatch.setattr(leanmim.planner, "open_source", lambda *_: range(1000))
    text = planned(data="photos", recipes=("mae",), effective_batch="auto", images_per_second=10.0, hours=12.0)["mae"]
    assert "432 epochs" in text and "6480 steps of 64 images" in text


def test_too_few_steps_are_warned_of(photos: Path) -> None:
    text = planned(data=str(photos), recipes=("mae",), epochs=9, images_per_second=10.0)["mae"]
    assert "only 18 optimizer steps: too few to learn much" in text.splitlines()[1]


def test_given_throughput_is_scaled_by_flops(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leanmim.planner, "throughput", None)  # nothing is measured
    texts = planned(data=str(photos), recipes=("mae", "simmim"), epochs=9, hours=0.5, images_per_second=10.0)
    flops = [
        count(replace(recipe, model=SMALL["model"], model_kwargs=KWARGS, input_size=(64,), batch_size=8))[0]
        for recipe in (MAE, SIMMIM)
    ]
    other = 10.0 * flops[0].train_flops_per_image / flops[1].train_flops_per_image
    assert "9 epochs in 14 s, at 10.0 images/s" in texts["mae"]
    assert f", at {other:.1f} images/s" in texts["simmim"]
    assert "0.5 hours are enough for 1125 epochs" in texts["mae"]


def test_what_does_not_fit_is_said(photos: Path) -> None:
    text = planned(data=str(photos), recipes=("mae",), memory="1MB", images_per_second=1.0)["mae"]
    assert text.startswith("does not fit: even one image at a time needs")


def test_a_recipe_that_does_not_go_with_the_model_is_a_line(photos: Path) -> None:
    swin = dict(model="swin_tiny_patch4_window7_224", model_kwargs={"embed_dim": 24}, input_size=(64,), device="cpu")
    options = dict(data=str(photos), memory="4GiB", images_per_second=1.0, effective_batch=4, **swin)
    _, *texts = plan(Plan(recipes=("mae", "simmim"), **options))
    assert texts[0][1].startswith("cannot be trained at 64 px: --masking drop does not work with SwinTransformer")
    assert "leanmim pretrain simmim" in texts[1][1]
    with pytest.raises(UserError, match="mae cannot be trained at 64 px: --masking drop does not work"):
        list(plan(Plan(recipes=("mae",), **options)))


def test_a_phase_that_does_not_take_its_size_is_named(photos: Path) -> None:
    options = dict(data=str(photos), images_per_second=1.0, **{**SMALL, "model_kwargs": {}, "input_size": (96,)})
    with pytest.raises(UserError, match=r"phase 2 of 3, 120 x 120 px \(--phase-scales 1.25\): --input-size 120 is"):
        list(plan(Plan(recipes=("fastmim-p",), **options)))


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
    recipes = ("mae", "pr-mim:throw=0.7", "bim:segments=2,offload=True")
    texts = planned(data=str(photos), recipes=recipes, images_per_second=1.0)
    assert list(texts) == ["mae", "pr-mim throw=0.7", "bim segments=2, offload=True"]
    mae, pr_mim, bim = texts.values()
    assert mae == planned(data=str(photos), recipes=("mae",), images_per_second=1.0)["mae"]
    assert "leanmim pretrain pr-mim " in pr_mim
    assert " --throw 0.7" in pr_mim and "--out runs/pr-mim-throw-0.7" in pr_mim
    assert " --segments 2 --offload" in bim and "--out runs/bim-segments-2-offload-True" in bim


@pytest.mark.parametrize("option", ["batch-size=4", "accum=2", "device=cpu", "data=photos", "out=run", "memory=1GiB"])
def test_what_the_plan_chooses_is_not_a_recipes(photos: Path, option: str) -> None:
    with pytest.raises(UserError, match=f"mae:{option}: the command itself sets {option.partition('=')[0]}"):
        planned(data=str(photos), recipes=(f"mae:{option}",))


def test_hours_leave_epochs_that_were_asked_for(photos: Path) -> None:
    options = dict(data=str(photos), images_per_second=1.0, hours=1.0)
    own, given = planned(recipes=("mae", "mae:epochs=300"), **options).values()
    assert own.startswith("225 epochs in 1.0 h") and " --epochs 225" in own
    assert "1 hours are enough for 225 epochs" in given and " --epochs 300" in given


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hours": 0.0}, "--hours 0.0 is out of range"),
        ({"epochs": -1}, "--epochs -1 is out of range"),
        ({"images_per_second": float("nan")}, "--images-per-second nan is out of range"),
        ({"model": "vit_tiny"}, "timm has no model 'vit_tiny'"),
    ],
)
def test_values_that_cannot_be(photos: Path, wrong: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(plan(Plan(data=str(photos), **wrong)))
