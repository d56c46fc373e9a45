"""What the ways to save memory save, counted and as allocated."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from leanmim.config import Pretrain
from leanmim.costs import StepCost, count
from leanmim.costs.flops import Flops
from leanmim.factory import build
from leanmim.recompute import checkpoint_blocks
from leanmim.step import make_optimizers, update
from tests.costs.test_counting import allocated_peak
from tests.helpers import small

MODEL = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
MAE = small(model_kwargs=MODEL, input_size=(64,), decoder_width=64, decoder_depth=2, batch_size=8)


@cache
def counted(device: str = "cpu", **changes: Any) -> tuple[StepCost, dict[str, Flops]]:
    return count(replace(MAE, **changes), device)


@pytest.mark.parametrize("changes", [{"checkpointing": True}, {"update_in_backward": True}])
def test_prediction_is_what_is_allocated(changes: dict[str, bool]) -> None:
    config: Pretrain = replace(MAE, **changes)
    cost, _ = counted(**changes)
    model = build(config).train()
    if config.checkpointing:
        checkpoint_blocks(model.encoder, model.decoders)
    optimizers = make_optimizers(model, config)
    images = torch.randn(8, 3, 64, 64)

    def step() -> None:
        update(model, optimizers, iter([images.clone()]), in_backward=config.update_in_backward)

    step()
    weights = sum(t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers()))
    assert cost.peak_bytes == pytest.approx(weights + cost.optimizer_bytes + allocated_peak(step), rel=0.1)


def test_checkpointing_keeps_the_inputs_of_blocks_and_runs_them_again() -> None:
    (plain, flops), (cost, more) = (counted("cuda", precision="bf16", checkpointing=again) for again in (False, True))
    assert cost.saved_bytes < 0.5 * plain.saved_bytes and cost.peak_bytes < plain.peak_bytes
    assert cost.forward_flops_per_image == plain.forward_flops_per_image
    blocks = plain.forward_flops_per_image - flops["forward"]["target"]
    again = cost.train_flops_per_image - plain.train_flops_per_image
    assert 0.5 * blocks < again < 0.7 * blocks  # all but the last linear layer, whose output nothing needs
    assert more["training"]["decoder"] > flops["training"]["decoder"]


def test_in_backward_one_gradient_is_alive() -> None:
    (plain, flops), (cost, same) = counted(), counted(update_in_backward=True)
    largest = 4 * max(p.numel() for p in build(MAE).parameters())
    assert cost.gradient_bytes == largest < plain.gradient_bytes / 5
    assert same == flops and cost.optimizer_bytes == plain.optimizer_bytes


def test_offloaded_state_is_that_of_two_parameters() -> None:
    (plain, flops), (cost, same) = counted("cuda"), counted("cuda", offload=True)
    assert cost.optimizer_bytes < 0.3 * plain.optimizer_bytes and cost.peak_bytes < plain.peak_bytes
    assert cost.gradient_bytes == plain.gradient_bytes and same == flops
