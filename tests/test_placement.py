"""Where a model trains: as a whole on the device, or one segment at a time."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from leanmim.factory import build
from leanmim.offload import Offload
from leanmim.placement import OnDevice, offloads, place
from leanmim.processes import Process
from leanmim.step import make_optimizers
from tests.helpers import images_of, in_segments, made, small


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


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("flag", ["", "static_graph", "find_unused_parameters"])
def test_gradients_of_a_generator_are_averaged_without_these_flags_only(
    flag: str, group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever sets one of them, or mends torch, sees it here."""
    if flag:
        parallel = partial(DistributedDataParallel, **{flag: True})
        monkeypatch.setattr("leanmim.placement.DistributedDataParallel", parallel)
    config, averaged = small(), list[int]()
    placement: Any = OnDevice(made(config)[0], torch.device("cpu"), Process(0, 2))

    def average(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        averaged.append(bucket.buffer().numel())
        done = torch.futures.Future[Tensor]()
        done.set_result(bucket.buffer())
        return done

    placement.losses.register_comm_hook(None, average)
    (loss,) = placement.losses(images_of(config))
    if flag == "find_unused_parameters":
        with pytest.raises(RuntimeError, match="ready only once"):
            loss.backward()
        return
    loss.backward()
    trained = sum(p.numel() for p in placement.losses.parameters() if p.requires_grad)
    assert sum(averaged) == (0 if flag == "static_graph" else trained)
