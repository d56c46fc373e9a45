"""Fake tensors on a GPU that is not there."""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode


def there() -> bool:
    """Whether this torch has them; older ones ask the driver for these, too."""
    try:
        with FakeTensorMode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.zeros(1).to("cuda").is_cuda
    except RuntimeError:
        return False


needed = pytest.mark.skipif(not there(), reason="this torch asks the driver for fake tensors, too")
