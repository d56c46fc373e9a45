"""Steps in the backward pass: the same weights, one gradient at a time."""

import math
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import leanmim
from leanmim.config import Pretrain
from leanmim.errors import UserError
from leanmim.processes import Process
from leanmim.step import update
from leanmim.train.pretrain import train
from tests.helpers import batches_of, equal, in_segments, made, small, state_of


@pytest.mark.parametrize("config", [small(), in_segments()], ids=["end to end", "in segments"])
def test_a_step_in_backward_is_the_same_step(config: Pretrain) -> None:
    model, optimizers = made(config)
    other, others = made(config)
    alive: list[int] = []
    for parameter in other.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(
                lambda _: alive.append(sum(p.grad is not None for p in other.parameters()))
            )
    for step in range(3):
        means = update(model, optimizers, batches_of(config, step, 1))
        assert torch.equal(means, update(other, others, batches_of(config, step, 1), in_backward=True))
        assert equal(state_of(model, optimizers), state_of(other, others))
    assert max(alive) == 1 and not any(p.grad is not None for p in other.parameters())


def test_a_loss_that_is_not_finite_steps_nothing() -> None:
    model, optimizers = made(small())
    update(model, optimizers, batches_of(small(), 0, 1), in_backward=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (mean,) = update(model, optimizers, [next(batches_of(small(), 1, 1)) * math.nan], in_backward=True)
    assert mean.isnan() and equal(before, dict(model.state_dict()))
    assert {float(own["step"]) for own in optimizers[0].state.values()} == {1}


def test_from_a_gradient_that_is_not_finite_on_nothing_steps() -> None:
    model, optimizers = made(small())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    block = model.encoder.backbone.blocks[1]
    block.norm2.weight.register_hook(lambda gradient: gradient * math.inf)
    arrived: list[Tensor] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(arrived.append)
    (mean,) = update(model, optimizers, batches_of(small(), 0, 1), in_backward=True)
    names = {id(p): name for name, p in model.named_parameters()}
    place_of = next(i for i, p in enumerate(arrived) if p is block.norm2.weight)
    stepped = [not torch.equal(before[names[id(p)]], p) for p in arrived]  # type: ignore[arg-type]
    assert mean.isnan() and not any(stepped[place_of:]) and sum(stepped[:place_of]) > 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_grad": 1.0}, "give --clip-grad 0"),
        ({"accum": 2}, "give --accum 1"),
        ({"phase_scales": (0.5, 1.0), "phase_starts": (0.0, 0.5), "phase_accums": (1, 2)}, "give --accum 1"),
    ],
)
def test_what_it_does_not_go_with(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^--update-in-backward .*{message}, or leave --update-in-backward out"):
        replace(leanmim.MAE, update_in_backward=True, batch_size=2, **changes).check()


def test_several_processes_are_refused(tiny: Pretrain) -> None:
    with pytest.raises(UserError, match="gradients of several processes are averaged; leave it out, or train in one"):
        train(replace(tiny, update_in_backward=True), Process(0, 2), torch.device("cpu"), ExitStack())
    assert not Path(tiny.out).exists()
