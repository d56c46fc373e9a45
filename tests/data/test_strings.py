"""Many strings in one block of memory."""

import gc
import pickle

import pytest

from leanmim.data import Files
from leanmim.data.strings import Strings
from tests.corpus import NAMES

TEXTS = ["", "a.jpg", "naïve ü.jpeg", "new\nline", "\udcfe.png", "\ud83d\ude00", "\ud800x", "zero\0", *NAMES]


def test_it_is_a_sequence_of_the_same_strings() -> None:
    strings = Strings(TEXTS)
    assert list(strings) == TEXTS and len(strings) == len(TEXTS)
    assert [strings[place] for place in range(len(TEXTS))] == TEXTS
    assert strings[-1] == TEXTS[-1] and strings[1:4] == TEXTS[1:4] and "a.jpg" in strings
    assert list(pickle.loads(pickle.dumps(strings))) == TEXTS
    assert len(Strings([])) == 0
    with pytest.raises(IndexError):
        strings[len(TEXTS)]


def test_a_name_takes_its_own_bytes_and_eight() -> None:
    """Whatever the longest one is; and a reader that reads them all makes no object of its own that stays."""
    names = [f"class{place % 50:03d}/image_{place:07d}.jpg" for place in range(10_000)]
    source = Files("photos", [*names, "long" * 100], 3)
    assert len(pickle.dumps(source)) < sum(map(len, names)) + 8 * len(names) + 2000
    gc.collect()
    before = len(gc.get_objects())
    for place in range(len(source)):
        source.where(place)
    assert len(gc.get_objects()) - before < 100
