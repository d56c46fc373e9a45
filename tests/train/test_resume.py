"""A run that was killed, stopped or finished continues, bit for bit, or says why it cannot."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from leanmim.cli import main
from leanmim.config import Pretrain
from leanmim.errors import UserError
from leanmim.run import Run, load, write_json
from leanmim.train.pretrain import pretrain
from tests.forks import finish, launch, until
from tests.helpers import equal
from tests.runs import arguments, lines, pretrain_until, weights


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_continued_is_bit_identical(tiny: Pretrain, tmp_path: Path, workers: int) -> None:
    """SIGKILL at arbitrary moments, three times; weights, optimizer state and metrics as if nothing had happened."""
    config = replace(tiny, epochs=12, accum=2, checkpoint_minutes=0.0, workers=workers, blr=0.01)
    whole = replace(config, out=str(tmp_path / "whole"))
    finish(arguments(whole), tmp_path / "whole.txt")
    run = Run(Path(config.out))
    for kill_after in (2, 9, 15):  # steps, of 24
        process = launch(arguments(config), tmp_path / "killed.txt")
        until(process, lambda steps=kill_after: run.metrics.exists() and run.metrics.read_text().count("\n") >= steps)
        process.kill()
        process.join()
        (run.folder / "checkpoints" / "last.pt.part").write_bytes(
            b"half a checkpoint"
        )  # as a kill while writing leaves it
    assert "continuing after step" in finish(arguments(config), tmp_path / "last.txt")

    one, two = load(run.last), load(Run(Path(whole.out)).last)
    assert one["step"] == two["step"] == 24
    assert equal(one["model"], two["model"])
    for key, value in one["optimizers"][0]["state"].items():
        assert equal(value, two["optimizers"][0]["state"][key])
    assert [(line["step"], line["loss"], line["lr"]) for line in lines(config)] == [
        (line["step"], line["loss"], line["lr"]) for line in lines(whole)
    ]


def test_a_finished_run_is_left_as_it_is(tiny: Pretrain) -> None:
    pretrain(tiny)
    before, written = weights(tiny), lines(tiny)
    pretrain(replace(tiny, workers=1))  # what changes no weight may differ
    assert equal(weights(tiny), before)
    assert lines(tiny) == written


def test_another_configuration_is_refused_with_the_difference(tiny: Pretrain) -> None:
    pretrain(tiny)
    before = {path: path.read_bytes() for path in Path(tiny.out).rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"mask_ratio: 0\.75 there, 0\.5 now\n.*seed: 0 there, 1 now\n.*--overwrite"):
        pretrain(replace(tiny, mask_ratio=0.5, seed=1))
    assert {path: path.read_bytes() for path in Path(tiny.out).rglob("*") if path.is_file()} == before
    pretrain(replace(tiny, seed=1, overwrite=True))
    assert load(Run(Path(tiny.out)).last)["config"]["seed"] == 1


def test_a_folder_of_something_else_is_not_touched(tiny: Pretrain, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("ten years")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="not a run of leanmim"):
            pretrain(replace(tiny, overwrite=overwrite))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_damaged_checkpoint_is_said_so_and_kept(tiny: Pretrain) -> None:
    pretrain(tiny)
    last = Run(Path(tiny.out)).last
    for file in last.parent.iterdir():  # the one before it, too
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"last\.pt' is damaged.*--overwrite"):
        pretrain(tiny)
    assert len(last.read_bytes()) == 1000
    torch.save({"epoch": 3}, last)
    with pytest.raises(UserError, match="not one of leanmim"):
        pretrain(tiny)


@pytest.mark.parametrize("to", ["group", "process"])
def test_sigterm_ends_with_a_checkpoint_and_the_same_command_continues(tiny: Pretrain, tmp_path: Path, to: str) -> None:
    """Between two lines of the log, which come out as if nothing had happened. The signal goes to readers too, as systemd's
    does, or to the training alone; no reader is left behind.
    """
    config = replace(tiny, epochs=10, log_every=3, blr=0.01, workers=2)
    run = Run(Path(config.out))
    process = launch(arguments(config), tmp_path / "said.txt", session=True)
    until(process, lambda: run.metrics.exists() and run.metrics.read_text().count("\n") >= 2)
    readers = psutil.Process(process.pid).children()
    (os.killpg if to == "group" else os.kill)(process.pid, signal.SIGTERM)
    process.join(60)
    err = (tmp_path / "said.txt").read_text()
    assert process.exitcode == 128 + signal.SIGTERM
    step = load(run.last)["step"]
    assert 6 <= step < 40
    assert f"leanmim: stopped by SIGTERM after step {step}, with a checkpoint; the same command continues" in err
    assert "Traceback" not in err
    assert len(readers) >= 2 and not psutil.wait_procs(readers, timeout=10)[1]

    main(arguments(config))
    whole = replace(config, out=str(tmp_path / "whole"))
    pretrain(whole)
    one, two = load(run.last), load(Run(Path(whole.out)).last)
    assert one["step"] == two["step"] == 40
    assert equal([one["model"], one["optimizers"]], [two["model"], two["optimizers"]])
    found, want = ([(line["step"], line["loss"], line["lr"]) for line in lines(of)] for of in (config, whole))
    assert found == want


def test_images_added_or_removed_since_then_are_named(tiny: Pretrain, photos: Path, tmp_path: Path) -> None:
    """Another order would be shown from then on; version 0.1.0 kept no list, and its runs continue."""
    data = tmp_path / "photos"
    shutil.copytree(photos, data)
    config = replace(tiny, data=str(data))
    pretrain_until(config, 3)
    before = Run(Path(config.out)).last.read_bytes()
    shutil.copy(data / "cat.jpg", data / "zebra.jpg")
    with pytest.raises(UserError, match=r"1 added: zebra\.jpg\nPut them back"):
        pretrain(config)
    (data / "cat.jpg").unlink()
    with pytest.raises(UserError, match=r"1 added: zebra\.jpg\n  1 removed: cat\.jpg\n"):
        pretrain(config)
    assert Run(Path(config.out)).last.read_bytes() == before

    Run(Path(config.out)).names.unlink()
    pretrain(config)
    assert load(Run(Path(config.out)).last)["step"] == 8
    assert "zebra.jpg" in json.loads(Run(Path(config.out)).names.read_text())["names"]


def as_version_0_1_0(config: Pretrain) -> None:
    """Turn a run folder into what that version wrote."""

    def named_as_then(values: dict) -> dict:
        new = ("schedule", "warmup_share", "interpolation", "linear_init", "decode")
        return {name.replace("phase_", "stage_"): value for name, value in values.items() if name not in new}

    run = Run(Path(config.out))
    write_json(run.config, named_as_then(json.loads(run.config.read_text())))
    state = load(run.last)
    assert not state.pop("losses") and not state.pop("bad_steps")
    state = state | {"format": "leanmim-1", "stage": state.pop("phase"), "config": named_as_then(state["config"])}
    torch.save(state, run.last)
    run.names.unlink()


def test_a_run_of_version_0_1_0_continues(tiny: Pretrain, tmp_path: Path) -> None:
    """In either phase."""
    config = replace(tiny, phase_scales=(1.0, 1.25), phase_starts=(0.0, 0.5), blr=0.01, decode="exact")
    whole = replace(config, out=str(tmp_path / "whole"))
    pretrain(whole)
    for stop in (3, 6):
        old = replace(config, out=str(tmp_path / f"stopped after {stop}"))
        pretrain_until(old, stop)
        as_version_0_1_0(old)
        assert '"stage_scales"' in Run(Path(old.out)).config.read_text()
        pretrain(old)
        assert equal(weights(old), weights(whole))
        assert [line["loss"] for line in lines(old)] == [line["loss"] for line in lines(whole)]
        assert load(Run(Path(old.out)).last)["format"] == "leanmim-2"


def test_a_run_of_version_0_1_0_by_another_recipe_is_refused(tiny: Pretrain) -> None:
    """FastMIM's warm-up was another then."""
    config = replace(tiny, recipe="fastmim", warmup_share=0.025)
    pretrain_until(config, 3)
    as_version_0_1_0(config)
    with pytest.raises(UserError, match=r"warmup_share: 0\.05 there, 0\.025 now\n"):
        pretrain(config)
