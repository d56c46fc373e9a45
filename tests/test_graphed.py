"""A step that is recorded and repeated trains as one that is told anew each time."""

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch

from leanmim import graphed
from leanmim.config import Pretrain
from leanmim.errors import UserError
from leanmim.graphed import GraphedUpdate
from leanmim.recipes import BIM, FASTMIM, MAE, SIMMIM
from leanmim.step import update
from leanmim.train import pretrain as pretraining
from tests.helpers import PLAIN, equal, made, small
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


def trained(config: Pretrain, step: Any, sizes: tuple[int, ...] = (4, 4, 4, 4, 3, 4)) -> tuple[Any, ...]:
    """Losses, weights and optimizers after steps at rates of their own; the loss of the fourth one is no number."""
    model, optimizers = made(config)
    model.autocast = torch.bfloat16 if config.precision == "bf16" else None
    draw, losses = torch.Generator().manual_seed(1), []
    for number, size in enumerate(sizes):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * (number + 1)
        images = torch.randn(size, 3, *config.size, generator=draw)
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
    assert tape.repeats == 4  # of six, one to warm up and one with fewer images


def test_more_images_than_recorded_are_recorded_anew() -> None:
    config, tape = small(), Tape()
    sizes = (4, 3, 4, 4)  # a photo of the second step was unreadable
    assert equal(trained(config, GraphedUpdate(tape), sizes), trained(config, update, sizes))
    assert tape.repeats == 3


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


def test_a_cpu_has_none(tiny: Pretrain) -> None:
    with pytest.raises(UserError, match="--cuda-graph is for one process on an NVIDIA GPU"):
        pretraining.pretrain(replace(tiny, cuda_graph=True))
