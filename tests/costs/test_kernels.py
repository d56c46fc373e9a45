"""CUDA's kernels on fake tensors, and the prediction on a GPU."""

from dataclasses import replace

import pytest
import torch

from leanmim.costs import count
from leanmim.costs.flops import flop_counter
from leanmim.data import Normalise
from leanmim.factory import build
from leanmim.step import make_optimizers, update
from tests.costs.small import SMALL


def test_bf16_on_cuda_keeps_more_than_on_the_cpu_and_less_than_fp32() -> None:
    """CUDA's autocast computes layer norms in float32, the CPU's does not."""
    cpu, cuda, full = (
        count(replace(SMALL["mae-vit"], batch_size=64, precision=precision), device)[0].saved_bytes
        for precision, device in (("bf16", "cpu"), ("bf16", "cuda"), ("fp32", "cuda"))
    )
    assert cpu < cuda < full


def test_cudnns_attention_keeps_and_costs_what_flash_does() -> None:
    """On Hopper torch prefers it; what is counted is flash."""
    q, found = torch.empty(2, 6, 196, 64, dtype=torch.bfloat16, device="meta"), []
    for kernel, arguments in (
        (torch.ops.aten._scaled_dot_product_flash_attention, (0.0,)),
        (torch.ops.aten._scaled_dot_product_cudnn_attention, (None, True, 0.0)),
    ):
        with flop_counter() as counter:
            kept = kernel(q, q, q, *arguments)[:2]  # the output, and the sum of each row
        found.append((sum(x.nbytes for x in kept), counter.get_total_flops()))
    assert found[0] == found[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", SMALL)
def test_prediction_on_a_gpu(name: str, precision: str) -> None:
    config = replace(SMALL[name], batch_size=64, precision=precision, input_size=(192,))
    cost, _ = count(config, "cuda")
    device = torch.device("cuda")
    model = build(config).to(device).train()
    model.autocast = torch.bfloat16 if precision == "bf16" else None
    optimizers = make_optimizers(model, config)
    normalise = Normalise([0.5] * 3, [0.5] * 3, device)
    images = torch.randint(0, 255, (64, 3, *config.size), dtype=torch.uint8)
    update(model, optimizers, [normalise(images)], 1, config.clip_grad)
    torch.cuda.reset_peak_memory_stats()
    update(model, optimizers, [normalise(images)], 1, config.clip_grad)
    assert cost.peak_bytes == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.1)
