"""The optimizer's state in host memory, end to end: same numbers, the moments of two parameters on the device."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from leanmim.config import Pretrain
from leanmim.offload_state import StateOffload
from leanmim.placement import offloads, offloads_state
from leanmim.step import load_state, update
from tests.helpers import batches_of, equal, in_segments, made, small, state_of

CPU = torch.device("cpu")


class Device:
    """Emulated: copies there are remembered by where they lie."""

    def __init__(self) -> None:
        self.here: dict[int, Tensor] = {}
        self.most = 0

    def fetch(self, x: Tensor) -> Tensor:
        new = x.clone()
        self.here[new.data_ptr()] = new
        self.most = max(self.most, len(self.here))
        return new

    def store(self, x: Tensor) -> Tensor:
        self.here.pop(x.data_ptr(), None)  # a first step makes moments on the device
        return x.clone()


@pytest.mark.parametrize("in_backward", [False, True])
def test_training_is_the_same_and_few_moments_are_on_the_device(in_backward: bool) -> None:
    config, device = small(), Device()
    model, optimizers = made(config)
    other, others = made(config)
    offload = StateOffload(optimizers, CPU, device.fetch, device.store)
    for step in range(3):
        accum, clip = (1, 0.0) if in_backward else (2, 0.05)
        means = update(model, optimizers, batches_of(config, step, accum), accum, clip, in_backward=in_backward)
        assert torch.equal(means, update(other, others, batches_of(config, step, accum), accum, clip))
        offload.settle()
        assert equal(state_of(model, optimizers), state_of(other, others))
    assert 2 <= device.most <= 4  # two moments of each of two parameters
    assert len(device.here) <= 2  # of the one that comes first in the next step


def test_it_continues_from_a_checkpoint_with_all_moments_on_the_host() -> None:
    config, device = small(), Device()
    model, optimizers = made(config)
    update(model, optimizers, batches_of(config, 0, 1))
    other, others = made(config)
    other.load_state_dict(model.state_dict())
    StateOffload(others, CPU, device.fetch, device.store)
    load_state(others, [deepcopy(optimizer.state_dict()) for optimizer in optimizers])
    assert not device.here
    for own in (optimizers, others):
        for group in own[0].param_groups:
            group["lr"] = 0.01
    update(model, optimizers, batches_of(config, 1, 1))
    update(other, others, batches_of(config, 1, 1))
    assert equal(state_of(model, optimizers), state_of(other, others))


def test_moments_lie_on_the_host_as_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    offload, empty_like = StateOffload([], CPU), torch.empty_like
    monkeypatch.setattr(offload, "lane", "of a GPU")  # which alone has pinned memory
    monkeypatch.setattr(torch, "empty_like", lambda x, pin_memory, **given: empty_like(x, **given))
    moments = torch.rand(4, 3, 2, 2).to(memory_format=torch.channels_last)
    host = offload.to_host(moments)
    assert torch.equal(host, moments) and host.stride() == moments.stride()


@pytest.mark.parametrize(
    ("config", "device", "segments", "state"),
    [
        (small(offload=True), "cuda", False, True),
        (in_segments(offload=True), "cuda", True, False),
        (small(offload=True), "cpu", False, False),
        (small(), "cuda", False, False),
    ],
)
def test_what_waits_depends_on_segments(config: Pretrain, device: str, segments: bool, state: bool) -> None:
    config.check()
    assert offloads(config, torch.device(device)) == segments
    assert offloads_state(config, torch.device(device)) == state
