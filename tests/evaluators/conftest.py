"""An untrained run and labelled tiles of three colours."""

from pathlib import Path

import pytest

from leanmim.config import Pretrain
from tests.runs import noisy_tiles, untrained


@pytest.fixture
def tiles(tmp_path: Path) -> Path:
    """Noisy tiles of three colours: 24 of each to train on, 8 to validate."""
    return noisy_tiles(tmp_path / "tiles", 24, 8)


@pytest.fixture
def options(tiny: Pretrain, tiles: Path) -> dict[str, object]:
    """Where and how to evaluate an untrained run."""
    return dict(run=str(untrained(tiny)), data=str(tiles), device="cpu", workers=0)
