"""Segments step one by one, and their gradients are gone before the next one runs."""

from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from leanmim.step import update
from tests.helpers import batches_of, equal, in_segments, made, of_segments, state_of


def all_at_the_end(
    losses: Callable[[Tensor], Iterator[Tensor]],
    optimizers: list[AdamW],
    images: Iterable[Tensor],
    accum: int,
    clip_grad: float,
) -> Tensor:
    """One backward pass over all graphs of a batch, one step of all optimizers."""
    means = 0.0
    for batch in images:
        found = list(losses(batch))
        (sum(found) / accum).backward()
        means = means + torch.stack(found).detach() / accum
    for optimizer, parameters in zip(optimizers, of_segments(optimizers), strict=True):
        if clip_grad:
            norm = torch.stack([p.grad.norm() for p in parameters]).norm()
            assert norm > clip_grad
            nn.utils.clip_grad_norm_(parameters, clip_grad)
        optimizer.step()
        optimizer.zero_grad()
    return means


@pytest.mark.parametrize(
    ("accum", "clip_grad", "autocast"),
    [(1, 0.0, None), (2, 0.0, None), (1, 0.05, None), (2, 0.05, torch.bfloat16)],
)
def test_stepping_as_you_go_is_stepping_at_the_end(accum: int, clip_grad: float, autocast: torch.dtype | None) -> None:
    config = in_segments()
    model, optimizers = made(config)
    other, others = made(config)
    model.autocast = other.autocast = autocast
    for step in range(3):
        means = update(model, optimizers, batches_of(config, step, accum), accum, clip_grad)
        expected = all_at_the_end(other, others, batches_of(config, step, accum), accum, clip_grad)
        assert torch.equal(means, expected)
        assert equal(state_of(model, optimizers), state_of(other, others))
    assert not equal(model.state_dict(), made(config)[0].state_dict())


@pytest.mark.parametrize("accum", [1, 2])
def test_gradients_are_gone_before_the_next_segment_runs(accum: int) -> None:
    config = in_segments()
    model, optimizers = made(config)
    segments, seen = of_segments(optimizers), []

    def before() -> None:
        seen.append([sum(p.grad is not None for p in segment) / len(segment) for segment in segments])

    for block in model.encoder.backbone.blocks:
        block.register_forward_pre_hook(lambda *_: before())
    update(model, optimizers, batches_of(config, 0, accum), accum)
    gone = [[float(j >= i) * (accum - 1) for j in range(4)] for i in range(4)]
    kept = [[float(j < i) for j in range(4)] for i in range(4)]
    assert seen == kept * (accum - 1) + gone
    assert all(p.grad is None for segment in segments for p in segment)
