"""Pictures for every test of the data feed."""

from pathlib import Path

import pytest

from tests.data.pictures import write


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / "images" / f"{i}.png", seed=i) for i in range(12)]
