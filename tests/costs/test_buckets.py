"""What the gradients of several processes take while they are averaged."""

from dataclasses import replace

import pytest

from leanmim.costs import count
from tests.helpers import in_segments, small


def test_among_several_processes_gradients_stay_in_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what other batches gave waits beside them."""
    config = small()
    alone, _ = count(config)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    among, both = (count(replace(config, accum=accum))[0] for accum in (1, 2))
    assert alone.gradient_bytes <= among.gradient_bytes < 1.5 * alone.gradient_bytes
    assert both.gradient_bytes == 2 * alone.gradient_bytes
    assert alone.peak_bytes < among.peak_bytes < both.peak_bytes


def test_segments_average_unless_the_processes_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    config = in_segments()
    alone, _ = count(config)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    assert count(config)[0].peak_bytes > alone.peak_bytes
    assert count(replace(config, pipeline=True))[0].peak_bytes == alone.peak_bytes
