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


class Late:
    """A reduction over two processes with the same gradients, which has its result when it is waited for."""

    def __init__(self, flat: Tensor, seen: list[str]) -> None:
        self.flat, self.seen = flat, seen
        seen.append("sent")

    def wait(self) -> None:
        self.flat *= 2
        self.seen.append("arrived")


@pytest.mark.parametrize("segment_first", [False, True])
def test_gradients_are_averaged_during_the_next_segments_forward_pass(
    segment_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the segment must step before it, to leave the device."""
    config, seen = in_segments(), list[str]()
    model, optimizers = made(config)
    other, others = made(config)
    for i, (block, optimizer) in enumerate(zip(model.encoder.backbone.blocks, optimizers, strict=True)):
        block.register_forward_hook(lambda *_, i=i: seen.append(f"forward {i}"))
        optimizer.register_step_post_hook(lambda *_, i=i: seen.append(f"step {i}"))
    expected = update(other, others, batches_of(config, 0, 1), clip_grad=0.05)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda flat, async_op: Late(flat, seen))
    means = update(model, optimizers, batches_of(config, 0, 1), clip_grad=0.05, segment_first=segment_first)
    assert torch.equal(means, expected) and equal(state_of(model, optimizers), state_of(other, others))
    own = [[f"forward {i}", "sent", "arrived", f"step {i}"] for i in range(4)]
    if not segment_first:
        begun = [[f"forward {i}", "arrived", f"step {i - 1}", "sent"] for i in range(1, 4)]
        own = [["forward 0", "sent"], *begun, ["arrived", "step 3"]]
    assert seen == [event for events in own for event in events]
