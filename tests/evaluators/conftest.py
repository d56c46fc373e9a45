"""An untrained run and labelled tiles of three colours."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from leanmim.config import Pretrain
from tests.evaluators.samples import COLOURS
from tests.runs import untrained


@pytest.fixture
def tiles(tmp_path: Path) -> Path:
    """Noisy tiles of three colours: 24 of each to train on, 8 to validate."""
    root, draw = tmp_path / "tiles", np.random.default_rng(0)
    for part, count in (("train", 24), ("val", 8)):
        for name in COLOURS:
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                colour = np.array(Image.new("RGB", (16, 16), name), dtype=float)
                pixels = np.clip(colour + draw.normal(0, 40, colour.shape), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


@pytest.fixture
def options(tiny: Pretrain, tiles: Path) -> dict[str, object]:
    """Where and how to evaluate an untrained run."""
    return dict(run=str(untrained(tiny)), data=str(tiles), device="cpu", workers=0)
