"""Where a model trains: as a whole on the device, or one segment at a time."""

from dataclasses import replace

import pytest
import torch

from leanmim.factory import build
from leanmim.offload import Offload
from leanmim.placement import OnDevice, offloads, place
from leanmim.step import make_optimizers
from tests.helpers import in_segments, made


@pytest.mark.parametrize(
    ("asked", "device", "expected"), [(True, "cuda", True), (True, "cpu", False), (False, "cuda", False)]
)
def test_segments_wait_in_host_memory_where_a_device_has_its_own(asked: bool, device: str, expected: bool) -> None:
    assert offloads(in_segments(offload=asked), torch.device(device)) == expected


def test_on_a_cpu_the_model_is_there_as_a_whole_and_trains() -> None:
    config = in_segments(offload=True)
    model, optimizers = made(config)
    placement = place(model.eval(), optimizers, config, torch.device("cpu"))
    assert isinstance(placement, OnDevice) and placement.losses is model and model.training
    placement.settle()
    with placement.whole():
        assert all(p.device.type == "cpu" for p in model.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_one_segment_is_there() -> None:
    config = replace(in_segments(offload=True), device="cuda")
    model = build(config)
    placement = place(model, make_optimizers(model, config), config, torch.device("cuda"))
    assert isinstance(placement, Offload)
    with placement.whole():
        assert all(p.is_cuda for p in model.parameters())
