"""A run that is continued with more epochs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from leanmim.config import Pretrain
from leanmim.errors import UserError
from leanmim.run import Run
from leanmim.train.pretrain import pretrain
from tests.helpers import equal
from tests.runs import lines, pretrain_until, weights


def rates(config: Pretrain) -> list[float]:
    return [line["lr"] for line in lines(config) if "lr" in line]


def test_a_cooled_down_run_restarts_warm(tiny: Pretrain, capsys: pytest.CaptureFixture[str]) -> None:
    short = replace(tiny, epochs=4, blr=0.01, warmup_share=0.25)
    pretrain(short)
    first = rates(short)
    longer = replace(short, epochs=8)
    pretrain(longer)
    assert "8 epochs in place of 4: the schedule ends with the last of them" in capsys.readouterr().out
    found = rates(longer)
    per_epoch = len(first) // 4
    assert found[: len(first)] == first
    assert len(found) == 2 * len(first)
    rise = found[len(first) : len(first) + per_epoch + 1]  # a quarter of the four epochs that are left
    assert rise[0] == 0
    assert rise == sorted(rise)
    never = replace(longer, out=short.out + "-never")
    pretrain(never)
    assert found[len(first) + per_epoch :] == rates(never)[len(first) + per_epoch :]
    assert json.loads(Run(Path(short.out)).config.read_text())["epochs"] == 8


def test_a_run_at_constant_rate_goes_on_at_it(tiny: Pretrain) -> None:
    constant = replace(tiny, epochs=10, blr=0.01, schedule="constant", checkpoint_minutes=0.0)
    whole = replace(constant, epochs=20, out=constant.out + "-whole")
    pretrain(whole)

    stop = len(rates(whole)) // 20 * 7
    pretrain_until(constant, stop)
    pretrain(replace(constant, epochs=20))
    before, after = rates(whole), rates(constant)
    assert after[stop:] == before[stop:]  # the first warm-up was shorter, the rest is the longer run's


def test_an_extended_run_that_is_killed_continues_bit_for_bit(tiny: Pretrain) -> None:
    short = replace(tiny, epochs=2, blr=0.01)
    whole, parts = replace(short, out=short.out + "-whole"), replace(short, checkpoint_minutes=0.0)
    for config in (whole, parts):
        pretrain(config)
    pretrain(replace(whole, epochs=6))

    pretrain_until(replace(parts, epochs=6), 3)
    pretrain(replace(parts, epochs=6))
    assert rates(whole) == rates(parts)
    assert equal(weights(whole), weights(parts))


def test_fewer_epochs_are_refused(tiny: Pretrain) -> None:
    pretrain(tiny)
    with pytest.raises(UserError, match="epochs: 2 there, 1 now"):
        pretrain(replace(tiny, epochs=1))


def test_phases_would_begin_elsewhere(tiny: Pretrain) -> None:
    grown = replace(tiny, phase_scales=(1.0, 2.0), phase_starts=(0.0, 0.5))
    pretrain(grown)
    with pytest.raises(UserError, match=r"--epochs 4: this run has 2, and its phases .* --init"):
        pretrain(replace(grown, epochs=4))


def test_what_changes_no_weight_may_change(tiny: Pretrain, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.symlink_to(tiny.data)
    pretrain(replace(tiny, data=str(folder)))
    before = weights(tiny)
    folder.rename(tmp_path / "moved")
    again = replace(tiny, data=str(tmp_path / "moved"), log_every=3, max_bad_share=0.5, knn_every=2, epochs=3)
    pretrain(again)
    stored = json.loads(Run(Path(tiny.out)).config.read_text())
    assert stored["data"] == str(tmp_path / "moved")
    assert not equal(before, weights(tiny))


def test_the_path_of_the_data_is_stored_absolute(tiny: Pretrain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(tiny.data).parent)
    pretrain(replace(tiny, data=Path(tiny.data).name, epochs=1))
    assert json.loads(Run(Path(tiny.out)).config.read_text())["data"] == tiny.data
