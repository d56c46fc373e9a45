"""What is not finite first is named, in a model and in whole runs."""

import json
import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import leanmim
from leanmim.cli import main
from leanmim.config import Pretrain
from leanmim.data import Order, seed_of
from leanmim.mim import MIM
from leanmim.processes import ALONE
from leanmim.recipes import MAE
from leanmim.run import Run, load
from leanmim.train.non_finite import first_not_finite
from leanmim.train.phases import plan_phases
from leanmim.train.pretrain import pretrain
from leanmim.train.training import begin
from tests.helpers import equal, images_of, in_segments, made, small
from tests.runs import Refused, arguments, lines


def named(model: MIM, images: Tensor, losses: Any = None) -> str:
    return first_not_finite(model, losses or model.losses, [images], [0])


def test_what_is_not_finite_first_is_named_and_nothing_changes() -> None:
    config = in_segments()
    images = images_of(config)
    model, _ = made(config)
    before = deepcopy(model.state_dict())
    assert named(model, images) == ""
    assert equal(model.state_dict(), before)
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())

    assert named(model, images * math.inf) == "the input images"

    def inf_loss(batch: Tensor) -> Iterator[Tensor]:
        yield from (loss * (math.inf if i == 2 else 1) for i, loss in enumerate(model.losses(batch)))

    assert named(model, images, inf_loss) == "the loss of segment 2"

    def steep(batch: Tensor) -> Iterator[Tensor]:
        for loss in model.losses(batch):
            loss.register_hook(lambda gradient: gradient * math.inf)
            yield loss

    assert named(model, images, steep).startswith("the gradient of decoders.0.")

    with torch.no_grad():
        model.encoder.backbone.blocks[2].mlp.fc1.bias[3] = math.nan
    assert named(model, images) == "the output of encoder.backbone.blocks.2.mlp.fc1"


def test_of_a_compiled_model_too() -> None:
    config = small(MAE)
    model, _ = made(config)
    for decoder in model.decoders:
        decoder.compile()
    with torch.no_grad():
        model.decoders[0].layers[0].norm1.weight[0] = math.inf
    assert named(model, images_of(config)) == "the output of decoders.0.layers.0.norm1"


def broken(monkeypatch: pytest.MonkeyPatch, seeds: set[int]) -> None:
    """Losses are not a number in the batches of these seeds."""
    whole = MIM.losses

    def losses(self: MIM, images: Tensor, masks: Any = None) -> Iterator[Tensor]:
        factor = math.nan if torch.initial_seed() in seeds else 1
        yield from (loss * factor for loss in whole(self, images, masks))

    monkeypatch.setattr(MIM, "losses", losses)
    monkeypatch.setattr(MIM, "forward", losses)


def test_a_run_skips_a_bad_step_and_says_what_reproduces_it(
    tiny: Pretrain, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 6 of 8, in its second batch."""
    config, seed = replace(tiny, accum=2, batch_size=2, blr=0.01), seed_of(0, 0, 5, 1)
    broken(monkeypatch, {seed})
    folder = pretrain(config)
    (found,) = map(json.loads, Run(folder).bad_steps.read_text().splitlines())
    names = leanmim.data.open_source(config.data, 3).names
    order = [[names[index] for _, index in batch] for batch in Order(16, 2, 8, 10, 12, 0)]
    assert found == {
        "step": 6, "lr": lines(config)[5]["lr"], "rank": 0, "losses": [None], "first_not_finite": "the loss of segment 0",
        "seeds": [seed_of(0, 0, 5, 0), seed], "files": order,
    }  # fmt: skip
    assert [line.get("bad_steps", 0) for line in lines(config)] == [0, 0, 0, 0, 0, 1, 0, 0]
    assert "step 6/8  skipped, number 1 in a row: the loss of segment 0 is not finite" in capsys.readouterr().out
    assert load(Run(folder).last)["step"] == 8


def test_divergence_ends_the_run_and_keeps_the_checkpoint(
    tiny: Pretrain, monkeypatch: pytest.MonkeyPatch, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, and nothing is exported; where the fault is gone, the same command continues."""
    config = replace(tiny, checkpoint_minutes=0.0, max_bad_steps=1)
    with monkeypatch.context() as patch:
        broken(patch, {seed_of(0, 0, step, 0) for step in (5, 6, 7)})
        with pytest.raises(SystemExit) as end:
            main(arguments(config))
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert (
        said.startswith("leanmim: the loss of segment 0 is not finite in step 7, number 2 in a row") and "--blr" in said
    )
    run = Run(Path(config.out))
    assert load(run.last)["step"] == 5
    assert not (run.folder / "export").exists()
    main(arguments(config))
    assert load(run.last)["step"] == 8
    assert not run.bad_steps.read_text()


def test_running_statistics_are_those_before_a_skipped_step(tiny: Pretrain, tmp_path: Path) -> None:
    """Of a backbone with batch norms; a photo that is read as not finite would spoil them for ever."""
    config = replace(
        leanmim.FASTMIM, model="resnet10t", data=tiny.data, out=str(tmp_path / "run"), input_size=(64,), decoder_width=32, decoder_heads=2,
        decoder_depth=0, epochs=1, batch_size=4, blr=1e-3, workers=0, device="cpu",
    )  # fmt: skip
    plan = plan_phases(config, 16, 1)
    training, _ = begin(config, plan, leanmim.data.open_source(config.data, 3), None, torch.device("cpu"), ALONE)
    norms = [module for module in training.model.modules() if isinstance(module, nn.BatchNorm2d)]
    before = deepcopy(training.model.state_dict())
    images = torch.zeros(4, 3, 64, 64, dtype=torch.uint8)
    training.normalise.std[0] = 0.0
    assert training.step(0, iter([images])).isnan().all()
    assert norms and equal(training.model.state_dict(), before)
