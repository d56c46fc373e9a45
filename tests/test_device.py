"""Copies to a GPU, emulated: what waits for what; what CUDA is set up with; what is deterministic."""

import os
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from leanmim import device as devices
from leanmim.device import deterministic, resolve_device, resolve_precision, to_device
from leanmim.errors import UserError
from tests import fake_cuda

CUDA = torch.device("cuda")
GROWS = "expandable_segments:True"


@fake_cuda.needed
def test_a_pinned_batch_is_copied_beside_the_computation_which_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: "Stream") -> None:
            events.append((self.name, "waits for", other.name))

    copies, work = Stream("copies"), Stream("work")

    @contextmanager
    def use(stream: Stream) -> Any:
        events.append(stream.name)
        yield
        events.append("end")

    monkeypatch.setattr(devices, "lane", lambda device: copies)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: work)
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(Tensor, "record_stream", lambda x, stream: events.append(("kept for", stream.name)))
    with FakeTensorMode():
        for pinned in (True, False):
            monkeypatch.setattr(Tensor, "is_pinned", lambda x, pinned=pinned: pinned)
            assert to_device(torch.zeros(2), CUDA).device.type == "cuda"
    assert events == [
        "copies",
        "end",
        ("work", "waits for", "copies"),
        ("kept for", "work"),
    ]  # and of the other nothing


def test_a_gpu_that_emulates_bf16_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert resolve_precision("auto", CUDA) is None and resolve_precision("bf16", CUDA) == torch.bfloat16


def test_deterministic_algorithms_are_asked_for_and_nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    cudnn = torch.backends.cudnn
    with deterministic(False, "auto"):
        assert not torch.are_deterministic_algorithms_enabled()
    with deterministic(True, "cpu"):
        assert torch.are_deterministic_algorithms_enabled() and cudnn.deterministic
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with deterministic(True, "auto"):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled() and not cudnn.deterministic
    with (
        pytest.raises(UserError, match="--deterministic: torch has no deterministic max_unpool2d; leave"),
        deterministic(True, "cpu"),
    ):
        raise RuntimeError(
            "max_unpool2d does not have a deterministic implementation, but you set 'torch.use_deterministic_algorithms(True)'."
        )
    with pytest.raises(RuntimeError, match="something else"), deterministic(True, "cpu"):
        raise RuntimeError("something else")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(UserError, match="CUBLAS_WORKSPACE_CONFIG=:4096:8"), deterministic(True, "cuda"):
        pass


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": GROWS, "PYTORCH_CUDA_ALLOC_CONF": GROWS}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"},) * 2,
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"},) * 2,
    ],
)
def test_the_allocators_segments_grow_unless_the_user_says_otherwise(
    given: dict[str, str], found: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    precisions: list[str] = []
    monkeypatch.setattr(os, "environ", dict(given))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", precisions.append)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    resolve_device("auto")
    assert os.environ == given and precisions == []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert resolve_device("cuda", 1) == torch.device("cuda", 1)
    assert os.environ == found and precisions == ["high"]
