"""Fine-tuning under signals, and with steps that are not finite."""

import json
import math
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from leanmim.classifier import finetune as module
from leanmim.classifier.finetune import finetune
from leanmim.classifier.tuning import Losses
from leanmim.config import Finetune, Pretrain
from leanmim.data import seed_of
from leanmim.errors import UserError
from leanmim.run import Run, load
from leanmim.signals import Stopped
from tests.helpers import equal
from tests.runs import noisy_tiles, untrained


@pytest.fixture
def config(tiny: Pretrain, tmp_path: Path) -> Finetune:
    """Six steps, with a moving average."""
    return Finetune(
        start=str(untrained(tiny)), data=str(noisy_tiles(tmp_path / "tiles", 4, 2, (40, 32))), out=str(tmp_path / "tuned"), epochs=2,
        batch_size=4, device="cpu", workers=0, log_every=1, ema=0.9, checkpoint_minutes=0.0,
    )  # fmt: skip


def broken(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """The loss of these steps is not a number."""
    seeds, whole = {seed_of(0, 0, step - 1, 0) for step in steps}, Losses.forward

    def losses(self: Losses, batch: Any) -> Iterator[Tensor]:
        yield from (loss * (math.nan if torch.initial_seed() in seeds else 1) for loss in whole(self, batch))

    monkeypatch.setattr(Losses, "forward", losses)


def test_a_bad_step_is_skipped_and_the_average_stays_finite(config: Finetune, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, {3})
    run = Run(finetune(config))
    (found,) = map(json.loads, run.bad_steps.read_text().splitlines())
    assert (found["step"], found["first_not_finite"], found["seeds"]) == (
        3,
        "the loss of segment 0",
        [seed_of(0, 0, 2, 0)],
    )
    assert len(found["files"][0]) == 4 and all((Path(config.data) / "train" / name).exists() or (Path(config.data) / name).exists()
                                               for name in found["files"][0])  # fmt: skip
    assert all(value.isfinite().all() for value in load(run.last)["average"].values())


def test_too_many_end_it_without_an_export(config: Finetune, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, {3, 4})
    with pytest.raises(UserError, match=r"not finite in step 4, number 2 in a row .*lower --blr"):
        finetune(replace(config, max_bad_steps=1))
    run = Run(Path(config.out))
    assert load(run.last)["step"] == 2
    assert not (run.folder / "export").exists()


def test_a_signal_during_the_evaluation(config: Finetune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is finished, no further step is taken, and the end is the same bit for bit."""
    config = replace(config, eval_every=1, checkpoint_minutes=10.0)
    whole = replace(config, out=str(tmp_path / "whole"))
    finetune(whole)
    predict = module.Judge.predict

    def signalled(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return predict(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="after step 3, with a checkpoint"):
        patch.setattr(module.Judge, "predict", signalled)
        finetune(config)
    assert load(Run(Path(config.out)).best)["step"] == 3
    finetune(config)
    one, two = (load(Run(Path(own.out)).last) for own in (config, whole))
    assert all(equal(one[key], two[key]) for key in ("step", "best", "model", "average", "optimizers"))
