"""A step that is not finite changes nothing."""

import math
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leanmim.recipes import MAE
from leanmim.step import update
from tests.helpers import batches_of, equal, in_segments, made, small, state_of


class Broken(nn.Module):
    """A model whose losses are multiplied by factors, and so are their gradients.

    Args:
        model: it.
        of_loss: for each segment.
        of_gradient: for each segment.
    """

    def __init__(self, model: nn.Module, of_loss: list[float], of_gradient: list[float]) -> None:
        super().__init__()
        self.model, self.of_loss, self.of_gradient = model, of_loss, of_gradient

    def forward(self, images: Tensor) -> Iterator[Tensor]:
        for loss, factor, steep in zip(self.model(images), self.of_loss, self.of_gradient, strict=True):
            loss.register_hook(lambda gradient, steep=steep: gradient * steep)
            yield loss.detach() * factor + (loss - loss.detach())


@pytest.mark.parametrize("clip_grad", [0.0, 0.05])
@pytest.mark.parametrize(
    ("of_loss", "of_gradient"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)]
)
def test_weights_moments_and_count_of_steps_stay(of_loss: float, of_gradient: float, clip_grad: float) -> None:
    """From the first step on; then the next step is as if there had been none in between."""
    config = small(MAE)
    model, optimizers = made(config)
    other, others = made(config)
    for step in range(3):
        before = deepcopy(model.state_dict())
        loss = update(Broken(model, [of_loss], [of_gradient]), optimizers, batches_of(config, 9, 1), 1, clip_grad)
        assert loss.isnan().all()
        assert equal(model.state_dict(), before)
        found = update(model, optimizers, batches_of(config, step, 1), 1, clip_grad)
        assert torch.equal(found, update(other, others, batches_of(config, step, 1), 1, clip_grad))
        assert equal(state_of(model, optimizers), state_of(other, others))


def test_it_counts_in_any_batch_of_the_step() -> None:
    config = small(MAE)
    model, optimizers = made(config)
    before = deepcopy(model.state_dict())
    batches = [batch * (math.nan if micro == 0 else 1) for micro, batch in enumerate(batches_of(config, 0, 2))]
    assert update(model, optimizers, batches, 2).isnan().all()
    assert equal(model.state_dict(), before)


def test_only_the_segment_with_the_fault_is_skipped() -> None:
    config = in_segments()
    model, optimizers = made(config)
    other, others = made(config)
    found = update(Broken(model, [1.0] * 4, [1.0, math.nan, 1.0, 1.0]), optimizers, batches_of(config, 0, 1))
    expected = update(other, others, batches_of(config, 0, 1))
    assert found.isnan().tolist() == [False, True, False, False]
    fresh, _ = made(config)
    for i in range(4):
        like = fresh if i == 1 else other
        assert equal(model.parameters_of(i), like.parameters_of(i))
    assert torch.equal(found[[0, 2, 3]], expected[[0, 2, 3]])


def test_an_optimizer_that_is_not_fused_skips_it_too() -> None:
    """As on MPS."""
    config: Any = small(MAE)
    model, optimizers = made(config)
    for group in optimizers[0].param_groups:
        group["fused"] = None
    optimizers[0].defaults["fused"] = False
    before = deepcopy(state_of(model, optimizers))
    assert update(Broken(model, [1.0], [math.nan]), optimizers, batches_of(config, 0, 1)).isnan().all()
    assert equal(state_of(model, optimizers), before)
    assert update(model, optimizers, batches_of(config, 0, 1)).isfinite().all()
    assert not equal(state_of(model, optimizers), before)
