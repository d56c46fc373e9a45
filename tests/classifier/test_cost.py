"""The counted cost of a fine-tuning step: what is known exactly, and that it grows as it must."""

from dataclasses import replace

import pytest
import timm
import torch

from leanmim.classifier.cost import count_tuning
from leanmim.classifier.recipes import MAE
from leanmim.config.base import Model
from leanmim.costs.flops import flop_counter
from tests.helpers import CONVNEXT, PLAIN

SETTING = replace(MAE, batch_size=4, accum=1, device="cpu", precision="fp32")
VIT = Model(model="vit_tiny_patch16_224", model_kwargs=PLAIN | {"global_pool": "avg"}, input_size=(32,))
OTHER = Model(model=CONVNEXT[0], model_kwargs=CONVNEXT[1], input_size=(64,))


@pytest.mark.parametrize("architecture", [VIT, OTHER])
def test_weights_gradients_and_moments_are_those_of_the_parameters(architecture: Model) -> None:
    size = {"img_size": 32} if architecture is VIT else {}
    model = timm.create_model(architecture.model, num_classes=5, **architecture.model_kwargs, **size)
    count = sum(p.numel() for p in model.parameters())
    cost, flops = count_tuning(SETTING, architecture, 5)
    assert cost.encoder_parameters == count
    assert cost.weight_bytes == 4 * count
    assert cost.gradient_bytes == 4 * count
    assert 8 * count <= cost.optimizer_bytes <= 8 * count + 8 * len(list(model.parameters()))
    with flop_counter() as counter:
        model.eval()(torch.zeros(1, 3, *architecture.size))
    assert flops["forward"]["encoder"] == pytest.approx(counter.get_total_flops(), rel=0.02)
    if architecture is VIT:  # torch counts the backward pass of a depthwise convolution as that of a full one
        assert 2.5 * cost.forward_flops_per_image < cost.train_flops_per_image <= 3.1 * cost.forward_flops_per_image


def test_memory_grows_with_the_batch_and_with_a_moving_average() -> None:
    costs = [count_tuning(replace(SETTING, batch_size=batch), VIT, 5)[0] for batch in (4, 8)]
    assert costs[0].peak_bytes < costs[1].peak_bytes
    assert costs[1].saved_bytes == pytest.approx(2 * costs[0].saved_bytes, rel=0.05)
    with_average, _ = count_tuning(replace(SETTING, ema=0.999), VIT, 5)
    assert with_average.weight_bytes == 2 * costs[0].weight_bytes
    in_two, _ = count_tuning(replace(SETTING, batch_size=4, accum=2), VIT, 5)
    assert in_two.peak_bytes < costs[1].peak_bytes


def test_cuda_needs_no_gpu() -> None:
    cost, _ = count_tuning(SETTING, VIT, 5, "cuda")
    assert cost.peak_bytes > 0
