"""Tables that are computed once."""

import pytest

from leanmim.caches import CACHED, cached, empty_caches


def test_a_cached_function_computes_once_and_anew_among_empty_caches() -> None:
    calls = []

    @cached
    def square(x: int) -> int:
        calls.append(x)
        return x * x

    try:
        assert [square(3), square(3)] == [9, 9]
        with empty_caches():
            assert square(3) == 9
            assert len(calls) == 2
        assert square(3) == 9
        assert len(calls) == 3
        with pytest.raises(ZeroDivisionError), empty_caches():
            square(3)
            square(1 // 0)
        square(3)
        assert len(calls) == 5
    finally:
        CACHED.pop()


def test_the_tables_of_the_library_are_known() -> None:
    from leanmim import decoder, masking

    assert {decoder.cached_sincos, masking.distances} <= set(CACHED)
