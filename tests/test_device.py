"""What CUDA is set up with, wherever it is used."""

import os

import pytest
import torch

from leanmim.device import resolve_device

GROWS = "expandable_segments:True"


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
