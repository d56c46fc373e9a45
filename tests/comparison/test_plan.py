"""The budget: epochs from a given speed and cost; the speed from processes side by side."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from leanmim.comparison import plan, processes
from leanmim.comparison.plan import Entry, batch_of, measured, planned, recipes_of, scheduled
from leanmim.config import Compare, parse_budget
from leanmim.costs import count
from leanmim.data import open_source
from leanmim.errors import UserError
from leanmim.recipes import MAE
from leanmim.train.phases import plan_phases
from tests.comparison.fakes import here, tiny_comparison


def entry(speed: float = 50.0, **changes: Any) -> Entry:
    """100 images at 2 GFLOP, in four steps."""
    return Entry("mae", replace(MAE, **{"effective_batch": 25} | changes), 100, 2 * 10**9, (speed,))


def under(budget: str, own: Entry, screen: bool = False) -> Entry:
    config = Compare(recipes=("mae",), data="d", eval="e", out="o", budget=budget, screen=screen)
    return scheduled(own, parse_budget(budget), config)


@pytest.mark.parametrize(
    ("budget", "epochs"),
    [("60s", 30), ("1min", 30), ("61s", 30.5), ("1s", 0.5), ("0.5h", 900), ("8epochs", 8), ("1epoch", 1), ("1TFLOP", 5),
     ("1.1 TFLOPs", 5.5), ("200 gflop", 1), ("333 gflop", 1.66)],
)  # fmt: skip
def test_epochs_of_a_budget(budget: str, epochs: float) -> None:
    found = under(budget, entry())  # an epoch takes 2 s and 0.2 TFLOP
    assert found.config.epochs == epochs and found.screen_epochs == 0


def test_the_median_of_the_speeds_counts() -> None:
    assert under("60s", replace(entry(), speeds=(10.0, 50.0, 51.0))).config.epochs == 30


@pytest.mark.parametrize(
    ("own", "images"),
    [({"batch_size": 30}, 90), ({"batch_size": 61}, 61), ({"batch_size": 30, "accum": 2}, 60), ({"effective_batch": 64}, 64),
     ({"effective_batch": "auto"}, 96)],
)  # fmt: skip
def test_images_that_fill_no_batch_do_not_count(own: dict[str, Any], images: int) -> None:
    found = under("6TFLOP", entry(**own))  # 30 epochs of 100 images
    assert found.images == images
    assert 0.98 < float(found.config.epochs) * images / 3000 <= 1.0


def test_what_is_planned_is_what_a_run_does(tmp_path: Path) -> None:
    config = tiny_comparison(tmp_path, recipes=("mae", "mae:batch-size=7", "pr-mim:batch-size=5"), budget="20GFLOP")
    source = open_source(config.data, 3)
    for own in planned(config, source, torch.device("cpu"), [{}]):
        (phase,) = plan_phases(replace(own.config, batch_size=batch_of(own.config, own.config.epochs, 24)), 24, 1)
        done = (phase.stop - phase.start) * phase.images * own.flops_per_image
        assert done == pytest.approx(float(own.config.epochs) * own.epoch["flops"], rel=0.01)
        assert 0.96 < done / 20e9 < 1.02


def test_a_tenth_for_screening() -> None:
    assert under("30epochs", entry(), screen=True).screen_epochs == 3  # 0.1 x 30 is less than 3 in floating point
    assert under("70epochs", entry(), screen=True).screen_epochs == 7
    with pytest.raises(UserError, match="a tenth of --budget 2epochs, for --screen, is less than one step of mae"):
        under("2epochs", entry(), screen=True)


def test_less_than_a_step_is_refused_with_what_an_epoch_takes() -> None:
    with pytest.raises(
        UserError,
        match=r"--budget 0.4s is less than one step of mae: an epoch of 100 images takes 2 s and 0.2 TFLOP",
    ):
        under("0.4s", entry())
    with pytest.raises(UserError, match=r"--budget 1GFLOP is less than one step of mae: an epoch of 100 images takes"):
        under("1GFLOP", entry())
    with pytest.raises(UserError, match=r"--budget 1s is less than one step"):
        under("1s", entry(effective_batch=64))


def test_what_does_not_go_with_so_few_epochs_is_refused() -> None:
    assert under("2epochs", entry(warmup_epochs=2)).config.epochs == 2
    with pytest.raises(UserError, match=r"--budget 1epochs is 1 epochs of mae: --warmup-epochs 2\.0 is not between"):
        under("1epochs", entry(warmup_epochs=2))


@pytest.mark.parametrize("budget", ["", "30", "min", "-1h", "0h", "8 days", "1e3s", "nanh"])
def test_what_is_no_budget(budget: str) -> None:
    with pytest.raises(UserError, match="is no budget; give one as"):
        parse_budget(budget)


def test_recipes_differ_and_have_titles(tmp_path: Path) -> None:
    config = tiny_comparison(tmp_path, recipes=("mae", "mae:mask-ratio=0.9,decoder-depth=2"))
    assert [title for title, _ in recipes_of(config)] == ["mae", "mae mask-ratio=0.9, decoder-depth=2"]


def test_speeds_are_measured_in_turns_by_as_many_processes_as_will_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def speed(config: Any, *_: Any) -> float:
        asked.append(config.mask_ratio)
        return 100 * config.mask_ratio

    monkeypatch.setattr(processes, "launch", here)
    monkeypatch.setattr(plan, "average_throughput", speed)
    monkeypatch.setattr(plan, "trial", lambda config, *_: config)
    found_faster = SimpleNamespace(setting=SimpleNamespace(channels_last=True))
    monkeypatch.setattr(plan, "calibrated", lambda *_: found_faster)
    config = tiny_comparison(tmp_path, recipes=("mae", "mae:mask-ratio=0.9"), budget="10s")
    before = [Entry(title, recipe, 24, 1) for title, recipe in recipes_of(config)]
    found = measured(config, before, [{}, {}])
    assert [entry.speeds for entry in found] == [(75.0,) * 6, (90.0,) * 6]
    assert [entry.config.channels_last for entry in found] == [True, True]
    assert asked == [0.75, 0.9] * 3 + [0.9, 0.75] * 3
    source = open_source(config.data, 3)
    entries = planned(config, source, torch.device("cpu"), [{}, {}])
    assert [own.config.epochs for own in entries] == [31.2, 37.5]
    cost, _ = count(replace(entries[0].config, batch_size=1))
    assert entries[0].flops_per_image == cost.train_flops_per_image
    assert [Entry.from_json(json.loads(json.dumps(own.to_json()))) for own in entries] == entries


def test_a_recipe_that_cannot_be_trained_is_named(tmp_path: Path) -> None:
    config = tiny_comparison(tmp_path, recipes=("mae", "mae:mask-unit=12"))
    with pytest.raises(UserError, match="mae mask-unit=12: "):
        planned(config, open_source(config.data, 3), torch.device("cpu"), [{}])
