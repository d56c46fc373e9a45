"""A step that is recorded and repeated trains as one that is told anew each time."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from leanmim import graphed
from leanmim.calibration import Calibration, Setting
from leanmim.config import Pretrain
from leanmim.errors import UserError
from leanmim.graphed import GraphedUpdate
from leanmim.recipes import BIM, FASTMIM, MAE, SIMMIM
from leanmim.run import Run, load
from leanmim.step import update
from leanmim.train import pretrain as pretraining
from leanmim.train import training
from tests.helpers import PLAIN, equal, made, small, three_classes
from tests.runs import lines
from tests.tape import Tape

DROPPING = ("vit_tiny_patch16_224", {**PLAIN, "drop_path_rate": 0.2, "proj_drop_rate": 0.1})
KINDS = {
    "mae": small(MAE, DROPPING),
    "nested masks, patches thrown at random, clipping": small(
        BIM, segments=2, mask_ratio=(0.5, 0.75), throw=0.25, select="random", fill=1, clip_grad=1.0
    ),
    "patches thrown by distance, from a random one": small(MAE, throw=0.25, select_start="random"),
    "hog in fine masks": small(FASTMIM, mask_unit=4),
    "batch norms": small(FASTMIM, ("resnet10t", {}), input_size=(64,), mask_unit=32),
    "tokens, bf16": small(SIMMIM, mask_unit=16, precision="bf16"),
}


def trained(config: Pretrain, step: Any) -> tuple[Any, ...]:
    """Losses, weights and optimizers after steps at rates of their own; the loss of the fourth one is no number."""
    model, optimizers = made(config)
    model.autocast = torch.bfloat16 if config.precision == "bf16" else None
    draw, losses = torch.Generator().manual_seed(1), []
    for number in range(6):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 2.0**-7 * (number + 1)  # a number of float32
        images = torch.randn(4, 3, *config.size, generator=draw)
        images[0] *= torch.nan if number == 3 else 1
        losses.append(step(model, optimizers, [images], 1, config.clip_grad, [number]).nan_to_num(-1))
    state = {
        name: value.nan_to_num(-1) for name, value in model.state_dict().items()
    }  # running statistics of the fourth
    return losses, state, [optimizer.state_dict() for optimizer in optimizers]


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_losses_and_weights_are_the_same(config: Pretrain) -> None:
    tape = Tape()
    assert equal(trained(config, GraphedUpdate(tape)), trained(config, update))
    assert tape.repeats == 5  # of six, one to warm up


def test_a_run_with_phases_and_evaluation_is_the_same_run(
    tiny: Pretrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = dict(
        phase_scales=(1.0, 1.5), phase_starts=(0.0, 0.5), knn_data=three_classes(tmp_path / "labelled"), knn_every=1
    )
    plain, recorded = (replace(tiny, out=str(tmp_path / name), epochs=4, **own) for name in ("plain", "recorded"))
    pretraining.pretrain(plain)
    tapes: list[Tape] = []

    def updating(config: Pretrain) -> GraphedUpdate:
        tapes.append(Tape())
        return GraphedUpdate(tapes[-1])

    monkeypatch.setattr(training, "updating", updating)
    pretraining.pretrain(recorded)
    ends = [load(Run(Path(run.out)).last) for run in (plain, recorded)]
    torch.testing.assert_close(
        ends[1]["model"], ends[0]["model"], rtol=1e-6, atol=1e-9
    )  # the rate is rounded to float32
    assert [tape.repeats for tape in tapes] == [lines(plain)[-1]["step"] // 2 - 2] * 2  # two warm up, after each kNN


def test_what_is_forgotten_is_recorded_anew() -> None:
    config, tape = small(), Tape()
    step = GraphedUpdate(tape)

    def forgetful(*arguments: Any) -> Tensor:
        if arguments[-1] == [3]:
            step.forget()
        return step(*arguments)

    assert equal(trained(config, forgetful), trained(config, update))
    assert tape.repeats == 4  # of six: the first one and the fourth warm up


def test_the_tape_keeps_what_the_host_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the tests above would notice a number that is not read from memory."""
    monkeypatch.setattr(graphed, "reading", lambda *_: contextlib.nullcontext())
    assert not equal(trained(small(), GraphedUpdate(Tape())), trained(small(), update))


def test_the_host_may_not_read_a_number_while_it_records() -> None:
    with pytest.raises(AssertionError, match="the host waits"):
        Tape().record(lambda: torch.ones(1) * torch.ones(1).item())


@pytest.mark.parametrize(
    ("changes", "other"),
    [
        ({"checkpointing": True}, "--checkpointing"),
        ({"update_in_backward": True}, "--update-in-backward"),
        ({"batch_size": 4, "accum": 2}, "--accum 2"),
        ({"optimizer": "adamw8bit"}, "--optimizer adamw8bit"),
        ({"offload": True}, "--offload"),
    ],
)
def test_what_cannot_be_recorded_is_refused(changes: dict[str, Any], other: str) -> None:
    with pytest.raises(UserError, match=f"--cuda-graph and {other} do not go together"):
        replace(MAE, cuda_graph=True, **changes).check()
    assert replace(MAE, **changes).not_recorded == other


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_recorded_training_on_a_gpu_is_the_same_training(tiny: Pretrain, tmp_path: Path) -> None:
    """Masks, rates, a phase of another size, evaluation and checkpoints on the way; rounding aside, for sums by atomics may differ."""
    labelled = three_classes(tmp_path / "labelled")
    runs = [replace(tiny, out=str(tmp_path / str(graph)), device="cuda", cuda_graph=graph, epochs=4, workers=2, knn_data=labelled, knn_every=1,
                    phase_scales=(1.0, 1.5), phase_starts=(0.0, 0.5), checkpoint_minutes=0.0) for graph in (False, True)]  # fmt: skip
    for run in runs:
        pretraining.pretrain(run)
    losses = [[line["loss"] for line in lines(run) if "loss" in line] for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_step_that_turns_out_to_accumulate_is_not_recorded(tiny: Pretrain, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is measured before the batch is chosen that fits."""
    chosen = Calibration(Setting("fp32", 1, 0, False, False, cuda_graph=True), {}, [])
    monkeypatch.setattr(pretraining, "calibrated", lambda *_: chosen)
    monkeypatch.setattr(training, "updating", lambda config: recorded.append(config.cuda_graph))
    recorded: list[bool] = []
    pretraining.pretrain(replace(tiny, batch_size=2, accum=2))
    assert recorded == [False]


def test_a_cpu_has_none(tiny: Pretrain) -> None:
    with pytest.raises(UserError, match="--cuda-graph is for one process on an NVIDIA GPU"):
        pretraining.pretrain(replace(tiny, cuda_graph=True))
