"""Models without memory: to count what a step takes, and to know shapes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from leanmim.caches import empty_caches
from leanmim.signals import deferred


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Here tensors have shapes and no values, random numbers are not used up, and a signal waits for the end."""
    with deferred(), empty_caches(), FakeTensorMode(allow_non_fake_inputs=True), torch.random.fork_rng(devices=[]):
        yield
